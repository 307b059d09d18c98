"""How threads inside of compiled code wait for each other: a barrier of a fraction of a microsecond.

It stays fair beside other programs: a thread that has waited for long sleeps (`meet`).
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from chatwright.generate.kernels.simd import I64, INT32, address_of, call_llvm


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


_FUTEX = {"x86_64": 202, "aarch64": 98}
"""Numbers of Linux's system call `futex` (asm/unistd.h), by the beginning of LLVM's name for the machine."""
_WAIT, _WAKE = 128, 129  # linux/futex.h: FUTEX_WAIT and FUTEX_WAKE, among the threads of one process
_NAP = 50  # microseconds


def _system_call(builder: Any, pointer: Any, operation: int, value: Any) -> None:
    """futex(pointer, operation, value) without a time limit; nothing where it is not at hand."""
    triple = builder.module.triple
    for machine, number in _FUTEX.items():
        if triple.startswith(machine):
            kind = ir.FunctionType(I64, [I64], var_arg=True)
            function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
            nothing = ir.Constant(I64, 0)
            given = [pointer, ir.Constant(I64, operation), builder.sext(value, I64), *[nothing] * 3]
            builder.call(function, [ir.Constant(I64, number), *given])


def _has_futex(triple: str) -> bool:
    return sys.platform == "linux" and sys.byteorder == "little" and triple.startswith(tuple(_FUTEX))


@intrinsic
def sleep_while(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Sleep while array[index] has this value, until `wake` is called. May also return earlier.

    Where the system offers no such thing, it is a short sleep; on Windows nothing, so that the caller goes on
    looking.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _has_futex(builder.module.triple):
            pointer = address_of(context, builder, signature.args[0], args[0], args[1])
            _system_call(builder, pointer, _WAIT, builder.trunc(args[2], INT32))
        elif sys.platform != "win32":
            call_llvm(builder, "usleep", INT32, [ir.Constant(INT32, _NAP)])
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), code


@intrinsic
def wake(typing: Any, array: Any, index: Any) -> Any:
    """Wake all threads that sleep while array[index] has some value."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _has_futex(builder.module.triple):
            pointer = address_of(context, builder, signature.args[0], args[0], args[1])
            _system_call(builder, pointer, _WAKE, ir.Constant(INT32, 2**31 - 1))
        return context.get_dummy_value()

    return types.none(array, types.int64), code


_ARRIVED, _ROUND, _SLEEPING = 0, 16, 32  # indices in `sync`, on cache lines of their own
SYNC_SIZE = 48
_PATIENCE = 1_000  # turns of the waiting loop: 50 microseconds, about what it takes to be woken


@njit(forceinline=True)
def meet(sync, threads):
    """Wait here until all threads have come.

    First in a loop, which is by far the fastest when every thread runs. A thread that is not here after that
    long does not run: another program has its processor. Then sleep, so that this processor is free, for that
    thread or for the program.
    """
    if threads == 1:
        return
    current = atomic_read(sync, _ROUND)
    if atomic_add(sync, _ARRIVED, 1) == threads - 1:
        atomic_write(sync, _ARRIVED, 0)
        # Both sides first tell and then look: whoever begins to sleep sees the new round, or is seen here.
        atomic_add(sync, _ROUND, 1)
        if atomic_add(sync, _SLEEPING, 0) > 0:
            wake(sync, _ROUND)
        return
    turns = 0
    while atomic_read(sync, _ROUND) == current:
        pause()
        turns += 1
        if turns > _PATIENCE:
            atomic_add(sync, _SLEEPING, 1)
            sleep_while(sync, _ROUND, current)
            atomic_add(sync, _SLEEPING, -1)
