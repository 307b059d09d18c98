"""Talk to a model in the terminal.

A model's text is data: it is printed as it is and never read as markup. Its control characters are replaced
by Unicode's pictures of them (from U+2400), so that an answer cannot move the cursor, change the terminal's
title or fake a prompt.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from chatwright.config import UserError, harmless, near_match, parse
from chatwright.model_names import unfinished, weights_note
from chatwright.streams import meant

if TYPE_CHECKING:
    from chatwright.chat import Message
    from chatwright.language_model import LanguageModel

HELP = """\
/help             this list
/reset            forget the conversation (the system prompt stays)
/system TEXT      set the system prompt; "/system -" removes it, "/system" shows it
/temperature X    0 always takes the likeliest token; higher is more varied
/save FILE        write the conversation as one line of JSON in OpenAI's messages format
/quit             leave (or Ctrl-D)
Ctrl-C stops an answer. A message that begins with "/" needs a space before it."""


SAMPLED = ("temperature", "top_p", "top_k", "repetition_penalty")
"""Options that the model's own settings stand in for."""


@dataclass(frozen=True)
class ChatConfig:
    """How the model answers."""

    temperature: float | None = None
    """0 always takes the likeliest token; 1 samples from the model as it is. Not given: the model's own
    (generation_config.json; SmolLM2: 0.2), else 0.7."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability. Not given: the model's own
    (SmolLM2: 0.9), else 1, which keeps all."""
    top_k: int | None = None
    """Sample from this many likeliest tokens; 0 keeps all. Not given: the model's own, else 0."""
    repetition_penalty: float | None = None
    """Above 1, tokens of the conversation become less likely. Not given: the model's own, else 1."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    system: str = ""
    """System prompt."""
    seed: int | None = None
    """Makes the answers repeatable: turn k uses seed + k."""
    dtype: str = "auto"
    """Weights while generating: fp32, bf16, int8 or int4 (compiled CPU kernels); auto takes bf16 for models
    above 20 M."""


def main(argv: Sequence[str]) -> int:
    """Chat until /quit or the end of input. Raises UserError when the model cannot be loaded."""
    config, positionals = parse(
        ChatConfig,
        argv,
        prog="chatwright chat",
        description="Chat with MODEL in the terminal; text piped in is answered line by line.",
        positionals={"model": "A run, a model directory, smollm2, hf:owner/name or a .gguf file."},
    )
    from chatwright.language_model import load

    model = load(str(positionals["model"]), dtype=config.dtype)
    tell_about(model)
    chat = TerminalChat(model, config, out=sys.stdout)
    return chat.talk() if sys.stdin.isatty() else chat.answer_lines(sys.stdin)


def tell_about(model: LanguageModel) -> None:
    """A line on standard error when a model comes from a run or a stage that is not finished, or has rounded
    weights."""
    for told in (unfinished(model.name, model.source), weights_note(model.name)):
        if told:
            print(harmless(told), file=sys.stderr, flush=True)


class TerminalChat:
    """A conversation: messages, settings, and the commands that change them."""

    def __init__(self, model: LanguageModel, config: ChatConfig, *, out: TextIO) -> None:
        """Raises UserError on settings that the engine refuses and on models without a chat template."""
        from rich.console import Console

        from chatwright.generate.sampling import Sampling
        from chatwright.generation_config import chat_options, told

        model.require_template()  # refuses a base model now, not at the first message
        self.model = model
        self.system = meant(config.system)
        self.seed = config.seed
        given = {name: getattr(config, name) for name in SAMPLED if getattr(config, name) is not None}
        self.sampling = Sampling(
            max_new_tokens=config.max_new_tokens, **chat_options(model.generation, given)
        )
        self._sampled = told(model.generation, given)
        self.messages: list[Message] = []
        self._turns = 0
        self._saved: set[Path] = set()
        self._console = Console(file=out, highlight=False)
        self._notes = Console(stderr=True, highlight=False)

    def talk(self) -> int:
        """The interactive chat: reads lines with history until /quit or the end of input. Returns the exit
        code."""
        with suppress(ImportError):  # not on Windows, whose console has its own line editing
            import readline  # noqa: F401  (gives input() editing and history)
        self._say(f"Chat with {harmless(self.model.name)}. /help lists the commands.")
        self._say(f"Sampling: {harmless(self._sampled)}.")
        while True:
            try:
                if not self._handle(input("\nyou> "), label="model> "):
                    return 0
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit leaves.")
            except EOFError:
                self._console.print()
                return 0

    def answer_lines(self, lines: TextIO) -> int:
        """One turn per line; only the answers go to standard output. Returns 1 when a line could not be
        answered."""
        failed = False
        for line in lines:
            errors = self._errors
            if not self._handle(line.rstrip("\r\n"), label=""):
                break
            failed = failed or self._errors > errors
        return int(failed)

    _errors = 0

    def _handle(self, line: str, *, label: str) -> bool:
        """Carry out a command or a turn. Returns False to leave the chat."""
        try:
            if line.startswith("/"):
                return self._command(line)
            if line.strip():
                self._turn(line.strip(), label=label)
        except UserError as error:
            self._errors += 1
            self._say(str(error), style="red")
        return True

    def _say(self, text: str, *, style: str = "dim") -> None:
        """Print a line of the program itself to standard error, apart from the model's text."""
        from rich.text import Text

        self._notes.print(Text(text, style=style), soft_wrap=True)

    def _turn(self, text: str, *, label: str) -> None:
        """Ask, and print the answer while it is generated. The conversation stays as it was if the model
        refuses the question."""
        from chatwright.chat import Message
        from chatwright.serve.service import prepare

        head = [Message(role="system", content=self.system)] if self.system else []
        asked = [*self.messages, Message(role="user", content=text)]
        seed = None if self.seed is None else self.seed + self._turns
        prepared = prepare(self.model, head + asked, replace(self.sampling, seed=seed))
        self._turns += 1
        if prepared.dropped:
            self._say(f"({prepared.dropped} of the oldest messages no longer fit and are left out)")
        self._console.out(label, end="", style="bold cyan", highlight=False)
        answer = ""
        handle = self.model.engine.submit(prepared.requests[0])
        with stopping() as stopped:
            try:
                for piece in handle.pieces():
                    answer += piece.text
                    self._console.out(harmless(piece.text), end="", highlight=False)
                    self._console.file.flush()
                    if stopped():
                        handle.cancel()
            finally:  # also when a second Ctrl-C raises KeyboardInterrupt
                handle.cancel()
        self._console.out("", highlight=False)
        if stopped():
            self._say("(stopped)")
        self.messages = [*asked, Message(role="assistant", content=answer)]

    def _command(self, line: str) -> bool:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP, style=""),
            "/reset": self._reset,
            "/system": self._set_system,
            "/temperature": self._set_temperature,
            "/save": self._save,
        }
        if name in ("/quit", "/exit"):
            return False
        if name not in commands:
            raise UserError(
                f"unknown command {name}{near_match(name, [*commands, '/quit'])}; /help explains them"
            )
        commands[name](argument)
        return True

    def _reset(self, _: str) -> None:
        self.messages = []
        self._say("A new conversation.")

    def _set_system(self, text: str) -> None:
        if text:
            self.system = "" if text == "-" else text
        self._say(f"System prompt: {self.system}" if self.system else "No system prompt.")

    def _set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            raise UserError(
                f"/temperature needs a number, such as 0.7; it is {self.sampling.temperature:g}"
            ) from None
        self.sampling = replace(self.sampling, temperature=value)
        self._say(f"Temperature {value:g}.")

    def _save(self, argument: str) -> None:
        try:
            (name,) = shlex.split(argument) if '"' in argument or "'" in argument else [argument]
        except ValueError:
            raise UserError(f"/save {argument}: put the file's name in one pair of quotes") from None
        if not name:
            raise UserError("/save needs a file name, such as chat.jsonl")
        if not self.messages:
            raise UserError("there is nothing to save yet")
        file = Path(name).expanduser()
        if file.exists() and file.resolve() not in self._saved:
            raise UserError(f"{file} exists; choose another name")
        head = [{"role": "system", "content": self.system}] if self.system else []
        write_aside(file, json.dumps({"messages": [*head, *self.messages]}, ensure_ascii=False) + "\n")
        self._saved.add(file.resolve())
        self._say(f"Saved {len(self.messages)} messages to {file}.")


def write_aside(file: Path, text: str) -> None:
    """Write `file` whole or not at all. Raises UserError when that fails."""
    aside = None
    try:
        descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
        os.replace(aside, file)
    except OSError as error:
        if aside is not None and os.path.exists(aside):
            os.unlink(aside)
        raise UserError(f"cannot write {file}: {error.strerror}") from None


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """A context in which the first Ctrl-C does not interrupt a step of the engine. Instead, the function that
    the context yields returns True from then on. A second Ctrl-C interrupts as usual.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> Any:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
