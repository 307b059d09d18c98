"""Optimisers and schedules: Muon for the hidden matrices, AdamW for everything else, lr(step) as a pure function."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatwright.config import UsageError

Shape = Literal["constant", "linear", "cosine", "trapezoid"]


@dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the blocks' matrices and AdamW for embeddings, head and vectors. `adamw`: AdamW for all."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.03
    """Peak learning rate of Muon (only with `muon`)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; embeddings, norms and biases have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum."""
    schedule: Shape = "linear"
    """After warm-up: constant, linear or cosine to `final`, or constant with a linear end (`trapezoid`)."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.4
    """Share of the steps over which `trapezoid` falls."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate in step `step` of `steps` (from 0)."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "constant":
        left = 1.0
    elif config.schedule == "linear":
        left = 1.0 - progress
    elif config.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "trapezoid":
        left = min(1.0, (1.0 - progress) / max(config.decay, 1e-9))
    else:
        raise UsageError(f"schedule {config.schedule!r} is none of constant, linear, cosine, trapezoid")
    return config.final + (1.0 - config.final) * left


# Coefficients of the five steps, found by Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): a steep
# polynomial that brings every singular value into [0.7, 1.2], which is near enough to 1 for an update.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Float[Tensor, "N rows columns"], steps: int = 5) -> Float[Tensor, "N rows columns"]:
    """The nearest semi-orthogonal matrix of each, roughly: U V^T of its singular value decomposition, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b g + c g^2) x
    result: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): every direction of a matrix is updated by the same amount.

    torch.optim.Muon does one matrix at a time; here matrices of one shape go through Newton-Schulz as one batch, which
    is what makes it affordable for small models on a CPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[min(parameter.shape), max(parameter.shape)].append(parameter)
            for parameters in shapes.values():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    gradient = parameter.grad
                    assert gradient is not None
                    mean = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    update = torch.lerp(gradient, mean, group["momentum"])  # Nesterov
                    updates.append(update.mT if _is_tall(update) else update)
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                    parameter.add_(update.mT if _is_tall(parameter) else update, alpha=-scale)


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def build(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a model's trainable parameters. Each group remembers its peak in `peak_lr`."""
    hidden, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "blocks." in name:
            hidden.append(parameter)
        else:
            tables.append(parameter)
    optimisers: list[torch.optim.Optimizer] = []
    groups = [{"params": tables + vectors, "weight_decay": 0.0}]
    if config.name == "muon":
        optimisers.append(Muon(hidden, config.matrix_learning_rate, config.momentum, config.weight_decay))
    else:
        groups.append({"params": hidden, "weight_decay": config.weight_decay})
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    optimisers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


def set_learning_rate(optimisers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to `share` of its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = share * group["peak_lr"]
