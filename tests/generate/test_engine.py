"""The scheduler: cached = uncached, alone = in company, joining, leaving."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from chatwright.config import UserError
from chatwright.generate.engine import Completion, Engine, Request
from chatwright.generate.sampling import Sampling
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "modern-nano": {},
    "gpt2": {
        "preset": "gpt2",
        "layers": 2,
        "width": 32,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 8,
        "mlp_width": 64,
        "vocab_size": 512,
    },
    "windows": {
        "windows": (5, 0),
        "window_rope_base": 100.0,
        "branch_norm": "both",
        "attention_softcap": 3.0,
        "attention_scale": 0.3,
        "embed_scale": 3.0,
    },
}
"""Rotary and learned positions, small; windows shorter than prompts and answers, and a soft cap on scores."""
BOUND = 1e-4
"""Most that float32 logits or log-probabilities may differ between ways of computing them (engine.py)."""

MakeModel = Callable[..., GPT]
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


def prompts(count: int, vocab_size: int, longest: int = 20, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))) for _ in range(count)]


@torch.no_grad()
def uncached_logits(model: GPT, sequence: list[int]) -> torch.Tensor:
    """(T, V) by one full forward pass."""
    logits: torch.Tensor = model(torch.tensor([sequence]))
    return logits[0]


@pytest.mark.parametrize("preset", list(SHAPES))
def test_greedy_is_the_argmax_of_uncached_passes(make_model: MakeModel, preset: str) -> None:
    model = make_model(context=160, **SHAPES[preset])
    prompt = (5, 9, 200)
    sampling = Sampling(max_new_tokens=90, temperature=0.0)  # more than a fresh cache has room for
    ids = Engine(model).generate([Request(prompt, sampling)])[0].ids
    assert len(ids) == 90
    assert len(set(ids)) > 5
    sequence = list(prompt)
    for token in ids[:64]:
        assert token == int(uncached_logits(model, sequence)[-1].argmax())
        sequence.append(token)
    whole = uncached_logits(model, [*prompt, *ids])
    assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_never_come_out(
    make_model: MakeModel, tokenizer: Tokenizer, temperature: float
) -> None:
    """Published models have more rows than tokens, and tokenizers have holes: however likely such ids are."""
    model = make_model(vocab_size=tokenizer.vocab_size + 40)
    content = json.loads(tokenizer.to_json())
    hole = content["model"]["vocab"].pop("z")
    content["model"]["vocab"]["z"] = tokenizer.vocab_size + 20
    holed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    known = set(holed.backend.get_vocab(with_added_tokens=True).values())
    beyond = tokenizer.vocab_size + 30
    assert len(known) == tokenizer.vocab_size and not {hole, beyond} & known
    with torch.no_grad():  # a hole, and a row beyond the tokenizer, are the likeliest everywhere
        model.head.weight[hole] = 5 * model.head.weight[:2].sum(0)
        model.head.weight[beyond] = -model.head.weight[hole]
    sampling = Sampling(30, temperature, top_logprobs=3, seed=1, logit_bias=((hole, 50.0),))
    requests = [Request(prompt, sampling) for prompt in prompts(3, hole)]
    for completion in Engine(model, holed).generate(requests):
        assert len(completion.ids) == 30 and set(completion.ids) <= known
        assert {token for step in completion.top_logprobs for token, _ in step} <= known
        assert all(np.isfinite(completion.logprobs))
    free = Engine(model).generate(requests)  # without a tokenizer nothing is known of the ids
    assert not set(free[0].ids) <= known


def test_logprobs_equal_those_of_a_full_pass(make_model: MakeModel) -> None:
    model = make_model()
    requests = [
        Request(prompt, Sampling(40, temperature, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=at))
        for at, (prompt, temperature) in enumerate(
            zip(prompts(6, 512), (1.0, 0.7, 1.5, 0.3, 0.0, 1.0), strict=True)
        )
    ]
    for request, completion in zip(requests, Engine(model).generate(requests), strict=True):
        logits = uncached_logits(model, [*request.prompt, *completion.ids])[len(request.prompt) - 1 : -1]
        expected = (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert len(completion.logprobs) == len(completion.ids) == 40
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=BOUND, rtol=0)


def test_alone_equals_in_company(make_model: MakeModel) -> None:
    model = make_model()
    requests = [
        Request(
            prompt,
            Sampling(5 + 3 * at, 0.0 if at % 4 == 0 else 0.9, top_p=0.9 if at % 3 else 1.0, seed=7 * at),
        )
        for at, prompt in enumerate(prompts(12, 512, seed=3))
    ]
    alone = [Engine(model).generate([request])[0] for request in requests]
    for max_batch in (2, 5, 16):
        for order in (list(range(12)), list(reversed(range(12)))):
            together = Engine(model, max_batch=max_batch).generate([requests[at] for at in order])
            for at, completion in zip(order, together, strict=True):
                assert completion.ids == alone[at].ids
                difference = np.abs(np.subtract(completion.logprobs, alone[at].logprobs)).max()
                assert difference <= BOUND


def test_logits_alone_and_in_company_differ_by_rounding_only(make_model: MakeModel) -> None:
    model = make_model("modern-tiny", layers=2)
    rows = prompts(9, 4096, longest=60, seed=1)
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[at < len(row) for at in range(longest)] for row in rows])
    with torch.no_grad():
        together = model(ids, mask=mask)
    for at, row in enumerate(rows):
        torch.testing.assert_close(
            together[at, : len(row)], uncached_logits(model, list(row)), atol=BOUND, rtol=0
        )


def test_seeds_reproduce_and_differ(make_model: MakeModel) -> None:
    engine = Engine(make_model())

    def ids(seed: int | None) -> list[int]:
        return engine.generate([Request((1, 2, 3), Sampling(30, seed=seed))])[0].ids

    assert ids(1) == ids(1)
    assert len({tuple(ids(seed)) for seed in (1, 2, 3, None, None)}) == 5


def test_end_ids_end_and_order_is_kept(make_model: MakeModel) -> None:
    model = make_model()
    ends = frozenset(range(0, 512, 9))
    requests = [
        Request(prompt, Sampling(25, seed=at), ends, id=str(at))
        for at, prompt in enumerate(prompts(30, 512, seed=5))
    ]
    completions = Engine(model, max_batch=4).generate(requests)
    reasons = set()
    for request, completion in zip(requests, completions, strict=True):
        assert completion.ids == Engine(model).generate([request])[0].ids
        assert completion.prompt_tokens == len(request.prompt)
        assert completion.text == ""
        assert not ends & set(completion.ids[:-1])
        assert completion.finish_reason == ("stop" if completion.ids[-1] in ends else "length")
        assert completion.finish_reason == "stop" or len(completion.ids) == 25
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_waiting_requests_join_as_soon_as_a_place_is_free(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, max_batch=2)
    lengths = [30, 3, 4, 5]
    requests = [
        Request(prompt, Sampling(n, seed=n)) for n, prompt in zip(lengths, prompts(4, 512), strict=True)
    ]
    handles = [engine.submit(request) for request in requests]
    assert engine.waiting == 4
    steps, most = 0, 0
    finished_at: dict[int, int] = {}
    while engine.step():
        steps += 1
        most = max(most, engine.active)
        for at, handle in enumerate(handles):
            if handle.finished:
                finished_at.setdefault(at, steps)
    assert most == 2
    assert finished_at[1] < finished_at[2] < finished_at[3] < finished_at[0]
    assert steps <= 30  # the short ones ran beside the long one
    for handle, request in zip(handles, requests, strict=True):
        assert handle.result().ids == Engine(model).generate([request])[0].ids
    assert not engine.busy
    assert engine._scheduler.pool.available == engine._scheduler.pool.pages  # nobody holds memory


def test_one_free_place_among_many_is_given_away_at_once(make_model: MakeModel) -> None:
    engine = Engine(make_model(), max_batch=12)
    handles = [engine.submit(Request((at,), Sampling(2 if at == 5 else 9, seed=at))) for at in range(13)]
    engine.step()
    assert engine.waiting == 1
    engine.step()  # the short one ends, and the last one gets its first token
    assert handles[5].finished
    assert engine.waiting == 0
    assert engine.active == 12
    assert [len(handle.result().ids) for handle in handles] == [9] * 5 + [2] + [9] * 7


def test_cancelling_frees_the_place_at_the_next_step(make_model: MakeModel) -> None:
    engine = Engine(make_model(context=2_000), max_batch=1)
    long = Request((1, 2), Sampling(1_900, seed=0))
    running, never, next_one = (
        engine.submit(long),
        engine.submit(long),
        engine.submit(Request((3,), Sampling(4))),
    )
    for _ in range(3):
        engine.step()
    running.cancel()
    never.cancel()
    engine.step()
    completion = running.result()
    assert completion.finish_reason == "cancelled"
    assert len(completion.ids) == len(completion.logprobs) == 3
    assert never.result() == Completion([], "", "cancelled", [], 2)
    assert engine.active == 1
    assert next_one.result().finish_reason == "length"
    next_one.cancel()  # too late: nothing happens
    assert next_one.result().finish_reason == "length"


def test_who_leaves_the_queue_is_out_of_it_wherever_he_stood(make_model: MakeModel) -> None:
    engine = Engine(make_model(context=2_000), max_batch=1)
    long = Request((1, 2), Sampling(1_900, seed=0))
    running, first, second, third = (engine.submit(long) for _ in range(4))
    engine.step()
    second.cancel()
    engine.step()
    assert second.result().finish_reason == "cancelled"
    assert (engine.waiting, first.finished, third.finished, running.finished) == (2, False, False, False)


def test_a_handle_is_read_without_waiting_and_tells_before_it_is_read(make_model: MakeModel) -> None:
    engine = Engine(make_model(), max_batch=1)
    told: list[tuple[int, bool]] = []
    handle = engine.submit(
        Request((1, 2), Sampling(4, seed=0)), on_change=lambda tokens, ended: told.append((tokens, ended))
    )
    assert (handle.take(), handle.completion) == (None, None)
    engine.step()
    engine.step()
    piece = handle.take()
    assert piece is not None and len(piece.ids) == 2 and piece.finish_reason is None  # two steps, one piece
    assert handle.take() is None
    while engine.step():
        pass
    last = handle.take()
    assert last is not None and last.finish_reason == "length"
    assert handle.take() is None and list(handle.pieces()) == []
    assert told == [(1, False), (1, False), (1, False), (1, True)]
    assert handle.completion is handle.result() and piece.ids + last.ids == handle.completion.ids


def test_leaving_a_stream_cancels_it(make_model: MakeModel) -> None:
    engine = Engine(make_model(context=2_000))
    for count, _ in enumerate(engine.stream(Request((1,), Sampling(1_900))), start=1):
        if count == 3:
            break
    engine.step()
    assert not engine.busy


@pytest.mark.parametrize("preset", list(SHAPES))
def test_the_context_ends_an_answer(make_model: MakeModel, preset: str) -> None:
    model = make_model(context=24, **SHAPES[preset])
    requests = [Request(tuple(range(1, size + 1)), Sampling(100, seed=size)) for size in (23, 20, 3)]
    others = [Request((at, 2), Sampling(15, seed=at)) for at in range(13)]
    # Among so many, full rows stay in the batch for a while beside those that go on.
    completions = Engine(model).generate([*requests, *others])
    assert [len(completion.ids) for completion in completions] == [1, 4, 21] + [15] * 13
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert completions[2].ids == Engine(model).generate([requests[2]])[0].ids
    assert len(Engine(model, max_context=10).generate([requests[2]])[0].ids) == 7
    with pytest.raises(UserError, match="24 tokens, but the context holds 24"):
        Engine(model).submit(Request(tuple(range(24))))
    with pytest.raises(UserError, match="10 tokens, but the context holds 10"):
        Engine(model, max_context=10).submit(Request(tuple(range(10))))


def test_what_cannot_work_is_refused(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model()
    engine = Engine(model)
    for request, words in [
        (Request(()), "no tokens"),
        (Request((1, 512)), "0 to 511"),
        (Request((-1,)), "0 to 511"),
        (Request((1,), Sampling(stop=("x",))), "tokenizer"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.submit(request)
    wrong: list[dict[str, Any]] = [{"max_batch": 0}, {"max_context": 1}, {"max_context": 129}]
    for options in wrong:
        with pytest.raises(UserError, match="engine"):
            Engine(model, **options)
    with pytest.raises(UserError, match="do not belong together"):
        Engine(make_model(vocab_size=100), tokenizer)
    with pytest.raises(UserError, match="no tokens"):
        engine.generate([Request((1,)), Request(())])
    engine.step()
    assert not engine.busy  # the good one was given up as well


def test_modes_and_random_state_are_left_alone(make_model: MakeModel) -> None:
    request = Request((1, 2, 3), Sampling(10, seed=1))
    expected = Engine(make_model()).generate([request])[0]
    model = make_model(dropout=0.5)
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].copy(),
    )
    assert Engine(model).generate([request])[0] == expected
    Engine(model).generate([Request((1,), Sampling(3))])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)
    model(torch.tensor([[1, 2]])).sum().backward()  # still a model that trains


class Fragile(GPT):
    """Fails on token 13, as a broken kernel or a full memory would."""

    def hidden(self, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if (ids == 13).any():
            raise ValueError("token 13")
        return super().hidden(ids, **arguments)


def test_an_error_hits_only_the_requests_of_its_step(make_model: MakeModel) -> None:
    model = make_model()
    model.__class__ = Fragile
    engine = Engine(model)
    good = Request((1, 2), Sampling(12, temperature=0.0))
    first = engine.submit(good)
    engine.step()
    bad = engine.submit(Request((13,), GREEDY))
    engine.step()
    with pytest.raises(RuntimeError, match="token 13"):
        bad.result()
    with pytest.raises(RuntimeError, match="token 13"):
        list(bad.pieces())
    assert len(first.result().ids) == 12
    hit = engine.submit(good)
    engine.step()
    engine._scheduler.running[0].tokens[-1] = 13  # as if it had been drawn
    with pytest.raises(RuntimeError, match="token 13"):
        hit.result()
    again = engine.generate([good])[0]  # with what is known from before: equal up to rounding
    assert again.ids == first.result().ids
    assert np.abs(np.subtract(again.logprobs, first.result().logprobs)).max() <= BOUND


def test_a_model_that_diverged_is_reported(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        Engine(model).generate([Request((1,))])
