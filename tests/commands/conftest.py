"""Fixtures of the commands' tests: models to chat with and to serve, and model directories to look into."""

from __future__ import annotations

from support.serving import taught, tiny
from support.tooling import copy, good, hf_dir, run

__all__ = ["copy", "good", "hf_dir", "run", "taught", "tiny"]
