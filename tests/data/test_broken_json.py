"""Broken JSON: file, line, column, and the likely mistake, as the person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatwright import cli
from chatwright.config import UserError
from chatwright.data.sources import documents

GOOD = '{"text": "fine"}\n'
LINES = [
    ('{"text": "a",}', 14, "the comma before the closing } is one too many"),
    ('{"text": ["a",]}', 15, "the comma before the closing ] is one too many"),
    ('{"text": "a"},', 14, "a comma stands behind the object"),
    ('{"text": "a"} {"text": "b"}', 15, "several objects stand on one line"),
    ('{"text": "a"}, {"text": "b"}', 14, "several objects stand on the line, with commas between"),
    ("{", 2, "one object goes over several lines"),
    ('{"text": "a"', 13, "one object goes over several lines"),
    ("[", 2, "A list of objects is a .json file"),
    ('[{"text": "a"},', 16, "A list of objects is a .json file"),
    ('{"text": "a', 10, "a line break inside a text is written \\n"),
    ("{'text': 'a'}", 2, "single quotes stand where JSON has double ones"),
    ("{\"text\": 'a'}", 10, "single quotes stand where JSON has double ones"),
    ("{text: 1}", 2, "the name of a column stands in double quotes; found 'text: 1}'"),
    ('{"text" "a"}', 9, "between a name and its value stands a colon"),
    ('{"text": "a" "b": 1}', 14, "a comma is missing, or a double quote inside a text"),
    ('{"text": "he said "no""}', 20, "a comma is missing, or a double quote inside a text"),
    ('{"text": None}', 10, "JSON writes null, not None"),
    ('{"text": True}', 10, "JSON writes true, not True"),
    ("{“text”: 1}", 2, "the typographic quote “ stands where JSON has a plain"),
    ('{"text": "C:\\dir"}', 13, "a backslash inside a text is written twice"),
    ('{"text": "a\tb"}', 12, "it is written \\n or \\t"),
    ('{"text": "a"} // why', 15, "JSON has no comments"),
    ("# why", 1, "JSON has no comments"),
    ("\ufeff" + '{"text": "a"}', 1, "a byte-order mark stands here: were files joined"),
    ("Just words.", 1, "it is no JSON; is the file a .txt or a .csv?"),
    ('{"text": }', 10, "a value is missing, or is no JSON; found '}'"),
]


@pytest.mark.parametrize(("line", "column", "said"), LINES)
def test_a_line_of_a_jsonl_file(tmp_path: Path, line: str, column: int, said: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(GOOD + line + "\n" + GOOD, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(documents(str(file)))
    assert f"{file}:2: not valid JSON at column" in str(error.value)
    assert said in str(error.value) and "\n" not in str(error.value)
    if column and "\\" not in line:
        assert f"at column {column}: " in str(error.value)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    for end in ('{"text": "fi', '{"text"', '{"text": "fine"', '{"text": "fine"\n'):
        file.write_text(GOOD + end)
        with pytest.raises(
            UserError, match=r"mine\.jsonl:2: .*the file ends in the middle of a record: was it"
        ):
            list(documents(str(file)))


def test_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    for text, said in (
        (
            '[\n {"text": "a"},\n {"text": "b"},\n]\n',
            r":4: .* column 1: the comma before the closing \] is one",
        ),
        ('{"text": "a"}\n{"text": "b"},\n', r":2: .* column 14: a comma stands behind the object"),
        ('[\n {"text": "a"}\n {"text": "b"}\n]', r":3: .* column 2: a comma is missing"),
        ('[{"text": "a"},\n {"text"', r":2: .*the file ends too early: was it cut off"),
        ("[{'text': 'a'}]", r":1: .* column 3: single quotes"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            list(documents(str(file)))


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-32-le", "it looks like UTF-16"), ("latin-1", "WINDOWS-1252")],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_other_encodings(tmp_path: Path, encoding: str, said: str, suffix: str) -> None:
    file = tmp_path / f"mine{suffix}"
    text = {".jsonl": '{"text": "café"}\n', ".json": '[{"text": "café"}]', ".csv": "text\ncafé\n"}
    file.write_bytes(text.get(suffix, "café\n").encode(encoding))
    with pytest.raises(UserError, match=rf"mine\{suffix}.* is not UTF-8: byte 0x") as error:
        list(documents(str(file)))
    assert said in str(error.value) and "iconv -f" in str(error.value)


def test_a_byte_order_mark_at_the_beginning_does_no_harm(tmp_path: Path) -> None:
    for name, text in (
        ("a.jsonl", GOOD),
        ("a.json", f"[{GOOD}]"),
        ("a.csv", "text\nfine\n"),
        ("a.txt", "fine"),
    ):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert [one.text for one in documents(str(tmp_path / name))] == ["fine"]


def test_as_the_person_sees_it(tmp_path: Path, chat_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the data stage, and through a stage that reads the file itself."""
    file = tmp_path / "mine.jsonl"
    talk = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    file.write_text(f"{talk}\n{talk[:-1]},}}\n")
    for argv in (["data", "--dialogues", file], ["sft", "--data", file, "--base", chat_dir]):
        assert cli.main([*map(str, argv), "--out", str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert "mine.jsonl:2: not valid JSON at column 49: the comma before the closing } is" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out" / "records").exists()
