"""No console ends a command: other encodings, a closed pipe, none at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatwright import cli, streams
from chatwright.files import read_json

CONSOLES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
POSIX = pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")


def program(
    *arguments: object, console: str = "", stdin: bytes = b"", **options: object
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "chatwright", *map(str, arguments)],
        input=stdin,
        env={**os.environ, **CONSOLES.get(console, {})},
        timeout=300,
        **({"capture_output": True} | options),
    )  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    file = tmp_path / "talks.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n} → 東京?"},
                {"role": "assistant", "content": f"naïve {n} 🙂"},
            ]
        }
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def check(*argv: object, console: str, stdin: bytes = b"") -> bytes:
    """The command ends well; returns its standard output."""
    done = program(*argv, console=console, stdin=stdin)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, (argv, done.stderr)
    return done.stdout


def test_data_on_a_console_of_ascii(talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "données"
    check("data", "--dialogues", talks, "--validation", "0.3", "--out", out, console="ascii")
    assert "naïve" in (out / "records" / "dialogues-train.jsonl").read_text(encoding="utf-8")
    assert (out / "report.md").read_text(encoding="utf-8")


def test_a_prompt_under_lang_c(chat_dir: Path) -> None:
    check("generate", chat_dir, "--prompt", "naïve 東京", "--max_new_tokens", "8", console="C")


def test_a_preview_on_a_console_of_windows(talks: Path, chat_dir: Path, tmp_path: Path) -> None:
    argv = ("sft", "--base", chat_dir, "--data", talks, "--preview", "2", "--out", tmp_path / "sft")
    assert "naïve".encode("cp1252") in check(*argv, console="cp1252")


@pytest.mark.slow
@pytest.mark.parametrize("console", list(CONSOLES))
def test_every_verb_on_every_console(console: str, talks: Path, chat_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "données"
    check("data", "--dialogues", talks, "--validation", "0.3", "--out", out, console=console)
    assert "naïve" in (out / "records" / "dialogues-train.jsonl").read_text(encoding="utf-8")
    for argv in (
        ["data", "preview", talks],
        ["data", "list"],
        ["generate", chat_dir, "--prompt", "naïve 東京", "--max_new_tokens", "8"],
        ["sft", "--base", chat_dir, "--data", talks, "--preview", "2", "--out", tmp_path / "sft"],
        ["doctor", chat_dir],
        ["plan", "sft", "--base", chat_dir, "--data", talks, "--time", "false"],
        ["export", chat_dir, tmp_path / "out", "--format", "hf"],
        ["compare", chat_dir, chat_dir, "--count", "2", "--max_new_tokens", "4", "--out", tmp_path / "c.md"],
        ["sft", "--base", chat_dir, "--data", talks, "--fit.steps", "2", "--out", tmp_path / "s"],
        ["--help"],
    ):
        check(*argv, console=console)
    assert read_json(tmp_path / "s" / "result.json")["model"]
    check("chat", chat_dir, "--max_new_tokens", "8", console=console, stdin="Grüße 東京 🙂\n".encode())


@POSIX
def test_work_goes_on_when_nobody_reads(talks: Path, tmp_path: Path) -> None:
    """`chatwright data ... 2>&1 | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    out = tmp_path / "data"
    done = program(
        *("data", "--dialogues", talks, "--out", out), capture_output=False, stdout=writer, stderr=writer
    )
    os.close(writer)
    assert done.returncode == 0 and (out / "result.json").is_file()


@POSIX
def test_help_into_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = program("--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@POSIX
def test_without_any_console(talks: Path, tmp_path: Path) -> None:
    """`chatwright data ... <&- >&- 2>&-`, as under a service manager."""
    out = tmp_path / "data"
    words = [sys.executable, "-m", "chatwright", "data", "--dialogues", str(talks), "--out", str(out)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], timeout=300)
    assert done.returncode == 0 and (out / "result.json").is_file()
    assert "naïve" in (out / "records" / "dialogues-train.jsonl").read_text(encoding="utf-8")


def test_a_pythonw_process_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["--version"]) == 0
    assert sys.stdin.read() == ""
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


class _Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_steady_stream_drops_what_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Full())
    with streams.steady("stdout"):
        print("x", flush=True)
        assert sys.stdout.isatty() is False
    assert isinstance(sys.stdout, _Full)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with streams.steady("stdout"):
        print("x", flush=True)


def test_ascii_on_standard_input_is_read_as_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("Grüße\n".encode()), encoding="ascii")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", stdout)
    streams.prepare()
    assert sys.stdin.readline() == "Grüße\n"
    print("東京 ±", end="", flush=True)
    assert stdout.buffer.getvalue() == "?? ±".encode("cp1252")  # type: ignore[attr-defined]
