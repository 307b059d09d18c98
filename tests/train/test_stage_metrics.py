"""What the stages log is what they say that they log. `Bench.run` asks it of every run; here, that it asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatwright import discovery
from chatwright.config import UsageError
from chatwright.metrics import Metric, read_metrics
from chatwright.optim import OptimConfig
from chatwright.stages import pretrain
from chatwright.trackers import Reporting
from chatwright.train.spikes import SpikeConfig
from chatwright.train.stage import stage_of
from chatwright.train.workspace import Workspace

SHAPE = {"context": 32}


@pytest.mark.parametrize("name", discovery.stages())
def test_every_metric_says_what_it_is(name: str) -> None:
    stage = stage_of(discovery.stage_verb(name).load())
    if stage.plan is not None:
        assert stage.metrics, "a stage that trains logs something"
    for metric in stage.metrics:
        assert metric.unit and metric.healthy, metric.name
        assert metric.meaning.endswith((".", ").")), f"{metric.name}: the meaning is a sentence"
        assert not metric.when.endswith("."), f"{metric.name}: the page says 'Only when {metric.when}.'"


def test_two_metrics_of_one_name_are_refused() -> None:
    twice = (*pretrain.METRICS, Metric("loss", "nats", "falls", "Another loss."))
    with pytest.raises(UsageError, match="two metrics are called loss"):
        replace(pretrain.STAGE, metrics=twice)


def as_module(*metrics: Metric) -> SimpleNamespace:
    """Pre-training that says it logs these."""
    return SimpleNamespace(run=pretrain.run, STAGE=replace(pretrain.STAGE, metrics=metrics))


def test_a_logged_key_without_a_metric_is_an_error(
    tokenizer_bench: Any, tmp_path: Path, make_fit: Any
) -> None:
    config = pretrain.Config(preset="modern-nano", model=SHAPE, fit=make_fit(steps=1))
    others = [metric for metric in pretrain.METRICS if metric.name != "bits_per_byte"]
    with pytest.raises(UsageError, match="no Metric of the stage describes bits_per_byte"):
        tokenizer_bench.run(as_module(*others), config, tmp_path / "pretrain")


def test_a_metric_that_is_never_logged_is_found(tokenizer_bench: Any, tmp_path: Path, make_fit: Any) -> None:
    config = pretrain.Config(preset="modern-nano", model=SHAPE, fit=make_fit(steps=1))
    dead = Metric("dead", "none", "any", "Nobody logs it.")
    with pytest.raises(AssertionError, match=r"never logged(.|\n)*dead"):
        tokenizer_bench.run(as_module(*pretrain.METRICS, dead), config, tmp_path / "pretrain")
    sometimes = replace(dead, when="the moon is full")
    tokenizer_bench.run(as_module(*pretrain.METRICS, sometimes), config, tmp_path / "pretrain")


def test_what_the_loop_logs_now_and_then_is_logged_by_some_run(
    tokenizer_bench: Any, tmp_path: Path, make_fit: Any
) -> None:
    """Muon, a price, and a rule that takes nearly every rise of the loss for a spike. `skipped`, which needs a
    broken gradient, has its test in test_loop.py."""
    spikes = SpikeConfig(action="rollback", window=2, deviations=0.0, rise=0.0, patience=1, most=99)
    config = pretrain.Config(
        preset="modern-nano",
        model=SHAPE,
        fit=make_fit(steps=16, save_steps=1, spikes=spikes),
        optim=OptimConfig(name="muon", learning_rate=0.05, schedule="constant"),
    )
    reporting = Reporting(watts=50.0, price=2.0)
    pretrain.run(
        config, Workspace(tmp_path, 3, tokenizer_bench.inputs, reporting, described=pretrain.METRICS)
    )
    logged = {key for row in read_metrics(tmp_path / "metrics.jsonl") for key in row}
    conditional = {metric.name for metric in pretrain.METRICS if metric.when}
    assert conditional - logged == {"skipped"}
