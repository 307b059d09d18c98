"""Contenders side by side: each in a process of its own, one at a time, in turns, until every one has had its
rounds.

A contender is a function `make() -> round()` in the benchmark's own file; `round()` does one portion of the
work and returns the seconds it took. Its process is started with all others and waits for its turn, so that
allocator settings, compilation and memory are its own, while the machine's mood, which changes over minutes,
is shared by all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Contender = Callable[[], Callable[[], float]]


def serve_rounds(contender: Contender) -> int:
    """The child's side: prepare, then do a round for each line on stdin; one line of JSON for each on stdout."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    one_round = contender()
    out.write(json.dumps({"ready": True}) + "\n")
    for _ in sys.stdin:
        out.write(json.dumps({"seconds": one_round(), "peak_mb": peak_mb()}) + "\n")
    return 0


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("needs /proc/self/status")


def run_rounds(program: str, names: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Start `python program --contender NAME` for each name; `rounds` rounds in turns. Samples by name."""
    children: dict[str, subprocess.Popen[str]] = {}
    samples: dict[str, dict[str, Any]] = {}
    try:
        for name in (
            names
        ):  # one after the other: two compilations at once would take longer than one after the other
            print(f"  {name}: preparing ...", flush=True)
            child = subprocess.Popen(
                [sys.executable, program, "--contender", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            children[name] = child
            _answer(child, name)
            samples[name] = {"seconds": []}
        for number in range(rounds):
            for name, child in children.items():
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
                answer = _answer(child, name)
                samples[name]["seconds"].append(answer["seconds"])
                samples[name]["peak_mb"] = answer["peak_mb"]
            line = "  ".join(f"{name} {samples[name]['seconds'][-1]:.3f}" for name in names)
            print(f"  round {number + 1}/{rounds}: {line}", flush=True)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return samples


def _answer(child: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended with exit code {child.wait()}; see its messages above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of theirs / ours: how many times faster ours was, each pair measured side by
    side."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def write_results(
    name: str, ratios: Mapping[str, float], command: str, packages: Sequence[str], samples: Any
) -> Path:
    """benchmarks/results/NAME.json in the shape that all benchmarks of the project share.

    Ratios that this run did not measure are kept from the file, with their samples.
    """
    from importlib.metadata import version

    from chatwright import runtime

    file = RESULTS / f"{name}.json"
    old = json.loads(file.read_text()) if file.exists() else {"ratios": {}, "samples": {}}
    content = {
        "ratios": {**old["ratios"], **{key: round(value, 3) for key, value in ratios.items()}},
        "command": command,
        "machine": runtime.describe(),
        "versions": {package: version(package) for package in ("torch", *packages)},
        "samples": {**old["samples"], **samples},
    }
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
