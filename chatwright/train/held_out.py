"""How well a language model predicts held-out text: bits per byte."""

from __future__ import annotations

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.data.shards import TokenShards
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.objectives.language import bits_per_byte, next_token_loss


def held_out_rows(shape: GPTConfig) -> int:
    """Windows measured at once: few enough that their logits stay under 34 MB, at most 32."""
    return max(1, min(32, 2**23 // (shape.context * shape.vocab_size)))


def held_out_bits_per_byte(model: GPT, shards: TokenShards, *, context: int, dtype: torch.dtype) -> float:
    """Bits per byte of held-out text, over adjacent windows of `context` tokens. Each token is a target
    exactly once.

    The first target of a window is predicted from one token only, so that the result is a little above that
    of full context everywhere. End-of-text tokens count as targets, though they are no bytes of the text.
    """
    nats = 0.0
    rows: list[Tensor] = []
    with runtime.autocast(dtype):
        for stretch in shards.stretches(context):
            rows.append(stretch)
            if len(rows) == held_out_rows(model.config):
                nats += held_out_nats(model, rows)
                rows = []
        for row in rows:  # the last ones may be of any length
            nats += held_out_nats(model, [row])
    return bits_per_byte(nats, shards.text_bytes)


def held_out_nats(model: GPT, rows: list[Tensor]) -> float:
    """Loss of windows of tokens, summed over all targets, in nats."""
    if len({len(row) for row in rows}) > 1:
        return sum(held_out_nats(model, [row]) for row in rows)
    tokens = runtime.on_device(torch.stack(rows))
    return float(next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]))
