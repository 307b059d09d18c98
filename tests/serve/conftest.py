"""Fixtures of the serving side; the tests of commands and of the browser use some of them as well."""

from __future__ import annotations

from support.serving import roomy, roomy_server, server, small, taught, tiny
from support.tooling import good, hf_dir

__all__ = ["good", "hf_dir", "roomy", "roomy_server", "server", "small", "taught", "tiny"]
