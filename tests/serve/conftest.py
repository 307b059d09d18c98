"""Fixtures of the serving side; they live in serving.py, which the browser test uses as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving import server, small, taught, tiny, wait_until

__all__ = ["server", "small", "taught", "tiny", "wait_until"]
