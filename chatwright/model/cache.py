"""Keys and values of the tokens seen so far.

Each row has its own length and is stored from position 0 without gaps, so that rows of different lengths
share a batch without padding on the left. New tokens are written at `lengths[row]`; `lengths` then grows by
the number of real ones. Numbers beyond a row's length are left over from before, and no token attends to
them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatwright.config import UserError
from chatwright.model.config import GPTConfig


class Cache(Protocol):
    """What `GPT.hidden` needs of a cache: this file's, or one of pages (generate/torch_runner.py)."""

    lengths: Int[Tensor, " B"]
    """Tokens stored of each row."""
    longest: int
    """Tokens of the longest row. With the new tokens of a call they must fit into the context."""

    def extend(
        self, layer: int, keys: Float[Tensor, "B G T K"], values: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Store one layer's new keys and values; returns all of the rows, old and new."""
        ...

    def attention_mask(self, tokens: int, window: int = 0) -> Bool[Tensor, "B 1 T S"] | None:
        """What new tokens may attend to; None for plain causal attention among them. With a window, to the
        last `window` tokens, themselves included."""
        ...

    def advance(self, tokens: Tensor | int) -> None:
        """Count the new tokens as stored, after all layers have written."""
        ...


def stored_mask(columns: Int[Tensor, "B T"], span: int, window: int = 0) -> Bool[Tensor, "B 1 T S"]:
    """Which of `span` stored tokens a token at each of the columns may attend to: up to itself, and no
    further back than the window, if there is one."""
    stored = torch.arange(span, device=columns.device)[None, None, :]
    allowed = stored <= columns[:, :, None]
    if window:
        allowed &= stored > columns[:, :, None] - window
    return allowed[:, None]


class KVCache:
    """Room for `batch` rows of at most `capacity` tokens.

    `keys` and `values` are (layers, B, G, capacity, K); `lengths` is (B,) int64.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0  # max of lengths, kept beside it so that no step has to wait for the device

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys.shape[3]

    def _columns(self, tokens: int) -> Int[Tensor, "B T"]:
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def extend(
        self, layer: int, keys: Float[Tensor, "B G T K"], values: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Write one layer's new keys and values behind each row; returns all of them, S = longest + T.

        Padding on the right of a row is written too; the next call overwrites it. Raises UserError when full.
        """
        tokens = keys.shape[2]
        span = self.longest + tokens
        if span > self.capacity:
            raise UserError(f"the key-value cache is full: {span} tokens, room for {self.capacity}")
        index = self._columns(tokens)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys[layer].scatter_(2, index, keys.to(self.keys.dtype))
        self.values[layer].scatter_(2, index, values.to(self.values.dtype))
        return self.keys[layer, :, :, :span].to(keys.dtype), self.values[layer, :, :, :span].to(values.dtype)

    def attention_mask(self, tokens: int, window: int = 0) -> Bool[Tensor, "B 1 T S"]:
        """True where a new token may attend: to its own row, up to itself, and no further back than the
        window."""
        return stored_mask(self._columns(tokens), self.longest + tokens, window)

    def advance(self, tokens: Tensor | int) -> None:
        """Count `tokens` (a number, or one per row) as stored, after all layers have written."""
        self.lengths = self.lengths + tokens
        self.longest = int(self.lengths.max()) if isinstance(tokens, Tensor) else self.longest + tokens

    def select(self, rows: Int[Tensor, " N"]) -> None:
        """Keep, reorder or repeat rows: the new row i is the old row `rows[i]`."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.longest = int(self.lengths.max()) if len(rows) else 0

    def append(self, other: KVCache) -> None:
        """Add the rows of another cache below these; the larger capacity wins."""
        capacity = max(self.capacity, other.capacity)
        self.grow(capacity)
        other.grow(capacity)
        self.keys = torch.cat((self.keys, other.keys), dim=1)
        self.values = torch.cat((self.values, other.values), dim=1)
        self.lengths = torch.cat((self.lengths, other.lengths))
        self.longest = max(self.longest, other.longest)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens a row, if there is less."""
        more = capacity - self.capacity
        if more > 0:
            layers, batch, heads, _, size = self.keys.shape
            room = self.keys.new_zeros((layers, batch, heads, more, size))
            self.keys = torch.cat((self.keys, room), dim=3)
            self.values = torch.cat((self.values, room), dim=3)

    def crop(self, lengths: Int[Tensor, " B"]) -> None:
        """Forget what lies beyond `lengths`."""
        self.lengths = torch.minimum(self.lengths, lengths)
        self.longest = int(self.lengths.max()) if self.batch else 0
