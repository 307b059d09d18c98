"""The judge of what the clients of load_clients.py got: nothing lost, nothing mixed up, nobody starved,
memory flat.

The rounding of float32 sums moves with the company that an answer is computed in. So a greedy answer may take
another turn where two tokens are about equally likely, and only there: `Oracle` walks each text that differs
through the model itself, from the first token to the last, and measures every place where it left the
likeliest one.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from load_clients import Load, Question, Reply

if TYPE_CHECKING:
    from chatwright.generate.request import Request
    from chatwright.language_model import LanguageModel

TIE = 0.05
"""Nats between two tokens that rounding may exchange. Keys and values are kept in bfloat16, where a last bit
of float32 can turn into one of 256; what was seen is 0.003."""
ALTERNATIVES = 8
"""Tokens that are looked at in each place."""
WALKS = 64
"""Times that the oracle begins anew at another token before it gives a text up."""
LONG_ENOUGH = 60.0
"""Seconds from which memory is judged: cache and allocator have had their first use by the second half."""


class Oracle:
    """Whether a text is a greedy answer of the model, other turns at near ties allowed."""

    def __init__(self, model: LanguageModel, questions: Sequence[Question], *, tie: float = TIE) -> None:
        self.model, self.questions, self.tie = model, questions, tie
        self._known: dict[tuple[int, str, str | None], float | None] = {}

    def gap(self, question: int, text: str, finish: str | None) -> float | None:
        """The widest gap, in nats, between the likeliest token and the one that the text took; None when it
        is wider than a tie. finish: why the answer ended; None for the beginning of one."""
        key = (question, text, finish)
        if key not in self._known:
            self._known[key] = self._walk(self._request(self.questions[question]), text, finish)
        return self._known[key]

    def _request(self, question: Question) -> Request:
        from chatwright.chat import Message
        from chatwright.generate.sampling import Sampling
        from chatwright.serve.service import prepare

        sampling = Sampling(temperature=0.0, max_new_tokens=question.max_tokens, top_logprobs=ALTERNATIVES)
        return prepare(self.model, [Message(role="user", content=question.text)], sampling).requests[0]

    def _walk(self, request: Request, text: str, finish: str | None) -> float | None:
        """Depth first, the latest place and the narrowest gap first."""
        begun: list[tuple[list[int], float]] = [([], 0.0)]
        for _ in range(WALKS):
            if not begun:
                return None
            ids, worst = begun.pop()
            arrived, others = self._follow(request, ids, text, finish)
            if arrived:
                return worst
            begun += [(one, max(worst, gap)) for one, gap in others]
        return None

    def _follow(
        self, request: Request, ids: list[int], text: str, finish: str | None
    ) -> tuple[bool, list[tuple[list[int], float]]]:
        """Go on greedily behind `ids`. Whether this gives the text; and the near ties on the way, the best
        ones last."""
        limit = request.sampling.max_new_tokens
        if len(ids) == limit:
            return finish == "length" and self._text(ids) == text, []
        sampling = replace(request.sampling, max_new_tokens=limit - len(ids))
        going_on = replace(request, prompt=(*request.prompt, *ids), sampling=sampling)
        done = self.model.engine.generate([going_on])[0]
        others: list[tuple[list[int], float]] = []
        ids = list(ids)
        for token, tops in zip(done.ids, done.top_logprobs, strict=True):
            best = tops[0][1]
            ties = [
                ([*ids, other], best - value)
                for other, value in tops
                if other != token and best - value <= self.tie
            ]
            ties = [one for one in ties if self._fits(one[0], request.end_ids, text, finish)]
            others += sorted(ties, key=lambda one: -one[1])
            ids.append(token)
            if not self._fits(ids, request.end_ids, text, finish):
                return False, others
            if finish is None and self._text(ids).startswith(text):
                return True, []
        ended = bool(ids) and ids[-1] in request.end_ids
        said = self._text(ids[:-1] if ended else ids)
        return said == text and finish in (None, "stop" if ended else "length"), others

    def _fits(self, ids: list[int], ends: frozenset[int], text: str, finish: str | None) -> bool:
        """Whether the tokens may be the beginning of the text."""
        if ids[-1] in ends:
            return self._text(ids[:-1]) == text and finish in (None, "stop")
        said = self._text(ids).rstrip("\ufffd")  # a character that is not whole yet
        return text.startswith(said) or (finish is None and said.startswith(text))

    def _text(self, ids: Sequence[int]) -> str:
        return self.model.tokenizer.decode(ids)


@dataclass
class Verdict:
    """What the judge found."""

    counts: dict[str, int]
    failures: list[str]
    figures: dict[str, float]
    widest_tie: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failures


def judge(
    load: Load, known: Sequence[Reply], oracle: Oracle, memory: Sequence[tuple[float, float]] = ()
) -> Verdict:
    """All checks of a finished load. known: the answers given alone. memory: (seconds, bytes) of the
    server."""
    verdict = Verdict({}, [], figures_of(load, known))
    outcomes = Counter(_outcome(reply, known, load.questions, oracle, verdict) for reply in load.replies)
    kinds = Counter(reply.kind for reply in load.replies)
    verdict.counts = {
        **{f"answers {name}": number for name, number in sorted(outcomes.items())},
        **{f"requests {name}": number for name, number in sorted(kinds.items())},
        "status 429": sum(reply.refused for reply in load.replies),
        "half requests": load.torn,
    }
    verdict.failures += _unfair(load) + _growing(memory)
    return verdict


def _outcome(
    reply: Reply, known: Sequence[Reply], questions: Sequence[Question], oracle: Oracle, verdict: Verdict
) -> str:
    """equal, near tie, wrong or lost; what is wrong is written into the verdict."""
    who = f"client {reply.client} ({reply.kind}), question {reply.question}"
    if reply.error:
        verdict.failures.append(f"lost: {who}: {reply.error}")
        return "lost"
    right, left = known[reply.question], reply.kind == "leaves" and reply.finish is None
    if not left and (
        reply.finish is None
        or (reply.finish == "length" and reply.tokens != questions[reply.question].max_tokens)
    ):
        verdict.failures.append(
            f"lost: {who}: cut short after {reply.tokens} tokens (finish_reason {reply.finish})"
        )
        return "lost"
    finish = reply.finish if not left else None
    if (reply.text, finish) == (right.text, right.finish) or (left and right.text.startswith(reply.text)):
        return "equal"
    gap = oracle.gap(reply.question, reply.text, finish)
    if gap is None:
        verdict.failures.append(f"wrong: {who}: {reply.text[:200]!r} instead of {right.text[:200]!r}")
        return "wrong"
    verdict.widest_tie = max(verdict.widest_tie, gap)
    return "near tie"


def _unfair(load: Load) -> list[str]:
    """Who waited out of all proportion, or came away with nothing."""
    waits = [reply.first for reply in load.replies if reply.first is not None]
    finished = Counter(reply.client for reply in load.replies if reply.finish)
    failures = []
    if waits and max(waits) > 5 * statistics.median(waits) + 5:
        failures.append(
            f"unfair: somebody waited {max(waits):.1f} s, half of all less than "
            f"{statistics.median(waits):.1f} s"
        )
    without = [number for number in range(load.clients) if not finished[number]]
    if without:
        failures.append(f"unfair: clients {without[:8]} finished nothing")
    usual = (
        statistics.median(finished[number] for number in range(load.slow, load.clients))
        if load.clients > load.slow
        else 0
    )
    poor = [
        number for number in range(load.slow, load.clients) if 0 < finished[number] < usual / 4 and usual >= 8
    ]
    if poor:
        failures.append(
            f"unfair: clients {poor[:8]} finished less than a quarter of what others did ({usual:.0f})"
        )
    return failures


def _growing(memory: Sequence[tuple[float, float]]) -> list[str]:
    if len(memory) < 4 or memory[-1][0] - memory[0][0] < LONG_ENOUGH:
        return []
    growth, size = growth_of(memory)
    if growth > max(16e6, 0.01 * size):
        return [f"memory: it grew by {growth / 1e6:.0f} MB over the second half, to {size / 1e6:,.0f} MB"]
    return []


def growth_of(memory: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Bytes by which the second half grew, by a straight line through it, and the size at the end."""
    half = [one for one in memory if one[0] >= (memory[0][0] + memory[-1][0]) / 2]
    if len(half) < 2:
        return 0.0, memory[-1][1] if memory else 0.0
    slope = statistics.linear_regression([at for at, _ in half], [size for _, size in half]).slope
    return slope * (half[-1][0] - half[0][0]), half[-1][1]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def figures_of(load: Load, known: Sequence[Reply]) -> dict[str, float]:
    """Speeds and waits; slow readers are left out where the reader would be measured."""
    waits = [reply.first for reply in load.replies if reply.first is not None]
    gaps = [gap for reply in load.replies if reply.kind != "slow" for gap in reply.gaps]
    tokens = sum(reply.tokens for reply in load.replies)
    first_alone = [reply.first for reply in known if reply.first is not None]
    spent = sum(reply.first + sum(reply.gaps) for reply in known if reply.first is not None)
    return {
        "seconds": load.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / load.seconds if load.seconds else float("nan"),
        "tokens_per_second_alone": sum(reply.tokens for reply in known) / spent if spent else float("nan"),
        "first_token_p50": percentile(waits, 0.5),
        "first_token_p95": percentile(waits, 0.95),
        "first_token_max": max(waits, default=float("nan")),
        "first_token_alone_p50": percentile(first_alone, 0.5),
        "between_tokens_p50": percentile(gaps, 0.5),
        "between_tokens_p95": percentile(gaps, 0.95),
    }
