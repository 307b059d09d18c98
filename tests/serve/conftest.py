"""Fixtures of the serving side; they live in serving.py, which the browser test uses as well, and in
tooling.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving import roomy, roomy_server, server, small, taught, tiny, wait_until
from tooling import copy, good, hf_dir, run

__all__ = [
    "copy",
    "good",
    "hf_dir",
    "roomy",
    "roomy_server",
    "run",
    "server",
    "small",
    "taught",
    "tiny",
    "wait_until",
]
