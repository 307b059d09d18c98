"""What one check of `chatwright doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    level: Level
    topic: str
    text: str
    remedy: str = ""
    """What to do about it; empty when there is nothing to do."""
