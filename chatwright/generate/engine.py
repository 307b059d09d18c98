"""Requests in, tokens out: one scheduler for the command line, the server, rollouts and evaluation.

Continuous batching (Yu et al. 2022, "Orca", OSDI): every `step` makes one token for each running row; a row that ends gives its
place away at once, and waiting requests join, their prompts read in one padded batch. Rows keep their own lengths in
the key-value cache, so prompts of any lengths mix.

A request's tokens do not depend on its company beyond rounding: matrix products of other sizes add in another order,
which moves float32 logits by less than 1e-4 (tested), and every request draws from its own random stream.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.request import Completion, FinishReason, Handle, Piece, Request
from chatwright.generate.sampling import BatchSampler, make_generator
from chatwright.model.cache import KVCache
from chatwright.model.gpt import GPT
from chatwright.tokenizer import TextStream, Tokenizer

__all__ = ["Completion", "Engine", "FinishReason", "Handle", "Piece", "Request"]

PREFILL_TOKENS = 4096
"""Prompt tokens, padding included, that one step reads at most (a longer prompt goes alone): running answers wait."""
ROOM = 64
"""Tokens of room that a fresh cache has behind its longest prompt; it grows by half when that is used up."""


class _Text:
    """A row's text: whole characters, up to the first stop text; what may begin a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.stream, self.stops, self.vocab_size = TextStream(tokenizer), stops, tokenizer.vocab_size
        self.held = ""
        self.reach = max(map(len, stops), default=1) - 1

    def push(self, token: int) -> tuple[str, bool]:
        """The text that `token` sets free, and whether a stop text has come."""
        # A model's table may be padded beyond the tokenizer's last id; such ids spell nothing.
        return self._release(self.stream.push(token) if token < self.vocab_size else "", final=False)

    def flush(self) -> tuple[str, bool]:
        """What is left when no more tokens come."""
        return self._release(self.stream.flush(), final=True)

    def _release(self, new: str, *, final: bool) -> tuple[str, bool]:
        text = self.held + new
        self.held = ""
        cuts = [at for at in map(text.find, self.stops) if at >= 0]
        if cuts:
            return text[: min(cuts)], True
        for size in range(0 if final else min(self.reach, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                self.held = text[-size:]
                return text[:-size], False
        return text, False


@dataclass(eq=False)
class _Row:
    """An admitted request."""

    handle: Handle
    room: int
    """Tokens it may produce."""
    generator: torch.Generator | None
    text: _Text | None
    said: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return not self.handle.finished

    def add(self, token: int, logprob: float) -> None:
        """Take a token in, hand its text out, and see whether the answer ends."""
        if not math.isfinite(logprob):
            self.handle._fail(UserError("the model's logits are not finite (did its training diverge?)"))
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        text, stopped = "", False
        ended = token in self.handle.request.end_ids
        if self.text is not None and not ended:
            text, stopped = self.text.push(token)
        if ended or stopped or len(self.ids) >= self.room:
            self.finish("stop" if ended or stopped else "length", [token], text, stopped)
        else:
            self.said.append(text)
            self.handle._put(text, [token])

    def finish(self, reason: FinishReason, ids: list[int], text: str = "", stopped: bool = False) -> None:
        """Hand out the completion. `ids` and `text` are new; `stopped` says that a stop text ended `text`."""
        if self.text is not None and not stopped:
            rest, stopped = self.text.flush()
            text += rest
            reason = "stop" if stopped else reason
        self.said.append(text)
        prompt_tokens = len(self.handle.request.prompt)
        completion = Completion(self.ids, "".join(self.said), reason, self.logprobs, prompt_tokens)
        self.handle._put(text, ids, completion)


class Engine:
    """Runs requests through a model, up to `max_batch` at a time.

    The model may be used elsewhere between steps: its parameters are read only, and modules in training mode are put
    back into it (while a step runs there is no dropout). No global random state is touched. Without a tokenizer there
    are no texts and no stop texts. `max_context` limits prompt plus answer, in tokens, below the model's own limit.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 16,
        max_context: int | None = None,
    ) -> None:
        context = model.config.context
        if max_batch < 1:
            raise UserError(f"engine: max_batch is {max_batch}; it must be at least 1")
        if max_context is not None and not 2 <= max_context <= context:
            raise UserError(f"engine: max_context is {max_context}; this model allows 2 to {context}")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.config.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_context = max_batch, max_context or context
        self.arrived = threading.Condition()  # guards `_waiting`; notified when a request comes
        self._waiting: deque[Handle] = deque()
        self._stepping = threading.Lock()  # one step at a time; guards everything below
        self._rows: list[_Row] = []  # rows of the cache, in order; finished ones stay until `_compact`
        self._cache: KVCache | None = None
        self._tokens = torch.empty(
            0, dtype=torch.int64
        )  # (rows,) the newest token of each, not yet in the cache
        self._sampler: BatchSampler | None = None

    @property
    def waiting(self) -> int:
        """Number of requests that have no place yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Number of requests that are being answered."""
        return sum(row.alive for row in list(self._rows))

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting) or self.active > 0

    def submit(self, request: Request, *, background: bool = False) -> Handle:
        """Queue a request. Any thread may call it.

        background: somebody else calls `step` (EngineThread); otherwise reading from the handle does.
        Raises UserError when the prompt is empty, too long or not of this vocabulary, or stop texts lack a tokenizer.
        """
        prompt, vocab_size = request.prompt, self.model.config.vocab_size
        if not prompt:
            raise UserError(
                "the prompt has no tokens; begin with the end-of-text token when there is nothing to say"
            )
        if len(prompt) > self.max_context - 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context holds {self.max_context} and at least one must "
                "be left for the answer; shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(
                f"the prompt has token ids outside of the model's vocabulary (0 to {vocab_size - 1})"
            )
        if request.sampling.stop and self.tokenizer is None:
            raise UserError("stop texts need an engine with a tokenizer")
        handle = Handle(request, None if background else self.step)
        with self.arrived:
            self._waiting.append(handle)
            self.arrived.notify_all()
        return handle

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests; completions in the order of the requests. Raises as `submit` and `Handle.result`."""
        handles: list[Handle] = []
        try:
            handles.extend(map(self.submit, requests))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream(self, request: Request) -> Iterator[Piece]:
        """Pieces of one answer; leaving the loop early cancels it. Raises as `submit` (at once) and `result`."""
        return _until_closed(self.submit(request))

    def step(self) -> bool:
        """Make a token for every row, the first one for requests that join; False when there was nothing to do.

        What goes wrong in a step is told to the requests that it hits (their handles raise) and not raised here.
        """
        with self._stepping, torch.inference_mode(), _evaluating(self.model):
            worked = self.busy
            for row in self._rows:
                if row.alive and row.handle.cancelled:
                    row.finish("cancelled", [])
            if any(row.alive for row in self._rows):
                with _blame(self._rows):
                    self._decode()
            with _blame(self._rows):
                self._compact()
            joining = self._admit()
            if joining:
                read = None
                with _blame(joining):
                    read = self._read(joining)
                if read is not None:
                    with _blame([*self._rows, *joining]):
                        self._join(joining, *read)
            if not any(row.alive for row in self._rows):
                self._compact()  # an idle engine holds no memory
            return worked

    def _compact(self) -> None:
        """Give the places of finished rows away: at once when somebody waits, else when an eighth is finished.

        Rows are copied together, which costs more than a few rows that are computed in vain.
        """
        keep = [at for at, row in enumerate(self._rows) if row.alive]
        gone = len(self._rows) - len(keep)
        if not gone or (keep and not self._waiting and 8 * gone < len(self._rows)):
            return
        self._rows = [self._rows[at] for at in keep]
        self._sampler = None
        if not keep or self._cache is None:
            self._cache = None
            self._tokens = self._tokens[:0]
            return
        chosen = torch.tensor(keep, device=self._tokens.device)
        self._cache.select(chosen)
        self._tokens = self._tokens[chosen]

    def _admit(self) -> list[_Row]:
        """Take requests from the queue, as many as there are places and as one step may read."""
        joining: list[_Row] = []
        longest = 0
        with self.arrived:
            while self._waiting:
                handle = self._waiting[0]
                longest = max(longest, len(handle.request.prompt))
                full = len(self._rows) + len(joining) == self.max_batch
                if not handle.cancelled and (
                    full or (joining and longest * (len(joining) + 1) > PREFILL_TOKENS)
                ):
                    break
                self._waiting.popleft()
                row = self._row(handle)
                if handle.cancelled:
                    row.finish("cancelled", [])
                else:
                    joining.append(row)
        return joining

    def _row(self, handle: Handle) -> _Row:
        sampling = handle.request.sampling
        room = min(sampling.max_new_tokens, self.max_context - len(handle.request.prompt))
        text = _Text(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
        return _Row(handle, room, make_generator(sampling, self.model.embed.weight.device), text)

    def _read(self, rows: list[_Row]) -> tuple[KVCache, Tensor]:
        """Read the prompts and make the first token of each: the rows' cache and (rows,) tokens."""
        prompts = [row.handle.request.prompt for row in rows]
        weight = self.model.embed.weight
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for at, prompt in enumerate(prompts):
            ids[at, : len(prompt)] = torch.tensor(prompt)
        mask = (torch.arange(longest) < lengths[:, None]).to(weight.device)
        capacity = min(self.max_context, longest + ROOM)
        cache = KVCache(self.model.config, len(rows), capacity, dtype=weight.dtype, device=weight.device)
        hidden = self.model.hidden(ids.to(weight.device), mask=mask, cache=cache)
        last = hidden[torch.arange(len(rows), device=weight.device), lengths.to(weight.device) - 1]
        tokens, logprobs = self._sampler_of(rows)(self.model.head(last))
        _hand_out(rows, tokens, logprobs)
        return cache, tokens

    def _join(self, rows: list[_Row], cache: KVCache, tokens: Tensor) -> None:
        if self._cache is None:
            self._cache, self._tokens = cache, tokens
        else:
            self._cache.append(cache)
            self._tokens = torch.cat((self._tokens, tokens))
        self._rows = [*self._rows, *rows]
        self._sampler = None

    def _decode(self) -> None:
        """One token for every row."""
        cache = self._cache
        assert cache is not None
        if cache.longest == cache.capacity:
            cache.grow(min(self.max_context, cache.capacity + max(ROOM, cache.capacity // 2)))
        if self._sampler is None:
            self._sampler = self._sampler_of(self._rows)
        alive = [row.alive for row in self._rows]
        mask = None if all(alive) else torch.tensor(alive, device=self._tokens.device)[:, None]
        hidden = self.model.hidden(self._tokens[:, None], mask=mask, cache=cache)
        self._tokens, logprobs = self._sampler(self.model.head(hidden[:, -1]))
        _hand_out(self._rows, self._tokens, logprobs)

    def _sampler_of(self, rows: list[_Row]) -> BatchSampler:
        return BatchSampler(
            [row.handle.request.sampling for row in rows],
            [row.generator for row in rows],
            [[*row.handle.request.prompt, *row.ids] for row in rows],
            vocab_size=self.model.config.vocab_size,
            device=self.model.embed.weight.device,
        )


def _hand_out(rows: list[_Row], tokens: Tensor, logprobs: Tensor) -> None:
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        if row.alive:
            row.add(token, logprob)


def _until_closed(handle: Handle) -> Iterator[Piece]:
    try:
        yield from handle.pieces()
    finally:
        handle.cancel()


@contextmanager
def _blame(rows: Sequence[_Row]) -> Iterator[None]:
    """An error inside ends these rows; only what is no Exception (Ctrl-C) goes on."""
    try:
        yield
    except BaseException as error:
        for row in rows:
            if row.alive:
                row.handle._fail(error)
        if not isinstance(error, Exception):
            raise


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
