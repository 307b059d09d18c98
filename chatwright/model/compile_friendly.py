"""Forms of a model's parts that are fastest once torch.compile has compiled them for a CPU.

They compute the same as the forms in gpt.py, up to rounding, and are slower without the compiler. gpt.py
does not know them: `make_compile_friendly` puts them into a model from outside. What each of them
gains: docs/lab/performance.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatwright.model.attention import blocked_attention
from chatwright.model.gpt import GPT, MLP, gelu_tanh


def make_compile_friendly(model: GPT) -> None:
    """Put all forms of this file into a model, in place. Copies that are made later have them too."""
    model.use_attention(blocked_attention)
    use_sigmoid_gelu(model)
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.__class__ = RowAddingEmbedding  # in place: others may hold this module and its table


def use_sigmoid_gelu(model: nn.Module) -> None:
    """Let the MLPs that have the tanh form of GELU use `gelu_sigmoid` where they are compiled."""
    for module in model.modules():
        if isinstance(module, MLP) and module.activation is gelu_tanh:
            module.activation = _compiled_gelu


def gelu_sigmoid(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), as 1 + tanh u = 2 sigmoid(2 u).

    Equal to `gelu_tanh`. In compiled code for a CPU an exponential costs a third of a tanh.
    """
    y = x.float()
    return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


def _compiled_gelu(x: Tensor) -> Tensor:
    """`gelu_sigmoid` in compiled code only: elsewhere it is slower and keeps more for the backward pass."""
    return gelu_sigmoid(x) if torch.compiler.is_compiling() else gelu_tanh(x)


@torch.library.custom_op("chatwright::rows_added", mutates_args=())
def rows_added(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """(count, D) of zeros, to which each of the rows (N, D) is added at its id: the gradient of an embedding.

    As an operation of its own it stays whole in compiled code. The compiler would add number by number,
    atomically. torch's `embedding_dense_backward` is no faster than that on a CPU: 12 ms for 4,096 rows of
    384, where this takes 0.3 ms.
    """
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, ids, rows)


@rows_added.register_fake
def _(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    return rows.new_empty(count, rows.shape[1])


class _LookUp(torch.autograd.Function):
    """table[ids], with `rows_added` as its gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count = table.shape[0]
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.ops.chatwright.rows_added(gradient.flatten(0, -2), ids.flatten(), ctx.count), None


class RowAddingEmbedding(nn.Embedding):
    """A table whose gradient is made by `rows_added`."""

    def forward(self, input: Tensor) -> Tensor:
        return _LookUp.apply(self.weight, input)  # type: ignore[no-untyped-call, no-any-return]
