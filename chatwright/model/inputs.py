"""What the blocks of a decoder are given beside the hidden states: positions, masks, the key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from chatwright.model.cache import Cache
from chatwright.model.config import GPTConfig
from chatwright.model.ragged import Ragged


class AttentionInput(NamedTuple):
    """The one argument that travels beside the hidden states through `GPT`, `Block` and `Attention`.

    Another kind of attention adds a field here, and no signature changes. It is a tuple so that torch.compile
    and FSDP find the tensors in it.
    """

    positions: Int[Tensor, "B T"]
    """Position of each token in its sequence."""
    angles: tuple[Tensor, ...] | None = None
    """Cosine and sine of the rotary positions, (B, 1, T, R / 2) each; None for other kinds of positions, and
    for blocks that do not rotate. Before they are given to single blocks, those of layers with a window may
    stand behind them (`GPT.angles`)."""
    mask: Bool[Tensor, "B 1 T S"] | None = None
    """True where a token may attend to another. None: to itself and to all earlier ones."""
    ragged: Ragged | None = None
    """Rows without padding: all tokens stand in one row, but attention stays within each row of the batch."""
    cache: Cache | None = None
    """Keys and values of earlier calls; those of this call are appended."""
    layer: int = 0
    """Number of the block, for the cache."""
    output_indices: Int[Tensor, " M"] | None = None
    """Row x T + column of the tokens whose output is computed; None: all. All tokens give keys and values."""


def attention_input(
    ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    positions: Int[Tensor, "B T"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    cache: Cache | None = None,
    angles: tuple[Tensor, ...] | None = None,
) -> AttentionInput:
    """What the arguments of `GPT.hidden` say. Raises ValueError for `lengths` together with another one."""
    if lengths is not None:
        if any(given is not None for given in (mask, positions, documents, cache, angles)):
            raise ValueError("lengths goes with none of mask, positions, documents, cache, angles")
        ragged = Ragged.from_lengths(lengths, ids.shape[1])
        return AttentionInput(ragged.positions, ragged=ragged)
    if positions is None:
        positions = token_positions(ids, mask, cache.lengths if cache is not None else None)
    return AttentionInput(positions, angles, attention_mask(ids, mask, documents, cache), cache=cache)


def block_inputs(inputs: AttentionInput, config: GPTConfig) -> list[AttentionInput]:
    """What each block is given: its number, its mask, its angles. Only the last has output indices, for all
    others compute every token."""
    masks = {window: window_mask(inputs, window) for window in dict.fromkeys((0, *config.windows))}
    found = []
    for layer in range(config.layers):
        window, angles = config.window(layer), inputs.angles
        if angles is not None:
            angles = angles[-2:] if window else angles[:2]
        found.append(
            inputs._replace(
                layer=layer,
                mask=masks[window],
                angles=angles if config.is_rotated(layer) else None,
                output_indices=inputs.output_indices if layer == config.layers - 1 else None,
            )
        )
    return found


def window_mask(inputs: AttentionInput, window: int) -> Bool[Tensor, "B 1 T S"] | None:
    """Which token may attend to which in layers with this window (0: they have none). None: to itself and to
    all earlier ones. A text's tokens, or those of a packed document, stand side by side: columns count
    them."""
    if not window:
        return inputs.mask
    tokens = inputs.positions.shape[1] if inputs.ragged is None else inputs.ragged.width
    if inputs.cache is not None:
        return inputs.cache.attention_mask(tokens, window)
    if tokens <= window:
        return inputs.mask
    near = torch.ones(tokens, tokens, dtype=torch.bool, device=inputs.positions.device)
    near = near.tril().triu(1 - window)[None, None]  # (1, 1, T, T)
    return near if inputs.mask is None else inputs.mask & near


def token_positions(
    ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None, start: Int[Tensor, " B"] | None
) -> Int[Tensor, "B T"]:
    """Position of each token: the number of real tokens before it, `start` tokens of the cache included."""
    if mask is None:
        count = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    else:
        count = (mask.long().cumsum(1) - 1).clamp(min=0)
    return count if start is None else count + start[:, None]


def attention_mask(
    ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | None,
    documents: Int[Tensor, "B T"] | None,
    cache: Cache | None,
) -> Bool[Tensor, "B 1 T S"] | None:
    """Which token may attend to which, or None: to itself and to all earlier ones. Arguments as
    `GPT.hidden`'s.

    Every token may attend to itself, padding too: the softmax of a row without any True would be NaN.
    """
    if cache is not None:
        return cache.attention_mask(ids.shape[1])
    if mask is None and documents is None:
        return None
    tokens = ids.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()[None]
    if mask is not None:
        allowed = allowed & mask[:, None, :]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    return (allowed | torch.eye(tokens, dtype=torch.bool, device=ids.device))[:, None]
