"""Clients that stop reading, or stop in the middle of a request; and very many of them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from chatwright.serve.answer import Answer
from chatwright.serve.operation import guard, running
from support.asking import HELLO, STORY, STORY_TEXT, post, text_of
from support.serving import DIALOGUES, Running, TinyModel, run_server
from support.waiting import wait_until

LONG_NAME = "x" * 20_000
"""A model's name that makes every event of a stream a heavy one."""


def raw(server: Running, body: Any = None, head: str = "") -> socket.socket:
    """A connection that has sent a request and whose receive buffer is as small as the system lets it be."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.settimeout(20)
    if body is not None:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
            f"application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
    else:
        connection.sendall(head.encode())
    return connection


def read_stream(connection: socket.socket, pause: float = 0.0) -> str:
    """The rest of a streamed response, without the head and the marks of its chunks."""
    received = b""
    while b"[DONE]" not in received:
        more = connection.recv(16384)
        assert more, "the connection ended before the stream"
        received += more
        time.sleep(pause)
    return re.sub(rb"\r\n[0-9a-f]+\r\n", b"", b"\r\n" + received.partition(b"\r\n\r\n")[2]).decode()


@contextmanager
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets and transports of the server that take little, so that a small model's answer is more than they
    take."""
    real = running.Connection.connection_made

    def made(self: Any, transport: Any) -> None:
        real(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024)
        transport.set_write_buffer_limits(high=1024)

    with monkeypatch.context() as patch:
        patch.setattr(running.Connection, "connection_made", made)
        yield


def test_a_reader_that_stops_reading_blocks_nobody(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = Answer.__aiter__

    async def noted(self: Answer) -> Any:
        async for index, piece in real(self):
            taken.append(len(piece.ids))
            yield index, piece

    monkeypatch.setattr(Answer, "__aiter__", noted)
    story = {**STORY, "model": LONG_NAME, "stream": True}
    with small_buffers(monkeypatch), run_server(tiny, name=LONG_NAME) as server, raw(server, story) as lazy:
        pool, stats = server.app.state.pool, tiny.engine.stats
        wait_until(
            lambda: stats.new_tokens and not pool.running,
            "the answer to be computed although nobody reads it",
        )
        assert server.app.state.lifecycle.in_flight == 1
        assert sum(taken) < stats.new_tokens / 2, "unread pieces pile up on their way to the client"
        for _ in range(3):
            answer = post(server, {**story, "stream": False})
            assert answer.json()["choices"][0]["message"]["content"] == STORY_TEXT
        taken.clear()
        assert text_of(read_stream(lazy)) == STORY_TEXT  # it comes back, and nothing is lost
        assert max(taken) > 30, "what was not read did not come as one larger piece"


def test_a_reader_that_never_comes_back_is_cut_off(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "STALL_SECONDS", 0.5)
    story = {**STORY, "model": LONG_NAME, "stream": True}
    with small_buffers(monkeypatch), run_server(tiny, name=LONG_NAME) as server:
        pool, stats = server.app.state.pool, tiny.engine.stats
        with raw(server, story) as lazy:
            wait_until(lambda: stats.new_tokens, "the answer to begin")
            wait_until(lambda: server.app.state.lifecycle.in_flight == 0, "the request to be given up")
            with pytest.raises((AssertionError, ConnectionError)):
                read_stream(lazy)
            assert pool._entries[LONG_NAME].users == 0  # its model may be put away again
        with raw(server, story) as slow:  # this one takes longer than that, but it reads: nobody minds
            begun = time.monotonic()
            assert text_of(read_stream(slow, pause=0.03)) == STORY_TEXT
            assert time.monotonic() - begun > 0.5


def test_half_open_clients_block_nobody(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with run_server(tiny) as server:
        start = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        heads = [
            "",
            "POST /v1",
            start,
            start + "content-type: application/json\r\ncontent-length: 100\r\n\r\n{",
        ]
        halves = [raw(server, head=head) for head in heads for _ in range(5)]
        assert post(server, HELLO).json()["choices"][0]["message"]["content"] == DIALOGUES["hello"]
        for number, half in enumerate(halves):
            received = b"x"
            while b"0.5 seconds" not in received:
                try:
                    more = half.recv(4096)
                except ConnectionResetError:
                    more = b""
                if not more:
                    break
                received += more
            assert (b"408" in received) is (number >= 15), received  # the others have not even sent a request
            half.close()
        wait_until(lambda: server.app.state.lifecycle.in_flight == 0, "all to be gone")


def test_a_hundred_streams_need_no_thread_each(tiny: TinyModel) -> None:
    with run_server(tiny, max_requests=200) as server:

        async def stream(client: httpx.AsyncClient) -> str:
            response = await client.post(f"{server.url}/v1/chat/completions", json={**HELLO, "stream": True})
            return text_of(response.text)

        async def check() -> int:
            tiny.engine.allow(2)
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
                tasks = [asyncio.create_task(stream(client)) for _ in range(100)]
                while server.app.state.pool.running < 100:
                    await asyncio.sleep(0.01)
                threads = threading.active_count()
                tiny.engine.allow(float("inf"))
                assert await asyncio.gather(*tasks) == [DIALOGUES["hello"]] * 100
            return threads

        assert asyncio.run(check()) < 50
