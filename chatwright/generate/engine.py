"""Requests in, tokens out: one scheduler for the command line, the server, rollouts and evaluation.

Every `step` makes one token for each running sequence (continuous batching: Yu et al. 2022, "Orca", OSDI). A
sequence is a `Sequence`. A finished one leaves the batch at once. The prompt of a new one is prefilled in
chunks, so that a long prompt never delays the running answers by more than `prefill_tokens` (Agrawal et al.
2023, "Sarathi", arXiv:2308.16369).

Keys and values are in pages under one memory budget (Kwon et al. 2023, arXiv:2309.06180; pages.py). A prompt
reuses the pages of every earlier text with the same beginning: a system prompt, the turns before, the K - 1
other samples of the same prompt. When pages run out, the newest request is preempted: it loses its pages and
continues later, with its text and its random stream (scheduler.py).

Apart from rounding, a request's tokens do not depend on the rest of the batch, on the cache or on preemption.
Every request draws from its own random stream. Matrix products of other sizes add in another order, which
moves float32 logits by less than 1e-4 (tested).
"""

from __future__ import annotations

import threading
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.pages import PAGE_TOKENS
from chatwright.generate.request import Completion, FinishReason, Handle, OnChange, Piece, Request
from chatwright.generate.runner import Feed, Runner
from chatwright.generate.sampling import BatchSampler
from chatwright.generate.scheduler import Scheduler, Stats
from chatwright.generate.sequence import Choice, Sequence, allowed_tokens, tokens_with_text
from chatwright.generate.torch_runner import TorchRunner
from chatwright.model.gpt import GPT
from chatwright.runtime import one_thread
from chatwright.tokenizer import Tokenizer

__all__ = ["Completion", "Engine", "FinishReason", "Handle", "Piece", "Request", "Stats"]

PREFILL_TOKENS = 512
"""Prompt tokens that a step prefills while answers are running, which wait for it."""
IDLE_PREFILL_TOKENS = 4096
"""The same while no answers are running."""
CACHE_BYTES = 2**30
"""Most memory for keys and values, in bytes, when no budget is given. One request that fills the context
always has room."""
LOOKUP_SEQUENCES = 4
"""Most running sequences for which tokens are guessed. Up to 4 a pass over nine tokens per sequence takes
twice the time of a pass over one (modern-small, one CPU thread: 21 and 44 ms for 1, 41 and 88 ms for 4), so
that one right guess pays for it. For 16 it takes four times as long (57 and 227 ms)."""


class Engine:
    """Runs requests through a model, up to `max_batch` at a time.

    The model may be used and trained elsewhere between steps. Call `forget` after training it; changes that
    torch counts, such as loading weights, are noticed. No global random state is touched. Without a tokenizer
    there are no texts and no stop texts. `max_context` limits prompt plus answer, in tokens, below the
    model's own limit.

    runner: computes instead of the model itself (runner.py).
    cache_tokens: the budget for keys and values, in tokens. None takes what `max_batch` requests of
        `max_context` tokens need, but at most CACHE_BYTES. Contiguous copies of the running sequences may
        take as much again (contiguous_cache.py).
    prefill_tokens: most prompt tokens that a step prefills while answers are running.
    lookup: most tokens to guess per step for a greedy answer (speculation.py). The default 0 guesses nothing:
        guesses cost time where a text does not repeat itself, which the caller must know.
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
                f"engine: max_batch ({max_batch}) and prefill_tokens ({prefill_tokens}) must be at least 1, "
                f"lookup ({lookup}) 0"
            )
        if max_context is not None and not 2 <= max_context <= context:
            raise UserError(f"engine: max_context is {max_context}; this model allows 2 to {context}")
        if cache_tokens is not None and cache_tokens < PAGE_TOKENS:
            raise UserError(
                f"engine: cache_tokens is {cache_tokens}; it must be at least {PAGE_TOKENS}, one page"
            )
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only "
                f"{model.config.vocab_size}: they do not belong together"
            )
        self.model, self.tokenizer, self.runner = model, tokenizer, runner or TorchRunner(model)
        self.max_batch, self.max_context = max_batch, max_context or context
        self.prefill_tokens, self.lookup = prefill_tokens, lookup
        self.stats = Stats()
        self._scheduler = Scheduler(self.runner, self.stats, pages=self._pages(cache_tokens), most=max_batch)
        self._known = tokens_with_text(tokenizer, model.config.vocab_size)
        self._stepping = threading.Lock()  # one step at a time; guards the scheduler and everything below
        self._allocated = False
        self._weights: object = None
        self._sampler: BatchSampler | None = None
        self._sampled: list[Sequence] = []  # the sequences that `_sampler` was made for

    def _pages(self, cache_tokens: int | None) -> int:
        """The memory budget, in pages."""
        if cache_tokens is not None:
            return cache_tokens // PAGE_TOKENS
        one = -(-self.max_context // PAGE_TOKENS)
        affordable = CACHE_BYTES // (self.runner.token_bytes() * PAGE_TOKENS)
        return max(one, min(self.max_batch * one, affordable))

    @property
    def cache_bytes(self) -> int:
        """The memory budget for keys and values, in bytes; all of it is allocated at the first request."""
        return self._scheduler.pool.pages * self._scheduler.pool.size * self.runner.token_bytes()

    @property
    def cache_usage(self) -> float:
        """Share of the budget that running requests use, from 0 to 1. Cached prompts that no request uses do
        not count."""
        return 1.0 - self._scheduler.pool.available / self._scheduler.pool.pages

    @property
    def arrived(self) -> threading.Condition:
        """Held while the queue changes; notified when a request comes."""
        return self._scheduler.arrived

    @property
    def waiting(self) -> int:
        """Number of requests that are not yet in the batch."""
        return len(self._scheduler.waiting)

    @property
    def active(self) -> int:
        """Number of requests that are being answered."""
        return sum(sequence.alive for sequence in list(self._scheduler.running))

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._scheduler.waiting) or self.active > 0

    # ---- requests ------------------------------------------------------------------------------------------

    def submit(
        self, request: Request, *, background: bool = False, on_change: OnChange | None = None
    ) -> Handle:
        """Queue a request. Any thread may call it.

        background: another thread calls `step` (EngineThread); otherwise reading from the handle does.
        on_change: see `Handle`.
        Raises UserError when the prompt is empty, too long or outside the vocabulary, when the answer could
        outgrow the cache, or when stop texts are given without a tokenizer.
        """
        room = self._check(request)
        handle = Handle(request, None if background else self.step, on_change)
        sequence = Sequence.begin(handle, room, self.tokenizer, self.runner.device, self.lookup)
        self._scheduler.queue(sequence)
        return handle

    def _check(self, request: Request) -> int:
        """How many tokens the answer may have. Raises UserError as `submit` does."""
        prompt, sampling, vocab_size = request.prompt, request.sampling, self.model.config.vocab_size
        if not prompt:
            raise UserError(
                "the prompt has no tokens; begin with the end-of-text token when there is nothing to say"
            )
        if len(prompt) > self.max_context - 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context holds {self.max_context} and at least "
                "one must be left for the answer; shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(
                f"the prompt has token ids outside of the model's vocabulary (0 to {vocab_size - 1})"
            )
        if any(not 0 <= position < len(prompt) or not content for position, content in request.placeholders):
            raise UserError(
                f"placeholders must be positions in the prompt (0 to {len(prompt) - 1}), each with a hash of "
                "what it stands for"
            )
        if any(token >= vocab_size for token, _ in sampling.logit_bias):
            raise UserError(
                f"logit_bias has token ids outside of the model's vocabulary (0 to {vocab_size - 1})"
            )
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop texts need an engine with a tokenizer")
        room = min(sampling.max_new_tokens, self.max_context - len(prompt))
        stored = len(prompt) + room - 1  # the last token is never fed
        if self._scheduler.pool.needed(stored) > self._scheduler.pool.pages:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and an answer of up to {room} store up to {stored} "
                "tokens, but the key-value cache holds "
                f"{self._scheduler.pool.pages * self._scheduler.pool.size}; lower max_new_tokens or raise "
                "cache_tokens"
            )
        return room

    def generate(self, requests: abc.Sequence[Request]) -> list[Completion]:
        """Answer all requests; completions in the order of the requests. Raises as `submit` and
        `Handle.result`."""
        handles: list[Handle] = []
        try:
            handles.extend(map(self.submit, requests))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream(self, request: Request) -> Iterator[Piece]:
        """Pieces of one answer; leaving the loop early cancels it. Raises as `submit`, at once, and as
        `Handle.result`."""
        return _until_closed(self.submit(request))

    def forget(self) -> None:
        """Drop every cached prompt; call it after training the model. Running answers continue."""
        with self._stepping:
            self._scheduler.forget()

    # ---- one step ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Make one token for every running sequence, and admit and prefill new ones. Returns False when there
        was nothing to do.

        An error in a step is raised by the handles of the requests that it hits, not here.
        """
        with self._stepping, torch.inference_mode():
            worked, rows = self.busy, self.stats.rows
            try:
                self._scheduler.release_finished()
                self._notice_new_weights()
                self._decode()
                self._scheduler.release_finished()
                self._read()
                if not self._scheduler.running:
                    self._sampler, self._sampled = None, []  # frees the sequences that it refers to
                self.stats.steps += self.stats.rows > rows
            except BaseException as error:
                self._scheduler.start_over(error)
                self._sampler, self._sampled = None, []
                if not isinstance(error, Exception):  # such as Ctrl-C
                    raise
            return worked

    def _decode(self) -> None:
        """One token, or several where guesses are right, for every sequence whose prompt is prefilled."""
        self._scheduler.make_room()
        sequences = [sequence for sequence in self._scheduler.running if not sequence.reading]
        if not sequences:
            return
        self.stats.rows += len(sequences)
        with _blame(sequences):
            guesses = [
                self._guess(sequence) if len(sequences) <= LOOKUP_SEQUENCES else [] for sequence in sequences
            ]
            feeds = [
                Feed([sequence.tokens[-1], *guess], sequence.stored, sequence.pages, 1 + len(guess))
                for sequence, guess in zip(sequences, guesses, strict=True)
            ]
            logits = self._forward(feeds)
            choices = iter(
                self._choose(
                    [sequence for sequence, feed in zip(sequences, feeds, strict=True) for _ in feed.ids],
                    logits,
                )
            )
            for sequence, guess in zip(sequences, guesses, strict=True):
                self._take_in(sequence, guess, [next(choices) for _ in range(1 + len(guess))])

    def _read(self) -> None:
        """Prefill prompts, the oldest first, up to this step's budget of tokens. A sequence whose prompt is
        complete gets its first token."""
        running = any(not sequence.reading for sequence in self._scheduler.running)
        budget = self.prefill_tokens if running else max(self.prefill_tokens, IDLE_PREFILL_TOKENS)
        while True:
            self._scheduler.admit(
                budget - sum(sequence.pending for sequence in self._scheduler.running if sequence.reading)
            )
            sequences, feeds = [], []
            for sequence in self._scheduler.running:
                count = min(sequence.pending, budget) if sequence.reading else 0
                if count:
                    end = sequence.stored + count
                    feeds.append(
                        Feed(
                            sequence.tokens[sequence.stored : end],
                            sequence.stored,
                            sequence.pages,
                            int(end == len(sequence.tokens)),
                        )
                    )
                    sequences.append(sequence)
                    budget -= count
            if not sequences:
                return
            self.stats.rows += len(sequences)
            with _blame(sequences):
                self._read_chunks(sequences, feeds)
            self._scheduler.release_finished()

    def _read_chunks(self, sequences: list[Sequence], feeds: list[Feed]) -> None:
        logits = self._forward(feeds)
        done = [sequence for sequence, feed in zip(sequences, feeds, strict=True) if feed.wanted]
        choices = iter(self._choose(done, logits) if done else [])
        for sequence, feed in zip(sequences, feeds, strict=True):
            sequence.stored += len(feed.ids)
            # A page that is not full enters the prefix cache with the whole prompt, not after each chunk.
            whole = (
                sequence.stored
                if feed.wanted
                else sequence.stored - sequence.stored % self._scheduler.pool.size
            )
            if not sequence.private:
                sequence.pages = self._scheduler.pool.learn(sequence.keys[:whole], sequence.pages)
            if feed.wanted:
                sequence.reading = False
                sequence.add(next(choices))
                self.stats.new_tokens += not sequence.handle.failed

    def _forward(self, feeds: list[Feed]) -> Tensor:
        if not self._allocated:
            self.runner.allocate(self._scheduler.pool.pages, self._scheduler.pool.size)
            self._allocated = True
        return self.runner.forward(feeds)

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> list[Choice]:
        """A token for each row of logits (B, V); a sequence in `sequences` may have several."""
        if self._sampler is None or sequences != self._sampled:
            self._sampled = sequences
            self._sampler = BatchSampler(
                [sequence.sampling for sequence in sequences],
                [sequence.generator for sequence in sequences],
                [sequence.tokens for sequence in sequences],
                answered=[len(sequence.ids) for sequence in sequences],
                vocab_size=logits.shape[1],
                device=logits.device,
            )
        with one_thread() if self.runner.own_threads else nullcontext():
            known, allowed = self._known, allowed_tokens(sequences, logits.shape[1])
            if known is not None:
                known = self._known = known.to(logits.device)
                allowed = known[None] if allowed is None else allowed.to(logits.device) & known
            tokens, logprobs = self._sampler(logits, None if allowed is None else allowed.to(logits.device))
            tops = self._sampler.alternatives(logits, known)
        return list(map(Choice, tokens.tolist(), logprobs.tolist(), tops))

    # ---- guesses -------------------------------------------------------------------------------------------

    def _guess(self, sequence: Sequence) -> list[int]:
        """Guess the tokens after the sequence's newest one, and take pages for them; none where pages are
        scarce."""
        if sequence.lookup is None:
            return []
        guess = sequence.lookup.propose(sequence.tokens, sequence.room - len(sequence.ids) - 1)
        return guess if self._scheduler.room_for_guesses(sequence, len(guess)) else []

    def _take_in(self, sequence: Sequence, guess: list[int], choices: list[Choice]) -> None:
        """Add the model's tokens to a sequence, up to and including the first that differs from its guess."""
        accepted = 0
        for number, choice in enumerate(choices):
            sequence.add(choice)
            if sequence.handle.failed:
                return
            sequence.stored += 1
            self.stats.new_tokens += 1
            if not sequence.alive or number == len(guess) or choice.token != guess[number]:
                break
            accepted += 1
        if guess and sequence.lookup is not None:
            sequence.lookup.learn(len(guess), accepted)
            self.stats.proposed += len(guess)
            self.stats.accepted += accepted

    def _notice_new_weights(self) -> None:
        """Drop cached prompts when torch's version counters show that a parameter was written to. Fused
        optimisers do not raise them: hence `forget`."""
        if self._scheduler.running or not self._scheduler.waiting or not isinstance(self.runner, TorchRunner):
            return
        weights = self.runner.weights()
        if weights != self._weights:
            self._scheduler.forget()
        self._weights = weights


def _until_closed(handle: Handle) -> Iterator[Piece]:
    try:
        yield from handle.pieces()
    finally:
        handle.cancel()


@contextmanager
def _blame(sequences: abc.Sequence[Sequence]) -> Iterator[None]:
    """An error inside ends these sequences, whose handles then raise it."""
    try:
        yield
    except Exception as error:
        for sequence in sequences:
            if sequence.alive:
                sequence.handle._fail(error)
