"""Rollouts: sampler and trainer agree on every token, values stand before their tokens, answers are judged as
said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chatwright import language_model
from chatwright.chat import NATIVE, ChatTemplate
from chatwright.data.examples import Dialogue
from chatwright.generate.engine import Engine, Request
from chatwright.generate.sampling import Sampling
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.tokenizer import Tokenizer
from chatwright.train.rl.prompts import exchanges_from
from chatwright.train.rl.rollout import (
    Completions,
    completion_log_probs,
    degenerate,
    distinct,
    sample_completions,
    texts_of,
    values_before,
)

END = 5
PROMPTS = [[7, 8, 9], [11], [20, 21, 22, 23, 24, 25, 26, 27, 28], [40, 41]] * 3


def sampled(model: GPT, temperature: float, **changes: Any) -> Completions:
    settings: dict[str, Any] = {"end": END, "max_new_tokens": 12, "seed_parts": (1, "test"), **changes}
    return sample_completions(model, PROMPTS, temperature=temperature, **settings)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_sampler_and_trainer_agree_on_log_probabilities(
    lively_gpt: Callable[..., GPT], temperature: float, preset: str
) -> None:
    shape = (
        {}
        if preset == "modern"
        else {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": True}
    )
    model = lively_gpt(3, **shape)
    answers = sampled(model, temperature)
    with torch.no_grad():
        found, _ = completion_log_probs(model, answers, temperature=temperature)
        other, _ = completion_log_probs(model, answers, temperature=1.0 if temperature < 1 else 0.7)
    assert float((found - answers.sampled).abs().max()) < 1e-4
    assert float((found * ~answers.response).abs().max()) == 0.0
    # the mutation: logits divided by another temperature than they were drawn with
    assert float((other - answers.sampled).abs().max()) > 0.1


@torch.no_grad()
def test_log_probabilities_are_those_of_each_row_alone(lively_gpt: Callable[..., GPT]) -> None:
    model = lively_gpt(4)
    answers = sampled(model, 0.7)
    found, entropies = completion_log_probs(model, answers, temperature=0.7, entropy="known")
    for row, prompt in enumerate(PROMPTS[:4]):
        ids = answers.ids[row][answers.real[row]]
        log_p = (model(ids[None])[0] / 0.7).log_softmax(-1)
        for t in range(len(prompt), len(ids)):
            assert float(found[row, t]) == pytest.approx(float(log_p[t - 1, ids[t]]), abs=1e-4)
            expected = -float((log_p[t - 1].exp() * log_p[t - 1]).sum())
            assert float(entropies[row, t]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_logits_are_float32_products_even_where_the_model_computes_in_bf16(
    lively_gpt: Callable[..., GPT],
) -> None:
    model = lively_gpt(4)
    answers = sampled(model, 1.0)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model.head.register_forward_hook(lambda _, given, found: seen.append((given[0].dtype, found.dtype)))
    model.blocks[0].mlp.register_forward_hook(lambda _, __, found: seen.append((found.dtype, found.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = completion_log_probs(model, answers, temperature=1.0)
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]
    exact, _ = completion_log_probs(model, answers, temperature=1.0)
    assert 1e-5 < float((found - exact).abs().max()) < 0.2


@torch.no_grad()
def test_who_computes_in_bf16_samples_in_bf16(
    lively_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        language_model, "WORTH_COPYING", 0
    )  # else models as small as this one sample for themselves
    model = lively_gpt(4)
    exact, rounded = sampled(model, 1.0), sampled(model, 1.0, dtype=torch.bfloat16)
    gaps = [
        float((completion_log_probs(model, one, temperature=1.0)[0] - one.sampled).abs().max())
        for one in (exact, rounded)
    ]
    assert gaps[0] < 1e-4 and 1e-3 < gaps[1] < 0.2


def test_answers_know_where_they_begin_and_whether_they_end(lively_gpt: Callable[..., GPT]) -> None:
    model = lively_gpt(5, vocab_size=12)
    prompts = [[number % 12 for number in prompt] for prompt in PROMPTS]
    answers = sample_completions(model, prompts, end=END, max_new_tokens=12, temperature=1.0, seed_parts=(2,))
    assert 0 < int(answers.finished.sum()) < len(prompts)  # some of each kind
    for row, prompt in enumerate(prompts):
        ids = answers.ids[row][answers.real[row]].tolist()
        answer = answers.ids[row][answers.response[row]].tolist()
        assert ids == [*prompt, *answer]
        assert 1 <= len(answer) <= 12
        assert END not in answer[:-1]
        assert bool(answers.finished[row]) == (answer[-1] == END)
        assert bool(answers.finished[row]) or len(answer) == 12


def test_each_answer_has_a_random_stream_of_its_own(lively_gpt: Callable[..., GPT]) -> None:
    model = lively_gpt(6)
    whole = sampled(model, 1.0)
    few = sampled(model, 1.0, max_batch=3)
    assert torch.equal(whole.ids, few.ids)
    again = sampled(model, 1.0, seed_parts=(1, "other"))
    assert not torch.equal(whole.ids[:, :4], again.ids[:, :4])
    assert whole.ids[0].tolist() != whole.ids[4].tolist()  # the same prompt, another number


@torch.no_grad()
def test_values_stand_before_their_tokens(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    answers, critic = sampled(lively_gpt(3), 1.0), lively_scalar(2)
    values = values_before(critic, answers)
    outputs = critic(answers.ids, mask=answers.real)
    for row, t in answers.response.nonzero().tolist():
        assert float(values[row, t]) == pytest.approx(float(outputs[row, t - 1]), abs=1e-5)
    assert float((values * ~answers.response).abs().max()) == 0.0
    # the mutation: not shifted
    assert float((torch.where(answers.response, outputs, 0.0) - values).abs().max()) > 0.1


def answers_of(*rows: list[int], prompt: int = 2) -> Completions:
    width = prompt + max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    response = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, answer in enumerate(rows):
        ids[row, prompt : prompt + len(answer)] = torch.tensor(answer)
        response[row, prompt : prompt + len(answer)] = True
    real = response.clone()
    real[:, :prompt] = True
    return Completions(
        ids, real, response, torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), width)
    )


def test_degenerate_answers() -> None:
    answers = answers_of(
        [1, 2, 3, 4, END],  # four tokens and the end: fine
        [1, 2, 3, END],  # three tokens: too short
        [1, 2, 1, 2, 1, 2, END],  # bigrams 12 21 12 21 12 2E: 3 different of 6, half are repeats
        [1, 2, 3, 1, 2, 4, END],  # 12 23 31 12 24 4E: one repeat of 6
        [END],
    )
    assert degenerate(answers, min_tokens=4, max_repeats=0.3).tolist() == [False, True, True, False, True]
    assert degenerate(answers, min_tokens=3, max_repeats=0.5).tolist() == [False, False, False, False, True]
    assert degenerate(answers, min_tokens=3, max_repeats=0.1).tolist() == [False, False, True, True, True]


def test_rows_of_answers() -> None:
    answers = answers_of([1, 2, 3], [4, 5, 6])
    chosen = answers.rows(torch.tensor([1]))
    assert chosen.ids.tolist() == [[0, 0, 4, 5, 6]] and chosen.finished.tolist() == [True]


def test_texts_are_the_answers_without_prompt_and_end(chat_tokenizer: Tokenizer) -> None:
    ids = [*chat_tokenizer.encode("The cat sleeps."), chat_tokenizer.control_ids["<|end|>"]]
    assert texts_of(answers_of(ids), chat_tokenizer) == ["The cat sleeps."]
    beyond = [
        chat_tokenizer.vocab_size + 5,
        *ids,
        chat_tokenizer.vocab_size,
    ]  # of a model whose table has more rows
    assert texts_of(answers_of(beyond), chat_tokenizer) == ["The cat sleeps."]


def test_distinct_n() -> None:
    # bigrams: a b, b a, a b; b a, a c -> (a b), (b a), (a c) are 3 of 5
    assert distinct(["a b a b", "b a c"]) == pytest.approx(3 / 5)
    assert distinct(["a b a b", "b a c"], n=1) == pytest.approx(3 / 7)
    assert distinct(["", "word"]) == 0.0


def test_prompts_are_users_turns_with_what_stands_before_them(chat_tokenizer: Tokenizer) -> None:
    turns = [(role, f"{role[0]}{n}") for n in range(4) for role in ("user", "assistant")]
    dialogue = Dialogue.of([{"role": role, "content": content} for role, content in turns])
    long = Dialogue.of([{"role": "user", "content": "word " * 100}])

    def encoded(turns: int) -> list[int]:
        return NATIVE.encode(dialogue.messages[:turns], chat_tokenizer, add_generation_prompt=True).ids

    found = exchanges_from([long, dialogue], NATIVE, chat_tokenizer, limit=60, most=10).prompts
    assert found == [encoded(1), encoded(3), encoded(5)]  # three at most from one conversation
    assert (
        exchanges_from([dialogue], NATIVE, chat_tokenizer, limit=len(encoded(3)), most=10).prompts
        == found[:2]
    )
    assert exchanges_from([dialogue] * 9, NATIVE, chat_tokenizer, limit=60, most=4).prompts == [
        *found,
        found[0],
    ]


def test_a_prompt_is_read_without_what_its_template_adds(chat_tokenizer: Tokenizer) -> None:
    """No control tokens, roles, or system prompt that nobody wrote: SmolLM2's template has all three."""
    source = (
        "<|system|>You are helpful.<|end|>"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>assistant\n{% endif %}"
    )
    template = ChatTemplate(source, "<|end|>")
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye\n")]
    dialogue = Dialogue.of([{"role": role, "content": content} for role, content in turns])
    found = exchanges_from([dialogue], template, chat_tokenizer, limit=200, most=9)
    ids, texts = found.prompts, found.texts
    assert texts == ["Hi", "Hi / Hello. / Bye\n"] and len(ids) == 2
    assert "You are helpful" in chat_tokenizer.decode(ids[0])


def test_answers_after_an_update_are_those_of_the_new_policy(lively_gpt: Callable[..., GPT]) -> None:
    """Fused AdamW changes weights without telling torch's counters: nothing computed before it may be used
    again."""
    model = lively_gpt(6)
    sampled(model, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(torch.tensor(PROMPTS[2:3])).square().mean().backward()
    optimizer.step()
    after = sampled(model, 1.0)
    with torch.no_grad():
        found, _ = completion_log_probs(model, after, temperature=1.0)
    assert float((found - after.sampled).abs().max()) < 1e-4

    requests = [
        Request(tuple(prompt * 7), Sampling(12, seed=row), frozenset({END}))
        for row, prompt in enumerate(PROMPTS)
    ]
    engine = Engine(model)
    engine.generate(requests)
    optimizer.step()
    stale = engine.generate(requests)
    engine.forget()
    kept, fresh = engine.generate(requests), Engine(model).generate(requests)
    assert [one.ids for one in kept] == [one.ids for one in fresh]
    for one, other in zip(kept, fresh, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    # the mutation: keeping what the old policy computed
    assert [one.ids for one in stale] != [one.ids for one in fresh]
