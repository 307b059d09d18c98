"""One answer in a conversation: the model is loaded if need be, it writes, and what it writes is kept.

The store has the answer from its beginning: what there is of it is written every second or so, and at the end
with the reason why it ended. `interrupted` means that neither the model nor the person ended it: nobody
followed any more, the server was stopped, or it died (then nobody was left to write the reason down, and
whoever reads the store supplies it).

Events: {"type": "loading", "model"} while a model comes into memory; {"type": "begin", "model", "dropped",
"window"}; {"type": "text", "text"} with "tokens" (tokens.py) where they were asked for; and {"type": "done",
"turn", "html"} with what the store now has, or {"type": "error", "message"} with "turn" where a part of the
answer was kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from chatwright.chat import Message
from chatwright.config import UserError
from chatwright.feedback.store import NotThere, Owned, StoreError, Turn
from chatwright.generate.request import Piece
from chatwright.generate.sampling import Sampling
from chatwright.serve.jobs import Event, Failed, Job, JobStore
from chatwright.serve.pool import ModelPool
from chatwright.serve.service import Answer, ChatService
from chatwright.serve.tokens import Token, TokenTexts

logger = logging.getLogger(__name__)

ALTERNATIVES = 5
"""How many of the likeliest tokens are shown for each place."""


@dataclass(frozen=True)
class Ask:
    """What is to be answered, and where the answer goes."""

    owner_view: Owned
    conversation: str
    turn: Turn
    """The answer's place in the store; what it already says is what it goes on from."""
    previous_leaf: int
    """What was shown before, and is again if nothing comes of the answer."""
    model: str
    messages: list[Message]
    """What the model is to answer."""
    sampling: Sampling
    probabilities: bool = False
    earlier: list[Token] | None = None
    """The tokens of what the answer already says, when they are known."""


@dataclass
class Draft:
    """What there is of an answer by now."""

    text: str
    tokens: int = 0
    dropped: int = 0
    reason: str | None = None
    token_texts: list[Token] | None = None
    started: float = field(default_factory=time.monotonic)
    saved_at: int = 0
    """Tokens that the store knows of."""


class Answering:
    """The work of a job (`jobs.Work`)."""

    def __init__(
        self,
        ask: Ask,
        pool: ModelPool,
        jobs: JobStore,
        *,
        reservation: ExitStack,
        render: Callable[[str], str],
        save_seconds: float,
    ) -> None:
        """`reservation` holds the answer's place in the model's queue (`ModelPool.promised`) until the model
        is asked."""
        self._ask, self._pool, self._jobs, self._reservation = ask, pool, jobs, reservation
        self._render, self._save_seconds = render, save_seconds
        turn = ask.turn
        self._draft = Draft(turn.text, tokens=turn.tokens or 0, dropped=turn.dropped)
        if ask.probabilities or ask.earlier is not None:
            self._draft.token_texts = list(ask.earlier or [])
            if turn.text and ask.earlier is None:
                self._draft.token_texts.append(_unknown(turn.text))
        self._spent = turn.seconds or 0.0

    async def __call__(self, job: Job) -> Event:
        """Answer. Raises Failed when nothing came of it."""
        try:
            with self._reservation:
                await self._answer(job)
        except NotThere:
            raise  # the conversation was deleted meanwhile
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("an answer failed")
            message = (
                str(error)
                if isinstance(error, UserError)
                else "the model failed while it answered; the server's log says why"
            )
            raise Failed(message, await self._give_up()) from None
        draft = self._draft
        try:
            await self._save()
        except StoreError as error:
            raise Failed(f"the answer could not be kept: {error}", {}) from None
        return {
            "type": "done",
            "turn": self._turn(),
            "html": await asyncio.to_thread(self._render, draft.text),
        }

    def _turn(self) -> dict[str, Any]:
        """The answer as the page gets it."""
        draft = self._draft
        turn = replace(
            self._ask.turn,
            content=draft.text,
            model=self._ask.model,
            finish_reason=draft.reason,
            tokens=draft.tokens,
            seconds=self._seconds(),
            dropped=draft.dropped,
            has_probabilities=draft.token_texts is not None,
        )
        return shown(turn)

    async def _answer(self, job: Job) -> None:
        """Fill the draft, until the model or somebody ends it."""
        ask, draft = self._ask, self._draft
        sampling = replace(ask.sampling, top_logprobs=ALTERNATIVES if ask.probabilities else 0)
        unwanted = asyncio.create_task(self._jobs.unwanted(job))
        try:
            async with self._model(job, unwanted) as service:
                if service is None:
                    draft.reason = self._why_cancelled(job)
                    return
                begun = ask.turn.text
                self._reservation.close()  # what follows takes the place before anybody else can
                prepared = await service.prepare(ask.messages, sampling, begun=begun)
                draft.dropped, draft.started = prepared.dropped, time.monotonic()
                job.publish(
                    {"type": "begin", "model": ask.model, "dropped": draft.dropped, "window": service.context}
                )
                with service.answer(prepared) as answer:
                    unwanted.add_done_callback(lambda _: answer.cancel())
                    await self._write(job, answer, service)
        finally:
            unwanted.cancel()

    @asynccontextmanager
    async def _model(self, job: Job, unwanted: asyncio.Task[None]) -> AsyncIterator[ChatService | None]:
        """The model, in memory for as long as this is open; None when the answer is no longer wanted before
        it is there.

        A load that has begun goes on without us, and the next who asks finds the model ready.
        """
        if self._ask.model not in {service.name for service in self._pool.services}:
            job.publish({"type": "loading", "model": self._ask.model})
        async with AsyncExitStack() as stack:
            entering = asyncio.create_task(stack.enter_async_context(self._pool.use(self._ask.model)))
            either: set[asyncio.Future[Any]] = {entering, unwanted}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if entering.done():
                yield entering.result()
            else:
                entering.cancel()
                await asyncio.wait({entering})
                yield None

    async def _write(self, job: Job, answer: Answer, service: ChatService) -> None:
        """Take the pieces in, publish them, and keep what there is every now and then."""
        draft, ended = self._draft, asyncio.Event()
        texts = TokenTexts(service.model.tokenizer) if self._ask.probabilities else None
        keeper = asyncio.create_task(self._keep(ended))
        try:
            async for _, piece in answer:
                self._take_in(job, piece, texts)
        finally:
            ended.set()
            await keeper
        if draft.reason == "cancelled":
            draft.reason = self._why_cancelled(job)

    def _take_in(self, job: Job, piece: Piece, texts: TokenTexts | None) -> None:
        draft = self._draft
        draft.tokens += len(piece.ids)
        draft.reason = piece.finish_reason
        event: Event = {"type": "text", "text": piece.text}
        if texts is not None:
            tokens = texts.push(piece)
            event |= {"text": "".join(token["text"] for token in tokens), "tokens": tokens}
        elif (
            draft.token_texts is not None and piece.text
        ):  # the part before has probabilities, this one has none
            event |= {"tokens": [_unknown(piece.text)]}
        if event["text"]:
            draft.text += event["text"]
            if draft.token_texts is not None:
                draft.token_texts += event["tokens"]
            job.publish(event)

    def _why_cancelled(self, job: Job) -> str:
        return "cancelled" if job.stopped else "interrupted"

    async def _keep(self, ended: asyncio.Event) -> None:
        """Keep what there is, every `save_seconds` while something is new. A store that fails now may do
        better later."""
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), self._save_seconds)
            if ended.is_set() or self._draft.saved_at == self._draft.tokens:
                continue
            try:
                await self._save(under_way=True)
            except StoreError as error:
                logger.warning("an answer under way could not be kept yet: %s", error)
            except NotThere:
                return  # deleted meanwhile; the end finds out as well

    async def _save(self, *, under_way: bool = False) -> None:
        draft = self._draft
        draft.saved_at = draft.tokens
        values: dict[str, Any] = {
            "finish_reason": None if under_way else draft.reason,
            "tokens": draft.tokens,
            "seconds": self._seconds(),
            "dropped": draft.dropped,
            "probabilities": None if draft.token_texts is None else list(draft.token_texts),
        }
        ask = self._ask
        await asyncio.to_thread(ask.owner_view.write, ask.conversation, ask.turn.id, draft.text, **values)

    async def _give_up(self) -> Event:
        """Keep what there is of a failed answer; take an answer without a word away. What the page has to
        know of it."""
        ask, draft = self._ask, self._draft
        try:
            if not draft.text:
                await asyncio.to_thread(
                    ask.owner_view.discard, ask.conversation, ask.turn.id, leaf=ask.previous_leaf
                )
                return {}
            # Where the answer was to go on and did not, it is what it was.
            draft.reason = "error" if draft.text != ask.turn.text else ask.turn.finish_reason or "interrupted"
            await self._save()
        except UserError as error:
            logger.warning("a failed answer could not be kept: %s", error)
        return {"turn": self._turn()}

    def _seconds(self) -> float:
        return round(self._spent + time.monotonic() - self._draft.started, 3)


def _unknown(text: str) -> Token:
    """A part of an answer for whose tokens nobody asked."""
    return {"text": text, "p": None, "alternatives": []}


def shown(turn: Turn) -> dict[str, Any]:
    """A turn as the page gets it."""
    return {
        "id": turn.id,
        "parent": turn.parent,
        "role": turn.role,
        "content": turn.text,
        "model": turn.model,
        "finish_reason": turn.finish_reason,
        "tokens": turn.tokens,
        "seconds": turn.seconds,
        "dropped": turn.dropped,
        "has_probabilities": turn.has_probabilities,
    }
