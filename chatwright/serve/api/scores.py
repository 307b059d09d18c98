"""The echoed prompts of /v1/completions with their log-probabilities, and answers of one token, which come
out of the same pass of the model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass

from chatwright.config import UserError
from chatwright.generate.request import Request
from chatwright.generate.scoring import Scored, ToScore
from chatwright.generate.sequence import Choice, Text
from chatwright.language_model import LanguageModel
from chatwright.serve.api.probabilities import TokenProbability
from chatwright.serve.api.reading import Reading, Whole
from chatwright.serve.operation.request_context import current
from chatwright.serve.service import Prepared


@dataclass(frozen=True)
class Echo:
    """What is to be echoed."""

    prompts: Sequence[str | list[int]]
    """As they were given."""
    ids: Sequence[list[int]]
    logprobs: int | None
    """How many of the likeliest tokens to report at each position; None for no log-probabilities."""
    most: int
    """Longest answer, in tokens."""
    answers: int
    """How many for each prompt."""

    @property
    def alone(self) -> bool:
        """Whether the engine is not needed: no answer is asked for, or one token behind a scored text."""
        return self.most == 0 or (self.logprobs is not None and self.most == 1)


@dataclass(frozen=True)
class Scores:
    """The echoed prompts, and the answers where the engine gives none."""

    echoes: Sequence[Whole] = ()
    answers: Sequence[Whole] | None = None


async def scores_of(echo: Echo, reading: Reading) -> Scores:
    """Score the prompts, if that is asked for. Raises UserError as `score_texts`, and for logits that are not
    finite."""
    model, prepared = reading.service.model, reading.prepared
    found: Sequence[Scored | None] = [None] * len(echo.ids)
    if echo.logprobs is not None:
        texts = [_to_score(echo, number, prepared) for number in range(len(echo.ids))]
        found = await _all(reading.service.scorer.score(text) for text in texts)
    echoes = [_echoed(model, *one) for one in zip(echo.prompts, echo.ids, found, strict=True)]
    if not echo.alone:
        return Scores(echoes)
    choices = [choice for one in found if one is not None for choice in one.choices]
    if not choices:
        return Scores(echoes, [Whole()] * len(prepared.requests))
    answers = [_answer(model, *one) for one in zip(prepared.requests, choices, strict=True)]
    reading.new_tokens += len(answers)
    if (known := current.get()) is not None:
        known.completion_tokens += len(answers)
        known.finish_reasons += [one.finish for one in answers]
    return Scores(echoes, answers)


async def _all(asked: Iterable[Awaitable[Scored]]) -> list[Scored]:
    """All scores. If one fails, or nobody waits any more, this still ends only when all have ended."""
    found = await asyncio.gather(*asked, return_exceptions=True)
    done = [one for one in found if not isinstance(one, BaseException)]
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return done


def _to_score(echo: Echo, number: int, prepared: Prepared) -> ToScore:
    first = number * echo.answers
    behind = prepared.requests[first : first + echo.answers] if echo.alone and echo.most else ()
    return ToScore(echo.ids[number], echo.logprobs or 0, [one.sampling for one in behind])


def _echoed(model: LanguageModel, given: str | list[int], ids: Sequence[int], scored: Scored | None) -> Whole:
    """A prompt in the form of an answer."""
    tokens = [] if scored is None else [TokenProbability(*one) for one in scored.tokens]
    if not isinstance(given, str):
        return Whole(model.tokenizer.decode(ids), tokens)
    # What the server puts in front of a text is listed only if the text says it too.
    names, begun = {number: name for name, number in model.tokenizer.control_ids.items()}, 0
    while begun < len(tokens) and (name := names.get(tokens[begun].token)) and not given.startswith(name):
        begun += 1
    return Whole(given, tokens[begun:])


def _answer(model: LanguageModel, request: Request, choice: Choice) -> Whole:
    """An answer of one token, as the engine gives it."""
    if not math.isfinite(choice.logprob):
        raise UserError("the model's logits are not finite (did its training diverge?)")
    text, stopped, ended = "", False, choice.token in request.end_ids
    if not ended:
        stream = Text(model.tokenizer, request.sampling.stop, continues=request.continues)
        text, stopped = stream.push(choice.token)
        if not stopped:
            rest, stopped = stream.flush()
            text += rest
    top = choice.top[0] if choice.top else []
    token = TokenProbability(choice.token, choice.logprob, top)
    return Whole(text, [token], finish="stop" if ended or stopped else "length")
