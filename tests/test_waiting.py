"""Waiting for a condition: its answer comes back, and whoever waits in vain is told what for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.waiting import wait_until


def test_the_first_true_answer_is_returned() -> None:
    answers = iter([0, "", [], "found", "later"])
    assert wait_until(lambda: next(answers)) == "found"


def test_what_was_waited_for_is_named() -> None:
    with pytest.raises(AssertionError, match=r"the parcel did not come true within 0\.01 s"):
        wait_until(lambda: False, "the parcel", seconds=0.01)


def test_a_process_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch(); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "mark")])
    assert wait_until((tmp_path / "mark").exists, process=process)  # made by its last act
    with pytest.raises(AssertionError, match="ended with 3"):
        wait_until((tmp_path / "other").exists, process=process)
