"""Fixtures of the serving side; they live in serving.py, which the browser test uses as well, and in
tooling.py."""

from __future__ import annotations

from support.serving import roomy, roomy_server, server, small, taught, tiny
from support.tooling import copy, good, hf_dir, run

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
]
