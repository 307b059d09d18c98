"""The owner of conversations. Every browser has its own secret in a cookie, and sees only the conversations
of that secret. On a server with API keys, the owner is the secret together with the key's name: the next
person who logs in with the same browser does not see them.

The page asks for the cookie in a separate request (POST /chat/owner) and does not get it with its HTML. The
cookie is SameSite=Strict: a browser that follows a link on another site does not send it. A new cookie in the
response to that request would replace the old one, and the owner would lose all earlier conversations.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated

from fastapi import Depends, Request, Response

from chatwright.feedback.store import Owned, Store
from chatwright.serve.errors import ApiError
from chatwright.serve.operation.request_context import context_of

COOKIE = "chatwright_owner"
YEAR = 365 * 24 * 3600
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")


def give_owner(request: Request, response: Response) -> None:
    """Give the browser a secret, or extend its own for another year."""
    secret = _secret_of(request) or secrets.token_urlsafe(32)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, secret, max_age=YEAR, httponly=True, samesite="strict", secure=secure)


def owned(request: Request) -> Owned:
    """The owner view of the store for the browser that asks. Raises ApiError 401 if it has no secret yet."""
    secret = _secret_of(request)
    if secret is None:
        raise ApiError(
            401,
            "this browser has no cookie of this server yet: reload the page, and allow cookies",
            code="no_owner",
        )
    store: Store = request.app.state.store
    key = context_of(request).key
    return store.of(f"{secret} {key}" if key else secret)


def _secret_of(request: Request) -> str | None:
    secret = request.cookies.get(COOKIE, "")
    return secret if _SECRET.fullmatch(secret) else None


Mine = Annotated[Owned, Depends(owned)]
"""Type of a route's parameter: the owner view of the store for the browser that asks."""
