"""Many processes are one in alignment too: SFT, reward model, PPO, REINFORCE and best-of-n by each plan that
they can use, and rounds that change hands between two minibatches. Two processes with gloo on the CPU,
started once for all of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import chatwright as cw
from chatwright import checkpoint, compiler, files, tensor_files
from chatwright.config import UsageError
from chatwright.discovery import current_name
from chatwright.metrics import TIMED, read_metrics
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.recipe import read_recipe
from chatwright.stages import ppo
from chatwright.train.parallel import context
from chatwright.train.planning import plan
from chatwright.train.planning.dry_run import DryRun
from chatwright.train.planning.program import PlannedStage
from support.launching import ROOT, cpu_environment, torchrun
from support.many_alignment import train

PLANS = ("ddp", "fsdp")

FIT = {"compile": False, "precision": "fp32", "log_every": 1, "save_every": 1e6}
ROUND = {
    "iterations": 2,
    "batch_size": 8,
    "minibatch_size": 4,
    "max_prompt_tokens": 40,
    "max_new_tokens": 12,
    "min_tokens": 1,
    "max_repeats": 0.9,
    "min_correlation": -1.0,
    "min_distinct": 0.0,
    "kl_budget": 100.0,
    "kl_target": 1.0,
    "precision": "fp32",
    "optim": {"learning_rate": 5e-4, "eps": 1e-5, "schedule": "linear", "warmup": 0.3},
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {
        "fit": {**FIT, "steps": 12, "batch_size": 8, "micro_batch": 2},
        "held_out": 8,
        "optim": {"learning_rate": 4e-3, "schedule": "trapezoid"},
    },
    "reward": {
        "fit": {**FIT, "steps": 10, "batch_size": 4, "micro_batch": 1},
        "k": 3,
        "max_tokens": 32,
        "optim": {"learning_rate": 2e-3, "schedule": "trapezoid"},
    },
    "ppo": {**ROUND, "epochs": 2},
    "reinforce": {
        **ROUND,
        "minibatch_size": 8,
        "samples_per_prompt": 2,
        "baseline": "leave-one-out",
        "entropy_coefficient": 0.01,
    },
    "bestofn": {
        "prompts": 5,
        "n": 3,
        "max_prompt_tokens": 40,
        "max_new_tokens": 12,
        "min_tokens": 1,
        "min_correlation": -1.0,
        "baseline_policy": "ppo",
    },
}
FEW = tuple(STAGES)
COMPILED = {
    "sft compiled": {**STAGES["sft"], "fit": {**STAGES["sft"]["fit"], "compile": True}},
    "reward compiled": {**STAGES["reward"], "fit": {**STAGES["reward"]["fit"], "compile": True}},
    "ppo compiled": {**STAGES["ppo"], "compile": True},
}
CALM = {"optim": {"learning_rate": 4e-4, "schedule": "trapezoid"}}
HALF = {
    "sft half": {**STAGES["sft"], **CALM, "fit": {**STAGES["sft"]["fit"], "precision": "bf16"}},
    "reward half": {**STAGES["reward"], **CALM, "fit": {**STAGES["reward"]["fit"], "precision": "bf16"}},
    "ppo half": {**STAGES["ppo"], "precision": "bf16", "policy_precision": "bf16"},
}
"""Products in bfloat16, which `auto` takes where the processor has them; the tests' machines need not."""
ROUNDED = {
    "sft half": {"within": 4e-3, "near": 3e-3, "norms": 1e-2},
    "reward half": {"within": 4e-3, "near": 2e-2, "norms": 4e-2, "zero": 2e-2},
    "ppo half": {"within": 1e-3, "near": 2e-2, "norms": 2e-2},
}
"""What rounding does to them. Weights whose gradient is nothing else may go as far as AdamW goes in ten
steps; the reward model's zero and scale (`zero`) are means of outputs of 8 bits."""
LORA = {"rank": 3}
STAGES |= {
    "sft lora": {**STAGES["sft"], "lora": LORA},
    "reward lora": {**STAGES["reward"], "lora": LORA},
    "ppo lora": {**ROUND, "lora": LORA},
    "reinforce lora": {**STAGES["reinforce"], "lora": LORA},
    # all that has a state of its own: a shared trunk, an average, general text beside the answers and its
    # tax, a gold measure
    "ppo whole": {
        **ROUND,
        "critic": "shared",
        "ema": 0.5,
        "text": "tokenizer",
        "ptx": 0.5,
        "ptx_windows": 1,
        "ptx_context": 32,
        "gold": "sentiment",
    },
    "ppo whole lora": {
        **ROUND,
        "ema": 0.5,
        "text": "tokenizer",
        "ptx": 0.5,
        "ptx_windows": 1,
        "ptx_context": 32,
        "gold": "reward",
        "lora": LORA,
    },
}
MANY = tuple(stage for stage in STAGES if stage not in FEW)
STAGES |= COMPILED | HALF


@dataclass
class Launches:
    """Directories of finished runs by name; `begin` starts further ones."""

    root: Path
    inputs: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def work(self, stage: str, plan: str, out: str = "", stop: int = 0, **sizes: int) -> dict[str, Any]:
        inputs = {key: str(path) for key, path in self.inputs.items()}
        return {
            "stage": stage.split()[0],
            "out": str(self[out or f"{plan} {stage}"]),
            "inputs": inputs,
            "stop": stop,
            "settings": {**STAGES[stage], "parallel": {"plan": plan, **sizes}},
        }

    def begin(self, processes: int, *work: dict[str, Any]) -> str:
        """What they printed."""
        file = self.root / "work.json"
        file.write_text(json.dumps(work), encoding="utf-8")
        command = torchrun(processes, "-m", "support.many_alignment", str(file))
        done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    def alone(self, stage: str, out: str = "", stop: int = 0) -> None:
        """One process, this one, from where the directory stands."""
        train(self.work(stage, "auto", out or f"one {stage}", stop))


@pytest.fixture(scope="module")
def inputs(sft_bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    """A reward model of ten steps, and fewer dialogues than elsewhere: what every stage here starts from."""
    made = Launches(tmp_path_factory.mktemp("aligned"), dict(sft_bench.inputs))
    few = made["data"]
    few.mkdir()
    for file in sft_bench.inputs["data"].glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (few / file.name).write_text(
            "".join(lines[:60] if "dialogues" in file.name else lines), encoding="utf-8"
        )
    made.inputs |= {"data": few, "pretrain": sft_bench.inputs["sft"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATWRIGHT_DEVICE", "cpu")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        made.alone("reward")
        made.inputs |= {"reward": made["one reward"], "ppo": made["one ppo"]}
        yield made
        torch.set_num_threads(threads)


LOOK = 7
"""Two passes over two minibatches: a round asks four times before a minibatch, and once at its end. The
seventh time is in the second round, before its second minibatch."""


@pytest.fixture(scope="module")
def launches(inputs: Launches) -> Launches:
    """Each stage alone, then by two processes under each plan; and rounds that change hands in their
    middle."""
    for stage in FEW:
        if stage != "reward":
            inputs.alone(stage)
    inputs.alone("ppo", "one, then ddp", stop=LOOK)
    plans = {"bestofn": ("ddp",)}
    inputs.begin(
        2,
        *(inputs.work(stage, plan) for stage in FEW for plan in plans.get(stage, PLANS)),
        inputs.work("ppo", "ddp", "one, then ddp"),
        inputs.work("ppo", "fsdp", "fsdp, then fsdp", stop=LOOK),
        inputs.work("ppo", "fsdp", "fsdp, then one", stop=LOOK),
        inputs.work("ppo", "fsdp", "fsdp, then fsdp"),
    )
    inputs.alone("ppo", "fsdp, then one")
    return inputs


def rows(directory: Path) -> list[dict[str, Any]]:
    found = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


def result(directory: Path) -> dict[str, Any]:
    return files.read_json(directory / "result.json")  # type: ignore[no-any-return]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Those of the result, which is an ordinary directory under each plan."""
    found = checkpoint.Checkpoint(directory / result(directory)["model"])
    found.verify()
    assert not found.is_sharded
    tensors = found.tensors("model")
    if (
        "scalar.bias" in tensors
    ):  # no pair of answers says anything about it: what moves it is rounding, and the offset takes it up
        tensors["offset"] = tensors["offset"] - tensors.pop("scalar.bias")[0]
        tensors["scale"] = tensors["scale"].log()
    return tensors


def same(
    one: Path,
    two: Path,
    *,
    within: float = 5e-5,
    near: float = 1e-5,
    norms: float = 5e-5,
    zero: float | None = None,
) -> None:
    """Every number of every row and of the result, and every weight."""
    expected, found = rows(one), rows(two)
    assert expected and len(expected) == len(found)
    for row, other in zip(expected, found, strict=True):
        norm, another = row.pop("gradient_norm", 0.0), other.pop("gradient_norm", 0.0)
        assert another == pytest.approx(norm, rel=norms, abs=norms)
        assert other == pytest.approx(row, rel=near, abs=near)
    assert result(two)["measures"] == [
        [None if value is None else pytest.approx(value, rel=near, abs=near) for value in measure]
        for measure in result(one)["measures"]
    ]
    if result(one)["model"] is None:
        return
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        allowed = zero if zero is not None and name in ("offset", "scale") else within
        torch.testing.assert_close(theirs[name], tensor, atol=allowed, rtol=0)


@pytest.mark.parametrize(
    ("stage", "plan"),
    [(stage, plan) for stage in FEW for plan in PLANS if (stage, plan) != ("bestofn", "fsdp")],
)
def test_two_processes_are_one(launches: Launches, stage: str, plan: str) -> None:
    same(launches[f"one {stage}"], launches[f"{plan} {stage}"])
    assert [file.name for file in launches[f"{plan} {stage}"].rglob("*.partial")] == []


def test_enough_happens_to_tell_them_apart(launches: Launches) -> None:
    """Far beyond the tolerance: losses move, the policy leaves the reference, beta moves, answers differ from
    round to round."""
    for stage in ("sft", "reward"):
        losses = [row["loss"] for row in rows(launches[f"one {stage}"]) if "loss" in row]
        assert max(losses) - min(losses) > 0.01
    for stage in ("ppo", "reinforce"):
        first, *_, last = rows(launches[f"one {stage}"])
        assert abs(last["kl"]) > 1e-3 and last["beta"] != first["beta"] and last["tokens"] != first["tokens"]
    before, after = weights(launches.inputs["sft"]), weights(launches["one sft"])
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 5e-3


@pytest.mark.parametrize("hands", ["one, then ddp", "fsdp, then one", "fsdp, then fsdp"])
def test_a_round_changes_hands_between_two_minibatches(launches: Launches, hands: str) -> None:
    same(launches["one ppo"], launches[hands])
    assert not (launches[hands] / "checkpoints" / checkpoint.UNFINISHED).exists()


def test_a_round_that_goes_on_in_parts_is_uninterrupted_bit_for_bit(launches: Launches) -> None:
    whole, parted = launches["fsdp ppo"], launches["fsdp, then fsdp"]
    assert rows(whole) == rows(parted)
    left, right = weights(whole), weights(parted)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_result_that_was_in_parts_has_all_that_one_has(launches: Launches) -> None:
    """And is a model to chat with."""
    one, parts = (launches[name] / result(launches[name])["model"] for name in ("one ppo", "fsdp ppo"))
    assert {file.name for file in one.iterdir()} == {file.name for file in parts.iterdir()}
    kept, own = (checkpoint.Checkpoint(found) for found in (one, parts))
    assert kept.tensors("optimizer").keys() - own.tensors("optimizer").keys() == {
        "rng"
    }  # each process has one
    for name, tensor in kept.tensors("critic").items():
        torch.testing.assert_close(own.tensors("critic")[name], tensor, atol=5e-5, rtol=0)
    assert cw.load(launches["fsdp ppo"]).logits([[1, 2, 3]]).shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ("stage", "plan"), [("ppo", "tp"), ("reinforce", "tp"), ("bestofn", "fsdp"), ("bestofn", "tp")]
)
def test_plans_that_a_stage_cannot_use_are_refused(inputs: Launches, stage: str, plan: str) -> None:
    with pytest.raises(UsageError, match=rf"parallel\.plan {plan}: {current_name(stage)} .*use ddp"):
        inputs.alone(stage, "refused") if plan == "auto" else train(inputs.work(stage, plan, "refused"))
    assert not (inputs["refused"] / "checkpoints").exists()


def test_the_recipe_for_eight_gpus_can_be_divided_among_them_at_every_stage() -> None:
    stages = read_recipe(ROOT / "recipes" / "cluster" / "gpt2-124m.yaml", {}).stages
    assert list(stages)[-4:] == ["sft", "reward", "ppo", "eval"]
    for name in ("sft", "reward", "ppo"):
        config = stages[name].config
        fit = getattr(config, "fit", None)
        size, micro = (fit.batch_size, fit.micro_batch) if fit else (config.minibatch_size, 0)
        context.check(
            config.parallel, context.arrange(config.parallel, 8, 8), batch_size=size, micro_batch=micro
        )


@pytest.mark.parametrize(
    ("stage", "setting"),
    [("ppo", "minibatch_size 4"), ("reinforce", "minibatch_size 8"), ("sft", "batch_size 8")],
)
def test_what_cannot_be_divided_is_called_by_its_name(
    inputs: Launches, stage: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        UsageError, match=rf"^{setting} cannot be divided among 3 processes: make it a multiple of 3"
    ):
        train(inputs.work(stage, "ddp", "undivided"))


def test_the_plan_counts_the_copy_that_samples() -> None:
    """And what is cut once: weights, of the frozen models too."""
    shape = GPTConfig.preset("modern-nano")
    with torch.device("meta"):
        size = 4 * GPT(shape).parameter_count()
    seen = DryRun(1.0, {"step": {"weights": 8e6, "activations": 1e6}}, 0.0)
    one, two = (
        plan.memory_of(
            seen,
            PlannedStage("ppo", ppo.STAGE.plan, shape, ppo.Config(), shards=shards, processes=shards),
        )
        for shards in (1, 2)
    )
    assert "sampler" not in one and two["sampler"] == size
    assert (one["weights"], two["weights"], two["activations"]) == (8e6, 4e6, 1e6)


# ---- slow: adapters and all that has a state, hsdp, tp -----------------------------------------------------


@pytest.fixture(scope="module")
def more(inputs: Launches) -> Launches:
    """The same for adapters, averages, general text; four processes; a model that can be cut by heads."""
    for stage in ("sft", "ppo", *MANY):
        inputs.alone(stage, f"again one {stage}")
    inputs.begin(2, *(inputs.work(stage, plan) for stage in MANY for plan in PLANS))
    inputs.begin(4, *(inputs.work(stage, "hsdp", shard=2) for stage in ("sft", "ppo", "ppo whole")))
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stage", MANY)
def test_two_processes_are_one_with_all_that_has_a_state(more: Launches, stage: str, plan: str) -> None:
    one, two = more[f"again one {stage}"], more[f"{plan} {stage}"]
    same(one, two)
    if "lora" in stage and not stage.startswith("reward"):
        ours, theirs = (
            tensor_files.load_tensors(found / "adapter" / "adapter_model.safetensors") for found in (one, two)
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo", "ppo whole"])
def test_four_processes_in_two_groups_are_one(more: Launches, stage: str) -> None:
    same(more[f"again one {stage}"], more[f"hsdp {stage}"])


@pytest.mark.slow
@pytest.mark.skipif(
    compiler.compiler_missing() is not None,
    reason=f"compiled blocks are NOT covered: {compiler.compiler_missing()}",
)
@pytest.mark.parametrize("plan", PLANS)
def test_compiled_blocks_in_two_processes_are_plain_ones_in_one(inputs: Launches, plan: str) -> None:
    """The compiler's kernels round in another way. Where a gradient is nothing but rounding AdamW takes whole
    steps by it: one weight of 12,288 was 9e-5 away after ten of up to 2e-3, while losses and measures agree
    to 1e-5 as they do without a compiler."""
    for stage in COMPILED:
        name = stage.split()[0]
        inputs.alone(name, f"{plan}, compared with {name}")
        said = inputs.begin(2, inputs.work(stage, plan))
        assert "compile: on, block by block" in said and "compiler failed" not in said
        same(inputs[f"{plan}, compared with {name}"], inputs[f"{plan} {stage}"], within=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_products_in_bfloat16_are_as_near_in_two_processes_as_rounding_allows(
    inputs: Launches, plan: str
) -> None:
    """At ddp each process rounds what one would round. FSDP casts a block's parameters itself, and is then as
    far from float32 as one process is, elsewhere: at first by 3e-5 and 4e-4 in SFT's loss, by 1e-3 and 9e-4
    in the reward model's, whose norms are 2.5 % apart after five steps, each 2 % or less from the float32
    ones. PPO counts: one clipped token more, of some sixty, is 0.017."""
    for stage in HALF:
        inputs.alone(stage, f"{plan}, compared with {stage}")
        inputs.begin(2, inputs.work(stage, plan))
        one, two = inputs[f"{plan}, compared with {stage}"], inputs[f"{plan} {stage}"]
        same(one, two, **(ROUNDED[stage] if plan == "fsdp" or stage == "ppo half" else {}))


@pytest.mark.slow
def test_products_cut_in_two_are_whole_ones(
    inputs: Launches, sft_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT and reward model under `tp`, from a model with two key-value heads; slowly, as rounding is soon a
    thousand times as large where the gradient's norm is 16."""
    from chatwright.stages import pretrain
    from chatwright.train.fit_config import FitConfig

    config = pretrain.Config(
        preset="modern-nano",
        model={"context": 64, "kv_heads": 2},
        fit=FitConfig(steps=20, batch_size=8, **FIT),
    )
    sft_bench.run(pretrain, config, tmp_path / "pretrain")
    cut = Launches(tmp_path / "cut", {**inputs.inputs, "pretrain": tmp_path / "pretrain"})
    cut.root.mkdir()
    monkeypatch.setitem(
        STAGES, "reward", {**STAGES["reward"], "optim": {"learning_rate": 2e-4, "schedule": "trapezoid"}}
    )
    cut.alone("sft")
    cut.inputs["sft"] = cut["one sft"]
    cut.alone("reward")
    cut.begin(2, cut.work("sft", "tp"), cut.work("reward", "tp"))
    for stage in ("sft", "reward"):
        same(cut[f"one {stage}"], cut[f"tp {stage}"])
    said = cut.begin(
        2, cut.work("sft compiled", "tp")
    )  # torch's compiler fails here (2.13), and is not asked
    assert "compile: off (torch's compiler fails on the cut products of tp)" in said
    same(cut["tp sft"], cut["tp sft compiled"], within=1e-6)
    shutil.rmtree(cut.root)
