"""`config.json`, read with care: whatever is not what a family expects is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chatwright.config import UserError

KINDS = ("full_attention", "sliding_attention")
"""What transformers calls layers without a window and with one."""
MOST_LAYERS = 10_000


def shown(value: Any) -> str:
    """A value of a file for a message, not all of it when it is long or deep."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def named(value: Any) -> str:
    """The same in Python's spelling, which names have in messages."""
    return f"{value!r:.80}" if value is None or isinstance(value, str) else shown(value)


class Settings:
    """`config.json`, read with care."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; null and absence mean `default`."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.where}: {key} must be a positive whole number, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that is not negative; null and absence mean `default`."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
            raise UserError(f"{self.where}: {key} must be a number, not {shown(value)}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if not value:
            raise UserError(f"{self.where}: {key} must be above 0")
        return value

    def only(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value, if it is among `allowed`; anything else is a feature that we do not carry."""
        value = self.values.get(key, default)
        if value not in allowed:
            known = " or ".join(json.dumps(one) for one in allowed)
            raise UserError(f"{self.where}: {key} = {shown(value)} is not supported, only {known}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that may be 0; null and absence mean `default`."""
        return 0 if self.values.get(key) == 0 else self.whole(key, default)

    def cap(self, key: str, default: float | None = None) -> float:
        """A soft cap: a number, 0 for null; absence means `default`."""
        return 0.0 if self.values.get(key, default) is None else self.number(key, default)

    def layers(self) -> int:
        """The number of layers, where something is said of each: before a list of that length is made."""
        layers = self.whole("num_hidden_layers")
        if layers > MOST_LAYERS:
            raise UserError(f"{self.where}: num_hidden_layers {layers} is more than {MOST_LAYERS}")
        return layers

    def windows(
        self, usual: Sequence[bool], size: int | None = None, *, used: bool = True
    ) -> tuple[int, ...]:
        """The window of each layer, 0 for full attention. `layer_types` say which layers have one, or `usual`
        where the settings do not; `size` holds where `sliding_window` is absent. Where windows are not
        `used`, as `use_sliding_window` says, none may have one."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            kinds = [KINDS[windowed] for windowed in usual]
        if not isinstance(kinds, list) or any(kind not in KINDS for kind in kinds):
            raise UserError(
                f"{self.where}: layer_types = {shown(kinds)} is not supported, only {', '.join(KINDS)}"
            )
        if len(kinds) != len(usual):
            raise UserError(f"{self.where}: {len(kinds)} layer_types for {len(usual)} layers")
        if KINDS[True] not in kinds:
            return ()
        if not used:
            raise UserError(
                f"{self.where}: layer_types has {KINDS[True]}, but use_sliding_window is not true"
            )
        window = self.whole("sliding_window", size if "sliding_window" not in self.values else None)
        return tuple(window if kind == KINDS[True] else 0 for kind in kinds)

    def truth(self, key: str, default: bool) -> bool:
        return bool(self.only(key, True, False, default=default))
