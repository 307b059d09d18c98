"""CSV files: every kind of record, columns with other names, and mistakes with file and line."""

from __future__ import annotations

import csv
import io
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatwright import cli
from chatwright.config import UserError
from chatwright.data import files
from chatwright.data.csv_rows import csv_rows
from chatwright.data.reading import Faults
from chatwright.data.sources import comparisons, dialogues, documents, labelled_texts

CELL = st.text(st.sampled_from("ab é,;\t\"'\n#="), max_size=8)


def rows(file: Path, **options: Any) -> list[dict[str, str]]:
    return [dict(row) for _, row in csv_rows(file, options.get("faults", Faults()), 1 << 20)]


@given(st.lists(st.tuples(CELL, CELL), max_size=5), st.sampled_from([",", ";", "\t"]))
def test_what_a_program_wrote_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], separator: str
) -> None:
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    buffer = io.StringIO()
    written = csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL)
    written.writerow(("a", "b"))
    written.writerows(cells)
    file.write_bytes(buffer.getvalue().encode())
    assert rows(file) == [{"a": one, "b": other} for one, other in cells]


def test_every_kind_of_record(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('Question,Answer,id\n"Open, on Sundays?","Yes,\nfrom ten.",3\n', encoding="utf-8")
    one = next(iter(dialogues(str(file))))
    assert [m["content"] for m in one.messages] == ["Open, on Sundays?", "Yes,\nfrom ten."]
    file.write_text("prompt;chosen;rejected;annotator\nHi;Ho;Hu;ann\n")
    pair = next(iter(comparisons(str(file))))
    assert (pair.responses, pair.scores, pair.annotator) == (("Ho", "Hu"), (1.0, 0.0), "ann")
    file.write_text("text,label\ngood,2.5\nbad,-1\nso,true\n")
    assert [(one.text, one.label) for one in labelled_texts(str(file))] == [
        ("good", 2.5),
        ("bad", -1.0),
        ("so", 1.0),
    ]
    file.write_text("prompt,completion,label\np, Yes.,True\np,No.,False\n")
    assert [(one.text, one.label) for one in labelled_texts(str(file))] == [("Yes.", 1.0), ("No.", 0.0)]
    file.with_suffix(".tsv").write_text("text\tid\none, two\t1\nthree\t2\n")
    assert [one.text for one in documents(str(file.with_suffix(".tsv")))] == ["one, two", "three"]
    file.write_text("instruction,input,output\nAdd,,2\n")
    assert next(iter(dialogues(str(file)))).messages[1]["content"] == "2"


def test_columns_with_other_names(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text("Frage,Antwort,text,system\nWann?,Um zehn.,x,Be brief.\n")
    spec = f"{file}#prompt=Frage,completion=Antwort"
    for specs in (spec, [spec], f"{spec},{spec}"):
        one = next(iter(dialogues(specs)))
        assert [m["content"] for m in one.messages] == ["Be brief.", "Wann?", "Um zehn."]
    assert [one.text for one in documents(f"{file}#Frage")] == ["Wann?"]
    assert [one.text for one in documents(f"{file}#text=Antwort")] == ["Um zehn."]
    file.write_text("good one,bad one,asked,stars\na,b,p,3\n")
    pair = next(iter(comparisons(f"{file}#prompt=asked,chosen=good one,rejected=bad one")))
    assert pair.responses == ("a", "b")
    assert next(iter(labelled_texts(f"{file}#text=asked,label=stars"))).label == 3.0


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("prompt=Frage,completion=Antwrt", "no column 'Antwrt'; the columns found are: Frage, Antwort"),
        ("promt=Frage", "no reader knows a column 'promt'; did you mean 'prompt'?"),
        ("prompt=", "'prompt=' is not of the form NAME=COLUMN"),
        ("prompt=Frage,prompt=Antwort", "prompt is given twice"),
        ("prompt=Frage,completion=Antwort,label=Frage", "unpaired preferences"),
        ("gone", "no column 'gone'; the columns found are: Frage, Antwort"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: str, said: str) -> None:
    file = tmp_path / "faq.csv"
    file.write_text("Frage,Antwort\nWann?,Um zehn.\n")
    with pytest.raises(UserError) as error:
        list(dialogues(f"{file}#{columns}"))
    assert said in str(error.value) and "faq.csv" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.csv is empty; its first line must name the columns"),
        ("\n\n", "a.csv is empty; its first line must name the columns"),
        ("prompt,completion\n", "nothing to read in it"),
        (
            "prompt,completion\na,b\nc\n",
            "a.csv:3: 1 field, but the first line names 2 columns (prompt, compl",
        ),
        ("prompt,completion\na,b,c\n", "a.csv:2: 3 fields, but the first line names 2 columns"),
        ("prompt,completion\na,yes, it is\n", "a text that holds a comma stands in double quotes"),
        (
            'prompt,completion\na,b\n"c,d\ne,f\n',
            "a.csv:3: a double quote is opened in the record that begins",
        ),
        ('prompt,completion\n"a" b,c\n', "a.csv:2: text stands behind a closing double quote"),
        ("prompt,prompt\na,b\n", "a.csv:1: two columns are called 'prompt'"),
        ("1,2\n3,4\n", "a.csv:1: no names of columns; the first line of the file must name them"),
        (f"{'word ' * 30},x\ny,z\n", "a.csv:1: no names of columns, but 'word word"),
        ("When?,At ten.\nWhere?,Here.\n", "the first line of a .csv file names its columns"),
        ("prompt,completion\na,\n", "a.csv:2: completion is empty"),
        ("prompt,completion\na,b\n,c\n", "a.csv:3: prompt is empty"),
        ("text\nx\n", "these look like texts (columns text), which the setting `text` reads"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        list(dialogues(str(file)))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_broken_rows_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion\na,b\nc\n"d" e,f\ng,h,,\ni,\n')
    faults = Faults(skip=True)
    assert [one.messages[0]["content"] for one in dialogues(str(file), faults=faults)] == ["a", "g"]
    assert faults.count == 3 and "a.csv:3: 1 field" in faults.first


def test_as_spreadsheets_write(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfsep=;\r\nPrompt;Completion;;\r\nOne, two;Three;;\r\n\r\n")
    assert rows(file) == [{"prompt": "One, two", "completion": "Three"}]
    file.write_text(",prompt,completion\n0,a,b\n")  # pandas writes its index without a name
    assert rows(file) == [{"prompt": "a", "completion": "b"}]


def test_a_record_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1 << 20)
    file = tmp_path / "a.csv"
    for text in ("text\nx\n" + "y" * (2 << 20), 'text\nx\n"' + "y\n" * (1 << 20)):
        file.write_text(text)
        with pytest.raises(
            UserError, match=r"a\.csv:3: the record that begins here is longer than 1 MiB; is"
        ):
            list(documents(str(file)))


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    with file.open("w") as out:
        out.write("prompt,completion\n")
        for number in range(40_000):
            out.write(f'"question {number}, please","answer {number} {"word " * 20}"\n')  # 6 MB
    tracemalloc.start()
    total = sum(1 for _ in dialogues(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 40_000 and peak < 1 << 20


def test_as_the_person_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "faq.csv"
    file.write_text("question,answer\n" + "".join(f"q{n},a{n}\n" for n in range(9)) + "q9,yes, often\n")
    assert cli.main(["data", "--dialogues", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "faq.csv:11: 3 fields, but the first line names 2 columns (question, answer)" in (
        capsys.readouterr().err
    )
    assert (
        cli.main(["data", "--dialogues", str(file), "--out", str(tmp_path / "out"), "--broken", "skip"]) == 0
    )
    said = capsys.readouterr().out
    assert "dialogues: 8 for training, 1 held out" in said and "1 broken records left out" in said
