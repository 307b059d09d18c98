"""The stages log what they say that they log. `Bench.run` asks it of every run; here, that it asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from chatwright.train import spikes
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


def planted_limit(config: SpikeConfig, extra: Mapping[str, Any]) -> float:
    """The fourth loss is a spike, and after six accepted ones two in a row are."""
    accepted, spiked = len(extra.get("losses", [])), extra.get("spikes", 0)
    return -1.0 if (accepted == 3 and spiked == 0) or (accepted == 6 and spiked < 3) else math.inf


def test_what_the_loop_logs_now_and_then_is_logged_by_some_run(
    tokenizer_bench: Any, tmp_path: Path, make_fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Muon, a price, one spike and one return to a checkpoint. `skipped`, which needs a broken gradient,
    has its test in test_loop.py."""
    monkeypatch.setattr(spikes, "limit", planted_limit)
    config = pretrain.Config(
        preset="modern-nano",
        model=SHAPE,
        fit=make_fit(steps=10, save_steps=1, spikes=SpikeConfig(action="rollback", patience=2)),
        optim=OptimConfig(name="muon"),
    )
    reporting = Reporting(watts=50.0, price=2.0)
    pretrain.run(
        config, Workspace(tmp_path, 3, tokenizer_bench.inputs, reporting, described=pretrain.METRICS)
    )
    logged = {key for row in read_metrics(tmp_path / "metrics.jsonl") for key in row}
    conditional = {metric.name for metric in pretrain.METRICS if metric.when}
    assert conditional - logged == {"skipped"}
