"""How long an optimiser step will take: each kind of operation that it consists of is timed once on this machine.

The rehearsal says which operations a step does, on which shapes, and how often. The sum of count x time over the kinds is the
step, for a model of any number of layers, at the cost of a layer or two.

What the compiler fuses - sums, norms, softmax, casts: everything but matrix products and attention - runs faster than one
by one: `FUSED` is the share of its time that is left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.train.rehearsal import Operation

FUSED = 0.9
"""Time of fused element-wise work over its time one by one (benchmarks/plan.py measures it)."""

APART = 1.1
"""Time of an operation among others over its time alone, when what it reads is still in the cache (benchmarks/plan.py)."""

_WHOLE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "_fused_", "embedding")


def seconds_of(operations: Mapping[Operation, float], *, compiled: bool) -> float:
    """Predicted seconds of the operations of one step. They must fit into memory one at a time."""
    products, others = parts_of(operations)
    return products * APART + others * (FUSED if compiled else APART)


def parts_of(operations: Mapping[Operation, float]) -> tuple[float, float]:
    """Seconds, each operation timed alone: of the products and other large kernels; of what a compiler would fuse."""
    spent = {True: 0.0, False: 0.0}
    for operation, count in operations.items():
        if count:
            spent[_is_whole(operation[0])] += count * _time(operation)
    return spent[True], spent[False]


def _is_whole(function: Any) -> bool:
    return any(part in function.name() for part in _WHOLE)


def _time(operation: Operation) -> float:
    """Median seconds of some calls, the first left out, with made-up numbers."""
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
        while len(spent) < 2 or (time.perf_counter() - began < 0.03 and len(spent) < 30):
            runtime.synchronise()
            started = time.perf_counter()
            function(*given, **named)
            runtime.synchronise()
            spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])


def _made_up(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Tensor:
    """A tensor of this shape and stride: small numbers, or zeros where they are indices or flags."""
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=where)
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // dtype.itemsize,), (1,))
    if dtype.is_floating_point:
        flat.uniform_(0.01, 0.02)  # zeros and denormal numbers have speeds of their own
    else:
        flat.zero_()
    return tensor
