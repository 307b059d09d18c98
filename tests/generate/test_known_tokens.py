"""Numbers without a token never come out: neither gaps in the vocabulary nor the rows that fill up a model's
table, however likely the model finds them."""

from __future__ import annotations

import json
import math

import pytest
import tokenizers
import torch

from chatwright.generate.beam import beam_search
from chatwright.generate.engine import Engine, Request
from chatwright.generate.grammar import regex
from chatwright.generate.runner import Runner
from chatwright.generate.sampling import Sampling
from chatwright.generate.scoring import ToScore, score_texts
from chatwright.generate.sequence import tokens_with_text
from chatwright.language_model import LanguageModel, make_runner
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

ROWS = 280
GAP, PADDING = 270, 279


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Single bytes and control tokens, and one token behind a gap: ids 264 to 274 have none, 275 is the
    last."""
    content = json.loads(Tokenizer.train(["a"], 264).to_json())
    content["model"]["vocab"]["zz"] = 275
    content["model"]["merges"] = [["z", "z"]]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


@pytest.fixture(scope="module")
def model(words: Tokenizer) -> GPT:
    """After any token it finds a gap and a padding row likeliest, then `b`, then `c`."""
    shape = GPTConfig.preset(
        "modern-nano", vocab_size=ROWS, width=32, heads=2, kv_heads=1, head_dim=16, mlp_width=32, context=64
    )
    made = GPT(GPTConfig(**{**shape.to_dict(), "tied": False, "rope_scaling": None})).eval()
    with torch.no_grad():
        made.embed.weight.fill_(1.0)
        made.head.weight.zero_()
        for number, logit in ((GAP, 9.0), (PADDING, 8.0), (byte(words, "b"), 6.0), (byte(words, "c"), 5.0)):
            made.head.weight[number] = logit / 32
    return made


def byte(words: Tokenizer, character: str) -> int:
    return words.encode(character)[0]


def runners(model: GPT) -> list[Runner | None]:
    return [None, make_runner(model, "fp32")]


def test_what_is_known(words: Tokenizer, model: GPT) -> None:
    assert words.vocab_size == 276 and (~words.known).nonzero()[0].tolist() == [*range(264, 275)]
    assert words.name(GAP) == "[no token 270]" and words.token_bytes(GAP) == b""
    known = tokens_with_text(words, ROWS)
    assert known is not None and known.sum() == 265
    assert tokens_with_text(None, ROWS) is None


@pytest.mark.parametrize("runner", [0, 1], ids=["torch", "kernels"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_p": 0.99},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.0, "logit_bias": ((PADDING, 100.0),)},
        {"temperature": 1.0, "repetition_penalty": 1.5},
    ],
)
def test_the_engine_draws_none(words: Tokenizer, model: GPT, runner: int, settings: dict[str, float]) -> None:
    engine = Engine(model, words, runner=runners(model)[runner])
    requests = [
        Request((1, 2), Sampling(max_new_tokens=8, top_logprobs=5, seed=seed, **settings))
        for seed in range(6)
    ]
    for done in engine.generate(requests):
        assert all(words.known[one] for one in done.ids)
        listed = [number for alternatives in done.top_logprobs for number, _ in alternatives]
        assert len(listed) == 40 and all(words.known[one] for one in listed)
    greedy = engine.generate([Request((1, 2), Sampling(max_new_tokens=3, temperature=0.0))])[0]
    assert greedy.text == "bbb"
    # The model's probabilities stay the model's: those of numbers without a token count.
    assert greedy.logprobs[0] == pytest.approx(_logprob(model, byte(words, "b")), abs=1e-4)


def _logprob(model: GPT, number: int) -> float:
    with torch.inference_mode():
        return float(model(torch.tensor([[1, 2]]))[0, -1].log_softmax(-1)[number])


def test_guesses_are_none(words: Tokenizer, model: GPT) -> None:
    """A prompt that repeats such numbers makes guesses of them; none is accepted."""
    engine = Engine(model, words, lookup=4)
    prompt = (*(GAP, PADDING, byte(words, "b")) * 4,)
    done = engine.generate([Request(prompt, Sampling(max_new_tokens=8, temperature=0.0))])[0]
    assert done.text == "b" * 8 and engine.stats.proposed


def test_beams_have_none(words: Tokenizer, model: GPT) -> None:
    found = beam_search(model, [1, 2], beams=3, max_new_tokens=4, known=tokens_with_text(words, ROWS))
    assert len(found) == 3
    assert all(words.known[one] and math.isfinite(score) for ids, score in found for one in ids)
    assert words.decode(found[0][0]) == "bbbb"


def test_grammars_have_none(words: Tokenizer, model: GPT) -> None:
    pytest.importorskip("llguidance", reason="NOT TESTED: llguidance is not installed")
    grammar = regex(words, words.end_ids, "[a-c]{4}")
    request = Request((1, 2), Sampling(max_new_tokens=8), words.end_ids, grammar=grammar)
    assert all(words.known[one] for one in Engine(model, words).generate([request])[0].ids)


def test_scores_list_none_as_alternatives(words: Tokenizer, model: GPT) -> None:
    scored = LanguageModel(model, words, None, "x").score([1, byte(words, "b")], top=3)
    _, logprob, alternatives = scored[1]
    assert [number for number, _ in alternatives][:2] == [byte(words, "b"), byte(words, "c")]
    assert logprob == pytest.approx(alternatives[0][1])


def test_a_token_behind_a_scored_text_is_none(words: Tokenizer, model: GPT) -> None:
    """The token that scoring draws itself, and its alternatives."""
    settings = [Sampling(temperature=0.0, top_logprobs=3), *(Sampling(seed=seed) for seed in range(8))]
    (scored,) = score_texts(model, [ToScore([1, 2], 3, settings)], tokens_with_text(words, ROWS))
    assert all(words.known[choice.token] for choice in scored.choices)
    assert scored.choices[0].token == byte(words, "b")
    assert all(words.known[number] for number, _ in scored.choices[0].top[0])
    (unbound,) = score_texts(model, [ToScore([1, 2], 3, settings)])
    assert unbound.choices[0].token == GAP
