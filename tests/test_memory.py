"""What a process uses of the memory, what it may use, and the C allocator's settings."""

from __future__ import annotations

import inspect
import platform
import subprocess
import sys

import pytest

from chatwright import memory


def test_the_peak_and_the_total() -> None:
    peak, total = memory.peak_memory_bytes(), memory.total_memory_bytes()
    assert 50e6 < peak < 1e13 or sys.platform == "win32"
    assert total is None or total > peak


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak")
def test_a_peak_is_the_processs_own_and_not_that_of_who_started_it() -> None:
    large = b"x" * 600_000_000  # every page is written to
    source = inspect.getsource(memory.peak_memory_bytes)
    program = f"import contextlib, sys\n{source}\nprint(peak_memory_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert len(large) and 5e6 < int(done.stdout) < 100e6


def test_the_allocator_can_be_tuned() -> None:
    """In a process of its own: the setting stays. True on glibc, False elsewhere, never an error."""
    program = "from chatwright import memory; print(memory.tune_allocator())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    assert (done.stdout, done.stderr) == (f"{glibc}\n", "")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's"
)
def test_freed_memory_can_be_given_back() -> None:
    """In a process of its own, which keeps what it frees: 128 MB in pieces below a block that stays."""
    program = """
from chatwright import memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

assert memory.tune_allocator()
pieces = [bytearray(b"x" * 65536) for _ in range(2000)]
above = bytearray(b"x" * 65536)
pieces.clear()
before = resident()
memory.trim_heap()
print(before - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000
