"""What an entry of the table of families says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import GPTConfig


@dataclass(frozen=True)
class Family:
    """What `model_type` in config.json stands for: settings and tensors, in and out."""

    architecture: str
    """The class of transformers with the output matrix."""
    config: Callable[[Settings], GPTConfig]
    """Reads the settings; whatever we do not carry is refused."""
    settings: Callable[[GPTConfig], dict[str, Any]]
    """Writes them, all but type and tokens. What the family cannot say is lost: reading them tells."""
    rules: tuple[Rule, ...]
    """The first is the token embedding's, the last the output matrix's."""
    base: str = "model."
    """Prefix of all names but the output matrix's; files saved from the bare model lack it."""
    written_as: str = ""
    """The family's name in our files, where it is not this one's."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Beginnings of tensors' names in other versions of transformers, and ours."""
