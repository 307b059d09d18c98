"""What a stage cut, or left out, of its data and why; and limits of length that come from the data.

Every stage that reads samples counts here, says one line on the console, and puts the same line and the
numbers into its report. Nothing is cut in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chatwright.config import UsageError

OUTLIER = 4
"""A length is an outlier when it is more than so many times the 95th percentile of all lengths."""


def rounded_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def length_of_data(lengths: Sequence[int], *, step: int, share: float = 1.0, floor: int = 0) -> int:
    """A limit in tokens for samples of these lengths: a multiple of `step` that holds `share` of them whole.

    `share` is that of the nearest-rank percentile. Outliers, lengths of more than `OUTLIER` times the 95th
    percentile, do not raise the limit above `floor`: one huge sample would make every other one expensive.
    0 when there are no lengths.
    """
    if not lengths:
        return 0
    ordered = sorted(lengths)
    rank = max(1, -(-round(share * 1_000_000) * len(ordered) // 1_000_000))
    usual = ordered[(len(ordered) - 1) * 95 // 100]
    return rounded_up(min(ordered[rank - 1], max(floor, OUTLIER * usual)), step)


def check_limit(name: str, limit: int, least: int) -> None:
    """Raise UsageError for a limit in tokens that is neither 0 (from the data) nor at least `least`."""
    if limit and limit < least:
        raise UsageError(f"{name} {limit} must be at least {least}, or 0 for the length of the data")


@dataclass(frozen=True)
class Room:
    """The most tokens that a sample may have, and what sets this: the model's context, or memory."""

    most: int
    why: str


@dataclass
class Cuts:
    """How many samples of one kind were cut or left out, by cause."""

    what: str
    """The samples: `conversations`, `answers`, `prompts`."""
    setting: str
    """The setting that limits their length."""
    limit: int
    """Its value, in tokens."""
    room: Room | None = None
    """The most that the setting can be."""
    step: int = 8
    """Values of the setting that are advised are multiples of this."""
    total: int = 0
    longest: int = 0
    """Tokens of the longest sample, whole."""
    causes: dict[str, int] = field(default_factory=dict)
    """What was done, as it follows a number (`cut between exchanges`) -> how many samples."""
    too_long: int = 0
    """Samples that are whole under a higher limit."""

    def saw(self, tokens: int) -> None:
        """Count one more sample, of so many tokens."""
        self.total += 1
        self.longest = max(self.longest, tokens)

    def add(self, cause: str, count: int = 1, *, length: bool = True) -> None:
        """Count samples that were cut or left out; `length` says whether a higher limit would help."""
        if count:
            self.causes[cause] = self.causes.get(cause, 0) + count
            self.too_long += count if length else 0

    @property
    def enough(self) -> int:
        """The value of the setting with which nothing is too long."""
        return rounded_up(self.longest, self.step)

    @property
    def reachable(self) -> bool:
        """Whether the setting can have that value."""
        return self.room is None or self.longest <= self.room.most

    @property
    def advice(self) -> str:
        """What to do so that nothing is cut; empty when nothing is too long."""
        if not self.too_long:
            return ""
        longest = f"the longest has {self.longest:,} tokens"
        if self.reachable:
            return f"{longest}: {self.setting} {min(self.enough, self.most)} keeps all of them whole"
        assert self.room is not None
        return f"{longest}, {self.room.why} allows {self.room.most:,}"

    @property
    def most(self) -> int:
        """The highest value of the setting; the advised one when nothing limits it."""
        return self.enough if self.room is None else self.room.most

    def __str__(self) -> str:
        """One line: what was done with how many, and what to set."""
        held = f"{self.setting} {self.limit:,}"
        if not self.causes:
            whole = f"{self.total:,} {self.what}, the longest of {self.longest:,} tokens"
            return f"nothing was cut: {whole} ({held})"
        done = "; ".join(f"{count:,} {cause}" for cause, count in self.causes.items())
        advice = f"; {self.advice}" if self.advice else ""
        return f"of {self.total:,} {self.what}: {done} ({held}{advice})"

    @property
    def notes(self) -> list[str]:
        """The line for the report; none when nothing was cut."""
        return [str(self)] if self.causes else []

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers for the report's facts and for stages that read them (`cause_of`)."""
        return {
            "of": self.total,
            "what": self.what,
            **self.causes,
            "too long": self.too_long,
            "longest": self.longest,
            "limit": f"{self.setting} {self.limit}",
            "advice": self.advice,
        }


WORTH_BLAMING = 0.05
"""Share of the samples that must be too long before their cutting is named as the cause of a weak model."""


def cause_of(facts: Any) -> str:
    """From `Cuts.facts` in the result of a stage: how many samples were too long there, and what to set; for
    the message of a stage that finds the model too weak. Empty when too few were."""
    if not isinstance(facts, dict) or facts.get("too long", 0) < WORTH_BLAMING * max(1, facts.get("of", 0)):
        return ""
    if not facts.get("advice"):
        return ""
    return (
        f"{facts['too long']:,} of {facts['of']:,} {facts['what']} were cut at {facts['limit']} "
        f"({facts['advice']})"
    )
