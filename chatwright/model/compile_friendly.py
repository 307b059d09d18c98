"""Forms of a model's parts that are fastest once torch.compile has compiled them for a CPU.

They compute the same as the forms in gpt.py, up to rounding, and are slower without the compiler. gpt.py does
not know them: `make_compile_friendly` puts them into a model from outside. What each of them gains:
docs/performance.md.
"""

from __future__ import annotations

import math
from types import MethodType
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
        if isinstance(module, nn.Embedding):  # a bound method: a deep copy looks up its own table
            module.forward = MethodType(_look_up, module)  # type: ignore[method-assign]


def use_sigmoid_gelu(model: nn.Module) -> None:
    """Let the MLPs that have the tanh form of GELU use `gelu_sigmoid` where they are compiled."""
    for module in model.modules():
        if isinstance(module, MLP) and module.activation is gelu_tanh:
            module.activation = _compiled_gelu


def gelu_sigmoid(x: Tensor) -> Tensor:
    """The tanh form of GELU, with (1 + tanh u) / 2 = sigmoid(2 u).  Hendrycks and Gimpel 2016,
    arXiv:1606.08415.

    Equal to `F.gelu(x, approximate="tanh")`. In compiled code for a CPU an exponential costs a third of a
    tanh.
    """
    y = x.float()
    return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


def _compiled_gelu(x: Tensor) -> Tensor:
    """Not compiled, `gelu_sigmoid` is slower than torch's own and keeps more tensors for the backward
    pass."""
    return gelu_sigmoid(x) if torch.compiler.is_compiling() else gelu_tanh(x)


@torch.library.custom_op("chatwright::rows_added", mutates_args=())
def rows_added(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """The gradient of a table that was looked up: rows (N, D), each added to the row `ids` (N) of a (count,
    D) of zeros.

    As an operation of its own it stays whole in compiled code. The compiler would add number by number,
    atomically, and torch's `embedding_dense_backward` is no faster on a CPU (4,096 rows of 384: 12 ms; this:
    0.3 ms).
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


def _look_up(table: nn.Embedding, ids: Tensor) -> Tensor:
    """The forward pass of an embedding."""
    return _LookUp.apply(table.weight, ids)  # type: ignore[no-untyped-call, no-any-return]
