"""TRL's dataset types, each in the standard and the conversational form: read by what reads them, refused by
the rest with a line that says what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from chatwright import cli
from chatwright.config import UserError
from chatwright.data.shapes import SHAPES, shape_of
from chatwright.data.sources import comparisons, dialogues, documents, labelled_texts

ASKED = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
GREEN = [{"role": "assistant", "content": "It is green."}]
READERS: dict[str, Callable[[str], Iterable[Any]]] = {
    "text": documents,
    "dialogues": dialogues,
    "ratings": labelled_texts,
    "comparisons": comparisons,
}
TYPES: dict[str, tuple[dict[str, Any], list[str]]] = {  # name -> a record, and the settings that read it
    "language modelling": ({"text": "The sky is blue."}, ["text"]),
    "language modelling, conversational": ({"messages": ASKED + BLUE}, ["text", "dialogues"]),
    "prompt-only": ({"prompt": "The sky is"}, ["dialogues"]),
    "prompt-only, conversational": ({"prompt": ASKED}, ["dialogues"]),
    "prompt-completion": ({"prompt": "The sky is", "completion": " blue."}, ["dialogues"]),
    "prompt-completion, conversational": ({"prompt": ASKED, "completion": BLUE}, ["dialogues"]),
    "preference": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ["comparisons"]),
    "preference, conversational": ({"prompt": ASKED, "chosen": BLUE, "rejected": GREEN}, ["comparisons"]),
    "implicit": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ["comparisons"]),
    "implicit, conversational": ({"chosen": ASKED + BLUE, "rejected": ASKED + GREEN}, ["comparisons"]),
    "unpaired": ({"prompt": "The sky is", "completion": " blue.", "label": True}, ["ratings"]),
    "unpaired, conversational": ({"prompt": ASKED, "completion": GREEN, "label": False}, ["ratings"]),
    "stepwise": ({"prompt": "Which?", "completions": ["a", "b"], "labels": [True, False]}, []),
}


@pytest.mark.parametrize("name", TYPES)
def test_each_type_is_read_by_what_reads_it_and_refused_by_the_rest(name: str, tmp_path: Path) -> None:
    row, reads = TYPES[name]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    for setting, read in READERS.items():
        if setting in reads:
            assert len(list(read(str(file)))) == 1
            continue
        with pytest.raises(UserError, match=r"a\.jsonl:1: ") as error:
            list(read(str(file)))
        shape = shape_of(row)
        assert shape is not None and f"these look like {shape.name}" in str(error.value), setting
        by = f"which the setting `{shape.reads}` reads" if shape.reads else "which no setting reads"
        assert by in str(error.value) and shape.reads in (*reads, "")


def test_what_they_are_read_as(tmp_path: Path) -> None:
    def read(name: str, setting: str) -> Any:
        (tmp_path / "a.jsonl").write_text(json.dumps(TYPES[name][0]) + "\n")
        return next(iter(READERS[setting](str(tmp_path / "a.jsonl"))))

    for name in ("prompt-completion", "prompt-completion, conversational"):
        roles = [(turn["role"], turn["content"]) for turn in read(name, "dialogues").messages]
        said = "blue." if name == "prompt-completion" else "It is blue."
        assert [role for role, _ in roles] == ["user", "assistant"] and roles[1][1] == said
    assert read("prompt-only", "dialogues").messages == ({"role": "user", "content": "The sky is"},)
    for name in ("preference", "implicit"):
        pair = read(name, "comparisons")
        assert pair.prompt == ({"role": "user", "content": "The sky is"},)
        assert (pair.responses, pair.scores) == (("blue.", "green."), (1.0, 0.0))
    for name in ("preference, conversational", "implicit, conversational"):
        pair = read(name, "comparisons")
        assert list(pair.prompt) == ASKED and pair.responses == ("It is blue.", "It is green.")
    assert (read("unpaired", "ratings").text, read("unpaired", "ratings").label) == ("blue.", 1.0)
    green = read("unpaired, conversational", "ratings")
    assert (green.text, green.label) == ("It is green.", 0.0)
    assert read("language modelling, conversational", "text").text == "What color is the sky?\nIt is blue."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "a", "context": "c"}, "a column `context` stands beside the prompt"),
        ({"question": "q", "prompt": "p", "answer": "a"}, "both of the columns prompt, question; choose one"),
        ({"prompt": "p", "completion": "c", "response": "r"}, "both of the columns completion, response"),
        ({"prompt": "p", "completion": "c", "messages": ASKED}, "columns of two formats: prompt, completion"),
        ({"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}, "columns of two formats"),
        ({"prompt": "p", "completion": 3}, "completion must be text or a list of messages, found int 3"),
        ({"prompt": 3, "completion": "c"}, "prompt must be text or a list of messages, found int 3"),
        ({"prompt": " ", "completion": "c"}, "prompt is empty"),
        ({"prompt": "p", "completion": " "}, "completion is empty"),
        ({"prompt": "p", "text": "t"}, "no column 'messages'"),
        ({"frage": "q", "antwort": "a"}, "FILE#prompt=COLUMN,completion=COLUMN"),
    ],
)
def test_what_cannot_be_told_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        list(dialogues(str(tmp_path / "a.jsonl")))
    assert said in str(error.value)


def test_common_files_of_the_hub() -> None:
    """Columns as well-known data sets have them, each with more than one reading."""
    ultrachat = {"prompt": "p", "prompt_id": "x", "messages": ASKED + BLUE}
    ultrafeedback = {**ultrachat, "chosen": ASKED + BLUE, "rejected": ASKED + GREEN, "score_chosen": 8.0}
    orca = {"system": "Be brief.", "question": "q", "chosen": "a", "rejected": "b"}
    from chatwright.data import formats, preferences

    assert len(formats.dialogue(ultrachat).messages) == len(formats.dialogue(ultrafeedback).messages) == 2
    assert preferences.comparison({**ultrafeedback, "prompt": ASKED[0]["content"]}).responses == (
        "It is blue.",
        "It is green.",
    )
    assert [turn["role"] for turn in preferences.comparison(orca).prompt] == ["system", "user"]


def test_a_setting_chooses_the_format(tmp_path: Path) -> None:
    both = {"prompt": "p", "completion": "c", "messages": ASKED + BLUE}
    (tmp_path / "a.jsonl").write_text(json.dumps(both) + "\n")
    one = next(iter(dialogues(str(tmp_path / "a.jsonl"), format="prompt-completion")))
    assert one.messages[1]["content"] == "c"
    one = next(iter(dialogues(str(tmp_path / "a.jsonl"), format="openai")))
    assert one.messages[1]["content"] == "It is blue."
    one = next(iter(dialogues(f"{tmp_path / 'a.jsonl'}#prompt=prompt,completion=completion")))
    assert one.messages[1]["content"] == "c"


def test_every_shape_is_one_of_the_types_or_ours() -> None:
    for row, _ in TYPES.values():
        assert shape_of(row) is not None
    assert shape_of({"id": 3}) is None and shape_of({}) is None
    assert {shape.reads for shape in SHAPES} == {"", "text", "dialogues", "ratings", "comparisons"}


def test_as_the_person_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(TYPES["preference"][0]) + "\n")
    assert cli.main(["data", "--dialogues", str(file), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert (
        "pairs.jsonl:1: no column 'messages'" in err
        and "these look like preference pairs (columns prompt, chosen, rejected), which the setting "
        "`comparisons` reads"
        in err
        and err.count("\n") == 1
    )
