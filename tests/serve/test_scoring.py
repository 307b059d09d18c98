"""Given texts scored by the server: every token is listed, and requests of many clients share passes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import httpx
import pytest

from chatwright.generate import scoring as passes
from chatwright.generate.scoring import Scored, ToScore
from chatwright.model.gpt import GPT
from chatwright.serve import scoring
from chatwright.serve.api import reading
from chatwright.serve.scoring import Scorer
from support.serving import Running
from support.waiting import PATIENCE, wait_until

TEXTS = ("Hello there, friend!", "I am a very small model.", "a ☃ for you")


def post(server: Running, prompt: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny/taught", "prompt": prompt, "echo": True, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def choices_of(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return sorted(response.json()["choices"], key=lambda one: one["index"])


def ids_of(server: Running) -> list[list[int]]:
    """Token ids of the texts, each behind the end-of-text token."""
    tokenizer = server.model.tokenizer
    return [[tokenizer.end_of_text_id, *tokenizer.encode(text)] for text in TEXTS]


def check(server: Running, ids: Sequence[int], logprobs: Any, new: int, top: int) -> None:
    """Compare the log-probabilities of a text and of `new` tokens behind it with those of the plain model."""
    table = server.model.logits([ids])[0].log_softmax(-1)
    found = logprobs["token_logprobs"]
    assert len(found) == len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + new
    assert found[0] is None
    wanted = [table[at, ids[at + 1]].item() for at in range(len(ids) - 1)]
    assert found[1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
    if not top:
        assert logprobs["top_logprobs"] is None
        return
    assert logprobs["top_logprobs"][0] is None
    for at, likeliest in enumerate(logprobs["top_logprobs"][1 : len(ids)]):
        assert max(likeliest.values()) == pytest.approx(table[at].max().item(), abs=1e-4)
        assert top <= len(likeliest) <= top + 1 or len(set(likeliest)) < top  # several tokens, one spelling
    if new:
        assert max(logprobs["top_logprobs"][-1].values()) == pytest.approx(table[-1].max().item(), abs=1e-4)


@pytest.mark.parametrize("top", range(6))
@pytest.mark.parametrize("most", [0, 1])
def test_every_token_of_given_ids_is_listed(server: Running, most: int, top: int) -> None:
    prompts = ids_of(server)
    choices = choices_of(post(server, prompts, max_tokens=most, logprobs=top))
    for choice, ids in zip(choices, prompts, strict=True):
        check(server, ids, choice["logprobs"], most, top)
    (alone,) = choices_of(post(server, prompts[0], max_tokens=most, logprobs=top))
    check(server, prompts[0], alone["logprobs"], most, top)


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_final_end_token_is_listed(server: Running, most: int, stream: bool) -> None:
    end = server.model.tokenizer.end_of_text_id
    prompts = ids_of(server)
    response = post(server, prompts, max_tokens=most, logprobs=1, logit_bias={str(end): 100}, stream=stream)
    if stream:
        parts: list[Any] = [[] for _ in prompts]
        for line in response.text.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    parts[choice["index"]].append(choice)
        choices = []
        for part in parts:
            whole = {
                name: [*chain.from_iterable(one["logprobs"][name] for one in part)]
                for name in part[0]["logprobs"]
            }
            text = "".join(one["text"] for one in part)
            choices.append({"text": text, "logprobs": whole, "finish_reason": part[-1]["finish_reason"]})
    else:
        choices = choices_of(response)
    for text, ids, choice in zip(TEXTS, prompts, choices, strict=True):
        check(server, ids, choice["logprobs"], min(most, 1), 1)
        assert choice["text"] == text
        if most:
            assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>"
            assert choice["logprobs"]["text_offset"][-1] == len(text)
            assert choice["finish_reason"] == "stop"


def test_texts_are_listed_as_they_are(server: Running) -> None:
    """What the server puts in front of a text is not listed; offsets count the text's characters."""
    for choice, text, ids in zip(
        choices_of(post(server, list(TEXTS), max_tokens=1, logprobs=1)), TEXTS, ids_of(server), strict=True
    ):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) - 1 + 1
        table = server.model.logits([ids])[0].log_softmax(-1)
        wanted = [table[at, ids[at + 1]].item() for at in range(len(ids) - 1)]
        assert logprobs["token_logprobs"][:-1] == pytest.approx(wanted, abs=1e-4)
        for start, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            shown = "" if token.startswith("<|") else token
            assert "\ufffd" in token or choice["text"][start:].startswith(shown)
        assert choice["text"].startswith(text)


def test_one_token_more_is_the_engine_s(server: Running) -> None:
    for settings in ({"temperature": 0}, {"temperature": 1.5, "seed": 5, "n": 3}, {"stop": ["e", "H"]}):
        for prompt in TEXTS:
            scored = choices_of(post(server, prompt, max_tokens=1, logprobs=2, **settings))
            plain = choices_of(post(server, prompt, max_tokens=1, logprobs=2, echo=False, **settings))
            for one, other in zip(scored, plain, strict=True):
                assert one["text"] == prompt + other["text"]
                assert one["finish_reason"] == other["finish_reason"]
                assert one["logprobs"]["tokens"][-1:] == other["logprobs"]["tokens"]
                assert one["logprobs"]["token_logprobs"][-1] == pytest.approx(
                    other["logprobs"]["token_logprobs"][0], abs=1e-4
                )
    usage = post(server, list(TEXTS), max_tokens=1, logprobs=1).json()["usage"]
    assert usage["completion_tokens"] == len(TEXTS)


class Passes:
    """Stands in for `score_texts`: it waits to be opened, and notes what each pass holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.open = passes.score_texts, threading.Event()
        self.texts: list[list[tuple[int, ...]]] = []
        monkeypatch.setattr(passes, "score_texts", self)

    def __call__(self, model: GPT, texts: Sequence[ToScore], known: Any = None) -> list[Scored]:
        self.texts.append([tuple(text.ids) for text in texts])
        assert self.open.wait(PATIENCE)
        return self.real(model, texts)


def test_requests_of_many_clients_share_a_pass(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Passes(monkeypatch)
    (service,) = server.app.state.pool.services
    prompts = [[*ids, number] for number in range(7) for ids in ids_of(server)]
    with ThreadPoolExecutor(len(prompts)) as clients:
        asked = [clients.submit(post, server, ids, max_tokens=1, logprobs=1) for ids in prompts]
        wait_until(
            lambda: len(service.scorer._waiting) + sum(map(len, held.texts)) == len(prompts),
            "all to have come",
        )
        held.open.set()
        for ids, one in zip(prompts, asked, strict=True):
            (choice,) = choices_of(one.result())
            check(server, ids, choice["logprobs"], 1, 1)
    assert len(held.texts) <= 3
    assert sorted(chain.from_iterable(held.texts)) == sorted(map(tuple, prompts))


def test_a_pass_is_not_too_long_for_those_who_come_meanwhile(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Passes(monkeypatch)
    held.open.set()
    monkeypatch.setattr(scoring, "PASS_TOKENS", 40)
    prompts = [ids for _ in range(5) for ids in ids_of(server)]
    for choice, ids in zip(choices_of(post(server, prompts, max_tokens=0, logprobs=1)), prompts, strict=True):
        check(server, ids, choice["logprobs"], 0, 1)
    assert all(sum(map(len, texts)) <= 40 or len(texts) == 1 for texts in held.texts)
    assert sum(map(len, held.texts)) == len(prompts)


def test_what_nobody_waits_for_is_not_scored(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Passes(monkeypatch)
    monkeypatch.setattr(scoring, "PASS_TOKENS", 40)
    loops: list[asyncio.AbstractEventLoop] = []
    disconnected = reading._disconnected

    async def watched(request: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await disconnected(request)

    monkeypatch.setattr(reading, "_disconnected", watched)
    (service,) = server.app.state.pool.services
    body = {"model": "tiny/taught", "prompt": ["hello"] * 50, "echo": True, "logprobs": 1, "max_tokens": 0}
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_until(lambda: bool(held.texts) and not service.scorer._waiting, "the request to be given up")
    assert service._preparing > 0  # a pass cannot be stopped, and its places are taken
    held.open.set()
    wait_until(lambda: service._preparing == 0, "the places to be free")
    assert len(held.texts) == 1
    assert post(server, "hello", max_tokens=1, logprobs=1).status_code == 200


def test_a_failing_pass_fails_its_own_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, texts: Sequence[ToScore], known: Any = None) -> list[Scored]:
        if any(text.ids == [7] for text in texts):
            raise ValueError("broken")
        return [Scored([(text.ids[0], None, [])]) for text in texts]

    monkeypatch.setattr(passes, "score_texts", broken)

    async def ask() -> list[Any]:
        scorer = Scorer(None)  # type: ignore[arg-type]
        first = await asyncio.gather(scorer.score(ToScore([7])), return_exceptions=True)
        return [*first, await scorer.score(ToScore([1]))]

    failed, scored = asyncio.run(ask())
    assert isinstance(failed, ValueError)
    assert scored.tokens == [(1, None, [])]
