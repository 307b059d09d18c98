"""The interface between the engine and the code that computes: tokens and pages in, logits out.

Keys and values lie in pages of a few tokens each, one pool per engine. The scheduler (scheduler.py) decides
which sequence has which page, and pages.py counts the users. A runner has the memory and computes. One runner
uses torch, on any device and for every shape (torch_runner.py), another compiled CPU kernels (kernels/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright.model.config import GPTConfig


@dataclass(frozen=True)
class Feed:
    """New tokens of one sequence."""

    ids: Sequence[int]
    """At least one; they follow the `start` tokens that the pages hold already."""
    start: int
    """Tokens of the sequence whose keys and values are stored."""
    pages: Sequence[int]
    """The sequence's pages in order: position p lies in pages[p // size]. Room for start + len(ids) tokens.
    """
    wanted: int = 1
    """Number of the last new tokens after which logits are needed; 0 in the middle of a prompt."""


class Runner(Protocol):
    """A model that computes with paged keys and values."""

    config: GPTConfig
    own_threads: bool
    """Whether it computes in its own threads: torch's must then not spin beside them (runtime.one_thread)."""

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        ...

    def token_bytes(self) -> int:
        """Bytes that the keys and values of one token take in all layers."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of the runner's own copies of weights, beside the model's parameters."""
        ...

    def allocate(self, pages: int, size: int) -> None:
        """Make room for `pages` pages of `size` tokens; called once, before anything else."""
        ...

    def forward(self, feeds: Sequence[Feed]) -> Float[Tensor, "wanted vocab"]:
        """Store the keys and values of all new tokens; returns float32 logits, one row per wanted token, in
        the feeds' order."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` a copy of page `source`, in all layers."""
        ...
