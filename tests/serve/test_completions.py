"""POST /v1/completions and the log-probabilities of both interfaces, through the real client."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import Request

from chatwright.serve.api import reading
from support.serving import DIALOGUES, Running
from support.waiting import PATIENCE, wait_until

ASK = {"model": "tiny/taught", "temperature": 0.0}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=30) as made:
        yield made


def prompt_of(server: Running, question: str) -> list[int]:
    """Ids after which the taught model answers `question`."""
    message = {"role": "user", "content": question}
    return (
        server.model.require_template()
        .encode([message], server.model.tokenizer, add_generation_prompt=True)
        .ids
    )  # type: ignore[list-item]


def reference(server: Running, ids: list[int]) -> torch.Tensor:
    """log-probabilities (T, V) of the plain model."""
    return server.model.logits([ids])[0].log_softmax(-1)


def test_a_text_goes_on(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(prompt="Once", max_tokens=8, **ASK)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == server.model.generate("Once", max_new_tokens=8, temperature=0.0)
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)
    assert answer.usage.completion_tokens == 8
    assert client.completions.create(prompt="Once", **ASK).usage.completion_tokens <= 16  # OpenAI's default


def test_token_ids_are_taken_as_they_are(client: openai.OpenAI, server: Running) -> None:
    ids = prompt_of(server, "hello")
    answer = client.completions.create(prompt=ids, max_tokens=64, **ASK)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].text.startswith(DIALOGUES["hello"])


def test_several_prompts_and_answers_keep_their_order(client: openai.OpenAI, server: Running) -> None:
    prompts = [prompt_of(server, "hello"), prompt_of(server, "name?")]
    answer = client.completions.create(prompt=prompts, n=2, max_tokens=40, stop=["!", "."], **ASK)
    texts = [choice.text for choice in answer.choices]
    assert texts == ["Hello there, friend"] * 2 + ["I am a very small model"] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    streamed = [""] * 4
    for chunk in client.completions.create(
        prompt=prompts,
        n=2,
        max_tokens=40,
        stop=["!", "."],
        stream=True,
        stream_options={"include_usage": True},
        **ASK,
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert (chunk.choices, chunk.usage.completion_tokens) == ([], answer.usage.completion_tokens)


def test_log_probabilities_are_those_of_the_plain_model(client: openai.OpenAI, server: Running) -> None:
    ids = prompt_of(server, "hello")
    choice = client.completions.create(prompt=ids, max_tokens=6, logprobs=3, **ASK).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text + "<|end|>"  # which ends the answer
    end = server.model.tokenizer.control_ids["<|end|>"]
    answered = [*ids, *server.model.tokenizer.encode(choice.text), end]
    table = reference(server, answered)
    for place, (token, logprob, top) in enumerate(
        zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ),
        start=len(ids),
    ):
        assert logprob == pytest.approx(table[place - 1, answered[place]].item(), abs=1e-4)
        assert top[token] == logprob == max(top.values())
        assert sorted(top.values(), reverse=True) == pytest.approx(
            table[place - 1].topk(3).values.tolist(), abs=1e-4
        )
    starts = choice.logprobs.text_offset
    assert starts[-1] == len(choice.text)  # the end token has no characters
    assert [
        choice.text[start : start + len(token)]
        for start, token in zip(starts[:-1], choice.logprobs.tokens[:-1], strict=True)
    ] == (choice.logprobs.tokens[:-1])


def test_given_texts_are_scored(client: openai.OpenAI, server: Running) -> None:
    """What evaluation harnesses do: echo, no new tokens, log-probabilities of what was given."""
    ids = [*prompt_of(server, "name?"), *server.model.tokenizer.encode("I am")]
    choice = client.completions.create(prompt=ids, max_tokens=0, echo=True, logprobs=2, **ASK).choices[0]
    table = reference(server, ids)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    wanted = [table[place - 1, ids[place]].item() for place in range(1, len(ids))]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert math.exp(choice.logprobs.token_logprobs[-1]) > 0.9  # it knows this by heart
    whole = client.completions.create(prompt="Once", max_tokens=5, echo=True, logprobs=1, **ASK)
    plain = client.completions.create(prompt="Once", max_tokens=5, logprobs=1, **ASK)
    assert whole.choices[0].text == "Once" + plain.choices[0].text
    assert whole.choices[0].logprobs.tokens[-5:] == plain.choices[0].logprobs.tokens
    parts = ["", ""]
    tokens: list[str] = []
    for chunk in client.completions.create(
        prompt=["Once", "hello"], max_tokens=5, echo=True, logprobs=1, stream=True, **ASK
    ):
        for one in chunk.choices:
            parts[one.index] += one.text
            tokens += one.logprobs.tokens if one.index == 0 else []
    assert parts[0] == whole.choices[0].text
    assert tokens == whole.choices[0].logprobs.tokens


def test_chat_log_probabilities(client: openai.OpenAI, server: Running) -> None:
    messages: Any = [{"role": "user", "content": "snowman"}]
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **ASK).choices[0]
    content = whole.logprobs.content
    assert (
        b"".join(bytes(one.bytes) for one in content).decode()
        == whole.message.content
        == DIALOGUES["snowman"]
    )
    ids = [*prompt_of(server, "snowman"), *server.model.tokenizer.encode(DIALOGUES["snowman"])]
    table = reference(server, ids)
    start = len(prompt_of(server, "snowman"))
    assert len(content) == len(ids) - start  # the end token is not among them
    for place, one in enumerate(content, start):
        assert one.logprob == pytest.approx(table[place - 1, ids[place]].item(), abs=1e-4)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(
            table[place - 1].topk(2).values.tolist(), abs=1e-4
        )
        assert one.top_logprobs[0].token == one.token
    streamed = []
    for chunk in client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=2, stream=True, **ASK
    ):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [one.token for one in streamed] == [one.token for one in content]
    # The second prompt comes from the cache, which moves the rounding.
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in content], abs=1e-4)
    bare = client.chat.completions.create(messages=messages, logprobs=True, **ASK).choices[0]
    assert bare.logprobs.content[0].top_logprobs == []


def test_penalties_and_bias_change_the_answer(client: openai.OpenAI, server: Running) -> None:
    messages: Any = [{"role": "user", "content": "story"}]
    warm: Any = {
        "messages": messages,
        "max_tokens": 60,
        "model": "tiny/taught",
        "temperature": 1.5,
        "seed": 3,
    }
    plain = client.chat.completions.create(**warm).choices[0].message.content
    assert client.chat.completions.create(**warm, presence_penalty=0.0).choices[0].message.content == plain
    for name in ("frequency_penalty", "presence_penalty"):
        for value in (2.0, -2.0):
            other = client.chat.completions.create(**warm, **{name: value})
            assert other.choices[0].message.content != plain, name
    first = server.model.tokenizer.encode(DIALOGUES["hello"])[0]
    banned = client.chat.completions.create(
        messages=[{"role": "user", "content": "hello"}], logit_bias={str(first): -100}, **ASK
    )
    assert not banned.choices[0].message.content.startswith("Hello there")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": ["x"] * 33, "n": 2}, "at most 64"),
        ({"prompt": [1 << 20]}, "token ids"),
        ({"prompt": "long " * 400}, "context"),
        ({"max_tokens": 0}, "echo"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"temperatur": 1}, "did you mean 'temperature'"),
        ({"model": "other"}, "tiny/taught"),
    ],
    ids=str,
)
def test_refusals(server: Running, change: dict[str, Any], says: str) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={**ASK, "prompt": "x", **change}, timeout=30)
    assert response.status_code in (400, 404), response.text
    assert says in response.json()["error"]["message"]


def test_embeddings(client: openai.OpenAI, server: Running) -> None:
    texts = ["hello there", "hello there!", "Once upon a time"]
    whole = client.embeddings.create(model="tiny/taught", input=texts, encoding_format="float")
    vectors = torch.tensor([one.embedding for one in whole.data])
    ids = [server.model.tokenizer.encode(text) for text in texts]
    with torch.no_grad():
        for vector, tokens in zip(vectors, ids, strict=True):
            mean = server.model.model.hidden(torch.tensor([tokens]))[0].mean(0)
            torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert whole.usage.prompt_tokens == sum(map(len, ids))
    packed = client.embeddings.create(
        model="tiny/taught", input=ids
    )  # the client asks for base64 and unpacks it
    torch.testing.assert_close(torch.tensor([one.embedding for one in packed.data]), vectors)
    width = vectors.shape[1]
    assert client.embeddings.create(model="tiny/taught", input="x", dimensions=width).data[0].index == 0
    for wrong in (
        {"input": ""},
        {"input": []},
        {"input": ["a", ""]},
        {"input": "x", "dimensions": width - 1},
        {"input": [1 << 20]},
        {"input": "long " * 400},
        {"input": "x", "encoding_format": "hex"},
    ):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**{"model": "tiny/taught", **wrong})
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="x")


class Gate:
    """Stands in for a method of a model: it waits to be opened, and counts how often it was called."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.calls, self.open = real, 0, threading.Event()

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        assert self.open.wait(PATIENCE)
        return self.real(*args, **more)


def test_embeddings_that_nobody_waits_for_are_not_computed(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(server.model.embed)
    monkeypatch.setattr(server.model, "embed", gate)
    loops: list[asyncio.AbstractEventLoop] = []
    disconnected = reading._disconnected

    async def watched(request: Request) -> None:
        loops.append(asyncio.get_running_loop())
        await disconnected(request)

    monkeypatch.setattr(reading, "_disconnected", watched)
    (service,) = server.app.state.pool.services
    body = {"model": "tiny/taught", "input": ["hello"] * 50}
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/embeddings", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_until(
        lambda: any(task.cancelling() for loop in loops for task in asyncio.all_tasks(loop)),
        "the request to be given up",
    )
    assert gate.calls == 1
    # one text is being computed: a thread cannot be stopped, and its place is taken
    assert service._preparing > 0
    gate.open.set()
    wait_until(lambda: service._preparing == 0, "the place to be free")
    assert gate.calls == 1
    answer = httpx.post(
        f"{server.url}/v1/embeddings", json={"model": "tiny/taught", "input": "hello"}, timeout=30
    )
    assert answer.status_code == 200
