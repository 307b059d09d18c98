"""The request context: what is known about the current request, for access log, metrics and time limit.

Each HTTP request has one `RequestContext`. The access-log middleware makes it; the code that serves the
request fills it in. `ModelPool` and `Answer` do so for every interface, through `current`; a route that knows
more sets it, as in `context_of(request).model = ...`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatwright.config import UserError

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection


class TimedOut(UserError):
    """The request took longer than this server's limit. The server answers 504."""


@dataclass
class RequestContext:
    """The request context of one request, from its arrival to the end of its answer."""

    id: str
    """The x-request-id: the client's own, or one that was made."""
    started: float = field(default_factory=time.monotonic)
    """When it came, on the monotonic clock, in seconds."""
    client: str = ""
    """Address of the client."""
    key: str = ""
    """Name of the API key, never the key itself."""
    model: str = ""
    """The model asked for, if it is one that is served here."""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were taken from the prefix cache."""
    first_token: float | None = None
    """When the first token came, on the clock of `started`."""
    finish_reasons: list[str] = field(default_factory=list)
    """One per answer; "error" for one that failed."""
    keep_texts: bool = False
    """Whether prompts and answers are to be kept for the log."""
    prompts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    work: asyncio.Task[None] | None = None
    """Task that the request started and its response does not wait for. The log line waits for it."""


current: ContextVar[RequestContext | None] = ContextVar("chatwright_request", default=None)
"""The request context of the request that this task works for; None outside of a server."""


def context_of(request: HTTPConnection) -> RequestContext:
    """The request context of a Starlette request; a fresh, unread one if no middleware made one."""
    known = request.scope.get("state", {}).get("context")
    return known if isinstance(known, RequestContext) else RequestContext("")


def seconds_left(timeout: float, clock: Callable[[], float] = time.monotonic) -> float | None:
    """Seconds left of the current request's time, at least 0; None when there is no limit (`timeout` 0)."""
    if not timeout:
        return None
    known = current.get()
    begun = known.started if known is not None else clock()
    return max(0.0, begun + timeout - clock())


@asynccontextmanager
async def in_time(timeout: float) -> AsyncIterator[None]:
    """Limit a wait that no `Answer` limits. Raises TimedOut when the current request's time is up."""
    try:
        async with asyncio.timeout(seconds_left(timeout)):
            yield
    except TimeoutError:
        raise timed_out(timeout) from None


def timed_out(timeout: float) -> TimedOut:
    """The error of a request that took too long."""
    return TimedOut(f"the request took longer than the {timeout:g} seconds that this server gives to one")
