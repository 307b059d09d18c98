"""Reports: numbers for people, texts that stay inside their cells, pictures of what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatwright import files
from chatwright.metrics import MetricsLog
from chatwright.reports.report import draw_curves, number, table_rows, write_run_report, write_stage_report

PNG = b"\x89PNG\r\n\x1a\n"


def measure(name: str, before: float | None, after: float | None, note: str = "") -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "better": "lower", "note": note}


def result_of(**changes: Any) -> dict[str, Any]:
    return {
        "seconds": 75.4,
        "measures": [measure("loss", 2.5, 1.25, "nats"), measure("gzip", None, 3.0)],
        "curves": [{"title": "Loss", "keys": ["loss"], "unit": "nats"}],
        "notes": [],
        "facts": {"steps": 7},
        **changes,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1.23456, "1.235"), (-0.5, "-0.500"), (12345.6, "12,346"), (0.0, "0.000")],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_table_rows_name_the_stage_and_its_time_once() -> None:
    assert table_rows("sft", result_of()) == [
        ("sft", "loss (nats)", "2.500", "1.250", "1:15"),
        ("", "gzip", "-", "3.000", ""),
    ]
    assert table_rows("data", result_of(measures=[])) == [("data", "", "-", "-", "1:15")]


def test_a_picture_is_drawn_of_what_was_logged_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 2.0, "once": 1.0})
    log.write(2, {"loss": float("nan")})
    log.write(3, {"loss": 1.0})
    curves = [
        {"title": "Loss", "keys": ["loss", "missing"], "unit": "nats"},
        {"title": "Once", "keys": ["once"], "unit": ""},
    ]
    picture = draw_curves(tmp_path, curves)
    assert picture == tmp_path / "curves.png" and picture.read_bytes().startswith(PNG)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert draw_curves(tmp_path, curves[1:]) is None  # a single point is no curve
    assert draw_curves(tmp_path / "nowhere", curves) is None


def test_pictures_of_a_stage_are_shown(tmp_path: Path) -> None:
    write_stage_report(tmp_path, "reward", result_of(pictures=["calibration.png"]))
    assert "![calibration of reward](calibration.png)" in (tmp_path / "report.md").read_text()


def test_the_report_of_a_stage(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.write(step, {"loss": 1.0 / step})
    notes = ["one plain note", "- an item", "", "three answers:", "- 'a | b <i>' *x*"]
    write_stage_report(tmp_path, "sft", result_of(notes=notes))
    text = (tmp_path / "report.md").read_text()
    assert "| loss (nats) | 2.500 | 1.250 |" in text and "| gzip | - | 3.000 |" in text
    assert "![curves of sft](curves.png)" in text and "- steps: 7" in text and "1:15" in text
    assert "\n- one plain note\n- an item\n\nthree answers:\n" in text
    assert r"- 'a \| b \<i\>' \*x\*" in text


def test_the_report_of_a_run(tmp_path: Path) -> None:
    for stage in ("sft", "ppo"):
        (tmp_path / stage).mkdir()
    (tmp_path / "sft" / "curves.png").write_bytes(PNG)
    hostile = "| x | <script>alert(1)</script>\n# head [a](b) `c`"
    results = {"sft": result_of(sample=hostile), "ppo": result_of(seconds=3725.0)}
    text = write_run_report(tmp_path, "tiny", results, "Hi | you?")
    assert text == (tmp_path / "report.md").read_text()
    assert "2 stages in 1:03:20" in text
    assert "| sft | loss (nats) | 2.500 | 1.250 | 1:15 |" in text
    assert "| ppo | loss (nats) | 2.500 | 1.250 | 1:02:05 |" in text
    assert "![curves of sft](sft/curves.png)" in text and "curves of ppo" not in text
    assert r"Hi \| you?" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- **sft**")]
    assert "<script" not in line.replace("\\<", "") and r"# head \[a\](b) \`c\`" in line


ALIGNED = {
    "paper": [
        {"setting": "beta", "ours": 0.15, "paper": "0.02", "source": "Ouyang", "same": False},
        {"setting": "clip", "ours": 0.2, "paper": "0.2", "source": "Ouyang", "same": True},
    ],
    "kl_budget": {
        "spent": 2.5,
        "allowed": 10.0,
        "largest": 4.0,
        "iteration": 7,
        "kept": 5,
        "stopped": "gold turned | down",
    },
    "answers": {
        "before": "sft",
        "after": "ppo",
        "prompts": 64,
        "kl": 1.5,
        "measures": {"tokens per answer": [10.0, 12.5]},
    },
    "cost": {"seconds": 75.4, "tokens": 1234.0, "flop": 5.25e12, "energy_kwh": 0.25, "memory_bytes": 1.5e9},
}


def test_the_sections_of_an_alignment_stage(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "before": "<b>no</b>", "after": "| yes\n# |"} for n in range(10)]
    files.write_json(tmp_path / "pairs.json", pairs)
    write_stage_report(tmp_path, "ppo", result_of(**ALIGNED, facts={"tokens": 1234, "steps": 7}))
    text = (tmp_path / "report.md").read_text()
    parts = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    assert list(parts) == [
        "# ppo",
        "Settings that differ from the paper's",
        "Before and after",
        "KL budget",
        "Cost",
        "Facts",
    ]
    settings = parts["Settings that differ from the paper's"]
    assert (
        "| beta | 0.15 | 0.02 | Ouyang |" in settings
        and "As in the paper: clip." in settings
        and "| clip" not in settings
    )
    answers = parts["Before and after"]
    assert "The first 10 of 64 held-out prompts" in answers
    assert answers.count(r"| \<b\>no\</b\> | \| yes # \| |") == 10
    assert "| tokens per answer | 10.000 | 12.500 |" in answers and "1.500 nats" in answers
    assert "spent 2.500 of 10.000 nats per answer; the most in any iteration was 4.000" in parts["KL budget"]
    assert r"ended in iteration 7, the best iteration was 5; gold turned \| down." in parts["KL budget"]
    for line in (
        "| time | 1:15 |",
        "1,234 |",
        "| 5.25e+12 |",
        "| 0.25 kWh |",
        "| 1.50 GB |",
        "report.price is not set",
    ):
        assert line in parts["Cost"]
    assert "- steps: 7" in parts["Facts"] and "tokens" not in parts["Facts"]


def test_a_stage_without_answers_and_without_a_paper_says_so(tmp_path: Path) -> None:
    write_stage_report(
        tmp_path, "eval", result_of(**{**ALIGNED, "paper": [], "answers": None, "kl_budget": None})
    )
    text = (tmp_path / "report.md").read_text()
    assert (
        "give no value for any of its settings" in text
        and "There are no answers" in text
        and "no budget" in text
    )


def test_the_run_sums_up_what_its_stages_say(tmp_path: Path) -> None:
    results = {
        "sft": result_of(cost={"seconds": 60.0, "memory_bytes": 2e9, "tokens": 766.0}),
        "ppo": result_of(**ALIGNED),
    }
    text = write_run_report(tmp_path, "tiny", results, "Hi")
    assert "- [ppo](ppo/report.md): 1 of the papers' 2 settings differ. KL: spent 2.500 of 10.000" in text
    assert "[sft](sft/report.md): " not in text  # it has no such sections here
    assert "| ppo | tokens per answer | 10.000 | 12.500 |" in text
    (total,) = [line for line in text.splitlines() if line.startswith("| total |")]
    assert "| 2:15 | 2,000 | 5.25e+12 (of the stages that count) |" in total and "2.00 GB" in total
