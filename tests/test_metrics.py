"""metrics.jsonl and progress."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from chatwright import metrics
from chatwright.config import UsageError
from chatwright.metrics import Metric, MetricsLog, duration, in_group, progress_bar, read_metrics, say


def test_rows_are_what_was_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.write(1, {"loss": 0.1234567891, "note": "é", "count": 3})
    log.write(2, {"loss": math.nan, "norm": math.inf, "other": -math.inf})
    assert read_metrics(log.path) == [
        {"step": 1, "loss": 0.1234568, "note": "é", "count": 3},
        {"step": 2, "loss": None, "norm": None, "other": None},
    ]
    for line in log.path.read_text().splitlines():
        assert next(iter(json.loads(line))) == "step"
        assert "NaN" not in line and "Infinity" not in line


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"a": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "a"')
    assert read_metrics(log.path) == [{"step": 1, "a": 1}]


def test_rows_written_after_a_cut_line_are_kept(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"a": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "a"')
    log.forget_after(1)  # what a resumed stage does first
    log.write(2, {"a": 2})
    assert read_metrics(log.path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]


def test_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.write(step, {"a": step})
    log.forget_after(2)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    MetricsLog(tmp_path / "new" / "metrics.jsonl").forget_after(0)  # nothing there yet: no error
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0:00"), (75, "1:15"), (59.6, "1:00"), (3600, "1:00:00"), (7384, "2:03:04"), (-3, "0:00")],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(
        metrics, "console", Console(file=out, highlight=False, width=100, force_terminal=False)
    )
    return out


def test_nothing_is_read_as_markup(printed: io.StringIO) -> None:
    say("[bold]not markup[/bold] [/oops]")
    with progress_bar("[red]stage") as bar:
        bar.update(1.0, "[/note]")
    assert "[bold]not markup[/bold] [/oops]" in printed.getvalue()
    assert "[red]stage 100 %  [/note]" in printed.getvalue()


def test_without_a_terminal_a_line_now_and_then(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress_bar("sft") as bar:
        for share in (0.5, 0.6, 0.7, 0.9, 1.0):  # a resumed stage begins at a half
            bar.update(share, f"at {share}")
            now[0] += 10.0
    assert printed.getvalue().splitlines() == [
        "  sft  70 %  at 0.7  0:30 left",  # 20 s for a fifth: 30 s for three tenths
        "  sft 100 %  at 1.0  0:00 left",
    ]


def test_a_first_step_that_compiles_says_nothing_about_the_others(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress_bar("pretrain") as bar:
        now[0] += 100.0
        for share in (0.1, 0.2, 0.3):
            bar.update(share)
            now[0] += 10.0
    assert printed.getvalue().splitlines()[-1] == "  pretrain  30 %    1:10 left"  # 20 s for a fifth


def test_with_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        metrics, "console", Console(file=out, highlight=False, width=120, force_terminal=True)
    )
    with progress_bar("pretrain") as bar:
        bar.update(0.25, "loss 3.1")
    assert "pretrain" in out.getvalue()


KNOWN = (Metric("loss", "nats", "falls", "The loss."),)


def test_a_key_that_nobody_describes_is_an_error_in_tests(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", described=KNOWN)
    log.write(1, {"loss": 1.0})
    with pytest.raises(UsageError, match=r"no Metric of the stage describes lost; add one to `metrics`"):
        log.write(2, {"loss": 1.0, "lost": 2.0})
    assert read_metrics(log.path) == [{"step": 1, "loss": 1.0}]
    with pytest.raises(UsageError, match="describes lost"):
        log.write_once(2, {"lost": 2.0})
    MetricsLog(log.path).write(2, {"anything": 1.0})  # a log of no stage in particular


def test_elsewhere_it_is_written_and_named_once(
    tmp_path: Path, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(metrics.STRICT)
    log = MetricsLog(tmp_path / "metrics.jsonl", described=KNOWN)
    for step in (1, 2):
        log.write(step, {"loss": 1.0, "lost": 2.0})
    assert read_metrics(log.path) == [{"step": step, "loss": 1.0, "lost": 2.0} for step in (1, 2)]
    assert printed.getvalue().splitlines() == [
        f"  {log.path}: no Metric of the stage describes lost; written all the same"
    ]


def test_a_group_is_a_heading_for_all_of_its_metrics() -> None:
    grouped = in_group("Losses", *KNOWN, replace(KNOWN[0], name="other"))
    assert [(one.name, one.group) for one in grouped] == [("loss", "Losses"), ("other", "Losses")]


@pytest.fixture
def page() -> ModuleType:
    """scripts/write_metrics_docs.py."""
    file = Path(__file__).parent.parent / "scripts" / "write_metrics_docs.py"
    spec = importlib.util.spec_from_file_location("write_metrics_docs", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_shared_metrics_once_and_own_ones_under_their_stage(page: ModuleType) -> None:
    (shared,) = in_group("Losses", *KNOWN)
    own = Metric("gap", "a | b", "small", "The gap.", unhealthy="large: stop", when="`gap` is set")
    lines = page.text({"one": (shared, own), "two": (shared,), "none": ()}).splitlines()
    assert lines[lines.index("## Losses") :] == [
        "## Losses",
        "",
        "| key | stages | what it is | unit | healthy | otherwise |",
        "|---|---|---|---|---|---|",
        "| `loss` | one, two | The loss. | nats | falls | - |",
        "",
        "## one",
        "",
        "| key | what it is | unit | healthy | otherwise |",
        "|---|---|---|---|---|",
        r"| `gap` | The gap. Only when `gap` is set. | a \| b | small | large: stop |",
    ]


def test_a_page_that_is_out_of_date_is_found(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "stage_metrics", lambda: {"one": KNOWN})
    monkeypatch.setattr(page, "FILE", tmp_path / "reference" / "metrics.md")
    monkeypatch.setattr("sys.argv", ["write_metrics_docs.py", "--check"])
    assert page.main() == 1 and "make docs" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["write_metrics_docs.py"])
    assert page.main() == 0
    monkeypatch.setattr("sys.argv", ["write_metrics_docs.py", "--check"])
    assert page.main() == 0
    monkeypatch.setattr(page, "stage_metrics", lambda: {"one": (replace(KNOWN[0], unit="bits"),)})
    assert page.main() == 1
