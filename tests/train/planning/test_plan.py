"""Plans: a dry run sees what a real step does, the micro-batch fits, and what cannot fit is refused with the
sum."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chatwright import cli, memory, optim
from chatwright.config import UserError
from chatwright.discovery import stage_verb
from chatwright.model.config import GPTConfig
from chatwright.optim import OptimConfig
from chatwright.stages import pretrain
from chatwright.train.fit_config import FitConfig
from chatwright.train.parallel.context import SINGLE_PROCESS
from chatwright.train.planning import plan, timing
from chatwright.train.planning.dry_run import dry_run
from chatwright.train.planning.program import PlannedStage, program_of
from support.launching import ROOT, child_environment


def subject(
    preset: str = "modern-nano", optimiser: str = "muon", model: dict[str, Any] | None = None, **fit: Any
) -> PlannedStage:
    settings = FitConfig(**{"steps": 100, "batch_size": 8, "compile": False, "precision": "fp32", **fit})
    config = pretrain.Config(
        preset=preset, model=model or {}, fit=settings, optim=OptimConfig(name=optimiser)
    )  # type: ignore[arg-type]
    return PlannedStage("pretrain", pretrain.PLAN, GPTConfig.preset(preset, **config.model), config)


def seen_of(what: PlannedStage, *, micro: int = 8, micro_batches: int = 1, layers: int = 0) -> Any:
    return dry_run(
        program_of(what),
        layers or what.shape.layers,
        what.config.optim,
        micro=micro,
        micro_batches=micro_batches,
    )


def test_operations_are_those_of_a_real_step() -> None:
    """torch's own counter over a real forward and backward pass, on a model without fused attention's own
    count."""
    what = subject(optimiser="adamw")
    model = pretrain.GPT(what.shape)
    from chatwright.model.attention import plain_attention

    model.use_attention(plain_attention)
    step, _, _ = pretrain.fast_step(model, what.fit, alone=True)
    with FlopCounterMode(display=False) as counter:
        step(pretrain.TokenBatch(torch.zeros(8, what.shape.context + 1, dtype=torch.long))).loss.backward()
    program = program_of(what)

    def plain(layers: int) -> Any:
        made = program(layers)
        made.trained[0].use_attention(plain_attention)  # type: ignore[operator]
        return made

    found = dry_run(plain, what.shape.layers, what.config.optim, micro=8, micro_batches=1)
    assert found.flop == counter.get_total_flops() > 1e8


def test_fused_attention_is_counted_as_its_products_are() -> None:
    what = subject(optimiser="adamw")
    shape = what.shape
    without = seen_of(
        replace(what, shape=replace(shape, heads=1, kv_heads=1, head_dim=shape.head_dim * shape.heads))
    )
    with_heads = seen_of(replace(what, shape=replace(shape, kv_heads=shape.heads)))
    assert without.flop < with_heads.flop * 1.2
    product = 2 * 8 * shape.heads * shape.context**2 * shape.head_dim  # q k^T, all rows and layers' heads
    linear = (
        6
        * 8
        * shape.context
        * sum(
            p.numel()
            for name, p in pretrain.GPT(replace(shape, kv_heads=shape.heads)).named_parameters()
            if p.ndim == 2
        )
    )
    assert with_heads.flop == pytest.approx(linear + shape.layers * 7 * product, rel=1e-9)


def test_micro_batches_change_memory_but_not_the_operations() -> None:
    what = subject()
    whole, parts = seen_of(what), seen_of(what, micro=2, micro_batches=4)
    assert parts.flop == whole.flop
    assert sum(parts.phases["step"].values()) < 0.6 * sum(whole.phases["step"].values())


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_the_state_is_what_real_optimisers_hold(optimiser: str) -> None:
    what = subject(optimiser=optimiser)
    model = pretrain.GPT(what.shape)
    optimisers = optim.build(model, what.config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for one in optimisers:
        one.step()
    held = sum(
        v.nbytes for one in optimisers for s in one.state.values() for v in s.values() if torch.is_tensor(v)
    )
    parts = seen_of(what).memory
    assert parts["optimiser"] == held
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())


def test_many_layers_are_a_line_through_few(monkeypatch: pytest.MonkeyPatch) -> None:
    what = subject(model={"layers": 9})
    line = seen_of(what)
    monkeypatch.setattr("chatwright.train.planning.dry_run.DIRECT", 9)
    direct = dry_run(program_of(what), 9, what.config.optim, micro=8, micro_batches=1)
    assert line.parameters == direct.parameters
    assert line.flop == pytest.approx(direct.flop, rel=1e-9)
    for phase, parts in direct.phases.items():
        assert sum(line.phases[phase].values()) == pytest.approx(sum(parts.values()), rel=0.03)


def test_critics_and_averages_are_planned_for() -> None:
    """Copies of the model: policy, reference and judge always; a critic of its own and an average where there
    are any."""
    from chatwright.model.lora import LoRAConfig
    from chatwright.stages import (
        ppo,
        reinforce,  # the planner's subjects here are pre-training's otherwise
    )

    shape = subject().shape
    size = sum(p.nbytes for p in pretrain.GPT(shape).parameters())

    def planned(verb: str, config: object) -> PlannedStage:
        return PlannedStage(verb, stage_verb(verb).load().STAGE.plan, shape, config)

    def weights(verb: str, config: object) -> float:
        return seen_of(planned(verb, config), micro=4).memory["weights"] / size

    assert weights("reinforce", reinforce.Config()) == pytest.approx(3, abs=0.3)
    assert weights("ppo", ppo.Config(critic="shared")) == pytest.approx(3, abs=0.3)
    separate = weights("ppo", ppo.Config())
    assert separate == pytest.approx(4, abs=0.5)
    assert weights("ppo", ppo.Config(ema=0.9)) - separate == pytest.approx(1, abs=0.05)
    lora = LoRAConfig(rank=2)  # policy and judge contain the reference and the critic
    for verb, config in (("ppo", ppo.Config), ("reinforce", reinforce.Config)):
        assert weights(verb, config(lora=lora, ema=0.9)) == pytest.approx(2, abs=0.3)
    assert weights("ppo", ppo.Config(lora=lora, critic="shared")) == pytest.approx(2, abs=0.3)
    assert planned("ppo", ppo.Config()).rows == (1, 128)
    assert planned("ppo", ppo.Config(text="tokenizer", ptx=1.0)).rows == (1, shape.context)
    assert planned("reinforce", reinforce.Config(iterations=5)).steps == 5


CASES = {
    "modern": {"preset": "modern-tiny", "batch": 8, "compile": False, "precision": "fp32"},
    "gpt2": {
        "preset": "gpt2",
        "model": {"layers": 4, "width": 256, "heads": 4, "vocab_size": 4096, "context": 256},
        "batch": 12,
        "compile": False,
        "precision": "fp32",
        "optim": "adamw",
    },
}


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc/self/status: predicted memory was not compared"
)
@pytest.mark.parametrize("name", ["modern", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_memory_within_a_fifth_of_what_happens(name: str) -> None:
    code = (
        "import sys, json; import plan; case = json.loads(sys.argv[1]);"
        "print(json.dumps(plan.happened(case, 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(CASES[name])],
        cwd=ROOT,
        env=child_environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"),
        capture_output=True,
        text=True,
        check=True,
    )
    happened = json.loads(done.stdout.splitlines()[-1])["bytes"]
    case = CASES[name]
    what = subject(case["preset"], case.get("optim", "muon"), case.get("model"), batch_size=case["batch"])  # type: ignore[arg-type]
    predicted, _ = plan.predict(what)
    assert predicted.above_baseline == pytest.approx(happened, rel=0.2)


def test_the_largest_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    what, real, known = subject(batch_size=96), plan.dry_run, {}

    def remembered(program: Any, layers: int, config: OptimConfig, *, micro: int, micro_batches: int) -> Any:
        """A dry run takes a second or more, and each is asked for several times here."""
        if (micro, micro_batches) not in known:
            known[micro, micro_batches] = real(
                program, layers, config, micro=micro, micro_batches=micro_batches
            )
        return known[micro, micro_batches]

    monkeypatch.setattr(plan, "dry_run", remembered)
    need = {n: plan.predict(what, micro=n)[0].total for n in (32, 48, 96)}
    assert need[32] < need[48] < need[96]
    for size, expected in ((need[96], 96), (need[96] - 1, 48), (need[48] - 1, 32)):
        assert plan.choose(what, timed=False, available=size).micro == expected
    for size, expected in ((need[48], 48), (need[96], 0)):  # 0: as the settings have it
        monkeypatch.setenv("CHATWRIGHT_MEMORY", str(size))
        assert (
            plan.ahead("pretrain", what.plan, what.config, what.shape, SINGLE_PROCESS).fit.micro_batch
            == expected
        )


def test_what_does_not_fit_is_refused_with_the_sum() -> None:
    with pytest.raises(UserError) as refusal:
        plan.choose(subject(), timed=False, available=2.6e8)
    numbers = re.search(r"needs ([\d.]+) MB = (.*?); this machine has 260.0 MB", str(refusal.value))
    assert numbers is not None and "micro-batches of 1" in str(refusal.value)
    parts = [float(part.split()[-1]) for part in numbers[2].split(" + ")]
    assert sum(parts) == pytest.approx(float(numbers[1]), rel=0.03)  # the smallest parts are not shown
    with pytest.raises(UserError, match=r"micro_batch 0 lets the plan choose"):
        plan.choose(subject(micro_batch=8), timed=False, available=2.6e8)


@pytest.mark.slow
def test_the_largest_shape_is_refused_without_being_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "gpt3-175b", "--memory_gb", "24"]) == 1
    said = capsys.readouterr().out
    assert "weights 698" in said and "24.0 GB" in said


def test_the_verb_shows_every_training_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["plan", "tiny", "--time", "false", "--pretrain.fit.batch_size", "4", "--memory_gb", "8"])
        == 0
    )
    said = capsys.readouterr().out
    for word in ("pretrain", "sft", "reward", "ppo", "4.2 M", "4 x 256", "8.0 GB"):
        assert word in said
    assert cli.main(["plan", "tiny", "--memory_gb", "-1"]) == 2
    assert cli.main(["plan", "gpt2", "--sft.fit.steps", "3"]) == 2


def test_small_runs_are_not_planned() -> None:
    assert not plan.worth_planning(subject())
    assert plan.worth_planning(subject("gpt2"))


def test_the_memory_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, size in (("8GB", 8e9), ("500m", 5e8), ("2e9", 2e9)):
        monkeypatch.setenv("CHATWRIGHT_MEMORY", text)
        assert memory.memory_budget_bytes() == size and memory.memory_is_limited()
    for text in ("much", "-1GB", "0", "inf", "nan"):
        monkeypatch.setenv("CHATWRIGHT_MEMORY", text)
        with pytest.raises(UserError, match="8GB"):
            memory.memory_budget_bytes()
    monkeypatch.delenv("CHATWRIGHT_MEMORY")
    total = memory.total_memory_bytes()
    assert total is None or memory.memory_budget_bytes() == pytest.approx(0.92 * total)


def test_time_is_the_sum_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    what = subject()
    one = seen_of(what).operations
    monkeypatch.setattr(timing, "_time", lambda operation, span: 0.001)
    plain, compiled = (timing.seconds_of(one, compiled=flag, budget=0.0) for flag in (False, True))
    assert plain == pytest.approx(timing.APART * 0.001 * sum(one.values()))
    assert compiled < plain
    monkeypatch.undo()
    for operation in one:
        assert timing._time(operation, 0.0) > 0  # each can be done with made-up numbers


def test_a_slow_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what takes next to nothing is timed once."""
    matrix, small = torch.ops.aten.mm.default, torch.ops.aten.exp.default
    calls: dict[Any, int] = {}

    def taken(operation: Any, span: float) -> float:
        calls[operation[0]] = number = calls.get(operation[0], 0) + 1
        return {matrix: 1.0, small: 0.001}[operation[0]] * (5.0 if number == 2 else 1.0)

    monkeypatch.setattr(timing, "_time", taken)
    assert timing.parts_of({(matrix,): 3.0, (small,): 2.0}, budget=0.0) == (
        pytest.approx(3.0),
        pytest.approx(0.002),
    )
    assert calls == {matrix: timing.ROUNDS, small: 1}
    assert timing.together(3.0, 0.002, compiled=True) == pytest.approx(3.0 + 0.002 * timing.FUSED)


def test_a_run_that_starts_waits_for_a_fiftieth_of_its_length_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(
        plan, "seconds_of", lambda operations, *, compiled, budget: asked.append(budget) or 1.0
    )
    for seconds, budget in ((100.0, 2.0), (3600.0, timing.SECONDS)):
        what = subject()
        what = replace(what, config=replace(what.config, fit=replace(what.fit, steps=0, seconds=seconds)))
        plan._ahead(what)
        assert asked.pop() == pytest.approx(budget)
