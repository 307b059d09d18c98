"""Memory of this process: how much it may use, how much it has used, and the settings of the C allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys

import torch

from chatwright import runtime
from chatwright.config import UserError


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of giving it back to the system (glibc only); True when set.

    Every training step frees and allocates the same large buffers; each return to the system costs a page
    fault per 4 kB on the next use (13 % of a step on the reference machine). Other C libraries manage without
    this.
    """
    libc = _glibc()
    if libc is None:
        return False
    mmap_threshold, trim_threshold, mmap_max = -3, -1, -4  # malloc.h
    done = libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)
    return bool(done and libc.mallopt(mmap_threshold, 2**30))


def trim_heap() -> None:
    """Return freed memory, which `tune_allocator` keeps, to the system. Call it once after something large
    that is not repeated.

    The compiler leaves 400 MB when its cache is cold, beside the 1,200 MB of the steps that follow (recipe's
    model, batches of 32).
    """
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, whose allocator has these settings; else None."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far, in bytes.

    On Linux it is read from /proc: `getrusage` starts at the size of the parent process, however large.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no getrusage; 0 means "not known"
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory_bytes() -> int | None:
    """Memory that this process may use, in bytes: of the GPU, else of the machine or its container; None
    where it is not known."""
    if runtime.device().type == "cuda":
        return int(torch.cuda.get_device_properties(runtime.device()).total_memory)
    known: list[int] = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with (
        contextlib.suppress(OSError, ValueError),
        open("/sys/fs/cgroup/memory.max", encoding="ascii") as file,
    ):
        known.append(int(file.read()))  # "max", which is no number, means no limit
    return min(known, default=None)


def memory_is_limited() -> bool:
    """Whether CHATWRIGHT_MEMORY limits the memory of a run."""
    return bool(os.environ.get("CHATWRIGHT_MEMORY"))


def memory_budget_bytes() -> float | None:
    """Memory that a run may plan with, in bytes: CHATWRIGHT_MEMORY ("8GB", "500MB", "8e9"), else 92 % of the
    total, divided among the processes of this machine. Free memory does not count: a resumed run must decide
    as it did before."""
    asked = os.environ.get("CHATWRIGHT_MEMORY", "")
    if asked:
        number, unit = asked.strip().upper().removesuffix("B"), 1.0
        if number[-1:] in ("K", "M", "G", "T"):
            number, unit = number[:-1], {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[number[-1]]
        try:
            size = float(number) * unit
        except ValueError:
            size = 0.0
        if not 0 < size < float("inf"):
            raise UserError(f"CHATWRIGHT_MEMORY={asked} is not a size above 0; try 8GB or 500MB")
        return size
    total = total_memory_bytes()
    sharing = 1 if runtime.device().type == "cuda" else runtime.local_world_size()
    return None if total is None else 0.92 * total / sharing
