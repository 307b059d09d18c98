"""Answers as jobs with numbered events, so that a page can lose its connection, reload, and go on where it was.

Events of a job, in order: any number of `text`, then one `done` or one `error`. Numbers start at 1. A follower
says the last number it has seen; text that it missed arrives as one event with the last of the numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from chatwright.config import UserError
from chatwright.serve.service import Busy, ChatService, Prepared

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class Job:
    """One answer in the making, kept until some time after its end."""

    def __init__(self, service: ChatService, prepared: Prepared, clock: Callable[[], float]) -> None:
        self.id = secrets.token_urlsafe(16)
        self.service = service
        self.prepared = prepared
        self.events: list[Event] = []
        self.finished = False
        self.followers = 0
        self.started = self.last_followed = clock()
        self.stopped = False
        self.changed = asyncio.Event()

    def publish(self, event: Event, *, last: bool = False) -> None:
        """Add a numbered event and wake the followers."""
        self.events.append({"n": len(self.events) + 1, **event})
        self.finished = last
        self.wake()

    def wake(self) -> None:
        """Let everybody who waits for news look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def since(self, after: int) -> list[Event]:
        """The events after number `after`, neighbouring text events merged."""
        merged: list[Event] = []
        for event in self.events[max(0, after) :]:
            if merged and event["type"] == "text" == merged[-1]["type"]:
                merged[-1] = {**event, "text": merged[-1]["text"] + event["text"]}
            else:
                merged.append(event)
        return merged


class JobStore:
    """The jobs of a server: at most `max_jobs`, finished ones for `keep_seconds`.

    A running job that nobody has followed for `unfollowed_seconds` is cancelled: its page has gone for good.
    """

    def __init__(
        self,
        render: Callable[[str], str],
        *,
        max_jobs: int = 64,
        keep_seconds: float = 600.0,
        unfollowed_seconds: float = 60.0,
        heartbeat_seconds: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._render = render
        self._max_jobs = max_jobs
        self._keep_seconds = keep_seconds
        self._unfollowed_seconds = unfollowed_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, service: ChatService, prepared: Prepared, *, hold: AsyncExitStack | None = None) -> Job:
        """Start an answer. `hold` is closed at its end. Raises Busy when all places are taken by jobs that still run."""
        if len(self._jobs) >= self._max_jobs:
            oldest = next((job for job in self._jobs.values() if job.finished), None)
            if oldest is None:
                raise Busy(f"{len(self._jobs)} answers are under way; try again in a moment")
            del self._jobs[oldest.id]
        job = Job(service, prepared, self._clock)
        self._jobs[job.id] = job
        task = asyncio.get_running_loop().create_task(self._run(job, hold or AsyncExitStack()))
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return job

    def get(self, job_id: str) -> Job | None:
        """The job, or None when it was never there or is gone."""
        return self._jobs.get(job_id)

    def stop(self, job: Job) -> None:
        """End the answer where it is; its `done` event follows."""
        job.stopped = True
        job.wake()

    async def _run(self, job: Job, hold: AsyncExitStack) -> None:
        text, tokens, reason = "", 0, "cancelled"
        try:
            with job.service.answer(job.prepared) as answer:
                watch = asyncio.create_task(self._cancel_when_unwanted(job, answer.cancel))
                try:
                    async for _, piece in answer:
                        text, tokens = text + piece.text, tokens + len(piece.ids)
                        if piece.text:
                            job.publish({"type": "text", "text": piece.text})
                        reason = piece.finish_reason or reason
                finally:
                    watch.cancel()
            html = await asyncio.to_thread(self._render, text)
            seconds = round(self._clock() - job.started, 3)
            done = {
                "type": "done",
                "finish_reason": reason,
                "html": html,
                "tokens": tokens,
                "seconds": seconds,
            }
            job.publish(done, last=True)
        except UserError as error:
            job.publish({"type": "error", "message": str(error)}, last=True)
        except Exception:
            logger.exception("an answer failed")
            message = "the model failed while it answered; the server's log says why"
            job.publish({"type": "error", "message": message}, last=True)
        finally:
            await hold.aclose()
            asyncio.get_running_loop().call_later(self._keep_seconds, self._jobs.pop, job.id, None)

    async def _cancel_when_unwanted(self, job: Job, cancel: Callable[[], None]) -> None:
        """Cancel once somebody pressed stop, or nobody has followed for too long."""
        while not job.stopped:
            patience = self._unfollowed_seconds
            if not job.followers:
                patience -= self._clock() - job.last_followed
                if patience <= 0:
                    break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), patience)
        cancel()

    async def follow(self, job: Job, after: int) -> AsyncIterator[bytes]:
        """The job's events after number `after`, one JSON object per line; empty lines keep the connection alive."""
        job.followers += 1
        try:
            while True:
                changed = job.changed
                for event in job.since(after):
                    after = event["n"]
                    yield json.dumps(event, ensure_ascii=False).encode() + b"\n"
                if job.finished:
                    return
                if changed is not job.changed:  # more came while the lines were on their way
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), self._heartbeat_seconds)
                except TimeoutError:
                    yield b"\n"
        finally:
            job.followers -= 1
            job.last_followed = self._clock()
