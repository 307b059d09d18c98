"""Messages -> token ids and a loss mask: the only code that knows how a conversation is written.

A template is a Jinja text, the same that transformers and vLLM read, so that what a model was trained with is
what it is served with. It is rendered as transformers does (`apply_chat_template`), with the contents in
their places, and tokenised as a whole. Each character of the result knows who wrote it (traced_text.py): the
template, or one of the messages. So there are two differences, and no others:

* A control token counts only where the template writes it. Whatever a message, a tool or a document spells
  stays text: a user who types `<|assistant|>` has typed thirteen characters, nothing more.
* The sandbox has budgets for time and size (sandbox.py).

And what transformers leaves to its user is done here: a plain text is passed as a list of one text part to a
template that only goes through lists, several text parts as one text to a template that knows no lists.
Messages with typed parts (messages.py) become tool calls and thinking as the template has them, or text in
the form of Hermes where it has none (values.py). An image is refused: no model here can read one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

from chatwright.chat import turn_ends
from chatwright.chat.abilities import TOOL, Abilities, independent_turns
from chatwright.chat.loss_mask import learnt_of
from chatwright.chat.source import EXTRA, compiled, read_named, read_template
from chatwright.chat.trusted_tokens import encoder_of
from chatwright.chat.turn_ends import TurnEnds
from chatwright.chat.values import (
    Beside,
    beside_of,
    cut_open,
    fits_template,
    opened,
    plain_message,
    traced_beside,
    traced_message,
)
from chatwright.config import UserError
from chatwright.messages import ROLES, Message, check_message
from chatwright.tokenizer import Tokenizer

__all__ = [
    "NATIVE",
    "ROLES",
    "Beside",
    "ChatTemplate",
    "EncodedChat",
    "FittedChat",
    "Message",
    "beside_of",
    "check_messages",
    "fit_context",
    "read_template",
]


@dataclass(frozen=True)
class EncodedChat:
    """`mask` is True on what the model must learn to write: assistant contents and the tokens that end
    them."""

    ids: list[int]
    mask: list[bool]
    doubt: str = ""
    """Why the mask is not certain, so that nobody should learn by it; empty where it is."""


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


class ChatTemplate:
    """How a conversation is written in tokens."""

    def __init__(
        self, source: str, end: str | None = None, *, named: Mapping[str, str] | None = None
    ) -> None:
        """`source` is the Jinja text. `end` closes an assistant's turn: a control token or a text; found by
        rendering when None. `named` are other templates, by name; `tool_use` is used where tools are
        given. Raises UserError for a name that cannot be a file's."""
        self.source, self._given_end, self.named = source, end, dict(named or {})
        for name in self.named:
            if not re.fullmatch(r"\w[\w.-]{0,99}", name):
                raise UserError(f"a chat template has the name {name!r:.80}, which cannot be that of a file")
        self._begins: dict[str, int] = {}

    def _same(self) -> tuple[Any, ...]:
        return self.source, self.end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and self._same() == other._same()

    def __hash__(self) -> int:
        return hash(self._same())

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the template's text, and of its other templates'."""
        texts = [
            f"{self.end}\n{self.source}",
            *(f"\n{name}\n{text}" for name, text in sorted(self.named.items())),
        ]
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, directory: str | Path, *, end: str | None = None) -> ChatTemplate:
        """From `chat_template.jinja` and additional_chat_templates/ in a model directory; `end` as in
        `__init__`.

        Raises UserError when missing or unusable.
        """
        source = read_template(Path(directory) / "chat_template.jinja")
        return cls(source, end, named=read_named(Path(directory)))

    @classmethod
    def from_source(cls, source: str) -> ChatTemplate:
        """A template that must have an end, found by rendering. Raises UserError when it has none."""
        template = cls(source)
        if not template.end:
            raise UserError(
                "the chat template writes no control token after an assistant's turn, nor any text"
            )
        return template

    def files(self) -> dict[str, str]:
        """The files of a model directory that hold it: name -> content."""
        others = {f"{EXTRA}/{name}.jinja": text for name, text in self.named.items()}
        return {"chat_template.jinja": self.source, **others}

    def save(self, directory: str | Path) -> None:
        """Write `chat_template.jinja`, and the other templates."""
        for name, text in self.files().items():
            file = Path(directory) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")

    # ---- ends

    @cached_property
    def _frames(self) -> turn_ends.Frames | None:
        for tools in (None, [TOOL]):  # some templates are for conversations with tools alone
            given: Beside = {"tools": tools}
            found = turn_ends.frames(partial(self._text, ask=False, beside=given))
            if found is not None:
                return found
        return None

    @cached_property
    def end(self) -> str:
        """What closes an assistant's turn: a control token, or a text; empty where the template writes
        nothing there. Without a tokenizer this is a guess."""
        return self._given_end or turn_ends.guessed(self._frames)

    def ends(self, tokenizer: Tokenizer) -> TurnEnds:
        """What ends an assistant's turn: what rendering shows, and the given `end`."""
        made: dict[Any, TurnEnds] = tokenizer.__dict__.setdefault("_turn_ends", {})
        key = (self.source, self._given_end)
        if key not in made:
            found = turn_ends.known(self._frames, tokenizer)
            given = turn_ends.of_token(self._given_end or "", tokenizer)
            made[key] = found.also(given) if self._writes(self._given_end) else given
        return made[key]

    def _writes(self, end: str | None) -> bool:
        """Whether rendering shows that the template writes a given end behind an answer."""
        return not end or (self._frames is not None and end in self._frames.middle + self._frames.last)

    def end_ids(self, tokenizer: Tokenizer, more: Iterable[int] = ()) -> frozenset[int]:
        """Ids at which an answer is finished: the ends of a turn that are tokens, the end of text, and
        `more` (those that the model's generation_config.json names). Raises UserError when a given end is
        no token."""
        ends = self.ends(tokenizer)
        if self._given_end and not ends.tokens and re.fullmatch(r"<\S+>", self._given_end):
            raise UserError(
                f"the chat template ends turns with {self._given_end}, which the tokenizer does not know"
            )
        return frozenset({*ends.ids(tokenizer), tokenizer.end_of_text_id, *more})

    def stop_texts(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Texts at which generation stops: a turn's end that is no token."""
        return self.ends(tokenizer).stops

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The one token that ends a turn, for what samples answers and looks for it. Raises UserError when
        there is none."""
        ends = self.ends(tokenizer)
        self.end_ids(tokenizer)
        if not ends.tokens:
            written = f"the text {ends.last!r}, which is no control token" if ends.last else "nothing"
            raise UserError(
                f"the chat template ends an answer with {written}: this needs a control token there; "
                "use a template whose turns end with one (sft writes <|end|> for a base model)"
            )
        return ends.ids(tokenizer)[ends.tokens.index(ends.last) if ends.last in ends.tokens else 0]

    def check_end(self, tokenizer: Tokenizer) -> None:
        """Raise UserError unless something ends a turn: a model trained without would never stop."""
        if not self.ends(tokenizer).texts:
            raise UserError(
                "the chat template writes nothing behind an assistant's answer: a model trained with it "
                "would never stop talking; use another chat template (put one with an end token into "
                "chat_template.jinja)"
            )
        self.end_ids(tokenizer)

    # ---- rendering

    @cached_property
    def abilities(self) -> Abilities:
        """What the template does with lists, tool calls, thinking and tools."""

        def render(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
            return self._rendered(enumerate(messages), False, {"tools": tools})

        return Abilities(self.source + self.named.get("tool_use", ""), render)

    def _rendered(self, messages: Iterable[tuple[int, Mapping[str, Any]]], ask: bool, beside: Beside) -> str:
        """Messages with their numbers, as they are, to a text whose characters know their origins."""
        import jinja2

        from chatwright.chat import sandbox

        tools, opening = beside.get("tools"), beside.get("continue_final_message")
        source = self.named["tool_use"] if tools is not None and "tool_use" in self.named else self.source
        tag = f"OPEN{secrets.token_hex(8)} "
        try:
            given = [traced_message(message, number) for number, message in messages]
            last = ""
            if opening:
                last = opened(given, opening if isinstance(opening, str) else "content", tag, source)
            values = {**traced_beside(beside), "messages": given, "add_generation_prompt": ask}
            text = sandbox.render(compiled(source), values)
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
        return cut_open(text, last, tag) if opening else text

    def _text(self, messages: Sequence[Mapping[str, Any]], ask: bool, beside: Beside) -> str:
        """A conversation as a text whose characters know their origins."""
        if not messages:
            raise UserError("a conversation needs at least one message")
        if ask and beside.get("continue_final_message"):
            raise UserError(
                "continue_final_message leaves no room for add_generation_prompt: set one of them"
            )
        numbered = [
            (number, one)
            for number, message in enumerate(messages)
            for one in plain_message(message, number, self.abilities)
        ]
        return self._rendered(numbered, ask, beside)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **beside: Unpack[Beside],
    ) -> str:
        """The conversation as one text, as transformers' apply_chat_template(tokenize=False) gives it.

        Raises UserError where the template refuses or fails, UnreadablePart for what no text stands for.
        """
        return str.__str__(self._text(messages, add_generation_prompt, beside))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        **beside: Unpack[Beside],
    ) -> EncodedChat:
        """Ids and loss mask of a conversation; with `add_generation_prompt`, up to where the answer begins.
        A message with `learn` False is not in the mask.

        Raises as `render`.
        """
        text = self._text(messages, add_generation_prompt, beside)
        ends = self.ends(tokenizer)
        extra = tuple(token for token in ends.tokens if token not in tokenizer.control_ids)
        found = encoder_of(tokenizer, extra).encode(text)
        own = [one["role"] == "assistant" and bool(one.get("learn", True)) for one in messages]

        def begin(number: int, low: int, high: int) -> int:
            """Where the model takes over: behind the generation prompt."""
            gap = str.__getitem__(text, slice(low, high))
            if gap not in self._begins:
                if len(self._begins) > 1_000:
                    self._begins.clear()
                self._begins[gap] = self._taken_over(gap, messages[:number], beside)
            return high - self._begins[gap]

        learnt = learnt_of(text, own, ends.texts, begin)
        return EncodedChat(found.ids, learnt.mask(found.spans), learnt.doubt)

    def _taken_over(self, gap: str, before: Sequence[Mapping[str, Any]], beside: Beside) -> int:
        """How many of the template's characters in front of a message the model writes itself."""
        try:
            prompt = self._text(before, True, beside)
        except UserError:
            return 0
        asked = turn_ends.tail(prompt)
        return len(gap) - len(asked) if gap.startswith(asked) else 0

    # ---- turns by themselves

    @cached_property
    def concatenates(self) -> bool:
        """Whether a conversation is written as its turns are, one after the other; then each is encoded only
        once.

        Templates that put something in front of the first turn (a default system message, a begin token) do
        not, nor do those that look at other messages than the one that they write.
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
                and independent_turns(self.source)
            )
        except UserError:
            return False

    def joins(self, tokenizer: Tokenizer) -> bool:
        """Whether the ids of a conversation are those of its turns, one after the other: it `concatenates`,
        and no token spans two turns."""
        if not self.concatenates:
            return False
        made: dict[str, bool] = tokenizer.__dict__.setdefault("_joining_templates", {})
        if self.source not in made:
            turns = [Message(role=role, content=f"{role} ") for role in ("user", "assistant") * 2]
            made[self.source] = self._joins(turns, tokenizer)
        return made[self.source]

    def _joins(self, turns: Sequence[Message], tokenizer: Tokenizer) -> bool:
        whole, first, second = (self.encode(one, tokenizer) for one in (turns, turns[:2], turns[2:]))
        controls = set(tokenizer.control_ids.values())
        return whole.ids == first.ids + second.ids and second.ids[0] in controls


NATIVE = ChatTemplate(
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% "
    "endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    end="<|end|>",
)
"""The template of models trained here: <|user|>Hello<|end|><|assistant|>Hi<|end|>"""


def fit_context(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    budget: int,
    **beside: Unpack[Beside],
) -> FittedChat:
    """The conversation cut to at most `budget` tokens, ready for the model's answer.

    The oldest turns go first, a user's together with the answers to it; a leading system message stays.
    Messages are given to the template as they are, but for what it has no form for. Raises UserError when
    even the system message and the last turn are too long.
    """
    checked = check_messages(messages)
    given = [
        message if fits_template(message, template.abilities) else own
        for message, own in zip(messages, checked, strict=True)
    ]
    head = 1 if checked[0]["role"] == "system" else 0
    rest = checked[head:]
    starts = [0, *(n for n, message in enumerate(rest) if n and message["role"] == "user")]
    asked = not beside.get("continue_final_message")

    def encoded(start: int) -> list[int]:
        kept = given[:head] + given[head + start :]
        return template.encode(kept, tokenizer, add_generation_prompt=asked, **beside).ids

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
    return FittedChat(checked[:head] + rest[starts[low] :], ids, starts[low])
