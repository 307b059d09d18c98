"""Limits, time limits, other sites, readiness."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatwright.chat import Message
from chatwright.commands.serve import ServeConfig
from chatwright.config import UsageError, UserError
from chatwright.generate.sampling import Sampling
from chatwright.generate.threads import EngineThread
from chatwright.language_model import LanguageModel
from chatwright.model.gpt import GPT
from chatwright.serve.operation.cors import check_origins
from chatwright.serve.operation.keys import line_for
from chatwright.serve.operation.request_context import TimedOut
from chatwright.serve.pool import ModelPool, Spec
from chatwright.serve.service import Busy, ChatService, Limits, TooLong, prepare
from chatwright.tokenizer import Tokenizer
from support.asking import HELLO, STORY, STORY_TEXT, events, post, reasons_of, text_of
from support.person import Person
from support.serving import DIALOGUES, Running, TinyModel, run_server
from support.waiting import wait_until

# ---- limits ------------------------------------------------------------------------------------------------


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
        lengths = httpx.post(
            f"{server.url}/v1/embeddings", json={"model": "tiny/taught", "input": ["a", "word " * 50]}
        )
        assert (lengths.status_code, lengths.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_limits_hold_whoever_prepared_the_answer(tiny: TinyModel) -> None:
    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(
                tiny, engine, name="tiny", limits=Limits(max_new_tokens=3, max_prompt_tokens=40)
            )
            talk = [Message(role="user", content="story")]
            pieces = [
                piece async for _, piece in service.answer(prepare(tiny, talk, Sampling(max_new_tokens=99)))
            ]
            assert sum(len(piece.ids) for piece in pieces) == 3
            with pytest.raises(TooLong):
                service.answer(prepare(tiny, [Message(role="user", content="word " * 50)], Sampling()))

    asyncio.run(check())


def test_settings_that_make_no_sense() -> None:
    for name, value in (
        ("max_body", 100),
        ("max_new_tokens", -1),
        ("max_prompt_tokens", -1),
        ("timeout", -1.0),
        ("timeout", float("inf")),
        ("drain_seconds", float("nan")),
    ):
        with pytest.raises(UsageError, match=f"--{name}"):
            ServeConfig(**{name: value})  # type: ignore[arg-type]


def test_retry_after_is_when_places_will_be_free(tiny: TinyModel) -> None:
    """Mean time of an answer x places that are lacking / answers under way, in whole seconds, between 1 and
    60."""

    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(max_requests=40))
            assert service.retry_after() == 1  # nothing is known yet
            prepared = await service.prepare(
                [Message(role="user", content="story")], Sampling(max_new_tokens=200), answers=40
            )
            service._seconds = 30.0
            tiny.engine.allow(0)
            answer = service.answer(prepared)
            assert service.running == 40
            for answers, seconds in ((1, 1), (4, 3), (8, 6)):  # one leaves every 30 s / 40
                with pytest.raises(Busy) as refused:
                    await service.prepare(
                        [Message(role="user", content="story")], Sampling(), answers=answers
                    )
                assert refused.value.retry_after == seconds
            service._seconds = 10_000.0
            assert service.retry_after() == 60
            answer.cancel()
            tiny.engine.allow(float("inf"))
            async for _ in answer:
                pass
            service._seconds = 0.0
            before = time.monotonic()
            async for _ in service.answer(
                await service.prepare([Message(role="user", content="hello")], Sampling(temperature=0.0))
            ):
                pass
            assert 0 < service._seconds <= time.monotonic() - before

    asyncio.run(check())


def test_many_at_the_same_moment_are_counted(tiny: TinyModel) -> None:
    """All of them are still being encoded when the last comes."""

    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(max_requests=3))
            talk = [Message(role="user", content="hello")]
            done = await asyncio.gather(
                *(service.prepare(talk, Sampling()) for _ in range(8)), return_exceptions=True
            )
            assert sum(isinstance(one, Busy) for one in done) == 5
            await service.prepare(talk, Sampling(), answers=3)  # places that were not taken are free again

    asyncio.run(check())


def test_embeddings_and_scoring_take_up_places_and_time(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They compute beside the engine; as many as anybody likes would keep everybody else waiting."""
    gate = threading.Event()

    def held(*_: Any, **__: Any) -> Any:
        assert gate.wait(20)
        raise UserError("let go")

    monkeypatch.setattr(LanguageModel, "embed", held)
    monkeypatch.setattr("chatwright.generate.scoring.score_texts", held)
    vectors = ("/v1/embeddings", {"model": "tiny/taught", "input": "hello"})
    scores = (
        "/v1/completions",
        {"model": "tiny/taught", "prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 0},
    )

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
            server.app.state.pool.services[0].limits = replace(
                server.app.state.pool.services[0].limits, timeout=0.2
            )
            asyncio.get_running_loop().call_later(
                1.0, gate.set
            )  # a place is held until its computation ends, late or not
            late = await client.post(vectors[0], json=vectors[1])
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")

    with run_server(tiny, max_requests=2) as server:
        asyncio.run(check(server))


# ---- time limits -------------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long(tiny: TinyModel) -> None:
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


def test_an_answer_in_time_is_not_cut(tiny: TinyModel) -> None:
    """The alarm of an answer that has ended rings for nobody, even when it is read late."""

    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(timeout=0.4))
            answer = service.answer(
                await service.prepare([Message(role="user", content="hello")], Sampling(temperature=0.0))
            )
            while service.running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            assert "".join([piece.text async for _, piece in answer]) == DIALOGUES["hello"]

    asyncio.run(check())


def test_time_is_up_although_nobody_reads(tiny: TinyModel) -> None:
    async def check() -> None:
        with EngineThread(tiny.engine) as engine:
            service = ChatService(tiny, engine, name="tiny", limits=Limits(timeout=0.2))
            tiny.engine.allow(3)
            answer = service.answer(
                await service.prepare([Message(role="user", content="story")], Sampling(temperature=0.0))
            )
            try:
                end = time.monotonic() + 10
                while service.running:
                    assert time.monotonic() < end, "the place is not free"
                    await asyncio.sleep(0.01)
            finally:
                tiny.engine.allow(float("inf"))  # a held engine could not be closed
            with pytest.raises(TimedOut):
                async for _ in answer:
                    pass

    asyncio.run(check())


def test_a_request_waits_in_the_queue_no_longer_either(tiny: TinyModel) -> None:
    with run_server(tiny, timeout=0.5) as server:
        tiny.engine.allow(0)  # it does a step for whoever leaves, and no other
        begun, made = time.monotonic(), tiny.engine.stats.new_tokens
        assert post(server, STORY).status_code == 504
        assert time.monotonic() - begun < 5
        wait_until(lambda: tiny.engine.waiting == 0 and tiny.engine.active == 0, "the queue to be empty")
        assert tiny.engine.stats.new_tokens == made, "it had a place"


# ---- pages of other sites ----------------------------------------------------------------------------------


def test_cors_is_for_those_listed_and_the_interface(tiny: TinyModel, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", "k" * 40))
    ours, other = "http://localhost:3000", "http://localhost:3001"
    chat = "/v1/chat/completions"
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    with run_server(tiny, cors_origins=[f"{ours}/"], api_keys=str(keys)) as server:
        good = httpx.options(f"{server.url}{chat}", headers={"origin": ours, **ask})
        assert good.status_code == 204
        assert good.headers["access-control-allow-origin"] == ours
        assert "POST" in good.headers["access-control-allow-methods"]
        assert good.headers["access-control-allow-headers"] == ask["access-control-request-headers"]
        assert good.headers["vary"].lower() == "origin"
        for path, origin in (
            (chat, other),
            (chat, "null"),
            ("/chat/jobs", ours),
            ("/", ours),
            ("/metrics", ours),
            ("/v1x", ours),
        ):
            bad = httpx.options(f"{server.url}{path}", headers={"origin": origin, **ask})
            assert bad.status_code >= 400
            assert not [name for name in bad.headers if name.startswith("access-control")], path
        key = {"authorization": f"Bearer {'k' * 40}"}
        answer = post(server, HELLO, headers={"origin": ours, **key})
        assert answer.json()["choices"][0]["message"]["content"] == DIALOGUES["hello"]
        assert answer.headers["access-control-allow-origin"] == ours
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        for refused in (
            post(server, HELLO, headers={"origin": ours}),
            post(server, {}, headers={"origin": ours, **key}),
        ):
            assert refused.status_code in (400, 401)
            assert refused.headers["access-control-allow-origin"] == ours  # or the page could not read why
        foreign = post(server, HELLO, headers={"origin": other, **key})
        assert foreign.status_code == 403 and "access-control-allow-origin" not in foreign.headers
        page = httpx.post(f"{server.url}/chat/jobs", json={}, headers={"origin": ours, **key})
        assert page.status_code == 403 and "access-control-allow-origin" not in page.headers
        strange = httpx.options(
            f"{server.url}{chat}", headers={"origin": ours, **ask, "access-control-request-headers": "a\tb;c"}
        )
        assert strange.headers["access-control-allow-headers"] == "authorization, content-type"


def test_origins() -> None:
    given = ["https://A.example", "http://x:80/", "https://x:443", "http://x:8080", "http://[::1]:3000"]
    assert check_origins(given) == [
        "https://a.example",
        "http://x",
        "https://x",
        "http://x:8080",
        "http://[::1]:3000",
    ]
    for bad in (
        "*",
        "x.example",
        "ftp://x",
        "https://x/path",
        "https://u@x",
        "https://x?y",
        "http://[",
        "http://x:y",
        "null",
    ):
        with pytest.raises(UsageError, match="--cors_origins"):
            check_origins([bad])


# ---- readiness ---------------------------------------------------------------------------------------------


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
            assert (
                await client.post("/v1/chat/completions", json={**HELLO, "model": "a"})
            ).status_code == 200
            assert await ready() == (200, "")
            app.state.lifecycle.draining = True
            assert await ready() == (503, "the server is stopping")
            assert (await client.get("/health")).json()["status"] == "ok"
            pool.services[0].engine.close()
            assert (
                (await client.get("/health")).status_code,
                (await client.get("/health")).json()["status"],
            ) == (503, "failed")

    asyncio.run(check())
    pool.close()
