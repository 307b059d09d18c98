"""Messages -> token ids and a loss mask: the only code that knows how a conversation is written.

A template is a Jinja text, the same that transformers and vLLM read, so that what a model was trained with is
what it is served with. It is rendered once with a unique mark in place of every content; the text between the
marks is the template's own and its control tokens count, while contents are encoded as plain text. Hence a
user who types `<|assistant|>` has typed thirteen characters, nothing more.

How a template gets a content that is a list of parts (messages.py):
* A list of texts is passed as a list to a template that iterates over lists, as transformers does, and as
  one joined text to any other template.
* Tool calls, tool results and thinking are always passed as one text (`messages.written`), even where the
  template has a form of its own for them.
* A plain text is passed as a list of one text part to a template that only iterates over lists.
* An image is refused: no model here can read one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from chatwright.config import UserError
from chatwright.messages import ROLES, Content, Message, check_message, is_text, text_part, written
from chatwright.tokenizer import Tokenizer

__all__ = [
    "NATIVE",
    "ROLES",
    "ChatTemplate",
    "EncodedChat",
    "FittedChat",
    "Message",
    "check_messages",
    "fit_context",
    "read_template",
]


@dataclass(frozen=True)
class EncodedChat:
    """`mask` is True on what the model must learn to write: assistant contents and the token that ends
    them."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class FittedChat:
    """What is left of a conversation that had to fit; `dropped` counts the messages that went."""

    messages: list[Message]
    ids: list[int]
    dropped: int


def check_messages(messages: Sequence[Any]) -> list[Message]:
    """The messages, if they are well-formed. Raises UserError naming the first that is not."""
    if not messages:
        raise UserError("a conversation needs at least one message")
    checked = []
    for number, message in enumerate(messages):
        try:
            checked.append(check_message(message))
        except ValueError as error:
            raise UserError(f"message {number}: {error}") from None
    return checked


LARGEST_TEMPLATE = 1 << 18
"""Most characters of a chat template; published ones have up to 20,000."""
_MARK = secrets.token_hex(8)  # stands for contents while a template is rendered; no template can know it
_MARKED = re.compile(f"{_MARK}x([0-9]+)x{_MARK}")


@lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    """The template in Jinja's sandbox: it comes with the model, from whoever made the model."""
    import jinja2

    from chatwright.sandbox import Sandbox

    def raise_exception(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    if len(source) > LARGEST_TEMPLATE:
        raise UserError(f"the chat template is longer than {LARGEST_TEMPLATE:,} characters")
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # Python has opinions on the code that Jinja makes of it
            return Sandbox(raise_exception=raise_exception).from_string(source)
    except (
        jinja2.TemplateError,
        SyntaxError,
        ValueError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        reason = str(error) or type(error).__name__  # Jinja writes Python, and Python has limits of its own
        raise UserError(f"the chat template is broken: {reason}") from None


def read_template(file: Path) -> str:
    """The text of a chat template. Raises UserError when it is missing, no text, or too long to be one."""
    try:
        if file.stat().st_size > 4 * LARGEST_TEMPLATE:
            raise UserError(f"{file} is longer than {LARGEST_TEMPLATE:,} characters")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: this model has no chat template (is it a base model?)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from None


class ChatTemplate:
    """How a conversation is written in tokens."""

    def __init__(self, source: str, end: str) -> None:
        """`source` is the Jinja text; `end` the control token that closes an assistant's turn."""
        self.source, self.end = source, end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and (self.source, self.end) == (other.source, other.end)

    def __hash__(self) -> int:
        return hash((self.source, self.end))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the template's text."""
        return hashlib.sha256(f"{self.end}\n{self.source}".encode()).hexdigest()[:16]

    @classmethod
    def load(cls, directory: str | Path, *, end: str | None = None) -> ChatTemplate:
        """From `chat_template.jinja` in a model directory; `end` as in `__init__`, found by rendering when
        None.

        Raises UserError when missing or unusable.
        """
        source = read_template(Path(directory) / "chat_template.jinja")
        return cls(source, end) if end is not None else cls.from_source(source)

    @classmethod
    def from_source(cls, source: str) -> ChatTemplate:
        """A template whose end token is found by rendering: the first control-like word behind an answer."""
        probe = secrets.token_hex(8)
        text = cls(source, "").render(
            [Message(role="user", content="u"), Message(role="assistant", content=probe)]
        )
        found = re.search(r"<[^<>\s]+>", text.partition(probe)[2])
        if not found:
            raise UserError("the chat template writes no control token after an assistant's turn")
        return cls(source, found.group())

    @cached_property
    def concatenates(self) -> bool:
        """Whether a conversation is written as its turns are, one after the other; then each is encoded only
        once.

        Templates that put something in front of the first turn (a default system message, a begin token) do
        not.
        """
        turns = [
            Message(role=role, content=f"{role} {n}") for n, role in enumerate(("user", "assistant") * 2)
        ]
        system = [Message(role="system", content="s")]
        try:
            parts = [self.render(turns[:2]), self.render(turns[2:])]
            asked = self.render(turns[2:3], add_generation_prompt=True)
            return (
                self.render(turns) == parts[0] + parts[1]
                and self.render(system + turns) == self.render(system) + parts[0] + parts[1]
                and self.render(turns[:3], add_generation_prompt=True) == parts[0] + asked
            )
        except UserError:
            return False

    def save(self, directory: str | Path) -> None:
        """Write `chat_template.jinja`."""
        (Path(directory) / "chat_template.jinja").write_text(self.source, encoding="utf-8")

    @cached_property
    def _takes(self) -> tuple[bool, bool]:
        """Whether the template writes a content that is a text, and one that is a list of text parts.

        Found by rendering both. Templates that never name a part's `text` are not tried.
        """
        if "text" not in self.source:
            return True, False
        probe = secrets.token_hex(8)
        as_it_stands = re.compile(
            f"""['"]text['"]: ['"]{probe}"""
        )  # a list that was printed, not gone through

        def writes(content: Content) -> bool:
            try:
                text = self._render([Message(role="user", content=content)], False)
            except UserError:
                return False
            return probe in text and not as_it_stands.search(text)

        return writes(probe), writes([text_part(probe)])

    def _given(self, content: Content, write: Callable[[str], str]) -> Content:
        """A content as the template gets it, each of its texts through `write`. Raises UnreadablePart."""
        texts, parts = self._takes
        if not parts or not is_text(content):
            content = written(content)
        if isinstance(content, str):
            return write(content) if texts or not parts else [text_part(write(content))]
        return [text_part(write(part["text"])) for part in content if part["type"] == "text"]

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        import jinja2

        from chatwright import sandbox

        values = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": "",
            "eos_token": "",
        }
        try:
            return sandbox.render(_compiled(self.source), values)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            MemoryError,
            RecursionError,
            NotImplementedError,
        ) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"the chat template fails on this conversation: {reason}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as one text, as transformers' apply_chat_template(tokenize=False) gives it.

        Raises UserError where the template refuses or fails, UnreadablePart for what no text stands for.
        """
        given = [
            Message(role=one["role"], content=self._given(one["content"], lambda text: text))
            for one in messages
        ]
        return self._render(given, add_generation_prompt)

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
    ) -> EncodedChat:
        """Ids and loss mask of a conversation; with `add_generation_prompt`, up to where the answer begins.
        A message with `learn` False is not in the mask.

        Raises as `render`.
        """
        texts: list[tuple[int, str]] = []  # the message's number, and a text of its content

        def mark(text: str) -> str:
            texts.append((len(marked), text))
            return f"{_MARK}x{len(texts) - 1}x{_MARK}"

        marked: list[Message] = []
        for message in messages:
            marked.append(Message(role=message["role"], content=self._given(message["content"], mark)))
        text = self._render(marked, add_generation_prompt)
        ids: list[int] = []
        mask: list[bool] = []
        ending = False  # the last content was the assistant's: its end token belongs to the loss
        for owner, piece in _stretches(_MARKED.split(text), texts):
            if owner is not None:
                new = tokenizer.encode(piece)
                ending = messages[owner]["role"] == "assistant" and messages[owner].get("learn", True)
                ids += new
                mask += [ending] * len(new)
                continue
            for token in self._literal(piece, tokenizer):
                ids.append(token)
                mask.append(ending)
                if token == tokenizer.control_ids.get(self.end):
                    ending = False
            ending = False
        return EncodedChat(ids, mask)

    def _literal(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Ids of the template's own text, in which control tokens count."""
        return list(_literal_ids(text, tokenizer))

    def end_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids at which an answer is finished: the turn's end and the end of text. Raises UserError when
        unknown."""
        if self.end not in tokenizer.control_ids:
            raise UserError(
                f"the chat template ends turns with {self.end}, which the tokenizer does not know"
            )
        return frozenset({tokenizer.control_ids[self.end], tokenizer.end_of_text_id})


def _stretches(pieces: Sequence[str], texts: Sequence[tuple[int, str]]) -> Iterator[tuple[int | None, str]]:
    """Yield a rendered text that was split at its marks, as (message, its text) and (None, the template's
    text).

    Parts of one message with nothing between them are one stretch, because a tokenizer would join them too.
    """
    owner, held, last = None, "", -1
    for number, piece in enumerate(pieces):
        if number % 2:
            mark = int(piece)
            of, text = texts[mark]
            if owner is not None and (owner, last + 1) != (of, mark):
                yield owner, held
                held = ""
            owner, held, last = of, held + text, mark
        elif piece:
            if owner is not None:
                yield owner, held
            yield None, piece
            owner, held = None, ""
    if owner is not None:
        yield owner, held


def _literal_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    cache: dict[str, tuple[int, ...]] = tokenizer.__dict__.setdefault("_literal_cache", {})
    if text not in cache:
        controls = "|".join(
            re.escape(control) for control in sorted(tokenizer.controls, key=len, reverse=True)
        )
        ids: list[int] = []
        for piece in re.split(f"({controls})", text):
            if piece in tokenizer.control_ids:
                ids.append(tokenizer.control_ids[piece])
            elif piece:
                ids += tokenizer.encode(piece)
        if len(cache) > 1_000:  # templates have few literals; a hostile one must not fill the memory
            cache.clear()
        cache[text] = tuple(ids)
    return cache[text]


NATIVE = ChatTemplate(
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% "
    "endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    end="<|end|>",
)
"""The template of models trained here: <|user|>Hello<|end|><|assistant|>Hi<|end|>"""


def fit_context(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, budget: int
) -> FittedChat:
    """The conversation cut to at most `budget` tokens, ready for the model's answer.

    The oldest turns go first, a user's together with the answers to it; a leading system message stays.
    Raises UserError when even the system message and the last turn are too long.
    """
    checked = check_messages(messages)
    system = checked[:1] if checked[0]["role"] == "system" else []
    rest = checked[len(system) :]
    starts = [0, *(n for n, message in enumerate(rest) if n and message["role"] == "user")]

    def encoded(start: int) -> list[int]:
        return template.encode(system + rest[start:], tokenizer, add_generation_prompt=True).ids

    # The longest ending that fits, by bisection: shorter endings have fewer tokens.
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(encoded(starts[middle])) <= budget else (middle + 1, high)
    ids = encoded(starts[low])
    if len(ids) > budget:
        raise UserError(
            f"the message is too long: {len(ids)} tokens with its frame, room for {budget}; shorten it, or "
            "ask for fewer new tokens"
        )
    return FittedChat(system + rest[starts[low] :], ids, starts[low])
