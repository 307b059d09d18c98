"""The order of samples: a function of (seed, global index), whatever the batch size or number of processes.

The state of a loader is one integer, the number of samples consumed. Samples are taken in passes over the
data, each in another random order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from chatwright import runtime
from chatwright.config import UserError


class SampleOrder:
    """The endless order in which `size` samples are visited."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UserError("there are no training samples; is the data smaller than one context window?")
        self.size, self.seed = size, seed

    def __getitem__(self, index: int) -> int:
        """The sample at global position `index` >= 0."""
        epoch, place = divmod(index, self.size)
        return int(_permutation(self.size, self.seed, epoch)[place])

    def take(self, start: int, count: int) -> list[int]:
        """Samples start ... start + count - 1. Several processes take adjacent ranges (`train/loop.py`)."""
        return [self[index] for index in range(start, start + count)]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Int[Tensor, " size"]:
    return torch.randperm(size, generator=runtime.generator("order", seed, epoch))


WIDTH_STEP = 16
"""Widths of padded batches are multiples of this: the matrix library prepares a kernel for every new shape,
which takes longer than a small product."""


def pad(rows: list[list[int]], value: int, *, multiple: int = 1) -> Int[Tensor, "rows time"]:
    """Rows of unequal length as one tensor, padded on the right to the longest, or to the next multiple of
    `multiple`."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
