"""A linear layer that picks the fastest matrix library of the processor when no gradient is needed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatwright import runtime


class InferenceLinear(nn.Linear):
    """x W^T, for a large matrix without a bias: the output layer.

    Without gradients the product goes to the library that `runtime.product` chooses, which also depends on
    the machine. With gradients, and inside torch.compile, it is torch's own.
    """

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return runtime.product(x, self.weight)
