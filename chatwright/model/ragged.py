"""Rows of different lengths, computed without their padding.

Linear layers, norms and tables treat every token alone, so all real tokens of a batch can share one long row.
Only attention needs rows: there the tokens are padded for a moment. In a batch of answers a third to a half
of all tokens are padding; this saves their cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chatwright.model.attention import CausalAttention

BUCKETS_PER_DOUBLING = 8
"""Bucket sizes between a number and twice that number. A tensor of a new size in every step would fit into no
gap of the heap that earlier ones have left: the process would grow to twice what it uses. With 8 sizes at
most an eighth of the tokens is padding, a 24th on average. 16 sizes halve the padding but take a tenth more
memory."""
SMALLEST_BUCKET = 16
"""All bucket sizes are multiples of this: a matrix product of 17 rows takes as long as one of 32."""


def bucket_size(count: int) -> int:
    """The smallest bucket size that holds `count` tokens."""
    step = max(SMALLEST_BUCKET, (1 << count.bit_length()) // (2 * BUCKETS_PER_DOUBLING))
    return step * -(-count // step)


def pad_to_bucket(indices: Int[Tensor, " N"], value: int, *, limit: int | None = None) -> Int[Tensor, " M"]:
    """Indices, padded with `value` to their bucket size, but never beyond `limit`."""
    size = bucket_size(len(indices))
    return F.pad(indices, (0, min(size, size if limit is None else limit) - len(indices)), value=value)


def gather(x: Float[Tensor, "B T D"], indices: Int[Tensor, " M"]) -> Float[Tensor, "1 M D"]:
    """The tokens at these indices (row x T + column), as one row."""
    return x.flatten(0, 1).index_select(0, indices)[None]


@dataclass(frozen=True)
class Ragged:
    """Which N tokens of a padded batch of B rows and T columns are computed.

    Padding stands on the right of each row, where causal attention never looks.
    """

    indices: Int[Tensor, " N"]
    """Row x T + column of each real token. What pads N to a bucket size has index B x T, and is dropped."""
    rows: int
    """B."""
    width: int
    """T."""

    @classmethod
    def from_lengths(cls, lengths: Int[Tensor, " B"], width: int) -> Ragged:
        """Rows of `width` columns, of which the first `lengths` are real tokens."""
        real = torch.arange(width, device=lengths.device) < lengths[:, None]
        indices = real.flatten().nonzero()[:, 0]
        return cls(pad_to_bucket(indices, real.numel(), limit=real.numel()), len(lengths), width)

    @property
    def positions(self) -> Int[Tensor, "1 N"]:
        """Position of each token: its column."""
        return (self.indices % self.width)[None]

    def locate(self, indices: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
        """Where real tokens, given as row x T + column, stand among the N tokens."""
        return torch.searchsorted(self.indices, indices)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...): the real tokens as one row."""
        last = self.rows * self.width - 1
        return x.flatten(0, 1).index_select(0, self.indices.clamp(max=last))[None]

    def pad(self, x: Float[Tensor, "1 N D"]) -> Float[Tensor, "B T D"]:
        """The real tokens back in their rows; 0 at padding."""
        count = self.rows * self.width
        flat = x.new_zeros(count + 1, x.shape[2]).index_copy(0, self.indices, x[0])
        return flat[:count].view(self.rows, self.width, x.shape[2])

    def attention(
        self,
        q: Float[Tensor, "1 H N K"],
        k: Float[Tensor, "1 G N K"],
        v: Float[Tensor, "1 G N K"],
        kernel: CausalAttention,
        mask: Bool[Tensor, "1 1 T T"] | None = None,
    ) -> Float[Tensor, "1 H N K"]:
        """Causal attention within each row, computed by `kernel`. A mask is that of every row."""
        y = kernel(self._pad_heads(q), self._pad_heads(k), self._pad_heads(v), mask)  # (B, H, T, K)
        return self.unpad(y.transpose(1, 2)).transpose(1, 2)

    def _pad_heads(self, x: Float[Tensor, "1 H N K"]) -> Float[Tensor, "B H T K"]:
        _, heads, _, size = x.shape
        padded = self.pad(x.transpose(1, 2).flatten(2))
        return padded.view(self.rows, self.width, heads, size).transpose(1, 2)
