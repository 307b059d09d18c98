"""uvicorn, adapted to long answers: how the server stops, and how it drops clients that stop reading or
sending.

The first SIGTERM or Ctrl-C lets the work under way finish (lifecycle.py) for at most `drain_seconds`, then
ends it properly. The second ends it now; the third exits the process. SIGHUP reads the file of keys again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0
"""A client that reads nothing for this long is disconnected."""
HEAD_SECONDS = 30.0
"""Time in which a new connection has to send the head of its first request."""
END_SECONDS = 5
"""Time, in seconds, in which ended answers have to reach their clients."""


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, with time limits for reading and for writing.

    A client that reads nothing would hold its slot, its answer and its model in memory for ever: TCP has no
    time limit for a receiver whose window stays closed. A client that connects and sends nothing would hold a
    file descriptor.
    """

    def connection_made(self, transport: Any) -> None:
        """Start the time limit for the first request."""
        super().connection_made(transport)
        self._stalled: asyncio.TimerHandle | None = None
        self._silent = self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both time limits."""
        self._silent.cancel()
        self._resumed()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes: watch whether it reads at all."""
        super().pause_writing()
        self._resumed()
        self._watch_progress(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has caught up: stop the time limit."""
        super().resume_writing()
        self._resumed()

    def _watch_progress(self, unsent: int) -> None:
        """Check the buffer after STALL_SECONDS. Nothing is added while writing is paused: if the buffer has
        not shrunk, the client does not read."""
        self._stalled = self.loop.call_later(STALL_SECONDS, self._check_progress, unsent)

    def _check_progress(self, unsent: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < unsent:
            self._watch_progress(left)
        else:
            self.transport.abort()

    def _resumed(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class Server(uvicorn.Server):
    """Runs an application of `create_app`."""

    def __init__(self, app: FastAPI, *, drain_seconds: float = 30.0, proxies: Sequence[str] = ()) -> None:
        """`proxies`: addresses trusted to report the client's address and scheme."""
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            timeout_graceful_shutdown=END_SECONDS,
        )
        super().__init__(config)
        self._app_state = app.state
        self._drain_seconds = drain_seconds
        self._signals = 0
        self._ends_at: float | None = None

    # ---- signals -------------------------------------------------------------------------------------------

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or Ctrl-C. uvicorn raises them again at the end; here they are not, because a stop on
        request is not a failure."""
        self._signals += 1
        if self._signals == 1:
            self._app_state.lifecycle.draining = True
        elif self._signals == 2:
            self.should_exit = self.force_exit = True
        else:
            os._exit(128 + sig)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and handle SIGHUP if there are keys to read again."""
        await super().startup(sockets)
        keys = self._app_state.keys
        if keys is not None and hasattr(signal, "SIGHUP"):
            try:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: keys.refresh(force=True))
            except (ValueError, RuntimeError):
                logger.debug("not in the main thread: SIGHUP is left alone")

    # ---- the end -------------------------------------------------------------------------------------------

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: check whether the server has drained."""
        if self._app_state.lifecycle.draining and not self.should_exit:
            self._drain()
        return bool(await super().on_tick(counter))

    def _drain(self) -> None:
        answers, requests = self._app_state.pool.running, self._app_state.lifecycle.in_flight
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self._drain_seconds
            if answers or requests:
                print(
                    f"stopping: {answers} answers and {requests} requests are under way and have "
                    f"{self._drain_seconds:g} seconds; once more ends them now",
                    file=sys.stderr,
                    flush=True,
                )
        if not answers and not requests:
            self.should_exit = True
        elif time.monotonic() >= self._ends_at:
            print(f"stopping: ending {answers} answers and {requests} requests", file=sys.stderr, flush=True)
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work still under way properly: streams get their last events."""
        self._app_state.lifecycle.draining = True
        self._app_state.pool.cancel_all()
        await super().shutdown(sockets)
        if self.force_exit:
            # uvicorn skips this on a forced exit; the lifespan task, which closes the engines, would then be
            # cancelled with a traceback.
            await self.lifespan.shutdown()
