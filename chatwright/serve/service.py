"""Between people and the engine: a conversation becomes token requests, and the answers come back piece by piece.

`prepare` is shared by the terminal, the HTTP interface and the page. `ChatService` is for the two that live in an
event loop: one engine thread computes, and each answer is an asynchronous iterator that can be cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from chatwright.config import UserError

if TYPE_CHECKING:
    from chatwright.chat import Message
    from chatwright.generate.request import Handle, Piece, Request
    from chatwright.generate.sampling import Sampling
    from chatwright.generate.threads import EngineThread
    from chatwright.language_model import LanguageModel


class Busy(UserError):
    """As many answers are under way as the server takes on at a time."""


class TooLong(UserError):
    """The last message does not fit into the model's context, whatever else is left out."""


@dataclass(frozen=True)
class Prepared:
    """What the engine is to do for one conversation."""

    requests: tuple[Request, ...]
    """One request per answer wanted; they share the prompt and differ in their seeds."""
    prompt_tokens: int
    """Length of the prompt after fitting."""
    dropped: int
    """How many of the oldest messages did not fit and were left out."""


def prepare(
    model: LanguageModel, messages: Sequence[Message], sampling: Sampling, *, answers: int = 1, begun: str = ""
) -> Prepared:
    """Encode `messages` and make room for the answer, which goes on from `begun` when that is given.

    A quarter of the context (or `max_new_tokens`, if that is less) is kept free for the answer; the oldest turns
    go when the rest is too small. The answer may then use whatever room is left, up to `max_new_tokens`.
    With a seed, answer k uses seed + k. Raises TooLong when even the last message is too long or `begun` fills the
    context, UserError when the model's template refuses the conversation.
    """
    from chatwright.generate.request import Request

    context, template = model.engine.max_context, model.require_template()
    reserve = max(1, min(sampling.max_new_tokens, context // 4))
    begun_ids = model.tokenizer.encode(begun)
    try:
        fitted = model.encode_chat(messages, max_new_tokens=reserve + len(begun_ids))
    except UserError as error:
        template.encode(
            messages, model.tokenizer, add_generation_prompt=True
        )  # raises what the template refuses
        raise TooLong(str(error)) from None
    prompt = (*fitted.ids, *begun_ids)
    room = context - len(prompt)
    if room < 1:
        raise TooLong(f"the answer fills the model's window of {context} tokens: it cannot go on")
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    end_ids = template.end_ids(model.tokenizer)
    requests = tuple(
        Request(
            prompt=prompt,
            sampling=sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index),
            end_ids=end_ids,
        )
        for index in range(answers)
    )
    return Prepared(requests, len(prompt), fitted.dropped)


class ChatService:
    """One model and the thread that runs it. Made inside or outside an event loop; `answer` needs one."""

    def __init__(
        self, model: LanguageModel, engine: EngineThread, *, name: str, max_requests: int = 64
    ) -> None:
        self.model = model
        self.name = name
        """The name under which the model is served."""
        self.engine = engine
        self.max_requests = max_requests
        """How many answers may be under way or waiting at a time."""
        self._running: set[Answer] = set()

    @property
    def context(self) -> int:
        """The model's window, in tokens."""
        return self.model.engine.max_context

    @property
    def running(self) -> int:
        """Answers under way or waiting."""
        return sum(len(answer.requests) for answer in self._running)

    async def prepare(
        self, messages: Sequence[Message], sampling: Sampling, *, answers: int = 1, begun: str = ""
    ) -> Prepared:
        """`prepare` off the event loop. Raises UserError, and Busy when the server has enough to do."""
        if self.running + answers > self.max_requests:
            raise Busy(f"the server is busy with {self.running} answers; try again in a moment")
        return await asyncio.to_thread(prepare, self.model, messages, sampling, answers=answers, begun=begun)

    def answer(self, prepared: Prepared) -> Answer:
        """Start computing. Iterate over the result, or use it as a context manager that cancels on leaving."""
        answer = Answer(self.engine, prepared.requests, on_end=self._running.discard)
        self._running.add(answer)
        return answer

    def cancel_all(self) -> None:
        """End every answer that is under way; those who wait for one get what there is, marked as cancelled."""
        for answer in tuple(self._running):
            answer.cancel()

    def close(self) -> None:
        """End every answer and stop the engine. Blocks for the step that is running."""
        self.cancel_all()
        self.engine.close()


class Answer:
    """The pieces of one or several requests, in the order in which they are made: (index of the request, piece).

    The engine's handles block, so each has a small thread that hands its pieces to the event loop.
    """

    def __init__(
        self, engine: EngineThread, requests: Sequence[Request], *, on_end: Callable[[Answer], None]
    ) -> None:
        """`on_end` is called once the engine has nothing more to do for this answer."""
        self.requests = tuple(requests)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | None, Exception | None]] = asyncio.Queue()
        self._on_end = on_end
        self._open = len(self.requests)
        self._handles: list[Handle] = []
        try:
            self._handles.extend(map(engine.submit, self.requests))
        except BaseException:
            self.cancel()
            raise
        for index in range(len(self._handles)):
            threading.Thread(target=self._pump, args=(index,), name="chatwright-answer", daemon=True).start()

    def _pump(self, index: int) -> None:
        error: Exception | None = None
        try:
            for piece in self._handles[index].pieces():
                self._tell(index, piece, None)
        except Exception as caught:
            error = caught
        self._tell(index, None, error)

    def _tell(self, index: int, piece: Piece | None, error: Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped and nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, index, piece, error)

    def _deliver(self, index: int, piece: Piece | None, error: Exception | None) -> None:
        self._queue.put_nowait((index, piece, error))
        if piece is None:
            self._open -= 1
            if not self._open:
                self._on_end(self)

    def cancel(self) -> None:
        """Free the engine's slots. The iterator still ends properly, with finish_reason "cancelled"."""
        for handle in self._handles:
            handle.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.requests)
        while left:
            index, piece, error = await self._queue.get()
            if error is not None:
                raise error
            if piece is None:
                left -= 1
            else:
                yield index, piece
