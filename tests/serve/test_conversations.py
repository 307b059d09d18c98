"""Conversations over HTTP: kept while they are written, over restarts, and for their owner alone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatwright.commands.serve import ServeConfig
from chatwright.config import UsageError
from chatwright.serve.operation.owner import COOKIE, YEAR
from support.person import Person, text_of
from support.serving import DIALOGUES, Running, TinyModel, run_server
from support.waiting import wait_until

STORY = DIALOGUES["story"]


@pytest.fixture
def me(server: Running) -> Iterator[Person]:
    with Person(server.url) as person:
        yield person


def held_in_story(person: Person, server: Running, **more: Any) -> tuple[str, str]:
    """A conversation and the job that is held in the middle of the story."""
    server.model.engine.allow(8)
    made = person.start("story", **more)
    wait_until(lambda: server.model.engine.allowed <= 0, "eight steps")
    return made


def test_an_answer_is_kept(me: Person) -> None:
    made = me.begin("hello", system="Be kind.")
    assert (made["title"], made["system"], made["model"]) == ("hello", "Be kind.", "tiny/taught")
    me.answer(made["id"], made["leaf"])
    user, answer = me.shown(made["id"])
    assert (user["role"], user["content"]) == ("user", "hello")
    assert answer["content"] == DIALOGUES["hello"]
    assert (answer["role"], answer["finish_reason"], answer["model"]) == ("assistant", "stop", "tiny/taught")
    assert answer["tokens"] > 1
    assert answer["seconds"] > 0
    assert me.read(made["id"])["job"] is None


def test_what_the_model_is_told(me: Person, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch and the system prompt, and every one of the settings."""
    from chatwright.serve import service

    seen: list[Any] = []
    real = service.prepare

    def spy(model: Any, messages: Any, sampling: Any, **more: Any) -> Any:
        seen.append((messages, sampling))
        return real(model, messages, sampling, **more)

    monkeypatch.setattr(service, "prepare", spy)
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 5,
        "max_tokens": 3,
        "stop": ["x", "yy"],
    }
    made = me.begin("name?")
    first = me.answer(made["id"], made["leaf"])["turn"]
    told = me.post(f"/chat/conversations/{made['id']}/messages", {"parent": first["id"], "content": "hello"})
    me.answer(made["id"], told["id"], settings=settings, system="Be short.")
    messages, sampling = seen[-1]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be short."),
        ("user", "name?"),
        ("assistant", DIALOGUES["name?"]),
        ("user", "hello"),
    ]
    for name, value in settings.items():
        have = getattr(sampling, "max_new_tokens" if name == "max_tokens" else name)
        assert have == (tuple(value) if isinstance(value, list) else value), name
    found = me.read(made["id"])
    assert found["settings"] == settings
    assert found["system"] == "Be short."


def test_branches(me: Person) -> None:
    made = me.begin("hello")
    path = f"/chat/conversations/{made['id']}"
    first = me.answer(made["id"], made["leaf"])["turn"]
    again = me.answer(made["id"], made["leaf"])["turn"]
    assert first["parent"] == again["parent"] == made["leaf"]
    edited = me.post(f"{path}/messages", {"parent": None, "content": "name?"})
    me.answer(made["id"], edited["id"])
    assert [turn["content"] for turn in me.shown(made["id"])] == ["name?", DIALOGUES["name?"]]
    assert me.client.patch(path, json={"leaf": first["id"]}).status_code == 200
    assert [turn["id"] for turn in me.shown(made["id"])] == [made["leaf"], first["id"]]
    assert len(me.read(made["id"])["turns"]) == 5


def test_list_search_rename_delete(me: Person) -> None:
    made = [me.begin(f"chat {number}") for number in range(3)]
    listed = me.get("/chat/conversations")
    assert [one["title"] for one in listed["conversations"]] == ["chat 2", "chat 1", "chat 0"]
    assert not listed["more"]
    path = f"/chat/conversations/{made[0]['id']}"
    assert me.client.patch(path, json={"title": "Ähm"}).status_code == 200
    assert [one["id"] for one in me.get("/chat/conversations", search="ähm")["conversations"]] == [
        made[0]["id"]
    ]
    assert me.client.delete(path).status_code == 200
    assert me.client.get(path).status_code == 404
    assert me.client.delete(path).status_code == 404
    assert len(me.get("/chat/conversations")["conversations"]) == 2


def test_pages_of_the_list(me: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatwright.serve.conversations.PAGE", 2)
    for number in range(3):
        me.begin(f"chat {number}")
    first = me.get("/chat/conversations")
    last = first["conversations"][-1]
    assert first["more"]
    rest = me.get("/chat/conversations", before=last["updated"], before_id=last["id"])
    assert [one["title"] for one in rest["conversations"]] == ["chat 0"]
    assert not rest["more"]


def test_export(me: Person) -> None:
    made = me.begin("hello", system="Be kind.")
    answer = me.answer(made["id"], made["leaf"], system="Be kind.")["turn"]["content"]
    response = me.client.get("/chat/conversations.jsonl")
    assert "attachment" in response.headers["content-disposition"]
    (line,) = response.text.splitlines()
    assert [message["content"] for message in json.loads(line)["messages"]] == ["Be kind.", "hello", answer]


def test_another_browser_sees_nothing(me: Person, server: Running) -> None:
    conversation, job = held_in_story(me, server)
    path = f"/chat/conversations/{conversation}"
    number = me.read(conversation)["leaf"]
    with Person(server.url) as other:
        assert other.get("/chat/conversations")["conversations"] == []
        assert other.client.get("/chat/conversations.jsonl").text == ""
        own = other.begin("own")
        ask = {"model": "tiny/taught"}
        attempts = [
            other.client.get(path),
            other.client.patch(path, json={"title": "x"}),
            other.client.delete(path),
            other.client.post(f"{path}/messages", json={"parent": number, "content": "x"}),
            other.client.post(f"{path}/answers", json={"parent": number, **ask}),
            other.client.get(f"{path}/messages/{number}/tokens"),
            other.client.get(f"/chat/jobs/{job}/events"),
            other.client.post(f"/chat/jobs/{job}/stop"),
            other.client.patch(f"/chat/conversations/{own['id']}", json={"leaf": number}),
        ]
        assert [attempt.status_code for attempt in attempts] == [404] * len(attempts)
    for attempt in (httpx.get(f"{server.url}{path}"), httpx.get(f"{server.url}/chat/conversations")):
        assert (attempt.status_code, attempt.json()["error"]["code"]) == (401, "no_owner")
    server.model.engine.allow(float("inf"))
    assert text_of(me.events(job)) == STORY


def test_the_cookie(server: Running) -> None:
    made = httpx.post(f"{server.url}/chat/owner").headers["set-cookie"]
    secret, _, attributes = made.removeprefix(f"{COOKIE}=").partition(";")
    assert len(secret) == 43
    assert {part.strip().lower() for part in attributes.split(";")} == {
        "httponly",
        "samesite=strict",
        "path=/",
        f"max-age={YEAR}",
    }
    kept = httpx.post(f"{server.url}/chat/owner", headers={"cookie": f"{COOKIE}={secret}"}).headers[
        "set-cookie"
    ]
    assert secret in kept
    for bad in ("short", "x" * 44, "x" * 42 + ";"):
        changed = httpx.post(f"{server.url}/chat/owner", headers={"cookie": f"{COOKIE}={bad}"}).headers[
            "set-cookie"
        ]
        assert f"{COOKIE}={bad}" not in changed
    other_site = {"origin": "https://evil.example"}
    assert httpx.post(f"{server.url}/chat/owner", headers=other_site).status_code == 403


def test_a_stopped_answer_is_kept_as_far_as_it_came(me: Person, server: Running) -> None:
    conversation, job = held_in_story(me, server)
    running = me.read(conversation)["job"]
    assert running["id"] == job
    me.post(f"/chat/jobs/{job}/stop", {}, expect=200)
    said = text_of(me.events(job))
    answer = me.shown(conversation)[-1]
    assert (answer["content"], answer["finish_reason"]) == (said, "cancelled")
    assert 0 < len(said) < len(STORY)


def test_one_answer_at_a_time(me: Person, server: Running) -> None:
    conversation, job = held_in_story(me, server)
    turns = me.read(conversation)["turns"]
    body = {"parent": turns[0]["id"], "model": "tiny/taught"}
    assert (
        me.post(f"/chat/conversations/{conversation}/answers", body, expect=409)["error"]["code"]
        == "answering"
    )
    server.model.engine.allow(float("inf"))
    me.events(job)
    assert len(me.read(conversation)["turns"]) == 2


def test_a_failure_in_the_middle_keeps_the_beginning(
    me: Person, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("secret detail")

    conversation, job = held_in_story(me, server)
    monkeypatch.setattr(server.model.model, "hidden", broken)
    server.model.engine.allow(float("inf"))
    seen = me.events(job)
    assert seen[-1]["type"] == "error"
    assert "secret" not in json.dumps(seen[-1])
    answer = me.shown(conversation)[-1]
    assert (answer["content"], answer["finish_reason"]) == (text_of(seen), "error")
    assert seen[-1]["turn"]["content"] == answer["content"]


def test_a_deleted_conversation_stops_its_answer(me: Person, server: Running) -> None:
    conversation, job = held_in_story(me, server)
    assert me.client.delete(f"/chat/conversations/{conversation}").status_code == 200
    assert me.events(job)[-1]["type"] == "error"
    wait_until(lambda: not server.model.engine.busy, "the engine's rest")
    assert me.get("/chat/conversations")["conversations"] == []


def test_a_restart_loses_nothing(tiny: TinyModel, tmp_path: Path) -> None:
    store = str(tmp_path / "store.db")
    with run_server(tiny, store=store, drain_seconds=0.5) as server, Person(server.url) as me:
        cookies = dict(me.client.cookies)
        whole = me.begin("hello")
        me.answer(whole["id"], whole["leaf"])
        cut, job = held_in_story(me, server)
        said = text_of(events_so_far(me, job))
    with run_server(TinyModel(tiny.model, tiny.tokenizer), store=store) as server, Person(server.url) as me:
        me.client.cookies.clear()
        me.client.cookies.update(cookies)
        assert me.shown(whole["id"])[-1]["content"] == DIALOGUES["hello"]
        answer = me.shown(cut)[-1]
        assert answer["finish_reason"] == "interrupted"
        assert answer["content"].startswith(said)
        assert said


def events_so_far(person: Person, job: str) -> list[dict[str, Any]]:
    """The events that are there, up to the first text."""
    with person.client.stream("GET", f"/chat/jobs/{job}/events") as response:
        seen = []
        for line in response.iter_lines():
            if line:
                seen.append(json.loads(line))
                if seen[-1]["type"] == "text":
                    return seen
    raise AssertionError("the job has no text")


def test_a_crash_loses_a_second_at_most(tiny: TinyModel, tmp_path: Path) -> None:
    """A second server on the same file sees what a server that died would have left behind."""
    store = str(tmp_path / "store.db")
    with run_server(tiny, store=store) as server, Person(server.url) as me:
        conversation, job = held_in_story(me, server)

        def saved() -> str:
            with sqlite3.connect(store) as connection:
                (text,) = connection.execute(
                    "SELECT content FROM messages WHERE role = 'assistant'"
                ).fetchone()
            connection.close()
            return str(text)

        wait_until(saved, "the partial text in the file")
        other = TinyModel(tiny.model, tiny.tokenizer)
        with run_server(other, store=store) as second, Person(second.url) as again:
            again.client.cookies.update(dict(me.client.cookies))
            answer = again.shown(conversation)[-1]
            assert (answer["content"], answer["finish_reason"]) == (saved(), "interrupted")
            assert again.read(conversation)["job"] is None
        assert me.read(conversation)["job"]["id"] == job


def test_a_store_that_fails_does_not_lose_the_stream(
    me: Person, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatwright.feedback.store import Owned, StoreError

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Owned, "write", full)
    seen = me.events(me.start("hello")[1])
    assert text_of(seen) == DIALOGUES["hello"]
    assert seen[-1]["type"] == "error"
    assert "could not be kept: the disk is full" in seen[-1]["message"]
    monkeypatch.setattr(Owned, "page", full)
    refused = me.client.get("/chat/conversations")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")


def test_dropped_messages_are_told(me: Person) -> None:
    made = me.begin("many words " * 8)
    leaf = made["leaf"]
    for _ in range(3):
        event = me.answer(made["id"], leaf, settings={"max_tokens": 30})
        said = me.post(
            f"/chat/conversations/{made['id']}/messages",
            {"parent": event["turn"]["id"], "content": "many words " * 8},
        )
        leaf = said["id"]
    job = me.ask(made["id"], leaf, settings={"max_tokens": 4})
    begin = me.events(job["id"])[0]
    assert begin["dropped"] > 0
    assert me.shown(made["id"])[-1]["dropped"] == begin["dropped"]


def test_bad_bodies(me: Person) -> None:
    made = me.begin("hello")
    path = f"/chat/conversations/{made['id']}"
    model = {"model": "tiny/taught"}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/chat/conversations", {"content": "", **model}),
        ("/chat/conversations", {"content": "x"}),
        ("/chat/conversations", {"content": "x", **model, "settings": {"temperature": 9}}),
        ("/chat/conversations", {"content": "x", **model, "settings": {"tempreature": 1}}),
        ("/chat/conversations", {"content": "x", **model, "settings": {"stop": [""]}}),
        (f"{path}/messages", {"content": "x"}),
        (f"{path}/messages", {"parent": 1 << 70, "content": "x"}),
        (f"{path}/answers", model),
        (f"{path}/answers", {**model, "parent": made["leaf"], "continues": made["leaf"]}),
        (f"{path}/answers", {**model, "continues": made["leaf"]}),
        (f"{path}/answers", {**model, "parent": made["leaf"], "settings": {"temperature": -0.00001}}),
    ]
    for where, body in bad:
        assert me.post(where, body, expect=400)["error"]["message"], body
    surrogate = me.client.post(
        "/chat/conversations", content=b'{"content": "\\ud800", "model": "tiny/taught"}'
    )
    assert surrogate.status_code == 400
    for change in ({"title": ""}, {"title": "x" * 201}, {"leaf": 0}, {"nothing": 1}):
        assert me.client.patch(path, json=change).status_code == 400, change
    assert me.client.patch(path, json={"leaf": 999}).status_code == 404
    assert me.client.patch(path, json={"model": "none"}).status_code == 404
    answer = me.answer(made["id"], made["leaf"])["turn"]
    assert (
        "not what can be answered"
        in me.post(f"{path}/answers", {**model, "parent": answer["id"]}, expect=400)["error"]["message"]
    )


def test_a_full_store_is_said_with_the_way_out(tiny: TinyModel) -> None:
    with run_server(tiny, max_conversations=2) as server, Person(server.url) as me:
        first, second = me.begin("hello"), me.begin("name?")
        refused = me.post("/chat/conversations", {"content": "third", "model": me.model}, expect=403)["error"]
        assert refused["code"] == "store_full"
        assert "delete some" in refused["message"] and "--max_conversations" in refused["message"]
        assert me.answer(first["id"], first["leaf"])["turn"]["content"] == DIALOGUES["hello"]
        with Person(server.url) as other:
            other.begin("hello")  # each person has a limit of their own
        assert me.client.delete(f"/chat/conversations/{second['id']}").status_code == 200
        me.begin("third")


@pytest.mark.parametrize("option", ["max_owner_mb", "max_store_mb"])
def test_bytes_are_limited(tiny: TinyModel, option: str) -> None:
    with run_server(tiny, **{option: 0.01}) as server, Person(server.url) as me:
        made = me.begin("hello")
        path = f"/chat/conversations/{made['id']}"
        long = "x" * 10_000
        for refused in (
            me.post("/chat/conversations", {"content": long, "model": me.model}, expect=403),
            me.post(f"{path}/messages", {"parent": made["leaf"], "content": long}, expect=403),
            dict(me.client.patch(path, json={"system": long}).json()),
            me.post(
                f"{path}/answers", {"parent": made["leaf"], "model": me.model, "system": long}, expect=403
            ),
        ):
            assert refused["error"]["code"] == "store_full" and f"--{option}" in refused["error"]["message"]
        found = me.read(made["id"])
        assert len(found["turns"]) == 1 and found["leaf"] == made["leaf"] and not found["system"]


def test_quota_settings_that_make_no_sense() -> None:
    for name in ("max_conversations", "max_owner_mb", "max_store_mb"):
        with pytest.raises(UsageError, match=f"--{name} -1"):
            ServeConfig(**{name: -1})
