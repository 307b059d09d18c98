"""Where a store may be, for tests: a database server takes part when CHATWRIGHT_TEST_DATABASE names one."""

from __future__ import annotations

import os

import pytest

DATABASE = os.environ.get("CHATWRIGHT_TEST_DATABASE", "")
"""SQLAlchemy's URL of an empty database whose name has "test" in it: the tests drop the store's tables there.
"""
SERVER = pytest.param(
    "server",
    marks=pytest.mark.skipif(
        not DATABASE,
        reason=(
            "NO DATABASE SERVER: only SQLite is tested; CHATWRIGHT_TEST_DATABASE=postgresql+psycopg://... "
            "(docs/guide/serving.md)"
        ),
    ),
)
