"""Guesses from the prompt: the answer is the one that a greedy row gives anyway, in fewer passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from chatwright.generate.engine import LOOKUP_SEQUENCES, Engine, Request
from chatwright.generate.runner import Feed
from chatwright.generate.sampling import Sampling
from chatwright.generate.speculation import PATIENCE, Lookup
from chatwright.generate.torch_runner import TorchRunner
from chatwright.model.gpt import GPT

BOUND = 1e-4
"""As in test_engine.py."""

MakeModel = Callable[..., GPT]


def repeating(model: GPT, strength: float) -> GPT:
    """Makes each of eight tokens in turn likelier after the one before: answers fall into loops, and out of
    them."""
    with torch.no_grad():
        ids = torch.arange(model.config.vocab_size)
        model.head.weight += strength * model.embed.weight[ids - ids % 8 + (ids - 1) % 8]
    return model


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = random.Random(1)
    words = [[rng.randrange(512) for _ in range(4)] for _ in range(3)]
    return [
        tuple(token for _ in range(rng.randint(1, 5)) for token in rng.choice(words)) for _ in range(count)
    ]


def test_the_last_occurrence_of_three_tokens_then_of_two() -> None:
    text = [1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 8, 1, 2, 3]
    assert Lookup(8).propose(text, 8) == [4, 5, 9, 2, 3, 6, 7, 8]
    assert Lookup(4).propose(text, 8) == [4, 5, 9, 2]
    assert Lookup(8).propose(text, 2) == [4, 5]
    assert Lookup(8).propose([9, 1, *text[1:], 0, 2, 3], 3) == [
        0,
        2,
        3,
    ]  # no such three: the last 2, 3 before
    assert Lookup(8).propose([1, 2, 3, 4, 7, 3, 1], 8) == []
    assert Lookup(8).propose([5, 5, 5, 5], 8) == [5] * 8
    assert Lookup(8).propose([1], 8) == Lookup(8).propose([1, 2], 8) == []
    lookup, text = Lookup(8), [1, 2]
    for token in (3, 1, 2):
        text.append(token)
        said = lookup.propose(text, 8)
    assert said == [3, 1, 2, 3, 1, 2, 3, 1]


def test_who_keeps_failing_guesses_less_often() -> None:
    lookup, text = Lookup(8), [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    sizes, rests = [], []
    for _ in range(300):
        guess = lookup.propose(text, 8)
        rests.append(not guess)
        if guess:
            sizes.append(len(guess))
            lookup.learn(len(guess), 0)
    assert sizes[:5] == [8, 4, 2, 1, 1]
    assert sum(rests[-100:]) >= 90
    assert any(not any(rests[at : at + 2]) for at in range(10))
    while not (guess := lookup.propose(text, 8)):
        pass
    lookup.learn(1, 1)
    assert lookup.propose(text, 8) == [1, 2]  # and twice as much after a success
    assert PATIENCE < 100


@pytest.mark.parametrize("preset", ["modern-nano", "gpt2"])
@pytest.mark.parametrize("strength", [0.0, 5.0, 40.0])
def test_greedy_answers_are_the_same(make_model: MakeModel, preset: str, strength: float) -> None:
    shape = (
        {}
        if preset == "modern-nano"
        else {"layers": 2, "width": 32, "heads": 4, "vocab_size": 512, "context": 128}
    )
    model = repeating(make_model(preset, **shape), strength)
    accepted = proposed = 0
    for at, prompt in enumerate(prompts(12)):
        request = Request(prompt, Sampling(70, temperature=0.0, top_logprobs=2), frozenset({at}))
        plain = Engine(model).generate([request])[0]
        engine = Engine(model, lookup=8)
        guessed = engine.generate([request])[0]
        assert guessed.ids == plain.ids
        assert guessed.finish_reason == plain.finish_reason
        assert np.abs(np.subtract(guessed.logprobs, plain.logprobs)).max() <= BOUND
        for one, other in zip(guessed.top_logprobs, plain.top_logprobs, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
        proposed += engine.stats.proposed
        accepted += engine.stats.accepted
        assert engine.stats.new_tokens == len(plain.ids)
        assert engine._scheduler.pool.available == engine._scheduler.pool.pages
        # What is stored after wrong guesses is right: another turn reads it.
        more = Request((*prompt, *plain.ids[:20], 3), Sampling(5, temperature=0.0))
        assert engine.generate([more])[0].ids == Engine(model).generate([more])[0].ids
    assert proposed > accepted > (20 if strength else 0)


def test_fewer_passes(make_model: MakeModel) -> None:
    class Counting(TorchRunner):
        passes = 0

        def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
            self.passes += 1
            return super().forward(feeds)

    model = repeating(make_model(), 40.0)
    runner = Counting(model)
    engine = Engine(model, runner=runner, lookup=8)
    ids = engine.generate([Request(prompts(1)[0], Sampling(80, temperature=0.0))])[0].ids
    assert len(ids) == 80
    assert runner.passes == 80 - engine.stats.accepted < 40


def test_who_draws_or_looks_back_does_not_guess(make_model: MakeModel) -> None:
    model = repeating(make_model(), 40.0)
    for sampling in (
        Sampling(40, seed=1),
        Sampling(40, temperature=0.0, repetition_penalty=1.1),
        Sampling(40, temperature=0.0, presence_penalty=0.1),
        Sampling(40, temperature=0.0, frequency_penalty=0.1),
    ):
        engine = Engine(model, lookup=8)
        request = Request(prompts(1)[0], sampling)
        assert engine.generate([request])[0] == Engine(model).generate([request])[0]
        assert engine.stats.proposed == 0


def test_beside_others(make_model: MakeModel) -> None:
    """A row that guesses runs beside one that draws; among many nobody guesses."""
    model = repeating(make_model(), 40.0)
    requests = [
        Request(prompt, Sampling(60, 0.0 if at % 2 else 0.9, seed=at)) for at, prompt in enumerate(prompts(6))
    ]
    alone = [Engine(model).generate([request])[0] for request in requests]
    engine = Engine(model, lookup=8, max_batch=2)
    assert [one.ids for one in engine.generate(requests)] == [one.ids for one in alone]
    assert engine.stats.accepted > 20
    crowd = Engine(model, lookup=8)
    handles = [crowd.submit(request) for request in requests]
    for _ in range(30):
        crowd.step()
    assert crowd.active > LOOKUP_SEQUENCES
    assert crowd.stats.proposed == 0
    assert [handle.result().ids for handle in handles] == [one.ids for one in alone]
