"""Input and output of an engine: Request, Handle, Piece, Completion."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from chatwright.config import UserError
from chatwright.generate.grammar import Grammar
from chatwright.generate.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]
Alternatives = list[tuple[int, float]]
"""The likeliest tokens at one position and their log-probabilities, best first."""
OnChange = Callable[[int, bool], None]
"""Callback of a `Handle`."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen and when to stop."""
    end_ids: frozenset[int] = frozenset()
    """Ids that end the answer. They are part of its ids but not of its text."""
    id: str = ""
    """A name for the caller's use."""
    grammar: Grammar | None = None
    """The form that the answer must have (grammar.py). Once it is complete and nothing may follow, the answer
    ends without an end id."""
    continues: bool = False
    """Whether the answer goes on in the middle of a text. SentencePiece's tokens that begin a word have a
    space in front, which counts there, and not at the beginning of a text such as an answer in a chat.
    """
    placeholders: tuple[tuple[int, str], ...] = ()
    """(position in the prompt, hash) of each placeholder token, such as those of an image. Requests whose
    hashes differ at a position share no cached keys and values from there on. The hash must cover all that
    the embeddings at these positions are computed from."""

    def stopping(self, texts: Iterable[str]) -> Request:
        """The same, which stops at these texts too."""
        new = tuple(text for text in texts if text not in self.sampling.stop)
        if not new:
            return self
        return replace(self, sampling=replace(self.sampling, stop=(*self.sampling.stop, *new)))


@dataclass(frozen=True)
class Piece:
    """The new part of an answer since the piece before."""

    text: str
    """Whole characters, possibly none. The texts of all pieces together are the completion's text."""
    ids: list[int]
    finish_reason: FinishReason | None
    """None until the last piece."""
    logprobs: list[float] = field(default_factory=list)
    """Per id, as in `Completion`."""
    top_logprobs: list[Alternatives] = field(default_factory=list)
    """Per id, as in `Completion`."""


@dataclass
class Completion:
    """A finished answer."""

    ids: list[int]
    """All new tokens, including the end token and those of a stop text."""
    text: str
    """Without end token and stop text; empty when the engine has no tokenizer."""
    finish_reason: FinishReason
    """`stop`: end id, stop text or the grammar's end; `length`: max_new_tokens or the context's end;
    `cancelled`."""
    logprobs: list[float]
    """Per new token, in nats: log_softmax(logits / temperature), before penalty and filters (see
    sampling.py)."""
    prompt_tokens: int
    top_logprobs: list[Alternatives] = field(default_factory=list)
    """The likeliest tokens per new token, on the scale of `logprobs`, if asked for (`Sampling.top_logprobs`).
    """
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens that were in the prefix cache, and not computed."""


class Handle:
    """A submitted request. Safe to use from any thread.

    on_change: called whenever there is something new, before it can be read, with the number of new tokens
        and whether this is the end (a failure is one). It runs in the engine's thread during a step: it must
        be quick, must not raise and must not wait for anything.
    """

    def __init__(
        self,
        request: Request,
        drive: Callable[[], bool] | None,
        on_change: OnChange | None = None,
    ) -> None:
        self.request = request
        self._drive = drive  # makes the engine go on when no background thread does
        self._on_change = on_change
        self._changed = threading.Condition()
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[Alternatives] = []
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._last_taken = False
        self.cancelled = False

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, cancelled or failed."""
        return self._completion is not None or self._error is not None

    @property
    def failed(self) -> bool:
        """Whether the computation went wrong; `result` raises."""
        return self._error is not None

    def cancel(self) -> None:
        """Stop at the next step; the completion keeps what there is. Does nothing to a finished request."""
        self.cancelled = True

    def pieces(self) -> Iterator[Piece]:
        """The answer as it grows, each part once; the last piece has a finish_reason. A slow reader gets
        everything new as one piece, so that nothing piles up. Raises what `result` raises.

        A reader that stops early should call `cancel()`, or the answer is computed to its end.
        """
        while not self._last_taken:
            self._wait(lambda: self.finished or bool(self._ids))
            if (piece := self.take()) is not None:
                yield piece

    def take(self) -> Piece | None:
        """The new part, without waiting; None when there is none, or after the end. Raises what `result`
        raises."""
        with self._changed:
            self._raise_failure()
            if self._last_taken or not (self._ids or self._completion):
                return None
            reason = self._completion.finish_reason if self._completion else None
            piece = Piece(self._text, self._ids, reason, self._logprobs, self._top)
            self._text, self._ids, self._logprobs, self._top = "", [], [], []
            self._last_taken = self._completion is not None
            return piece

    @property
    def completion(self) -> Completion | None:
        """The result, without waiting: None before the end, and when the computation failed."""
        return self._completion

    def result(self) -> Completion:
        """Wait for the end. Raises UserError or RuntimeError when the computation failed."""
        self._wait(lambda: self.finished)
        assert self._completion is not None
        return self._completion

    def _wait(self, ready: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                if self._drive is None:
                    self._changed.wait_for(ready)
                self._raise_failure()
                if ready():
                    return
            # Without the lock: a step may take long, and needs the locks of handles.
            if self._drive is not None and not self._drive() and not ready() and self._error is None:
                raise RuntimeError("generation was interrupted: the engine has lost this request")

    def _raise_failure(self) -> None:
        if self._error is not None:
            kind = UserError if isinstance(self._error, UserError) else RuntimeError
            raise kind(
                f"generation failed: {str(self._error) or type(self._error).__name__}"
            ) from self._error

    def _tell(self, tokens: int) -> None:
        """Call `on_change`, then wake the waiting readers. The lock is held, so that no one reads before."""
        if self._on_change is not None:
            self._on_change(tokens, self.finished)
        self._changed.notify_all()

    def _put(
        self,
        text: str,
        ids: list[int],
        logprobs: list[float],
        top: list[Alternatives],
        completion: Completion | None = None,
    ) -> None:
        with self._changed:
            self._text += text
            self._ids += ids
            self._logprobs += logprobs
            self._top += top
            self._completion = completion
            self._tell(len(ids))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._tell(0)
