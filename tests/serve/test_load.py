"""Many clients at once: the short form of benchmarks/serve.py, with the same clients and the same judge.

The judge is put to the test as well: each of its checks has to find a fault that was planted.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch
from load_clients import Load, Question, Reply, Target, alone, ask
from load_judge import Oracle, growth_of, judge

from chatwright.chat import NATIVE, Message
from chatwright.language_model import LanguageModel
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from support.serving import DIALOGUES, Running, TinyModel, run_server
from support.waiting import wait_until

QUESTIONS = [Question(text, tokens) for tokens in (200, 7) for text in DIALOGUES]


@pytest.fixture
def oracle(taught: tuple[GPT, Tokenizer]) -> Oracle:
    """The taught model with an engine of its own."""
    return Oracle(LanguageModel(*taught, NATIVE, "oracle"), QUESTIONS)


def pressed(server: Running, seconds: float = 2.5, **settings: Any) -> tuple[Load, list[Reply]]:
    """A load, and the answers given alone before it."""
    url = httpx.URL(server.url)
    target = Target(url.host, url.port or 80, server.model.name)

    async def run() -> tuple[Load, list[Reply]]:
        known = await alone(target, QUESTIONS, lambda text: None)
        load = Load(target, QUESTIONS, **{"clients": 16, "slow": 2, "half_open": 2, **settings})
        await load.run(seconds)
        return load, known

    return asyncio.run(run())


def test_sixteen_clients(server: Running, oracle: Oracle) -> None:
    load, known = pressed(server)
    assert [reply.text for reply in known[: len(DIALOGUES)]] == list(DIALOGUES.values())
    assert {reply.finish for reply in known} == {"stop", "length"}
    verdict = judge(load, known, oracle)
    assert verdict.passed, verdict.failures
    counts = verdict.counts
    assert counts["answers equal"] + counts.get("answers near tie", 0) == len(load.replies) >= 16
    assert (
        counts["requests plain"]
        and counts["requests leaves"]
        and counts["requests slow"]
        and counts["half requests"]
    )
    assert verdict.figures["tokens_per_second"] > 0 and verdict.figures["between_tokens_p95"] > 0
    wait_until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 0, "every slot freed")


def test_a_full_server_is_asked_again(tiny: TinyModel, oracle: Oracle) -> None:
    with run_server(tiny, max_requests=4) as server:
        load, known = pressed(server, 1.0, clients=8, slow=0, half_open=0, leaving=0.0)
    verdict = judge(load, known, oracle)
    # Who came in vain may have to wait long: fairness is not what a server promises that refuses half of
    # those who come.
    assert verdict.counts["status 429"] > 0
    assert [failure for failure in verdict.failures if not failure.startswith("unfair")] == []


def test_who_is_let_in_is_answered(tiny: TinyModel) -> None:
    """Twelve at the same moment, four places: four whole streams, and eight are told so before anything has
    begun."""
    tiny.engine.allow(0)  # nobody's place is free again before everybody has been told
    with run_server(tiny, max_requests=4) as server:
        url = httpx.URL(server.url)
        target = Target(url.host, url.port or 80, tiny.name)
        replies = [Reply(0, number, "plain") for number in range(12)]

        async def all_at_once() -> None:
            asks = [asyncio.ensure_future(ask(target, QUESTIONS[0], reply)) for reply in replies]
            while sum(one.done() for one in asks) < 8:
                await asyncio.wait(asks, return_when=asyncio.FIRST_COMPLETED, timeout=20)
                assert any(one.done() for one in asks), "nobody is refused"
                await asyncio.sleep(0)
            tiny.engine.allow(float("inf"))
            outcomes = await asyncio.gather(*asks, return_exceptions=True)
            assert sorted(type(one).__name__ for one in outcomes) == ["NoneType"] * 4 + ["Refused"] * 8

        asyncio.run(all_at_once())
    assert sorted(reply.text for reply in replies) == [""] * 8 + [DIALOGUES["hello"]] * 4


def test_a_server_that_computes_wrongly_is_found(
    tiny: TinyModel, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right as long as nobody else asks; in company, rows get each other's logits."""
    runner = tiny.engine.runner
    forward = runner.forward

    def mixed(feeds: Sequence[Any]) -> torch.Tensor:
        logits = forward(feeds)
        return logits.roll(1, 0) if len(feeds) > 1 else logits

    monkeypatch.setattr(runner, "forward", mixed)
    with run_server(tiny) as server:
        verdict = judge(*pressed(server, 0.5, clients=8, slow=0, half_open=0), oracle)
    assert verdict.counts["answers wrong"] > 0 and not verdict.passed


# ---- the judge ---------------------------------------------------------------------------------------------


@pytest.fixture
def finished() -> tuple[Load, list[Reply]]:
    """A load in which everything went well, without a server."""
    texts = list(DIALOGUES.values())
    known = [Reply(number, -1, "plain", text, "stop", 9, first=0.1) for number, text in enumerate(texts)]
    load = Load(Target("", 0, ""), QUESTIONS, clients=4, slow=0, seconds=10.0)
    load.replies = [
        Reply(
            number % len(texts),
            number % 4,
            "plain",
            texts[number % len(texts)],
            "stop",
            9,
            first=0.2,
            gaps=[0.01] * 8,
        )
        for number in range(64)
    ]
    return load, known


def test_the_judge_lets_pass_what_is_right(finished: tuple[Load, list[Reply]], oracle: Oracle) -> None:
    verdict = judge(*finished, oracle, [(float(second), 1e9) for second in range(200)])
    assert verdict.passed and verdict.counts["answers equal"] == 64
    assert verdict.figures["tokens_per_second"] == 57.6 and verdict.figures["first_token_p95"] == 0.2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "Hello there, friend?"}, "wrong: client 3"),
        ({"text": DIALOGUES["name?"]}, "wrong: client 3"),
        ({"text": ""}, "wrong: client 3"),
        ({"finish": None}, "cut short"),
        ({"finish": "length"}, "cut short after 9 tokens"),
        ({"finish": "length", "tokens": 200}, "wrong: client 3"),
        ({"error": "the stream ended without [DONE]"}, "lost: client 3 (plain), question"),
        ({"kind": "leaves", "finish": None, "text": "I am a very small house"}, "wrong: client 3 (leaves)"),
        ({"first": 6.1}, "unfair: somebody waited 6.1 s"),
    ],
)
def test_the_judge_finds(
    finished: tuple[Load, list[Reply]], oracle: Oracle, change: dict[str, Any], said: str
) -> None:
    load, known = finished
    place = next(
        number for number, reply in enumerate(load.replies) if reply.client == 3 and reply.question != 1
    )
    for name, value in change.items():
        setattr(load.replies[place], name, value)
    verdict = judge(load, known, oracle)
    assert len(verdict.failures) == 1 and said in verdict.failures[0]


def test_the_judge_finds_the_starved(finished: tuple[Load, list[Reply]], oracle: Oracle) -> None:
    load, known = finished
    whole = copy.deepcopy(load.replies)
    load.replies = [reply for reply in whole if reply.client]
    assert judge(load, known, oracle).failures == ["unfair: clients [0] finished nothing"]
    load.replies += [reply for reply in whole if not reply.client][:3]
    assert "clients [0] finished less than a quarter" in judge(load, known, oracle).failures[0]
    load.replies += [reply for reply in whole if not reply.client][3:6]
    assert judge(load, known, oracle).passed


def test_the_judge_finds_a_leak(finished: tuple[Load, list[Reply]], oracle: Oracle) -> None:
    leak = [(float(second), 1e9 + 1e6 * second) for second in range(200)]
    assert judge(*finished, oracle, leak).failures == [
        "memory: it grew by 99 MB over the second half, to 1,199 MB"
    ]
    early = [(at, min(size, 1.05e9)) for at, size in leak]
    assert judge(*finished, oracle, early).passed, "growth that ends in the first half is first use"
    assert judge(*finished, oracle, leak[:50]).passed, "too short to tell"
    assert growth_of([]) == (0.0, 0.0)


def test_the_beginning_of_an_answer_is_right(finished: tuple[Load, list[Reply]], oracle: Oracle) -> None:
    load, known = finished
    load.replies[0] = Reply(0, 0, "leaves", "Hello th", None, 2)
    load.replies[4] = Reply(0, 0, "leaves", "", None, 0)
    assert judge(load, known, oracle).passed


# ---- the oracle --------------------------------------------------------------------------------------------


def test_the_oracle_measures_the_turn_that_a_text_took(oracle: Oracle) -> None:
    """The answer behind another first token: right for those who allow as wide a gap, wrong for all
    others."""
    model = oracle.model
    request = model.chat_request(
        [Message(role="user", content="hello")], temperature=0.0, max_new_tokens=200
    )[0]
    logprobs = model.logits([request.prompt])[0, -1].log_softmax(-1)
    (best, second), (_, token) = logprobs.topk(2)
    gap = float(best - second)
    other = model.engine.generate(
        [type(request)((*request.prompt, int(token)), request.sampling, request.end_ids)]
    )[0]
    text = model.tokenizer.decode([int(token)]) + other.text
    assert text != DIALOGUES["hello"] and other.finish_reason == "stop"
    number = next(n for n, one in enumerate(QUESTIONS) if one == Question("hello", 200))
    assert Oracle(model, QUESTIONS, tie=gap + 0.01).gap(number, text, "stop") == pytest.approx(gap, abs=1e-3)
    assert Oracle(model, QUESTIONS, tie=gap + 0.01).gap(number, text[:-3], None) == pytest.approx(
        gap, abs=1e-3
    )
    assert Oracle(model, QUESTIONS, tie=gap - 0.01).gap(number, text, "stop") is None
    assert Oracle(model, QUESTIONS, tie=gap + 0.01).gap(number, text + "!", "stop") is None
    assert Oracle(model, QUESTIONS, tie=gap + 0.01).gap(number, text[:-3], "stop") is None


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_the_oracle_knows_the_greedy_answers(oracle: Oracle, number: int) -> None:
    question = QUESTIONS[number]
    done = oracle.model.engine.generate([oracle._request(question)])[0]
    assert oracle.gap(number, done.text, done.finish_reason) == 0.0
    assert oracle.gap(number, done.text[: len(done.text) // 2], None) == 0.0
    wrong = {"stop": "length", "length": "stop"}[done.finish_reason]
    assert oracle.gap(number, done.text, wrong) is None
