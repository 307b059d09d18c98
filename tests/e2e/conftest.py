"""Fixtures of the browser tests: those of the serving side (tests/serve/serving.py), Chromium, and a page in
it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parent))

from browsing import browser, page
from serving import server, small, taught, tiny

__all__ = ["browser", "page", "server", "small", "taught", "tiny"]
