"""Programs that tests start: where things are, and an environment in which a child finds these helpers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def child_environment(**values: str) -> dict[str, str]:
    """The environment of this process, with `values`, one thread, and tests/ on the path.

    `python -m support.NAME` runs in it.
    """
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **values}


def cpu_environment() -> dict[str, str]:
    """`child_environment` for processes that compute on the CPU even where there is a GPU."""
    return child_environment(CHATWRIGHT_DEVICE="cpu")


def torchrun(processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    """The command that starts `arguments`, which begin with `-m MODULE` or a file, in several processes."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        str(restarts),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        *arguments,
    ]
