"""Waiting for what happens in another thread or process: by asking again and again, not by a fixed sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds after which a test gives up. Long, since it is only spent where the test fails."""


def wait_until(
    check: Callable[[], T], what: str = "it", *, seconds: float = PATIENCE, pause: float = 0.005
) -> T:
    """Ask until the answer is true, and return it. Fails with `what` was waited for after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds:g} s")
        time.sleep(pause)
    return answer
