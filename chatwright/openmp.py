"""How long the threads of OpenMP wait in a loop before they sleep: shortly, so that other programs may run.

torch computes on CPUs with the threads of an OpenMP library. A thread that has done its part of an operation
waits for the others, and then for the next operation, in a loop that keeps a processor busy. The libraries
choose long loops: 300,000 turns, which is some milliseconds, in libgomp (torch for Linux), and 200 ms in
Intel's and LLVM's (torch for Windows and macOS). That is good for a program that is alone on its machine.
Beside another program a thread then waits in a loop for one that is not running, and uses up the processor
time which the other one would need: training falls to a sixth of its speed beside a single busy program.

A loop of some tens of microseconds is about as long as it takes to wake a sleeping thread: it is worth its
time when the program is alone, and lets the speed fall to the fair share when it is not (measured:
docs/lab/performance.md, "Beside other programs"). The libraries read these variables once, when torch loads
them. Hence they are set by `import chatwright`, and that must come before `import torch`; behind it they
change nothing. Whoever sets one of them decides.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

WAIT_SHORTLY = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""Turns of libgomp's waiting loop; milliseconds of Intel's and LLVM's, which has no smaller unit in older
versions."""
CHOICES = (*WAIT_SHORTLY, "OMP_WAIT_POLICY")
"""Variables by which a user decides."""


def wait_shortly(environment: MutableMapping[str, str]) -> bool:
    """Choose short waiting loops; True when done. Not where the user has chosen, nor when torch is loaded
    already.

    Programs that this one starts inherit the choice.
    """
    if "torch" in sys.modules or any(name in environment for name in CHOICES):
        return False
    environment.update(WAIT_SHORTLY)
    return True
