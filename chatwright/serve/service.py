"""The layer above the engine: it turns a conversation into token requests and gives the answers back piece by
piece.

The terminal, the HTTP interface and the page share `prepare`. The latter two run in an event loop and use
`ChatService`: one engine thread computes, and each answer is an asynchronous iterator that can be cancelled
(answer.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from chatwright.config import UserError
from chatwright.serve.answer import Answer, Listener
from chatwright.serve.scoring import Scorer

if TYPE_CHECKING:
    from chatwright.chat import Beside, Message
    from chatwright.generate.grammar import Grammar
    from chatwright.generate.request import Request
    from chatwright.generate.sampling import Sampling
    from chatwright.generate.threads import EngineThread
    from chatwright.language_model import LanguageModel


__all__ = [
    "Answer",
    "Busy",
    "ChatService",
    "Limits",
    "Listener",
    "Prepared",
    "TooLong",
    "prepare",
    "prepare_prompts",
]

MOST_WAIT = 60
"""Largest Retry-After, in seconds, that a refused client gets."""


class Busy(UserError):
    """The server already has as many answers under way as it accepts at a time."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        """`retry_after`: seconds after which it may be worth another try."""
        super().__init__(message)
        self.retry_after = retry_after


class TooLong(UserError):
    """The last message does not fit into the model's context, whatever else is left out."""


@dataclass(frozen=True)
class Limits:
    """Limits of one model for its clients."""

    max_requests: int = 64
    """Answers under way or waiting at a time."""
    max_new_tokens: int = 0
    """Longest answer; requests for longer ones are cut to it. 0: only the context limits it."""
    max_prompt_tokens: int = 0
    """Longest prompt; longer ones are refused. 0: only the context limits it."""
    timeout: float = 0.0
    """Seconds for a request, from its arrival to its last token. 0: no limit."""

    def cut(self, sampling: Sampling) -> Sampling:
        """The settings, with `max_new_tokens` cut to the limit."""
        if not self.max_new_tokens or sampling.max_new_tokens <= self.max_new_tokens:
            return sampling
        return replace(sampling, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class Prepared:
    """The engine's requests for one conversation."""

    requests: tuple[Request, ...]
    """One request per answer wanted; they share the prompt and differ in their seeds."""
    prompt_tokens: int
    """Length of the prompt after fitting."""
    dropped: int
    """How many of the oldest messages did not fit and were left out."""


def prepare(
    model: LanguageModel,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    answers: int = 1,
    grammar: Callable[[LanguageModel], Grammar | None] | None = None,
    begun: str = "",
    beside: Beside | None = None,
) -> Prepared:
    """Encode `messages` and make room for the answer, which continues `begun` if that is given.

    A quarter of the context (or `max_new_tokens`, if that is less) is kept free for the answer; the oldest
    turns are dropped if the rest does not hold the conversation. The answer may use all room that is left, up
    to `max_new_tokens`. With a seed, answer k uses seed + k. `grammar` makes the grammar that constrains the
    answers; `beside` is what the template is given with the messages, such as tools. Raises TooLong if even
    the last message is too long or `begun` fills the context, UserError if the model's template refuses the
    conversation.
    """
    from chatwright.generate.request import Request

    context, template = model.engine.max_context, model.require_template()
    reserve = max(1, min(sampling.max_new_tokens, context // 4))
    begun_ids = model.tokenizer.encode(begun)
    given: Beside = beside or {}
    try:
        fitted = model.encode_chat(messages, max_new_tokens=reserve + len(begun_ids), **given)
    except UserError as error:
        # Raises UserError if the template was the cause, not the length.
        asked = not given.get("continue_final_message")
        template.encode(messages, model.tokenizer, add_generation_prompt=asked, **given)
        raise TooLong(str(error)) from None
    prompt = (*fitted.ids, *begun_ids)
    if len(prompt) >= context:
        raise TooLong(f"the answer fills the model's window of {context} tokens: it cannot go on")
    request = Request(
        prompt=prompt,
        sampling=_within(sampling, context - len(prompt)),
        end_ids=model.end_ids,
        grammar=grammar(model) if grammar is not None else None,
        continues=bool(begun),
    ).stopping(template.stop_texts(model.tokenizer))
    return Prepared(_samples(request, answers), len(prompt), fitted.dropped)


def prepare_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, *, answers: int = 1
) -> Prepared:
    """`answers` continuations of each prompt, in the prompts' order. Raises TooLong for a prompt that fills
    the context."""
    from chatwright.generate.request import Request

    end_ids, controls = model.text_end_ids, set(model.tokenizer.control_ids.values())
    requests: list[Request] = []
    for ids in prompts:
        room = model.engine.max_context - len(ids)
        if room < 1:
            raise TooLong(
                f"the prompt has {len(ids)} tokens, the model's context holds {model.engine.max_context}"
            )
        continues = not controls.issuperset(ids)  # control tokens alone are no text that goes on
        one = Request(tuple(ids), _within(sampling, room), end_ids, continues=continues)
        requests += _samples(one, answers)
    return Prepared(tuple(requests), sum(map(len, prompts)), 0)


def _within(sampling: Sampling, room: int) -> Sampling:
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _samples(request: Request, count: int) -> tuple[Request, ...]:
    """The request `count` times, with consecutive seeds if it has a seed."""
    from chatwright.generate.sampling import nth_seed

    seed = request.sampling.seed
    if seed is None:
        return (request,) * count
    return tuple(
        replace(request, sampling=replace(request.sampling, seed=nth_seed(seed, number)))
        for number in range(count)
    )


class ChatService:
    """One model and the thread that runs it. Made inside or outside an event loop; `answer` needs one."""

    def __init__(
        self,
        model: LanguageModel,
        engine: EngineThread,
        *,
        name: str,
        limits: Limits = Limits(),
        listeners: Sequence[Listener] = (),
        own_defaults: bool = True,
    ) -> None:
        """`own_defaults`: whether settings that a request leaves out are the model's own (vLLM's
        --generation-config auto) or OpenAI's."""
        self.model = model
        self.own_defaults = own_defaults
        self.name = name
        """The name under which the model is served."""
        self.engine = engine
        self.limits = limits
        self.scorer = Scorer(model.model, model.known)
        self._listeners = listeners
        self._running: set[Answer] = set()
        self._preparing = 0
        self._seconds = 0.0  # how long recent answers took, on average; 0 before the first

    @property
    def context(self) -> int:
        """The model's window, in tokens."""
        return self.model.engine.max_context

    @property
    def own_sampling(self) -> dict[str, Any]:
        """The sampling settings of whatever a request leaves out; empty for OpenAI's defaults."""
        return self.model.own_sampling if self.own_defaults else {}

    @property
    def running(self) -> int:
        """Answers under way or waiting."""
        return sum(len(answer.requests) for answer in self._running)

    def retry_after(self, places: int = 1) -> int:
        """Estimate of the seconds until `places` slots are free.

        Answers leave at the rate running / mean time of an answer, its waiting included (Little's law).
        """
        return max(1, min(MOST_WAIT, math.ceil(self._seconds * places / max(1, self.running))))

    async def prepare(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        answers: int = 1,
        grammar: Callable[[LanguageModel], Grammar | None] | None = None,
        begun: str = "",
        beside: Beside | None = None,
    ) -> Prepared:
        """`prepare` in a thread, within the limits. Raises UserError, and Busy when no slots are free."""
        sampling = self.limits.cut(sampling)
        work = partial(
            prepare,
            self.model,
            messages,
            sampling,
            answers=answers,
            grammar=grammar,
            begun=begun,
            beside=beside,
        )
        return await self._prepared(work, answers)

    async def prepare_prompts(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, answers: int = 1
    ) -> Prepared:
        """`prepare_prompts`, in the same way."""
        work = partial(prepare_prompts, self.model, prompts, self.limits.cut(sampling), answers=answers)
        return await self._prepared(work, len(prompts) * answers)

    async def _prepared(self, work: Callable[[], Prepared], answers: int) -> Prepared:
        with self.occupied(answers):  # many requests may be prepared at the same time
            prepared = await asyncio.to_thread(work)
        self.check_size(prepared)
        return prepared

    @contextmanager
    def occupied(self, answers: int = 1) -> Iterator[None]:
        """Occupy slots of answers with other work. Raises Busy when not enough are free."""
        self.check_load(answers)
        self._preparing += answers
        try:
            yield
        finally:
            self._preparing -= answers

    def check_load(self, answers: int = 1) -> None:
        """Raise Busy when there are not `answers` free slots."""
        lacking = self.running + self._preparing + answers - self.limits.max_requests
        if lacking > 0:
            wait = self.retry_after(lacking)
            raise Busy(
                f"the server is busy with {self.running} answers; try again in a moment", retry_after=wait
            )

    def check_size(self, prepared: Prepared) -> None:
        """Raise TooLong when the prompt has more tokens than this server takes."""
        self.check_length(max(len(one.prompt) for one in prepared.requests))

    def check_length(self, longest: int) -> None:
        """The same for a number of tokens."""
        most = self.limits.max_prompt_tokens
        if most and longest > most:
            raise TooLong(f"the prompt has {longest} tokens; this server takes at most {most}")

    def answer(self, prepared: Prepared) -> Answer:
        """Start computing. Iterate over the result, or use it as a context manager that cancels on leaving.

        Answers are never longer than the limits allow, whoever prepared them. Raises TooLong.
        """
        self.check_size(prepared)
        requests = [replace(one, sampling=self.limits.cut(one.sampling)) for one in prepared.requests]
        answer = Answer(
            self.engine,
            requests,
            model=self.name,
            timeout=self.limits.timeout,
            listeners=self._listeners,
            decode=self._text,
            on_end=self._ended,
        )
        self._running.add(answer)
        return answer

    def _text(self, ids: Sequence[int]) -> str:
        tokenizer = self.model.tokenizer
        # The model's embedding table may have more rows than the tokenizer has tokens.
        return tokenizer.decode(one for one in ids if one < tokenizer.vocab_size)

    def _ended(self, answer: Answer) -> None:
        self._running.discard(answer)
        seconds = time.monotonic() - answer.started
        self._seconds = seconds if not self._seconds else 0.8 * self._seconds + 0.2 * seconds

    def cancel_all(self) -> None:
        """End every answer that is under way; its reader gets the text so far, marked as cancelled."""
        for answer in tuple(self._running):
            answer.cancel()

    def close(self) -> None:
        """End every answer and stop the engine. Blocks until the engine's current step is done."""
        self.cancel_all()
        self.engine.close()
