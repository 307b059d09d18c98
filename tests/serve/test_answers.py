"""Completions over HTTP: going on, coming to nothing, other models, probabilities."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chatwright.language_model import LanguageModel
from support.person import Person, text_of
from support.serving import DIALOGUES, Running, TinyModel, run_server
from support.waiting import wait_until

STORY = DIALOGUES["story"]


@pytest.fixture
def me(server: Running) -> Iterator[Person]:
    with Person(server.url) as person:
        yield person


def test_an_answer_can_go_on(me: Person) -> None:
    made = me.begin("story")
    cut = me.answer(made["id"], made["leaf"], settings={"max_tokens": 12})["turn"]
    assert cut["finish_reason"] == "length"
    path = f"/chat/conversations/{made['id']}/answers"
    body = {"continues": cut["id"], "model": "tiny/taught", "settings": {"temperature": 0.0}}
    job = me.post(path, body)
    seen = me.events(job["id"])
    assert cut["content"] + text_of(seen) == STORY
    assert seen[-1]["turn"]["id"] == cut["id"]
    assert seen[-1]["turn"]["tokens"] > cut["tokens"]
    (_, answer) = me.shown(made["id"])
    assert (answer["content"], answer["finish_reason"]) == (STORY, "stop")
    me.post(f"/chat/conversations/{made['id']}/messages", {"parent": cut["id"], "content": "hello"})
    assert "can go on" in me.post(path, body, expect=400)["error"]["message"]


def test_an_answer_that_cannot_go_on_stays_as_it_was(
    me: Person, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = me.begin("story")
    cut = me.answer(made["id"], made["leaf"], settings={"max_tokens": 12})["turn"]
    monkeypatch.setattr(server.model, "template", None)
    body = {"continues": cut["id"], "model": "tiny/taught"}
    event = me.events(me.post(f"/chat/conversations/{made['id']}/answers", body)["id"])[-1]
    assert event["type"] == "error"
    assert "base model" in event["message"]
    assert (event["turn"]["content"], event["turn"]["finish_reason"]) == (cut["content"], "length")
    assert me.shown(made["id"])[-1]["content"] == cut["content"]


@pytest.mark.parametrize("fails", ["too long", "no template", "crash"])
def test_an_answer_that_came_to_nothing_leaves_nothing(
    me: Person, server: Running, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    made = me.begin("hello")
    first = me.answer(made["id"], made["leaf"])["turn"]
    if fails == "too long":
        long = me.post(
            f"/chat/conversations/{made['id']}/messages", {"parent": first["id"], "content": "long " * 400}
        )
        event, leaf = me.answer(made["id"], long["id"]), long["id"]
        assert "too long" in event["message"]
    else:
        name, value = {"no template": ("template", None), "crash": ("encode_chat", None)}[fails]
        monkeypatch.setattr(server.model, name, value)
        event, leaf = me.answer(made["id"], made["leaf"]), first["id"]  # the answer of before is shown again
    assert event["type"] == "error"
    assert me.read(made["id"])["leaf"] == leaf


def test_another_model_is_loaded_when_it_is_asked_for(tiny: TinyModel, small: LanguageModel) -> None:
    gate = threading.Event()

    def load(_: Any) -> LanguageModel:
        assert gate.wait(20)
        return small

    with run_server(tiny, models=["small=somewhere"], loader=load) as server, Person(server.url) as me:
        made = me.begin("hello")
        job = me.ask(made["id"], made["leaf"], model="small", settings={"max_tokens": 3})
        assert me.read(made["id"])["job"]["id"] == job["id"]
        gate.set()
        seen = me.events(job["id"])
        assert seen[0] == {"n": 1, "type": "loading", "model": "small"}
        assert (seen[1]["type"], seen[1]["model"]) == ("begin", "small")
        assert seen[-1]["turn"]["model"] == "small"
        assert me.read(made["id"])["model"] == "small"
        assert me.post("/chat/conversations", {"content": "x", "model": "none"}, expect=404)


def test_stop_does_not_wait_for_a_model(tiny: TinyModel, small: LanguageModel) -> None:
    gate = threading.Event()

    def load(_: Any) -> LanguageModel:
        assert gate.wait(20)
        return small

    with run_server(tiny, models=["small=somewhere"], loader=load) as server, Person(server.url) as me:
        made = me.begin("hello")
        job = me.ask(made["id"], made["leaf"], model="small")
        me.post(f"/chat/jobs/{job['id']}/stop", {}, expect=200)
        assert me.events(job["id"])[-1]["turn"]["finish_reason"] == "cancelled"
        gate.set()
        wait_until(lambda: me.get("/chat/models")["models"][1]["loaded"], "the model in memory")
        place = server.app.state.pool._entries["small"]
        wait_until(lambda: place.users == 0, "the model is let go")


def test_a_model_that_cannot_be_loaded(tiny: TinyModel) -> None:
    with run_server(tiny, models=["lost=/no/such/model"]) as server, Person(server.url) as me:
        made = me.begin("hello")
        event = me.answer(made["id"], made["leaf"], model="lost")
        assert event["type"] == "error"
        assert "/no/such/model" in event["message"]


def test_token_probabilities(me: Person) -> None:
    made = me.begin("snowman")
    job = me.ask(made["id"], made["leaf"], probabilities=True)
    seen = me.events(job["id"])
    texts = [event for event in seen if event["type"] == "text"]
    tokens = [token for event in texts for token in event["tokens"]]
    assert "".join(token["text"] for token in tokens) == text_of(seen) == DIALOGUES["snowman"]
    assert "☃" in {token["text"].strip() for token in tokens}
    for token in tokens:
        shares = [one["p"] for one in token["alternatives"]]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert math.fsum(shares) <= 1.001
        if token["alternatives"][0]["text"] == token["text"]:  # else a character of several tokens
            assert token["p"] == shares[0]  # greedy: the likeliest was taken
    assert tokens[0]["alternatives"][0]["text"] == tokens[0]["text"]
    assert tokens[0]["p"] == tokens[0]["alternatives"][0]["p"]
    turn = seen[-1]["turn"]
    assert turn["has_probabilities"]
    path = f"/chat/conversations/{made['id']}/messages/{turn['id']}/tokens"
    assert me.get(path)["tokens"] == tokens
    plain = me.answer(made["id"], made["leaf"])["turn"]
    assert not plain["has_probabilities"]
    assert me.get(f"/chat/conversations/{made['id']}/messages/{plain['id']}/tokens")["tokens"] is None


@pytest.mark.parametrize("first", [True, False])
def test_probabilities_of_an_answer_that_goes_on(me: Person, first: bool) -> None:
    """Where they were not asked for, the text stands as one token without a probability."""
    made = me.begin("story")
    cut = me.answer(made["id"], made["leaf"], settings={"max_tokens": 12}, probabilities=first)["turn"]
    body = {
        "continues": cut["id"],
        "model": "tiny/taught",
        "settings": {"temperature": 0.0},
        "probabilities": not first,
    }
    seen = me.events(me.post(f"/chat/conversations/{made['id']}/answers", body)["id"])
    tokens = me.get(f"/chat/conversations/{made['id']}/messages/{cut['id']}/tokens")["tokens"]
    assert "".join(token["text"] for token in tokens) == STORY == seen[-1]["turn"]["content"]
    known = [token["p"] is not None for token in tokens]
    assert known[0] is first
    assert known[-1] is not first


def test_a_burst_of_answers_keeps_to_the_limit(tiny: TinyModel) -> None:
    """Who is let in is answered, and who is not is told at once: the model is asked a moment after both."""
    with run_server(tiny, max_requests=3) as server, Person(server.url) as me:
        (service,) = server.app.state.pool.services
        most, real = [0], service.engine.submit

        def counted(*args: Any, **more: Any) -> Any:
            handle = real(*args, **more)
            most[0] = max(most[0], tiny.engine.waiting + tiny.engine.active)
            return handle

        service.engine.submit = counted  # type: ignore[method-assign]
        made = [me.begin("hello") for _ in range(10)]
        tiny.engine.allow(0)

        async def burst() -> list[httpx.Response]:
            async with httpx.AsyncClient(
                base_url=server.url, cookies=dict(me.client.cookies), timeout=30
            ) as client:
                asks = [
                    client.post(
                        f"/chat/conversations/{one['id']}/answers",
                        json={"parent": one["leaf"], "model": me.model},
                    )
                    for one in made
                ]
                return await asyncio.gather(*asks)

        responses = asyncio.run(burst())
        assert sorted(one.status_code for one in responses) == [201] * 3 + [429] * 7
        assert all("retry-after" in one.headers for one in responses if one.status_code == 429)
        wait_until(lambda: service.running == 3, "the three answers")
        assert most[0] == 3
        tiny.engine.allow(float("inf"))
        for one, response in zip(made, responses, strict=True):
            if response.status_code == 201:
                assert me.events(response.json()["id"])[-1]["type"] == "done"
            else:
                assert len(me.read(one["id"])["turns"]) == 1  # no place was made for an answer
        assert (service.running, service._preparing) == (0, 0)


def test_a_place_that_came_to_nothing_is_free_again(tiny: TinyModel) -> None:
    with run_server(tiny, max_requests=1) as server, Person(server.url) as me:
        made = me.begin("hello")
        path = f"/chat/conversations/{made['id']}/answers"
        me.post(path, {"parent": 999, "model": me.model}, expect=404)
        long = me.post(
            f"/chat/conversations/{made['id']}/messages", {"parent": made["leaf"], "content": "long " * 400}
        )
        assert me.answer(made["id"], long["id"])["type"] == "error"
        assert me.answer(made["id"], made["leaf"])["turn"]["content"] == DIALOGUES["hello"]


def test_those_who_wait_for_a_model_are_limited(tiny: TinyModel, small: LanguageModel) -> None:
    gate = threading.Event()

    def load(_: Any) -> LanguageModel:
        assert gate.wait(20)
        return small

    with (
        run_server(tiny, models=["small=somewhere"], loader=load, max_requests=2) as server,
        Person(server.url) as me,
    ):
        made = [me.begin("hello") for _ in range(3)]
        settings = {"temperature": 0.0, "max_tokens": 3}
        jobs = [me.ask(one["id"], one["leaf"], model="small", settings=settings)["id"] for one in made[:2]]
        body = {"parent": made[2]["leaf"], "model": "small"}
        refused = me.post(f"/chat/conversations/{made[2]['id']}/answers", body, expect=429)
        assert "wait for small to be loaded" in refused["error"]["message"]
        gate.set()
        assert [me.events(job)[-1]["type"] for job in jobs] == ["done", "done"]
