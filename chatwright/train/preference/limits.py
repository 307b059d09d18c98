"""How long a row of a reward model may be, and which comparisons are left when the answers are cut.

Two answers that differ only behind the cut are one and the same to the model, while people preferred one of
them: such a comparison teaches nothing, costs ln 2 for ever, and pulls the accuracy to 0.5. It is left out
and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatwright.config import UserError
from chatwright.data.cuts import Cuts, Room, length_of_data
from chatwright.data.examples import Comparison
from chatwright.train.preference.rankings import AnswerEncoder, Split

STEP = 8
"""A row length that comes from the data is a multiple of this."""
CUT_END = "that lost their end"
CUT_PROMPT = "whose prompt lost its beginning"
ALIKE = "that cannot be told from another one of their prompt, left out"


@dataclass
class RowLimits:
    """The limit of rows of prompt and answer, and what it cuts."""

    limit: int
    cuts: Cuts
    comparisons: int = 0
    dropped: int = 0
    """Comparisons without two answers that can be told apart."""
    needed: int = 0
    """The limit that would tell all answers apart."""

    @property
    def notes(self) -> list[str]:
        """Lines for console and report; none where nothing was cut."""
        if not self.dropped:
            return self.cuts.notes
        return [
            f"{self.dropped:,} of {self.comparisons:,} comparisons are left out: cut at {self.cuts.setting} "
            f"{self.limit}, their answers are the same; telling them apart takes {self.needed}",
            *self.cuts.notes,
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """What was cut, for the report's facts."""
        left_out = {"comparisons left out": self.dropped} if self.dropped else {}
        return {"max_tokens": self.limit, "cut": self.cuts.facts, **left_out}


def limit_rows(asked: int, lengths: Sequence[int], room: Callable[[int], Room], what: str) -> RowLimits:
    """The limit of rows with these lengths: the setting, or the longest row; at most what `room(wanted)`
    says."""
    wanted = asked or length_of_data(lengths, step=STEP) or STEP
    there = room(wanted)
    cuts = Cuts(what, "max_tokens", min(wanted, there.most), there, STEP)
    return RowLimits(cuts.limit, cuts)


def split_within(
    split: Split, encoder: AnswerEncoder, config: Any, room: Callable[[int], Room]
) -> tuple[Split, RowLimits]:
    """The comparisons whose answers can be told apart within the limit, and the limit. Raises UserError when
    none are left."""
    sides = (split.train, split.held_out, split.held_out_annotators)
    lengths = _lengths([one for side in sides for one in side], encoder)
    limits = limit_rows(config.max_tokens, lengths, room, "answers in comparisons")
    for length in lengths:
        limits.cuts.saw(length)
    kept = [_apart(side, encoder, config.tie_tolerance, limits) for side in sides]
    for name, side, left in zip(("training", "held-out"), sides, kept, strict=False):
        if side and not left:
            raise UserError(_all_alike(name, len(side), limits))
    return Split(*kept), limits


def within_context(
    comparisons: Sequence[Comparison], encoder: AnswerEncoder, tolerance: float, context: int
) -> tuple[list[Comparison], RowLimits]:
    """The comparisons, to be measured, whose answers can be told apart within the model's context; and what
    it cuts."""
    why = "the model's context"
    limits = RowLimits(context, Cuts("answers in comparisons", why, context, Room(context, why), STEP))
    for length in _lengths(comparisons, encoder):
        limits.cuts.saw(length)
    return _apart(comparisons, encoder, tolerance, limits), limits


def _lengths(comparisons: Sequence[Comparison], encoder: AnswerEncoder) -> list[int]:
    """Tokens of each answer's whole row: prompt, answer and end token."""
    encoder.read(answer for one in comparisons for answer in one.responses)
    lengths = []
    for one in comparisons:
        before = len(encoder.prompt(one.prompt)) + 1
        lengths += [before + len(encoder.answer(answer)) for answer in one.responses]
    return lengths


def _apart(
    comparisons: Iterable[Comparison], encoder: AnswerEncoder, tolerance: float, limits: RowLimits
) -> list[Comparison]:
    """The comparisons without the answers that are the same as another one of theirs when they are cut."""
    found = []
    for one in comparisons:
        before = len(encoder.prompt(one.prompt))
        long = [len(encoder.answer(answer)) > limits.limit - 2 for answer in one.responses]
        limits.cuts.add(CUT_END, sum(long))
        limits.cuts.add(
            CUT_PROMPT,
            sum(
                not cut and before + len(encoder.answer(answer)) + 1 > limits.limit
                for cut, answer in zip(long, one.responses, strict=True)
            ),
        )
        alike = _alike(one, encoder, tolerance, limits) if any(long) else set()
        limits.cuts.add(ALIKE, len(alike))
        limits.comparisons += 1
        kept = [n for n in range(len(one.responses)) if n not in alike]
        if not alike:
            found.append(one)
        elif len(kept) > 1:
            answers, scores = tuple(one.responses[n] for n in kept), tuple(one.scores[n] for n in kept)
            found.append(replace(one, responses=answers, scores=scores))
        else:
            limits.dropped += 1
    return found


def _alike(one: Comparison, encoder: AnswerEncoder, tolerance: float, limits: RowLimits) -> set[int]:
    """The answers that differ from another one only behind the cut, although people did not rate them
    alike."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, answer in enumerate(one.responses):
        groups.setdefault(tuple(encoder.answer(answer)[: limits.limit - 2]), []).append(n)
    alike: set[int] = set()
    for group in groups.values():
        for n in group:
            for m in group:
                differ = one.responses[n] != one.responses[m]
                if differ and abs(one.scores[n] - one.scores[m]) > tolerance:
                    alike |= {n, m}
                    limits.needed = max(
                        limits.needed, _first_difference(encoder, one.responses[n], one.responses[m]) + 3
                    )
    return alike


def _first_difference(encoder: AnswerEncoder, one: str, other: str) -> int:
    """The number of tokens that two answers begin with in common."""
    first, second = encoder.answer(one), encoder.answer(other)
    same = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return min(len(first), len(second)) if same is None else same


def _all_alike(name: str, count: int, limits: RowLimits) -> str:
    """The error when no comparison of one side is left."""
    cuts = limits.cuts
    text = (
        f"max_tokens {limits.limit} makes the answers of all {count:,} {name} comparisons the same: they "
        f"differ only further on, and {limits.needed} tokens tell all of them apart"
    )
    if cuts.reachable:
        return f"{text}. Set max_tokens to {min(cuts.enough, cuts.most)}, where nothing is cut, or to 0"
    assert cuts.room is not None
    if limits.needed <= cuts.room.most:
        return f"{text}. Set max_tokens to {cuts.room.most}, the most that {cuts.room.why} allows, or to 0"
    allowed = f"{cuts.room.why} allows {cuts.room.most}"
    return f"{text}, but {allowed}: compare shorter answers, or take a base with a longer context"
