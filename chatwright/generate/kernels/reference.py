"""What the kernels should compute, by plain torch: slow, and short enough to be believed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chatwright.generate.kernels import paths
from chatwright.generate.kernels.dots import GROUP, ROUNDS_BF16
from chatwright.generate.kernels.layout import DOWN, MATRICES, OUTPUT, QKV, UP
from chatwright.generate.kernels.packing import Packed, up_to
from chatwright.generate.kernels.products import BF16_WEIGHTS, FORMAT, INT8_WEIGHTS, WORD_LIMITS
from chatwright.generate.kernels.simd import LANES
from chatwright.model.cache import KVCache
from chatwright.model.gpt import GPT, Block


def rounded_activations(x: Tensor, kind: int, path: str) -> Tensor:
    """x as weights of a format take it on a path: for integers, whole numbers times a factor per group of 32
    of its last dimension."""
    if kind < INT8_WEIGHTS:
        return x.bfloat16().float() if kind == BF16_WEIGHTS and ROUNDS_BF16[paths.NAMES.index(path)] else x
    limit = WORD_LIMITS[1] if kind == INT8_WEIGHTS else WORD_LIMITS[0]
    width = x.shape[-1]
    padded = nn.functional.pad(x.float(), (0, up_to(width, GROUP) - width))
    groups = padded.view(*x.shape[:-1], -1, GROUP)
    top = groups.abs().amax(-1, keepdim=True)
    # torch writes 127 / top as 127 * (1 / top), which rounds twice: hence a tensor of 127.
    inverse = torch.where(top > 1e-30, torch.tensor(limit) / top, torch.zeros_like(top))
    rounded: Tensor = (groups * inverse).round() * (top / limit)
    return rounded.flatten(-2)[..., :width]


def _round_inputs(kind: int, path: str, heads: int = 1, scale: float = 1.0) -> Any:
    """For the output matrix of attention each head is padded to whole groups, so no group has parts of two
    heads. Inputs are multiplied by `scale` before they are rounded."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = (inputs[0] * scale).view(*inputs[0].shape[:-1], heads, -1)
        return (rounded_activations(parts, kind, path).flatten(-2),)

    return hook


def _restore(block: Block, matrices: list[Tensor]) -> None:
    """Give a block the weights that were packed: the inverse of packing.py's joining and padding."""
    attention, mlp = block.attention, block.mlp
    at = 0
    for part in (attention.query, attention.key, attention.value):
        part.weight.copy_(matrices[QKV][at : at + part.out_features, : part.in_features])
        at += part.out_features
    heads = matrices[OUTPUT].view(len(matrices[OUTPUT]), attention.heads, -1)
    attention.output.weight.copy_(heads[: attention.output.out_features, :, : attention.head_dim].flatten(1))
    if mlp.gate is None:
        mlp.up.weight.copy_(matrices[UP][: mlp.up.out_features, : mlp.up.in_features])
    else:
        pairs = matrices[UP].view(-1, 2, LANES, matrices[UP].shape[1])
        for number, part in enumerate((mlp.gate, mlp.up)):
            part.weight.copy_(pairs[:, number].flatten(0, 1)[: part.out_features, : part.in_features])
    mlp.down.weight.copy_(matrices[DOWN][: mlp.down.out_features, : mlp.down.in_features])


def _move_scales(plain: GPT) -> float:
    """Put the scales of branches and logits where packing.py has them; the one on the inputs of matrices that
    write to the residual stream is given back."""
    config, before = plain.config, plain.config.branch_norm == "before"
    plain.config = replace(config, logit_scale=1.0)
    _multiply(plain.final_norm, config.logit_scale)
    for block in plain.blocks:
        assert isinstance(block, Block)
        block.scale = 1.0
        for norm in (block.attention_out_norm, block.mlp_out_norm):
            _multiply(norm, config.residual_scale)  # there are none where they stand before
        for linear in (block.attention.output, block.mlp.down):
            if before and linear.bias is not None:
                linear.bias.mul_(config.residual_scale)
    return config.residual_scale if before else 1.0


def _multiply(norm: nn.Module, scale: float) -> None:
    for parameter in norm.parameters():
        parameter.mul_(scale)


@torch.no_grad()
def reference(model: GPT, packed: Packed, path: str) -> GPT:
    """A copy of the model with the packed weights read back, and the matrices' inputs rounded as the kernels'
    path does."""
    plain = copy.deepcopy(model).float().eval()
    kinds, scale = packed.plan[:, FORMAT], _move_scales(plain)
    for number, block in enumerate(plain.blocks):
        assert isinstance(block, Block)
        first = number * MATRICES
        _restore(block, [packed.matrix(first + which) for which in range(MATRICES)])
        for module in block.modules():
            if isinstance(module, nn.Linear):
                heads = block.attention.heads if module is block.attention.output else 1
                own = scale if module in (block.attention.output, block.mlp.down) else 1.0
                module.register_forward_pre_hook(_round_inputs(int(kinds[first]), path, heads, own))
    size, width, last = model.config.vocab_size, model.config.width, len(packed.plan) - 1
    plain.head.weight.copy_(packed.matrix(last - 1)[:size, :width])
    plain.embed.weight.copy_(packed.matrix(last)[:size, :width])  # the same once more, where they are one
    plain.head.register_forward_pre_hook(_round_inputs(int(kinds[last - 1]), path))
    return plain


@torch.no_grad()
def reference_logits(plain: GPT, ids: Tensor, dtype: str) -> Tensor:
    """(T,) ids -> (T, V) logits, keys and values held as the kernels hold them."""
    held = torch.float32 if dtype == "fp32" else torch.bfloat16
    cache = KVCache(plain.config, 1, len(ids), dtype=held)
    return plain(ids[None], cache=cache)[0]  # type: ignore[no-any-return]
