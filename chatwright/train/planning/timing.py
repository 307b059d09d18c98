"""How long an optimiser step will take: each kind of operation that it consists of is timed on this machine.

The dry run says which operations a step does, on which shapes, and how often. The sum of count x time over
the kinds is the step, for a model of any number of layers, at the cost of a layer or two.

A shared machine changes its speed within seconds, by a quarter and more. So the operations are timed in
turns, round after round, and each counts with the median of its rounds: one slow second touches one sample of
many kinds, not all of one kind.

What the compiler fuses - sums, norms, softmax, casts: everything but matrix products and attention - runs
faster than one by one: `FUSED` is the share of its time that is left.
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
"""Time of fused element-wise work over its time one by one (benchmarks/plan.py measures it)."""

APART = 1.1
"""Time of an uncompiled operation among others over its time alone, when what it reads is still in the cache
(benchmarks/plan.py)."""

SECONDS = 8.0
"""How long to go on timing, unless asked for less."""

ROUNDS = 3
"""PolicyTraining in any case, however large the operations are."""

SPAN = 0.02
"""Seconds for which an operation is called again and again in a round; a tenth of it in the first, which
finds out what is worth timing."""

NEARLY = 0.95
"""Share of the first round's time that the operations of later rounds make up."""

_WHOLE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "_fused_", "embedding")


def seconds_of(operations: Mapping[Operation, float], *, compiled: bool, budget: float = SECONDS) -> float:
    """Predicted seconds of the operations of one step, after about `budget` seconds of timing.

    Each operation must fit into memory, one at a time.
    """
    return together(*parts_of(operations, budget=budget), compiled=compiled)


def together(products: float, others: float, *, compiled: bool) -> float:
    """Seconds of a step from those of its two parts, timed one by one."""
    return products + others * FUSED if compiled else (products + others) * APART


def parts_of(operations: Mapping[Operation, float], *, budget: float = SECONDS) -> tuple[float, float]:
    """Seconds, each operation timed alone: of the products and other large kernels; of what a compiler would
    fuse."""
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
    """The operations that take nearly all of the time; the others are many, and one sample of each is
    enough."""
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
    """Mean seconds of some calls, the first left out, with made-up numbers."""
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
        flat[:filled].uniform_(0.01, 0.02)  # zeros and denormal numbers have speeds of their own
        while filled < len(flat):  # drawing them all would take longer than the operation
            flat[filled : 2 * filled] = flat[: min(filled, len(flat) - filled)]
            filled *= 2
    else:
        flat.zero_()
    return tensor
