"""Clients that press a server of the OpenAI-compatible interface from all sides; load_judge.py judges what
they got.

    question   one of a fixed set, asked greedily, so that the right answer is known: the one given when
               nobody else asked
    clients    ask, read as the tokens come, and ask again; some leave in the middle, some read slowly
    sockets    half a request and then nothing, again and again

Plain asyncio, so that as little as possible stands between the server and what is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SILENCE = 120.0
"""Seconds without a byte after which an answer counts as lost."""


@dataclass(frozen=True)
class Question:
    """What is asked."""

    text: str
    max_tokens: int


@dataclass
class Reply:
    """What one request came to."""

    question: int
    client: int
    kind: str
    """plain, slow or leaves."""
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    """As the server counts them; for one who left, the pieces that he saw."""
    started: float = 0.0
    first: float | None = None
    """Seconds from the first try to the first piece of text."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between pieces."""
    refused: int = 0
    """Times that the server answered 429 before."""
    error: str = ""
    """Why the answer is lost; empty when it is not."""


@dataclass(frozen=True)
class Target:
    """The server."""

    host: str
    port: int
    model: str


# ---- one request -------------------------------------------------------------------------------------------


def http_request(target: Target, question: Question) -> bytes:
    """The bytes of a request whose answer is streamed."""
    body = json.dumps(
        {
            "model": target.model,
            "messages": [{"role": "user", "content": question.text}],
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nContent-Type: "
        "application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Refused(Exception):
    """Status 429."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


async def _connect(
    target: Target, *, small: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not small:
        return await asyncio.open_connection(target.host, target.port)
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the server feels a slow reader earlier
    place.setblocking(False)
    await asyncio.get_running_loop().sock_connect(place, (target.host, target.port))
    return await asyncio.open_connection(sock=place, limit=4096)


async def _events(reader: asyncio.StreamReader) -> Any:
    """The objects of a stream of server-sent events in chunks; the last one is None for [DONE]. Raises
    ValueError."""
    status, headers = await _head(reader)
    if status == 429:
        if "retry-after" not in headers:
            raise ValueError("429 without retry-after")
        raise Refused(float(headers["retry-after"]))
    if status != 200:
        raise ValueError(f"status {status}: {(await reader.read(300)).decode(errors='replace')}")
    rest = b""
    while True:
        size = int((await _soon(reader.readline())).split(b";")[0] or b"0", 16)
        rest += (await _soon(reader.readexactly(size + 2)))[:-2]
        if not size:
            return
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data: ")
            yield None if data == b"[DONE]" else json.loads(data)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await _soon(reader.readline())).split()[1])
    headers = {}
    while line := (await _soon(reader.readline())).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return status, headers


async def _soon(waiting: Any) -> Any:
    return await asyncio.wait_for(waiting, SILENCE)


async def ask(
    target: Target, question: Question, reply: Reply, *, leave_after: int = -1, pause: float = 0.0
) -> None:
    """Ask once and note everything in `reply`. Raises Refused.

    leave_after: tear the connection after so many pieces (0: before the first). pause: seconds of rest
    between pieces.
    """
    reader, writer = await _connect(target, small=pause > 0)
    try:
        writer.write(http_request(target, question))
        await writer.drain()
        if leave_after == 0:
            await asyncio.sleep(random.random() / 2)
            return
        seen, last, done = 0, 0.0, False
        async for event in _events(reader):
            now = time.perf_counter()
            done = event is None
            if event is None:
                continue
            if "error" in event:
                raise ValueError(f"an error in the stream: {event['error']}")
            if event.get("usage"):
                reply.tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                reply.finish = choice["finish_reason"] or reply.finish
                piece = choice["delta"].get("content")
                if not piece:
                    continue
                reply.text += piece
                if reply.first is None:
                    reply.first = now - reply.started
                else:
                    reply.gaps.append(now - last)
                last, seen = now, seen + 1
            if seen == leave_after:
                reply.tokens = seen
                return
            if pause:
                await asyncio.sleep(pause)
        if not done:
            raise ValueError("the stream ended without [DONE]")
    finally:
        writer.transport.abort()  # torn, not closed: what a lost client looks like


async def ask_patiently(target: Target, question: Question, reply: Reply, **how: Any) -> None:
    """`ask`, again and again while the server is full, as late as it says; what goes wrong stands in
    `reply.error`."""
    reply.started = time.perf_counter()
    while True:
        try:
            await ask(target, question, reply, **how)
            return
        except Refused as refused:
            reply.refused += 1
            await asyncio.sleep(refused.seconds)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            TimeoutError,
            asyncio.IncompleteReadError,
        ) as error:
            reply.error = f"{type(error).__name__}: {error}"[:300]
            return


async def alone(target: Target, questions: Sequence[Question], tell: Callable[[str], None]) -> list[Reply]:
    """The answers that are given when nobody else asks: one after the other."""
    replies = []
    for number, question in enumerate(questions):
        reply = Reply(number, -1, "plain")
        await ask_patiently(target, question, reply)
        if reply.error:
            raise SystemExit(f"question {number} was not even answered alone: {reply.error}")
        replies.append(reply)
        if number % 8 == 7:
            tell(f"alone: {number + 1} of {len(questions)} questions answered")
    return replies


# ---- the load ----------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Many clients at once, until the time is over; then each ends what it has begun, and has one whole
    answer at least."""

    target: Target
    questions: Sequence[Question]
    clients: int = 64
    slow: int = 3
    """Clients that read slowly."""
    half_open: int = 4
    """Sockets that send half a request and then nothing."""
    leaving: float = 0.2
    """Share of the requests that are left in the middle."""
    seed: int = 0
    replies: list[Reply] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    """How long it took until the last answer had ended."""
    torn: int = 0
    """Half requests that were sent and left."""

    async def run(self, seconds: float) -> None:
        """Press the server for so long."""
        self.started = time.perf_counter()
        end = self.started + seconds
        others = [asyncio.create_task(self._half(end, number)) for number in range(self.half_open)]
        try:
            await asyncio.gather(*(self._client(number, end) for number in range(self.clients)))
            self.seconds = time.perf_counter() - self.started
            await asyncio.gather(*others)
        finally:
            for other in others:
                other.cancel()

    async def _client(self, number: int, end: float) -> None:
        draw = random.Random(f"{self.seed}/{number}")
        kind = "slow" if number < self.slow else "plain"
        satisfied = False
        while time.perf_counter() < end or not satisfied:
            question = draw.randrange(len(self.questions))
            leaves = kind == "plain" and draw.random() < self.leaving
            reply = Reply(question, number, "leaves" if leaves else kind)
            how: dict[str, Any] = {"leave_after": draw.randrange(12)} if leaves else {}
            if kind == "slow":
                how = {"pause": 0.1}
            await ask_patiently(self.target, self.questions[question], reply, **how)
            self.replies.append(reply)
            satisfied |= reply.finish is not None or bool(reply.error)

    async def _half(self, end: float, number: int) -> None:
        """Half the head, or half the body, then silence, then gone."""
        draw = random.Random(f"{self.seed}/half/{number}")
        while time.perf_counter() < end:
            whole = http_request(self.target, draw.choice(self.questions))
            try:
                _, writer = await _connect(self.target)
                writer.write(whole[: draw.randrange(1, len(whole))])
                await asyncio.sleep(min(draw.uniform(1, 5), max(0.0, end - time.perf_counter())))
                writer.transport.abort()
                self.torn += 1
            except OSError:
                await asyncio.sleep(1)  # a server that protects itself may refuse such guests
