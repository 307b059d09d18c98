"""Rows of different lengths without their padding: everything but attention works on the real tokens alone, side by side.

A linear layer, a norm or a table does not care which row a token stands in, so that padding costs nothing there; only for attention
the tokens go back to their rows for a moment. Answers to questions fill half to two thirds of their padded rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chatwright.model.attention import CausalAttention

SIZES = 8
"""Different numbers of tokens that are computed between a number and twice that number: tensors of a new size in every step would fit
into no hole that the ones before have left, and the process would grow to twice what it uses. Fillers are an eighth of the tokens at
most, on average a 24th. 16 sizes spare half of those, and take a tenth more memory."""
LEAST = 16
"""Numbers of tokens are multiples of this: a matrix product of 17 rows takes what one of 32 takes."""


def one_of_few(count: int) -> int:
    """The next of those numbers."""
    step = max(LEAST, (1 << count.bit_length()) // (2 * SIZES))
    return step * -(-count // step)


def filled_up(places: Int[Tensor, " N"], filler: int, *, most: int | None = None) -> Int[Tensor, " M"]:
    """Places followed by fillers, up to one of few sizes, to `most` at most."""
    size = one_of_few(len(places))
    return F.pad(places, (0, min(size, size if most is None else most) - len(places)), value=filler)


@dataclass(frozen=True)
class Ragged:
    """Where the N tokens that are computed stand in B rows of T places. Padding is on the right, where no real token can see it."""

    places: Int[Tensor, " N"]
    """Row x T + column of each real token; those that fill N up are at B x T, a place that is thrown away."""
    rows: int
    width: int

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], width: int) -> Ragged:
        """Rows of `width` places whose first `lengths` are real."""
        real = torch.arange(width, device=lengths.device) < lengths[:, None]
        places = real.flatten().nonzero()[:, 0]
        return cls(filled_up(places, real.numel(), most=real.numel()), len(lengths), width)

    @property
    def columns(self) -> Int[Tensor, "1 N"]:
        """The column of each token."""
        return (self.places % self.width)[None]

    @staticmethod
    def chosen(places: Int[Tensor, " M"]) -> Int[Tensor, " S"]:
        """Places that are computed alone, with fillers."""
        return filled_up(places, 0)

    def found(self, places: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
        """Which of the N tokens stand at these places, each row x T + column."""
        return torch.searchsorted(self.places, places)

    def taken(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...): the tokens side by side."""
        last = self.rows * self.width - 1
        return x.flatten(0, 1).index_select(0, self.places.clamp(max=last))[None]

    def put_back(self, x: Float[Tensor, "1 N D"]) -> Float[Tensor, "B T D"]:
        """The real tokens in their rows; 0 at padding."""
        count = self.rows * self.width
        flat = x.new_zeros(count + 1, x.shape[2]).index_copy(0, self.places, x[0])
        return flat[:count].view(self.rows, self.width, x.shape[2])

    def attention(
        self,
        q: Float[Tensor, "1 H N K"],
        k: Float[Tensor, "1 G N K"],
        v: Float[Tensor, "1 G N K"],
        causal: CausalAttention,
    ) -> Float[Tensor, "1 H N K"]:
        """Causal attention of each row for itself."""
        y = causal(*(self._in_rows(x) for x in (q, k, v)))  # (B, H, T, K)
        return self.taken(y.transpose(1, 2)).transpose(1, 2)

    def _in_rows(self, x: Float[Tensor, "1 H N K"]) -> Float[Tensor, "B H T K"]:
        _, heads, _, size = x.shape
        return (
            self.put_back(x.transpose(1, 2).flatten(2))
            .view(self.rows, self.width, heads, size)
            .transpose(1, 2)
        )
