"""JSON however it stands in a file: what the file holds decides, not its name. So with gzip and UTF-16."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from chatwright.config import UserError
from chatwright.data import files
from chatwright.data.reading import Faults
from chatwright.data.records import own_file, read_records
from chatwright.data.sources import comparisons, dialogues, documents, labelled_texts
from chatwright.evaluate.model_comparison import read_prompts

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"café {n}"} for n in range(3)],
    "dialogues": [{"prompt": f"p{n}", "completion": "東京"} for n in range(3)],
    "comparisons": [{"prompt": f"p{n}", "chosen": "é", "rejected": "n"} for n in range(3)],
    "ratings": [{"text": f"é{n}", "label": n} for n in range(3)],
}
READ: dict[str, Callable[..., Iterable[Any]]] = {
    "text": documents,
    "dialogues": dialogues,
    "comparisons": comparisons,
    "ratings": labelled_texts,
}
FORMS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "lines": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    "lines, no end": lambda rows: (
        "\r\n\r\n" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    ),
    "list": lambda rows: json.dumps(rows, ensure_ascii=False),
    "list over lines": lambda rows: "\n" + json.dumps(rows, ensure_ascii=False, indent=2) + "\n",
    "list of lines": lambda rows: "[" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]",
    "pretty": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in rows),
    "side by side": lambda rows: "".join(json.dumps(row, ensure_ascii=False) for row in rows),
}
CODES: dict[str, Callable[[str], bytes]] = {
    "utf-8": lambda text: text.encode(),
    "bom": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip of utf-16": lambda text: gzip.compress(text.encode("utf-16")),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("kind", list(ROWS))
def test_every_form_under_every_name(kind: str, form: str, tmp_path: Path) -> None:
    wanted = [one.to_json() for one in READ[kind](str(_written(tmp_path / "usual.jsonl", "lines", kind)))]
    for name in ("a.jsonl", "a.json", "a.JSON"):
        file = _written(tmp_path / name, form, kind)
        assert [one.to_json() for one in READ[kind](str(file))] == wanted


@pytest.mark.parametrize("code", list(CODES))
@pytest.mark.parametrize("form", ["lines", "list over lines", "pretty"])
def test_every_encoding(code: str, form: str, tmp_path: Path) -> None:
    for kind in ROWS:
        file = _written(tmp_path / f"{kind}.jsonl", form, kind)
        wanted = [one.to_json() for one in READ[kind](str(file))]
        for name in (f"{kind}.jsonl", f"{kind}.jsonl.gz", f"{kind}.json"):
            (tmp_path / name).write_bytes(CODES[code](FORMS[form](ROWS[kind])))
            assert [one.to_json() for one in READ[kind](str(tmp_path / name))] == wanted
        assert own_file(f"{tmp_path / kind}.jsonl.gz") is not None
    assert list(read_records(tmp_path / "ratings.jsonl.gz" / "ratings-train.jsonl", object))


def _written(file: Path, form: str, kind: str) -> Path:
    file.write_text(FORMS[form](ROWS[kind]), encoding="utf-8", newline="")
    return file


@pytest.mark.parametrize("code", list(CODES))
def test_other_kinds_of_files(code: str, tmp_path: Path) -> None:
    for name, text in (("a.txt", "café\n"), ("a.csv", "text\ncafé\n"), ("a.tsv.gz", "text\tx\ncafé\ty\n")):
        (tmp_path / name).write_bytes(CODES[code](text))
        assert [one.text for one in documents(str(tmp_path / name))] == ["café"]
    (tmp_path / "asked.txt").write_bytes(CODES[code]("What?\nWho is ärger?\n"))
    assert [one[0]["content"] for one in read_prompts(str(tmp_path / "asked.txt"), 9)] == [
        "What?",
        "Who is ärger?",
    ]
    (tmp_path / "asked.jsonl").write_bytes(CODES[code](FORMS["pretty"](ROWS["dialogues"])))
    assert len(read_prompts(str(tmp_path / "asked.jsonl"), 9)) == 3


def test_a_single_object_is_one_record(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "x"}]}
    for text in (json.dumps(talk), json.dumps(talk, indent=1)):
        for name in ("a.json", "a.jsonl"):
            (tmp_path / name).write_text(text)
            assert len(list(dialogues(str(tmp_path / name)))) == 1
    (tmp_path / "b.json").write_text(json.dumps({"turns": talk["messages"]}))
    assert len(list(dialogues(f"{tmp_path / 'b.json'}#turns"))) == 1


def test_where_a_broken_record_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{\n "text": "a"\n}\n{\n "text": "b",\n}\n')
    with pytest.raises(
        UserError, match=r"a\.json:6: not valid JSON at column 1: the comma before the closing } is"
    ):
        list(documents(str(file)))
    file.write_text('{\n "text": "a"\n}\n{\n "body": "b"\n}\n')
    with pytest.raises(UserError, match=r"a\.json:4: no column 'text'"):
        list(documents(str(file)))
    faults = Faults(skip=True)
    assert len(list(documents(str(file), faults=faults))) == 1 and faults.count == 1
    file.write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    assert len(list(documents(str(file), faults=(faults := Faults(skip=True))))) == 2 and faults.count == 1
    (tmp_path / "b.jsonl").write_text(
        '{"text": "a"\n{"text": "b"}\n{"text": "c"}\n'
    )  # only the first is broken
    assert len(list(documents(str(tmp_path / "b.jsonl"), faults=(faults := Faults(skip=True))))) == 2
    assert "b.jsonl:1: not valid JSON" in faults.first


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04rest", "is a ZIP archive, as .xlsx and .docx files are: unpack it, or save it"),
        (b"PAR1rest", "is a Parquet file: give it the suffix .parquet"),
        (b"\x28\xb5\x2f\xfdrest", "is packed by zstd: unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS and not the file itself"),
        (gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "it is packed by gzip, and damaged or cut off"),
        (b"\xff\xfea\x00\x00\xd8", "it begins as UTF-16, but is not"),
        ('{"text": "café"}\n'.encode("latin-1"), "is not UTF-8: byte 0xe9"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_what_is_something_else_is_said(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(documents(str(tmp_path / name)))
    assert said in str(error.value) and name in str(error.value)


def test_what_is_read_whole_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1 << 20)
    file = tmp_path / "a.json"
    file.write_text("[\n" + ",\n".join(['{"text": "x"}'] * 90_000) + "]")
    with pytest.raises(
        UserError, match=r"a\.json: over 1 MiB, and its first line is no whole object; write it as"
    ):
        list(documents(str(file)))
    file.write_text('{"text": "x"}\n' * 90_000)
    assert sum(1 for _ in documents(str(file))) == 90_000
    (tmp_path / "bomb.jsonl").write_bytes(gzip.compress(b" " * (4 << 20)))
    with pytest.raises(UserError, match=r"bomb\.jsonl:1: a line of more than 1 MiB"):
        list(documents(str(tmp_path / "bomb.jsonl")))


def test_gz_alone_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"its name must say what is packed, as in talks\.jsonl\.gz"):
        list(documents(str(tmp_path / "a.gz")))
