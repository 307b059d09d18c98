"""OpenMP's threads wait shortly, from the first import of the package on, unless the user decides
otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from chatwright import openmp


def displayed(program: str, **more: str) -> str:
    """What the OpenMP library that torch loads says of its settings, when a new process runs `program`."""
    clean = {key: value for key, value in os.environ.items() if key not in openmp.CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"} | more,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line or "KMP_BLOCKTIME" in line]
    if not found:
        pytest.skip("torch's OpenMP library does not tell its settings")
    return " ".join(found)


def test_torch_loads_openmp_with_short_waiting_loops() -> None:
    text = displayed("import chatwright; import torch")
    assert re.search(r"GOMP_SPINCOUNT *= *'1000'|KMP_BLOCKTIME *= *'1(ms)?'", text), text


def test_the_command_line_is_in_time() -> None:
    """It must not load torch before it has chosen."""
    program = "import sys; from chatwright import cli; assert 'torch' not in sys.modules; import torch"
    assert displayed(program) == displayed("import chatwright; import torch")


def test_without_the_package_the_loops_are_longer() -> None:
    """Else the others would prove nothing."""
    assert displayed("import torch") != displayed("import chatwright; import torch")


@pytest.mark.parametrize(
    "chosen", [{"GOMP_SPINCOUNT": "77"}, {"KMP_BLOCKTIME": "33"}, {"OMP_WAIT_POLICY": "active"}]
)
def test_who_sets_one_of_the_variables_decides(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    assert not _in_a_process_without_torch(environment)
    assert environment == chosen


def test_nothing_is_set_once_torch_is_loaded() -> None:
    environment: dict[str, str] = {}
    __import__("torch")
    assert not openmp.wait_shortly(environment)
    assert environment == {}


def test_both_kinds_of_library_are_told() -> None:
    environment: dict[str, str] = {"HOME": "/home/me"}
    assert _in_a_process_without_torch(environment)
    assert environment == {"HOME": "/home/me"} | openmp.WAIT_SHORTLY


def _in_a_process_without_torch(environment: dict[str, str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch", raising=False)
        return openmp.wait_shortly(environment)
