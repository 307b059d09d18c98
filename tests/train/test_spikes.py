"""The rule for loss spikes: what is a spike, what is done about it, and that a killed run decides as an
uninterrupted one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chatwright import checkpoint
from chatwright.config import UsageError, UserError
from chatwright.metrics import TIMED, read_metrics
from chatwright.optim import OptimConfig
from chatwright.train import spikes
from chatwright.train.loop import Fit, FitConfig, Fitted
from chatwright.train.spikes import SpikeConfig
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Workspace


def remembering(config: SpikeConfig, *losses: float) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for loss in losses:
        assert spikes.accept(config, extra, loss)
    return extra


def test_the_limit_is_the_median_and_so_many_robust_deviations() -> None:
    config = SpikeConfig(window=5, deviations=3.0, rise=0.0)
    # median 3, absolute deviations 2 1 0 1 2: their median is 1
    extra = remembering(config, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert spikes.limit(config, extra) == pytest.approx(3 + 3 * 1.4826)
    assert spikes.limit(SpikeConfig(window=5, deviations=3.0, rise=9.0), extra) == pytest.approx(12.0)
    assert spikes.limit(SpikeConfig(window=5, deviations=1.0, rise=0.0), extra) == pytest.approx(3 + 1.4826)
    assert spikes.accept(config, extra, 7.4) and extra["losses"] == [
        2.0,
        3.0,
        4.0,
        5.0,
        7.4,
    ]  # the oldest is forgotten
    assert (
        not spikes.accept(config, extra, 100.0) and extra["losses"][-1] == 7.4
    )  # a spike is not learnt from


def test_before_the_window_is_full_nothing_is_a_spike() -> None:
    config = SpikeConfig(window=4)
    extra = remembering(config, 3.0, 3.0, 90.0)
    assert spikes.limit(config, extra) == math.inf
    assert spikes.accept(config, extra, 500.0)
    assert spikes.limit(config, extra) < math.inf


def test_losses_that_are_not_finite_are_left_to_the_other_rule() -> None:
    config = SpikeConfig(window=2)
    extra = remembering(config, 1.0, 1.0, math.nan, math.inf)
    assert extra["losses"] == [1.0, 1.0] and "spikes" not in extra


def test_patience_is_about_spikes_in_a_row() -> None:
    config = SpikeConfig(window=2, patience=2)
    extra = remembering(config, 1.0, 1.0)
    for loss, expected in ((9.0, False), (1.0, False), (9.0, False), (9.0, True)):
        spikes.accept(config, extra, loss)
        assert spikes.damaged(config, extra) is expected
    assert extra["spikes"] == 3
    assert not spikes.damaged(SpikeConfig(action="off", patience=2), extra)


def test_the_defaults_do_not_fire_in_normal_runs() -> None:
    """Losses that fall as a run's do, with four times the noise of batches of 8, and of a learnt-by-heart
    reward model."""
    draw = torch.Generator().manual_seed(3)
    config = SpikeConfig()
    for curve in (lambda n: 2 + 7 * math.exp(-n / 200), lambda n: 2.0, lambda n: 0.01):
        extra: dict[str, Any] = {}
        for step in range(3000):
            noise = float(torch.randn((), generator=draw)) * 0.2
            assert spikes.accept(config, extra, abs(curve(step) + noise)), step
        assert not spikes.accept(config, extra, curve(3000) + 4.0)  # but a real one is seen


@pytest.mark.parametrize(
    "wrong", [{"window": 1}, {"patience": 0}, {"most": -1}, {"deviations": -1.0}, {"rise": -0.5}]
)
def test_senseless_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"fit\.spikes"):
        FitConfig(steps=5, spikes=SpikeConfig(**wrong)).check("linear")


# ---- in a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Numbers by global index: noise, and planted values."""

    planted: dict[int, float]
    late: int = 0

    def take(self, start: int, count: int) -> Batch:
        """From step 21 on, samples come `late`."""
        start += self.late if start >= 40 else 0
        return Batch([self.planted.get(n, 0.1 * math.sin(n)) for n in range(start, start + count)])


@dataclass(frozen=True)
class Batch:
    """The loss of a sample is the distance of the weights from it."""

    values: list[float]

    @property
    def weight(self) -> float:
        return float(len(self.values))


class Weights(nn.Module):
    """Four numbers, and dropout, so that the random stream counts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))
        self.drop = nn.Dropout(0.3)


@dataclass
class Run:
    """A run of 40 steps of 2 samples each, saved every 5 steps."""

    directory: Path
    planted: dict[int, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    late: int = 0

    def fit(self, **fit: Any) -> Fitted:
        torch.manual_seed(5)
        self.model = Weights()
        self.trainer = Trainer(
            {"model": self.model},
            OptimConfig(learning_rate=0.05, schedule="constant"),
            Workspace(self.directory),
            metadata={"kind": "language"},
            texts={},
        )
        config = FitConfig(
            **{
                "steps": 40,
                "batch_size": 2,
                "log_every": 3,
                "save_steps": 5,
                "spikes": SpikeConfig(**{"window": 6, "patience": 2, **self.settings}),
                **fit,
            }
        )
        return Fit(
            self.trainer, config, Samples(self.planted, self.late), self.step, lambda: {"m": 1.0}, title="t"
        ).run()

    def step(self, batch: Batch) -> Step:
        goals = torch.tensor(batch.values)[:, None]
        return Step((self.model.drop(self.model.scale + 1) - 1 - goals).square().mean(1).sum())

    def rows(self, *keys: str) -> list[dict[str, Any]]:
        rows = [
            {k: v for k, v in row.items() if k not in {*TIMED, "samples_per_second"}}
            for row in read_metrics(self.directory / "metrics.jsonl")
        ]
        return [row for row in rows if not keys or any(key in row for key in keys)]


SPIKE = {2 * 21: 40.0}  # a sample of step 22
DAMAGE = {2 * n: 40.0 for n in (21, 22, 23)}  # of steps 22, 23 and 24


def test_a_planted_spike_is_left_out_logged_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "skip", SPIKE)
    fitted = run.fit()
    assert [row["step"] for row in run.rows("spike_loss")] == [22]
    row = run.rows("spike_loss")[0]
    assert row["spike_loss"] > 100 > row["spike_limit"] > 0
    assert "step 22: the loss jumped to" in " ".join(capsys.readouterr().out.split())
    assert (
        fitted.progress.extra["spikes"] == 1 and fitted.progress.step == 40 and fitted.progress.consumed == 80
    )
    assert any("1 losses jumped" in note for note in fitted.notes)
    off = Run(tmp_path / "off", SPIKE, {"action": "off"})
    off.fit()
    assert off.rows("spike_loss") == []
    assert not torch.equal(off.model.scale, run.model.scale)


def test_a_refused_update_changes_neither_weights_nor_the_optimiser(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit(steps=6)
    before = {k: v.clone() for k, v in checkpoint.optimiser_tensors(run.trainer.optimisers).items()}
    weights = run.model.scale.detach().clone()
    for accepted in (False, True):
        run.trainer.update([Batch([3.0])], run.step, 1.0, accept=lambda loss, answer=accepted: answer)
        after = checkpoint.optimiser_tensors(run.trainer.optimisers)
        assert torch.equal(weights, run.model.scale) is not accepted
        assert all(torch.equal(before[key], after[key]) for key in before) is not accepted


def test_spikes_in_a_row_are_taken_for_the_new_level_without_rollback(tmp_path: Path) -> None:
    run = Run(tmp_path, dict.fromkeys(range(42, 80), 40.0))
    fitted = run.fit()
    assert [row["step"] for row in run.rows("spike_loss")] == [22, 23]
    assert len(fitted.progress.extra["losses"]) == 6 and min(fitted.progress.extra["losses"]) > 100


def test_a_rollback_returns_to_the_last_checkpoint_and_passes_over_the_samples(tmp_path: Path) -> None:
    run = Run(tmp_path / "planted", DAMAGE, {"action": "rollback"})
    fitted = run.fit()
    assert [row["step"] for row in run.rows("rolled_back_from")] == [20]
    assert run.rows("rolled_back_from")[0]["rolled_back_from"] == 23
    # 23 steps of 2 samples were seen when it returned to step 20: six samples are passed over, the spike of
    # step 24 too late
    assert fitted.progress.consumed == 80 + 6 and fitted.samples == 80
    assert [row["step"] for row in run.rows("loss")] == [*range(3, 40, 3), 40]
    assert [row["step"] for row in run.rows("spike_loss")] == [
        21
    ]  # the third planted sample comes first now: alone
    assert fitted.progress.extra["rollbacks"] == 1 and fitted.progress.extra["spikes"] == 3
    assert any("1 returns" in note for note in fitted.notes)


def test_a_rollback_forgets_no_time_of_the_budget(tmp_path: Path) -> None:
    """Neither the seconds since the checkpoint nor what other programs took of them."""
    run = Run(tmp_path)
    run.fit(steps=10)
    progress, taken = run.trainer.progress, {"lost": 7.0, "excused": 6.0}
    progress.elapsed = 20.0
    progress.extra |= {"spikes": 2, "busy": taken}
    run.trainer.roll_back(every=5, protected=list)
    progress = run.trainer.progress
    assert progress.step == 5 and progress.elapsed == 20.0 and progress.extra["busy"] == taken


def test_a_rollback_is_as_if_the_samples_had_never_been_there(tmp_path: Path) -> None:
    """The same samples at once in the order in which the run saw them, without what it passed over."""
    planted = {2 * n: 40.0 for n in (21, 22)}
    run = Run(tmp_path / "planted", planted, {"action": "rollback"})
    run.fit()

    other = Run(tmp_path / "without", late=6)
    other.fit()
    assert torch.equal(run.model.scale, other.model.scale)


def test_too_many_returns_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, dict.fromkeys(range(42, 120), 40.0), {"action": "rollback", "most": 2})
    with pytest.raises(UserError, match="jumped for good at step 22, after 2 returns"):
        run.fit()
    assert checkpoint.newest_valid(tmp_path / "checkpoints")[0] is not None


def test_without_a_checkpoint_to_return_to(tmp_path: Path) -> None:
    run = Run(tmp_path, DAMAGE, {"action": "rollback"})
    with pytest.raises(UserError, match=r"no checkpoint to return to; set fit\.save_steps"):
        run.fit(save_steps=0)


def test_nothing_is_saved_inside_a_jump(tmp_path: Path) -> None:
    run = Run(tmp_path, DAMAGE, {"action": "rollback", "patience": 3})
    fitted = run.fit(save_steps=0, save_every=0.0)  # by the clock: after every step
    assert run.rows("rolled_back_from") == [{"step": 21, "rolled_back_from": 24}]
    assert fitted.progress.step == 40


def crash(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, behind: bool) -> None:
    """Let the process 'die' in, or just behind, the n-th call of a function, once."""
    real, count = getattr(owner, name), [0]

    def dying(*arguments: Any, **settings: Any) -> Any:
        count[0] += 1
        result = real(*arguments, **settings) if behind or count[0] != call else None
        if count[0] == call:
            raise MemoryError("the process dies here")
        return result

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Trainer, "update", 23),  # among the spikes
        (Trainer, "update", 26),  # after the return
        (Trainer, "_restore", 1),  # in the return itself, before and after each of its parts
        (checkpoint, "delete", 4),
        (checkpoint, "save_checkpoint", 5),
        (checkpoint, "save_checkpoint", 6),
    ],
)
def test_a_run_killed_around_a_return_ends_as_an_uninterrupted_one(
    owner: Any, name: str, call: int, behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (Run(tmp_path / place, DAMAGE, {"action": "rollback"}) for place in ("whole", "killed"))
    whole.fit()
    with monkeypatch.context() as patch:
        crash(patch, owner, name, call, behind=behind)
        with pytest.raises(MemoryError):
            killed.fit()
    fitted = killed.fit()
    assert killed.rows() == whole.rows()
    assert fitted.progress.extra == whole.trainer.progress.extra and fitted.progress.consumed == 86
    assert torch.equal(killed.model.scale, whole.model.scale)
    left, right = (checkpoint.checkpoints(run.directory / "checkpoints") for run in (whole, killed))
    assert [found.step for found in left] == [found.step for found in right]
    for one, other in zip(left, right, strict=True):
        for file in one.path.glob("*.safetensors"):
            assert file.read_bytes() == (other.path / file.name).read_bytes(), file


def test_checkpoints_of_the_abandoned_steps_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved after every step, returned to every tenth: killed just behind the return, it does not go on from
    beyond it."""
    whole, killed = (Run(tmp_path / place, DAMAGE, {"action": "rollback"}) for place in ("whole", "killed"))
    whole.fit(save_every=0.0, save_steps=10)
    with monkeypatch.context() as patch:
        crash(patch, Trainer, "update", 24, behind=False)  # the first one behind the return
        with pytest.raises(MemoryError):
            killed.fit(save_every=0.0, save_steps=10)
    assert [found.step for found in checkpoint.checkpoints(killed.directory / "checkpoints")][
        -1
    ] == 20  # not 21
    killed.fit(save_every=0.0, save_steps=10)
    assert killed.rows() == whole.rows() and torch.equal(killed.model.scale, whole.model.scale)
