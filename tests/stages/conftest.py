"""The package in tests/extension, as if it were installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatwright import discovery

EXTENSION = Path(__file__).parents[1] / "extension"


def forget() -> None:
    """Verbs are looked for again, and the package is imported again."""
    discovery.stages.cache_clear()
    for name in [name for name in sys.modules if name.startswith("chatwright_extension")]:
        del sys.modules[name]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with a package that brings a stage and a data source."""
    monkeypatch.syspath_prepend(str(EXTENSION))
    forget()
    yield EXTENSION
    monkeypatch.undo()
    forget()
