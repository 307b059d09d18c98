"""Real processes that are killed, stopped, and given a full disk or damaged files. The long campaign is
campaign.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatwright import checkpoint
from chatwright.metrics import read_metrics
from support import campaign
from support.waiting import wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")

LONG = ("--fit.steps", "100000", "--fit.save_every", "1e9")
SHORT = ("--fit.steps", "30")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with token shards."""
    return campaign.write_input(tmp_path_factory.mktemp("faults") / "input")


def run(source: Path, out: Path, *more: str, limit: int = 0) -> tuple[int, str]:
    """Exit code and output of the command; `limit` is the largest file in bytes that it may write."""
    words = campaign.command(source, out, *more)
    if limit:
        words = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "-", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, text=True, capture_output=True, timeout=120)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    told, _ = process.communicate(timeout=60)
    return process.returncode, " ".join(told.split())


def test_a_short_campaign(tmp_path: Path) -> None:
    done = campaign.run_campaign(2, 7, tmp_path, steps=80)
    assert done.faults == [] and done.kills == 2


def test_sigterm_saves_and_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = campaign.start(source, out, *LONG)
    wait_until(lambda: len(read_metrics(out / "metrics.jsonl")) > 2, "progress", process=process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # launchers repeat themselves
    code, told = finish(process)
    found = checkpoint.checkpoints(out / "checkpoints")
    assert code == 0 and found
    found[-1].verify()
    assert f"saved at step {found[-1].step}; the same command goes on from there" in told


def test_ctrl_c_twice_is_immediate(source: Path, tmp_path: Path) -> None:
    """In steps so long that the second signal comes before the end of the one that the first waits for."""
    out = tmp_path / "run"
    process = campaign.start(source, out, *LONG, "--fit.batch_size", "1024", "--fit.log_every", "1")
    wait_until(lambda: read_metrics(out / "metrics.jsonl"), "progress", process=process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "again stops at once" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, told = finish(process)
    assert code == 130 and "interrupted" in told
    assert checkpoint.checkpoints(out / "checkpoints") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_held_out_measure(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """It is made to last for a minute; what is left is nothing, and the exit is prompt."""
    program = (
        "import sys, time; from chatwright import cli; from chatwright.stages import pretrain\n"
        "def measure(*a, **k):\n    print('measuring', flush=True)\n    [time.sleep(0.01) for _ in "
        "range(6000)]\n"
        "pretrain.held_out_bits_per_byte = measure\nsys.exit(cli.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, *campaign.command(source, tmp_path / "run", *SHORT)[3:]]
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while "measuring" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    code, told = finish(process)  # within the minute that `finish` waits: the measure alone would take longer
    assert code == 0 and "nothing had to be saved; the same command goes on" in told
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints") == []


def test_sigterm_before_training_begins(source: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from chatwright import cli; from chatwright.data.shards import TokenShards\n"
        "def opening(*a, **k):\n    print('opening', flush=True)\n    [time.sleep(0.01) for _ in "
        "range(6000)]\n"
        "TokenShards.open = opening\nsys.exit(cli.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, *campaign.command(source, tmp_path / "run", *SHORT)[3:]]
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while "opening" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, told = finish(process)
    assert code == 0 and "run: stopped; the same command goes on" in told


def stopped_early(source: Path, out: Path) -> checkpoint.Checkpoint:
    """A run with a checkpoint, stopped by SIGTERM."""
    process = campaign.start(source, out, *SHORT, "--fit.save_every", "1e9", "--fit.save_steps", "4")
    wait_until(lambda: checkpoint.checkpoints(out / "checkpoints"), "progress", process=process)
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process)
    found = checkpoint.checkpoints(out / "checkpoints")
    assert code == 0 and found and found[-1].step < 30
    return found[-1]


SAVING = (*SHORT, "--fit.save_every", "1e9", "--fit.save_steps", "4")


def intact(found: checkpoint.Checkpoint, before: dict[str, bytes]) -> None:
    found.verify()
    assert {file.name: file.read_bytes() for file in found.path.iterdir()} == before
    assert not list(found.path.parent.glob(".step-*"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(source, out, *SAVING)[0] == 0
    return out


def test_a_disk_that_takes_no_large_files(source: Path, whole: Path, tmp_path: Path) -> None:
    """The form that runs everywhere: the system refuses files above 64 kB."""
    out = tmp_path / "run"
    found = stopped_early(source, out)
    before = {file.name: file.read_bytes() for file in found.path.iterdir()}
    code, told = run(source, out, *SAVING, limit=65_536)
    assert (
        code == 1
        and "cannot write" in told
        and "what was there before is intact" in told
        and "Traceback" not in told
    )
    intact(found, before)
    assert run(source, out, *SAVING)[0] == 0
    assert campaign.contents(out) == campaign.contents(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(
            f"no small disk can be mounted here, a really full one is NOT tested: {done.stderr.strip()}"
        )
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(source: Path, whole: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    found = stopped_early(source, out)
    before = {file.name: file.read_bytes() for file in found.path.iterdir()}
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"x" * (free - 100_000))  # room for metrics, not for a checkpoint
    code, told = run(source, out, *SAVING)
    assert code == 1 and "No space left on device" in told and "what was there before is intact" in told
    assert "Traceback" not in told
    intact(found, before)
    ballast.write_bytes(b"x" * (free - 4096))
    ballast.write_bytes(
        b"x" * (shutil.disk_usage(small_disk).free + ballast.stat().st_size)
    )  # not even for metrics
    code, told = run(source, out, *SAVING)
    assert code == 1 and "No space left on device" in told and "Traceback" not in told
    intact(found, before)
    ballast.unlink()
    code, told = run(source, out, *SAVING)
    assert code == 0 and f"going on from step {found.step}" in told
    assert campaign.contents(out) == campaign.contents(whole)


def test_damage_is_named_at_the_command_line(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "input")
    file = copy / "train" / "tokens-00000.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    code, told = run(copy, tmp_path / "run", *SHORT)
    assert code == 1 and "tokens-00000.bin is damaged" in told and "Traceback" not in told
