"""An engine that runs in the background, for a server with many clients."""

from __future__ import annotations

import threading
from typing import Self

from chatwright.config import UserError
from chatwright.generate.engine import Engine
from chatwright.generate.request import Handle, OnChange, Request


class BusyError(UserError):
    """Too many requests are waiting. A server answers 429."""


class ClosedError(UserError):
    """The engine no longer takes requests. A server answers 503."""


class EngineThread:
    """A thread that steps an engine while it has work. Any thread may submit, read and cancel.

    An error inside a step fails the requests that it hits, and the thread goes on. At most `max_waiting`
    requests wait behind the engine's `max_batch`; a handle holds no more than one answer. Use it as a context
    manager, or `close` it.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        if max_waiting < 1:
            raise UserError(f"engine: max_waiting is {max_waiting}; it must be at least 1")
        self.engine, self.max_waiting = engine, max_waiting
        self._handles: set[Handle] = set()  # unfinished ones; guarded by `engine.arrived`
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="chatwright-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: not closed, and not ended by an error outside of a step."""
        return not self._closed

    def submit(self, request: Request, on_change: OnChange | None = None) -> Handle:
        """Queue a request; `on_change` as in `Handle`.

        Raises UserError as `Engine.submit` does, ClosedError when closed, BusyError when too many wait.
        """
        with self.engine.arrived:
            if self._closed:
                raise ClosedError("the engine is closed")
            if self.engine.waiting >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests are waiting already; try again later")
            handle = self.engine.submit(request, background=True, on_change=on_change)
            self._handles = {other for other in self._handles if not other.finished} | {handle}
            return handle

    def close(self) -> None:
        """End after the running step; unfinished requests are cancelled and keep what they have."""
        with self.engine.arrived:
            self._closed = True
            self.engine.arrived.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while True:
                with self.engine.arrived:
                    self.engine.arrived.wait_for(lambda: self._closed or self.engine.busy)
                    if self._closed:
                        return
                self.engine.step()
        finally:  # also when something worse than an Exception ends the thread
            with self.engine.arrived:
                self._closed = True
                for handle in self._handles:
                    handle.cancel()
            try:
                self.engine.step()  # computes nothing: it finishes the cancelled requests
            finally:
                for handle in self._handles:
                    if not handle.finished:
                        handle._fail(RuntimeError("the engine has ended"))
