"""Resumed = uninterrupted, bit for bit: weights, optimiser, position, random stream and rows of metrics, for
each stage.

Runs are stopped politely, by a crash, and by SIGKILL; checkpoints are found damaged, half-written and
doubled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from chatwright import checkpoint, cli
from chatwright.files import read_json
from chatwright.metrics import TIMED, read_metrics
from chatwright.model.lora import LoRAConfig
from chatwright.optim import OptimConfig
from chatwright.stages import classifier, ppo, pretrain, reinforce, reward, sft
from chatwright.stages.ppo import Config as PPOConfig
from chatwright.train import loop
from chatwright.train.fit_config import FitConfig
from chatwright.train.rl import run as rl_run
from chatwright.train.rl import training
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.trainer import Trainer
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(**values: Any) -> FitConfig:
    settings = {
        "steps": 6,
        "batch_size": 4,
        "micro_batch": 2,
        "compile": False,
        "precision": "fp32",
        "log_every": 4,
    }
    return FitConfig(**{**settings, **values})


@dataclass
class Case:
    """A stage so short that it can be run many times."""

    module: Any
    config: Any
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def looks(self) -> int:
        """How often a step asks whether to stop: once behind it, and a round also before each minibatch."""
        if self.module not in (ppo, reinforce):
            return 1
        return 1 + getattr(self.config, "epochs", 1) * self.config.batch_size // self.config.minibatch_size


CASES = {
    # dropout draws from the global random stream, which must therefore come back as well
    "pretrain": Case(
        pretrain,
        pretrain.Config(
            preset="modern-nano", model={"context": 32, "dropout": 0.2}, fit=fit(evaluate_every=3)
        ),
    ),
    "sft": Case(sft, sft.Config(fit=fit(), held_out=4)),
    "reward": Case(
        reward,
        reward.Config(k=3, max_tokens=32, fit=fit(), optim=OptimConfig(name="muon", learning_rate=1e-3)),
    ),
    "classifier": Case(
        classifier, classifier.Config(max_tokens=32, fit=fit(), optim=OptimConfig(learning_rate=1e-2))
    ),
    "ppo": Case(
        ppo,
        PPOConfig(
            iterations=5,
            batch_size=8,
            minibatch_size=4,
            max_prompt_tokens=40,
            max_new_tokens=14,
            min_tokens=1,
            max_repeats=0.9,
            save_steps=2,
            evaluate_every=2,
            evaluate_prompts=8,
            held_out_prompts=8,
            min_correlation=-1.0,
        ),
    ),
    "ppo whole": Case(
        ppo,
        PPOConfig(  # with everything that has a state of its own
            iterations=4,
            batch_size=8,
            minibatch_size=4,
            epochs=2,
            max_prompt_tokens=40,
            max_new_tokens=14,
            min_tokens=1,
            max_repeats=0.9,
            save_steps=2,
            evaluate_every=2,
            evaluate_prompts=8,
            held_out_prompts=8,
            min_correlation=-1.0,
            critic="shared",
            ema=0.9,
            text="tokenizer",
            ptx=0.5,
            ptx_windows=1,
            ptx_context=32,
            gold="sentiment",
            min_distinct=0.0,
            kl_budget=100.0,
        ),
    ),
    "reinforce": Case(
        reinforce,
        reinforce.Config(
            iterations=5,
            batch_size=8,
            minibatch_size=8,
            max_prompt_tokens=40,
            max_new_tokens=14,
            min_tokens=1,
            max_repeats=0.9,
            save_steps=2,
            evaluate_every=2,
            evaluate_prompts=8,
            held_out_prompts=8,
            min_correlation=-1.0,
            samples_per_prompt=2,
            baseline="leave-one-out",
        ),
    ),
}
LORA = LoRAConfig(rank=3, dropout=0.2)  # dropout, whose random stream must come back too
CASES |= {
    "sft lora": Case(sft, replace(CASES["sft"].config, lora=LORA)),
    "reward lora": Case(
        reward, replace(CASES["reward"].config, lora=LORA, optim=OptimConfig(learning_rate=1e-3))
    ),
    **{
        f"{name} lora": Case(CASES[name].module, replace(CASES[name].config, lora=replace(LORA, dropout=0.0)))
        for name in ("ppo", "ppo whole", "reinforce")
    },
}
SLOW = ("reward lora", "ppo whole lora", "reinforce lora")
"""What `make test` leaves to `make test-all`: the two other adapters and the same stages without one say
nearly as much."""
STAGES: list[Any] = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.fixture
def run(reward_bench: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a stage in a directory; `stop` asks it to stop after so many steps, `looks` at the look of that
    number."""

    def run_stage(name: str, directory: Path, stop: int = 0, looks: int = 0, **changes: Any) -> Any:
        case = CASES[name]
        last = looks or stop * case.looks

        class Impatient(Stopper):
            """Asked to stop at look `last`, and at all after it."""

            looks = 0

            def __init__(self) -> None:
                super().__init__()

            @property
            def asked(self) -> bool:
                self.looks += 1
                return 0 < last <= self.looks

            @asked.setter
            def asked(self, value: bool) -> None:
                assert value is False

        for module in (loop, rl_run):
            monkeypatch.setattr(module, "Stopper", Impatient)
        report = reward_bench.run(case.module, replace(case.config, **changes), directory)
        for module in (loop, rl_run):
            monkeypatch.setattr(module, "Stopper", Stopper)
        return report

    return run_stage


def rows(directory: Path) -> list[dict[str, Any]]:
    found = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


def content(directory: Path) -> dict[str, Any]:
    """Everything in a checkpoint that must be the same, bytes as bytes."""
    files = {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "state.json"}
    state = read_json(directory / "state.json")
    for timed in ("elapsed", "joules"):
        state["progress"].pop(timed)
    state["files"].pop("state.json")  # the checksum of what holds the two above
    return {**files, "state": {key: value for key, value in state.items() if key != "runtime"}}


def same(one: Path, other: Path, name: str) -> None:
    left, right = (content(path / "checkpoints" / name) for path in (one, other))
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value == right[key], key


def newest(directory: Path) -> str:
    return checkpoint.checkpoints(directory / "checkpoints")[-1].path.name


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted(stage: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))
    report = run(stage, whole)
    with pytest.raises(Interrupted):
        run(stage, one, stop=3)
    for stop in (1, 2):  # another way to get to step 3
        with pytest.raises(Interrupted):
            run(stage, two, stop=stop)
    # with all of optimiser, random stream, position and what is logged so far
    assert newest(one) == newest(two) == "step-000003"
    assert "optimizer.safetensors" in content(one / "checkpoints" / "step-000003")
    assert ("adapter.safetensors" in content(one / "checkpoints" / "step-000003")) == stage.endswith("lora")
    same(one, two, "step-000003")
    for directory in (one, two):
        again = run(stage, directory)
        assert again.model == report.model and again.measures == report.measures
        same(whole, directory, Path(report.model).name)
        assert rows(directory) == rows(whole)


@pytest.mark.parametrize("stage", ["ppo whole", "reinforce", "ppo lora"])
def test_a_round_that_is_stopped_between_any_two_minibatches_goes_on_as_if_nothing_had_been(
    stage: str, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two iterations, before each of its minibatches: its answers are those that were sampled
    before the stop."""
    sampled: list[int] = []
    real = training.sample_completions
    monkeypatch.setattr(
        training, "sample_completions", lambda *given, **named: sampled.append(1) or real(*given, **named)
    )
    whole, looks = tmp_path / "whole", CASES[stage].looks
    report = run(stage, whole, iterations=2)
    rounds_of_whole = len(sampled)
    for done in range(looks - 1):
        directory = tmp_path / f"after {done}"
        sampled.clear()
        with pytest.raises(Interrupted, match=rf"saved in iteration 1, after {done} of its minibatches"):
            run(stage, directory, looks=looks + 1 + done, iterations=2)
        stopped = checkpoint.Checkpoint(directory / "checkpoints" / checkpoint.UNFINISHED)
        assert stopped.state()["progress"]["extra"]["unfinished"]["done"] == done
        again = run(stage, directory, iterations=2)
        assert len(sampled) == rounds_of_whole  # none of it twice
        assert (again.model, again.measures, rows(directory)) == (report.model, report.measures, rows(whole))
        same(whole, directory, Path(report.model).name)
        same(whole, directory, newest(whole))
        assert not stopped.path.exists()


def test_a_stopped_round_that_is_damaged_is_done_again(
    tmp_path: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint before it, which is still what it was."""
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    report = run("ppo", whole)
    with pytest.raises(Interrupted):
        run("ppo", damaged, stop=2)
    with pytest.raises(Interrupted):
        run("ppo", damaged, looks=2)
    flip(damaged / "checkpoints" / checkpoint.UNFINISHED / "mid_step.safetensors")
    capsys.readouterr()
    run("ppo", damaged)
    told = " ".join(capsys.readouterr().out.split())
    assert "mid_step.safetensors is damaged" in told and "going on from step 2" in told
    same(whole, damaged, Path(report.model).name)
    assert rows(damaged) == rows(whole)


def test_a_random_stream_that_is_not_restored_would_show(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation of the test above: everything but the random stream comes back."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    report = run("pretrain", whole)
    with pytest.raises(Interrupted):
        run("pretrain", parted, stop=3)
    monkeypatch.setattr(loop.runtime, "set_rng_state", lambda state: None)
    run("pretrain", parted)
    left, right = (content(path / report.model)["model.safetensors"] for path in (whole, parted))
    assert left != right


def crash(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let the process 'die' in the n-th call of a function, once."""
    real, count = getattr(owner, name), [0]

    def dying(*arguments: Any, **settings: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise MemoryError("the process dies here")
        return real(*arguments, **settings)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("stage", "round_"),
    [
        *(pytest.param(name, 3, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES),
        ("ppo", 1),
    ],
)
def test_a_crash_between_checkpoints_leaves_no_trace(
    stage: str, round_: int, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are done again from the last checkpoint, and their rows of metrics are not doubled."""
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    report = run(stage, whole)
    if CASES[stage].module in (
        ppo,
        reinforce,
    ):  # after a round's row was written, before its step is counted; the first is always kept
        crash(monkeypatch, training.objective, "next_beta", round_)
    else:
        with pytest.raises(Interrupted):
            run(stage, crashed, stop=1)
        crash(monkeypatch, Trainer, "update", 5)  # in step 6, behind the row of step 4
    with pytest.raises(MemoryError):
        run(stage, crashed)
    before = rows(crashed)
    assert before
    again = run(stage, crashed)
    assert rows(crashed) == rows(whole)
    assert again.measures == report.measures
    same(whole, crashed, Path(report.model).name)


def test_a_crash_before_the_first_checkpoint_begins_anew(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("sft", tmp_path / "whole")
    crash(monkeypatch, Trainer, "update", 6)
    with pytest.raises(MemoryError):
        run("sft", tmp_path / "crashed")
    assert [row["step"] for row in rows(tmp_path / "crashed")] == [4]
    run("sft", tmp_path / "crashed")
    assert rows(tmp_path / "crashed") == rows(tmp_path / "whole")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(
    name: str, tmp_path: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    report = run("sft", whole)
    for stop in (2, 2):
        with pytest.raises(Interrupted):
            run("sft", damaged, stop=stop)
    assert newest(damaged) == "step-000004"
    flip(damaged / "checkpoints" / "step-000004" / name)
    capsys.readouterr()
    run("sft", damaged)
    told = " ".join(capsys.readouterr().out.split())
    assert f"step-000004: {name} is damaged" in told and "trying the one before" in told
    assert "going on from step 2" in told
    same(whole, damaged, Path(report.model).name)
    assert rows(damaged) == rows(whole)


def test_leftovers_of_a_killed_writer_are_ignored_and_cleared(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    report = run("sft", whole)
    with pytest.raises(Interrupted):
        run("sft", killed, stop=2)
    for name in (".step-000004.12345.partial", ".step-000003.12345.old"):
        leftover = killed / "checkpoints" / name
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
    run("sft", killed)
    same(whole, killed, Path(report.model).name)
    assert not list((killed / "checkpoints").glob(".step*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_can_be_run_again(stage: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    """As after a crash between the last checkpoint and result.json."""
    first = run(stage, tmp_path / stage)
    kept = rows(tmp_path / stage)
    again = run(stage, tmp_path / stage)
    assert (again.model, rows(tmp_path / stage)) == (first.model, kept)
    if CASES[stage].module is not reward:  # its scale is set anew, which changes nothing but the last digits
        assert again.measures == first.measures


KILLED = [
    "--preset",
    "modern-nano",
    "--model",
    "{context: 32, dropout: 0.2}",
    "--fit.steps",
    "60",
    "--fit.batch_size",
    "4",
    "--fit.compile",
    "false",
    "--fit.precision",
    "fp32",
    "--fit.save_every",
    "0",
    "--fit.log_every",
    "5",
]


def reached_step(directory: Path) -> int:
    """The step of the newest checkpoint."""
    found = checkpoint.checkpoints(directory / "checkpoints")
    return found[-1].step if found else 0


@pytest.mark.slow  # the short campaign of tests/faults does it as well
def test_sigkill(tokenizer_bench: Any, tmp_path: Path) -> None:
    """A process that saves after every step is killed at some moment, twice; the third goes on to the end."""
    argv = ["pretrain", *KILLED, "--tokenizer", str(tokenizer_bench.inputs["tokenizer"]), "--out"]
    whole, killed = tmp_path / "whole" / "pretrain", tmp_path / "killed" / "pretrain"
    assert cli.main([*argv, str(whole)]) == 0
    reached = 0
    for least in (4, 15):
        process = subprocess.Popen(
            [sys.executable, "-m", "chatwright.cli", *argv, str(killed)],
            stdout=subprocess.DEVNULL,
            env=dict(os.environ),
        )
        wait_until(lambda: reached_step(killed) >= least, f"step {least}", process=process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it had not finished by itself
        valid, _ = checkpoint.newest_valid(killed / "checkpoints")
        assert valid is not None and valid.step >= reached
        reached = valid.step
    assert 15 <= reached < 60
    assert not (killed / "result.json").exists()
    assert cli.main([*argv, str(killed)]) == 0
    same(whole, killed, "step-000060")
    assert rows(killed) == rows(whole)
    results = [read_json(path / "result.json") for path in (whole, killed)]
    assert results[0]["measures"] == results[1]["measures"]
