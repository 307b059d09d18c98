"""POST /v1/completions: continue a text.

A prompt is a text or token ids. A text begins as the model's texts do: what its makers put in front of one
(Llama 3's begin token, nothing for Qwen) is put there, as `chatwright generate` does. Token ids are taken as
they are. With `echo` the prompt is returned in front of its continuation, log-probabilities included.
Evaluation harnesses use `echo` with `max_tokens` 0 or 1 to score given texts: these go, together with those
of other clients, through one pass of the model instead of the engine (scores.py).
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
from chatwright.serve.api.parameters import (
    BOOKKEEPING,
    SAMPLERS,
    Nothing,
    SampledBody,
    check_answers,
    parameter_error,
)
from chatwright.serve.api.probabilities import Offsets, TokenProbability
from chatwright.serve.api.reading import (
    DONE,
    STREAM_TOO,
    HeldStream,
    Reading,
    Whole,
    event,
    guarded,
    new_id,
    unless_gone,
)
from chatwright.serve.api.scores import Echo, Scores, scores_of
from chatwright.serve.errors import naming
from chatwright.serve.operation.request_context import context_of, in_time
from chatwright.serve.pool import ModelPool
from chatwright.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 16
"""OpenAI's default length of a continuation."""
MOST_PROMPTS = 64

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class CompletionRequest(SampledBody):
    """Body of POST /v1/completions."""

    harmless: ClassVar = BOOKKEEPING
    refused: ClassVar[Mapping[str, Nothing]] = {
        **SAMPLERS,
        "suffix": ("",),
        "best_of": (1,),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "json_schema": (),
    }

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
        """`best_of` as large as `n` asks for nothing."""
        if isinstance(data, dict) and "best_of" in data and data["best_of"] == data.get("n"):
            return {name: value for name, value in data.items() if name != "best_of"}
        return data

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise parameter_error("invalid_value", "max_tokens: 0 makes sense with echo alone", "max_tokens")
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
        found = [
            model.prompt_ids(_without_begin(one, model.tokenizer)) if isinstance(one, str) else one
            for one in self.prompts
        ]
        most = model.tokenizer.vocab_size
        if any(max(ids) >= most for ids in found):
            raise UserError(f"prompt: token ids of this model are 0 to {most - 1}")
        return found


def _without_begin(text: str, tokenizer: Tokenizer) -> str:
    """A text without the names of the tokens that are put in front anyway: clients that have only texts send
    a document's begin so (lm-eval with tokenized_requests=False)."""
    return text.removeprefix("".join(map(tokenizer.name, tokenizer.frame.begin)))


class Writer:
    """The objects of one request, whole or in chunks."""

    def __init__(self, body: CompletionRequest, reading: Reading, scores: Scores) -> None:
        self._body, self._reading, self._scores = body, reading, scores
        self._common: dict[str, Any] = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._offsets = [Offsets(reading.spelling) for _ in reading.prepared.requests]

    def echo(self, index: int) -> Whole | None:
        """The echoed prompt of choice `index`, or None."""
        return self._scores.echoes[index // self._body.answers] if self._scores.echoes else None

    async def whole(self) -> dict[str, Any]:
        """The body of a completion that is not streamed."""
        choices = []
        answers = self._scores.answers
        for index, one in enumerate(await self._reading.wholes() if answers is None else answers):
            if echo := self.echo(index):
                one = Whole(echo.text + one.text, [*echo.tokens, *one.tokens], finish=one.finish)
            choices.append(self._choice(index, one.text, one.tokens, one.finish))
        return {**self._common, "choices": choices, "usage": self._reading.usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events."""
        for index in range(len(self._offsets)):
            if echo := self.echo(index):
                yield self._chunk([self._choice(index, echo.text, echo.tokens, None)])
        for index, one in enumerate(self._scores.answers or ()):
            yield self._chunk([self._choice(index, one.text, one.tokens, one.finish)])
        if self._scores.answers is None:
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
            offsets = self._offsets[index]
            logprobs = self._reading.spelling.completion(tokens, self._body.logprobs, offsets)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def routes(pool: ModelPool) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, responses=STREAM_TOO)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(body.model))
            body.check_bias(service.model.model.config.vocab_size)
            count = len(body.prompts) * body.answers
            check_answers(count, service.limits.max_requests, "n" if body.answers > 1 else "prompt")
            with naming("prompt"):
                prompts = await asyncio.to_thread(body.encoded, service.model)
                sampling = body.sampling(service.own_sampling)
                prepared = await service.prepare_prompts(prompts, sampling, answers=body.answers)
            reading = Reading(service, prepared, ends=True)
            longest = max(one.sampling.max_new_tokens for one in prepared.requests)
            most = longest if body.max_tokens != 0 else 0
            logprobs = body.logprobs if body.echo else None
            echo = Echo(body.prompts, prompts, logprobs, most, body.answers)
            if not echo.alone:
                reading.begin(stack)
            else:  # scoring alone takes up slots too
                stack.enter_context(service.occupied(len(prepared.requests)))
                context_of(request).prompt_tokens += prepared.prompt_tokens

            async def written() -> Writer:
                async with in_time(service.limits.timeout):
                    scores = await scores_of(echo, reading) if body.echo else Scores()
                return Writer(body, reading, scores)

            if body.stream:
                return HeldStream(guarded((await written()).events()), stack.pop_all())

            async def answered() -> dict[str, Any]:
                return await (await written()).whole()

            return await unless_gone(request, answered(), {})

    return router
