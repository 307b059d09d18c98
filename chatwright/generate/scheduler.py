"""The scheduler: which sequences run, which wait, and which pages of the cache they hold.

The engine (engine.py) computes for the running ones. When pages run out, the newest request is preempted.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from chatwright.generate.pages import Match, PagePool
from chatwright.generate.runner import Runner
from chatwright.generate.sequence import Sequence


@dataclass
class Stats:
    """Counters of an engine since it was made."""

    prompt_tokens: int = 0
    """Prompt tokens of admitted requests."""
    cached_tokens: int = 0
    """Those of them that were in the prefix cache."""
    new_tokens: int = 0
    """Tokens that were chosen."""
    proposed: int = 0
    """Tokens guessed by prompt lookup."""
    accepted: int = 0
    """Guesses that were right."""
    preempted: int = 0
    """How often a running request was preempted and lost its pages."""
    steps: int = 0
    """Steps in which something was computed."""
    rows: int = 0
    """Sequences computed for, summed over the steps: rows / steps is the mean batch size."""


class Scheduler:
    """The sequences of an engine (`Sequence`), and the pages that they hold.

    Any thread may call `queue`; everything else is for the thread that makes the step.
    """

    def __init__(self, runner: Runner, stats: Stats, *, pages: int, most: int) -> None:
        """`pages`: the memory budget. `most`: the largest number of running sequences."""
        self.runner, self.stats, self.most = runner, stats, most
        self.arrived = threading.Condition()  # guards `waiting`; notified when a request comes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they were admitted
        self.pool = PagePool(pages)
        self._count = 0

    def queue(self, sequence: Sequence) -> None:
        """Add a request to the queue."""
        with self.arrived:
            sequence.number = self._count
            self._count += 1
            self.waiting.append(sequence)
            self.arrived.notify_all()

    def forget(self) -> None:
        """Empty the prefix cache. Running sequences keep their pages, but no longer share them."""
        self.pool.forget()
        for sequence in self.running:
            sequence.private = True

    def admit(self, budget: int) -> None:
        """Admit waiting requests, in their order, until `budget` tokens are to be prefilled."""
        at = 0
        with self.arrived:
            # Cancelled requests leave the queue from any position.
            for sequence in [sequence for sequence in self.waiting if sequence.handle.cancelled]:
                self.waiting.remove(sequence)
                sequence.finish("cancelled")
            while at < len(self.waiting):
                sequence = self.waiting[at]
                if len(self.running) + at >= self.most or budget <= 0:
                    break
                match = self.pool.match(sequence.keys[:-1])
                if self._is_being_read(sequence, match):
                    at += 1
                    continue
                if not self._give_pages(sequence, match):
                    break
                budget -= sequence.pending
                del self.waiting[at]

    def _is_being_read(self, sequence: Sequence, match: Match) -> bool:
        """Whether a running sequence is prefilling a prefix that this one needs: then it waits, to reuse it.

        That is worth it for a full page, and for another sample of the same prompt.
        """
        last = len(sequence.keys) - 1
        end = min(last, match.tokens - match.tokens % self.pool.size + self.pool.size)
        if end <= match.tokens:
            return False
        begin = sequence.keys[:end]
        return any(
            other.keys[:end] == begin and (end % self.pool.size == 0 or other.keys == sequence.keys)
            for other in self.running
            if other.reading and other.alive and not other.private
        )

    def _give_pages(self, sequence: Sequence, match: Match) -> bool:
        """Admit a sequence with pages for all its tokens, shared ones first; False when there are too few.

        One page must stay free for every running sequence, so that it can continue.
        """
        pool = self.pool
        fresh = pool.needed(len(sequence.tokens)) - len(match.pages)
        spare = pool.available - sum(not pool.users[page] for page in match.pages) - fresh
        if spare < (len(self.running) + 1 if self.running else 0):
            return False
        self.running.append(sequence)
        sequence.pages, sequence.stored = list(match.pages), len(match.pages) * pool.size
        for page in match.pages:
            pool.share(page)
        source = match.source
        # The source is reserved while the page for the copy is taken.
        if source is not None and (pool.users[source] or spare):
            pool.share(source)
            sequence.pages.append(pool.take())
            self.runner.copy_page(source, sequence.pages[-1])
            pool.release([source])
            sequence.stored = match.tokens
        sequence.pages += [
            pool.take() for _ in range(pool.needed(len(sequence.tokens)) - len(sequence.pages))
        ]
        if sequence.cached is None:
            sequence.cached = min(sequence.stored, len(sequence.handle.request.prompt))
            self.stats.prompt_tokens += len(sequence.handle.request.prompt)
            self.stats.cached_tokens += sequence.cached
        return True

    def make_room(self) -> None:
        """Give every running sequence a page for its newest token; preempts the newest requests if needed."""
        for sequence in sorted(self.running, key=lambda sequence: sequence.number):
            while (
                sequence in self.running
                and not sequence.reading
                and self.pool.needed(sequence.stored + 1) > len(sequence.pages)
            ):
                if self.pool.available:
                    sequence.pages.append(self.pool.take())
                else:
                    self._preempt(max(self.running, key=lambda sequence: sequence.number))

    def _preempt(self, sequence: Sequence) -> None:
        """Move a sequence back to the head of the queue. What it had computed stays cached until its pages
        are needed."""
        self.running.remove(sequence)
        self._let_go(sequence)
        sequence.reading, sequence.private = True, False
        self.stats.preempted += 1
        with self.arrived:
            self.waiting.appendleft(sequence)

    def release_finished(self) -> None:
        """Remove finished and cancelled sequences, and release their pages."""
        for sequence in self.running:
            if sequence.alive and sequence.handle.cancelled:
                sequence.finish("cancelled")
        for sequence in [sequence for sequence in self.running if not sequence.alive]:
            self.running.remove(sequence)
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Release a sequence's pages. They stay in the prefix cache unless it failed."""
        if sequence.handle.failed:
            self.pool.invalidate(sequence.pages)
        elif not sequence.private:
            sequence.pages = self.pool.learn(sequence.keys[: sequence.stored], sequence.pages)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.stored = [], 0

    def room_for_guesses(self, sequence: Sequence, count: int) -> bool:
        """Give a sequence pages for its newest token and `count` guesses; False where pages are scarce."""
        pages = self.pool.needed(sequence.stored + 1 + count) - len(sequence.pages)
        if pages > self.pool.available - len(self.running):
            return False
        sequence.pages += [self.pool.take() for _ in range(pages)]
        return True

    def start_over(self, error: BaseException) -> None:
        """End all sequences with an error and empty the cache: after an error outside of a forward pass, or
        Ctrl-C anywhere, the pages' owners are not known."""
        for sequence in self.running:
            if sequence.alive:
                sequence.handle._fail(error)
        with self.arrived:
            self.waiting = deque(sequence for sequence in self.waiting if sequence.alive)
        self.running = []
        self.pool = PagePool(self.pool.pages)
