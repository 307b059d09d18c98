"""One answer on its way from the engine's thread to the event loop: an asynchronous iterator of pieces.

No thread blocks for it. The engine's handle reports that something is new (`Handle.on_change`), the event
loop wakes, and the reader takes what there is. A slow reader gets one larger piece, so unread text never
exceeds the answer itself. This file measures, for every interface alike, when tokens came, how an answer
ended, and whether it took too long.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

from chatwright.serve.operation.request_context import current, seconds_left, timed_out

if TYPE_CHECKING:
    from chatwright.generate.request import Handle, Piece, Request
    from chatwright.generate.threads import EngineThread


class Listener(Protocol):
    """Receives the timings of answers. Called in the event loop."""

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of an answer came, `seconds` after the engine was asked."""

    def next_token(self, model: str, seconds: float) -> None:
        """Another token came, `seconds` after the one before."""

    def answered(self, model: str, reason: str, seconds: float) -> None:
        """An answer ended, `seconds` after the engine was asked. `reason`: a FinishReason, "timeout" or
        "error"."""


class Answer:
    """The pieces of one or several requests: (index of the request, piece), each request's in their order."""

    def __init__(
        self,
        engine: EngineThread,
        requests: Sequence[Request],
        *,
        model: str = "",
        timeout: float = 0.0,
        listeners: Sequence[Listener] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        on_end: Callable[[Answer], None],
    ) -> None:
        """Ask the engine. Raises as `EngineThread.submit`. Needs a running event loop.

        timeout: seconds for the whole HTTP request, or for this answer where there is no HTTP request; 0: no
        limit. decode: turns a prompt's ids into text, for a log that keeps prompts. on_end: called in the
        loop once the engine has nothing more to do for this answer.
        """
        self.requests = tuple(requests)
        self.started = time.monotonic()
        self._model, self._timeout, self._listeners = model, timeout, listeners
        self._on_end: Callable[[Answer], None] | None = on_end
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        # (index of the request, new tokens, whether it is the end, when)
        self._arrivals: deque[tuple[int, int, bool, float]] = deque()
        self._called = False  # whether `_look` is already scheduled
        self._latest = [0.0] * len(self.requests)  # when the newest token of each request came
        self._open = len(self.requests)
        self._left = self._late = False
        self._context = current.get()
        self._handles: list[Handle] = []
        try:
            for index, request in enumerate(self.requests):
                self._handles.append(engine.submit(request, partial(self._changed, index)))
        except BaseException:
            self.cancel()
            raise
        remaining = seconds_left(timeout)
        self._alarm = None if remaining is None else self._loop.call_later(remaining, self._give_up)
        if self._context is not None:
            self._context.model = model
            # Several answers may share a prompt: it counts once.
            prompts = dict.fromkeys(request.prompt for request in self.requests)
            self._context.prompt_tokens += sum(map(len, prompts))
            if self._context.keep_texts and decode is not None:
                self._context.prompts += map(decode, prompts)

    # ---- in the engine's thread ----------------------------------------------------------------------------

    def _changed(self, index: int, tokens: int, ended: bool) -> None:
        self._arrivals.append((index, tokens, ended, time.monotonic()))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: the server has stopped, nobody waits any more
                self._loop.call_soon_threadsafe(self._look)

    # ---- in the loop ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._called = False  # before `_note`: what arrives from here on schedules another call
        self._note()
        self._news.set()

    def _note(self) -> None:
        """Record what has arrived."""
        while self._arrivals:
            index, tokens, ended, at = self._arrivals.popleft()
            if tokens:
                self._tokens(index, tokens, at)
            if ended:
                self._open -= 1
                self._ended(index, at)
        if not self._open and self._on_end is not None:
            if self._context is not None:
                self._context.cached_tokens += self.cached_tokens
            if self._alarm is not None:
                self._alarm.cancel()
            on_end, self._on_end = self._on_end, None
            on_end(self)

    def _tokens(self, index: int, tokens: int, at: float) -> None:
        before, self._latest[index] = self._latest[index], at
        for listener in self._listeners:
            if not before:
                listener.first_token(self._model, at - self.started)
            for _ in range(tokens if before else tokens - 1):
                listener.next_token(self._model, (at - before) / tokens if before else 0.0)
        if self._context is not None:
            self._context.completion_tokens += tokens
            self._context.first_token = min(self._context.first_token or at, at)

    def _ended(self, index: int, at: float) -> None:
        completion = self._handles[index].completion
        reason: str = completion.finish_reason if completion is not None else "error"
        if self._late and reason == "cancelled":
            reason = "timeout"
        for listener in self._listeners:
            listener.answered(self._model, reason, at - self.started)
        if self._context is not None and self._context.keep_texts and completion is not None:
            self._context.answers.append(completion.text)
        if self._context is not None and not self._left:
            self._context.finish_reasons.append(reason)

    def _give_up(self) -> None:
        self._late = True
        self.cancel()
        self._news.set()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache; several answers to one prompt count it once."""
        found: dict[tuple[int, ...], int] = {}
        for handle in self._handles:
            if handle.completion is not None:
                found.setdefault(handle.request.prompt, handle.completion.cached_tokens)
        return sum(found.values())

    def cancel(self) -> None:
        """Free the engine's slots. The iterator still ends properly, with finish_reason "cancelled"."""
        for handle in self._handles:
            handle.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._note()
        if self._open and not self._left:
            self._left = True  # the request's log line does not wait until the engine has noticed
            if self._context is not None:
                self._context.finish_reasons += ["timeout" if self._late else "cancelled"] * self._open
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Raises TimedOut, and UserError or RuntimeError when the computation failed."""
        unread = list(range(len(self.requests)))
        while unread:
            self._news.clear()  # before taking pieces: what arrives meanwhile sets it again
            if self._late:
                raise timed_out(self._timeout)
            for index in tuple(unread):
                piece = self._handles[index].take()
                if piece is None:
                    continue
                if piece.finish_reason is not None:
                    unread.remove(index)
                    self._note()  # with the last piece, the request context is complete
                yield index, piece
            if unread:
                await self._news.wait()
