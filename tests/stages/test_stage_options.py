"""No option is dead: every setting that stages share changes something in each stage that accepts it.

Each stage runs twice, with the settings PLAIN and CHANGED, while a few functions are watched. A stage with a
`fit` or a `parallel` setting, and a field of `FitConfig`, that is not listed here fails the tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatwright import compiler, discovery
from chatwright.config import UsageError
from chatwright.metrics import read_metrics
from chatwright.model.gpt import MLP
from chatwright.optim import OptimConfig
from chatwright.stages import best_of_n, classifier, ppo, pretrain, reinforce, reward, sft
from chatwright.train.fit_config import FitConfig
from chatwright.train.loop import Fit
from chatwright.train.parallel.context import ParallelConfig
from chatwright.train.rl.config import RLConfig
from chatwright.train.spikes import SpikeConfig
from chatwright.train.stage import stage_of
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Unhealthy
from support.planted import MINI, Planted

PLAIN = FitConfig(steps=2, batch_size=4, precision="fp32", compile=False, log_every=2, save_every=9e9, keep=1)
CHANGED = FitConfig(
    steps=4,
    seconds=7.0,
    batch_size=8,
    micro_batch=2,
    precision="bf16",
    recompute=True,
    compile=True,
    log_every=1,
    evaluate_every=2,
    save_every=8e9,
    save_steps=1,
    keep=3,
    keep_best=True,
    spikes=SpikeConfig(patience=2),
)
EXPECTED: dict[str, tuple[Any, Any]] = {
    "steps": (2, 4),
    "seconds": (0.0, 7.0),
    "batch_size": (4, 8),
    "micro_batch": (1, 4),
    "precision": ({torch.float32}, {torch.bfloat16}),
    "recompute": (1, 2),
    "compile": (False, True),
    "log_every": (1, 4),
    "evaluate_every": (2, 3),
    "save_every": (9e9, 8e9),
    "save_steps": ([2], [1, 2, 3, 4]),
    "keep": (1, 3),
    "keep_best": (False, True),
    "spikes": (SpikeConfig(), SpikeConfig(patience=2)),
}
"""What is seen of each option under PLAIN and CHANGED (`Seen.of`)."""

SMALL = OptimConfig(learning_rate=1e-3, schedule="trapezoid")
STAGES: dict[str, tuple[Any, str, Any]] = {
    "pretrain": (
        pretrain,
        "tokenizer_bench",
        pretrain.Config(preset="modern-nano", model={"context": 32}, optim=SMALL),
    ),
    "sft": (sft, "pretrain_bench", sft.Config(held_out=8, optim=SMALL)),
    "reward": (reward, "sft_bench", reward.Config(k=4, max_tokens=32, optim=SMALL)),
    "classifier": (classifier, "sft_bench", classifier.Config(max_tokens=32, optim=SMALL)),
}
"""Stages with a `fit` setting: module, what must have run before, other settings."""

ROUNDS = {"ppo": ppo, "reinforce": reinforce}
PARALLEL = {**{name: stage[0] for name, stage in STAGES.items()}, **ROUNDS, "best_of_n": best_of_n}
del PARALLEL["classifier"]  # one process only: it has no such setting


@dataclass
class Seen:
    """What a run did."""

    loop: FitConfig | None = None
    """The settings of the training loop."""
    portions: list[int] = field(default_factory=list)
    """Micro-batches of each update."""
    passes: int = 0
    """Forward passes with gradients of the first MLP that had one."""
    dtypes: set[torch.dtype] = field(default_factory=set)
    """Precision of what these passes gave."""
    compiled: bool = False
    measured: int = 0
    saved: set[int] = field(default_factory=set)
    """Steps that were saved."""
    consumed: int = 0

    def of(self, option: str, directory: Path) -> Any:
        """The effect of an option of `FitConfig`."""
        assert self.loop is not None
        checkpoints, steps = directory / "checkpoints", len(self.portions)
        effects: dict[str, Callable[[], Any]] = {
            "steps": lambda: steps,
            "batch_size": lambda: self.consumed / steps,
            "micro_batch": lambda: self.portions[0],
            "precision": lambda: self.dtypes,
            "recompute": lambda: self.passes / sum(self.portions),
            "compile": lambda: self.compiled,
            "log_every": lambda: sum("loss" in row for row in read_metrics(directory / "metrics.jsonl")),
            "evaluate_every": lambda: self.measured,
            "save_steps": lambda: sorted(self.saved),
            "keep": lambda: len(list(checkpoints.glob("step-*"))),
            "keep_best": lambda: (checkpoints / "best").is_file(),
        }
        # Nothing but the loop reads the others, and test_loop.py and test_spikes.py show what it does with
        # them.
        return effects[option]() if option in effects else getattr(self.loop, option)


def watch(patch: pytest.MonkeyPatch) -> Seen:
    """Note from now on what the trainer, the loop, the blocks and the compiler are asked for."""
    seen = Seen()
    update, save, measure, init, forward = (
        Trainer.update,
        Trainer.save,
        Fit._measure,
        Fit.__init__,
        MLP.forward,
    )
    first: list[MLP] = []

    def watched_forward(self: MLP, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            first.append(self)
        is_rank_zero = bool(first) and self is first[0]
        seen.passes += (
            is_rank_zero and torch.is_grad_enabled()
        )  # a second pass ends where nothing more is needed
        y = forward(self, x)
        if is_rank_zero and torch.is_grad_enabled():
            seen.dtypes.add(y.dtype)
        return y

    def watched_update(self: Trainer, batches: Any, *args: Any, **more: Any) -> float:
        seen.portions.append(len(batches))
        return update(self, batches, *args, **more)

    def watched_save(self: Trainer, **more: Any) -> Any:
        seen.saved.add(self.progress.step)
        return save(self, **more)

    def watched_measure(self: Any, stopper: Any) -> Any:
        seen.measured += 1
        seen.consumed = self.trainer.progress.consumed
        return measure(self, stopper)

    def watched_init(self: Any, trainer: Trainer, config: FitConfig, *args: Any, **more: Any) -> None:
        seen.loop = config
        init(self, trainer, config, *args, **more)

    def compiling(function: Any, *, enabled: bool = True, **_: Any) -> tuple[Any, str]:
        seen.compiled |= enabled
        return function, "compile: on" if enabled else "compile: off"

    patch.setattr(MLP, "forward", watched_forward)
    patch.setattr(Trainer, "update", watched_update)
    patch.setattr(Trainer, "save", watched_save)
    patch.setattr(Fit, "_measure", watched_measure)
    patch.setattr(Fit, "__init__", watched_init)
    patch.setattr(compiler, "compile_function", compiling)
    patch.setattr(compiler, "compiler_missing", lambda: None)
    return seen


@pytest.fixture(scope="module")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, FitConfig], tuple[Seen, Path]]:
    """Runs a stage with these settings, once, and gives what it did and where."""
    known: dict[tuple[str, bool], tuple[Seen, Path]] = {}

    def run(stage: str, fit: FitConfig) -> tuple[Seen, Path]:
        key = (stage, fit is CHANGED)
        if key not in known:
            module, bench, settings = STAGES[stage]
            directory = tmp_path_factory.mktemp("options") / stage
            made = request.getfixturevalue(bench)
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Unhealthy):  # after two steps
                known[key] = (watch(patch), directory)
                made.run(module, replace(settings, fit=fit), directory)
        return known[key]

    return run


@pytest.mark.parametrize("option", EXPECTED)
@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_fit_changes_something_in_every_stage(stage: str, option: str, ran: Any) -> None:
    plain, changed = (
        seen.of(option, directory) for seen, directory in (ran(stage, PLAIN), ran(stage, CHANGED))
    )
    assert (plain, changed) == EXPECTED[option]


def with_setting(name: str) -> set[str]:
    """The stages that have a setting of this name."""
    configs = {
        verb: stage_of(found.load()).config for verb, found in discovery.stages().items() if not found.package
    }
    return {verb for verb, config in configs.items() if name in {one.name for one in fields(config)}}


def test_every_stage_and_every_option_is_watched() -> None:
    assert set(EXPECTED) == {one.name for one in fields(FitConfig)}
    assert set(STAGES) == with_setting("fit")
    assert set(ROUNDS) == with_setting("policy_precision")
    assert set(PARALLEL) == with_setting("parallel")


# --- stages that learn from what they sample ---


@pytest.mark.parametrize("stage", ROUNDS)
def test_options_of_rounds_change_something_in_both_methods(
    stage: str, planted_bench: Any, tmp_path: Path
) -> None:
    module, score = ROUNDS[stage], Planted.score
    shared = {one.name: getattr(MINI, one.name) for one in fields(RLConfig)}
    plain = module.Config(**{**shared, "iterations": 3, "minibatch_size": 32, "precision": "fp32", "keep": 1})
    changed = {"precision": "bf16", "policy_precision": "bf16", "compile": True, "save_steps": 1, "keep": 3}
    found = []
    for name, more in (("plain", {}), ("changed", changed)):
        judged: set[bool] = set()

        def watched(self: Planted, *args: Any, judged: set[bool] = judged) -> Tensor:
            judged.add(torch.is_autocast_enabled("cpu"))
            return score(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            seen = watch(patch)
            patch.setattr(Planted, "score", watched)
            planted_bench.run(module, replace(plain, **more), tmp_path / name)
        kept = len(list((tmp_path / name / "checkpoints").glob("step-*")))
        found.append((judged, seen.dtypes, seen.compiled, {1, 2} <= seen.saved, kept))
    assert found[0][:4] == ({False}, {torch.float32}, False, False)
    assert found[1][:4] == ({True}, {torch.bfloat16}, True, True)
    assert found[0][4] < 3 <= found[1][4]


@pytest.mark.parametrize("stage", PARALLEL)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ParallelConfig(plan="ddp"), "parallel.plan ddp needs processes that torchrun starts"),
        (ParallelConfig(shard=2), "parallel.shard is for the plan hsdp"),
        (ParallelConfig(tensor=2), "parallel.tensor is for the plan tp"),
    ],
)
def test_settings_of_many_processes_are_refused_in_one(
    stage: str, config: ParallelConfig, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    module = PARALLEL[stage]
    if stage in STAGES:
        _, bench, settings = STAGES[stage]
        settings = replace(settings, fit=PLAIN)
    else:
        bench, settings = "planted_bench", module.Config(max_prompt_tokens=40, max_new_tokens=18)
    with pytest.raises(UsageError, match=message):
        request.getfixturevalue(bench).run(module, replace(settings, parallel=config), tmp_path / stage)
