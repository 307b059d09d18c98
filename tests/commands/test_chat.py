"""Terminal chat through its main, with scripted input."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import chatwright.language_model
from chatwright.commands.chat import ChatConfig, main
from chatwright.config import UsageError, UserError, harmless
from chatwright.generation_config import GenerationConfig
from support.serving import DIALOGUES, TinyModel

Chat = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Chat]:
    """Run the verb: lines typed (or piped) -> exit code, standard output, standard error."""
    monkeypatch.setattr(chatwright.language_model, "load", lambda name, dtype="auto": tiny)

    def run(*lines: Any, piped: bool = False, options: tuple[str, ...] = ("--temperature=0",)) -> Any:
        if piped:
            monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        else:
            typed = iter(lines)

            def read(prompt: str = "") -> str:
                line = next(typed, EOFError())
                if isinstance(line, BaseException):
                    raise line
                return str(line)

            monkeypatch.setattr("sys.stdin", Terminal())
            monkeypatch.setattr("builtins.input", read)
        code = main(["tiny", *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_piped_lines_are_turns(chat: Chat) -> None:
    code, out, err = chat("hello", "", "/reset", "name?", piped=True)
    assert (code, out) == (0, f"{DIALOGUES['hello']}\n{DIALOGUES['name?']}\n")
    assert "you>" not in out + err


def test_interactive_chat_ends_with_quit_or_end_of_input(chat: Chat) -> None:
    code, out, err = chat("hello", "/quit", "never asked")
    assert code == 0
    assert f"model> {DIALOGUES['hello']}\n" in out
    assert "/help" in err
    assert chat("hello")[0] == 0


def test_history_is_sent_along(chat: Chat, monkeypatch: pytest.MonkeyPatch, tiny: TinyModel) -> None:
    seen = []
    encode = tiny.encode_chat
    monkeypatch.setattr(tiny, "encode_chat", lambda m, **k: seen.append(list(m)) or encode(m, **k))
    chat("hello", "/system Be kind.", "name?", "/system -", "/reset", "hello")
    hello = {"role": "user", "content": "hello"}
    answer = {"role": "assistant", "content": DIALOGUES["hello"]}
    kind = {"role": "system", "content": "Be kind."}
    assert seen == [[hello], [kind, hello, answer, {"role": "user", "content": "name?"}], [hello]]


def test_save_writes_messages_once_and_never_over_a_file(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "my chat.jsonl"
    other = tmp_path / "other.jsonl"
    other.write_text("precious")
    _, _, err = chat(
        "/save",
        f"/save {file}",
        "/system Be ☃.",
        "snowman",
        f"/save {file}",
        f"/save '{file}'",
        f"/save {other}",
        f"/save {tmp_path}/no/where.jsonl",
        options=("--temperature=0", "--max_new_tokens=40"),
    )
    (line,) = file.read_text(encoding="utf-8").splitlines()
    messages = json.loads(line)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "Be ☃."
    assert other.read_text() == "precious"
    for hint in ("needs a file name", "nothing to save", "other.jsonl exists", "cannot write"):
        assert hint in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my chat.jsonl", "other.jsonl"]


def test_commands_explain_themselves(chat: Chat) -> None:
    _, out, err = chat(
        "/help", "/rest", "/temperature hot", "/temperature -1", "/temperature 1.5", "/system", " /x"
    )
    assert "/system TEXT" in err
    assert "did you mean '/reset'" in err
    assert "needs a number" in err
    assert "temperature is -1.0" in err
    assert "Temperature 1.5." in err
    assert "No system prompt." in err
    assert out.count("model> ") == 1  # " /x" is a message


def test_answers_are_data(chat: Chat) -> None:
    _, out, _ = chat("escapes", piped=True)
    assert out == "red ␛[31m[bold]not markup[/bold]␇ end\n"


def test_harmless() -> None:
    assert harmless("a\tb\nc\r\nd") == "a\tb\nc\nd"
    assert harmless("\x00\x1b]0;title\x07\x7f") == "␀␛]0;title␇␡"
    assert harmless("\x9b31m\u202eabc") == "\ufffd31m\ufffdabc"
    assert harmless("Grüße, 世界 ☃ مرحبا") == "Grüße, 世界 ☃ مرحبا"


def test_dropped_turns_are_told(chat: Chat) -> None:
    long = "many words " * 12
    _, _, err = chat(long, long, long, "hello", options=("--temperature=0", "--max_new_tokens=8"))
    assert "of the oldest messages no longer fit" in err


def test_a_message_that_is_too_long_is_forgotten(chat: Chat) -> None:
    code, out, err = chat("long " * 400, "hello")
    assert "too long" in err
    assert DIALOGUES["hello"] in out
    assert code == 0
    assert chat("long " * 400, "hello", piped=True)[0] == 1


def test_ctrl_c_stops_the_answer_not_the_program(
    chat: Chat, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tiny.engine.step

    def interrupted() -> bool:
        if tiny.engine.steps == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(tiny.engine, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = chat(KeyboardInterrupt(), "story", "/reset", "hello")
    first = out.split("model> ")[1].rstrip("\n")
    assert DIALOGUES["story"].startswith(first)
    assert len(first) < len(DIALOGUES["story"])
    assert DIALOGUES["hello"].startswith(out.split("model> ")[2].strip())
    assert "(stopped)" in err
    assert "/quit leaves" in err
    assert code == 0
    assert tiny.engine.active == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_seed_makes_answers_repeatable(chat: Chat) -> None:
    options = ("--temperature=2", "--seed=5", "--max_new_tokens=20")
    first = chat("zzz", "qqq", piped=True, options=options)
    assert chat("zzz", "qqq", piped=True, options=options) == first
    assert (
        chat("zzz", "qqq", piped=True, options=("--temperature=2", "--seed=6", "--max_new_tokens=20"))
        != first
    )


def test_wrong_settings(chat: Chat, tiny: TinyModel) -> None:
    with pytest.raises(UserError, match="temperature"):
        chat(options=("--temperature=-1",))
    with pytest.raises(UsageError):
        chat(options=("--temprature=1",))
    tiny.template = None
    with pytest.raises(UserError, match="base model"):
        chat()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--temperature", "--max_new_tokens", "--system", "--seed", "model"):
        assert option in text
    assert ChatConfig.__doc__


def test_the_first_lines_say_how_answers_are_sampled(chat: Chat, tiny: TinyModel) -> None:
    told = chat("/quit", options=())[2]
    assert "Sampling: temperature 0.7 (the default, for the model recommends none)." in told
    assert "4-bit" not in told
    tiny.generation = GenerationConfig(temperature=0.2, top_p=0.9, source="the example of its makers")
    tiny.name = "smollm2"
    told = chat("/quit", options=())[2]
    assert "Sampling: temperature 0.2, top-p 0.9 (from the example of its makers)." in told
    assert "smollm2 comes in a package with 4-bit weights" in told
    assert "hf:HuggingFaceTB/SmolLM2-135M-Instruct" in told
    told = chat("/quit", options=("--temperature=1", "--top_k=3"))[2]
    assert "Sampling: temperature 1, top-k 3, top-p 0.9 (as given; from the example of its makers)." in told
    assert told.count("4-bit") == 1
    assert "Sampling:" not in "".join(chat("hello", piped=True)[1:])  # not in a pipe
