"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from chatwright.metrics import say


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved; the same command goes on from there."""


class Stopper:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("  stopping after this step; again to stop at once without saving")

    @contextmanager
    def listening(self) -> Iterator[Stopper]:
        """Handle the signals inside the block (only in the main thread, where Python allows it)."""
        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread: whoever runs us handles signals
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
