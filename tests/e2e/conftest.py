"""Fixtures of the browser tests: those of the serving side (support/serving.py), Chromium, and a page in
it."""

from __future__ import annotations

from support.browsing import browser, page
from support.serving import server, small, taught, tiny

__all__ = ["browser", "page", "server", "small", "taught", "tiny"]
