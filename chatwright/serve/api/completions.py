"""POST /v1/completions: continue a text.

A prompt is a text or token ids. A text begins as the model's texts do: what its makers put in front of one
(Llama 3's begin token, nothing for Qwen) is put there, as `chatwright generate` does. Token ids are taken as
they are. With `echo` the prompt is returned in
front of its continuation, log-probabilities included. Evaluation harnesses use `echo` with `max_tokens` 0 to
score given texts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from chatwright.config import UserError
from chatwright.generate.sampling import Sampling
from chatwright.language_model import LanguageModel
from chatwright.serve.api.parameters import MOST_ANSWERS, SampledBody, parameter_error
from chatwright.serve.api.probabilities import TokenProbability
from chatwright.serve.api.reading import (
    DONE,
    STREAM_TOO,
    HeldStream,
    Reading,
    Whole,
    event,
    guarded,
    new_id,
    to_the_end,
    unless_gone,
)
from chatwright.serve.pool import ModelPool

DEFAULT_NEW_TOKENS = 16
"""OpenAI's default length of a continuation."""
MOST_PROMPTS = 64

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class CompletionRequest(SampledBody):
    """Body of POST /v1/completions."""

    refused: ClassVar = {"suffix": ("",)}
    ignored: ClassVar = frozenset({"user", "best_of"})

    prompt: (
        str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to report at each position; OpenAI allows 5."""
    echo: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_is_the_best_of_itself(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("best_of") not in (None, data.get("n") or 1):
            raise parameter_error(
                "unsupported_parameter", "best_of is not supported by this server", "best_of"
            )
        return data

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise parameter_error("invalid_value", "max_tokens: 0 makes sense with echo alone", "max_tokens")
        if len(self.prompts) * self.answers > max(MOST_PROMPTS, MOST_ANSWERS):
            raise parameter_error(
                "invalid_value", f"more than {MOST_PROMPTS} continuations in one request", "prompt"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several: list[Any] = list(self.prompt)
        return [several] if isinstance(several[0], int) else several

    def sampling(self, own: Mapping[str, Any]) -> Sampling:
        """The engine's settings; `own` are the model's. Raises UserError on values that it refuses."""
        most = DEFAULT_NEW_TOKENS if self.max_tokens is None else max(1, self.max_tokens)
        return self.sampling_with(own, max_new_tokens=most, top_logprobs=self.logprobs or 0)

    def encoded(self, model: LanguageModel) -> list[list[int]]:
        """Token ids of the prompts. Raises UserError for ids that are not of the vocabulary."""
        found = [model.prompt_ids(one) if isinstance(one, str) else one for one in self.prompts]
        most = model.tokenizer.vocab_size
        if any(max(ids) >= most for ids in found):
            raise UserError(f"prompt: token ids of this model are 0 to {most - 1}")
        return found


class Writer:
    """The objects of one request, whole or in chunks."""

    def __init__(self, body: CompletionRequest, reading: Reading, echoes: Sequence[Whole]) -> None:
        self._body, self._reading, self._echoes = body, reading, echoes
        self._common: dict[str, Any] = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._lengths = [0] * len(reading.prepared.requests)  # characters written so far, per choice

    def echo(self, index: int) -> Whole | None:
        """The echoed prompt of choice `index`, or None."""
        return self._echoes[index // self._body.answers] if self._echoes else None

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """The body of a completion that is not streamed."""
        choices = []
        for index, one in enumerate(wholes):
            if echo := self.echo(index):
                one = Whole(echo.text + one.text, [*echo.tokens, *one.tokens], finish=one.finish)
            choices.append(self._choice(index, one.text, one.tokens, one.finish))
        return {**self._common, "choices": choices, "usage": self._reading.usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events."""
        for index in range(len(self._lengths)):
            if echo := self.echo(index):
                yield self._chunk([self._choice(index, echo.text, echo.tokens, None)])
        if self._body.max_tokens != 0:
            async with aclosing(self._reading.deltas()) as deltas:
                async for delta in deltas:
                    if not (delta.text or delta.finish or self._body.logprobs is not None):
                        continue
                    yield self._chunk([self._choice(delta.index, delta.text, delta.tokens, delta.finish)])
        if self._body.include_usage:
            yield self._chunk([], usage=self._reading.usage())
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], *, usage: Any = None) -> bytes:
        body = {**self._common, "choices": choices}
        return event(body | ({"usage": usage} if self._body.include_usage else {}))

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenProbability], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._reading.spelling.completion(tokens, self._body.logprobs, self._lengths[index])
            self._lengths[index] += sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def echo_of(model: LanguageModel, given: str | list[int], ids: Sequence[int], logprobs: int | None) -> Whole:
    """A prompt in the form of an answer, with log-probabilities from a forward pass if asked for."""
    # What is put in front of a text is not part of it.
    hidden = 0 if not isinstance(given, str) else len(model.tokenizer.frame.begin) if given else len(ids)
    text = given if isinstance(given, str) else model.tokenizer.decode(ids)
    tokens = []
    if logprobs is not None:
        tokens = [TokenProbability(*scored) for scored in model.score(ids, top=logprobs)][hidden:]
    return Whole(text, tokens)


def routes(pool: ModelPool) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, responses=STREAM_TOO)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(body.model))
            prompts = await asyncio.to_thread(body.encoded, service.model)
            prepared = await service.prepare_prompts(
                prompts, body.sampling(service.own_sampling), answers=body.answers
            )
            reading = Reading(service, prepared)
            if body.max_tokens != 0:
                reading.begin(stack)
            else:  # scoring alone takes up slots too
                stack.enter_context(service.occupied(len(prompts)))

            async def written() -> Writer:
                pairs = zip(body.prompts, prompts, strict=True) if body.echo else ()
                echoes = [
                    await to_the_end(echo_of, service.model, given, ids, body.logprobs)
                    for given, ids in pairs
                ]
                return Writer(body, reading, echoes)

            if body.stream:
                return HeldStream(guarded((await written()).events()), stack.pop_all())

            async def answered() -> dict[str, Any]:
                writer = await written()
                if body.max_tokens == 0:
                    return writer.whole([Whole()] * len(prepared.requests))
                return writer.whole(await reading.wholes())

            return await unless_gone(request, answered(), {})

    return router
