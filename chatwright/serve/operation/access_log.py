"""The access log (one line of JSON per request) and its middleware.

A line has no key and no query string, and no text of a prompt or an answer unless `--log_prompts` is set. A
log that cannot be written (a full disk) loses lines but does not delay answers: a separate thread writes it,
and the number of lost lines is logged later.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatwright.config import UserError
from chatwright.serve.operation.lifecycle import Lifecycle
from chatwright.serve.operation.request_context import RequestContext, current
from chatwright.serve.operation.telemetry import Telemetry

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")
"""A client's own id is used if it matches: these characters are safe in a log line and in a header."""
LONGEST_PATH = 1024
WAITING_LINES = 10_000
"""Most lines that wait for a slow disk; further ones are lost."""
STREAMS = ("text/event-stream", "application/x-ndjson")


def _check_is_log(path: str) -> None:
    """Raise UserError when the file exists and does not begin with a line of JSON: lines are added to logs
    only."""
    file = Path(path)
    try:
        if path == "-" or not file.is_file():  # a pipe or a device is not looked into
            return
        with file.open("rb") as opened:
            begin = opened.read(1)
    except OSError as error:
        raise UserError(f"--access_log {path}: {error.strerror}") from None
    if begin not in (b"", b"{"):
        raise UserError(
            f"--access_log {path} is no access log, and would get lines of one; name another file"
        )


class AccessLog:
    """A file of JSON lines, or standard error for "-". Any thread may write. Raises UserError when it cannot
    be opened, or is no log.

    The file is opened again after it was moved away, as logrotate does.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        _check_is_log(path)
        self._file = self._open()
        self._torn = False  # whether the last line was cut off in its middle
        self._lost = 0
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name="chatwright-access-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Add a line without blocking; a line that finds the queue full is lost."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write the waiting lines and close. Gives up after about ten seconds."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=5)
        self._thread.join(5)

    def _open(self) -> int:
        if self._path == "-":
            return 2
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise UserError(f"--access_log {self._path}: {error.strerror}") from None

    def _run(self) -> None:
        while (record := self._lines.get()) is not None:
            try:
                self._follow()
                if self._lost:
                    self._put({"time": _now(), "lost_lines": self._lost})
                    self._lost = 0
                self._put(record)
            except (OSError, UserError) as error:
                if not self._lost:
                    logger.error("the access log cannot be written (%s): lines are lost until it can", error)
                self._lost += 1
        if self._path != "-":
            os.close(self._file)

    def _follow(self) -> None:
        """Open the file again if its path now names another file, or none."""
        if self._path == "-":
            return
        here = os.fstat(self._file)
        try:
            there = os.stat(self._path)
            same = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
        except FileNotFoundError:
            same = False
        if not same:
            file, self._file = self._file, self._open()
            os.close(file)
            self._torn = False

    def _put(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        left = b"\n" + line if self._torn else line
        while left:
            written = os.write(self._file, left)
            left = left[written:]
            self._torn = bool(left)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def record(scope: Scope, known: RequestContext, status: int, seconds: float) -> dict[str, Any]:
    """The fields of a request's line."""
    first = None if known.first_token is None else round(1000 * (known.first_token - known.started), 1)
    line: dict[str, Any] = {
        "time": _now(),
        "request_id": known.id,
        "method": scope["method"],
        "path": str(scope["path"])[:LONGEST_PATH],
        "status": status,
        "duration_ms": round(1000 * seconds, 1),
        "client": known.client,
        "key": known.key or None,
        "model": known.model or None,
        "stream": known.stream,
        "prompt_tokens": known.prompt_tokens,
        "cached_tokens": known.cached_tokens,
        "completion_tokens": known.completion_tokens,
        "ttft_ms": first,
        "finish_reason": ",".join(known.finish_reasons) or None,
    }
    if known.prompts:
        line |= {"prompts": known.prompts, "answers": known.answers}
    return line


class AccessLogMiddleware:
    """The outermost ASGI middleware: gives each request its id and its context, and logs how it ended."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        lifecycle: Lifecycle,
        telemetry: Telemetry,
        log: AccessLog | None,
        keep_texts: bool,
    ) -> None:
        self._app, self._lifecycle, self._telemetry, self._log = app, lifecycle, telemetry, log
        self._keep_texts = keep_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record how it ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        known = self._context(scope)
        scope.setdefault("state", {})["context"] = known
        status = 499  # nginx's number for a client that left before anything was sent

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = known.id
                known.stream = headers.get("content-type", "").partition(";")[0] in STREAMS
            await send(message)

        token = current.set(known)
        self._lifecycle.in_flight += 1
        try:
            await self._app(scope, receive, noting)
        finally:
            current.reset(token)
            self._lifecycle.in_flight -= 1
            self._telemetry.responded(_method(scope), route_of(scope), status, known.model)
            self._write(scope, known, status)

    def _write(self, scope: Scope, known: RequestContext, status: int) -> None:
        """Add the request's line, at the end of its response or of the job that it started."""
        if (log := self._log) is None:
            return

        def write(*_: Any) -> None:
            log.write(record(scope, known, status, time.monotonic() - known.started))

        if known.work is None:
            write()
        else:
            known.work.add_done_callback(write)

    def _context(self, scope: Scope) -> RequestContext:
        given = Headers(scope=scope).get(REQUEST_ID, "")
        made = given if SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        return RequestContext(made, client=(scope.get("client") or ("",))[0], keep_texts=self._keep_texts)


def _method(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
    return scope["method"] if scope["method"] in known else "other"


def route_of(scope: Scope) -> str:
    """The template of the route that served a request ("/chat/jobs/{job_id}/stop"): unlike paths, templates
    are few."""
    if str(scope["path"]).startswith("/static/"):
        return "/static"
    return str(getattr(scope.get("route"), "path", "")) or "none"
