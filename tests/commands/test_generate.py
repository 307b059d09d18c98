"""The verb `generate`, through its main."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import chatwright.language_model
from chatwright.commands.generate import GenerateConfig, main
from chatwright.config import UsageError, UserError
from chatwright.generate.beam import beam_search
from chatwright.generate.sampling import Sampling
from support.serving import DIALOGUES, TinyModel

Generate = Callable[..., tuple[int, str]]
ASK = "<|user|>escapes<|end|><|assistant|>"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Piped:
    """Standard input as a pipe: bytes behind a text layer."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.fixture
def generate(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Generate:
    """Run the verb on the taught model: exit code and standard output."""
    monkeypatch.setattr(chatwright.language_model, "load", lambda name, dtype="auto": tiny)

    def run(*options: str, stdin: Any = None) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", stdin or Terminal())
        code = main(["tiny", *options])
        out, err = capsys.readouterr()
        assert err == ""
        return code, out

    return run


def test_options_are_those_of_sampling() -> None:
    ours = {one.name: one for one in fields(GenerateConfig)}
    for theirs in fields(Sampling):
        if theirs.name in ("top_logprobs", "presence_penalty", "frequency_penalty", "logit_bias"):
            continue  # OpenAI's, for the server; the verb has repetition_penalty
        assert theirs.name in ours
        if theirs.name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            assert ours[theirs.name].default is None  # the model's own, else theirs
        elif theirs.name != "stop":  # a list here, a tuple there; both empty
            assert ours[theirs.name].default == theirs.default


def test_greedy_is_what_the_model_gives(generate: Generate, tiny: TinyModel) -> None:
    wanted = tiny.generate("hello", max_new_tokens=12, temperature=0.0)
    assert wanted
    assert generate("--prompt", "hello", "--max_new_tokens", "12", "--temperature", "0") == (0, wanted + "\n")


def test_the_text_may_stand_behind_the_model(generate: Generate, tiny: TinyModel) -> None:
    wanted = tiny.generate("hello you", max_new_tokens=6, temperature=0.0)
    rest = ("--max_new_tokens", "6", "--temperature=0")
    assert generate("hello you", *rest) == (0, wanted + "\n")
    assert generate(*rest, "hello you") == (0, wanted + "\n")  # behind the options, too
    for both in (("hello", "--prompt", "x"), ("hello", "--prompt_file", "x")):
        with pytest.raises(UsageError, match="the text to continue is given twice"):
            generate(*both)


def test_prompt_from_file_and_standard_input(generate: Generate, tmp_path: Path, tiny: TinyModel) -> None:
    """One line end at the end belongs to the file, not to the prompt; a second one is the writer's."""
    rest = ("--max_new_tokens", "8", "--temperature", "0")
    wanted = {end: tiny.generate(f"Once ☃{end}", max_new_tokens=8, temperature=0.0) for end in ("", "\n")}
    for content, end in (("Once ☃", ""), ("Once ☃\n", ""), ("Once ☃\r\n", ""), ("Once ☃\n\n", "\n")):
        file = tmp_path / "prompt.txt"
        file.write_bytes(content.encode())
        assert generate("--prompt_file", str(file), *rest) == (0, wanted[end] + "\n")
        assert generate(*rest, stdin=Piped(content.encode())) == (0, wanted[end] + "\n")


def test_an_empty_prompt_begins_a_text(generate: Generate, tiny: TinyModel) -> None:
    wanted = tiny.generate("", max_new_tokens=5, temperature=0.0)
    assert generate("--prompt", "", "--max_new_tokens", "5", "--temperature", "0") == (0, wanted + "\n")


def test_no_prompt_at_all(generate: Generate, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to continue"):
        generate()
    with pytest.raises(UserError, match=r"standard input is not UTF-8 text \(byte 0xff at 2\)"):
        generate(stdin=Piped(b"ab\xffcd"))
    with pytest.raises(UserError, match="--prompt_file"):
        generate("--prompt_file", str(tmp_path))


def test_seeds_repeat_and_count_counts_them_up(generate: Generate) -> None:
    rest = ("--prompt", "Once", "--max_new_tokens", "10", "--temperature", "1.5")
    one = generate(*rest, "--seed", "5")[1]
    two = generate(*rest, "--seed", "6")[1]
    assert one != two and generate(*rest, "--seed", "5")[1] == one
    both = generate(*rest, "--seed", "5", "--count", "2")[1]
    assert both == f"=== 1 of 2, seed 5 ===\n{one}\n=== 2 of 2, seed 6 ===\n{two}"


@pytest.mark.parametrize(
    "options",
    [("--top_k", "1"), ("--top_p", "0.000001"), ("--min_p", "1.0"), ("--temperature", "0")],
)
def test_each_filter_reaches_the_sampler(
    generate: Generate, tiny: TinyModel, options: tuple[str, ...]
) -> None:
    """Each of these leaves only the likeliest token, whatever the seed."""
    wanted = tiny.generate("q", max_new_tokens=10, temperature=0.0)
    for seed in ("1", "2"):
        assert (
            generate("--prompt", "q", "--max_new_tokens", "10", "--seed", seed, *options)[1] == wanted + "\n"
        )


def test_penalty_and_stop_reach_the_sampler(generate: Generate, tiny: TinyModel) -> None:
    rest = ("--prompt", "q", "--max_new_tokens", "20", "--temperature", "0")
    plain = generate(*rest)[1]
    penalised = tiny.generate("q", max_new_tokens=20, temperature=0.0, repetition_penalty=3.0)
    assert generate(*rest, "--repetition_penalty", "3")[1] == penalised + "\n" != plain
    letter = plain[4]
    assert generate(*rest, "--stop", f'["{letter}"]')[1] == plain.partition(letter)[0] + "\n"


def escaping(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model's next prompt the one that it answers with control characters."""
    asked = tiny.chat_request([{"role": "user", "content": "escapes"}], max_new_tokens=60, temperature=0.0)[0]
    monkeypatch.setattr(tiny, "prompt_request", lambda prompt, **options: asked)


def test_control_characters_are_pictures_on_a_terminal_only(
    generate: Generate, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    escaping(tiny, monkeypatch)
    assert generate("--prompt", "x")[1] == DIALOGUES["escapes"] + "\n"
    assert "\x1b" in DIALOGUES["escapes"]
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    generate("--prompt", "x")
    assert "\x1b" not in shown.getvalue() and "\x07" not in shown.getvalue()
    assert "red ␛[31m[bold]not markup" in shown.getvalue()


def test_text_is_shown_as_it_comes(
    generate: Generate, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pieces on the screen lies at most one step of the engine."""
    escaping(tiny, monkeypatch)
    written: list[int] = []

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            written.append(tiny.engine.steps)
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Watched())
    generate("--prompt", "x")
    steps = sorted(set(written))
    assert len(steps) > 5 and steps == list(range(steps[0], steps[-1] + 1))


def test_beams(generate: Generate, tiny: TinyModel) -> None:
    rest = ("--prompt", "hel", "--max_new_tokens", "6", "--beams", "3")
    request = tiny.prompt_request("hel")
    found = beam_search(tiny.model, request.prompt, beams=3, max_new_tokens=6, end_ids=request.end_ids)
    texts = [tiny.tokenizer.decode(ids) for ids, _ in found]
    assert generate(*rest) == (0, texts[0] + "\n")
    out = generate(*rest, "--count", "2")[1]
    assert out == "".join(
        f"{'' if number == 0 else chr(10)}=== {number + 1} of 2, score {found[number][1]:.3f} "
        f"===\n{texts[number]}\n"
        for number in range(2)
    )


def test_length_penalty_reaches_the_search(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "chatwright.generate.beam.beam_search", lambda model, prompt, **options: seen.update(options) or []
    )
    assert generate("--prompt", "x", "--beams", "4", "--length_penalty", "0.5") == (0, "")
    assert (seen["beams"], seen["length_penalty"], seen["max_new_tokens"]) == (4, 0.5, 128)


@pytest.mark.parametrize(
    "options",
    [
        ("--beams", "2", "--temperature", "0.5"),
        ("--beams", "2", "--seed", "1"),
        ("--beams", "2", "--stop", '["x"]'),
        ("--beams", "2", "--count", "3"),
        ("--beams", "-1"),
        ("--count", "0"),
        ("--length_penalty", "2"),
        ("--temperature", "-1"),
        ("--max_new_tokens", "0"),
        ("--stop", '[""]'),
    ],
)
def test_settings_that_make_no_sense(generate: Generate, options: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        generate("--prompt", "x", *options)


def test_a_prompt_that_is_too_long(generate: Generate) -> None:
    with pytest.raises(UserError, match="shorten the prompt"):
        generate("--prompt", "x y z " * 500)


def test_ctrl_c_stops_and_says_so_by_its_exit_code(
    generate: Generate, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    step, steps = tiny.engine.step, []

    def pressed() -> bool:
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(tiny.engine, "step", pressed)
    code, out = generate("--prompt", "Once", "--max_new_tokens", "100", "--temperature", "0")
    assert code == 130 and out.endswith("\n") and len(steps) < 10
    assert tiny.engine.active == 0
