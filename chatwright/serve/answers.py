"""One answer in a conversation: load the model if it is not in memory, generate, and store the text.

The store holds the answer from its beginning. The text so far is saved about every second; the last save adds
the reason why the answer ended. The reason `interrupted` means that neither the model nor the person ended
it: nobody followed any more, or the server was stopped, or the server crashed. A crashed server cannot save
the reason; the reader of the store then supplies it.

Events: {"type": "loading", "model"} while a model is being loaded; {"type": "begin", "model", "dropped",
"window"}; {"type": "text", "text"}, with "tokens" (tokens.py) if they were asked for; and last either
{"type": "done", "turn", "html"} with what the store now holds, or {"type": "error", "message"}, with "turn"
if a part of the answer was kept.
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
"""How many of the likeliest tokens are shown for each position."""


@dataclass(frozen=True)
class Ask:
    """What is to be answered, and where the answer goes."""

    owner_view: Owned
    conversation: str
    turn: Turn
    """The answer's turn in the store. Text that it already has is continued."""
    previous_leaf: int
    """The turn shown before; shown again if the answer fails with no text."""
    model: str
    messages: list[Message]
    """What the model is to answer."""
    sampling: Sampling
    probabilities: bool = False
    earlier: list[Token] | None = None
    """The tokens of the text that the answer already has, when they are known."""


@dataclass
class Draft:
    """An answer so far."""

    text: str
    tokens: int = 0
    dropped: int = 0
    reason: str | None = None
    token_texts: list[Token] | None = None
    started: float = field(default_factory=time.monotonic)
    saved_at: int = 0
    """Value of `tokens` at the last save."""


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
        """`reservation` holds a slot for the answer in the model's queue (`ModelPool.promised`) until the
        model is asked."""
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
        """Generate and store the answer. Raises Failed when generating or storing it failed."""
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
        """Fill the draft until the model ends the answer or the answer is no longer wanted."""
        ask, draft = self._ask, self._draft
        sampling = replace(ask.sampling, top_logprobs=ALTERNATIVES if ask.probabilities else 0)
        unwanted = asyncio.create_task(self._jobs.unwanted(job))
        try:
            async with self._model(job, unwanted) as service:
                if service is None:
                    draft.reason = self._why_cancelled(job)
                    return
                begun = ask.turn.text
                self._reservation.close()  # `prepare` takes the slot before any other request can
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
        """The model, kept in memory as long as this context is open; None if the answer stops being wanted
        before the model is loaded.

        A load that has begun continues; the next request finds the model ready.
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
        """Take in the pieces, publish them, and save the text so far from time to time."""
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
        elif draft.token_texts is not None and piece.text:
            # The earlier part of the answer has probabilities, this one has none.
            event |= {"tokens": [_unknown(piece.text)]}
        if event["text"]:
            draft.text += event["text"]
            if draft.token_texts is not None:
                draft.token_texts += event["tokens"]
            job.publish(event)

    def _why_cancelled(self, job: Job) -> str:
        return "cancelled" if job.stopped else "interrupted"

    async def _keep(self, ended: asyncio.Event) -> None:
        """Save the text so far every `save_seconds`, if it has grown. After a failed save, the next one tries
        again."""
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
                return  # the conversation was deleted meanwhile; the last save raises this as well

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
        """Save the text of a failed answer, or remove the turn if it has no text. Returns what the page has
        to know."""
        ask, draft = self._ask, self._draft
        try:
            if not draft.text:
                await asyncio.to_thread(
                    ask.owner_view.discard, ask.conversation, ask.turn.id, leaf=ask.previous_leaf
                )
                return {}
            # An answer that was to be continued and got no new text keeps its old finish reason.
            draft.reason = "error" if draft.text != ask.turn.text else ask.turn.finish_reason or "interrupted"
            await self._save()
        except UserError as error:
            logger.warning("a failed answer could not be kept: %s", error)
        return {"turn": self._turn()}

    def _seconds(self) -> float:
        return round(self._spent + time.monotonic() - self._draft.started, 3)


def _unknown(text: str) -> Token:
    """Text whose token probabilities were not asked for, as one token."""
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
