"""/v1/completions: a text begins as the model's makers say, and its echo is the text alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chatwright.generate.scoring import ToScore, score_texts
from chatwright.language_model import LanguageModel
from chatwright.serve.api.completions import CompletionRequest
from chatwright.serve.api.reading import Whole
from chatwright.serve.api.scores import _echoed
from chatwright.serve.service import prepare_prompts
from chatwright.text_frame import TextFrame

TEXT = "How is the cat?"


def model_with(parts: Any, names: list[str]) -> LanguageModel:
    ids = tuple(parts.tokenizer.control_ids[name] for name in names)
    return LanguageModel(parts.model, parts.tokenizer.framed(TextFrame(ids)), parts.template, "x")


def echo_of(model: LanguageModel, given: str, ids: list[int]) -> Whole:
    return _echoed(model, given, ids, score_texts(model.model, [ToScore(ids, 1)])[0])


@pytest.mark.parametrize("names", [[], ["<|tool|>"], ["<|tool|>", "<|system|>"]])
def test_prompts_and_echoes(names: list[str], sft_parts: Callable[[], Any]) -> None:
    model = model_with(sft_parts(), names)
    begin = [model.tokenizer.control_ids[name] for name in names]
    plain = model.tokenizer.encode(TEXT)
    body = CompletionRequest(model="x", prompt=[TEXT, ""])
    text, empty = body.encoded(model)
    assert text == [*begin, *plain]
    assert empty == (begin or [model.tokenizer.end_of_text_id])
    assert CompletionRequest(model="x", prompt=plain).encoded(model) == [plain]  # ids are taken as they are
    echo = echo_of(model, TEXT, text)
    assert echo.text == TEXT and [one.token for one in echo.tokens] == plain
    assert (echo.tokens[0].logprob is None) == (not begin)  # behind a begin token it has a probability
    assert echo_of(model, "", empty).tokens == []
    # A client that has texts alone spells what is put in front; elsewhere such a text stays text.
    spelled = CompletionRequest(model="x", prompt="".join(names) + TEXT).encoded(model)
    assert spelled == [text]
    assert CompletionRequest(model="x", prompt="<|image|>" + TEXT).encoded(model) != [text]


def test_a_text_goes_on_and_a_conversation_does_not(sft_parts: Callable[[], Any]) -> None:
    """Control tokens alone are no text: a first space would be none of the answer's."""
    from chatwright.generate.sampling import Sampling

    model = model_with(sft_parts(), ["<|tool|>"])
    begin = model.tokenizer.control_ids["<|tool|>"]
    prompts = [[begin], [begin, *model.tokenizer.encode(TEXT)]]
    prepared = prepare_prompts(model, prompts, Sampling())
    assert [one.continues for one in prepared.requests] == [False, True]
    assert all(one.end_ids == model.end_ids for one in prepared.requests)
