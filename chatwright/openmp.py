"""How long the threads of OpenMP wait in a loop before they sleep: shortly beside other programs.

torch computes on CPUs with the threads of an OpenMP library. A thread that has done its part of an operation
waits for the others, and then for the next operation, in a loop that keeps a processor busy. The libraries
choose long loops: 300,000 turns, which is some milliseconds, in libgomp (torch for Linux), and 200 ms in
Intel's and LLVM's (torch for Windows and macOS). That is good for a program that is alone on its machine:
waking threads that sleep costs a small model a tenth of its speed. Beside another program a thread then waits
in a loop for one that is not running, and uses up the processor time which the other one would need: training
falls to a sixteenth of its speed beside a single busy program.

So the loops have two lengths. libgomp itself shortens them to 100 turns while its threads are more than the
processors. `ShortLoops` brings that about without changing what is computed: it holds threads of OpenMP that
sleep. `watch` begins and ends it as other programs come and go. Measured: docs/lab/performance.md, "Beside
other programs".

Intel's and LLVM's libraries have no such rule. They read a variable once, when torch loads them. Hence it is
set by `import chatwright`, and that must come before `import torch`; behind it it changes nothing.

Whoever sets one of the variables in `CHOICES` decides, and nothing is watched.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import MutableMapping

from chatwright.machine_load import LoadMeter, processors

BLOCKTIME = {"KMP_BLOCKTIME": "1"}
"""Milliseconds for Intel's and LLVM's libraries, which have no smaller unit in older versions."""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", *BLOCKTIME)
"""Variables by which a user decides."""
EVERY = 0.25
"""Seconds between two looks at the other programs."""
BUSY, FREE = 0.1, 0.05
"""Loops become short when others keep this share of the processors busy, and long below the smaller one."""
LOOKS = 4
"""So many looks in a row must find the processors free before loops become long again."""


def wait_shortly(environment: MutableMapping[str, str]) -> bool:
    """Choose short waiting loops for Intel's and LLVM's libraries; True when done. Not where the user has
    chosen, nor when torch is loaded already.

    Programs that this one starts inherit the choice.
    """
    if "torch" in sys.modules or any(name in environment for name in CHOICES):
        return False
    environment.update(BLOCKTIME)
    return True


@functools.cache
def library() -> ctypes.CDLL | None:
    """The OpenMP library that torch computes with; None where it cannot be called (Windows)."""
    try:
        found = ctypes.CDLL(None)
        _ = found.omp_set_num_threads
    except (OSError, AttributeError, TypeError):
        return None
    return found


class ShortLoops:
    """libgomp's waiting loops are short from `begin` to `end`.

    libgomp counts the threads that it has made. While they are more than the processors (the affinity mask's,
    when the library was loaded), a waiting thread sleeps after 100 turns of its loop instead of 300,000. Here
    a thread runs an empty parallel region, so that libgomp makes one more thread for each processor. They
    sleep until this thread ends, and cost nothing but their stacks' addresses.
    """

    def __init__(self) -> None:
        self._over: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def begun(self) -> bool:
        """Whether the loops are short."""
        return self._thread is not None

    def begin(self) -> None:
        """Make the loops short."""
        if self._thread is None:
            self._over, ready = threading.Event(), threading.Event()
            self._thread = threading.Thread(
                target=_hold_threads, args=(ready, self._over), name="openmp", daemon=True
            )
            self._thread.start()
            ready.wait()

    def end(self) -> None:
        """Let the library wait as it does by itself."""
        if self._thread is not None and self._over is not None:
            self._over.set()
            self._thread.join()
            self._thread = None


def _hold_threads(ready: threading.Event, over: threading.Event) -> None:
    """Make one thread of libgomp for each processor; they end with the calling thread."""
    found = library()
    if found is not None:
        # A parallel region in which each thread calls free(NULL), which does nothing.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        found.GOMP_parallel(nothing, None, ctypes.c_uint(processors() + 1), ctypes.c_uint(0))
    ready.set()
    over.wait()


class Watch:
    """Decides from the load of the machine whether loops are to be short."""

    def __init__(self, loops: ShortLoops, load: LoadMeter) -> None:
        self.loops, self.load, self.free = loops, load, 0

    def look(self) -> None:
        """Look at the other programs once, and shorten or lengthen the loops."""
        share = self.load.look() / self.load.count
        self.free = self.free + 1 if share < FREE else 0
        if share >= BUSY:
            self.loops.begin()
        elif self.free >= LOOKS:
            self.loops.end()


def has_two_lengths() -> bool:
    """Whether the library that torch computes with is libgomp, and it and the user leave the loops to us."""
    found = library()
    chosen = any(name in os.environ for name in CHOICES if name not in BLOCKTIME)
    return found is not None and hasattr(found, "GOMP_parallel") and not chosen


_watching = threading.Lock()
_watcher: threading.Thread | None = None


def watch(alike: int = 1) -> bool:
    """Watch the other programs from now on, in a thread that ends with the process; True where that is of
    use. Call it when torch is loaded. A second call changes nothing.

    `alike` is the number of processes that torchrun started on this machine (`LoadMeter`).
    """
    global _watcher
    with _watching:
        if _watcher is None and has_two_lengths():
            seen = Watch(ShortLoops(), LoadMeter(alike=alike, window=EVERY))
            _watcher = threading.Thread(target=_watch_on, args=(seen,), name="load", daemon=True)
            _watcher.start()
        return _watcher is not None


def _watch_on(seen: Watch) -> None:
    pause = threading.Event()
    while True:
        pause.wait(EVERY)
        seen.look()
