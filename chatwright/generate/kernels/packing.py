"""Weights as the kernels read them: one block of memory, tiles of sixteen outputs in the order of use.

    fp32   [tile][input][16 outputs]
    bf16   [tile][pair of inputs][16 outputs][2]
    int8   [tile][group of 32 inputs][8 words][16 outputs][4], and one bfloat16 scale per group and output
    int4   [tile][group][4][16 outputs][4 inputs]: word j in the low bits, word j + 4 in the high; a scale and
           a least value

An int8 weight is scale * q, q from -127 to 127; an int4 one is least + scale * q, q from 0 to 15. Scales and
least values are rounded to bfloat16 before the weights are divided by them, so that little is lost by it.
With int4 the output matrix is int8: in SmolLM2 4 bits harm this matrix alone (docs/lab/performance.md).
`Packed.matrix` reads the packed bytes back: the plain reference of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chatwright.config import UserError
from chatwright.generate.kernels.dots import GROUP
from chatwright.generate.kernels.layout import BLOCK_COLUMNS
from chatwright.generate.kernels.products import (
    ADDS,
    BF16_WEIGHTS,
    BIAS,
    F32_WEIGHTS,
    FORMAT,
    GROUPS,
    INT4_WEIGHTS,
    INT8_WEIGHTS,
    PLAN_COLUMNS,
    SCALES,
    TILES,
    TOGETHER,
    WEIGHTS,
)
from chatwright.generate.kernels.simd import LANES
from chatwright.generate.shapes import unsupported
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT, Attention, Block
from chatwright.model.lora import plain

Dtype = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: dict[str, int] = {
    "fp32": F32_WEIGHTS,
    "bf16": BF16_WEIGHTS,
    "int8": INT8_WEIGHTS,
    "int4": INT4_WEIGHTS,
}
BYTES_PER_GROUP = {F32_WEIGHTS: 2048, BF16_WEIGHTS: 1024, INT8_WEIGHTS: 512, INT4_WEIGHTS: 256}
"""Of one tile: 32 inputs times 16 outputs."""
HUGE_PAGE = 2 << 20


def up_to(size: int, multiple: int) -> int:
    """The next multiple that holds `size`."""
    return -(-size // multiple) * multiple


def on_boundary(size: int, boundary: int = 64) -> np.ndarray:
    """`size` bytes, not yet written, that begin at a multiple of `boundary`: a vector that lies across two
    cache lines costs two reads."""
    room = np.empty(size + boundary, dtype=np.uint8)
    start = -room.ctypes.data % boundary
    return room[start : start + size]


def quantised8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, inputs), inputs a multiple of 32 -> whole numbers and scales, (rows, groups, 32) and (rows,
    groups, 1)."""
    groups = weights.view(weights.shape[0], -1, GROUP)
    scale = _bf16(groups.abs().amax(-1, keepdim=True) / 127)
    # Rounded down, a scale would push the largest weight beyond 127: it is held there.
    return (groups / scale.clamp(min=1e-30)).round().clamp(-127, 127), scale


def quantised4(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, inputs) -> whole numbers 0 to 15, scales and least values.

    The range is the group's own or one drawn in from both ends, whichever leaves the smallest squared error.
    """
    groups = weights.view(weights.shape[0], -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best: tuple[Tensor, ...] | None = None
    for share in (1.0, 0.93, 0.86, 0.79):
        cut = (high - low) * (1 - share) / 2
        scale, least = _bf16((high - low - 2 * cut) / 15).clamp(min=1e-30), _bf16(low + cut)
        whole = ((groups - least) / scale).round().clamp(0, 15)
        error = (torch.addcmul(least, whole, scale) - groups).square().sum(-1, keepdim=True)
        found = (error, whole, scale, least)
        best = (
            found
            if best is None
            else tuple(torch.where(error < best[0], new, old) for new, old in zip(found, best, strict=True))
        )
    assert best is not None
    return best[1], best[2], best[3]


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@dataclass
class Packed:
    """A model's weights in the arena, and where each lies."""

    config: GPTConfig
    arena: np.ndarray[tuple[int], np.dtype[np.uint8]]
    plan: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """A row per matrix (see products.py): QKV, OUTPUT, UP, DOWN of each layer, then the output matrix and the
    token table."""
    vectors: np.ndarray[tuple[int], np.dtype[np.float32]]
    """Norm weights and biases."""
    blocks: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """A row per block and one behind them (see layout.py): places of norm vectors in `vectors`, window,
    angles."""
    positions: int
    """Place of the (context, D rounded up to 32) position table in `vectors`; -1 without one."""

    def matrix(self, number: int) -> Tensor:
        """A matrix of the plan as float32 (rows, inputs), padding included, out of the packed bytes."""
        kind, weights, scales, _, tiles, groups, *_ = (int(value) for value in self.plan[number])
        size = tiles * groups * BYTES_PER_GROUP[kind]
        data = torch.from_numpy(self.arena[weights : weights + size])
        shape = (tiles * LANES, groups * GROUP)
        if kind == F32_WEIGHTS:
            return data.view(torch.float32).view(tiles, -1, LANES).transpose(1, 2).reshape(shape)
        if kind == BF16_WEIGHTS:
            return data.view(torch.bfloat16).view(tiles, -1, LANES, 2).transpose(1, 2).float().reshape(shape)
        if kind == INT8_WEIGHTS:
            whole = data.view(torch.int8).view(tiles, groups, 8, LANES, 4).float()
        else:
            nibbles = data.view(tiles, groups, 4, LANES, 4)
            whole = torch.cat((nibbles & 15, nibbles >> 4), dim=2).float()
        each = 1 if kind == INT8_WEIGHTS else 2
        bits = torch.from_numpy(self.arena[scales : scales + tiles * groups * each * LANES * 2]).view(
            torch.bfloat16
        )
        scale = (
            bits.view(tiles, groups, each, LANES, 1).float().transpose(1, 3)
        )  # (tiles, 16, each, groups, 1)
        values = whole.permute(0, 3, 1, 2, 4).flatten(3) * scale[:, :, 0]
        return (values if each == 1 else values + scale[:, :, 1]).reshape(shape)

    def weight_bytes(self) -> int:
        """Bytes that one token's forward pass reads."""
        read = self.plan[:-1]  # of the token table only a row
        sizes = {
            F32_WEIGHTS: 0,
            BF16_WEIGHTS: 0,
            INT8_WEIGHTS: 2 * LANES,
            INT4_WEIGHTS: 4 * LANES,
        }  # of scales
        return sum(
            int(row[TILES] * row[GROUPS]) * (BYTES_PER_GROUP[int(row[FORMAT])] + sizes[int(row[FORMAT])])
            for row in read
        )


class _Packer:
    """Writes matrices one behind the other, to the order of use."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0
        self.plan: list[list[int]] = []
        self.vectors: list[Tensor] = []
        self.vector_size = 0

    def _append(self, tensor: Tensor) -> int:
        data = tensor.contiguous().view(torch.uint8).flatten().numpy()
        place = self.size
        self.parts.append(data)
        self.size += up_to(data.nbytes, 64)
        return place

    def vector(self, *tensors: Tensor) -> int:
        """Vectors, each rounded up to 16 numbers, one behind the other; the place of the first."""
        place = self.vector_size
        for tensor in tensors:
            padded = torch.zeros(up_to(tensor.numel(), LANES))
            padded[: tensor.numel()] = tensor.detach().float()
            self.vectors.append(padded)
            self.vector_size += padded.numel()
        return place

    def matrix(
        self, weights: Tensor, bias: Tensor | None, dtype: str, *, together: int = 1, adds: bool = False
    ) -> None:
        """(outputs, inputs) into tiles, padded with zeros to whole tiles and groups. `together`, `adds`: see
        the plan."""
        outputs, inputs = weights.shape
        whole = torch.zeros(up_to(outputs, LANES), up_to(inputs, GROUP))
        whole[:outputs, :inputs] = weights.detach().float()
        tiles, groups = whole.shape[0] // LANES, whole.shape[1] // GROUP
        kind, row = FORMATS[dtype], [0] * PLAN_COLUMNS
        scales: list[Tensor] = []
        if kind == F32_WEIGHTS:
            packed = whole.view(tiles, LANES, -1).transpose(1, 2)
        elif kind == BF16_WEIGHTS:
            packed = whole.bfloat16().view(tiles, LANES, -1, 2).transpose(1, 2)
        else:
            numbers, *scales = quantised8(whole) if kind == INT8_WEIGHTS else quantised4(whole)
            packed = numbers.view(tiles, LANES, groups, 8, 4).permute(0, 2, 3, 1, 4)
            if kind == INT8_WEIGHTS:
                packed = packed.to(torch.int8)
            else:
                low, high = packed.to(torch.uint8).chunk(2, dim=2)
                packed = low | high << 4
        row[FORMAT], row[TILES], row[GROUPS], row[TOGETHER], row[ADDS] = kind, tiles, groups, together, adds
        row[WEIGHTS] = self._append(packed)
        if scales:
            both = torch.cat(scales, dim=-1).bfloat16()  # (outputs, groups, 1 or 2)
            row[SCALES] = self._append(both.view(tiles, LANES, groups, -1).permute(0, 2, 3, 1))
        row[BIAS] = self.vector(bias) if bias is not None else -1
        self.plan.append(row)

    def arena(self) -> np.ndarray:
        """Everything in one block that begins on a huge page, where the system has them."""
        block = on_boundary(self.size, HUGE_PAGE)
        place = 0
        while self.parts:  # handed over one by one: never much more than one copy in memory
            part = self.parts.pop(0)
            block[place : place + part.nbytes] = part
            place += up_to(part.nbytes, 64)
        return block


def _joined(attention: Attention) -> tuple[Tensor, Tensor | None]:
    """Query, key and value as one matrix."""
    parts = (attention.query, attention.key, attention.value)
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    weights: list[Tensor] = [part.weight for part in parts]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _output(attention: Attention) -> Tensor:
    """The output matrix for heads that are each padded to a multiple of 32 features."""
    weight = attention.output.weight.detach()
    heads = weight.view(weight.shape[0], attention.heads, attention.head_dim)
    padded = weight.new_zeros(weight.shape[0], attention.heads, up_to(attention.head_dim, GROUP))
    padded[..., : attention.head_dim] = heads
    return padded.flatten(1)


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Tiles of the gate and of the up matrix in turn: outputs padded to whole tiles."""
    rows = up_to(gate.shape[0], LANES)
    both = gate.new_zeros(rows // LANES, 2, LANES, gate.shape[1])
    for number, matrix in enumerate((gate, up)):
        padded = gate.new_zeros(rows, gate.shape[1])
        padded[: gate.shape[0]] = matrix
        both[:, number] = padded.view(-1, LANES, gate.shape[1])
    return both.flatten(0, 2)


def _norm_place(packer: _Packer, norm: torch.nn.Module | None, scale: float = 1.0) -> int:
    """Where a norm lies, its output times `scale`; -1 for none."""
    if norm is None or isinstance(norm, torch.nn.Identity):
        return -1
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    parts = (weight, bias) if isinstance(bias, Tensor) else (weight,)
    return packer.vector(*(part.detach().float() * scale for part in parts))


def _angle_table(config: GPTConfig, layer: int) -> int:
    """Which table of rotary angles a layer uses (`GPT.angles`): -1 for none."""
    if not config.is_rotated(layer):
        return -1
    return int(bool(config.window(layer) and config.window_rope_base))


def _pack_block(packer: _Packer, model: GPT, layer: int, dtype: str) -> list[int]:
    """The four matrices of a block; its row of the table.

    The factor on what a branch adds to the residual stream stands in the norm behind it. Where there is none,
    the kernels multiply the matrix's input by it (layout.py), and here the bias: matrices stay as they are,
    or their rounding would be another one.
    """
    config, block = model.config, model.blocks[layer]
    assert isinstance(block, Block)
    attention, mlp, scale = block.attention, block.mlp, config.residual_scale
    adds = config.branch_norm == "before"

    def bias_of(linear: torch.nn.Linear) -> Tensor | None:
        found: Tensor | None = linear.bias
        return found if found is None or not adds else found.detach() * scale

    packer.matrix(*_joined(attention), dtype)
    packer.matrix(_output(attention), bias_of(attention.output), dtype, adds=adds)
    if mlp.gate is None:
        packer.matrix(mlp.up.weight, mlp.up.bias, dtype)
    else:
        bias = None
        if mlp.up.bias is not None:
            bias = _interleaved(mlp.gate.bias[:, None], mlp.up.bias[:, None])[:, 0]
        packer.matrix(_interleaved(mlp.gate.weight, mlp.up.weight), bias, dtype, together=2)
    packer.matrix(mlp.down.weight, bias_of(mlp.down), dtype, adds=adds)
    norms = (block.attention_norm, block.mlp_norm, attention.query_norm, attention.key_norm)
    return [
        *(_norm_place(packer, norm) for norm in norms),
        _norm_place(packer, block.attention_out_norm, scale),
        _norm_place(packer, block.mlp_out_norm, scale),
        config.window(layer),
        _angle_table(config, layer),
    ]


@torch.no_grad()
def pack(model: GPT, dtype: str) -> Packed:
    """A model's weights for the kernels. Raises UserError for a shape that they cannot run, or an unknown
    dtype."""
    if dtype not in FORMATS:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(FORMATS)}")
    reason = unsupported(model.config)
    if reason:
        raise UserError(f"the CPU kernels cannot run a model with {reason}")
    model = plain(model)  # what is read here are matrices, not what layers compute
    packer = _Packer()
    config = model.config
    blocks = [_pack_block(packer, model, layer, dtype) for layer in range(config.layers)]
    packer.matrix(model.head.weight, None, "int8" if dtype == "int4" else dtype)
    if config.tied:
        packer.plan.append(packer.plan[-1])
    else:
        packer.matrix(model.embed.weight, None, "fp32" if dtype == "fp32" else "bf16")
    final = _norm_place(packer, model.final_norm, config.logit_scale)
    blocks.append([final, *[-1] * (BLOCK_COLUMNS - 1)])
    positions = -1
    if model.positions is not None:
        table = model.positions.weight
        positions = packer.vector(
            torch.nn.functional.pad(table, (0, up_to(table.shape[1], GROUP) - table.shape[1])).flatten()
        )
    return Packed(
        config,
        packer.arena(),
        np.array(packer.plan, dtype=np.int64),
        torch.cat([*packer.vectors, torch.zeros(LANES)]).numpy(),
        np.array(blocks, dtype=np.int64),
        positions,
    )
