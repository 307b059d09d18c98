"""The scheduler's memory: prompts that begin alike are paid for once, budgets hold, and no answer shows any
of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatwright.config import UserError
from chatwright.generate.engine import Completion, Engine, Request
from chatwright.generate.runner import Feed
from chatwright.generate.sampling import Sampling
from chatwright.generate.torch_runner import TorchRunner
from chatwright.model.gpt import GPT

BOUND = 1e-4
"""As in test_engine.py."""

MakeModel = Callable[..., GPT]


class Counting(TorchRunner):
    """Remembers what was fed: one list of (start, tokens) per pass."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.passes: list[list[tuple[int, int]]] = []

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        self.passes.append([(feed.start, len(feed.ids)) for feed in feeds])
        return super().forward(feeds)

    @property
    def computed(self) -> int:
        return sum(tokens for feeds in self.passes for _, tokens in feeds)


def counting(model: GPT, **options: Any) -> tuple[Engine, Counting]:
    runner = Counting(model)
    return Engine(model, runner=runner, **options), runner


def tokens(count: int, seed: int = 0, vocab_size: int = 512) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab_size) for _ in range(count))


def assert_equal(one: Completion, other: Completion) -> None:
    assert (one.ids, one.finish_reason) == (other.ids, other.finish_reason)
    assert len(one.logprobs) == len(other.logprobs)
    if one.logprobs:
        assert np.abs(np.subtract(one.logprobs, other.logprobs)).max() <= BOUND


def fresh(model: GPT, request: Request) -> Completion:
    return Engine(model).generate([request])[0]


@pytest.mark.parametrize("length", [1, 5, 16, 17, 31, 32, 33, 50])
def test_samples_of_one_prompt_pay_its_prefill_once(make_model: MakeModel, length: int) -> None:
    model, samples = make_model(), 8
    engine, runner = counting(model)
    requests = [Request(tokens(length), Sampling(20, seed=at)) for at in range(samples)]
    completions = engine.generate(requests)
    assert runner.computed == length + (samples - 1) + samples * 19  # each further sample computes one token
    assert engine.stats.prompt_tokens == samples * length
    assert engine.stats.cached_tokens == (samples - 1) * (length - 1)
    assert [one.cached_tokens for one in completions] == [0] + [length - 1] * (samples - 1)
    for request, completion in zip(requests, completions, strict=True):
        assert_equal(completion, fresh(model, request))
    assert len({tuple(one.ids) for one in completions}) == samples


def test_all_samples_get_their_first_token_in_one_step(make_model: MakeModel) -> None:
    engine, runner = counting(make_model())
    for at in range(5):
        engine.submit(Request(tokens(40), Sampling(5, seed=at)))
    engine.step()
    assert runner.passes == [[(0, 40)], [(39, 1)] * 4]
    assert engine.active == 5


def test_a_shared_system_prompt_is_read_once(make_model: MakeModel) -> None:
    model = make_model()
    engine, runner = counting(model)
    system = tokens(40)
    requests = [Request((*system, *tokens(9, seed=at + 1)), Sampling(6, seed=at)) for at in range(6)]
    completions = engine.generate(requests)
    assert runner.computed <= 49 + 5 * (49 - 32) + 6 * 5  # whole pages at least
    for request, completion in zip(requests, completions, strict=True):
        assert_equal(completion, fresh(model, request))


def test_prompts_that_only_begin_alike_are_read_side_by_side(make_model: MakeModel) -> None:
    engine, runner = counting(make_model())
    for at in range(4):
        engine.submit(Request((1, 2, 3, 10 + at, *tokens(20, seed=at)), Sampling(2, seed=at)))
    engine.step()
    assert runner.passes == [[(0, 24)] * 4]


def test_the_next_turn_pays_for_what_is_new(make_model: MakeModel) -> None:
    model = make_model()
    engine, runner = counting(model)
    conversation = tokens(30)
    for turn in range(4):
        before = runner.computed
        answer = engine.generate([Request(conversation, Sampling(7, seed=turn))])[0]
        assert_equal(answer, fresh(model, Request(conversation, Sampling(7, seed=turn))))
        # The answer's last token was never fed.
        assert runner.computed - before == (30 if turn == 0 else 1 + 5) + 6
        conversation = (*conversation, *answer.ids, *tokens(5, seed=turn + 9))


def test_a_running_answer_can_be_taken_over(make_model: MakeModel) -> None:
    """What is stored may be used while its owner goes on writing behind it."""
    model = make_model()
    engine, runner = counting(model)
    first = Request(tokens(20), Sampling(30, seed=0))
    running = engine.submit(first)
    for _ in range(4):
        engine.step()
    second = Request((*tokens(20), 7, 8), Sampling(30, seed=1))
    other = engine.submit(second)
    engine.step()
    assert runner.passes[-1] == [(20, 2)]
    assert_equal(running.result(), fresh(model, first))
    assert_equal(other.result(), fresh(model, second))


def test_a_long_prompt_is_read_in_chunks_beside_running_answers(make_model: MakeModel) -> None:
    model = make_model(context=400)
    engine, runner = counting(model, prefill_tokens=32)
    short = Request((1, 2), Sampling(30, seed=0))
    running = engine.submit(short)
    engine.step()
    long, longer = Request(tokens(200), Sampling(5, seed=1)), Request(tokens(70, seed=2), Sampling(5, seed=2))
    handles = [engine.submit(long), engine.submit(longer)]
    said = []
    while not all(handle.finished for handle in handles):
        before = len(runner.passes)
        engine.step()
        read = [feeds for feeds in runner.passes[before:] if feeds[0][1] > 1]
        assert sum(count for feeds in read for _, count in feeds) <= 32
        said.append(running._ids[-1])
    assert len(said) >= 9  # nine chunks, and a token of the running answer with each
    assert_equal(running.result(), fresh(model, short))
    assert_equal(handles[0].result(), fresh(model, long))
    assert_equal(handles[1].result(), fresh(model, longer))


def test_without_running_answers_a_step_reads_more(make_model: MakeModel) -> None:
    engine, runner = counting(make_model(context=400), prefill_tokens=32)
    engine.submit(Request(tokens(300), Sampling(2)))
    engine.step()
    assert runner.passes == [[(0, 300)]]


def test_chunks_of_very_different_lengths_keep_their_order(make_model: MakeModel) -> None:
    model = make_model(context=400)
    requests = [
        Request(tokens(length, seed=length), Sampling(6, seed=length)) for length in (3, 300, 40, 90, 1)
    ]
    for request, completion in zip(requests, Engine(model).generate(requests), strict=True):
        assert_equal(completion, fresh(model, request))


def test_pages_run_out_and_the_last_request_goes_on_later(make_model: MakeModel) -> None:
    model = make_model()
    requests = [Request(tokens(20, seed=at), Sampling(60, temperature=0.9, seed=at)) for at in range(3)]
    engine, _ = counting(model, cache_tokens=128)  # one needs 79, all three 237
    handles = [engine.submit(request) for request in requests]
    pieces: list[list[int]] = [[], [], []]
    while engine.step():
        for row in engine._scheduler.running:
            pieces[row.number] = list(row.ids)
        assert engine.active <= 3
    assert engine.stats.preempted > 0
    assert handles[0].result().finish_reason == "length"
    for request, handle in zip(requests, handles, strict=True):
        assert_equal(handle.result(), fresh(model, request))
        assert [token for piece in handle.pieces() for token in piece.ids] == handle.result().ids
    assert engine._scheduler.pool.available == engine._scheduler.pool.pages


def test_penalties_survive_the_loss_of_pages(make_model: MakeModel) -> None:
    model = make_model()
    sampling = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "temperature": 0.5,
    }
    requests = [Request(tokens(20, seed=at), Sampling(60, seed=at, **sampling)) for at in range(3)]
    engine = Engine(model, cache_tokens=96)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert_equal(completion, fresh(model, request))
    assert engine.stats.preempted > 0


def test_what_can_never_fit_is_refused_with_the_arithmetic(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, cache_tokens=64)
    with pytest.raises(
        UserError, match=r"prompt of 40 tokens and an answer of up to 26 store up to 65 tokens.* holds 64"
    ):
        engine.submit(Request(tokens(40), Sampling(26)))
    request = Request(tokens(40), Sampling(25, seed=1))
    assert_equal(engine.generate([request])[0], fresh(model, request))
    with pytest.raises(UserError, match="cache_tokens is 15"):
        Engine(model, cache_tokens=15)
    with pytest.raises(UserError, match="prefill_tokens"):
        Engine(model, prefill_tokens=0)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which prompt it begins with
        st.integers(1, 40),  # how much of it
        st.integers(0, 6),  # and how many tokens of its own
        st.integers(1, 30),  # length of the answer
        st.integers(0, 4),  # steps before it comes
        st.sampled_from([None, None, None, 2, 9]),  # steps until it is cancelled
        st.booleans(),  # greedy
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=15, deadline=None)
@given(REQUESTS, st.integers(5, 12), st.integers(1, 4), st.sampled_from([3, 16, 64]), st.sampled_from([0, 4]))
def test_random_arrivals_in_little_memory_equal_a_fresh_engine(
    make_model: MakeModel, asked: list[Any], pages: int, max_batch: int, prefill: int, lookup: int
) -> None:
    model = make_model()
    engine = Engine(
        model, cache_tokens=16 * pages, max_batch=max_batch, prefill_tokens=prefill, lookup=lookup
    )
    running = []
    for number, (which, length, own, new, pause, cancel, greedy) in enumerate(asked):
        prompt = (*tokens(length, seed=which, vocab_size=7), *tokens(own, seed=number, vocab_size=7))
        request = Request(prompt, Sampling(new, 0.0 if greedy else 0.9, seed=number))
        running.append((request, engine.submit(request), cancel))
        for _ in range(pause):
            engine.step()
    steps = 0
    while engine.busy:
        for _, handle, cancel in running:
            if cancel is not None and steps >= cancel:
                handle.cancel()
        engine.step()
        steps += 1
        assert steps < 2_000
        used = [page for row in engine._scheduler.running for page in row.pages]
        assert sum(engine._scheduler.pool.users) == len(used)
    assert engine._scheduler.pool.available == engine._scheduler.pool.pages
    for request, handle, _ in running:
        expected, got = fresh(model, request), handle.result()
        if got.finish_reason == "cancelled":
            count = len(got.ids)
            expected = Completion(expected.ids[:count], "", "cancelled", expected.logprobs[:count], 0)
        assert_equal(got, expected)


def test_new_weights_make_old_pages_worthless(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model)
    request = Request(tokens(40), Sampling(5, temperature=0.0))
    before = engine.generate([request])[0]
    model.load_state_dict(make_model(seed=1).state_dict())  # torch counts this as a change
    assert_equal(engine.generate([request])[0], fresh(model, request))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.1)  # and this not, as with fused optimisers
    engine.forget()
    after = engine.generate([request])[0]
    assert_equal(after, fresh(model, request))
    assert after.ids != before.ids
    assert engine.stats.cached_tokens == 0
    engine.generate([request])
    assert engine.stats.cached_tokens == 39  # what was computed since then is known


def test_what_was_begun_before_forgetting_is_not_for_others(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model)
    request = Request(tokens(20), Sampling(40, temperature=0.0))
    running = engine.submit(request)
    engine.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    engine.forget()
    assert len(running.result().ids) == 40
    assert_equal(engine.generate([request])[0], fresh(model, request))
    assert engine.stats.cached_tokens == 0


def test_numbers_that_are_none_do_not_spread(make_model: MakeModel) -> None:
    """One request overflows; those beside it, and those that get its pages later, are as they would be."""
    model = make_model(context=400)
    with torch.no_grad():
        model.embed.weight[13] = float("nan")
    engine = Engine(model, cache_tokens=160, max_batch=4)
    never = {13: -100.0}
    good = [
        Request(tokens(18, seed=at, vocab_size=12), Sampling(20, seed=at, logit_bias=never))
        for at in range(8)
    ]
    bad = [Request((*tokens(20 + at, vocab_size=12), 13, 5), Sampling(5)) for at in range(3)]
    handles = [engine.submit(request) for pair in zip(good[:3], bad, strict=True) for request in pair]
    handles += [engine.submit(request) for request in good[3:]]
    for request in good:
        handle = next(handle for handle in handles if handle.request is request)
        assert_equal(handle.result(), fresh(model, request))
    for handle in handles:
        if handle.request in bad:
            with pytest.raises(UserError, match="not finite"):
                handle.result()


def test_the_last_page_of_a_failed_answer_is_not_for_others(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.embed.weight[13] = float("nan")
    engine = Engine(model)
    with pytest.raises(
        UserError, match="not finite"
    ):  # at the second token, in the page where the prompt ends
        engine.generate([Request(tokens(20, vocab_size=12), Sampling(9, 0.0, logit_bias={13: 100}))])
    request = Request(tokens(20, vocab_size=12), Sampling(9, 0.0, logit_bias={13: -100}))
    assert_equal(engine.generate([request])[0], fresh(model, request))
    assert engine.stats.cached_tokens == 16


def test_an_interrupt_leaves_nothing_behind(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    engine, runner = counting(model)
    request = Request(tokens(20), Sampling(9, seed=1))
    running = engine.submit(request)
    engine.step()

    def interrupt(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        running.result()
    assert engine._scheduler.pool.available == engine._scheduler.pool.pages
    assert_equal(engine.generate([request])[0], fresh(model, request))


def test_an_error_outside_of_a_pass_reaches_the_requests(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = counting(make_model())
    request = Request(tokens(20), Sampling(3, seed=1))
    engine.generate([request])

    def fail(*_: object) -> None:
        raise RuntimeError("no copies today")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "copy_page", fail)
        with pytest.raises(RuntimeError, match="no copies today"):
            engine.generate([request])
    assert not engine.busy
    assert len(engine.generate([request])[0].ids) == 3


def test_a_cache_that_is_too_large_for_the_machine_says_so(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="lower cache_tokens"):
        TorchRunner(make_model()).allocate(1 << 40, 16)


# Placeholders


def pictured(content: str, *, seed: int = 0, behind: int = 6) -> Request:
    """20 tokens of text, 20 placeholders of one image, and text behind them; always the same ids."""
    ids = (*tokens(20), *[3] * 20, *tokens(behind, seed=1))
    places = tuple((at, content) for at in range(20, 40)) if content else ()
    return Request(ids, Sampling(10, seed=seed), placeholders=places)


def test_two_images_behind_the_same_ids_share_nothing(make_model: MakeModel) -> None:
    model = make_model()
    engine, runner = counting(model)
    known = []
    for content in ("a", "b", "", "a", "b", ""):
        before = runner.computed
        completion = engine.generate([pictured(content)])[0]
        known.append(completion.cached_tokens)
        assert runner.computed - before == 46 - completion.cached_tokens + 9
        assert_equal(completion, fresh(model, pictured(content)))
    assert known == [0, 20, 20, 45, 45, 45]  # the text before the image, or all but the newest token


def test_an_answer_behind_an_image_is_known_with_it(make_model: MakeModel) -> None:
    """The next turn begins with the image, the text and the answer before."""
    engine, _ = counting(make_model())
    first = pictured("a")
    answer = engine.generate([first])[0]
    longer = (*first.prompt, *answer.ids, *tokens(5, seed=7))
    for content, known in (("b", 20), ("a", 46 + 9)):
        request = Request(longer, Sampling(2, seed=0), placeholders=pictured(content).placeholders)
        assert engine.generate([request])[0].cached_tokens == known


def test_who_comes_at_the_same_time_waits_only_for_the_same_image(make_model: MakeModel) -> None:
    engine, runner = counting(make_model())
    engine.generate([Request(tokens(20), Sampling(2))])  # the text before the image is known to all
    runner.passes.clear()
    for content in ("a", "b", "a"):
        engine.submit(pictured(content, seed=len(content)))
    engine.step()
    assert runner.passes == [[(20, 26)] * 2, [(45, 1)]]


def test_images_survive_the_loss_of_pages(make_model: MakeModel) -> None:
    model = make_model()
    requests = [
        Request(one.prompt, Sampling(50, temperature=0.9, seed=at), placeholders=one.placeholders)
        for at, one in enumerate(map(pictured, "aba"))
    ]
    engine, _ = counting(model, cache_tokens=176)  # one needs 95
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    assert engine.stats.preempted > 0
    for request, handle in zip(requests, handles, strict=True):
        assert_equal(handle.result(), fresh(model, request))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=20, max_size=40), st.sampled_from(["", "a", "b"])),
        min_size=2,
        max_size=5,
    )
)
def test_what_is_known_is_never_more_than_what_is_the_same(
    make_model: MakeModel, asked: list[tuple[list[int], str]]
) -> None:
    engine = Engine(make_model(layers=1))
    keys: list[list[Any]] = []
    for ids, content in asked:
        places = tuple((at, content) for at in range(5, 20)) if content else ()
        own: list[Any] = [(token, content) if 5 <= at < 20 else token for at, token in enumerate(ids)]
        found = engine.generate([Request(tuple(ids), Sampling(1, seed=0), placeholders=places)])[
            0
        ].cached_tokens
        assert found <= max((_common(own, other) for other in keys), default=0)
        keys.append(own)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@pytest.mark.parametrize("places", [((46, "a"),), ((-1, "a"),), ((0, "a"), (1, ""))])
def test_placeholders_that_are_none(make_model: MakeModel, places: tuple[tuple[int, str], ...]) -> None:
    with pytest.raises(
        UserError, match=r"placeholders must be positions in the prompt \(0 to 45\), each with a hash"
    ):
        Engine(make_model()).submit(Request(pictured("").prompt, placeholders=places))
