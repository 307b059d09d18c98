"""The access log: what is in a line, what never is, and what becomes of it when it cannot be written."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatwright.commands.serve import ServeConfig
from chatwright.config import UsageError, UserError
from chatwright.serve.operation.access_log import AccessLog
from chatwright.serve.operation.keys import line_for
from support.person import Person
from support.serving import DIALOGUES, Running, TinyModel, run_server
from support.waiting import wait_until

BODY = {"model": "tiny/taught", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
KEY = "cw-" + "k" * 43


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "access.jsonl"


@pytest.fixture
def logged(tiny: TinyModel, log: Path) -> Iterator[Running]:
    with run_server(tiny, access_log=str(log)) as running:
        yield running


def lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The log's lines, once there are `count`."""
    text = wait_until(
        lambda: text if path.exists() and (text := path.read_text()).count("\n") >= count else "",
        f"{count} lines in the log",
    )
    found = [json.loads(line) for line in text.splitlines()]
    assert len(found) == count, text
    return found


def post(server: Running, change: Any = None, **settings: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions", json={**BODY, **(change or {})}, timeout=30, **settings
    )


def test_a_line_says_what_an_operator_asks(logged: Running, log: Path) -> None:
    sent = post(logged, headers={"x-request-id": "trace-1/a:b"})
    usage = sent.json()["usage"]
    (line,) = lines(log, 1)
    assert sent.headers["x-request-id"] == line["request_id"] == "trace-1/a:b"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert 0 < line["ttft_ms"] <= line["duration_ms"] < 30_000
    rest = {
        name: value
        for name, value in line.items()
        if name not in ("time", "request_id", "ttft_ms", "duration_ms")
    }
    assert rest == {
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "client": "127.0.0.1",
        "key": None,
        "model": "tiny/taught",
        "stream": False,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": 0,
        "completion_tokens": usage["completion_tokens"],
        "finish_reason": "stop",
    }


def test_streams_several_answers_and_cached_prompts(logged: Running, log: Path) -> None:
    usage = post(logged, {"max_tokens": 3}).json()["usage"]
    post(logged, {"stream": True, "n": 2, "max_tokens": 3})
    line = lines(log, 2)[1]
    assert line["stream"] is True
    assert line["finish_reason"] == "length,length"
    assert line["completion_tokens"] == 6
    assert line["prompt_tokens"] == usage["prompt_tokens"]  # counted once, as in the answer's own usage
    assert line["cached_tokens"] == usage["prompt_tokens"] - 1


def test_refused_requests_are_logged_too(logged: Running, log: Path) -> None:
    for change in ({"model": "other"}, {"messages": []}):
        post(logged, change)
    httpx.get(f"{logged.url}/v1/nothing?token=secret")
    httpx.get(f"{logged.url}/health", headers={"host": "evil.example"})
    found = lines(log, 4)
    assert [(line["status"], line["model"], line["ttft_ms"]) for line in found] == [
        (404, None, None),
        (400, None, None),
        (404, None, None),
        (403, None, None),
    ]
    assert found[2]["path"] == "/v1/nothing"
    assert "secret" not in log.read_text()
    assert len({line["request_id"] for line in found}) == 4


def test_ids_of_requests(logged: Running, log: Path) -> None:
    """A client's id is taken over if nothing can go wrong with it; every answer has one, errors included."""
    for given in ("x" * 129, "a b", 'a"b', "", "é"):
        response = httpx.get(f"{logged.url}/health", headers={"x-request-id": given.encode("latin-1")})
        assert re.fullmatch(r"req-[0-9a-f]{24}", response.headers["x-request-id"])
    for response in (
        httpx.get(f"{logged.url}/nothing"),
        post(logged, {"model": "x"}),
        httpx.get(f"{logged.url}/health", headers={"host": "evil.example"}),
        httpx.post(f"{logged.url}/v1/chat/completions", content=b"x" * (2 << 20)),
    ):
        assert response.status_code >= 400
        assert response.headers["x-request-id"]


def test_a_crash_is_a_line_an_id_and_a_clean_answer(
    logged: Running, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr(logged.app.state.pool, "check", broken)
    monkeypatch.setattr("chatwright.serve.pool.ModelPool.created", broken)
    response = httpx.get(f"{logged.url}/v1/models")
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    (line,) = lines(log, 1)
    assert (line["status"], line["request_id"]) == (500, response.headers["x-request-id"])


def test_who_used_which_key(tiny: TinyModel, log: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", KEY))
    with run_server(tiny, access_log=str(log), api_keys=str(keys)) as server:
        post(server, headers={"authorization": f"Bearer {KEY}"})
        post(server, headers={"authorization": "Bearer cw-wrong"})
        httpx.post(f"{server.url}/login", data={"key": KEY})
        assert [(line["key"], line["status"]) for line in lines(log, 3)] == [
            ("anna", 200),
            (None, 401),
            (None, 303),
        ]
    assert KEY not in log.read_text() and "cw-wrong" not in log.read_text()


def test_no_text_is_logged(logged: Running, log: Path) -> None:
    post(logged)
    post(logged, {"stream": True})
    post(logged, {"messages": [{"role": "wizard", "content": "hello"}]})
    with Person(logged.url) as person:
        person.events(person.start("hello")[1])
    lines(log, 7)
    text = log.read_text()
    assert "hello" not in text and "Hello" not in text and "friend" not in text
    assert "prompts" not in text


def test_answers_on_the_page_are_counted(tiny: TinyModel, log: Path) -> None:
    """The line of the request that asked for the answer has what a line of the interface has, once the answer
    is there."""
    with run_server(tiny, access_log=str(log), log_prompts=True) as server, Person(server.url) as person:
        usage = post(server).json()["usage"]
        first = person.begin("hello")
        turn = person.answer(first["id"], first["leaf"])["turn"]
        found = {line["path"]: line for line in lines(log, 5)}
        line = found[f"/chat/conversations/{first['id']}/answers"]
        assert (line["method"], line["status"], line["model"], line["finish_reason"]) == (
            "POST",
            201,
            "tiny/taught",
            "stop",
        )
        assert line["prompt_tokens"] == usage["prompt_tokens"] and line["cached_tokens"] > 0
        assert line["completion_tokens"] == usage["completion_tokens"] == turn["tokens"]
        assert 0 < line["ttft_ms"] <= line["duration_ms"]
        assert "hello" in line["prompts"][0] and line["answers"] == [DIALOGUES["hello"]]
        counts = [one["completion_tokens"] for one in found.values() if one["path"].startswith("/chat/")]
        assert sorted(counts) == [0, 0, 0, turn["tokens"]]  # who adds up the lines counts each answer once


def test_a_stopped_answer_on_the_page_is_counted_as_far_as_it_came(logged: Running, log: Path) -> None:
    engine = logged.model.engine
    engine.allow(5)
    with Person(logged.url) as person:
        _, job = person.start("story")
        wait_until(lambda: engine.allowed <= 0, "five steps")
        assert len(lines(log, 2)) == 2  # the answer's own line is not there yet
        person.post(f"/chat/jobs/{job}/stop", {}, expect=200)
        person.events(job)
        (line,) = [one for one in lines(log, 5) if one["path"].endswith("/answers")]
    assert (line["finish_reason"], line["status"]) == ("cancelled", 201)
    assert 0 < line["completion_tokens"] <= 6


def test_texts_are_logged_when_asked_for(tiny: TinyModel, log: Path) -> None:
    with run_server(tiny, access_log=str(log), log_prompts=True) as server:
        post(server)
        post(server, {"stream": True, "messages": [{"role": "user", "content": "snowman"}]})
        httpx.get(f"{server.url}/health")
        first, second, third = lines(log, 3)
    assert "hello" in first["prompts"][0] and first["answers"] == [DIALOGUES["hello"]]
    assert "snowman" in second["prompts"][0] and second["answers"] == [DIALOGUES["snowman"]]
    assert "prompts" not in third
    with pytest.raises(UsageError, match="--access_log as well"):
        ServeConfig(log_prompts=True)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(logged: Running, log: Path, stream: bool) -> None:
    engine = logged.model.engine
    engine.allow(5)
    body = {**BODY, "messages": [{"role": "user", "content": "story"}], "stream": stream}
    timeout = httpx.Timeout(5, read=0.5)
    if stream:
        with httpx.stream("POST", f"{logged.url}/v1/chat/completions", json=body, timeout=30) as response:
            chunks = response.iter_bytes()  # kept: throwing it away would close the connection
            assert next(chunks)
            wait_until(lambda: engine.allowed <= 0, "five steps")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{logged.url}/v1/chat/completions", json=body, timeout=timeout)
    (line,) = lines(log, 1)
    assert (line["status"], line["finish_reason"]) == (200 if stream else 499, "cancelled")
    assert 0 < line["completion_tokens"] <= 6


# ---- the file ----------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--access_log .*: No such file"):
        AccessLog(str(tmp_path / "no" / "log"))


def test_lines_are_added_to_logs_only(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious\n")
    with pytest.raises(UserError, match=r"notes\.txt is no access log, and would get lines of one"):
        AccessLog(str(notes))
    assert notes.read_text() == "precious\n"
    notes.write_text('{"time": 1}\n')
    AccessLog(str(notes)).close()


def test_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    log = AccessLog("-")
    log.write({"a": "é\ud800"})
    log.close()
    assert json.loads(capfd.readouterr().err) == {"a": "é\ud800"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_costs_lines_and_no_answers(tiny: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    with run_server(tiny, access_log="/dev/full") as server:
        for _ in range(3):
            assert post(server).status_code == 200
    errors = [entry.message for entry in caplog.records if entry.levelno == logging.ERROR]
    assert len(errors) == 1 and "No space left" in errors[0]


def test_after_a_full_disk_the_log_goes_on_with_whole_lines(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, space = os.write, [25]  # the first line fits, of the second a part

    def write(file: int, data: bytes) -> int:
        if space and len(data) > space[0]:
            if not space[0]:
                raise OSError(28, "No space left on device")
            data, space[0] = data[: space[0]], 0
        elif space:
            space[0] -= len(data)
        return real(file, data)

    made = AccessLog(str(log))
    monkeypatch.setattr(os, "write", write)
    for at in range(4):
        made.write({"number": at, "x": "y"})
    wait_until(lambda: made._lines.empty() and made._lost >= 3, "three lost lines")
    space.clear()
    made.write({"number": 4})
    made.close()
    monkeypatch.undo()
    whole, torn, lost, last = log.read_text().splitlines()
    assert json.loads(whole)["number"] == 0
    with pytest.raises(ValueError):
        json.loads(torn)
    assert json.loads(lost)["lost_lines"] == 3
    assert json.loads(last) == {"number": 4}


def test_a_disk_that_hangs_holds_nobody_up(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatwright.serve.operation.access_log.WAITING_LINES", 3)
    made = AccessLog(str(log))
    import threading

    gate, real = threading.Event(), os.write
    monkeypatch.setattr(os, "write", lambda file, data: gate.wait(20) and real(file, data))
    begun = time.monotonic()
    for at in range(50):
        made.write({"number": at})
    assert time.monotonic() - begun < 5
    gate.set()
    made.close()
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(line.get("lost_lines", 0) for line in found) + sum("number" in line for line in found) == 50


def test_a_log_that_was_moved_away_is_begun_anew(log: Path, tmp_path: Path) -> None:
    made = AccessLog(str(log))
    made.write({"number": 0})
    lines(log, 1)
    moved = log.rename(tmp_path / "access.1")
    made.write({"number": 1})
    assert lines(log, 1) == [{"number": 1}]
    made.close()
    assert lines(moved, 1) == [{"number": 0}]
    if os.name == "posix":
        assert log.stat().st_mode & 0o007 == 0  # not for everybody
