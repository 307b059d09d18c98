"""The machinery of all stages: accumulation, bad gradients, schedules by steps and by seconds, stopping,
saving."""

from __future__ import annotations

import errno
import itertools
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chatwright import checkpoint
from chatwright.chat import EncodedChat
from chatwright.config import UsageError, UserError
from chatwright.data.packing import PackedRow, batch_rows, pack
from chatwright.metrics import TIMED, read_metrics
from chatwright.optim import OptimConfig
from chatwright.stages import sft
from chatwright.train import busy, loop
from chatwright.train.loop import Fit, FitConfig, Fitted
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Workspace

LENGTHS = [(3, 1), (40, 30), (7, 2), (12, 12), (25, 1), (18, 9), (50, 44), (5, 3)]
"""Tokens of a conversation, and how many of the last of them are learnt: very unequal."""


def conversations(seed: int = 0) -> list[EncodedChat]:
    draw = torch.Generator().manual_seed(seed)
    return [
        EncodedChat(
            torch.randint(96, (size,), generator=draw).tolist(), [n >= size - learnt for n in range(size)]
        )
        for size, learnt in LENGTHS
    ]


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the list, for ever."""

    rows: list[PackedRow]

    def take(self, start: int, count: int) -> Any:
        return batch_rows([self.rows[n % len(self.rows)] for n in range(start, start + count)], 64)


def sgd(trainer: Trainer, model: nn.Module) -> Trainer:
    """A trainer whose step is exactly the gradient: weights before and after differ by it."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    optimiser.param_groups[0]["peak_lr"] = 1.0
    trainer.optimisers = [optimiser]
    return trainer


def make_trainer(model: nn.Module, directory: Path, **settings: Any) -> Trainer:
    card, texts = {"kind": "language"}, {"note.txt": "hello"}
    return Trainer(
        {"model": model}, OptimConfig(**settings), Workspace(directory), metadata=card, texts=texts
    )


def trained(make: Callable[..., Any], directory: Path, micro_batch: int, steps: int = 3) -> dict[str, Tensor]:
    model = make(1)
    trainer = sgd(make_trainer(model, directory, clip=0.0, schedule="constant", warmup=0.0), model)
    rows = Rows(pack(conversations(), 64, enabled=False))
    config = FitConfig(steps=steps, batch_size=8, micro_batch=micro_batch, compile=False, log_every=1)
    Fit(trainer, config, rows, lambda batch: sft.step(model, batch), dict, title="t").run()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_eight_times_one_equals_one_times_eight(lively_gpt: Callable[..., Any], tmp_path: Path) -> None:
    start = dict(lively_gpt(1).named_parameters())
    whole = trained(lively_gpt, tmp_path / "1x8", 8)
    for size in (1, 2, 4):
        parts = trained(lively_gpt, tmp_path / f"{size}", size)
        for name, parameter in whole.items():
            torch.testing.assert_close(parts[name], parameter, atol=1e-6, rtol=0)
    assert max(float((whole[name] - start[name]).detach().abs().max()) for name in whole) > 1e-2
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("1x8", "1")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_mean_of_means_would_not_be_equal(lively_gpt: Callable[..., Any]) -> None:
    """The mutation of the invariant: each micro-batch divided by its own number of tokens."""
    rows = Rows(pack(conversations(), 64, enabled=False))
    gradients = []
    for size in (8, 1):
        model = lively_gpt(1)
        for n in range(0, 8, size):
            batch = rows.take(n, size)
            (sft.step(model, batch).loss / batch.weight / (8 / size)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert max(float((gradients[0][n] - gradients[1][n]).abs().max()) for n in gradients[0]) > 1e-3


def gradients(
    model: Any, rows: list[PackedRow], *, together: bool = False
) -> tuple[float, dict[str, Tensor]]:
    batch = batch_rows(rows, 64)
    if together:  # the mutation: everything in a row may see everything before it
        batch = type(batch)(batch.ids, batch.learn, (batch.documents > 0).long(), batch.positions)
    model.zero_grad()
    loss = sft.step(model, batch).loss
    loss.backward()
    return float(loss.detach()), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_packed_rows_have_the_gradients_of_rows_of_their_own(
    lively_gpt: Callable[..., Any], preset: str
) -> None:
    shape = (
        {}
        if preset == "modern"
        else {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": True}
    )
    model = lively_gpt(2, **shape)
    alone = pack(conversations(), 64, enabled=False)
    packed = pack(conversations(), 64)
    assert len(packed) < len(alone) == 8 and any(max(row.documents) >= 3 for row in packed)
    loss, own = gradients(model, alone)
    packed_loss, found = gradients(model, packed)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in own.values())
    for name, gradient in own.items():
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-6, rtol=0)
    leaking_loss, leaking = gradients(model, packed, together=True)
    assert abs(leaking_loss - loss) > 1e-2
    assert max(float((leaking[name] - own[name]).abs().max()) for name in own) / scale > 1e-3


@dataclass(frozen=True)
class Numbers:
    """A batch that is one number: the loss is its product with the weights' sum."""

    value: float
    weight: float = 1.0


class Line(nn.Module):
    """One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Linear(3, 3, bias=False)


@dataclass
class Bed:
    """A trainer on `Line`."""

    directory: Path
    model: Line = field(default_factory=Line)

    def __post_init__(self) -> None:
        nn.init.ones_(self.model.blocks.weight)
        self.trainer = make_trainer(self.model, self.directory, learning_rate=0.1)

    def update(self, *values: float) -> float:
        return self.trainer.update([Numbers(value) for value in values], self.step, 1.0)

    def step(self, batch: Numbers) -> Step:
        loss = batch.value * self.model.blocks.weight.sum()
        return Step(loss, {"seen": torch.tensor(batch.value)})

    def snapshot(self) -> dict[str, Tensor]:
        tensors = checkpoint.optimiser_tensors(self.trainer.optimisers)
        return {
            "weight": self.model.blocks.weight.detach().clone(),
            **{k: v.clone() for k, v in tensors.items()},
        }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path, bad: float) -> None:
    bed = Bed(tmp_path)
    bed.update(1.0)
    before = bed.snapshot()
    bed.update(bad, 1.0)
    after = bed.snapshot()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert bed.trainer.progress.extra["skipped"] == 1
    assert bed.trainer.take_logged()["skipped"] == 1.0
    bed.update(1.0)
    assert not torch.equal(bed.model.blocks.weight, before["weight"])
    assert bool(bed.model.blocks.weight.isfinite().all())


def test_twenty_bad_gradients_in_a_row_stop_the_run(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    for _ in range(19):
        bed.update(math.nan)
    bed.update(1.0)  # a good one in between: the count begins anew
    for _ in range(19):
        bed.update(math.nan)
    with pytest.raises(UserError, match="not finite in 20 steps in a row"):
        bed.update(math.nan)
    assert bed.trainer.progress.extra["skipped"] == 39


def test_the_gradient_is_clipped_as_a_whole(tmp_path: Path) -> None:
    model = Line()
    trainer = sgd(make_trainer(model, tmp_path, clip=0.5), model)
    before = model.blocks.weight.detach().clone()
    trainer.update([Numbers(7.0)], lambda batch: Step(batch.value * model.blocks.weight.sum()), 1.0)
    moved = before - model.blocks.weight.detach()
    # the gradient is 7 in nine places, its norm 21; what is left has norm 0.5
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
    assert trainer.take_logged()["gradient_norm"] == pytest.approx(21.0)
    before = model.blocks.weight.detach().clone()
    trainer.update([Numbers(0.1)], lambda batch: Step(batch.value * model.blocks.weight.sum()), 1.0)
    assert float((before - model.blocks.weight.detach()).norm()) == pytest.approx(
        0.3, rel=1e-4
    )  # short enough: as it is
    assert trainer.take_logged()["gradient_norm"] == pytest.approx(0.3)


def test_what_is_logged_is_a_mean_over_the_weight_of_all_steps_since(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    for batches in ([Numbers(2.0, 1.0)], [Numbers(6.0, 2.0), Numbers(4.0, 1.0)]):
        bed.trainer.update(batches, bed.step, 1.0)
    assert bed.trainer.take_logged()["seen"] == pytest.approx((2 + 6 + 4) / 4)
    bed.update(5.0)
    assert bed.trainer.take_logged()["seen"] == 5.0


def test_the_loss_returned_is_the_mean_over_the_weight(tmp_path: Path) -> None:
    # 9 weights of 1: sums 18 and 36, over a weight of 4
    bed = Bed(tmp_path)
    assert bed.trainer.update([Numbers(2.0, 1.0), Numbers(4.0, 3.0)], bed.step, 1.0) == pytest.approx(
        (18 + 36) / 4
    )


@dataclass(frozen=True)
class Ones:
    """The same batch for ever."""

    def take(self, start: int, count: int) -> Numbers:
        return Numbers(1.0, float(count))


def make_fit(bed: Bed, config: FitConfig) -> Fit[Numbers]:
    return Fit(bed.trainer, config, Ones(), bed.step, lambda: {"measure": 1.0}, title="t")


def rates(directory: Path) -> list[float]:
    return [
        row["learning_rate"] for row in read_metrics(directory / "metrics.jsonl") if "learning_rate" in row
    ]


def test_steps_follow_the_schedule(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.trainer.optim_config = OptimConfig(learning_rate=0.1, schedule="linear", warmup=0.2)
    fitted = make_fit(bed, FitConfig(steps=10, batch_size=4, log_every=1)).run()
    assert fitted.progress.step == 10 and fitted.progress.consumed == 40
    # 0.1 x (1/2, 1, then 1 - n/8)
    assert rates(tmp_path) == pytest.approx([0.05, 0.1, *(0.1 * (1 - n / 8) for n in range(8))], abs=1e-6)
    assert fitted.before == fitted.after == {"measure": 1.0}


def test_a_budget_in_seconds_settles_the_number_of_steps_when_the_rate_begins_to_fall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes a second on this clock; the first two are not counted, as they compile."""
    fitted = ten_seconds_of_steps(tmp_path, monkeypatch, left=1.0)
    # 0.4 x 10 s at full rate are reached in step 6 (4 counted); 6 / 0.4 = 15 steps in all
    assert fitted.progress.planned == fitted.progress.step == 15
    # warm-up is over the first 2 s (a thousandth of the 10 s at least): 1/200 until the third step is done,
    # which is the first that counts, then 1/2; full rate to step 6; then (15 - step) / (0.6 x 15)
    expected = [0.1 * 0.005] * 3 + [0.05, 0.1, 0.1, 0.1] + [0.1 * (15 - step) / 9 for step in range(7, 15)]
    assert rates(tmp_path) == pytest.approx(expected, abs=1e-6)
    assert fitted.notes == []


def ten_seconds_of_steps(directory: Path, monkeypatch: pytest.MonkeyPatch, *, left: float) -> Fitted:
    """A budget of ten seconds, on a clock on which a step takes one, where other programs leave so much of
    the processors."""

    class Meter(busy.BusyMeter):
        def lost(self, seconds: float) -> float:
            self.left = left
            return seconds * (1 - left)

    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(busy, "BusyMeter", Meter)
    bed = Bed(directory)
    bed.trainer.optim_config = OptimConfig(learning_rate=0.1, schedule="trapezoid", decay=0.6, warmup=0.2)
    return make_fit(bed, FitConfig(seconds=10.0, batch_size=4, log_every=1, save_every=1e9)).run()


def test_a_budget_in_seconds_counts_the_work_that_could_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others take half of the processors: each second counts half, so that there are as many steps as the
    budget would have on a quiet machine whose steps take half a second."""
    fitted = ten_seconds_of_steps(tmp_path, monkeypatch, left=0.5)
    # 0.4 x 10 s at full rate are reached in step 10 (8 counted, of half a second each); 10 / 0.4 = 25 steps
    # in all
    assert fitted.progress.planned == fitted.progress.step == 25
    # half of the seconds: warm-up is over after four counted steps
    assert rates(tmp_path)[2:7] == pytest.approx([0.1 * 0.005, 0.025, 0.05, 0.075, 0.1], abs=1e-6)
    assert fitted.progress.elapsed == 23.0  # money and energy go by the clock
    (note,) = fitted.notes
    assert "busy" in note and "took 50 %" in note and "missing" not in note
    assert "took 50 %" in capsys.readouterr().out


def test_a_stage_waits_four_times_its_budget_at_most_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = ten_seconds_of_steps(tmp_path, monkeypatch, left=0.125)
    # 4 s are reached after 16 seconds that count a quarter each, in step 18; 18 / 0.4 = 45
    assert fitted.progress.step == 45
    (note,) = fitted.notes
    # an eighth of each second was left, a quarter of it counted: half of the steps of a quiet machine
    assert "took 88 %" in note and "about 45 steps are missing beside the 45 made" in note


@pytest.mark.parametrize(
    ("settings", "schedule", "message"),
    [
        ({}, "linear", "steps or seconds"),
        ({"steps": -1, "seconds": 5.0}, "trapezoid", "steps or seconds"),
        ({"seconds": 5.0}, "cosine", "trapezoid"),
        ({"steps": 5, "batch_size": 6, "micro_batch": 4}, "linear", "multiple"),
        ({"steps": 5, "batch_size": 0}, "linear", "multiple"),
        ({"steps": 5, "micro_batch": -2}, "linear", "multiple"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], schedule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FitConfig(**settings).check(schedule)


def test_rows_of_metrics_come_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    make_fit(bed, FitConfig(steps=7, log_every=3, evaluate_every=2)).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 7]
    assert [row["step"] for row in rows if "measure" in row] == [2, 4, 6, 7]


def signal_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Send signals to this process in the middle of a step (from 1)."""
    update, count = Trainer.update, itertools.count(1)

    def interrupted(self: Trainer, *arguments: Any, **settings: Any) -> float:
        if next(count) == step:
            for number in numbers:
                signal.raise_signal(number)
        return update(self, *arguments, **settings)

    monkeypatch.setattr(Trainer, "update", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    signal_in_step(monkeypatch, 4, number)
    with pytest.raises(Interrupted, match="saved at step 4"):
        make_fit(Bed(tmp_path), FitConfig(steps=9)).run()
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [found.step for found in checkpoint.checkpoints(tmp_path / "checkpoints")] == [4]
    fitted = make_fit(Bed(tmp_path), FitConfig(steps=9)).run()
    assert fitted.progress.step == 9
    assert "going on from step 4" in " ".join(capsys.readouterr().out.split())


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_in_step(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make_fit(Bed(tmp_path), FitConfig(steps=9)).run()
    assert checkpoint.checkpoints(tmp_path / "checkpoints") == []


def test_outside_the_main_thread_no_signal_is_touched() -> None:
    import threading

    results = []

    def work() -> None:
        with Stopper().listening() as stopper:
            results.append(stopper.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = make_fit(Bed(tmp_path), FitConfig(steps=5)).run()
    bed = Bed(tmp_path)
    bed.step = None  # type: ignore[assignment, method-assign]  # any step would fail
    again = make_fit(bed, FitConfig(steps=5)).run()
    assert (again.checkpoint, again.before, again.after) == (first.checkpoint, first.before, first.after)


def test_checkpoints_are_pruned_to_the_newest_and_the_spared(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    for step in range(5):
        bed.trainer.progress.step = step
        bed.trainer.save(protected=[1])
    assert [found.step for found in checkpoint.checkpoints(tmp_path / "checkpoints")] == [1, 3, 4]
    final = bed.trainer.save(final=True)
    assert sorted(file.name for file in final.path.iterdir()) == [
        "model.safetensors",
        "note.txt",
        "state.json",
    ]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed(tmp_path)
    bed.update(1.0)
    bed.trainer.progress.step = 1
    kept = bed.trainer.save()
    before = {file.name: file.read_bytes() for file in kept.path.iterdir()}

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    for step in (2, 1):  # beside the old one, and in its place
        bed.trainer.progress.step = step
        with pytest.raises(UserError, match="No space left on device"):
            bed.trainer.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    kept.verify()
    assert {file.name: file.read_bytes() for file in kept.path.iterdir()} == before


class Curve:
    """Held-out measures as given, one after the other: before training, every two steps, at the end."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self) -> dict[str, float]:
        return {"measure": self.values.pop(0)}


def best_fit(bed: Bed, curve: Curve, better: Any = "lower", **settings: Any) -> Any:
    bed.trainer.keep = 1
    config = FitConfig(**{"steps": 8, "evaluate_every": 2, "keep_best": True, **settings})
    return Fit(bed.trainer, config, Ones(), bed.step, curve, title="t", best=("measure", better))


@pytest.mark.parametrize(
    ("better", "curve", "step"),
    [
        ("lower", (9, 3, 1, 2, 4), 4),
        ("higher", (9, 3, 1, 2, 1), 2),
        ("lower", (9, 3, 2, 2, 1), 8),
        ("lower", (9, 3, 3, 3, 3), 2),
    ],
)
def test_the_best_checkpoint_is_kept_and_is_the_result(
    tmp_path: Path, better: Any, curve: Any, step: int
) -> None:
    bed = Bed(tmp_path)
    fitted = best_fit(bed, Curve(*curve), better).run()
    assert fitted.checkpoint.step == step and fitted.before == {"measure": 9}
    assert fitted.after == {"measure": curve[step // 2]}
    kept = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [found.step for found in kept] == sorted({step, 8})
    named = checkpoint.best(tmp_path / "checkpoints")
    assert named == fitted.checkpoint
    named.verify()
    assert torch.equal(
        named.tensors("model")["blocks.weight"], bed.model.blocks.weight
    )  # the modules have its weights
    assert (step == 8) is torch.equal(kept[-1].tensors("model")["blocks.weight"], bed.model.blocks.weight)
    assert f"the model is that of step {step}, whose measure was the best" in fitted.notes[0]
    assert "The same held-out data chose it" in fitted.notes[0]
    again = Bed(tmp_path)
    found = best_fit(again, Curve(), better).run()  # a finished run: neither measured nor trained again
    assert (found.checkpoint, found.after) == (fitted.checkpoint, fitted.after)
    assert torch.equal(again.model.blocks.weight, bed.model.blocks.weight)


def test_without_keep_best_the_last_step_is_the_result(tmp_path: Path) -> None:
    fitted = best_fit(Bed(tmp_path), Curve(9, 3, 1, 2, 4), keep_best=False).run()
    assert fitted.checkpoint.step == 8 and fitted.after == {"measure": 4} and fitted.notes == []
    assert checkpoint.best(tmp_path / "checkpoints") is None


def test_keep_best_needs_measures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set evaluate_every above 0"):
        best_fit(Bed(tmp_path), Curve(), evaluate_every=0)
    with pytest.raises(UsageError, match="no single measure"):
        make_fit(Bed(tmp_path), FitConfig(steps=5, evaluate_every=2, keep_best=True))


def test_save_steps_saves_at_its_multiples(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    saved: list[int] = []
    real = bed.trainer.save
    bed.trainer.save = lambda **settings: (saved.append(bed.trainer.progress.step), real(**settings))[1]  # type: ignore[method-assign]
    make_fit(bed, FitConfig(steps=8, save_steps=3, save_every=1e9)).run()
    assert saved == [3, 6, 8]


def test_a_signal_in_the_first_step_stops_at_once(tmp_path: Path) -> None:
    """Where compilation happens: nothing is lost, and nothing saved."""
    bed = Bed(tmp_path)

    def slow(batch: Numbers) -> Step:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the step went on")

    bed.step = slow  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="nothing had to be saved"):
        make_fit(bed, FitConfig(steps=5)).run()
    assert checkpoint.checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_signal_in_a_held_out_measure_saves_at_once_and_the_measure_is_done_again(
    tmp_path: Path, at: int
) -> None:
    """In those of steps 2 and 4, and in the last one."""
    calls = itertools.count(1)

    def evaluate() -> dict[str, float]:
        if next(calls) == at // 2 + 1:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the measure went on")
        return {"measure": 1.0}

    config = FitConfig(steps=6, evaluate_every=2, log_every=1)

    def fit(directory: Path, measure: Callable[[], dict[str, float]]) -> None:
        bed = Bed(directory)
        Fit(bed.trainer, config, Ones(), bed.step, measure, title="t").run()

    with pytest.raises(Interrupted, match=f"saved at step {at}"):
        fit(tmp_path / "stopped", evaluate)
    fit(tmp_path / "stopped", lambda: {"measure": 1.0})
    fit(tmp_path / "whole", lambda: {"measure": 1.0})
    left, right = (
        [
            {k: v for k, v in row.items() if k not in {*TIMED, "samples_per_second"}}
            for row in read_metrics(path / "metrics.jsonl")
        ]
        for path in (tmp_path / "stopped", tmp_path / "whole")
    )
    assert left == right and sum("measure" in row for row in left) == 3
