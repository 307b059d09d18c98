"""The data stage: others' formats in, files of ours out; broken records are refused, or left out and
counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatwright.config import UserError
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.records import read_records, records_of
from chatwright.stages import data
from chatwright.train.preference.rankings import own_comparisons
from chatwright.train.workspace import Report, Workspace


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the user's data: text, conversations in Alpaca's format, pairs."""
    (tmp_path / "text.txt").write_text("one\n\n" * 20_000)
    rows: list[Any] = [{"instruction": f"Say {n}", "input": "loud", "output": f"{n}!"} for n in range(60)]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "annotator": f"w{n % 3}"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


def run(own: Path, **changes: Any) -> tuple[Path, Report]:
    settings = {
        "path": str(own / "text.txt"),
        "dialogues": str(own / "alpaca.jsonl"),
        "ratings": "",
        "validation": 0.2,
    }
    report = data.run(data.Config(**{**settings, **changes}), Workspace(own / "data"))
    return records_of(own / "data"), report


def test_formats_of_others_become_records_of_ours(own: Path) -> None:
    records, report = run(own, comparisons=str(own / "pairs.jsonl"))
    talks = [
        *read_records(records / "dialogues-train.jsonl", Dialogue),
        *read_records(records / "dialogues-validation.jsonl", Dialogue),
    ]
    assert len(talks) == 60 and all("### Instruction:\nSay" in one.messages[0]["content"] for one in talks)
    train, held_out = own_comparisons(records)
    assert len(train) + len(held_out) == 60 and len(held_out) == report.facts["comparisons validation"] > 0
    assert not {one.id for one in train} & {one.id for one in held_out}  # a prompt is on one side
    assert {one.annotator for one in train} == {"w0", "w1", "w2"} and train[0].scores == (1.0, 0.0)
    assert any("comparisons: " in note for note in report.notes)


def test_the_formats_are_settings(own: Path) -> None:
    records, _ = run(own, dialogue_format="alpaca-plain")
    assert (
        next(read_records(records / "dialogues-train.jsonl", Dialogue))
        .messages[0]["content"]
        .endswith("\n\nloud")
    )
    assert not (records / "comparisons-train.jsonl").exists()
    with pytest.raises(UserError, match=r"alpaca\.jsonl:1: no column 'messages'"):
        run(own, dialogue_format="sharegpt")
    both = {"prompt": "p", "responses": ["x", "y"], "scores": [2, 1], "chosen": "a", "rejected": "b"}
    (own / "both.jsonl").write_text(
        "".join(json.dumps({**both, "prompt": f"p{n}"}) + "\n" for n in range(40))
    )
    with pytest.raises(UserError, match="columns of two formats"):
        run(own, comparisons=str(own / "both.jsonl"))
    records, _ = run(own, comparisons=str(own / "both.jsonl"), comparison_format="ranked")
    assert next(read_records(records / "comparisons-train.jsonl", Comparison)).responses == ("x", "y")


def test_broken_records_end_the_stage_or_are_counted(own: Path) -> None:
    with (own / "alpaca.jsonl").open("a") as file:
        file.write('{"instruction": "x", "output": ""}\n{"instruc\n')
    with pytest.raises(UserError, match=r"alpaca\.jsonl:61: output is empty"):
        run(own)
    assert not (own / "data" / "records").exists()  # never half a data set
    records, report = run(own, broken="skip")
    assert (
        sum(
            1
            for side in ("train", "validation")
            for _ in read_records(records / f"dialogues-{side}.jsonl", Dialogue)
        )
        == 60
    )
    assert report.facts["dialogues left out"] == 2
    assert any(
        "2 broken records left out; the first:" in note and "alpaca.jsonl:61" in note for note in report.notes
    )
