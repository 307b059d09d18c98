"""The OpenAI-compatible interface, through the real client and over a real port."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from support import serving
from support.serving import DIALOGUES, Running, run_server
from support.waiting import wait_until

ASK = {"model": "tiny/taught", "temperature": 0.0}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}


def said(part: Any) -> list[dict[str, Any]]:
    """A user's message of a text and one more part."""
    return [{"role": "user", "content": [{"type": "text", "text": "hello"}, part]}]


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=30) as made:
        yield made


def post(server: Running, body: Any, **kwargs: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30, **kwargs)


def test_openai_client_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=user("hello"), **ASK)
    assert answer.choices[0].message.content == DIALOGUES["hello"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tiny/taught"
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["chatwright"] == {"dropped_messages": 0}


def test_openai_client_stream_is_the_same_answer(client: openai.OpenAI, server: Running) -> None:
    whole = client.chat.completions.create(messages=user("snowman"), **ASK)
    server.model.engine.allow(2)
    chunks = []
    for chunk in client.chat.completions.create(
        messages=user("snowman"), stream=True, stream_options={"include_usage": True}, **ASK
    ):
        chunks.append(chunk)
        if (
            chunk.choices and chunk.choices[0].delta.content
        ):  # the rest is not computed before something has arrived
            server.model.engine.allow(float("inf"))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == DIALOGUES["snowman"] == whole.choices[0].message.content
    assert sum(map(bool, texts)) > 1, "it came in one piece: nothing was streamed"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same prompt was answered before
    assert chunks[-1].usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None}
    )
    assert len({chunk.id for chunk in chunks}) == 1
    raw = post(server, {**ASK, "messages": user("hello"), "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in raw.text  # only on demand


def test_first_text_is_sent_before_the_last_is_computed(client: openai.OpenAI, server: Running) -> None:
    server.model.engine.allow(4)
    stream = iter(client.chat.completions.create(messages=user("story"), stream=True, **ASK))
    seen = ""
    while not seen:
        seen += next(stream).choices[0].delta.content or ""
    assert DIALOGUES["story"].startswith(seen)
    assert len(seen) < 40
    server.model.engine.allow(float("inf"))
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert seen + rest == DIALOGUES["story"]


def test_several_answers(client: openai.OpenAI) -> None:
    settings = {"model": "tiny/taught", "temperature": 1.8, "max_tokens": 12, "seed": 7}
    answers = client.chat.completions.create(messages=user("story"), n=3, **settings)
    texts = [choice.message.content for choice in answers.choices]
    assert [choice.index for choice in answers.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    alone = client.chat.completions.create(messages=user("story"), **{**settings, "seed": 8})
    assert alone.choices[0].message.content == texts[1]  # answer k has seed + k
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(messages=user("story"), n=3, stream=True, **settings):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_length_stop_and_text_parts(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(messages=user("story"), max_completion_tokens=3, **ASK)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3
    huge = client.chat.completions.create(messages=user("hello"), max_tokens=100_000, **ASK)
    assert huge.choices[0].message.content == DIALOGUES["hello"]
    stopped = client.chat.completions.create(messages=user("hello"), stop=[", friend"], **ASK)
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Hello there", "stop")
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    joined = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **ASK)
    assert joined.choices[0].message.content == DIALOGUES["hello"]


def test_calls_and_results_reach_the_model_as_text(client: openai.OpenAI) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    result = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "12 <|end|>"}]}
    for content, text in ((None, said), ("", said), ("Hm.", f"Hm.\n{said}\n{said}")):
        calls = [call] * text.count("<tool_call>")
        parts: Any = [{"role": "assistant", "content": content, "tool_calls": calls}, result, *user("hello")]
        plain: Any = [
            {"role": "assistant", "content": text},
            {"role": "tool", "content": "12 <|end|>"},
            *user("hello"),
        ]
        answers = [
            client.chat.completions.create(messages=messages, max_tokens=20, **ASK)
            for messages in (parts, plain)
        ]
        assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens
        # The second prompt was known up to its last token: the two are the same ids.
        assert answers[1].usage.prompt_tokens_details.cached_tokens == answers[1].usage.prompt_tokens - 1
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_instructions_are_added_to_a_system_message_in_parts(client: openai.OpenAI) -> None:
    form = {"type": "json_object"}
    system: list[Any] = ["Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]]
    usages = [
        client.chat.completions.create(
            messages=[{"role": "system", "content": content}, *user("hello")],  # type: ignore[list-item]
            response_format=form,  # type: ignore[arg-type]
            max_tokens=2,
            **ASK,
        ).usage
        for content in system
    ]
    assert usages[0].prompt_tokens == usages[1].prompt_tokens
    assert usages[1].prompt_tokens_details.cached_tokens == usages[1].prompt_tokens - 1


def test_a_client_may_send_an_answer_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=user("hello"), **ASK).choices[0].message
    second = client.chat.completions.create(messages=[*user("hello"), first, *user("name?")], **ASK)
    assert second.choices[0].message.content


def test_system_and_developer_are_one_role(client: openai.OpenAI) -> None:
    usages = []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, *user("hello")]
        usages.append(client.chat.completions.create(messages=messages, max_tokens=2, **ASK).usage)
    assert usages[0].total_tokens == usages[1].total_tokens


def test_concurrent_clients_get_their_own_answers(server: Running) -> None:
    questions = list(DIALOGUES) * 4
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        stream = number % 2 == 0
        body = {**ASK, "messages": user(questions[number]), "stream": stream, "max_tokens": 256}
        response = post(server, body)
        if not stream:
            answers[number] = response.json()["choices"][0]["message"]["content"]
            return
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        answers[number] = "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: DIALOGUES[question] for number, question in enumerate(questions)}


def test_models_and_health(client: openai.OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list()] == ["tiny/taught"]
    assert client.models.retrieve("tiny/taught").id == "tiny/taught"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    health = httpx.get(f"{server.url}/health").json()
    assert health == {"status": "ok", "models": ["tiny/taught"], "running": 0}


@pytest.mark.parametrize(
    ("change", "status", "code", "says"),
    [
        ({"model": "other"}, 404, "model_not_found", "tiny/taught"),
        ({"model": None}, 400, "invalid_value", "model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": "hello"}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "role"),
        ({"messages": [{"role": "user"}]}, 400, "unsupported_value", "content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "invalid_value",
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            400,
            "invalid_value",
            "tool_calls",
        ),
        ({"messages": said(IMAGE)}, 400, "unsupported_value", "reads text only: leave the image out"),
        (
            {"messages": said(IMAGE), "stream": True},
            400,
            "unsupported_value",
            "holds an image (data:image/png",
        ),
        (
            {"messages": said({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})},
            400,
            "invalid_value",
            "no sound base64",
        ),
        (
            {"messages": [{"role": "assistant", "content": [IMAGE]}, *user("x")]},
            400,
            "invalid_value",
            "belongs into a message of user or tool",
        ),
        ({"messages": said({"type": "txt", "text": "x"})}, 400, "unsupported_value", "did you mean 'text'?"),
        (
            {"messages": said({"type": "input_audio", "input_audio": {}})},
            400,
            "unsupported_value",
            "'input_audio' is not supported; known: text, image_url",
        ),
        ({"messages": said({"text": "x"})}, 400, "invalid_value", "messages"),
        ({"messages": said("x")}, 400, "invalid_value", "messages"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"temperature": True}, 400, "invalid_value", "temperature"),
        ({"temperature": "1"}, 400, "invalid_value", "temperature"),
        ({"top_p": -0.1}, 400, "invalid_value", "top_p"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": 129}, 400, "invalid_value", "n"),
        ({"seed": 1 << 64}, 400, "invalid_value", "seed"),
        ({"stop": [""]}, 400, "invalid_value", "stop"),
        ({"tools": [{"type": "function"}]}, 400, "invalid_value", "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, 400, None, "tools[0]"),
        ({"tool_choice": "required"}, 400, None, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, None, "none of the tools"),
        ({"functions": [{"name": "f"}]}, 400, "unsupported_parameter", "functions"),
        ({"top_logprobs": 3}, 400, "invalid_value", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"five": 1}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 101}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, 400, "invalid_value", "vocabulary"),
        ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format"),
        ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "needs a schema"),
        ({"presence_penalty": 2.5}, 400, "invalid_value", "presence_penalty"),
        ({"temperatur": 1}, 400, "unknown_parameter", "did you mean 'temperature'"),
        ({"{braces}": 1}, 400, "unknown_parameter", "{braces}"),
        ({"messages": user("long " * 400)}, 400, "context_length_exceeded", "too long"),
    ],
)
def test_refusals(server: Running, change: dict[str, Any], status: int, code: str | None, says: str) -> None:
    response = post(server, {**ASK, "messages": user("hello"), **change})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_parameters_that_ask_for_nothing_are_accepted(server: Running) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "presence_penalty": 0, "logprobs": False, "logit_bias": {}}
    ignored = {"user": "someone", "store": True, "metadata": {"a": "b"}, "frequency_penalty": None}
    response = post(server, {**ASK, "messages": user("hello"), **neutral, **ignored})
    assert response.json()["choices"][0]["message"]["content"] == DIALOGUES["hello"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (
            b'{"model": "tiny/taught", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "application/json",
            400,
        ),
        (b"\xff\xfe", "application/json", 400),
        (b"{}", "text/plain", 400),
        (b" " * (1 << 20) + b"{}", "application/json", 413),
        (b"x" * (3 << 20), "application/json", 413),
    ],
)
def test_bodies_that_make_no_sense(server: Running, content: bytes, kind: str, status: int) -> None:
    url = f"{server.url}/v1/chat/completions"
    response = httpx.post(url, content=content, headers={"content-type": kind}, timeout=30)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    chunked = httpx.post(url, content=iter([content]), headers={"content-type": kind}, timeout=30)
    assert chunked.status_code == status


def test_half_a_surrogate_pair_is_no_crash(server: Running) -> None:
    content = (
        b'{"model": "tiny/taught", "max_tokens": 2, "messages": [{"role": "user", "content": "\\ud800"}]}'
    )
    kind = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=kind, timeout=30)
    assert response.status_code in (200, 400)


def test_wrong_path_and_method_have_the_same_shape(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"]
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert (wrong.status_code, set(wrong.json())) == (405, {"error"})


def test_old_turns_are_dropped_and_the_caller_is_told(server: Running) -> None:
    turns = [{"role": role, "content": "many words " * 8} for _ in range(6) for role in ("user", "assistant")]
    body = {**ASK, "messages": [{"role": "system", "content": "Be kind."}, *turns, *user("hello")]}
    whole = post(server, {**body, "max_tokens": 5})
    dropped = whole.json()["chatwright"]["dropped_messages"]
    assert 0 < dropped < len(turns)
    assert whole.headers["x-chatwright-dropped-messages"] == str(dropped)
    assert whole.json()["usage"]["prompt_tokens"] <= 256
    streamed = post(server, {**body, "stream": True, "max_tokens": 5})
    assert streamed.headers["x-chatwright-dropped-messages"] == str(dropped)
    first = json.loads(streamed.text.partition("\n")[0][6:])
    assert first["chatwright"] == {"dropped_messages": dropped}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server: Running, stream: bool) -> None:
    engine = server.model.engine
    engine.allow(5)
    body = {**ASK, "messages": user("story"), "stream": stream, "max_tokens": 200}
    with httpx.Client() as impatient:
        request = impatient.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
        if stream:
            response = impatient.send(request, stream=True)
            chunks = response.iter_bytes()  # kept: throwing it away would close the connection
            assert next(chunks)
            wait_until(lambda: engine.allowed <= 0, "five steps")
            assert engine.active == 1
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                impatient.send(
                    impatient.build_request("POST", request.url, json=body, extensions=_timeout(0.3))
                )
    wait_until(lambda: engine.active == 0, "the slot to be free")
    wait_until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 0, "the server to know")
    assert engine.steps < 20
    engine.allow(float("inf"))
    again = post(server, {**ASK, "messages": user("hello")})
    assert again.json()["choices"][0]["message"]["content"] == DIALOGUES["hello"]


def _timeout(seconds: float) -> dict[str, Any]:
    return {"timeout": {"connect": 5, "read": seconds, "write": 5, "pool": 5}}


def test_more_requests_than_allowed_are_told_to_wait(tiny: serving.TinyModel) -> None:
    with run_server(tiny, max_requests=2) as server:
        tiny.engine.allow(2)
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json={**ASK, "messages": user("story"), "stream": True, "n": 2},
        ) as first:
            chunks = first.iter_bytes()
            assert next(chunks)
            refused = post(server, {**ASK, "messages": user("hello")})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        tiny.engine.allow(float("inf"))


def test_a_failing_model_is_an_error_not_a_hang(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr(server.model.model, "hidden", broken)
    whole = post(server, {**ASK, "messages": user("hello")})
    assert whole.status_code == 500
    assert whole.json()["error"]["type"] == "server_error"
    streamed = post(server, {**ASK, "messages": user("hello"), "stream": True})
    assert '"server_error"' in streamed.text
    assert "secret detail" not in whole.text + streamed.text


def test_other_sites_and_other_names_are_kept_out(server: Running) -> None:
    body = {**ASK, "messages": user("hello"), "max_tokens": 1}
    assert post(server, body, headers={"origin": "https://evil.example"}).status_code == 403
    assert post(server, body, headers={"origin": "null"}).status_code == 403
    assert post(server, body, headers={"origin": server.url}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code in (400, 403)
    port = server.url.rpartition(":")[2]
    assert httpx.get(f"{server.url}/v1/models", headers={"host": f"localhost:{port}"}).status_code == 200
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for response in (
        httpx.options(f"{server.url}/v1/chat/completions", headers=preflight),
        httpx.get(f"{server.url}/v1/models", headers={"origin": "https://evil.example"}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_allowed_hosts_adds_names(tiny: serving.TinyModel) -> None:
    with run_server(tiny, allowed_hosts=["chat.example"], name="mine") as server:
        allowed = httpx.get(f"{server.url}/v1/models", headers={"host": "Chat.Example:80"})
        assert allowed.json()["data"][0]["id"] == "mine"
        assert httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_the_interface_describes_itself(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert httpx.get(f"{server.url}/docs").status_code == 404  # it would load scripts from a CDN
