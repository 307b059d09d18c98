"""Many processes are one: equal loss curves under every plan, checkpoints that change hands, a killed process
that is no matter. Two and four processes with gloo on the CPU; what only GPUs can show skips, and says what
it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import write_scaling_docs

from chatwright import checkpoint, cli, rendezvous, runtime, sharded, tensor_files
from chatwright.config import UsageError, UserError, build, to_yaml
from chatwright.files import write_json
from chatwright.language_model import load_parts
from chatwright.metrics import TIMED, read_metrics
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.recipe import read_recipe
from chatwright.stages import pretrain
from chatwright.train import loop
from chatwright.train.parallel import context
from chatwright.train.parallel.context import MeshShape, ParallelConfig
from chatwright.train.parallel.start import start_parallel
from chatwright.train.stopping import Interrupted
from chatwright.train.workspace import Workspace
from support.launching import ROOT, cpu_environment, torchrun
from support.many import stopping_after
from support.waiting import wait_until

SEED, STEPS, PART = 11, 50, 20
SETTINGS: dict[str, Any] = {
    "preset": "modern-nano",
    "model": {"context": 32, "kv_heads": 2},
    "optim": {"name": "adamw", "learning_rate": 2e-3, "schedule": "trapezoid"},
    "fit": {
        "steps": STEPS,
        "batch_size": 8,
        "micro_batch": 2,
        "compile": False,
        "precision": "fp32",
        "log_every": 1,
        "save_every": 1e6,
        "evaluate_every": 25,
        "keep": 9,
    },
}


MUON = {
    "name": "muon",
    "learning_rate": 2e-3,
    "matrix_learning_rate": 0.02,
    "schedule": "trapezoid",
    "matrix_precision": "fp32",
}


def settings(plan: str = "auto", *, micro_batch: int = 2, muon: bool = False, **sizes: int) -> dict[str, Any]:
    fit = {
        **SETTINGS["fit"],
        "micro_batch": micro_batch,
        "save_steps": PART if plan == "fsdp" and not muon else 0,
    }
    return {
        **SETTINGS,
        "parallel": {"plan": plan, **sizes},
        "fit": fit,
        "optim": MUON if muon else SETTINGS["optim"],
    }


@dataclass
class Launches:
    """Directories of finished runs by name; `begin` starts further ones."""

    root: Path
    inputs: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def work(self, name: str, plan: dict[str, Any], stop: int = 0, **more: Any) -> dict[str, Any]:
        inputs = {key: str(path) for key, path in self.inputs.items()}
        return {"out": str(self[name]), "inputs": inputs, "settings": plan, "stop": stop, **more}

    def begin(self, processes: int, *work: dict[str, Any]) -> None:
        file = self.root / f"work-{time.monotonic_ns()}.json"
        file.write_text(json.dumps(work), encoding="utf-8")
        command = torchrun(processes, "-m", "support.many", str(file))
        done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    def alone(self, name: str, stop: int = 0, *, muon: bool = False) -> None:
        """One process, this one, from where the directory stands."""
        workspace = Workspace(self[name], SEED, self.inputs, described=pretrain.STAGE.metrics)
        try:
            report = pretrain.run(build(pretrain.Config, settings(muon=muon), where="test"), workspace)
            write_json(self[name] / "result.json", {"model": report.model})
        except Interrupted:
            assert stop


@pytest.fixture(scope="module")
def launches(tokenizer_bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    """Two processes by each plan, one after the other; the checkpoint of step 20 goes through several
    hands."""
    made = Launches(tmp_path_factory.mktemp("many"), {"tokenizer": tokenizer_bench.inputs["tokenizer"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATWRIGHT_DEVICE", "cpu")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        made.alone("one")
        made.begin(
            2,
            made.work("ddp", settings("ddp")),
            made.work("fsdp", settings("fsdp")),
            made.work("tp", settings("tp", micro_batch=8)),
            made.work("parted", settings("fsdp"), stop=PART, copy_to=str(made["handed on"])),
            made.work("parted", settings("fsdp")),
            {"muon": str(made["muon.safetensors"])},
        )
        stopper = loop.Stopper
        patch.setattr(loop, "Stopper", stopping_after(15))
        made.alone("handed on", stop=15)  # from two processes to one ...
        patch.setattr(loop, "Stopper", stopper)
        made.begin(4, made.work("handed on", settings("hsdp", shard=2)))  # ... to four
        yield made
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def more_launches(launches: Launches) -> Launches:
    """Runs that take another minute: every plan with Muon, and four processes from the first step on."""
    launches.alone("one muon", muon=True)
    launches.begin(
        2,
        launches.work("ddp muon", settings("ddp", muon=True)),
        launches.work("fsdp muon", settings("fsdp", muon=True)),
        launches.work("tp muon", settings("tp", micro_batch=8, muon=True)),
    )
    launches.begin(4, launches.work("hsdp", settings("hsdp", shard=2)))
    return launches


def curve(directory: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(directory / "metrics.jsonl") if key in row]


def rows(directory: Path) -> list[dict[str, Any]]:
    found = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


def final(directory: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.checkpoints(directory / "checkpoints")[-1]
    assert found.step == STEPS and found.state()["final"]
    return found.tensors("model")


@pytest.mark.parametrize("plan", ["ddp", "fsdp", "tp", "handed on"])
def test_the_loss_curve_is_that_of_one_process(launches: Launches, plan: str) -> None:
    """`handed on` went from 2 processes (fsdp) to 1 to 4 (hsdp)."""
    equal_curves(launches, plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["hsdp", "ddp muon", "fsdp muon", "tp muon"])
def test_the_loss_curve_of_every_plan_is_that_of_one_process(more_launches: Launches, plan: str) -> None:
    """Muon's products are in float32 here: it brings tiny singular values to 1, and with them the last bits
    in which two orders of a sum differ; bf16 has too few of them."""
    equal_curves(more_launches, plan)


def equal_curves(launches: Launches, plan: str) -> None:
    """Losses, norms of the whole gradient and held-out measures."""
    alone = "one muon" if "muon" in plan else "one"
    for key, count in (("loss", STEPS), ("gradient_norm", STEPS), ("bits_per_byte", 2)):
        one, many = curve(launches[alone], key), curve(launches[plan], key)
        assert len(one) == len(many) == count
        assert many == pytest.approx(one, abs=1e-5 if key != "gradient_norm" else 5e-5)
    assert (
        curve(launches[alone])[-1] < curve(launches[alone])[0] - 2
    )  # it has learnt, far beyond the tolerance
    for name, tensor in final(launches[alone]).items():
        torch.testing.assert_close(final(launches[plan])[name], tensor, atol=1e-4, rtol=0)


def test_only_one_process_writes(launches: Launches) -> None:
    steps = [row["step"] for row in read_metrics(launches["handed on"] / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_resumed_in_parts_is_uninterrupted_bit_for_bit(launches: Launches) -> None:
    assert rows(launches["parted"]) == rows(launches["fsdp"])
    whole, parted = final(launches["fsdp"]), final(launches["parted"])
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_a_checkpoint_written_beside_training_is_that_of_its_moment(launches: Launches) -> None:
    """`fsdp` went on while step 20 was being written; `parted` waited."""
    beside, waited = (
        checkpoint.Checkpoint(launches[name] / "checkpoints" / f"step-{PART:06}")
        for name in ("fsdp", "handed on")
    )
    for found in (beside, waited):
        found.verify()
        assert found.is_sharded and len(list((found.path / tensor_files.PARTS).iterdir())) == 2
    for part in ("model", "optimizer"):
        left, right = beside.tensors(part), waited.tensors(part)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert {name.split(".")[-1] for name in beside.tensors("optimizer")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
        "0",
        "1",
    }


def test_no_checkpoint_in_parts_holds_a_pickle(launches: Launches) -> None:
    files = [
        file.name
        for file in (launches["fsdp"] / "checkpoints" / f"step-{PART:06}").rglob("*")
        if file.is_file()
    ]
    assert sorted(files) == [
        "generation_config.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.json",
        "tokenizer.json",
    ]


def test_a_damaged_part_is_named(launches: Launches, tmp_path: Path) -> None:
    copy = tmp_path / "step-000020"
    shutil.copytree(launches["handed on"] / "checkpoints" / copy.name, copy)
    part = copy / tensor_files.PARTS / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00002.* is damaged"):
        checkpoint.Checkpoint(copy).verify()
    part.write_bytes(content[:100])
    with pytest.raises(UserError, match="is damaged"):
        sharded.describe(copy)


def test_a_missing_tensor_and_another_shape_are_named(launches: Launches) -> None:
    path = launches["fsdp"] / "checkpoints" / f"step-{PART:06}"
    with pytest.raises(UserError, match="missing tensor 'model/nothing'"):
        sharded.read(path, {"model/nothing": torch.zeros(1)}, alone=True)
    with pytest.raises(UserError, match=r"embed.weight has shape \(.*\), the model has \(1,\)"):
        sharded.read(path, {"model/embed.weight": torch.zeros(1)}, alone=True)


def test_a_run_in_parts_is_a_model_to_chat_with(launches: Launches) -> None:
    """At the end, and in the middle of it."""
    assert {
        file.name for file in checkpoint.checkpoints(launches["handed on"] / "checkpoints")[-1].path.iterdir()
    } == {"generation_config.json", "model.safetensors", "state.json", "tokenizer.json"}
    for directory in (launches["handed on"], launches["fsdp"] / "checkpoints" / f"step-{PART:06}"):
        logits = load_parts(directory).model(torch.tensor([[1, 2, 3]]))
        assert logits.shape[:2] == (1, 3) and bool(logits.isfinite().all())


def test_muon_sees_whole_matrices(launches: Launches) -> None:
    """Each process holds a part of each matrix; to orthogonalise the parts would be something else
    altogether."""
    found = tensor_files.load_tensors(launches["muon.safetensors"])
    assert len(found) == 8
    for number in range(4):
        assert torch.equal(found[f"{number}.whole"], found[f"{number}.parts"])


def worker(launcher: int, rank: int) -> int:
    """Process id of a worker that torchrun started; 0 when there is none (any more)."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                return int(entry.name)
        except (OSError, ValueError):
            continue
    return 0


@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc: Linux only"
)
def test_a_killed_process_is_no_matter(launches: Launches, tmp_path: Path) -> None:
    """SIGKILL in the middle: torchrun starts both processes again, they go on from the newest checkpoint by
    themselves, and the end is that of the run that nobody disturbed."""
    plan = settings("fsdp")
    plan["fit"] |= {"save_steps": 4}
    file = tmp_path / "pretrain.yaml"
    file.write_text(to_yaml({"tokenizer": str(launches.inputs["tokenizer"]), **plan}), encoding="utf-8")
    out = tmp_path / "run" / "pretrain"
    arguments = [
        "-m",
        "chatwright",
        "pretrain",
        "--config",
        str(file),
        "--out",
        str(out),
        "--seed",
        str(SEED),
    ]
    with (tmp_path / "log").open("w+") as log:
        launcher = subprocess.Popen(
            torchrun(2, *arguments, restarts=3), env=cpu_environment(), stdout=log, stderr=log
        )
        try:
            wait_until((out / "checkpoints" / "step-000012").exists, "the checkpoint", process=launcher)
            victim = worker(launcher.pid, 1)
            assert victim > 0  # 0 would be everybody in this group, pytest too
            os.kill(victim, signal.SIGKILL)
            assert launcher.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            workers = [pid for pid in (worker(launcher.pid, rank) for rank in (0, 1)) if pid]
            launcher.kill()
            for (
                pid
            ) in workers:  # they are leaders of their own sessions, and would wait for each other for ever
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    told = (tmp_path / "log").read_text()
    assert told.count("going on from step") == 1
    assert rows(out) == rows(launches["fsdp"])
    left, right = final(out), final(launches["fsdp"])
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [found.name for found in out.parent.parent.rglob("*.partial")] == []


def test_processes_that_are_started_again_do_not_hear_the_dead() -> None:
    """Two attempts in one store: everyone has the name of its attempt, though the first one's words are still
    there."""
    store = torch.distributed.HashStore()
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            names.append({pool.submit(rendezvous.agree, store, rank, 3) for rank in (1, 2, 0)})
    first, second = ({one.result() for one in attempt} for attempt in names)
    assert len(first) == len(second) == 1 and first != second


def test_a_process_that_stays_away_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="process 0 waited 0 seconds for all 2 processes"):
        rendezvous.agree(torch.distributed.HashStore(), 0, 2)


def test_wrong_sizes_are_refused_once_by_a_real_launch(launches: Launches, tmp_path: Path) -> None:
    arguments = [
        "-m",
        "chatwright",
        "pretrain",
        "--tokenizer",
        str(launches.inputs["tokenizer"]),
        "--preset",
        "modern-nano",
        "--out",
        str(tmp_path / "x" / "pretrain"),
        "--parallel.plan",
        "tp",
    ]
    done = subprocess.run(
        torchrun(2, *arguments), env=cpu_environment(), capture_output=True, text=True, timeout=120
    )
    line = (
        "chatwright: the model's kv_heads, 1, cannot be divided among 2 processes: choose another "
        "parallel.tensor"
    )
    assert done.returncode != 0 and done.stderr.count("cannot be divided") == 1
    assert line in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "x" / "pretrain" / "checkpoints").exists()


def test_a_plan_without_torchrun_is_one_clear_line(launches: Launches, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "pretrain",
        "--tokenizer",
        str(launches.inputs["tokenizer"]),
        "--preset",
        "modern-nano",
        "--out",
        str(tmp_path / "pretrain"),
        "--parallel.plan",
        "fsdp",
    ]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "parallel.plan fsdp needs processes that torchrun starts: torchrun --nproc-per-node 2" in told


@pytest.mark.parametrize(
    ("plan", "world", "local", "mesh_shape"),
    [
        (ParallelConfig(), 8, 8, MeshShape(8, 1, 1)),
        (ParallelConfig("ddp"), 8, 8, MeshShape(8, 1, 1)),
        (ParallelConfig("fsdp"), 8, 4, MeshShape(1, 8, 1)),
        (ParallelConfig("hsdp"), 16, 8, MeshShape(2, 8, 1)),
        (ParallelConfig("hsdp", shard=4), 16, 8, MeshShape(4, 4, 1)),
        (ParallelConfig("tp"), 8, 8, MeshShape(1, 1, 8)),
        (ParallelConfig("tp", tensor=2), 8, 8, MeshShape(1, 4, 2)),
    ],
)
def test_the_box_of_processes(plan: ParallelConfig, world: int, local: int, mesh_shape: MeshShape) -> None:
    assert context.arrange(plan, world, local) == mesh_shape
    assert mesh_shape.replicas * mesh_shape.shard * mesh_shape.tensor == world


@pytest.mark.parametrize(
    ("plan", "world", "line"),
    [
        (ParallelConfig("hsdp", shard=3), 8, "8 processes are not several groups of 3"),
        (ParallelConfig("hsdp", shard=8), 8, "not several groups of 8"),
        (ParallelConfig("tp", tensor=3), 8, "8 processes are not groups of 3"),
        (ParallelConfig("tp", tensor=1), 8, "not groups of 1"),
        (ParallelConfig("fsdp", shard=2), 8, "parallel.shard is for the plan hsdp, not fsdp"),
        (ParallelConfig("ddp", tensor=2), 8, "parallel.tensor is for the plan tp, not ddp"),
        (ParallelConfig("zero"), 8, "'zero' is none of"),  # type: ignore[arg-type]
    ],
)
def test_a_plan_that_does_not_fit_the_processes(plan: ParallelConfig, world: int, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        context.arrange(plan, world, world)


def test_a_batch_or_a_model_that_cannot_be_divided() -> None:
    mesh_shape, shape = (
        MeshShape(2, 2, 3),
        GPTConfig.preset("modern-nano", heads=6, kv_heads=3, mlp_width=192, head_dim=32),
    )
    context.check(ParallelConfig(), mesh_shape, batch_size=8, micro_batch=2, shape=shape)
    for values, line in (
        ({"batch_size": 6}, "batch_size 6 cannot be divided among 4 processes: make it a multiple of 4"),
        (
            {"batch_size": 8, "micro_batch": 4},
            "micro_batch 4 must divide 2, each process's share of batch_size 8",
        ),
        ({"batch_size": 8, "shape": GPTConfig.preset("gpt2-xl")}, "heads, 25, cannot be divided among 3"),
        ({"batch_size": 8, "shape": GPTConfig.preset("gpt2")}, None),
    ):
        if line is None:
            context.check(ParallelConfig(), mesh_shape, **values)  # type: ignore[arg-type]
            continue
        with pytest.raises(UsageError, match=line):
            context.check(ParallelConfig(), mesh_shape, **values)  # type: ignore[arg-type]


def test_one_process_under_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run may go on with fewer processes, down to one, without changing its settings."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert start_parallel(ParallelConfig("fsdp"), batch_size=8) is context.SINGLE_PROCESS


def test_random_streams_of_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    saved = {"rng.0": torch.get_rng_state(), "rng.1": torch.get_rng_state()}
    drawn = []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        context.SINGLE_PROCESS.set_rng_tensors(saved)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    context.SINGLE_PROCESS.set_rng_tensors({"rng": saved["rng.0"]})
    assert torch.equal(torch.get_rng_state(), saved["rng.0"])


def test_recipes_for_clusters_can_be_divided_as_they_say() -> None:
    """On the machines that their headers name."""
    folder = ROOT / "recipes" / "cluster"
    processes = {"gpt2-124m": (8, 8), "gpt2-xl": (8, 8), "gpt3-13b": (64, 8)}
    assert {file.stem for file in folder.glob("*.yaml")} == set(processes)
    for name, (world, local) in processes.items():
        config = read_recipe(folder / f"{name}.yaml", {}).stages["pretrain"].config
        mesh_shape = context.arrange(config.parallel, world, local)
        shape = GPTConfig.preset(config.preset)
        context.check(
            config.parallel,
            mesh_shape,
            batch_size=config.fit.batch_size,
            micro_batch=config.fit.micro_batch,
            shape=shape,
        )
        config.fit.check(config.optim.schedule)


@pytest.fixture(scope="module")
def arithmetic() -> Any:
    return write_scaling_docs


def test_the_tables_of_the_page_follow_from_the_formulae(arithmetic: Any) -> None:
    page = arithmetic.PAGE.read_text(encoding="utf-8")
    assert arithmetic.written(page) == page
    assert (
        arithmetic.written(page.replace("| 11.14 |", "| 11.15 |"))
        == page
        != page.replace("| 11.14 |", "| 11.15 |")
    )


def test_the_arithmetic_by_hand(arithmetic: Any) -> None:
    with torch.device("meta"):
        for name in ("gpt2", "modern-nano", "modern-small"):
            shape = GPTConfig.preset(name)
            counted = GPT(shape).parameter_count()
            assert arithmetic.block_parameters(shape) + arithmetic.root_parameters(shape) == pytest.approx(
                counted, rel=0.02
            )
    big = GPTConfig.preset("gpt3-175b")
    assert arithmetic.block_parameters(big) == 12 * 96 * 12_288**2  # 12 L D^2
    one = arithmetic.Setup("", GPTConfig.preset("gpt2"), 1024 * 8, 8)
    assert arithmetic.traffic(one) == {"copies": 0, "shard": 0, "tensor": 0} and one.micro_batches == 1
    weights = arithmetic.block_parameters(one.shape) + arithmetic.root_parameters(one.shape)
    assert arithmetic.memory(one)["kept"] == 16 * weights
    assert arithmetic.memory(one)["activations"] == 12 * 34 * 1024 * 8 * 768
    two = arithmetic.Setup("", one.shape, 1024 * 8, 1, copies=2)
    assert two.micro_batches == 4 and arithmetic.traffic(two)["copies"] == 4 * weights  # 2 x 1/2 x 4 bytes
    cut = arithmetic.Setup("", one.shape, 1024 * 8, 8, shard=4)
    assert arithmetic.memory(cut)["kept"] == 4 * weights and cut.micro_batches == 1
    blocks, root = arithmetic.block_parameters(one.shape), arithmetic.root_parameters(one.shape)
    assert arithmetic.traffic(cut)["shard"] == 0.75 * (8 * blocks + 8 * root)
    products = arithmetic.Setup("", one.shape, 1024 * 8, 8, tensor=2)
    assert arithmetic.traffic(products)["tensor"] == 12 * 4 * 1024 * 8 * 768 * 2


CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=(
        "no GPU: NCCL, bf16 with FSDP2 on CUDA, pinned copies and the GPU's random stream are NOT covered "
        "here"
    ),
)


@CUDA
def test_on_a_gpu_batches_are_copied_from_pinned_memory_and_streams_come_back() -> None:
    batch = pretrain.TokenBatch(torch.arange(12).view(2, 6))
    there = runtime.on_device(batch)
    assert there.tokens.is_cuda and torch.equal(there.tokens.cpu(), batch.tokens)
    state = runtime.rng_state()
    drawn = torch.rand(4), torch.rand(4, device="cuda")
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(4), drawn[0]) and torch.equal(torch.rand(4, device="cuda"), drawn[1])


@CUDA
@pytest.mark.parametrize("plan", ["ddp", "fsdp"])
def test_on_gpus_the_loss_curve_is_that_of_one(
    launches: Launches, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16, compiled, NCCL, on as many GPUs as divide the batch."""
    count = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    monkeypatch.delenv("CHATWRIGHT_DEVICE", raising=False)
    found = {}
    for name, processes in (("one", 1), (plan, count)):
        values = settings(plan if processes > 1 else "auto")
        values["fit"] |= {"precision": "bf16", "compile": True, "save_steps": 0}
        work = launches.work(f"cuda-{name}-{plan}", values)
        file = launches.root / f"cuda-{name}-{plan}.json"
        file.write_text(json.dumps([work]), encoding="utf-8")
        command = torchrun(processes, "-m", "support.many", str(file))
        variables = {key: value for key, value in cpu_environment().items() if key != "CHATWRIGHT_DEVICE"}
        subprocess.run(command, env=variables, check=True, timeout=600)
        found[name] = curve(launches[f"cuda-{name}-{plan}"])
    assert found[plan] == pytest.approx(
        found["one"], abs=0.05
    )  # bf16 rounds at 0.4 %, and sums are ordered otherwise
