"""The data stage: others' formats in, files of ours out; broken records are refused, or left out and
counted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from chatwright import cli
from chatwright.config import UserError
from chatwright.data import formats
from chatwright.data.examples import Comparison, Dialogue, Document
from chatwright.data.records import read_records, records_of
from chatwright.data.splitting import split_of
from chatwright.recipe import find_recipe, read_recipe
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


# ---- one input is enough -----------------------------------------------------------------------------------

KINDS = ("text", "dialogues", "ratings", "comparisons")


@pytest.fixture
def inputs(own: Path) -> dict[str, str]:
    """A file of each kind."""
    rated = [{"text": f"text {n}", "label": n % 5} for n in range(60)]
    (own / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    names = ("text.txt", "alpaca.jsonl", "rated.jsonl", "pairs.jsonl")
    return {kind: str(own / name) for kind, name in zip(KINDS, names, strict=True)}


@pytest.mark.parametrize(
    "kinds", [some for size in (1, 2, 3, 4) for some in itertools.combinations(KINDS, size)]
)
@pytest.mark.parametrize("others", ["left out", "empty"])
def test_any_subset_of_inputs_is_enough_and_is_all_that_is_read(
    inputs: dict[str, str], kinds: tuple[str, ...], others: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "--out", str(own / "data")]
    for kind in KINDS:
        if kind in kinds:
            argv += [f"--{kind}", inputs[kind]]
        elif others == "empty":
            argv += [f"--{kind}", ""]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    prefixes = ["" if kind == "text" else f"{kind}-" for kind in kinds]
    wanted = {f"{prefix}{side}.jsonl" for prefix in prefixes for side in ("train", "validation")}
    assert {file.name for file in (own / "data" / "records").iterdir()} == wanted
    assert all((own / "data" / "records" / name).stat().st_size for name in wanted)
    assert "built-in" not in said and "licence" not in said
    for name in ("boolq", "chitchat", "vader"):
        assert name not in said


def test_where_nothing_is_named_it_is_the_built_in_data() -> None:
    assert data.sources_of(data.Config()) == data.BUILT_IN
    assert data.sources_of(data.Config(ratings="")) == {**data.BUILT_IN, "ratings": ""}
    alone = dict.fromkeys(KINDS, "")
    assert data.sources_of(data.Config(dialogues="a.jsonl")) == {**alone, "dialogues": "a.jsonl"}
    assert data.sources_of(data.Config(path="a.txt", text="boolq")) == {**alone, "text": "a.txt"}
    both = data.Config(text="boolq", dialogues="a.jsonl")
    assert data.sources_of(both) == {**alone, "text": "boolq", "dialogues": "a.jsonl"}


def test_the_recipes_name_their_data() -> None:
    """So that one of them with text of one's own keeps the rest, and none depends on defaults."""
    for name in ("tiny", "sentiment", "smollm2"):
        config = read_recipe(find_recipe(name), {}).stages["data"].config
        assert all(getattr(config, kind) not in ("", "auto") for kind in ("text", "dialogues", "ratings"))
    tiny = read_recipe(find_recipe("tiny"), {"data": {"path": "mine.txt"}}).stages["data"].config
    assert data.sources_of(tiny) == {**data.BUILT_IN, "text": "mine.txt"}


# ---- small files, and what is odd --------------------------------------------------------------------------


def test_a_text_of_200_lines_holds_out_a_small_part(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"Question {n}: where? The answer is {n}.\n" for n in range(200))
    (own / "faq.txt").write_text(text)
    assert cli.main(["data", "--text", str(own / "faq.txt"), "--out", str(own / "data")]) == 0
    said = capsys.readouterr().out
    train = list(read_records(own / "data/records/train.jsonl", Document))
    held_out = list(read_records(own / "data/records/validation.jsonl", Document))
    assert len(held_out) == 1 and len(train) >= 8
    assert len(held_out[0].text) < len(text) / 5
    assert "".join("".join(one.text for one in [*train, *held_out]).split()) != ""
    assert sorted(line for one in [*train, *held_out] for line in one.text.splitlines()) == sorted(
        text.splitlines()
    )
    assert f"documents: {len(train)} for training, 1 held out" in said
    assert f"documents: the .txt file became {len(train) + 1} documents of at most" in said
    assert "their hashes alone would leave nothing to measure on, so one was taken" in said


@pytest.mark.parametrize("size", [2, 3, 7])
def test_both_sides_have_a_record_whatever_the_share(own: Path, size: int) -> None:
    for share in (0.001, 0.5, 0.999):
        rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(size)]
        (own / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = data.Config(dialogues=str(own / "few.jsonl"), validation=share)
        report = data.run(settings, Workspace(own / f"data{share}"))
        sides = {
            side: list(read_records(own / f"data{share}/records/dialogues-{side}.jsonl", Dialogue))
            for side in ("train", "validation")
        }
        assert sum(map(len, sides.values())) == size and all(sides.values())
        for side, found in sides.items():
            assert report.facts[f"dialogues {side}"] == len(found)


def test_what_had_to_be_held_out_of_one_kind_is_held_out_of_all(own: Path) -> None:
    """A conversation that is held out as a dialogue is no document for training, and the other way round."""
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}]} for n in range(400)]
    talks = [row for row in rows if split_of(formats.dialogue(row).id) == "train"]
    (own / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks[:5]))
    for text, dialogues in (("many", "few"), ("few", "many"), ("few", "few")):
        settings = data.Config(text=str(own / f"{text}.jsonl"), dialogues=str(own / f"{dialogues}.jsonl"))
        report = data.run(settings, Workspace(own / f"{text}-{dialogues}"))
        records = own / f"{text}-{dialogues}" / "records"
        ids = {
            (name, side): [
                json.loads(line)["id"] for line in (records / f"{name}{side}.jsonl").read_text().splitlines()
            ]
            for name in ("", "dialogues-")
            for side in ("train", "validation")
        }
        held_out = {*ids["", "validation"], *ids["dialogues-", "validation"]}
        assert not held_out & {*ids["", "train"], *ids["dialogues-", "train"]}
        assert all(ids.values())
        assert report.facts["documents train"] == len(ids["", "train"])
        assert report.facts["dialogues train"] == len(ids["dialogues-", "train"])


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        ("dialogues", [{"prompt": "p", "completion": "c"}], "it holds one conversation only"),
        ("dialogues", [{"prompt": "p", "completion": "c"}] * 3, "its 3 conversations are one and the same"),
        ("comparisons", [{"prompt": "p", "chosen": f"{n}", "rejected": "b"} for n in range(4)], "one prompt"),
        ("ratings", [{"text": "t", "label": 1}], "it holds one rated text only"),
        ("text", [{"text": "t"}], "it holds one document only"),
    ],
)
def test_of_one_record_nothing_can_be_held_out(
    own: Path, kind: str, rows: list[Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", f"--{kind}", str(own / "one.jsonl"), "--out", str(own / "data")]) == 1
    err = capsys.readouterr().err
    assert said in err and "one must be held out to measure on, and one left to learn from: add more" in err


def test_odd_records_are_counted_in_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    talks = [{"messages": [{**asked, "content": f"q{n}"}, answer]} for n in range(9)]
    talks += [{"messages": [asked]}, {"messages": [asked, answer, asked]}, talks[0], talks[0]]
    (own / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    pairs = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    pairs += [{"prompt": "p", "chosen": "same", "rejected": "same "}, pairs[3]]
    (own / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    argv = ["--dialogues", str(own / "talks.jsonl"), "--comparisons", str(own / "few.jsonl")]
    assert cli.main(["data", *argv, "--out", str(own / "data")]) == 0
    out = capsys.readouterr().out
    assert (
        "  dialogues: 1 without an answer of the assistant (SFT learns nothing from them, PPO takes them as "
        "prompts); 1 that end with the user's turn (or a tool's), which nobody answers; 2 that repeat "
        "another word for word\n" in out
    )
    assert (
        "  comparisons: 1 left out, for their answers are the same text; 1 that repeat another word for word"
        in out
    )
    report = (own / "data" / "report.md").read_text()
    assert "1 without an answer of the assistant" in report and "1 left out, for their answers" in report
    facts = json.loads((own / "data" / "result.json").read_text())["facts"]
    assert facts["dialogues without an answer"] == 1 and facts["comparisons left out, answers alike"] == 1
    kept = sum(
        1
        for side in ("train", "validation")
        for _ in read_records(own / f"data/records/comparisons-{side}.jsonl", Comparison)
    )
    assert kept == 10


def test_built_in_data_are_told_where_nobody_named_them(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not where a recipe names the very same sources."""
    file = str(own / "alpaca.jsonl")
    monkeypatch.setattr(data, "BUILT_IN", {"text": "", "dialogues": file, "ratings": "", "comparisons": ""})
    line = "no setting names a source: the built-in data"
    data.run(data.Config(validation=0.2), Workspace(own / "one"))
    assert line in capsys.readouterr().out
    data.run(data.Config(text="", dialogues=file, ratings="", validation=0.2), Workspace(own / "two"))
    assert line not in capsys.readouterr().out
