"""Products in bf16 with float32 weights, without casting every weight in every forward pass.

Under autocast each forward pass casts every matrix and each backward pass casts its gradient back. A
`WorkingCopy` casts the matrices once after they have changed, as in the first description of mixed-precision
training (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1): float32 master weights, a low-precision
copy to compute with, gradients accumulated in float32 on the masters.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from chatwright.model.gpt import GPT


class WorkingCopy:
    """A twin of `model` that computes with bf16 matrices; its gradients appear on `model`'s parameters.

    Norms, biases and the token and position tables are `model`'s own tensors: a table lookup is no product,
    and a float32 residual stream costs little. A tied head is copied like any matrix; its gradient and that
    of the table add up in the one master.
    """

    def __init__(self, model: GPT, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model
        self.twin = copy.deepcopy(model)
        self.masters: list[nn.Parameter] = []
        self.copies: list[nn.Parameter] = []
        self._cast: tuple[int, ...] = ()
        for name, module in model.named_modules():
            for key, master in module.named_parameters(recurse=False):
                twin = self.twin.get_submodule(name)
                if isinstance(module, nn.Linear) and master.ndim == 2:
                    low = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
                    if low.requires_grad:
                        low.register_post_accumulate_grad_hook(_onto(master))  # type: ignore[no-untyped-call]
                    setattr(twin, key, low)
                    self.masters.append(master)
                    self.copies.append(low)
                else:
                    setattr(twin, key, master)

    def refresh(self) -> None:
        """Cast the matrices again if they may have changed, and copy the model's mode. Call it before each
        use of `twin`.

        They may have changed in two cases. A gradient is None: a step ends with
        `zero_grad(set_to_none=True)`, as the Trainer does. Or a version counter differs, as after restoring a
        checkpoint. The counters alone do not suffice: the fused AdamW does not raise them.
        """
        versions = tuple(master._version for master in self.masters)
        begins = any(master.grad is None for master in self.masters if master.requires_grad)
        if begins or versions != self._cast:
            with torch.no_grad():
                torch._foreach_copy_(tuple(self.copies), tuple(self.masters))
            self._cast = versions
        if self.twin.training != self.model.training:
            self.twin.train(self.model.training)


class _onto:
    """Moves a copy's gradient onto its master, in float32: micro-batches add up without bf16 rounding."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, low: Tensor) -> None:
        gradient = low.grad
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad.add_(gradient)
        low.grad = None
