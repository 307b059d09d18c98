"""Rows beside metrics.jsonl: read back from TensorBoard's files and trackio's database; wandb by a
stand-in."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatwright import trackers
from chatwright.commands import _stage, run
from chatwright.config import UsageError
from chatwright.files import write_json
from chatwright.metrics import MetricsLog, read_metrics
from chatwright.pipeline import fingerprint
from chatwright.recipe import RecipeStage
from chatwright.stages import pretrain
from chatwright.trackers import Reporting


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a stage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(directory / "tensorboard"))
        found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_each_row_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorboard", reason="the tracker tensorboard is NOT tested: pip install tensorboard"
    )
    log = MetricsLog(tmp_path / "metrics.jsonl", Reporting(to="tensorboard"))
    log.forget_after(-1)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "kind": "text", "bad": float("nan")})
    log.close()
    again = MetricsLog(tmp_path / "metrics.jsonl", Reporting(to="tensorboard"))
    again.forget_after(2)  # step 3 is done again
    again.write(3, {"loss": 9.0})
    again.write(4, {"loss": 0.25})
    again.forget_after(3)  # a rollback in the middle of a run
    again.write(4, {"loss": 0.5})
    again.close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 0.5), (3, 9.0), (4, 0.5)]}
    assert [row["loss"] for row in read_metrics(log.path)] == [1.0, 0.5, 9.0, 0.5]


def test_none_writes_nothing_else(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 1.0})
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_is_given_rows_under_their_step_and_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    stand_in = SimpleNamespace(
        init=lambda **settings: calls.append(settings),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(2):
        log = MetricsLog(tmp_path / "tiny" / "sft" / "metrics.jsonl", Reporting(to="wandb"))
        log.write(5, {"loss": 2.0, "note": "x", "bad": float("inf")})
        log.close()
        log.close()
    settings = calls[0]
    assert (settings["project"], settings["name"], settings["resume"]) == ("chatwright-tiny", "sft", "allow")
    assert settings["dir"] == str(tmp_path / "tiny" / "sft") and settings["id"]
    assert calls[1:3] == [(5, {"loss": 2.0}), "finish"]
    assert calls[3] == settings  # the same run when the stage goes on
    assert len(calls) == 6


@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
def test_trackio_keeps_rows_in_its_local_database(tmp_path: Path) -> None:
    """In a process of its own, without a network."""
    pytest.importorskip("trackio", reason="the tracker trackio is NOT tested: pip install trackio")
    program = (
        "import sys; from pathlib import Path; from chatwright.metrics import MetricsLog; from "
        "chatwright.trackers import Reporting\n"
        "log = MetricsLog(Path(sys.argv[1]) / 'tiny' / 'sft' / 'metrics.jsonl', Reporting(to='trackio'))\n"
        "for step in (1, 2): log.write(step, {'loss': 1.0 / step})\n"
        "log.close()"
    )
    home = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for file in (tmp_path / "trackio").rglob("*.db"):
        with sqlite3.connect(file) as database:
            for run, step, values in database.execute(
                "select run_name, step, metrics from metrics order by step"
            ):
                found.append((run, step, json.loads(values)["loss"]))
    assert found == [("sft", 1, 1.0), ("sft", 2, 0.5)]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_one_line_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UsageError, match=f"pip install {name}"):
        Reporting(to=name).check()  # type: ignore[arg-type]


def test_negative_figures_are_refused() -> None:
    for wrong in ({"watts": -1.0}, {"price": -0.1}):
        with pytest.raises(UsageError, match="at least 0"):
            Reporting(**wrong).check()  # type: ignore[arg-type]
    Reporting().check()


def test_the_option_reaches_each_verb_and_changes_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--report.to` is the pipeline's: a stage's settings, and so its fingerprint, cannot hold it."""
    given: list[tuple[str, Reporting, str]] = []

    def run_stage(
        stage: RecipeStage, directory: Path, *, reporting: Reporting, **others: Any
    ) -> dict[str, Any]:
        given.append((stage.name, reporting, fingerprint(stage, others["seed"], {})))
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "clock.json", {"fingerprint": "of a stage"})  # else its run is no run
        return {"seconds": 0.0, "memory_bytes": 0, "measures": [], "curves": []}

    monkeypatch.setattr("chatwright.pipeline.run_stage", run_stage)
    monkeypatch.setattr(_stage, "run_stage", run_stage)
    monkeypatch.setattr(trackers, "_package", lambda name: None)
    recipe = tmp_path / "one.yaml"
    recipe.write_text("stages: {pretrain: {fit: {steps: 3}}}\n")
    report = ["--report.to", "tensorboard", "--report.watts=65", "--report.price", "0.5"]
    wanted = Reporting("tensorboard", 65.0, 0.5)
    for more in ([], report):
        assert run.main([str(recipe), "--out", str(tmp_path / "runs"), *more]) == 0
        assert _stage.main("pretrain", ["--fit.steps", "3", "--out", str(tmp_path / "p"), *more]) == 0
    assert [one for _, one, _ in given] == [Reporting(), Reporting(), wanted, wanted]
    assert given[0][2] == given[2][2] and given[1][2] == given[3][2]
    with pytest.raises(UsageError, match="report"):
        _stage.main("pretrain", ["--fit.steps", "3", "--report.too", "wandb"])
    assert not hasattr(pretrain.Config(), "report")
