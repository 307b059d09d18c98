"""Predict the time of an optimiser step: each kind of operation in it is timed on this machine.

The dry run gives the operations of a step, their shapes, and how often each occurs. The time of the step is
the sum of count x time over the kinds. For a model of any number of layers this costs the time of a layer or
two.

A shared machine changes its speed within seconds, by a quarter and more. So all operations are timed in turn,
in several rounds, and each counts with the median of its rounds: a slow second affects one sample of many
kinds, not all samples of one kind.

The compiler fuses everything but matrix products and attention (sums, norms, softmax, casts). Fused
operations run faster: `FUSED` is the share of their time that is left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.train.planning.dry_run import Operation

FUSED = 0.5
"""Time of fused element-wise operations over their time unfused (benchmarks/plan.py measures it)."""

APART = 1.1
"""Time of an uncompiled operation among others over its time alone, when its input is still in the cache
(benchmarks/plan.py)."""

SECONDS = 8.0
"""Default time limit of the timing, in seconds."""

ROUNDS = 3
"""Least number of rounds, however large the operations are."""

SPAN = 0.02
"""Seconds for which an operation is repeated in a round; a tenth of it in the first round, which finds the
operations that are worth timing."""

NEARLY = 0.95
"""The operations of later rounds make up this share of the first round's time."""

_WHOLE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "_fused_", "embedding")


def seconds_of(operations: Mapping[Operation, float], *, compiled: bool, budget: float = SECONDS) -> float:
    """Predicted seconds of the operations of one step, after about `budget` seconds of timing.

    Each operation must fit into memory, one at a time.
    """
    return together(*parts_of(operations, budget=budget), compiled=compiled)


def together(products: float, others: float, *, compiled: bool) -> float:
    """Seconds of a step from those of its two parts (`parts_of`)."""
    return products + others * FUSED if compiled else (products + others) * APART


def parts_of(operations: Mapping[Operation, float], *, budget: float = SECONDS) -> tuple[float, float]:
    """Seconds of the products and other large kernels, and of what a compiler would fuse; each operation is
    timed alone."""
    began = time.perf_counter()
    samples = {operation: [_time(operation, SPAN / 10)] for operation, count in operations.items() if count}
    often, rounds = (
        _largest({operation: abs(operations[operation]) * first[0] for operation, first in samples.items()}),
        1,
    )
    while rounds < ROUNDS or time.perf_counter() - began < budget:
        for operation in often:
            samples[operation].append(_time(operation, SPAN))
        rounds += 1
    spent = {True: 0.0, False: 0.0}
    for operation, taken in samples.items():
        spent[_is_whole(operation[0])] += operations[operation] * statistics.median(taken)
    return spent[True], spent[False]


def _largest(shares: Mapping[Operation, float]) -> list[Operation]:
    """The operations that take nearly all of the time. For the many others one sample is enough."""
    found, left = [], sum(shares.values()) * NEARLY
    for operation in sorted(shares, key=shares.__getitem__, reverse=True):
        if left <= 0:
            break
        found.append(operation)
        left -= shares[operation]
    return found


def _is_whole(function: Any) -> bool:
    return any(part in function.name() for part in _WHOLE)


def _time(operation: Operation, span: float) -> float:
    """Mean seconds of some calls with made-up numbers, without the first call."""
    function, args, kwargs = operation
    where = runtime.device()

    def real(value: Any) -> Any:
        if isinstance(value, tuple) and value and value[0] == "tensor":
            shape, stride, dtype = value[1:]
            return _made_up(shape, stride, dtype, where)
        if isinstance(value, tuple) and value and value[0] == "list":
            return [real(part) for part in value[1:]]
        return value

    given = [real(value) for value in args]
    named = {key: real(value) for key, value in kwargs}
    spent: list[float] = []
    began = time.perf_counter()
    with torch.no_grad():
        while len(spent) < 2 or (time.perf_counter() - began < span and len(spent) < 20):
            runtime.synchronise()
            started = time.perf_counter()
            function(*given, **named)
            runtime.synchronise()
            spent.append(time.perf_counter() - started)
    return statistics.mean(spent[1:])


def _made_up(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, where: torch.device
) -> Tensor:
    """A tensor of this shape and stride: small numbers, or zeros where they are indices or flags."""
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=where)
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // dtype.itemsize,), (1,))
    if dtype.is_floating_point:
        filled = min(len(flat), 1 << 16)
        flat[:filled].uniform_(0.01, 0.02)  # zeros and denormal numbers have other speeds
        while filled < len(flat):  # drawing them all would take longer than the operation
            flat[filled : 2 * filled] = flat[: min(filled, len(flat) - filled)]
            filled *= 2
    else:
        flat.zero_()
    return tensor
