"""The cost of a run: floating-point operations, their share of the machine's peak, energy and money.

A figure is absent when its basis is not known: the operations of a stage that does not count them, the watts
of a machine that does not measure them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from chatwright import runtime
from chatwright.model.gpt import GPT
from chatwright.trackers import Reporting

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the energy meters of processors (RAPL); often readable for root alone."""


def training_flop(model: GPT, length: float) -> float:
    """Floating-point operations to train on one sequence of `length` tokens, forward and backward.

    Per token 6 N + 12 L H Q T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): N parameters that are
    factors of a product, L layers, H heads of size Q, T = `length`. A multiplication and an addition count as
    two; the causal half of attention is counted whole, as in the paper, and so is what lies outside of a
    window, for it is computed and masked; what is computed twice (activation checkpointing) counts once.

    A frozen parameter has no gradient, which saves two of the six operations. Under an adapter the embedding
    tables are frozen as well.

    Departure: N leaves out tables that are only looked up: positions, and token embeddings that are not also
    the output matrix (a reward model's body has no output matrix).
    """
    looked_up = _looked_up(model)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return 3 * forward_flop(model, length) - 2.0 * length * max(0, frozen - looked_up)


def forward_flop(model: GPT, length: float) -> float:
    """Floating-point operations of a forward pass over one sequence of `length` tokens: a third of those to
    train on it with nothing frozen.

    Sampling it token by token with a cache takes the same number.
    """
    shape, products = model.config, model.parameter_count() - _looked_up(model)
    return float(length * (2 * products + 4 * shape.layers * shape.heads * shape.head_dim * length))


def _looked_up(model: GPT) -> int:
    """Number of parameters in tables that are only looked up, and are no factor of a product."""
    is_output = model.config.tied and isinstance(model.head, nn.Linear)
    tables = 0 if is_output else model.embed.weight.numel()
    return tables + (0 if model.positions is None else model.positions.weight.numel())


def iterations_spent(
    rows: Sequence[Mapping[str, Any]],
    prompt: float,
    *,
    read: Sequence[GPT],
    trained: Sequence[GPT],
    epochs: int,
    text: float = 0.0,
) -> dict[str, float]:
    """Tokens and operations of RL iterations, from the `rows` that they logged.

    `tokens` are those of the completions. For the operations, `prompt` is the mean length of a prompt. Each
    completion is sampled by the first model of `read` and passes forward through each of `read`. In
    iterations with an update each of `trained` trains on it `epochs` times. `text` is the operations of an
    iteration's updates on general text. Every completion counts with the mean length.
    """
    tokens = flop = 0.0
    for row in rows:
        said, mean = row.get("tokens") or 0.0, row.get("length") or 0.0
        answers, length = said / mean if mean else 0.0, prompt + mean
        tokens += said
        passes = [read[0], *read]
        flop += answers * sum(forward_flop(model, length) for model in passes)
        if "policy_loss" in row:
            flop += epochs * answers * sum(training_flop(model, length) for model in trained) + text
    return {"tokens": tokens, "flop": flop}


class EnergyMeter:
    """Joules that the machine's processors have used, by their own meters, which wrap around to 0."""

    def __init__(self, place: Path = POWERCAP) -> None:
        self.meters = {}
        for file in sorted(place.glob("*-rapl:[0-9]*/energy_uj")):
            if file.parent.name.count(":") == 1:  # a:0 is a whole package, a:0:1 a part of it
                with contextlib.suppress(OSError, ValueError):
                    self.meters[file] = int(file.read_text())

    def spent(self) -> float:
        """Joules since the last call, or since the meter was made; 0 where there are no meters."""
        joules = 0.0
        for file, before in self.meters.items():
            with contextlib.suppress(OSError, ValueError):
                now = int(file.read_text())
                turn = int((file.parent / "max_energy_range_uj").read_text()) if now < before else 0
                joules += (now - before + turn) / 1e6
                self.meters[file] = now
        return joules


def cost_row(
    reporting: Reporting,
    *,
    flop: float | None,
    elapsed: float,
    joules: float,
    rate: float | None = None,
    peak: float = 0.0,
) -> dict[str, float]:
    """The known cost figures for metrics.jsonl, after `flop` operations in `elapsed` seconds of training.

    `rate` is the operations per second of the last step, `peak` the machine's peak in matrix products
    (`runtime.matmul_peak`). Energy is the `watts` setting times seconds where it is set, else the meters'
    `joules`.
    """
    row: dict[str, float] = {}
    if flop is not None:
        row["flop"] = flop
        if rate is not None and peak > 0:
            row["mfu"] = rate / peak
    energy = reporting.watts * elapsed or joules
    if energy:
        row["energy_kwh"] = energy / 3.6e6
    if reporting.price:
        row["cost"] = reporting.price * elapsed / 3600
    return row


def peak_of(dtype: str) -> float:
    """FLOP/s of the matrix products of all processes together in the precision of training (a
    `fit.precision`)."""
    return runtime.matmul_peak(runtime.compute_dtype(dtype)) * runtime.world_size()
