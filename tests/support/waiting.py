"""Waiting for what happens in another thread or process: by asking again and again, not by a fixed sleep."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds after which a test gives up. Long, since it is only spent where the test fails."""


def wait_until(
    check: Callable[[], T],
    what: str = "the condition",
    *,
    process: subprocess.Popen[Any] | None = None,
    seconds: float = PATIENCE,
    pause: float = 0.005,
) -> T:
    """Ask until the answer is true, and return it.

    Fails when that took longer than `seconds`, or when `process` has ended before: nothing more is to be
    expected then.
    """
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        ended = process is not None and process.poll() is not None
        if ended and not (answer := check()):  # its last act may have made it true
            raise AssertionError(f"{what} did not come true: the process ended with {process.returncode}")
        if ended:
            return answer
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds:g} s"
        time.sleep(pause)
    return answer


def reached(url: str, **options: Any) -> httpx.Response | None:
    """What a server answers, of whatever status; None as long as nobody listens there."""
    try:
        return httpx.get(url, timeout=10, **options)
    except httpx.TransportError:
        return None
