"""Ctrl-C and SIGTERM: finish the step, save, and say how to resume. With nothing to save, stop at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from chatwright.metrics import say


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved; the same command goes on from there."""


class StopNow(BaseException):
    """A signal came inside `Stopper.at_once`. Not an Exception: `except Exception` must not catch it."""


class Stopper:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once, without saving.

    A second SIGTERM changes nothing: launchers send several, and they want the checkpoint.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signals = 0
        self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._at_once:
            self._at_once = False  # raise once: the next signal must not interrupt the unwinding
            raise StopNow
        if self._signals > 1:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = True
        with contextlib.suppress(RuntimeError):  # the signal may interrupt a write to the same stream
            say("  stopping after this step; Ctrl-C again stops at once, without saving")

    @contextmanager
    def listening(self) -> Iterator[Stopper]:
        """Handle the signals inside the block (only in the main thread, where Python allows it)."""
        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread: the caller handles signals
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, reason: Callable[[], Exception]) -> Iterator[None]:
        """A block that may be interrupted anywhere without loss. The first signal, or an earlier one, ends it
        at once and raises `reason()`, which may save first."""
        try:
            if self._signals:
                raise StopNow
            self._at_once = True
            yield
        except StopNow:
            raise reason() from None
        finally:
            self._at_once = False


@contextmanager
def terminable(title: str) -> Iterator[None]:
    """SIGTERM raises Interrupted inside the context; Ctrl-C stays Python's. For code outside of training
    loops, which have a Stopper."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopNow

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except StopNow:
        raise Interrupted(f"{title}: stopped; the same command goes on from the last finished part") from None
    finally:
        signal.signal(signal.SIGTERM, old)
