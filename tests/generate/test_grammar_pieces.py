"""Structured output with SentencePiece's tokens: a piece that begins a word brings its space, a byte token
its byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from chatwright.generate.engine import Engine, Request
from chatwright.generate.grammar import json_schema, regex
from chatwright.generate.sampling import Sampling
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from support.vocabularies import sentencepiece

pytest.importorskip("llguidance", reason="NOT TESTED: llguidance is not installed")
WORDS = Tokenizer(sentencepiece("llama"), end_of_text="</s>")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "there": {"enum": ["the other", "東京 🙂"]}},
    "required": ["city", "there"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(make_model: Callable[..., GPT]) -> Engine:
    return Engine(make_model(vocab_size=WORDS.vocab_size + 5, context=128), WORDS)


def answers(engine: Engine, request: Request) -> list[str]:
    settings = [Sampling(max_new_tokens=100, seed=seed, temperature=1.5) for seed in range(6)]
    requests = [Request(request.prompt, one, WORDS.end_ids, grammar=request.grammar) for one in settings]
    done = engine.generate(requests)
    assert all(one.finish_reason == "stop" for one in done)
    return [one.text for one in done]


def test_json_is_what_the_schema_says(engine: Engine) -> None:
    prompt = (1, *WORDS.encode("the"))
    for text in answers(engine, Request(prompt, grammar=json_schema(WORDS, WORDS.end_ids, SCHEMA))):
        found = json.loads(text)
        assert list(found) == ["city", "there"] and found["there"] in ("the other", "東京 🙂")


def test_a_space_in_front_is_the_grammars(engine: Engine) -> None:
    """It is not taken for the space that a text of its own begins with."""
    for text in answers(engine, Request((1,), grammar=regex(WORDS, WORDS.end_ids, " (the|there) é\n"))):
        assert re.fullmatch(" (the|there) é\n", text)
