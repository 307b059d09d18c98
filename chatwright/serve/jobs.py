"""Answers as jobs with numbered events, so that a page that lost its connection or was reloaded can continue.

Events of a job, in order: `loading` and `begin` (answers.py), any number of `text`, then one `done` or one
`error`. Numbers start at 1. A follower sends the last number it has seen; the text events that it missed
arrive as one event, which has the last of their numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from chatwright.config import UserError
from chatwright.serve.operation.request_context import current
from chatwright.serve.service import Busy

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class Failed(UserError):
    """The work failed; `event` is what followers get besides the message."""

    def __init__(self, message: str, event: Event) -> None:
        super().__init__(message)
        self.event = event


class Job:
    """Work for one owner, kept for some time after its end."""

    def __init__(self, owner: str, subject: str, about: Event, clock: Callable[[], float]) -> None:
        self.id = secrets.token_urlsafe(16)
        self.owner = owner
        self.subject = subject
        """Id of the conversation that it works on: one job at a time on each."""
        self.about = about
        """What a page that is opened later needs before it follows the events."""
        self.events: list[Event] = []
        self.finished = False
        self.followers = 0
        self.started = self.last_followed = clock()
        self.stopped = False
        """Somebody pressed stop."""
        self.changed = asyncio.Event()

    def publish(self, event: Event, *, last: bool = False) -> None:
        """Add a numbered event and wake the followers."""
        self.events.append({"n": len(self.events) + 1, **event})
        self.finished = last
        self.wake()

    def wake(self) -> None:
        """Wake everybody who waits for an event or a stop."""
        self.changed.set()
        self.changed = asyncio.Event()

    def since(self, after: int) -> list[Event]:
        """The events after number `after`; adjacent text events are merged."""
        merged: list[Event] = []
        for event in self.events[max(0, after) :]:
            if merged and event["type"] == "text" == merged[-1]["type"]:
                last = merged[-1]
                tokens = {"tokens": last["tokens"] + event["tokens"]} if "tokens" in event else {}
                merged[-1] = {**event, "text": last["text"] + event["text"], **tokens}
            else:
                merged.append(event)
        return merged


Work = Callable[[Job], Awaitable[Event]]
"""Publishes its events on the job and returns the last one, or raises UserError or Failed, which becomes an
`error` event."""


class JobStore:
    """The jobs of a server: at most `max_jobs`; finished ones are kept for `keep_seconds`.

    A running job that nobody has followed for `unfollowed_seconds` is unwanted: its page is closed.
    """

    def __init__(
        self,
        *,
        max_jobs: int = 64,
        keep_seconds: float = 600.0,
        unfollowed_seconds: float = 600.0,
        heartbeat_seconds: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_jobs = max_jobs
        self._keep_seconds = keep_seconds
        self._unfollowed_seconds = unfollowed_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def make_room(self) -> None:
        """Make room for one job: at the limit, drop the oldest finished one. Raises Busy if all still run."""
        if len(self._jobs) >= self._max_jobs:
            oldest = next((job for job in self._jobs.values() if job.finished), None)
            if oldest is None:
                raise Busy(f"{len(self._jobs)} answers are under way; try again in a moment")
            del self._jobs[oldest.id]

    def start(self, work: Work, *, owner: str, subject: str, about: Event | None = None) -> Job:
        """Start `work` as a task. Its tokens still count for the request that started it. Raises Busy as
        `make_room` does."""
        self.make_room()
        job = Job(owner, subject, about or {}, self._clock)
        self._jobs[job.id] = job
        task = asyncio.get_running_loop().create_task(self._run(job, work))
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        if (known := current.get()) is not None:
            known.work = task
        return job

    def get(self, job_id: str, owner: str) -> Job | None:
        """The owner's job; None if it does not exist, is no longer kept, or belongs to another owner."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def running_on(self, subject: str) -> Job | None:
        """The job that runs on `subject`, or None."""
        return next((job for job in self._jobs.values() if job.subject == subject and not job.finished), None)

    def stop(self, job: Job) -> None:
        """Ask the work to end now; its last event follows."""
        job.stopped = True
        job.wake()

    async def close(self, patience: float = 5.0) -> None:
        """End all work, and give it `patience` seconds to save its text."""
        self._closing = True
        for job in self._jobs.values():
            job.wake()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)

    async def unwanted(self, job: Job) -> None:
        """Return when somebody pressed stop, nobody has followed for too long, or the server is stopping."""
        while not (job.stopped or self._closing):
            patience = self._unfollowed_seconds
            if not job.followers:
                patience -= self._clock() - job.last_followed
                if patience <= 0:
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), patience)

    async def _run(self, job: Job, work: Work) -> None:
        try:
            last = await work(job)
        except UserError as error:
            more = error.event if isinstance(error, Failed) else {}
            last = {"type": "error", "message": str(error), **more}
        except Exception:
            logger.exception("an answer failed")
            last = {"type": "error", "message": "the server failed while it answered; its log says why"}
        job.publish(last, last=True)
        asyncio.get_running_loop().call_later(self._keep_seconds, self._jobs.pop, job.id, None)

    async def follow(self, job: Job, after: int) -> AsyncIterator[bytes]:
        """The job's events after number `after`, one JSON object per line; empty lines keep the connection
        alive."""
        job.followers += 1
        try:
            while True:
                changed = job.changed
                for event in job.since(after):
                    after = event["n"]
                    yield json.dumps(event, ensure_ascii=False).encode() + b"\n"
                if job.finished:
                    return
                if changed is not job.changed:  # more events came while the lines were being sent
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), self._heartbeat_seconds)
                except TimeoutError:
                    yield b"\n"
        finally:
            job.followers -= 1
            job.last_followed = self._clock()
