"""The page's routes: jobs and their events, rendering, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from serving import DIALOGUES, MARKDOWN, Running, TinyModel

from chatwright.chat import Message
from chatwright.generate.sampling import Sampling
from chatwright.generate.threads import EngineThread
from chatwright.serve.jobs import JobStore
from chatwright.serve.markdown import render
from chatwright.serve.service import Busy, ChatService

Event = dict[str, Any]


def start(server: Running, text: str, **settings: Any) -> str:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0.0, **settings}
    response = httpx.post(f"{server.url}/chat/jobs", json=body)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def events(server: Running, job: str, after: int = 0) -> list[Event]:
    response = httpx.get(f"{server.url}/chat/jobs/{job}/events", params={"after": after}, timeout=30)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines() if line]


def text_of(events: list[Event]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text")


def test_events_are_numbered_and_end_with_done(server: Running) -> None:
    seen = events(server, start(server, "hello"))
    assert text_of(seen) == DIALOGUES["hello"]
    assert [event["n"] for event in seen] == sorted({event["n"] for event in seen})
    assert seen[-1]["type"] == "done"
    assert seen[-1]["html"] == f"<p>{DIALOGUES['hello']}</p>\n"
    assert seen[-1]["finish_reason"] == "stop"
    assert seen[-1]["tokens"] > 1


def test_a_lost_follower_goes_on_where_it_was(server: Running, wait_until: Callable[..., None]) -> None:
    engine = server.model.engine
    engine.allow(6)
    job = start(server, "story")
    with httpx.stream("GET", f"{server.url}/chat/jobs/{job}/events") as response:
        first = json.loads(next(line for line in response.iter_lines() if line))
    wait_until(lambda: engine.allowed <= 0, "six steps")
    assert engine.active == 1, "the answer must go on without the page"
    engine.allow(float("inf"))
    rest = events(server, job, after=first["n"])
    assert first["text"] + text_of(rest) == DIALOGUES["story"]
    assert text_of(events(server, job)) == DIALOGUES["story"]  # and again from the start, after the end
    assert [event["type"] for event in events(server, job)] == ["text", "done"]  # missed text comes at once
    assert [event["type"] for event in events(server, job, after=rest[-1]["n"] - 1)] == ["done"]


def test_stop_keeps_what_there_is(server: Running, wait_until: Callable[..., None]) -> None:
    engine = server.model.engine
    engine.allow(6)
    job = start(server, "story")
    wait_until(lambda: engine.allowed <= 0, "six steps")
    assert httpx.post(f"{server.url}/chat/jobs/{job}/stop").status_code == 200
    seen = events(server, job)
    assert seen[-1]["finish_reason"] == "cancelled"
    assert text_of(seen)
    assert DIALOGUES["story"].startswith(text_of(seen))
    assert len(text_of(seen)) < len(DIALOGUES["story"])


def test_unknown_jobs_and_bad_bodies(server: Running) -> None:
    assert httpx.get(f"{server.url}/chat/jobs/none/events").json()["error"]["code"] == "job_not_found"
    assert httpx.post(f"{server.url}/chat/jobs/none/stop").status_code == 404
    for body in ({}, {"messages": []}, {"messages": [{"role": "user", "content": "x"}], "temperature": 9}):
        assert httpx.post(f"{server.url}/chat/jobs", json=body).status_code == 400
    long = {"messages": [{"role": "user", "content": "long " * 400}]}
    refused = httpx.post(f"{server.url}/chat/jobs", json=long)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    other_site = {"origin": "https://evil.example"}
    assert httpx.post(f"{server.url}/chat/jobs", json=long, headers=other_site).status_code == 403


def test_the_page_is_told_how_much_was_dropped(server: Running) -> None:
    turns = [{"role": role, "content": "many words " * 8} for _ in range(6) for role in ("user", "assistant")]
    body = {"messages": [*turns, {"role": "user", "content": "hello"}], "max_tokens": 4}
    assert httpx.post(f"{server.url}/chat/jobs", json=body).json()["dropped"] > 0


def test_a_failing_model_ends_the_job_with_an_error(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr(server.model.model, "hidden", broken)
    (event,) = events(server, start(server, "hello"))
    assert event["type"] == "error"
    assert "secret" not in event["message"]


def test_headers_of_the_page(server: Running) -> None:
    page = httpx.get(f"{server.url}/")
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
    from serving import run_server

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


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def with_jobs(tiny: TinyModel, check: Callable[[ChatService], Any]) -> None:
    async def main() -> None:
        with EngineThread(tiny.engine) as engine:
            try:
                await check(ChatService(tiny, engine, name="tiny"))
            finally:
                tiny.engine.allow(float("inf"))  # a held engine could not be closed

    asyncio.run(main())


def story() -> tuple[list[Message], Sampling]:
    return [Message(role="user", content="story")], Sampling(temperature=0.0, max_new_tokens=100)


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true")


def test_a_job_that_nobody_follows_is_cancelled(tiny: TinyModel) -> None:
    tiny.engine.allow(5)

    async def check(service: ChatService) -> None:
        jobs = JobStore(render, unfollowed_seconds=0.05)
        job = jobs.start(service, await service.prepare(*story()))
        await eventually(lambda: job.finished)
        assert job.events[-1]["finish_reason"] == "cancelled"
        assert tiny.engine.steps < 10

    with_jobs(tiny, check)


def test_a_follower_keeps_a_job_alive_and_is_kept_alive(tiny: TinyModel) -> None:
    tiny.engine.allow(3)

    async def check(service: ChatService) -> None:
        jobs = JobStore(render, unfollowed_seconds=0.05, heartbeat_seconds=0.02)
        job = jobs.start(service, await service.prepare(*story()))
        lines = []
        beats = 0
        async for line in jobs.follow(job, 0):
            if line == b"\n":
                beats += 1
                if beats == 10:  # four times as long as an unfollowed job lives
                    tiny.engine.allow(float("inf"))
                continue
            lines.append(json.loads(line))
        assert beats >= 10
        assert lines[-1]["finish_reason"] == "stop"

    with_jobs(tiny, check)


def test_jobs_are_bounded_in_number_and_age(tiny: TinyModel) -> None:
    async def check(service: ChatService) -> None:
        jobs = JobStore(render, max_jobs=2, keep_seconds=0.1)
        prepared = await service.prepare(*story())
        first = jobs.start(service, prepared)
        await eventually(lambda: first.finished)
        tiny.engine.allow(0)
        second, third = jobs.start(service, prepared), jobs.start(service, prepared)  # the finished one makes room
        assert jobs.get(first.id) is None
        with pytest.raises(Busy):
            jobs.start(service, prepared)
        tiny.engine.allow(float("inf"))
        await eventually(lambda: second.finished and third.finished)
        await eventually(lambda: jobs.get(second.id) is None and jobs.get(third.id) is None)

    with_jobs(tiny, check)


def test_seeds_of_several_answers_differ(tiny: TinyModel) -> None:
    from chatwright.serve.service import prepare

    messages, sampling = story()
    prepared = prepare(tiny, messages, replace(sampling, seed=3), answers=2)
    assert [request.sampling.seed for request in prepared.requests] == [3, 4]
