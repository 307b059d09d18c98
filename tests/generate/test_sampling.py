"""Filters against transformers, draws against their distribution, and the random stream of a request."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from chatwright.config import UserError
from chatwright.generate.sampling import (
    BatchSampler,
    Sampling,
    make_generator,
    nth_seed,
    process_logits,
    sample,
)

CHI_SQUARE_1E4 = {7: 29.9, 29: 64.6}
"""Degrees of freedom -> the value that chance exceeds once in 10,000 times."""


def random_logits(rows: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def batch(
    settings: list[Sampling], vocab_size: int, histories: list[list[int]] | None = None
) -> BatchSampler:
    generators = [make_generator(sampling) for sampling in settings]
    return BatchSampler(settings, generators, histories or [[]] * len(settings), vocab_size=vocab_size)


def reference(logits: torch.Tensor, previous: list[int], sampling: Sampling) -> torch.Tensor:
    """transformers' processors in transformers' order."""
    ids: Any = torch.tensor([previous], dtype=torch.long)
    scores: Any = logits[None]
    if sampling.repetition_penalty != 1.0:
        scores = theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    if sampling.temperature not in (0.0, 1.0):
        scores = theirs.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = theirs.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1.0:
        scores = theirs.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = theirs.MinPLogitsWarper(sampling.min_p)(ids, scores)
    result: torch.Tensor = scores[0]
    return result


SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 10_000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.03},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 1.7, "top_k": 200, "top_p": 0.8, "repetition_penalty": 1.9},
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 700])
def test_filters_equal_those_of_transformers(values: dict[str, Any], vocab_size: int) -> None:
    sampling, previous = Sampling(**values), [3, 7, 7, 20, 49]
    for seed in range(5):
        logits = random_logits(1, vocab_size, seed=seed)[0]
        torch.testing.assert_close(
            process_logits(logits, previous, sampling), reference(logits, previous, sampling)
        )


def test_top_p_of_a_flat_distribution_needs_the_whole_vocabulary() -> None:
    logits = random_logits(1, 3_000, scale=0.1)[0]
    kept = process_logits(logits, [], Sampling(top_p=0.9))
    assert torch.isfinite(kept).sum() > 2_000  # far more than the first look takes in
    torch.testing.assert_close(kept, reference(logits, [], Sampling(top_p=0.9)))


def test_rows_of_a_batch_have_their_own_settings() -> None:
    settings = [Sampling(**values) for values in SETTINGS] + [
        Sampling(temperature=0.0, top_k=2, repetition_penalty=1.5)
    ]
    histories = [[row, row + 1, 30] for row in range(len(settings))]
    logits = random_logits(len(settings), 60)
    processed = batch(settings, 60, histories).process(logits)
    for row, sampling in enumerate(settings[:-1]):
        torch.testing.assert_close(processed[row], reference(logits[row], histories[row], sampling))
    only_penalty = Sampling(repetition_penalty=1.5)
    torch.testing.assert_close(processed[-1], reference(logits[-1], histories[-1], only_penalty))


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert sample(logits, Sampling(temperature=0.0)) == 1
    assert sample(logits, Sampling(temperature=0.0, repetition_penalty=1.2), previous=[1]) == 2
    assert sample(logits, Sampling(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)) == 1


@pytest.mark.parametrize(
    "values",
    [
        *({"temperature": one} for one in (1e-320, 1e-45, 1e-38, 1e-30, 1e-8, 9.9e-5)),
        {"top_p": 0.0},
        {"top_p": 1e-320},
        {"top_p": 9e-7, "temperature": 50.0},
        {"temperature": 1e-8, "top_p": 0.0, "top_k": 5, "min_p": 0.5},
    ],
    ids=str,
)
def test_as_good_as_greedy(values: dict[str, Any]) -> None:
    """Also where rounding would make infinities or nothing of it, where tokens tie, and in a mixed batch."""
    logits = random_logits(1, 90)[0] * 30
    logits[[7, 50]] = logits.max() + 1
    cold = Sampling(**values, seed=1)
    assert cold.greedy
    assert make_generator(cold) is None
    greedy = Sampling(temperature=0.0)
    assert sample(logits, cold) == sample(logits, greedy) == 7
    settings = [cold, Sampling(seed=3, temperature=2.0), greedy]
    ids, logprobs = batch(settings, 90)(logits.expand(3, -1))
    alone, _ = batch(settings[1:2], 90)(logits[None])
    assert ids.tolist() == [7, alone.item(), 7]
    assert torch.isfinite(logprobs).all()
    expected = (logits / cold.scale).log_softmax(-1)[7]
    torch.testing.assert_close(logprobs[0], expected)
    if "top_p" not in values:
        torch.testing.assert_close(logprobs[0], logprobs[2])  # the temperature counts as 1


def test_behaviour_is_continuous_where_greedy_begins() -> None:
    """At the lowest temperature that is drawn with, the likeliest token has all of the probability, and a
    token 0.002 behind has e^-20 of it."""
    from chatwright.generate.sampling import COLDEST

    logits = torch.tensor([1.0, 3.0, 2.998, -1.0])
    sampling = Sampling(temperature=COLDEST, seed=0)
    assert not sampling.greedy
    assert {sample(logits, replace(sampling, seed=seed)) for seed in range(200)} == {1}
    probability = process_logits(logits, [], sampling).softmax(-1)
    assert probability[1] == pytest.approx(1.0, abs=1e-6)
    assert probability[2] == pytest.approx(math.exp(-20), rel=0.1)  # float32: 3 - 2.998 has few digits
    kept = process_logits(logits, [], Sampling(top_p=1e-6))
    assert torch.isfinite(kept).tolist() == [False, True, False, False]


def test_seeds_of_all_64_bits() -> None:
    def stream(seed: int) -> list[float]:
        generator = make_generator(Sampling(seed=seed))
        return torch.rand(4, generator=generator).tolist()

    assert stream(-1) == stream(2**64 - 1) != stream(1)
    assert stream(-(2**63)) == stream(2**63)
    known = torch.rand(4, generator=torch.Generator().manual_seed(12345)).tolist()
    assert stream(12345) == known  # small seeds are as they ever were
    assert [nth_seed(seed, 2) for seed in (5, -2, 2**64 - 1)] == [7, 0, 1]


def test_penalty_sees_the_tokens_drawn_so_far() -> None:
    sampler = batch([Sampling(temperature=0.0, repetition_penalty=10.0)], 4)
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    assert [int(sampler(logits)[0]) for _ in range(4)] == [1, 2, 0, 3]


def test_presence_frequency_and_bias_worked_by_hand() -> None:
    # OpenAI: logit - count * frequency_penalty - (count > 0) * presence_penalty, counted in the answer; then
    # the bias.
    sampling = Sampling(
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.0, 1: -1.0}, temperature=0.5
    )
    plain = Sampling()
    history = [0, 0, 1, 2, 2, 2]  # the prompt is 0, 0; the answer 1, 2, 2, 2
    generators = [make_generator(one) for one in (sampling, plain)]
    sampler = BatchSampler([sampling, plain], generators, [history] * 2, answered=[4, 4], vocab_size=4)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    processed = sampler.process(logits)
    by_hand = [1.0, 2.0 - 0.25 - 0.5 - 1.0, 3.0 - 3 * 0.25 - 0.5, 4.0 + 2.0]
    torch.testing.assert_close(processed[0], torch.tensor(by_hand) / 0.5)
    torch.testing.assert_close(processed[1], logits[1])
    negative = BatchSampler(
        [Sampling(frequency_penalty=-1.0)], [None], [[1, 1]], answered=[2], vocab_size=2
    ).process(torch.zeros(1, 2))
    assert negative.tolist() == [[0.0, 2.0]]


def test_presence_and_frequency_see_the_tokens_drawn_so_far() -> None:
    def greedy(logits: list[float], draws: int, **penalties: float) -> list[int]:
        sampler = batch([Sampling(temperature=0.0, **penalties)], len(logits))
        return [int(sampler(torch.tensor([logits]))[0]) for _ in range(draws)]

    assert greedy([3.0, 2.0, 1.5], 6, presence_penalty=1.2) == [0, 1, 0, 0, 0, 0]
    assert greedy([3.0, 2.0, 1.5], 6, frequency_penalty=0.6) == [0, 0, 1, 0, 2, 1]


def test_a_bias_can_forbid_and_force() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert sample(logits, Sampling(temperature=0.0, logit_bias=[(1, -100.0)])) == 2
    assert sample(logits, Sampling(logit_bias={3: 100.0}, seed=0)) == 3
    assert Sampling(logit_bias={3: 1}) == Sampling(logit_bias=((3, 1),))
    assert hash(Sampling(logit_bias={3: 1.0})) == hash(Sampling(logit_bias=[[3, 1.0]]))  # type: ignore[arg-type]


def test_alternatives_are_the_likeliest_tokens_before_penalties() -> None:
    settings = [
        Sampling(top_logprobs=3, temperature=0.5, logit_bias={7: 50.0}, seed=1),
        Sampling(),
        Sampling(top_logprobs=1, temperature=0.0),
    ]
    logits = random_logits(3, 40, seed=2)
    top = batch(settings, 40).alternatives(logits)
    expected = (logits[0] / 0.5).log_softmax(-1).sort(descending=True)
    assert [token for token, _ in top[0][0]] == expected.indices[:3].tolist()
    torch.testing.assert_close(torch.tensor([value for _, value in top[0][0]]), expected.values[:3])
    assert top[1] == []
    assert [len(one) for one in top[2]] == [1]
    assert top[2][0][0][0] == int(logits[2].argmax())


@pytest.mark.parametrize(
    ("values", "vocab_size"),
    [({}, 30), ({"temperature": 1.6}, 30), ({"top_k": 8}, 60), ({"temperature": 0.8, "top_p": 0.9}, 30)],
    ids=str,
)
def test_draws_follow_the_distribution(values: dict[str, Any], vocab_size: int) -> None:
    draws, sampling = 20_000, Sampling(**values)
    logits = random_logits(1, vocab_size, scale=1.0, seed=4)
    generator = torch.Generator().manual_seed(1)
    sampler = BatchSampler([sampling] * draws, [generator] * draws, [[]] * draws, vocab_size=vocab_size)
    ids, _ = sampler(logits.expand(draws, -1))
    counts = torch.bincount(ids, minlength=vocab_size).double()
    expected = process_logits(logits[0], [], sampling).double().softmax(-1) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    bound = CHI_SQUARE_1E4.get(freedom, freedom + 4 * math.sqrt(2 * freedom) + 8)
    assert statistic < bound
    wrong = (logits[0] * 1.15).softmax(-1).double()[possible] * draws  # the test can tell a wrong temperature
    assert ((counts[possible] - wrong) ** 2 / wrong).sum() > bound


def test_logprobs_are_those_before_the_filters() -> None:
    settings = [
        Sampling(temperature=0.7, top_k=3, top_p=0.5, repetition_penalty=1.5, seed=1),
        Sampling(temperature=0.0, repetition_penalty=1.5),
        Sampling(seed=3),
    ]
    logits = random_logits(3, 40, seed=8)
    ids, logprobs = batch(settings, 40, [[1, 2]] * 3)(logits)
    temperatures = torch.tensor([0.7, 1.0, 1.0])[:, None]
    expected = (logits / temperatures).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def test_a_stream_does_not_depend_on_the_batch() -> None:
    def draw(seeds: list[int], row: int) -> list[int]:
        sampler = batch([Sampling(seed=seed) for seed in seeds], 500)
        logits = random_logits(1, 500, scale=1.0).expand(len(seeds), -1)
        return [int(sampler(logits)[0][row]) for _ in range(30)]

    alone = draw([5], 0)
    assert draw([1, 5, 9, 5], 1) == alone
    assert draw([1, 5, 9, 5], 3) == alone
    assert draw([6], 0) != alone


def test_no_seed_means_a_fresh_stream_and_the_global_one_stays() -> None:
    state = torch.get_rng_state()
    logits = torch.zeros(10_000)
    draws = {sample(logits, Sampling()) for _ in range(8)}
    assert len(draws) > 4
    assert torch.equal(torch.get_rng_state(), state)


def test_impossible_tokens_are_never_drawn_and_broken_rows_are_marked() -> None:
    logits = torch.full((4, 9), -math.inf)
    logits[0, 5] = 1.0
    logits[1] = math.nan
    logits[2, :3] = torch.tensor([0.0, math.inf, 0.0])
    ids, logprobs = batch([Sampling(seed=0)] * 4, 9)(logits)
    assert int(ids[0]) == 5
    assert float(logprobs[0]) == 0.0
    assert not logprobs[1:].isfinite().any()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": -0.01}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": "text"}, "stop"),
        ({"stop": ("a", "")}, "stop"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"logit_bias": {-3: 1}}, "logit_bias"),
        ({"logit_bias": ((1, 2, 3),)}, "logit_bias"),
        ({"logit_bias": "1:2"}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"seed": -(2**64)}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.0}, "seed"),
    ],
    ids=str,
)
def test_values_without_sense_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**values)


DRAWN = (
    "Sampling(temperature=0.0)",
    "Sampling(temperature=0.7, top_p=0.9, seed=1)",
    "Sampling(top_k=50, min_p=0.01, top_logprobs=5, seed=1)",
    "Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={3: 1.0}, "
    "seed=1)",
)


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="threads are counted by Linux only: NOT covered here"
)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("sampling", DRAWN)
def test_no_other_thread_is_waked(sampling: str, alone: bool) -> None:
    """The kernels' own threads need the processors (runtime.one_thread); MKL's would not keep to that. A
    process that never had torch or MKL begin a second thread has none that waits. Without one_thread the same
    settings do begin some."""
    program = f"""
import contextlib, os
import torch
from chatwright import runtime
from chatwright.generate.sampling import BatchSampler, Sampling, make_generator
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
with runtime.one_thread() if {alone} else contextlib.nullcontext():
    row = torch.linspace(-8, 8, 49_152)
    logits = torch.stack((row, row.flip(0)))
    settings = [{sampling}] * 2
    generators = [make_generator(one) for one in settings]
    sampler = BatchSampler(settings, generators, [[1, 2], [3]], answered=[1, 1], vocab_size=row.numel())
    sampler(logits)
    sampler(logits, torch.stack((row > -4, row < 4)))
    sampler.alternatives(logits)
print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment
    )
    assert not done.returncode, done.stderr
    assert (int(done.stdout) == 0) == alone
