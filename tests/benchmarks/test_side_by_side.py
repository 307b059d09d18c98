"""Benchmarks go on when a peer dies; what is measured beside other programs, and with which instructions."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.launching import ROOT

BENCHMARKS = ROOT / "benchmarks"

PROGRAM = """
import argparse, os, resource, signal
import side_by_side

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
done = []

def steady():
    return lambda: 0.5

def dies_in_its_second_round():
    def one_round():
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGILL)
        return 0.25
    return one_round

def cannot_begin():
    raise SystemExit(3)

parser = argparse.ArgumentParser()
parser.add_argument("--contender")
name = parser.parse_args().contender
made = {"ours_bf16": steady, "ours_broken": dies_in_its_second_round, "llama_bf16": steady,
        "llama_q8_0": dies_in_its_second_round, "llama_q4_0": cannot_begin}
raise SystemExit(side_by_side.serve_rounds(made[name.rpartition("/")[2]]))
"""


@pytest.fixture
def benchmark() -> Callable[[str], Any]:
    """A program of benchmarks/ as a module."""
    return importlib.import_module


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A benchmark some of whose contenders die."""
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(BENCHMARKS), inherited))))
    file = tmp_path / "dying.py"
    file.write_text(PROGRAM, encoding="utf-8")
    return str(file)


def test_a_peer_that_dies_is_named_and_left_out_and_the_rest_is_measured(
    benchmark: Callable[[str], Any], program: str, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ["ours_bf16", "llama_q4_0", "llama_q8_0", "llama_bf16"]
    samples = benchmark("side_by_side").run_iterations(program, [f"decode/{name}" for name in names], 4)
    assert list(samples) == ["decode/ours_bf16", "decode/llama_bf16"]
    assert all(row["seconds"] == [0.5] * 4 and row["peak_mb"] > 0 for row in samples.values())
    lines = [line for line in capfd.readouterr().out.splitlines() if "LEFT OUT" in line]
    died, never_began = [[line for line in lines if name in line] for name in ("llama_q8_0", "llama_q4_0")]
    assert (
        len(lines) == 4 and len(died) == len(never_began) == 2
    )  # when it happens, and again below the rounds
    assert "was ended by SIGILL (Illegal instruction)" in died[0] and "exit code 3" in never_began[0]


def test_one_of_ours_that_dies_ends_the_benchmark(benchmark: Callable[[str], Any], program: str) -> None:
    with pytest.raises(SystemExit, match="decode/ours_broken was ended by SIGILL"):
        benchmark("side_by_side").run_iterations(program, ["decode/ours_broken", "decode/llama_bf16"], 4)


def test_ratios_are_those_of_the_peers_that_are_left(benchmark: Callable[[str], Any]) -> None:
    samples = {
        "decode/ours_bf16": {"seconds": [1.0, 2.0, 3.0]},
        "decode/ours_int8": {"seconds": [1.0, 1.0, 1.0]},
        "decode/llama_bf16": {"seconds": [2.0, 3.0, 6.0]},
    }
    assert benchmark("generate").compared("decode", samples) == {"smollm2/bf16/llama.cpp": 2.0}


def test_a_quantiser_that_dies_is_named(
    benchmark: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate = benchmark("generate")
    monkeypatch.setattr(generate, "FILES", tmp_path)
    (tmp_path / "smollm2-bf16.gguf").touch()
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, -signal.SIGILL if command[-1] == "q8_0" else 0)

    monkeypatch.setattr(generate.subprocess, "run", run)
    generate.write_files()
    assert asked == ["q8_0", "q4_0"]
    assert "quantiser for q8_0 was ended by SIGILL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "onednn_verbose,v1,info,cpu,isa:Intel AVX-512 with bfloat16 support\n> bf16\n"
            "onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16::,,,,,0.3\n"
            "> fp32\n",
            {
                "oneDNN": "Intel AVX-512 with bfloat16 support",
                "bf16": "brg_matmul:avx512_core_bf16",
                "fp32": "mkl",
            },
        ),
        (
            "> bf16\n"
            "onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_amx,undef,src:bf16::,,,,,0.1\n"
            "> fp32\n"
            "onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core,undef,src:f32::,,,,,0.9\n",
            {"oneDNN": "not told", "bf16": "brg_matmul:avx512_core_amx", "fp32": "brg_matmul:avx512_core"},
        ),
    ],
)
def test_which_kernels_multiply(
    benchmark: Callable[[str], Any], lines: str, expected: dict[str, str]
) -> None:
    assert benchmark("side_by_side").products_of("AVX512\n" + lines) == {"torch": "AVX512", **expected}


def test_busy_loops_run_in_sessions_of_their_own_and_end(benchmark: Callable[[str], Any]) -> None:
    with benchmark("busy").busy_loops(2) as pids:
        sessions = {os.getsid(pid) for pid in pids}
        assert sessions == set(pids) and os.getsid(0) not in sessions
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("measure", "work"), [("sft", 8 * 256.0), ("ppo", 64.0)])
def test_a_unit_of_work_is_done(
    benchmark: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measure: str,
    work: float,
) -> None:
    """With the stages as they are now; the others need a compiler, or compile kernels for a large model."""
    busy = benchmark("busy")
    monkeypatch.setattr(busy.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert busy.MEASURES[measure][0]()() == work


def test_what_is_left_beside_busy_loops(
    benchmark: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ratios are of speeds: twice the seconds are half of the speed."""

    def rows(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": one, "ours": 1.5, "loops": 0.5, "others": 0.0} for one in seconds]

    samples = {
        "now/0": rows(1.0, 1.0, 2.0),
        "old/0": rows(0.9, 1.0, 1.0),
        "now/1": rows(2.0, 2.0, 4.0),
        "old/1": rows(9.0, 5.0, 5.0),
    }
    assert benchmark("busy").table("sft", samples) == {
        "sft/now/alone_over_old": 0.9,
        "sft/now/beside_1": 0.5,
        "sft/old/beside_1": 0.2,
    }
    assert "0.50" in capsys.readouterr().out


def test_the_old_waiting_loop_is_chosen_by_the_environment(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = benchmark("busy")
    for name in busy.SPIN:
        monkeypatch.setenv(name, "1")
    for spin, expected in (
        ("now", {}),
        ("old", {"GOMP_SPINCOUNT": "300000"}),
        ("50", {"GOMP_SPINCOUNT": "50"}),
    ):
        found = busy.environment(spin)
        assert {name: found[name] for name in busy.SPIN if name in found} == expected
        assert found["PATH"] == os.environ["PATH"]


def test_a_turn_goes_on_until_its_seconds_have_passed(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, now = benchmark("busy"), [0.0]
    monkeypatch.setattr(busy.time, "perf_counter", lambda: now[0])

    def work() -> float:
        now[0] += 3.0
        return 6.0

    assert busy.repeated(work, 7.0)() == pytest.approx(9.0 / 18.0)
    assert busy.repeated(work, 0.0)() == pytest.approx(0.5)
    assert sys.platform != "linux" or busy.machine_seconds() > 0
