"""Errors over HTTP: one shape, that of OpenAI's interface, for every route.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from chatwright.config import UserError
from chatwright.feedback.store import NotThere, StoreError
from chatwright.serve.pool import NoMemory, UnknownModel
from chatwright.serve.service import Busy, TooLong


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def body(
    message: str, *, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_user_error(error: UserError) -> ApiError:
    """The status that fits an error of the layers below."""
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, NoMemory):
        return ApiError(503, str(error), param="model", code="model_not_loaded")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, TooLong):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, NotThere):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, StoreError):
        return ApiError(503, str(error), code="store_unavailable")
    return ApiError(400, str(error))


def install(app: FastAPI) -> None:
    """Give every error of `app` the one shape."""

    def respond(error: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status in (429, 503) else {}
        content = body(error.message, status=error.status, param=error.param, code=error.code)
        return JSONResponse(content, status_code=error.status, headers=headers)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return respond(from_user_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        known = first["type"] in ("unknown_parameter", "unsupported_parameter", "unsupported_value")
        code = first["type"] if known else "invalid_value"
        message = first["msg"] if known or not place else f"{place}: {first['msg']}"
        param = (first.get("ctx") or {}).get("param") or place or None
        return respond(ApiError(400, message, param=param, code=code))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        content = body(str(error.detail), status=error.status_code)
        return JSONResponse(content, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def crash(_: Request, __: Exception) -> JSONResponse:
        # The traceback goes to the log (starlette raises the error again once this is sent), never to the client.
        return JSONResponse(body("the server failed; its log says why", status=500), status_code=500)
