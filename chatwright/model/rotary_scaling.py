"""How rotary positions are stretched beyond an earlier context; and what a number from a file may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from chatwright.config import UserError

LARGEST = 1 << 30
"""Upper bound of every size. Beyond it the bytes of a matrix could not be counted in 64 bits."""


def check_kinds(config: Any, prefix: str = "") -> None:
    """Raise UserError unless every field has its declared type: the values may come from any file."""
    numbers: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
    for field in fields(config):
        allowed = numbers.get(str(field.type))
        value: Any = getattr(config, field.name)
        if allowed is None:
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise UserError(f"model: {prefix}{field.name} is {value!r:.80}, not of type {field.type}")
        # Neither NaN nor infinite, nor a whole number beyond floats.
        if float in allowed and not abs(getattr(config, field.name)) < 1e300:
            raise UserError(f"model: {prefix}{field.name} is {value!r:.80}, which no computer can use")


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary positions are stretched in models that read longer texts than they were first trained on.

    Pairs of features that make many turns within the original context tell where a word stands in its
    sentence; pairs that make less than one turn tell where the sentence stands. `linear` slows all pairs by
    `factor`, `llama3` and `yarn` only the slow ones. The equations are in model/rotary.py.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = 1.0
    """How many times longer the new context is."""
    original_context: int = 0
    """Context of the first training, in tokens (llama3 and yarn)."""
    low_turns: float = 1.0
    """Pairs with fewer turns in the original context are slowed; llama3: low_freq_factor, yarn: beta_slow."""
    high_turns: float = 4.0
    """Pairs with more turns stay as they are; llama3: high_freq_factor, yarn: beta_fast, usually 32."""
    whole_pairs: bool = True
    """yarn: round the two limits outwards to whole pairs."""
    attention_factor: float = 1.0
    """Factor on cosine and sine, so that scores grow by its square. Usual for yarn: 1 + ln(factor) / 10."""
    divisors: tuple[float, ...] = ()
    """Divide the rate of each pair by these first: the `rope_freqs` of GGUF files, which store Llama 3.1's
    scaling in this way. Empty means none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisors", tuple(self.divisors))
        check_kinds(self, "rope_scaling.")
        if self.kind not in ("linear", "llama3", "yarn"):
            raise UserError(f"model: rope_scaling.kind is {self.kind!r}; it can be linear, llama3, yarn")
        positive = (self.factor, self.low_turns, self.high_turns, self.attention_factor, *self.divisors)
        if not all(isinstance(value, int | float) and 0.0 < value < math.inf for value in positive):
            raise UserError("model: the numbers of rope_scaling must be positive")
        if self.kind != "linear" and not 1 <= self.original_context <= LARGEST:
            raise UserError(
                f"model: {self.kind} scaling needs an original_context, not {self.original_context}"
            )
        if self.kind != "linear" and self.low_turns >= self.high_turns:
            raise UserError(
                f"model: rope_scaling: {self.low_turns} is no limit below {self.high_turns} turns"
            )

    @staticmethod
    def usual_attention_factor(factor: float, share: float = 1.0) -> float:
        """YaRN's factor on cosine and sine, 1 + share x ln(factor) / 10 (arXiv:2309.00071, eq. 22)."""
        return 1.0 + 0.1 * share * math.log(factor) if factor > 1.0 else 1.0
