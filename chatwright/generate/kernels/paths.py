"""Which instructions multiply small integers, and pairs of bfloat16, on this processor.

float32 weights need no choice: LLVM makes the best of any processor from the same vector code.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache

from chatwright.config import UserError

NAMES = ("plain", "avx2", "vnni", "neon", "vnni_bf16")
"""The number of a path is its place here, as in `dots.DOTS`."""

_FEATURES = {
    "avx2": ("avx2",),
    "vnni": ("avx512f", "avx512bw", "avx512vnni"),
    "neon": ("dotprod",),
    "vnni_bf16": ("avx512f", "avx512bw", "avx512vnni", "avx512bf16"),
}


@lru_cache(maxsize=1)
def _processor() -> frozenset[str]:
    import llvmlite.binding

    return frozenset(name for name, there in llvmlite.binding.get_host_cpu_features().items() if there)


def possible() -> list[str]:
    """The paths that this processor can run, the best last."""
    features = _processor()
    return ["plain", *(name for name, needed in _FEATURES.items() if features.issuperset(needed))]


def choose() -> str:
    """The best path. CHATWRIGHT_KERNELS names another one; raises UserError when this processor cannot run
    it."""
    asked = os.environ.get("CHATWRIGHT_KERNELS")
    can = possible()
    if not asked:
        return can[-1]
    if asked not in can:
        raise UserError(f"CHATWRIGHT_KERNELS={asked}: this processor can run {', '.join(can)}")
    return asked


def typed(path: str) -> tuple[int, ...]:
    """A path as an argument of compiled code: a tuple whose length, which is part of its type, is the path's
    number.

    So code is compiled, and kept on the disk, for each path apart, with nothing to decide while it runs.
    """
    return (0,) * NAMES.index(path)


def named(path: str) -> str:
    """A path's name for people."""
    return {
        "plain": "without special instructions for bf16, int8 and int4",
        "avx2": "AVX2",
        "vnni": "AVX-512 VNNI",
        "neon": "NEON dot products",
        "vnni_bf16": "AVX-512 VNNI and BF16",
    }[path]


def described(path: str, threads: int) -> str:
    """One line for people."""
    return (
        f"CPU kernels: {named(path)} ({platform.machine()}), {threads} "
        f"{'thread' if threads == 1 else 'threads'}"
    )
