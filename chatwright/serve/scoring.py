"""Scores of given texts, for many clients at once: what has come while a pass was computing goes together
into the next one."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from chatwright.generate.scoring import Scored, ToScore
    from chatwright.model.gpt import GPT

PASS_TOKENS = 512
"""Tokens of one pass, unless a single text has more. Larger passes are hardly faster per token, and those who
come meanwhile wait longer."""


@dataclass(eq=False)
class _Job:
    text: ToScore
    result: asyncio.Future[Scored]
    begun: bool = False


class Scorer:
    """Scores texts with one model. Use it within one event loop."""

    def __init__(self, model: GPT, known: Tensor | None = None) -> None:
        """`known` as in `score_texts`."""
        self._model, self._known = model, known
        self._waiting: deque[_Job] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def score(self, text: ToScore) -> Scored:
        """The scores of a text. Raises UserError for one beyond the context.

        If the caller is cancelled, a text that still waits is not computed; one that is being computed cannot
        be stopped, and this returns when its pass has ended, so that the caller keeps its slot until then.
        """
        job = _Job(text, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            # It works for other requests as well, and so not in the context of this one.
            self._worker = asyncio.create_task(self._work(), context=contextvars.Context())
        try:
            return await asyncio.shield(job.result)
        except asyncio.CancelledError:
            if job.begun:
                await asyncio.wait({job.result})
            else:
                self._waiting.remove(job)
            raise

    async def _work(self) -> None:
        from chatwright.generate.scoring import score_texts

        while self._waiting:
            jobs = self._next_pass()
            texts = [job.text for job in jobs]
            try:
                found = await asyncio.to_thread(score_texts, self._model, texts, self._known)
            except BaseException as error:
                for job in jobs:
                    _fail(job.result, error)
                if not isinstance(error, Exception):
                    raise
                continue
            for job, scored in zip(jobs, found, strict=True):
                job.result.set_result(scored)

    def _next_pass(self) -> list[_Job]:
        """The texts of the next pass: the oldest ones, up to PASS_TOKENS."""
        jobs: list[_Job] = []
        tokens = 0
        while self._waiting and (not jobs or tokens + len(self._waiting[0].text.ids) <= PASS_TOKENS):
            job = self._waiting.popleft()
            job.begun = True
            tokens += len(job.text.ids)
            jobs.append(job)
        return jobs


def _fail(result: asyncio.Future[Scored], error: BaseException) -> None:
    """Give an error to whoever waits; if nobody does any more, asyncio must not complain."""
    if isinstance(error, Exception):
        result.set_exception(error)
        result.exception()
    else:
        result.cancel()
