"""Limits, time limits, other sites, readiness, clients that stop reading, and the end of a server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from person import Person
from serving import DIALOGUES, Running, TinyModel, run_server

from chatwright import checkpoint
from chatwright.chat import NATIVE, Message
from chatwright.config import UsageError, UserError
from chatwright.generate.sampling import Sampling
from chatwright.generate.threads import EngineThread
from chatwright.language_model import LanguageModel
from chatwright.model.gpt import GPT
from chatwright.serve import guard, running
from chatwright.serve.answer import Answer
from chatwright.serve.cors import check_origins
from chatwright.serve.keys import line_for
from chatwright.serve.pool import ModelPool, Spec
from chatwright.serve.server import ServeConfig
from chatwright.serve.service import Busy, ChatService, Limits
from chatwright.tokenizer import Tokenizer

STORY = {"model": "tiny/taught", "messages": [{"role": "user", "content": "story"}], "temperature": 0, "max_tokens": 200}
HELLO = {"model": "tiny/taught", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def post(server: Running, body: Any, **settings: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30, **settings)


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def text_of(stream: str) -> str:
    return "".join(one["choices"][0]["delta"].get("content", "") for one in events(stream) if one.get("choices"))


def reasons_of(stream: str) -> list[str]:
    found = [one["choices"][0]["finish_reason"] for one in events(stream) if one.get("choices")]
    return [reason for reason in found if reason]


# ---- limits --------------------------------------------------------------------------------------------------------


def test_sizes(tiny: TinyModel) -> None:
    with run_server(tiny, max_body=2048, max_new_tokens=3, max_prompt_tokens=40) as server:
        for asked in ({}, {"max_tokens": 100}, {"stream": True}, {"n": 2}):
            answer = post(server, {**STORY, **asked})
            if "stream" in asked:
                assert reasons_of(answer.text) == ["length"]
                continue
            assert answer.json()["usage"]["completion_tokens"] == 3 * asked.get("n", 1)
            assert {choice["finish_reason"] for choice in answer.json()["choices"]} == {"length"}
        assert post(server, {**STORY, "max_tokens": 2}).json()["usage"]["completion_tokens"] == 2
        long = post(server, {**HELLO, "messages": [{"role": "user", "content": "word " * 50}]})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "at most 40" in long.json()["error"]["message"]
        large = post(server, {**HELLO, "user": "x" * 2048})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        with Person(server.url) as person:  # the page has no other rules
            turn = person.events(person.start("story")[1])[-1]["turn"]
            assert (turn["finish_reason"], turn["tokens"]) == ("length", 3)
        lengths = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny/taught", "input": ["a", "word " * 50]})
        assert (lengths.status_code, lengths.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_settings_that_make_no_sense() -> None:
    for name, value in (
        ("max_body", 100), ("max_new_tokens", -1), ("max_prompt_tokens", -1), ("timeout", -1.0), ("timeout", float("inf")),
        ("drain_seconds", float("nan")),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"--{name}"):
            ServeConfig(**{name: value})  # type: ignore[arg-type]


def test_retry_after_grows_with_the_queue(tiny: TinyModel) -> None:
    """Mean time of an answer x queue / batch, in whole seconds, between 1 and 60."""

    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(max_requests=40))
            assert service.retry_after == 1  # nothing is known yet
            prepared = await service.prepare([Message(role="user", content="story")], Sampling(max_new_tokens=200), answers=40)
            service._seconds = 3.0
            tiny.engine.allow(0)
            answer = service.answer(prepared)
            assert service.running == 40
            assert service.retry_after == 8  # 3 s x 40 / 16
            with pytest.raises(Busy) as refused:
                await service.prepare([Message(role="user", content="story")], Sampling())
            assert refused.value.retry_after == 8
            service._seconds = 1000.0
            assert service.retry_after == 60
            answer.cancel()
            tiny.engine.allow(float("inf"))
            async for _ in answer:
                pass
            service._seconds = 0.0
            before = time.monotonic()
            async for _ in service.answer(await service.prepare([Message(role="user", content="hello")], Sampling(temperature=0.0))):
                pass
            assert 0 < service._seconds <= time.monotonic() - before

    asyncio.run(check())


def test_many_at_the_same_moment_are_counted(tiny: TinyModel) -> None:
    """All of them are still being encoded when the last comes."""

    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(max_requests=3))
            talk = [Message(role="user", content="hello")]
            done = await asyncio.gather(*(service.prepare(talk, Sampling()) for _ in range(8)), return_exceptions=True)
            assert sum(isinstance(one, Busy) for one in done) == 5
            await service.prepare(talk, Sampling(), answers=3)  # places that were not taken are free again

    asyncio.run(check())


def test_embeddings_and_scoring_take_up_places_and_time(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute beside the engine; as many as anybody likes would keep everybody else waiting."""
    gate = threading.Event()

    def held(*_: Any, **__: Any) -> Any:
        assert gate.wait(20)
        raise UserError("let go")

    monkeypatch.setattr(LanguageModel, "embed", held)
    monkeypatch.setattr(LanguageModel, "score", held)
    vectors = ("/v1/embeddings", {"model": "tiny/taught", "input": "hello"})
    scores = ("/v1/completions", {"model": "tiny/taught", "prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 0})

    async def check(server: Running) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            for path, body in (vectors, scores):
                gate.clear()
                tasks = [asyncio.create_task(client.post(path, json=body)) for _ in range(3)]
                done, busy = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                assert [task.result().status_code for task in done] == [429]
                gate.set()
                assert [response.status_code for response in await asyncio.gather(*busy)] == [400, 400]
                assert (await client.post(path, json=body)).status_code == 400  # the places are free again
            gate.clear()
            server.app.state.pool.services[0].limits = replace(server.app.state.pool.services[0].limits, timeout=0.2)
            late = await client.post(vectors[0], json=vectors[1])
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            gate.set()

    with run_server(tiny, max_requests=2) as server:
        asyncio.run(check(server))


# ---- time limits ---------------------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long(tiny: TinyModel, wait_until: Callable[..., None]) -> None:
    with run_server(tiny, timeout=0.5) as server:
        engine = tiny.engine
        assert post(server, HELLO).status_code == 200
        engine.allow(5)
        whole = post(server, {**STORY, "n": 2})
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert "0.5 seconds" in whole.json()["error"]["message"]
        wait_until(lambda: engine.active == 0, "the places to be free")
        engine.allow(5)
        streamed = post(server, {**STORY, "stream": True})
        assert streamed.status_code == 200
        assert STORY_TEXT.startswith(text_of(streamed.text)) and text_of(streamed.text)
        assert events(streamed.text)[-1]["error"]["code"] == "timeout"
        assert "[DONE]" not in streamed.text
        wait_until(lambda: engine.active == 0 and server.app.state.pool.running == 0, "the place to be free")
        engine.allow(5)
        with Person(server.url) as person:
            last = person.events(person.start("story")[1])[-1]
            assert last["type"] == "error" and "0.5 seconds" in last["message"]
        engine.allow(float("inf"))
        assert post(server, HELLO).json()["choices"][0]["message"]["content"] == DIALOGUES["hello"]
        figures = httpx.get(f"{server.url}/metrics").text
        assert 'finished_reason="timeout",model_name="tiny/taught"} 4.0' in figures


STORY_TEXT = DIALOGUES["story"]


def test_an_answer_in_time_is_not_cut(tiny: TinyModel) -> None:
    """The alarm of an answer that has ended rings for nobody, even when it is read late."""

    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(timeout=0.4))
            answer = service.answer(await service.prepare([Message(role="user", content="hello")], Sampling(temperature=0.0)))
            while service.running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            assert "".join([piece.text async for _, piece in answer]) == DIALOGUES["hello"]

    asyncio.run(check())


def test_a_request_waits_in_the_queue_no_longer_either(tiny: TinyModel, wait_until: Callable[..., None]) -> None:
    with run_server(tiny, timeout=0.5) as server:
        tiny.engine.allow(0)
        begun = time.monotonic()
        assert post(server, STORY).status_code == 504
        assert time.monotonic() - begun < 5
        assert tiny.engine.waiting == 1
        tiny.engine.allow(1)
        wait_until(lambda: tiny.engine.waiting == 0 and tiny.engine.active == 0, "the queue to be empty")


# ---- pages of other sites ------------------------------------------------------------------------------------------


def test_cors_is_for_those_listed_and_the_interface(tiny: TinyModel, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", "k" * 40))
    ours, other = "http://localhost:3000", "http://localhost:3001"
    chat = "/v1/chat/completions"
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type,x-stainless-os"}
    with run_server(tiny, cors_origins=[f"{ours}/"], api_keys=str(keys)) as server:
        good = httpx.options(f"{server.url}{chat}", headers={"origin": ours, **ask})
        assert good.status_code == 204
        assert good.headers["access-control-allow-origin"] == ours
        assert "POST" in good.headers["access-control-allow-methods"]
        assert good.headers["access-control-allow-headers"] == ask["access-control-request-headers"]
        assert good.headers["vary"].lower() == "origin"
        for path, origin in ((chat, other), (chat, "null"), ("/chat/jobs", ours), ("/", ours), ("/metrics", ours), ("/v1x", ours)):
            bad = httpx.options(f"{server.url}{path}", headers={"origin": origin, **ask})
            assert bad.status_code >= 400
            assert not [name for name in bad.headers if name.startswith("access-control")], path
        key = {"authorization": f"Bearer {'k' * 40}"}
        answer = post(server, HELLO, headers={"origin": ours, **key})
        assert answer.json()["choices"][0]["message"]["content"] == DIALOGUES["hello"]
        assert answer.headers["access-control-allow-origin"] == ours
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        for refused in (post(server, HELLO, headers={"origin": ours}), post(server, {}, headers={"origin": ours, **key})):
            assert refused.status_code in (400, 401)
            assert refused.headers["access-control-allow-origin"] == ours  # or the page could not read why
        foreign = post(server, HELLO, headers={"origin": other, **key})
        assert foreign.status_code == 403 and "access-control-allow-origin" not in foreign.headers
        page = httpx.post(f"{server.url}/chat/jobs", json={}, headers={"origin": ours, **key})
        assert page.status_code == 403 and "access-control-allow-origin" not in page.headers
        strange = httpx.options(f"{server.url}{chat}", headers={"origin": ours, **ask, "access-control-request-headers": "a\tb;c"})
        assert strange.headers["access-control-allow-headers"] == "authorization, content-type"


def test_origins() -> None:
    given = ["https://A.example", "http://x:80/", "https://x:443", "http://x:8080", "http://[::1]:3000"]
    assert check_origins(given) == ["https://a.example", "http://x", "https://x", "http://x:8080", "http://[::1]:3000"]
    for bad in ("*", "x.example", "ftp://x", "https://x/path", "https://u@x", "https://x?y", "http://[", "http://x:y", "null"):
        with pytest.raises(UsageError, match="--cors_origins"):
            check_origins([bad])


# ---- readiness -----------------------------------------------------------------------------------------------------


def test_ready(taught: tuple[GPT, Tokenizer]) -> None:
    from chatwright.serve.app import create_app

    gate = threading.Event()
    problems: list[Exception] = [RuntimeError("broken file")]

    def loader(_: Spec) -> TinyModel:
        assert gate.wait(20)
        if problems:
            raise problems.pop()
        return TinyModel(*taught)

    pool = ModelPool([Spec("a", "-")], loader=loader)
    app = create_app(pool)

    async def check() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def ready() -> tuple[int, str]:
                answer = await client.get("/ready")
                return answer.status_code, answer.json().get("reason", "")

            assert await ready() == (503, "a is not loaded yet")
            asked = [asyncio.create_task(client.post("/v1/chat/completions", json={**HELLO, "model": "a"}))]
            await asyncio.sleep(0.05)
            assert await ready() == (503, "a is not loaded yet")
            gate.set()
            assert (await asked[0]).status_code == 500
            assert await ready() == (503, "a could not be loaded: broken file")
            assert (await client.post("/v1/chat/completions", json={**HELLO, "model": "a"})).status_code == 200
            assert await ready() == (200, "")
            app.state.lifecycle.draining = True
            assert await ready() == (503, "the server is stopping")
            assert (await client.get("/health")).json()["status"] == "ok"
            pool.services[0].engine.close()
            assert ((await client.get("/health")).status_code, (await client.get("/health")).json()["status"]) == (503, "failed")

    asyncio.run(check())
    pool.close()


# ---- clients that do not behave ------------------------------------------------------------------------------------


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
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
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
    """Sockets and transports of the server that take little, so that a small model's answer is more than they take."""
    real = running.Connection.connection_made

    def made(self: Any, transport: Any) -> None:
        real(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024)
        transport.set_write_buffer_limits(high=1024)

    with monkeypatch.context() as patch:
        patch.setattr(running.Connection, "connection_made", made)
        yield


def test_a_reader_that_stops_reading_blocks_nobody(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
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
        wait_until(lambda: stats.new_tokens and not pool.running, "the answer to be computed although nobody reads it")
        assert server.app.state.lifecycle.in_flight == 1
        assert sum(taken) < stats.new_tokens / 2, "unread pieces pile up on their way to the client"
        for _ in range(3):
            answer = post(server, {**story, "stream": False})
            assert answer.json()["choices"][0]["message"]["content"] == STORY_TEXT
        taken.clear()
        assert text_of(read_stream(lazy)) == STORY_TEXT  # it comes back, and nothing is lost
        assert max(taken) > 30, "what was not read did not come as one larger piece"


def test_a_reader_that_never_comes_back_is_cut_off(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(running, "STALL_SECONDS", 0.5)
    story = {**STORY, "model": LONG_NAME, "stream": True}
    with small_buffers(monkeypatch), run_server(tiny, name=LONG_NAME) as server:
        pool, stats = server.app.state.pool, tiny.engine.stats
        with raw(server, story) as lazy:
            wait_until(lambda: stats.new_tokens, "the answer to begin")
            wait_until(lambda: server.app.state.lifecycle.in_flight == 0, "the request to be given up")
            with pytest.raises((AssertionError, ConnectionError)):
                read_stream(lazy)
            assert pool._places[LONG_NAME].users == 0  # its model may be put away again
        with raw(server, story) as slow:  # this one takes longer than that, but it reads: nobody minds
            begun = time.monotonic()
            assert text_of(read_stream(slow, pause=0.03)) == STORY_TEXT
            assert time.monotonic() - begun > 0.5


def test_half_open_clients_block_nobody(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(running, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with run_server(tiny) as server:
        start = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        heads = ["", "POST /v1", start, start + "content-type: application/json\r\ncontent-length: 100\r\n\r\n{"]
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


# ---- the end -------------------------------------------------------------------------------------------------------


def test_draining(tiny: TinyModel, wait_until: Callable[..., None]) -> None:
    """What is under way goes on; what is new is told to come again; then it is over."""
    with run_server(tiny, drain_seconds=30) as server, Person(server.url) as person:
        engine = tiny.engine
        engine.allow(5)
        chat = f"{server.url}/v1/chat/completions"
        conversation, job = person.start("story")
        with httpx.stream("POST", chat, json={**STORY, "stream": True}, timeout=30) as response:
            chunks = response.iter_text()
            begun = next(chunks)
            server.app.state.lifecycle.draining = True  # what the signal does
            assert httpx.get(f"{server.url}/ready").json() == {"status": "not ready", "reason": "the server is stopping"}
            for refused in (post(server, HELLO), httpx.get(f"{server.url}/v1/models"), httpx.get(server.url)):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
                assert (refused.headers["retry-after"], refused.headers["connection"]) == ("30", "close")
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert "chatwright_draining 1.0" in httpx.get(f"{server.url}/metrics").text
            engine.allow(float("inf"))
            assert person.events(job)[-1]["turn"]["finish_reason"] == "stop"  # a page that lost its connection
            assert person.read(conversation)["turns"]
            stream = begun + "".join(chunks)
        assert text_of(stream) == STORY_TEXT
        assert stream.endswith("data: [DONE]\n\n")
        port = int(server.url.rpartition(":")[2])

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except OSError:
                return True
            return False

        wait_until(closed, "the server to stop by itself")


def test_draining_ends_at_its_limit(tiny: TinyModel) -> None:
    with run_server(tiny, drain_seconds=0.3) as server:
        tiny.engine.allow(5)
        chat = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", chat, json={**STORY, "stream": True}, timeout=30) as response:
            chunks = response.iter_text()
            begun = next(chunks)
            server.app.state.lifecycle.draining = True
            stream = begun + "".join(chunks)
        assert stream.endswith("data: [DONE]\n\n")
        assert reasons_of(stream) == ["length"]  # OpenAI has no word for it
        assert 0 < len(text_of(stream)) < len(STORY_TEXT)


PROGRAM = """
import sys, time
from chatwright.generate.engine import Engine
step = Engine.step
def slow(self):
    time.sleep({pause})
    return step(self)
Engine.step = slow
from chatwright.cli import main
sys.exit(main(["serve", {directory!r}, "--port=0", "--name=m", *{options!r}]))
"""


@contextmanager
def child(directory: Path, *options: str, pause: float = 0.02) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`chatwright serve` in a process of its own, with steps that take as long as those of a larger model."""
    code = PROGRAM.format(directory=str(directory), options=["--store=none", *options], pause=pause)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, said.partition("chat page")[2].split()[0].rstrip("/")
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.fixture(scope="module")
def taught_dir(taught: tuple[GPT, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model as a model directory."""
    model, tokenizer = taught
    directory = tmp_path_factory.mktemp("models") / "taught"
    card = {"kind": "language", "model": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    texts = {"tokenizer.json": tokenizer.to_json(), "chat_template.jinja": NATIVE.source}
    checkpoint.save_checkpoint(directory, tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts)
    return directory


@contextmanager
def streaming(url: str) -> Iterator[Iterator[str]]:
    """The chunks of a story; when it begins, the first has come."""
    body = {**STORY, "model": "m", "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        chunks = response.iter_text()
        yield itertools.chain([next(chunks)], chunks)


posix = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals to a child process")


@posix
def test_sigterm_lets_answers_finish(taught_dir: Path) -> None:
    with child(taught_dir, pause=0.05) as (process, url), streaming(url) as chunks:
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 20
        while httpx.get(f"{url}/ready").status_code == 200:
            assert time.monotonic() < end
        refused = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": []})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        stream = "".join(chunks)
        assert text_of(stream) == STORY_TEXT
        assert stream.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
        assert process.stderr is not None
        rest = process.stderr.read()
        assert "stopping: 1 answers and 1 requests are under way and have 30 seconds" in rest
        assert "stopped" in rest and "Traceback" not in rest


@posix
def test_a_second_ctrl_c_ends_it_at_once(taught_dir: Path) -> None:
    with child(taught_dir, pause=0.4) as (process, url), streaming(url) as chunks:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "once more ends them now" in process.stderr.readline()
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        with suppress(httpx.HTTPError):  # ended or torn off, whichever is sooner
            assert text_of("".join(chunks)) != STORY_TEXT
        assert process.wait(30) == 0
        assert time.monotonic() - begun < 10  # the story would take half a minute
        assert "Traceback" not in process.stderr.read()


@posix
def test_sighup_reads_the_keys_again_and_idle_connections_end(taught_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", "a" * 40))
    with child(taught_dir, f"--api_keys={keys}", pause=0.0) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="a" * 40, max_retries=0)
        assert [model.id for model in client.models.list()] == ["m"]
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        said = process.stderr.readline()
        while "read the keys again: 1" not in said:
            said = process.stderr.readline()
            assert said
        assert [model.id for model in client.models.list()] == ["m"]  # it lives
        process.send_signal(signal.SIGTERM)  # the client is still connected, but wants nothing
        assert process.wait(10) == 0
        client.close()


@posix
def test_the_verb_refuses_to_serve_everybody(chat_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chatwright.cli", "serve", str(chat_dir), "--host=0.0.0.0", "--port=0"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "CHATWRIGHT_API_KEYS"},
        timeout=60,
    )
    assert done.returncode == 1
    assert "--insecure" in done.stderr and "Traceback" not in done.stderr
