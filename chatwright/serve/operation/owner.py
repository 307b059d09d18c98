"""Whose conversations: every browser has a secret of its own in a cookie, and sees what was said under it, no
more. Where API keys are needed, each key's name has its own in the same browser: who logs in next does not
see them.

The page asks for the cookie with a request of its own (POST /chat/owner) and does not get it with its HTML:
the cookie is SameSite=Strict, so a browser that comes here by a link on another site does not send it, and an
answer to that request with a new one would cut its owner off from all earlier conversations.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated

from fastapi import Depends, Request, Response

from chatwright.feedback.store import Owned, Store
from chatwright.serve.errors import ApiError
from chatwright.serve.operation.facts import facts

COOKIE = "chatwright_owner"
YEAR = 365 * 24 * 3600
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")


def give_owner(request: Request, response: Response) -> None:
    """Give the browser a secret, or let it keep its own for another year."""
    secret = _secret_of(request) or secrets.token_urlsafe(32)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, secret, max_age=YEAR, httponly=True, samesite="strict", secure=secure)


def owned(request: Request) -> Owned:
    """The conversations of whoever asks. Raises ApiError 401 when the browser has no secret yet."""
    secret = _secret_of(request)
    if secret is None:
        raise ApiError(
            401,
            "this browser has no cookie of this server yet: reload the page, and allow cookies",
            code="no_owner",
        )
    store: Store = request.app.state.store
    key = facts(request).key
    return store.of(f"{secret} {key}" if key else secret)


def _secret_of(request: Request) -> str | None:
    secret = request.cookies.get(COOKIE, "")
    return secret if _SECRET.fullmatch(secret) else None


Mine = Annotated[Owned, Depends(owned)]
"""The type of a route's parameter that is the asking browser's part of the store."""
