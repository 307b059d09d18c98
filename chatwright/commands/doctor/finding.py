"""The result of one check of `chatwright doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    topic: str
    text: str
    remedy: str = ""
    """What to do about it; empty when there is nothing to do."""
