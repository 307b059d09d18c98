"""Errors over HTTP: one shape, that of OpenAI's interface, for every route.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatwright.config import UserError
from chatwright.feedback.store import Full, NotThere, StoreError
from chatwright.generate.threads import BusyError, ClosedError
from chatwright.messages import UnreadablePart
from chatwright.serve.operation.request_context import TimedOut
from chatwright.serve.pool import NoMemory, UnknownModel
from chatwright.serve.service import Busy, TooLong

logger = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error's JSON."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "The request makes no sense, or asks for what this server does not do"),
        (401, "The API key is missing or wrong"),
        (403, "Another site's page, or a name this server does not answer to"),
        (404, "No such model"),
        (405, "Wrong method"),
        (413, "The body is too large"),
        (429, "The server has enough to do; Retry-After says when to come again"),
        (500, "The server failed"),
        (503, "The server is stopping, or has no memory for the model; Retry-After says when to come again"),
        (504, "The answer took too long"),
    )
}
"""The errors that every route may answer with, for the OpenAPI document."""


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of this error."""
        return body(self.message, status=self.status, param=self.param, code=self.code)

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def body(
    message: str, *, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_user_error(error: UserError) -> ApiError:
    """The HTTP error for an error of the layers below."""
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, NoMemory):
        wait = {"retry-after": str(error.retry_after)}
        return ApiError(503, str(error), param="model", code="model_not_loaded", headers=wait)
    if isinstance(error, Busy | BusyError):
        wait = {"retry-after": str(getattr(error, "retry_after", 1))}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=wait)
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="server_stopping", headers={"retry-after": "1"})
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, TooLong):
        # Clients such as LiteLLM know this error by OpenAI's words.
        message = f"This model's maximum context length is exceeded: {error}"
        return ApiError(400, message, param="messages", code="context_length_exceeded")
    if isinstance(error, UnreadablePart):
        return ApiError(400, str(error), param="messages", code="unsupported_value")
    if isinstance(error, NotThere):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, Full):
        return ApiError(403, str(error), code="store_full")
    if isinstance(error, StoreError):
        return ApiError(503, str(error), code="store_unavailable", headers={"retry-after": "1"})
    return ApiError(400, str(error))


@contextmanager
def naming(param: str) -> Iterator[None]:
    """What is refused inside is refused because of this parameter, unless the error names another one."""
    try:
        yield
    except UserError as error:
        found = from_user_error(error)
        if found.status == 400:
            found.param = param
        raise found from None


_FIELD = re.compile("[a-z_][a-z0-9_]*")
_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})


def place_of(parts: Sequence[Any]) -> str:
    """The place of a value in a body, as OpenAI writes it: `messages[0].content`. The names that Pydantic
    gives to the members of a union are left out."""
    place, tagged = "", False
    for part in parts:
        if isinstance(part, int):
            place += f"[{part}]"
        elif tagged:  # such as `text`, the type of a content's part
            tagged = False
        elif "tagged-union[" in part:
            tagged = True
        elif _FIELD.fullmatch(part) and part not in _TYPES:
            place += f".{part}" if place else part
    return place


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """One of a body's errors: one of our own if there is one, else the one that lies deepest, since the
    members of a union that are not meant complain about the whole."""
    known = ("unknown_parameter", "unsupported_parameter", "unsupported_value", "invalid_value")
    worst = max(errors, key=lambda error: (error["type"] in known, len(error["loc"])))
    place = place_of([part for part in worst["loc"] if part != "body"])
    own = worst.get("ctx") or {}
    place = own.get("param") or ".".join(filter(None, (place, own.get("field"))))
    code = worst["type"] if worst["type"] in known else "invalid_value"
    message = worst["msg"] if worst["type"] in known or not place else f"{place}: {worst['msg']}"
    return ApiError(400, message, param=place or None, code=code)


def install(app: FastAPI) -> None:
    """Give every error of `app` the same shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return from_user_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        content = body(str(error.detail), status=error.status_code)
        return JSONResponse(content, status_code=error.status_code, headers=error.headers)


class Crash:
    """The innermost ASGI middleware: logs an unexpected exception and sends the client the usual error shape.

    The framework's own handler would answer outside of all other middleware: without the security headers,
    the request's id, and a line in the access log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. An exception after the response began is raised again: the broken connection
        tells the client."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if begun or scope["type"] != "http":
                raise
            logger.exception("a request failed")
            await ApiError(500, "the server failed; its log says why").response()(scope, receive, send)
