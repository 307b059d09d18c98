"""Authentication, when the server has keys: programs send `Authorization: Bearer KEY`, people have a session.

/health, /ready and the files of /static are open: they reveal only the server's state. The interface (/v1,
/metrics, /openapi.json) needs a key with every request. It does not accept a cookie, so that a page of
another site cannot act in its visitor's name. Everything else is the chat page: a browser is asked for a key
once (login.py) and gets a session.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from chatwright.serve.errors import ApiError
from chatwright.serve.operation.cors import is_api
from chatwright.serve.operation.keys import Key, KeyRing
from chatwright.serve.operation.request_context import RequestContext

IDLE_SECONDS = 12 * 3600.0
"""A session ends when it was not used for this long."""
MOST_SESSIONS = 1024
FOR_PROGRAMS = ("/metrics", "/openapi.json")
OPEN = ("/health", "/ready", "/login", "/logout")


class Attempts:
    """Wrong keys per client address: after FREE of them the address has to wait, twice as long after each
    further one, at most LONGEST seconds.

    A key that was right from this address before keeps working meanwhile: one program with an old key must
    not lock out everybody behind the same router. An address is forgotten after FORGET seconds; at most MOST
    addresses are kept, the newest ones.
    """

    FREE, LONGEST, FORGET, MOST = 5, 60.0, 900.0, 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address -> (how often, when last)
        self._good: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def wait(self, client: str) -> float:
        """Seconds until the address may try another key."""
        count, last = self._failed.get(_network(client), (0, 0.0))
        if count < self.FREE:
            return 0.0
        return max(0.0, last + min(self.LONGEST, 2.0 ** min(count - self.FREE, 10)) - self._clock())

    def failed(self, client: str) -> None:
        """Record a wrong key."""
        network, now = _network(client), self._clock()
        count, last = self._failed.pop(network, (0, now))
        self._failed[network] = (1 if now - last > self.FORGET else count + 1, now)
        while len(self._failed) > self.MOST:
            self._failed.popitem(last=False)

    def succeeded(self, client: str, key: Key) -> None:
        """Record a right key."""
        self._good[_network(client), key.digest] = None
        self._good.move_to_end((_network(client), key.digest))
        while len(self._good) > self.MOST:
            self._good.popitem(last=False)

    def known(self, client: str, key: Key) -> bool:
        """Whether the key was right from this address before."""
        return (_network(client), key.digest) in self._good


def _network(client: str) -> str:
    """The unit in which wrong keys are counted: an IPv4 address, or an IPv6 /64, which one customer has."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


@dataclass
class Session:
    """The login of a browser that has sent a valid key."""

    key: Key
    last_used: float


class Authenticator:
    """Keys, sessions and wrong attempts of one server."""

    def __init__(self, keys: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        self.keys = keys
        self.attempts = Attempts(clock)
        self._clock = clock
        # By the hash of the cookie; the most recently used one is last.
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def check(self, client: str, presented: str) -> Key:
        """The key. Raises ApiError: 401 for a wrong one, 429 for an address that sent too many wrong ones."""
        wait = self.attempts.wait(client)
        key = self.keys.find(presented)
        if wait and not (key is not None and self.attempts.known(client, key)):
            raise ApiError(
                429,
                "too many wrong API keys came from this address; try again later",
                code="too_many_attempts",
                headers={"retry-after": str(math.ceil(wait))},
            )
        if key is None:
            self.attempts.failed(client)
            raise unauthorized("this API key is not known here")
        self.attempts.succeeded(client, key)
        return key

    def begin(self, key: Key) -> str:
        """Begin a session; returns the cookie's value."""
        cookie = secrets.token_urlsafe(32)
        self._sessions[_hash(cookie)] = Session(key, self._clock())
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return cookie

    def session(self, cookie: str) -> Session | None:
        """The session of a cookie; None if it was idle too long or its key is no longer valid."""
        found = self._sessions.get(_hash(cookie))
        if found is None:
            return None
        if self._clock() - found.last_used > IDLE_SECONDS or not self.keys.holds(found.key):
            self.end(cookie)
            return None
        found.last_used = self._clock()
        self._sessions.move_to_end(_hash(cookie))
        return found

    def end(self, cookie: str) -> None:
        """End a session, if there is one."""
        self._sessions.pop(_hash(cookie), None)


def _hash(cookie: str) -> bytes:
    return hashlib.sha256(cookie.encode()).digest()


def unauthorized(message: str) -> ApiError:
    """The error of a request without a valid key."""
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def cookie_name(scope: Scope) -> str:
    """Name of the session cookie, with the port in it: browsers share cookies between a machine's ports."""
    server = scope.get("server")
    return f"chatwright_session_{server[1]}" if server and server[1] else "chatwright_session"


def cookie_of(scope: Scope) -> str:
    """The session cookie of a request, or ""."""
    return cookie_parser(Headers(scope=scope).get("cookie", "")).get(cookie_name(scope), "")


def client_of(scope: Scope) -> str:
    """The client's address."""
    return str((scope.get("client") or ("",))[0])


class AuthMiddleware:
    """The auth middleware (ASGI): passes on requests with access, and refuses others."""

    def __init__(
        self, app: ASGIApp, *, authenticator: Authenticator, login: Callable[[Scope, str], ASGIApp]
    ) -> None:
        """`login` makes the page that asks for a key; its second argument is the path to return to."""
        self._app, self._authenticator, self._login = app, authenticator, login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, ask for a key, or refuse."""
        path = str(scope["path"]) if scope["type"] == "http" else ""
        if scope["type"] == "lifespan" or path in OPEN or path.startswith("/static/"):
            await self._app(scope, receive, send)
            return
        for_people = not is_api(path) and path not in FOR_PROGRAMS
        try:
            key = self._key(scope, cookies=for_people)
        except ApiError as error:
            page = for_people and _asks_for_a_page(scope) and error.status == 401
            answer: ASGIApp = self._login(scope, quote(path)) if page else error.response()
            await answer(scope, receive, send)
            return
        known = scope.get("state", {}).get("context")
        if isinstance(known, RequestContext):
            known.key = key.name
        await self._app(scope, receive, send)

    def _key(self, scope: Scope, *, cookies: bool) -> Key:
        """The key of a request or of its session. Raises ApiError."""
        kind, _, presented = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and presented.strip():
            return self._authenticator.check(client_of(scope), presented.strip())
        session = self._authenticator.session(cookie_of(scope)) if cookies else None
        if session is not None:
            return session.key
        if cookies:
            raise unauthorized(
                "this page wants an API key: open / in a browser to give it, or send it as a header"
            )
        raise unauthorized("an API key is needed: send the header `Authorization: Bearer KEY`")


def _asks_for_a_page(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD") and "text/html" in Headers(scope=scope).get("accept", "")
