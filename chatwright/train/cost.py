"""What a run costs: floating-point operations, their share of what the machine can do, energy and money.

Nothing is invented: a figure whose basis is not known - the operations of a stage that does not count them,
the watts of a machine that does not measure them - is absent.
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
    two; the causal half of attention is counted whole, as in the paper; what is computed twice (activation
    checkpointing) counts once.

    A frozen parameter has no gradient, which is two of the six; under an adapter the looked-up tables are
    frozen as well.

    Departure: N leaves out tables that are only looked up in - positions, and token embeddings that are not
    the output matrix as well (a reward model's body has no output matrix).
    """
    looked_up = _looked_up(model)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return 3 * forward_flop(model, length) - 2.0 * length * max(0, frozen - looked_up)


def forward_flop(model: GPT, length: float) -> float:
    """Floating-point operations to read one sequence of `length` tokens: a third of training on it with
    nothing frozen.

    Sampling it token by token with a cache takes as many.
    """
    shape, products = model.config, model.parameter_count() - _looked_up(model)
    return float(length * (2 * products + 4 * shape.layers * shape.heads * shape.head_dim * length))


def _looked_up(model: GPT) -> int:
    """Parameters that are only looked up in, and no factor of a product."""
    is_output = model.config.tied and isinstance(model.head, nn.Linear)
    tables = 0 if is_output else model.embed.weight.numel()
    return tables + (0 if model.positions is None else model.positions.weight.numel())


def rounds_spent(
    rows: Sequence[Mapping[str, Any]],
    prompt: float,
    *,
    read: Sequence[GPT],
    trained: Sequence[GPT],
    epochs: int,
    text: float = 0.0,
) -> dict[str, float]:
    """Tokens and operations of rounds of sampling and learning, from the `rows` that they logged.

    `tokens` are those of answers. Operations: `prompt` tokens on average stand before an answer; each row is
    sampled by the first of `read`, read by each of them, and learnt from `epochs` times by `trained` in the
    rounds that had an update. `text` is what each update spends on general text. Products of an answer's
    length are taken at its mean.
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
    """Joules that the machine's processors have used, by their own meters; they stop at a maximum and begin
    at 0."""

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
    """The figures that can be known of `flop` operations so far in `elapsed` seconds of training, for
    metrics.jsonl.

    `rate` is the operations per second of the last step; `peak` what the machine's matrix products reach
    (`runtime.matmul_peak`). Energy: the `watts` setting times seconds where it is set, else the meters'
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
