"""What a request does not say is as the model's makers recommend: in the API, and where the page begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import chatwright.language_model
from chatwright.commands import serve
from chatwright.generate.threads import EngineThread
from chatwright.language_model import LanguageModel
from chatwright.serve.api.chat import ChatRequest
from chatwright.serve.api.completions import CompletionRequest
from chatwright.serve.api.responses import ResponsesRequest
from chatwright.serve.conversations import Settings
from chatwright.serve.service import ChatService

OWN = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    "body",
    [
        ChatRequest(**ASKED),
        CompletionRequest(model="m", prompt="Hi"),
        ResponsesRequest(model="m", input="Hi"),
    ],
    ids=["chat", "completions", "responses"],
)
def test_a_request_that_says_nothing(body: ChatRequest | CompletionRequest | ResponsesRequest) -> None:
    plain, own = body.sampling({}), body.sampling(OWN)
    assert (plain.temperature, plain.top_p, plain.repetition_penalty) == (1.0, 1.0, 1.0)
    assert (own.temperature, own.top_p, own.repetition_penalty) == (0.2, 0.9, 1.1)


def test_a_request_goes_first() -> None:
    found = ChatRequest(**ASKED, temperature=0.0, repetition_penalty=1.0).sampling(OWN)
    assert (found.temperature, found.top_p, found.repetition_penalty) == (0.0, 0.9, 1.0)
    body = ResponsesRequest(model="m", input="Hi", temperature=0.5)
    echoed = body.echoed(body.sampling(OWN))
    assert (echoed["temperature"], echoed["top_p"]) == (0.5, 0.9)


def test_one_default_or_openais(sft_parts: Callable[[], Any]) -> None:
    """A model that recommends nothing has temperature 0.7; a server may be told to take OpenAI's."""
    parts = sft_parts()
    model = LanguageModel(parts.model, parts.tokenizer, parts.template, "x")
    engine = EngineThread(model.engine)
    try:
        body = CompletionRequest(model="x", prompt="Hi")
        for own_defaults, temperature in ((True, 0.7), (False, 1.0)):
            service = ChatService(model, engine, name="x", own_defaults=own_defaults)
            assert body.sampling(service.own_sampling).temperature == temperature
    finally:
        engine.close()


@pytest.mark.parametrize(("given", "own"), [([], True), (["--defaults", "openai"], False)])
def test_the_option_reaches_the_models(
    given: list[str], own: bool, monkeypatch: pytest.MonkeyPatch, sft_parts: Callable[[], Any]
) -> None:
    parts = sft_parts()
    model = LanguageModel(parts.model, parts.tokenizer, parts.template, "x")
    monkeypatch.setattr(chatwright.language_model, "load", lambda name, dtype="auto": model)
    found = []
    monkeypatch.setattr(serve, "serve", lambda pool, listener, config: found.append(pool) or 0)
    assert serve.main(["x", "--port", "0", *given]) == 0
    (pool,) = found
    try:
        assert [one.own_defaults for one in pool.services] == [own]
    finally:
        pool.close()


def test_the_page_begins_with_the_model_s_own() -> None:
    assert Settings.recommended({}) == Settings()
    found = Settings.recommended({**OWN, "top_k": 20})
    assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == (0.2, 0.9, 20, 512)
    assert Settings.recommended({"temperature": 5.0}).temperature == 2.0  # the page's slider ends there
