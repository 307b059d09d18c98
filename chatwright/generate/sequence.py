"""`Sequence`: a request in the engine, with its tokens, its pages, its text."""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.grammar import Matcher
from chatwright.generate.pages import Key
from chatwright.generate.request import Alternatives, Completion, FinishReason, Handle
from chatwright.generate.sampling import Sampling, make_generator
from chatwright.generate.speculation import Lookup
from chatwright.tokenizer import TextStream, Tokenizer


class Text:
    """A sequence's text: whole characters, up to the first stop text. A possible beginning of a stop text is
    held back."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], *, continues: bool = False) -> None:
        self.stream = TextStream(tokenizer, continues=continues)
        self.stops, self.vocab_size = stops, tokenizer.vocab_size
        self.held = ""
        self.reach = max(map(len, stops), default=1) - 1

    def push(self, token: int) -> tuple[str, bool]:
        """The new text after `token`, and whether a stop text has come."""
        # A model's vocabulary may be padded beyond the tokenizer's last id; such ids have no text.
        text, stopped = self._release(self.stream.push(token) if token < self.vocab_size else "", final=False)
        if self.stops and not stopped and (pending := self.stream.pending()):
            # Were this the end, the held text would be all: a stop text in it ends the answer now.
            whole = self.held + pending
            cuts = [at for at in map(whole.find, self.stops) if at >= 0]
            if cuts:
                return text + whole[: min(cuts)], True
        return text, stopped

    def flush(self) -> tuple[str, bool]:
        """The remaining text, when no more tokens come."""
        return self._release(self.stream.flush(), final=True)

    def _release(self, new: str, *, final: bool) -> tuple[str, bool]:
        text = self.held + new
        self.held = ""
        cuts = [at for at in map(text.find, self.stops) if at >= 0]
        if cuts:
            return text[: min(cuts)], True
        for size in range(0 if final else min(self.reach, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                self.held = text[-size:]
                return text[:-size], False
        return text, False


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that the sampler chose."""

    token: int
    logprob: float
    top: list[Alternatives]
    """One entry when alternatives were asked for, else none."""


@dataclass(eq=False)
class Sequence:
    """A request, from its arrival to its end. It has pages while it is running."""

    handle: Handle
    room: int
    """Tokens it may produce."""
    generator: torch.Generator | None
    text: Text | None
    lookup: Lookup | None = None
    """Guesses the next tokens, where that is allowed."""
    matcher: Matcher | None = None
    """The state of its answer in its grammar, if it has one. It follows the chosen tokens, not the pages."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and answer."""
    number: int = 0
    """How many requests came before."""
    pages: list[int] = field(default_factory=list)
    """The pages with the keys and values of `tokens`, in order; possibly with room for more."""
    stored: int = 0
    """How many of the tokens have been computed. When decoding, all but the newest."""
    reading: bool = True
    """Whether tokens before the newest still have to be computed: in prefill, and after preemption."""
    private: bool = False
    """Whether its pages may not be shared: it was begun before the model changed."""
    cached: int | None = None
    """Prompt tokens that were in the prefix cache when it was first admitted."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Alternatives] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    keys: list[Key] = field(init=False)
    """Keys for the prefix cache (pages.py): the list `tokens` itself unless the prompt has placeholders."""

    def __post_init__(self) -> None:
        self.keys = cast(list[Key], self.tokens)
        if self.handle.request.placeholders:
            self.keys = list(self.tokens)
            for position, content in self.handle.request.placeholders:
                self.keys[position] = (self.tokens[position], content)

    @classmethod
    def begin(
        cls, handle: Handle, room: int, tokenizer: Tokenizer | None, device: torch.device, guesses: int
    ) -> Sequence:
        """The sequence of a checked request. `guesses` is the most tokens to guess per step. Guessing is used
        only where it is exact: decoding is greedy, and a token depends on nothing but the model."""
        request, sampling = handle.request, handle.request.sampling
        exact = sampling.greedy and not sampling.looks_back and request.grammar is None
        return cls(
            handle,
            room,
            make_generator(sampling, device),
            # What a grammar has checked are all bytes of the answer, its first space included.
            Text(tokenizer, sampling.stop, continues=request.continues or request.grammar is not None)
            if tokenizer is not None
            else None,
            Lookup(guesses) if guesses and exact else None,
            request.grammar.start() if request.grammar is not None else None,
            list(request.prompt),
        )

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return self.handle.request.sampling

    @property
    def alive(self) -> bool:
        """Whether it is not finished."""
        return not self.handle.finished

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.stored

    def add(self, choice: Choice) -> None:
        """Add a token, pass its text to the handle, and finish the answer if it ends here. Does nothing after
        a failure."""
        if self.handle.failed:
            return
        if not math.isfinite(choice.logprob):
            self.handle._fail(UserError("the model's logits are not finite (did its training diverge?)"))
            return
        self.tokens.append(choice.token)
        if self.keys is not self.tokens:
            self.keys.append(choice.token)
        self.ids.append(choice.token)
        self.logprobs.append(choice.logprob)
        self.top += choice.top
        text, stopped = "", False
        ended = choice.token in self.handle.request.end_ids
        complete = False
        if self.matcher is not None and not ended:
            self.matcher.accept(choice.token)
            complete = self.matcher.finished
        if self.text is not None and not ended:
            text, stopped = self.text.push(choice.token)
        if ended or stopped or complete or len(self.ids) >= self.room:
            self.finish("stop" if ended or stopped or complete else "length", choice, text, stopped)
        else:
            self.said.append(text)
            self.handle._put(text, [choice.token], [choice.logprob], choice.top)

    def finish(
        self, reason: FinishReason, choice: Choice | None = None, text: str = "", stopped: bool = False
    ) -> None:
        """Pass the completion to the handle. `choice` and `text` are new; `stopped` says that a stop text
        ended `text`."""
        if self.text is not None and not stopped:
            rest, stopped = self.text.flush()
            text += rest
            reason = "stop" if stopped else reason
        self.said.append(text)
        completion = Completion(
            self.ids,
            "".join(self.said),
            reason,
            self.logprobs,
            len(self.handle.request.prompt),
            self.top,
            self.cached or 0,
        )
        new = ([choice.token], [choice.logprob], choice.top) if choice else ([], [], [])
        self.handle._put(text, *new, completion)


def tokens_with_text(tokenizer: Tokenizer | None, vocab_size: int) -> Bool[Tensor, " V"] | None:
    """Mask of the ids that the tokenizer has a token for; None when all of a model's ids are. Published
    models often have more rows than tokens, and holes between them: such ids are never to be drawn."""
    if tokenizer is None:
        return None
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[list(tokenizer.backend.get_vocab(with_added_tokens=True).values())] = True
    return None if bool(known.all()) else known


def allowed_tokens(sequences: abc.Sequence[Sequence], vocab_size: int) -> Bool[Tensor, "B V"] | None:
    """Mask of the tokens that the sequences' grammars allow; None when no sequence has one. A sequence whose
    grammar is at a dead end fails."""
    if all(sequence.matcher is None for sequence in sequences):
        return None
    masks = np.ones((len(sequences), vocab_size), dtype=np.bool_)
    for sequence, mask in zip(sequences, masks, strict=True):
        if sequence.matcher is not None:
            try:
                sequence.matcher.allow(mask)
            except Exception as error:  # this sequence fails; the others go on
                sequence.handle._fail(error)
                mask[:] = True
    return torch.from_numpy(masks)
