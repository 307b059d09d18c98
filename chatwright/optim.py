"""Optimisers and schedules: Muon for the blocks' matrices, AdamW for the rest; the learning rate as a pure
function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatwright import runtime
from chatwright.config import UsageError

Shape = Literal["constant", "linear", "cosine", "trapezoid"]


@dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the blocks' matrices and AdamW for embeddings, head and vectors. `adamw`: AdamW for
    all."""
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
    matrix_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Products inside Muon. `auto` is bf16 where the hardware computes it; its rounding, which Muon makes
    larger, is that of the order in which processes add their gradients: with fp32 their curves are those of
    one process."""
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
    """The learning-rate multiplier (1 at the peak) in step `step` of `steps`, counted from 0."""
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


# Four odd polynomials a x + b x^3 + c x^5, applied one after another to all singular values. Each is the best
# approximation of 1 on the interval that the one before leaves, starting from [0.005, 1]. This is the
# construction of Polar Express (Amsel et al. 2025, arXiv:2505.16932, algorithm 1), computed by linear
# programming. Singular values above 0.005 end within 9 % of 1. Muon's original five equal steps (Jordan et
# al. 2024) end within 32 % and cost a quarter more.
POLYNOMIALS = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
)

MARGIN = 1.02
"""Matrices are divided by their Frobenius norm, which no singular value exceeds, times this factor: the first
polynomial rises steeply beyond 1, and bf16 rounds by up to 0.4 %."""


def orthogonalise(
    matrices: Float[Tensor, "N rows columns"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "N rows columns"]:
    """Approximately the nearest semi-orthogonal matrix of each: U V^T of its singular value decomposition.
    Products are in `dtype`."""
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (MARGIN * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b g + c g^2) x
    result: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): orthogonalised momentum, which updates all directions of a matrix equally.

    torch.optim.Muon does one matrix at a time. Here matrices of one shape, transposed ones included, go
    through the polynomials as one batch: this makes it affordable for small models on a CPU.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[min(parameter.shape), max(parameter.shape)].append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)

    def _update(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of matrices that have the same shape up to transposition."""
        matrices = tuple(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, means, group["momentum"])
        wholes = [_whole(update) for update in nesterov]
        wide = torch.stack([update.mT if _is_tall(update) else update for update in wholes])
        updates = list(orthogonalise(wide, self.dtype))
        for number, parameter in enumerate(parameters):
            if _is_tall(parameter):
                # A tall matrix is scaled up: its update has fewer singular values for as many outputs.
                updates[number] = updates[number].mT * (parameter.shape[0] / parameter.shape[1]) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        updates = [_part_of(update, parameter) for update, parameter in zip(updates, parameters, strict=True)]
        torch._foreach_add_(matrices, updates, alpha=-group["lr"])


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _whole(matrix: Tensor) -> Tensor:
    """The whole of a sharded matrix (a DTensor): singular values need the whole.

    Every process thus orthogonalises every matrix, which is simple and exact; momentum stays sharded.
    """
    return matrix.full_tensor() if hasattr(matrix, "full_tensor") else matrix  # type: ignore[no-any-return]


def _part_of(matrix: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a matrix, sharded like `parameter`; every process has the same whole matrix."""
    if not hasattr(parameter, "device_mesh"):
        return matrix
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(matrix, parameter.device_mesh, parameter.placements, src_data_rank=None)


def build(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a model's trainable parameters. Each group has its peak in `peak_lr`."""
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
        dtype = runtime.compute_dtype(config.matrix_precision)
        optimisers.append(
            Muon(hidden, config.matrix_learning_rate, config.momentum, config.weight_decay, dtype)
        )
    else:
        groups.append({"params": hidden, "weight_decay": config.weight_decay})
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    optimisers.append(
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)
    )
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


def set_learning_rate(optimisers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to its peak times `share`, the learning-rate multiplier."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = share * group["peak_lr"]
