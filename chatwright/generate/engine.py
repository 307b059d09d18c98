"""Requests in, tokens out: one scheduler for the command line, the server, rollouts and evaluation.

Every `step` makes one token for each running row (continuous batching: Yu et al. 2022, "Orca", OSDI). A row that ends gives
its place away at once; a request that joins has its prompt read in chunks, so that a long one never keeps the running
answers waiting for more than `prefill_tokens` (Agrawal et al. 2023, "Sarathi", arXiv:2308.16369).

Keys and values lie in pages under one memory budget (Kwon et al. 2023, arXiv:2309.06180; pages.py). A prompt pays only for
what no earlier text began with: a system prompt, the turns before, the K - 1 other samples of the same prompt. When pages run
out, the request that came last loses its own and goes on later; it keeps its text and its random stream.

A request's tokens do not depend on its company, on what was cached, or on what it lost, beyond rounding: matrix products of
other sizes add in another order, which moves float32 logits by less than 1e-4 (tested), and every request draws from its
own random stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.pages import PAGE_TOKENS, Match, PagePool
from chatwright.generate.request import Completion, FinishReason, Handle, OnChange, Piece, Request
from chatwright.generate.rows import Choice, Row, allowed_tokens
from chatwright.generate.runner import Feed, Runner
from chatwright.generate.sampling import BatchSampler
from chatwright.generate.torch_runner import TorchRunner
from chatwright.model.gpt import GPT
from chatwright.runtime import one_thread
from chatwright.tokenizer import Tokenizer

__all__ = ["Completion", "Engine", "FinishReason", "Handle", "Piece", "Request", "Stats"]

PREFILL_TOKENS = 512
"""Prompt tokens that a step reads while answers are running: they wait for it."""
IDLE_PREFILL_TOKENS = 4096
"""The same while nobody waits but those whose prompts are read."""
CACHE_BYTES = 2**30
"""Most memory for keys and values when no budget is given (one request that fills the context always has room)."""
LOOKUP_ROWS = 4
"""Guesses are made while so few rows are running. Up to here a pass over nine tokens a row takes twice the time of a pass over
one (modern-small, one CPU thread: 21 and 44 ms for 1 row, 41 and 88 ms for 4), so one right guess pays for it; for 16 rows it
takes four times as long (57 and 227 ms)."""


@dataclass
class Stats:
    """What an engine has done since it was made."""

    prompt_tokens: int = 0
    """Tokens of the prompts that were given a place."""
    cached_tokens: int = 0
    """Those of them that were known already."""
    new_tokens: int = 0
    """Tokens that were chosen."""
    proposed: int = 0
    """Tokens guessed by prompt lookup."""
    accepted: int = 0
    """Guesses that were right."""
    preempted: int = 0
    """Times that a running request lost its pages."""
    steps: int = 0
    """Steps in which something was computed."""
    rows: int = 0
    """Requests that something was computed for, added up over the steps: rows / steps is how full batches were."""


class Engine:
    """Runs requests through a model, up to `max_batch` at a time.

    The model may be used elsewhere between steps, and trained: `forget` when it was (what torch counts as a change, loading
    weights for example, is noticed). No global random state is touched. Without a tokenizer there are no texts and no stop
    texts. `max_context` limits prompt plus answer, in tokens, below the model's own limit.

    runner: computes instead of the model itself (runner.py).
    cache_tokens: the budget for keys and values, in tokens; None takes what `max_batch` requests of `max_context` tokens
        need, but at most CACHE_BYTES.
        Copies of the rows that are being answered may take as much again (workbench.py).
    prefill_tokens: most tokens of prompts that a step reads while answers are running.
    lookup: most tokens to guess per step for a greedy answer (speculation.py). 0, the default, guesses nothing: guesses cost
        time where a text does not repeat itself, and whoever asks for them knows whether it does.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 16,
        max_context: int | None = None,
        runner: Runner | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        lookup: int = 0,
    ) -> None:
        context = model.config.context
        if max_batch < 1 or prefill_tokens < 1 or lookup < 0:
            raise UserError(
                f"engine: max_batch ({max_batch}) and prefill_tokens ({prefill_tokens}) must be at least 1, lookup ({lookup}) 0"
            )
        if max_context is not None and not 2 <= max_context <= context:
            raise UserError(f"engine: max_context is {max_context}; this model allows 2 to {context}")
        if cache_tokens is not None and cache_tokens < PAGE_TOKENS:
            raise UserError(f"engine: cache_tokens is {cache_tokens}; it must be at least {PAGE_TOKENS}, one page")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.config.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.tokenizer, self.runner = model, tokenizer, runner or TorchRunner(model)
        self.max_batch, self.max_context = max_batch, max_context or context
        self.prefill_tokens, self.lookup = prefill_tokens, lookup
        self.stats = Stats()
        self.arrived = threading.Condition()  # guards `_waiting`; notified when a request comes
        self._waiting: deque[Row] = deque()
        self._count = 0
        self._stepping = threading.Lock()  # one step at a time; guards everything below
        self._rows: list[Row] = []  # those with a place, in the order in which they got it
        self._pool = PagePool(self._pages(cache_tokens))
        self._allocated = False
        self._weights: object = None
        self._sampler: BatchSampler | None = None
        self._sampled: list[Row] = []  # the rows that `_sampler` was made for

    def _pages(self, cache_tokens: int | None) -> int:
        """The memory budget, in pages."""
        if cache_tokens is not None:
            return cache_tokens // PAGE_TOKENS
        one = -(-self.max_context // PAGE_TOKENS)
        affordable = CACHE_BYTES // (self.runner.token_bytes() * PAGE_TOKENS)
        return max(one, min(self.max_batch * one, affordable))

    @property
    def cache_bytes(self) -> int:
        """The memory budget for keys and values, in bytes; it is taken as a whole at the first request."""
        return self._pool.pages * self._pool.size * self.runner.token_bytes()

    @property
    def cache_usage(self) -> float:
        """Share of that budget which running requests hold, from 0 to 1. Stored prompts that nobody uses do not count."""
        return 1.0 - self._pool.available / self._pool.pages

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

    # ---- requests ------------------------------------------------------------------------------------------------

    def submit(
        self, request: Request, *, background: bool = False, on_change: OnChange | None = None
    ) -> Handle:
        """Queue a request. Any thread may call it.

        background: somebody else calls `step` (EngineThread); otherwise reading from the handle does.
        on_change: see `Handle`.
        Raises UserError when the prompt is empty, too long or not of this vocabulary, the answer could outgrow the cache, or
        stop texts lack a tokenizer.
        """
        room = self._check(request)
        handle = Handle(request, None if background else self.step, on_change)
        row = Row.begin(handle, room, self.tokenizer, self.runner.device, self.lookup)
        with self.arrived:
            row.number = self._count
            self._count += 1
            self._waiting.append(row)
            self.arrived.notify_all()
        return handle

    def _check(self, request: Request) -> int:
        """How many tokens the answer may have. Raises UserError when the request cannot be carried out."""
        prompt, sampling, vocab_size = request.prompt, request.sampling, self.model.config.vocab_size
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
        if any(token >= vocab_size for token, _ in sampling.logit_bias):
            raise UserError(f"logit_bias has token ids outside of the model's vocabulary (0 to {vocab_size - 1})")
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop texts need an engine with a tokenizer")
        room = min(sampling.max_new_tokens, self.max_context - len(prompt))
        stored = len(prompt) + room - 1  # the last token is never fed
        if self._pool.needed(stored) > self._pool.pages:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and an answer of up to {room} store up to {stored} tokens, but the "
                f"key-value cache holds {self._pool.pages * self._pool.size}; lower max_new_tokens or raise cache_tokens"
            )
        return room

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

    def forget(self) -> None:
        """Drop every stored prompt: call it when the model was trained. What is being answered goes on."""
        with self._stepping:
            self._forget()

    def _forget(self) -> None:
        self._pool.forget()
        for row in self._rows:
            row.private = True

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Make a token for every row, the first one for requests that join; False when there was nothing to do.

        What goes wrong in a step is told to the requests that it hits (their handles raise) and not raised here.
        """
        with self._stepping, torch.inference_mode():
            worked, rows = self.busy, self.stats.rows
            try:
                self._part_with_finished()
                self._notice_new_weights()
                self._decode()
                self._part_with_finished()
                self._read()
                self.stats.steps += self.stats.rows > rows
            except BaseException as error:
                self._start_over(error)
                if not isinstance(error, Exception):  # Ctrl-C goes on
                    raise
            return worked

    def _decode(self) -> None:
        """A token, or several where guesses come true, for every row that has read its prompt."""
        self._make_room()
        rows = [row for row in self._rows if not row.reading]
        if not rows:
            return
        self.stats.rows += len(rows)
        with _blame(rows):
            guesses = [self._guess(row) if len(rows) <= LOOKUP_ROWS else [] for row in rows]
            feeds = [
                Feed([row.tokens[-1], *guess], row.stored, row.pages, 1 + len(guess))
                for row, guess in zip(rows, guesses, strict=True)
            ]
            logits = self._forward(feeds)
            choices = iter(self._choose([row for row, feed in zip(rows, feeds, strict=True) for _ in feed.ids], logits))
            for row, guess in zip(rows, guesses, strict=True):
                self._take_in(row, guess, [next(choices) for _ in range(1 + len(guess))])

    def _read(self) -> None:
        """Read prompts, the oldest first, as many tokens as this step may; who comes to the end gets a first token."""
        running = any(not row.reading for row in self._rows)
        budget = self.prefill_tokens if running else max(self.prefill_tokens, IDLE_PREFILL_TOKENS)
        while True:
            self._admit(budget - sum(row.pending for row in self._rows if row.reading))
            rows, feeds = [], []
            for row in self._rows:
                count = min(row.pending, budget) if row.reading else 0
                if count:
                    end = row.stored + count
                    feeds.append(Feed(row.tokens[row.stored : end], row.stored, row.pages, int(end == len(row.tokens))))
                    rows.append(row)
                    budget -= count
            if not rows:
                return
            self.stats.rows += len(rows)
            with _blame(rows):
                self._read_chunks(rows, feeds)
            self._part_with_finished()

    def _read_chunks(self, rows: list[Row], feeds: list[Feed]) -> None:
        logits = self._forward(feeds)
        done = [row for row, feed in zip(rows, feeds, strict=True) if feed.wanted]
        choices = iter(self._choose(done, logits) if done else [])
        for row, feed in zip(rows, feeds, strict=True):
            row.stored += len(feed.ids)
            # A page that is not full is remembered once the prompt is whole, not after every chunk.
            whole = row.stored if feed.wanted else row.stored - row.stored % self._pool.size
            if not row.private:
                row.pages = self._pool.learn(row.tokens[:whole], row.pages)
            if feed.wanted:
                row.reading = False
                row.add(next(choices))
                self.stats.new_tokens += not row.handle.failed

    def _forward(self, feeds: list[Feed]) -> Tensor:
        if not self._allocated:
            self.runner.allocate(self._pool.pages, self._pool.size)
            self._allocated = True
        return self.runner.forward(feeds)

    def _choose(self, rows: list[Row], logits: Tensor) -> list[Choice]:
        """A token for each row of logits; a row may have several."""
        if self._sampler is None or rows != self._sampled:
            self._sampled = rows
            self._sampler = BatchSampler(
                [row.sampling for row in rows],
                [row.generator for row in rows],
                [row.tokens for row in rows],
                answered=[len(row.ids) for row in rows],
                vocab_size=logits.shape[1],
                device=logits.device,
            )
        with one_thread() if self.runner.own_threads else nullcontext():
            allowed = allowed_tokens(rows, logits.shape[1])
            tokens, logprobs = self._sampler(logits, None if allowed is None else allowed.to(logits.device))
            tops = self._sampler.alternatives(logits)
        return list(map(Choice, tokens.tolist(), logprobs.tolist(), tops))

    # ---- guesses -------------------------------------------------------------------------------------------------

    def _guess(self, row: Row) -> list[int]:
        """What may follow the row's newest token, and the pages for it; nothing where pages are scarce."""
        if row.lookup is None:
            return []
        guess = row.lookup.propose(row.tokens, row.room - len(row.ids) - 1)
        pages = self._pool.needed(row.stored + 1 + len(guess)) - len(row.pages)
        if pages > self._pool.available - len(self._rows):
            return []
        row.pages += [self._pool.take() for _ in range(pages)]
        return guess

    def _take_in(self, row: Row, guess: list[int], choices: list[Choice]) -> None:
        """Add tokens to a row as long as what was fed behind each is what the model says."""
        accepted = 0
        for number, choice in enumerate(choices):
            row.add(choice)
            if row.handle.failed:
                return
            row.stored += 1
            self.stats.new_tokens += 1
            if not row.alive or number == len(guess) or choice.token != guess[number]:
                break
            accepted += 1
        if guess and row.lookup is not None:
            row.lookup.learn(len(guess), accepted)
            self.stats.proposed += len(guess)
            self.stats.accepted += accepted

    # ---- places and pages ----------------------------------------------------------------------------------------

    def _admit(self, budget: int) -> None:
        """Give places to waiting requests, in their order, until as many tokens are to be read as this step may."""
        at = 0
        with self.arrived:
            for row in [row for row in self._waiting if row.handle.cancelled]:  # wherever in the queue they are
                self._waiting.remove(row)
                row.finish("cancelled")
            while at < len(self._waiting):
                row = self._waiting[at]
                if len(self._rows) + at >= self.max_batch or budget <= 0:
                    break
                match = self._pool.match(row.tokens[:-1])
                if self._is_being_read(row, match):
                    at += 1
                    continue
                if not self._give_pages(row, match):
                    break
                budget -= row.pending
                del self._waiting[at]

    def _is_being_read(self, row: Row, match: Match) -> bool:
        """Whether another row computes this moment what this one would need: it waits, and takes it over.

        That is worth it for a whole page, and for another sample of the same prompt.
        """
        last = len(row.tokens) - 1
        end = min(last, match.tokens - match.tokens % self._pool.size + self._pool.size)
        if end <= match.tokens:
            return False
        begin = row.tokens[:end]
        return any(
            other.tokens[:end] == begin and (end % self._pool.size == 0 or other.tokens == row.tokens)
            for other in self._rows
            if other.reading and other.alive and not other.private
        )

    def _give_pages(self, row: Row, match: Match) -> bool:
        """Give a row its place and pages for all its tokens, shared ones first; False when there are too few.

        Every row that runs beside it must have a page to go on with.
        """
        pool = self._pool
        fresh = pool.needed(len(row.tokens)) - len(match.pages)
        spare = pool.available - sum(not pool.users[page] for page in match.pages) - fresh
        if spare < (len(self._rows) + 1 if self._rows else 0):
            return False
        self._rows.append(row)
        row.pages, row.stored = list(match.pages), len(match.pages) * pool.size
        for page in match.pages:
            pool.share(page)
        source = match.source
        if source is not None and (pool.users[source] or spare):  # it is held while the page for the copy is taken
            pool.share(source)
            row.pages.append(pool.take())
            self.runner.copy_page(source, row.pages[-1])
            pool.release([source])
            row.stored = match.tokens
        row.pages += [pool.take() for _ in range(pool.needed(len(row.tokens)) - len(row.pages))]
        if row.cached is None:
            row.cached = min(row.stored, len(row.handle.request.prompt))
            self.stats.prompt_tokens += len(row.handle.request.prompt)
            self.stats.cached_tokens += row.cached
        return True

    def _make_room(self) -> None:
        """See that every running row has a page for its newest token. Who came last may lose its place for it."""
        for row in sorted(self._rows, key=lambda row: row.number):
            while row in self._rows and not row.reading and self._pool.needed(row.stored + 1) > len(row.pages):
                if self._pool.available:
                    row.pages.append(self._pool.take())
                else:
                    self._preempt(max(self._rows, key=lambda row: row.number))

    def _preempt(self, row: Row) -> None:
        """Back to the head of the queue; what it had computed stays known for as long as nobody needs its pages."""
        self._rows.remove(row)
        self._let_go(row)
        row.reading, row.private = True, False
        self.stats.preempted += 1
        with self.arrived:
            self._waiting.appendleft(row)

    def _part_with_finished(self) -> None:
        for row in self._rows:
            if row.alive and row.handle.cancelled:
                row.finish("cancelled")
        for row in [row for row in self._rows if not row.alive]:
            self._rows.remove(row)
            self._let_go(row)
        if not self._rows:
            self._sampler, self._sampled = None, []

    def _let_go(self, row: Row) -> None:
        """Release a row's pages; others may find there what it has computed, unless that went wrong."""
        if row.handle.failed:
            self._pool.doubt(row.pages)
        elif not row.private:
            row.pages = self._pool.learn(row.tokens[: row.stored], row.pages)
        self._pool.release(row.pages)
        row.pages, row.stored = [], 0

    def _notice_new_weights(self) -> None:
        """Forget when torch says that a parameter was written to. Fused optimisers do not say so: hence `forget`."""
        if self._rows or not self._waiting or not isinstance(self.runner, TorchRunner):
            return
        weights = self.runner.weights()
        if weights != self._weights:
            self._forget()
        self._weights = weights

    def _start_over(self, error: BaseException) -> None:
        """After an error outside of a pass, or Ctrl-C anywhere, nobody knows who holds which page: all rows end."""
        for row in self._rows:
            if row.alive:
                row.handle._fail(error)
        with self.arrived:
            self._waiting = deque(row for row in self._waiting if row.alive)
        self._rows, self._sampler = [], None
        self._pool = PagePool(self._pool.pages)


def _until_closed(handle: Handle) -> Iterator[Piece]:
    try:
        yield from handle.pieces()
    finally:
        handle.cancel()


@contextmanager
def _blame(rows: Sequence[Row]) -> Iterator[None]:
    """An error inside ends these rows."""
    try:
        yield
    except Exception as error:
        for row in rows:
            if row.alive:
                row.handle._fail(error)
