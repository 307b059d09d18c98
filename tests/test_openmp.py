"""OpenMP's threads wait shortly beside other programs, and long on a free machine, unless the user decides
otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from chatwright import openmp
from chatwright.machine_load import LoadMeter, Reading


def clean(**more: str) -> dict[str, str]:
    """The environment without a user's choice."""
    return {key: value for key, value in os.environ.items() if key not in openmp.CHOICES} | more


def printed(program: str, **more: str) -> str:
    """What a new process prints that runs `program`."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SLEEPS = """
import os, time
from chatwright import openmp
import torch

def sleeps(count=200):
    # How often threads of this process went to sleep while they waited for the next of `count` operations.
    def switches():
        total = 0
        for task in os.listdir("/proc/self/task"):
            if int(task) != os.getpid():
                with open(f"/proc/self/task/{task}/status") as lines:
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
        return total
    x = torch.ones(1 << 18)
    x.add_(1)
    before = switches()
    for _ in range(count):
        x.add_(1)
        sum(range(2_000))  # about as long as Python takes between two operations
    return switches() - before

loops = openmp.ShortLoops()
print(openmp.has_two_lengths(), openmp.processors())
for _ in range(40):
    before = sleeps()
    loops.begin()
    loops.begin()
    short = sleeps()
    loops.end()
    after = sleeps()
    print(before, short, after)
    if short > 100 and before < short / 2 and after < short / 2:
        break
"""


def test_loops_are_short_while_more_threads_than_processors_are_held() -> None:
    """Threads sleep between most operations then, and hardly ever before and after. One of forty tries
    must show it: on a machine full of other work even a long loop may end before its time has come."""
    told, *tries = printed(SLEEPS, OMP_NUM_THREADS="2").splitlines()
    has_two_lengths, count = told.split()
    if has_two_lengths == "False" or int(count) < 2:
        pytest.skip("torch's OpenMP library is not libgomp, or there is one processor: NOT covered")
    assert any(
        short > 100 and before < short / 2 and after < short / 2
        for before, short, after in (map(int, one.split()) for one in tries)
    ), tries


@pytest.mark.parametrize(
    "chosen", [{"GOMP_SPINCOUNT": "77"}, {"KMP_BLOCKTIME": "33"}, {"OMP_WAIT_POLICY": "active"}]
)
def test_who_sets_one_of_the_variables_decides(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    assert not _in_a_process_without_torch(environment)
    assert environment == chosen


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_nothing_is_watched_where_the_user_decides(name: str) -> None:
    program = "from chatwright import openmp, runtime; runtime.set_threads(); print(openmp.watch())"
    assert printed(program, **{name: "77" if name[0] == "G" else "active"}) == "False\n"


def test_setting_the_threads_begins_the_watch() -> None:
    program = (
        "import threading; from chatwright import openmp, runtime; runtime.set_threads();"
        "runtime.set_threads();"
        "print(openmp.has_two_lengths(), [one.name for one in threading.enumerate()].count('load'))"
    )
    assert printed(program) in ("True 1\n", "False 0\n")


def test_libraries_that_read_a_variable_are_told_in_time() -> None:
    """The command line must not load torch before it has chosen."""
    program = (
        "import os, sys; from chatwright import cli; assert 'torch' not in sys.modules;"
        "print(os.environ['KMP_BLOCKTIME'])"
    )
    assert printed(program) == "1\n"


def test_nothing_is_set_once_torch_is_loaded() -> None:
    environment: dict[str, str] = {}
    __import__("torch")
    assert not openmp.wait_shortly(environment)
    assert environment == {}


def test_the_rest_of_the_environment_stays() -> None:
    environment: dict[str, str] = {"HOME": "/home/me"}
    assert _in_a_process_without_torch(environment)
    assert environment == {"HOME": "/home/me"} | openmp.BLOCKTIME


def _in_a_process_without_torch(environment: dict[str, str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch", raising=False)
        return openmp.wait_shortly(environment)


# ---- when ------------------------------------------------------------------------------------------------


class Remembered(openmp.ShortLoops):
    """Loops that are only noted."""

    def __init__(self) -> None:
        super().__init__()
        self.short = False

    def begin(self) -> None:
        self.short = True

    def end(self) -> None:
        self.short = False


def test_loops_follow_the_load_and_do_not_flutter() -> None:
    """Four processors of which others keep `others` busy, one look after the other."""
    state = {"wall": 0.0, "everybody": 0.0}

    def reading() -> Reading:
        return Reading(state["wall"], 0.0, state["everybody"])

    loops = Remembered()
    watch = openmp.Watch(loops, LoadMeter(reading, count=4, window=-1e9))
    seen = []
    for others in (0.0, 0.3, 0.5, 0.3, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.3):
        state["wall"] += 1.0
        state["everybody"] += others
        watch.look()
        seen.append(loops.short)
    #  free   0.075  busy    between: as it was            four free looks in a row; between again
    assert seen == [False, False, *[True] * 8, False, False]
