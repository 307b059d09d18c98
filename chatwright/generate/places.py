"""The scheduler: which sequences run, which wait, and which pages of the cache they hold.

The engine (engine.py) computes for the running ones. When pages run out, the newest request is preempted.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from chatwright.generate.pages import Match, PagePool
from chatwright.generate.rows import Row
from chatwright.generate.runner import Runner


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
    """The sequences of an engine (`Row`), and the pages that they hold.

    Any thread may call `queue`; everything else is for the thread that makes the step.
    """

    def __init__(self, runner: Runner, stats: Stats, *, pages: int, most: int) -> None:
        """`pages`: the memory budget. `most`: the largest number of running sequences."""
        self.runner, self.stats, self.most = runner, stats, most
        self.arrived = threading.Condition()  # guards `waiting`; notified when a request comes
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in the order in which they were admitted
        self.pool = PagePool(pages)
        self._count = 0

    def queue(self, row: Row) -> None:
        """Add a request to the queue."""
        with self.arrived:
            row.number = self._count
            self._count += 1
            self.waiting.append(row)
            self.arrived.notify_all()

    def forget(self) -> None:
        """Empty the prefix cache. Running sequences keep their pages, but no longer share them."""
        self.pool.forget()
        for row in self.running:
            row.private = True

    def admit(self, budget: int) -> None:
        """Admit waiting requests, in their order, until `budget` tokens are to be prefilled."""
        at = 0
        with self.arrived:
            # Cancelled requests leave the queue from any position.
            for row in [row for row in self.waiting if row.handle.cancelled]:
                self.waiting.remove(row)
                row.finish("cancelled")
            while at < len(self.waiting):
                row = self.waiting[at]
                if len(self.running) + at >= self.most or budget <= 0:
                    break
                match = self.pool.match(row.keys[:-1])
                if self._is_being_read(row, match):
                    at += 1
                    continue
                if not self._give_pages(row, match):
                    break
                budget -= row.pending
                del self.waiting[at]

    def _is_being_read(self, row: Row, match: Match) -> bool:
        """Whether a running sequence is prefilling a prefix that this one needs: then it waits, to reuse it.

        That is worth it for a full page, and for another sample of the same prompt.
        """
        last = len(row.keys) - 1
        end = min(last, match.tokens - match.tokens % self.pool.size + self.pool.size)
        if end <= match.tokens:
            return False
        begin = row.keys[:end]
        return any(
            other.keys[:end] == begin and (end % self.pool.size == 0 or other.keys == row.keys)
            for other in self.running
            if other.reading and other.alive and not other.private
        )

    def _give_pages(self, row: Row, match: Match) -> bool:
        """Admit a sequence with pages for all its tokens, shared ones first; False when there are too few.

        One page must stay free for every running sequence, so that it can continue.
        """
        pool = self.pool
        fresh = pool.needed(len(row.tokens)) - len(match.pages)
        spare = pool.available - sum(not pool.users[page] for page in match.pages) - fresh
        if spare < (len(self.running) + 1 if self.running else 0):
            return False
        self.running.append(row)
        row.pages, row.stored = list(match.pages), len(match.pages) * pool.size
        for page in match.pages:
            pool.share(page)
        source = match.source
        # The source is reserved while the page for the copy is taken.
        if source is not None and (pool.users[source] or spare):
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

    def make_room(self) -> None:
        """Give every running sequence a page for its newest token; preempts the newest requests if needed."""
        for row in sorted(self.running, key=lambda row: row.number):
            while (
                row in self.running and not row.reading and self.pool.needed(row.stored + 1) > len(row.pages)
            ):
                if self.pool.available:
                    row.pages.append(self.pool.take())
                else:
                    self._preempt(max(self.running, key=lambda row: row.number))

    def _preempt(self, row: Row) -> None:
        """Move a sequence back to the head of the queue. What it had computed stays cached until its pages
        are needed."""
        self.running.remove(row)
        self._let_go(row)
        row.reading, row.private = True, False
        self.stats.preempted += 1
        with self.arrived:
            self.waiting.appendleft(row)

    def release_finished(self) -> None:
        """Remove finished and cancelled sequences, and release their pages."""
        for row in self.running:
            if row.alive and row.handle.cancelled:
                row.finish("cancelled")
        for row in [row for row in self.running if not row.alive]:
            self.running.remove(row)
            self._let_go(row)

    def _let_go(self, row: Row) -> None:
        """Release a sequence's pages. They stay in the prefix cache unless it failed."""
        if row.handle.failed:
            self.pool.invalidate(row.pages)
        elif not row.private:
            row.pages = self.pool.learn(row.keys[: row.stored], row.pages)
        self.pool.release(row.pages)
        row.pages, row.stored = [], 0

    def room_for_guesses(self, row: Row, count: int) -> bool:
        """Give a sequence pages for its newest token and `count` guesses; False where pages are scarce."""
        pages = self.pool.needed(row.stored + 1 + count) - len(row.pages)
        if pages > self.pool.available - len(self.running):
            return False
        row.pages += [self.pool.take() for _ in range(pages)]
        return True

    def start_over(self, error: BaseException) -> None:
        """End all sequences with an error and empty the cache: after an error outside of a forward pass, or
        Ctrl-C anywhere, the pages' owners are not known."""
        for row in self.running:
            if row.alive:
                row.handle._fail(error)
        with self.arrived:
            self.waiting = deque(row for row in self.waiting if row.alive)
        self.running = []
        self.pool = PagePool(self.pool.pages)
