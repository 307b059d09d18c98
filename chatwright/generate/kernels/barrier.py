"""How threads inside of compiled code wait for each other: a barrier of a fraction of a microsecond."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from chatwright.generate.kernels.simd import INT32, address_of, call_llvm


@intrinsic
def atomic_read(typing: Any, array: Any, index: Any) -> Any:
    """array[index] of an int64 array, as other threads left it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(array, types.int64), code


@intrinsic
def atomic_write(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Set array[index] once everything written before is seen by who reads it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), code


@intrinsic
def atomic_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to array[index]; the value before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], ordering="seq_cst")

    return types.int64(array, types.int64, types.int64), code


@intrinsic
def pause(typing: Any) -> Any:
    """A hint that this thread waits in a loop."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        triple = builder.module.triple
        if triple.startswith(("x86", "i686")):
            call_llvm(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif triple.startswith(("aarch64", "arm64")):
            call_llvm(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(INT32, 1)])
        return context.get_dummy_value()

    return types.none(), code


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have the processor, for when there are fewer processors than threads."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            call_llvm(builder, "sched_yield", INT32, [])
        return context.get_dummy_value()

    return types.none(), code


_ARRIVED, _ROUND = 0, 16  # places in `sync`, on cache lines of their own
SYNC_SIZE = 32
_PATIENCE = 4_000  # turns of the waiting loop before the processor is offered to others


@njit(forceinline=True)
def meet(sync, threads):
    """Wait here until all threads have come."""
    if threads == 1:
        return
    current = atomic_read(sync, _ROUND)
    if atomic_add(sync, _ARRIVED, 1) == threads - 1:
        atomic_write(sync, _ARRIVED, 0)
        atomic_write(sync, _ROUND, current + 1)
        return
    turns = 0
    while atomic_read(sync, _ROUND) == current:
        pause()
        turns += 1
        if turns > _PATIENCE:
            give_way()
