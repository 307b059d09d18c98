"""`chatwright data preview`: what a file is read as, its first records, its counts; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from chatwright import cli

Preview = Callable[..., tuple[int, str, str]]


@pytest.fixture
def preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Preview:
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        before = sorted(tmp_path.rglob("*"))
        code = cli.main(["data", "preview", *argv])
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
        return code, *capsys.readouterr()

    return run


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_a_table_of_questions_and_answers(preview: Preview) -> None:
    Path("faq.csv").write_text(
        "id,Question,Answer\n" + "".join(f"{n},What is {n}?,It is {n}.\n" for n in range(9))
    )
    code, out, _ = preview("faq.csv", "--count", "2")
    assert code == 0
    assert "faq.csv: read as dialogues (chatwright data --dialogues faq.csv)" in out
    assert "prompts and completions, by the columns question, answer of the first record" in out
    assert "other columns: id" in out
    assert "1.\n  user: What is 0?\n  assistant: [[It is 0.]]\n" in out
    assert "2.\n  user: What is 1?" in out and "What is 2?" not in out
    assert "9 conversations, of which about 1 would be held out" in out


def test_columns_with_other_names(preview: Preview) -> None:
    Path("faq.csv").write_text("Frage,Antwort\n" + "".join(f"F{n},A{n}\n" for n in range(3)))
    code, _, err = preview("faq.csv")
    assert code == 1 and "its columns tell no kind; the columns found are: Frage, Antwort" in err
    code, out, _ = preview("faq.csv#prompt=Frage,completion=Antwort")
    assert code == 0 and "user: F0\n  assistant: [[A0]]" in out
    code, out, _ = preview("faq.csv#Frage")
    assert code == 0 and "read as text" in out and "text: [[F0]]" in out


@pytest.mark.parametrize(
    ("rows", "kind", "shown"),
    [
        (
            [{"prompt": f"p{n}", "chosen": "good", "rejected": "bad"} for n in range(3)],
            "comparisons",
            "user: p0\n  answer with score 1: good\n  answer with score 0: bad",
        ),
        (
            [{"prompt": f"p{n}", "responses": ["x", "y"], "scores": [1, 3]} for n in range(3)],
            "comparisons",
            "user: p0\n  answer with score 3: y\n  answer with score 1: x",
        ),
        ([{"text": f"t{n}", "label": 2.5} for n in range(3)], "ratings", "rated 2.5: t0"),
        ([{"text": f"t{n}"} for n in range(3)], "text", "text: [[t0]]"),
        ([{"prompt": f"p{n}"} for n in range(3)], "dialogues", "user: p0"),
    ],
)
def test_every_kind(preview: Preview, rows: list[Any], kind: str, shown: str) -> None:
    code, out, _ = preview(write("mine.jsonl", rows))
    assert code == 0 and f"read as {kind}" in out and shown in out and "1 would be held out" in out
    parquet.write_table(pyarrow.Table.from_pylist(rows), "mine.parquet")
    assert shown in preview("mine.parquet")[1]


def test_a_text_file_and_how_it_is_cut(preview: Preview) -> None:
    Path("faq.txt").write_text("".join(f"Question {n}? The answer is {n}.\n" for n in range(200)))
    code, out, _ = preview("faq.txt", "--count", "1")
    assert code == 0 and "read as text" in out and "text: [[Question 0?" in out
    assert "the .txt file became 1" in out and "cut behind blank lines" in out


def test_what_is_odd_is_counted_and_what_is_broken_named(preview: Preview) -> None:
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [asked, said]},
        {"messages": [asked, said]},
        {"messages": [asked]},
        {"messages": [asked, said, asked]},
        {"messages": []},
    ]
    code, out, _ = preview(write("mine.jsonl", rows))
    assert code == 0 and "4 conversations" in out
    assert (
        "  1 without an answer of the assistant (SFT learns nothing from them, PPO takes them as prompts); 1 "
        "that end with the user's turn (or a tool's), which nobody answers; 1 that repeat another word "
        in out
    )
    assert "1 that cannot be used; the first: mine.jsonl:5: messages is empty" in out


def test_what_the_data_stage_would_refuse(preview: Preview) -> None:
    out = preview(write("one.jsonl", [{"text": "x"}]))[1]
    assert "the data stage would refuse it: it holds one document only" in out
    code, _, err = preview("gone.jsonl")
    assert code == 1 and "neither a file or folder nor a named data source" in err
    code, _, err = preview(write("two.jsonl", [{"prompt": "p", "completions": ["a"], "labels": [True]}]))
    assert code == 1 and "it looks like stepwise supervision, which no setting reads" in err
    assert preview()[0] == 2
    code, _, err = preview("one.jsonl", "--kind", "ratings")
    assert code == 1 and "no column 'label'" in err


def test_texts_do_not_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Colours, titles and cleared screens of a file of somebody else."""
    file = tmp_path / "escapes.jsonl"
    rows = (
        {"prompt": "a\x1b[31mb\x1b]0;title\x07", "completion": "c\x1b[2J\rd\n[bold]e[/bold]"},
        {"prompt": "x", "completion": "y"},
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "preview", str(file)]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r"} & set(out)
    assert "a\u241b[31mb" in out and "[bold]e[/bold]" in out
