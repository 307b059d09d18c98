"""Scores of many texts in one pass against the logits of each alone, and the tokens behind them."""

from __future__ import annotations

import pytest
import torch

from chatwright.config import UserError
from chatwright.generate.engine import Engine, Request
from chatwright.generate.sampling import Sampling
from chatwright.generate.scoring import ToScore, score_texts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT

PRESETS = ("modern-nano", "gpt2", "gpt1")


def model_of(preset: str) -> GPT:
    """A tiny model of the family's shape."""
    torch.manual_seed(0)
    small = {} if preset == "modern-nano" else {"layers": 2, "width": 32, "heads": 2}
    return GPT(GPTConfig.preset(preset, vocab_size=90, context=64, **small)).eval()


def texts_of(lengths: list[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(90, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize("preset", PRESETS)
def test_many_texts_in_one_pass_are_scored_as_each_alone(preset: str) -> None:
    model, texts = model_of(preset), texts_of([5, 1, 40, 12, 2])
    tops = [0, 1, 5, 1, 20]
    found = score_texts(model, [ToScore(*one) for one in zip(texts, tops, strict=True)])
    for text, top, scored in zip(texts, tops, found, strict=True):
        with torch.no_grad():
            table = model(torch.tensor([text]))[0].log_softmax(-1)
        assert [token for token, _, _ in scored.tokens] == text
        assert scored.tokens[0] == (text[0], None, [])
        for at, (token, logprob, likeliest) in enumerate(scored.tokens[1:]):
            assert logprob == pytest.approx(table[at, token].item(), abs=1e-4)
            values, ids = table[at].topk(top)
            assert [value for _, value in likeliest] == pytest.approx(values.tolist(), abs=1e-4)
            assert [one for one, _ in likeliest] == ids.tolist()
            if likeliest and likeliest[0][0] == token:
                assert likeliest[0][1] == logprob  # to the bit: harnesses compare the two
        assert scored.choices == []


def test_more_tokens_than_logits_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = model_of("modern-nano"), texts_of([9, 30, 4])
    asked = [ToScore(text, 2, [Sampling(temperature=0.0, top_logprobs=1)]) for text in texts]
    whole = score_texts(model, asked)
    monkeypatch.setattr("chatwright.generate.scoring.SCORED_AT_ONCE", 4)
    parts = score_texts(model, asked)
    for one, other in zip(whole, parts, strict=True):
        assert [token for token, *_ in one.tokens] == [token for token, *_ in other.tokens]
        values = [[value for _, value, _ in scored.tokens[1:]] for scored in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert [choice.token for choice in one.choices] == [choice.token for choice in other.choices]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=1, temperature=0.0, top_logprobs=3),
        Sampling(max_new_tokens=1, temperature=1.3, seed=4, top_p=0.9),
        Sampling(max_new_tokens=1, seed=4, repetition_penalty=1.5, logit_bias={3: 4.0}),
        Sampling(max_new_tokens=1, temperature=0.0, presence_penalty=2.0),
    ],
    ids=str,
)
def test_the_token_behind_a_text_is_the_engine_s(sampling: Sampling) -> None:
    model, texts = model_of("modern-nano"), texts_of([7, 20])
    engine = Engine(model)
    for text, scored in zip(
        texts, score_texts(model, [ToScore(text, 1, [sampling]) for text in texts]), strict=True
    ):
        (completion,) = engine.generate([Request(tuple(text), sampling)])
        (choice,) = scored.choices
        assert choice.token == completion.ids[0]
        assert choice.logprob == pytest.approx(completion.logprobs[0], abs=1e-4)
        assert [one for one, _ in (choice.top or [[]])[0]] == [
            one for one, _ in (completion.top_logprobs or [[]])[0]
        ]


def test_what_is_not_scored() -> None:
    model = model_of("gpt2")
    assert score_texts(model, []) == []
    with pytest.raises(UserError, match="do not fit"):
        score_texts(model, [ToScore([1] * 65)])
