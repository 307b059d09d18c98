"""Contenders side by side: each in a process of its own, one at a time, in turns, until every one has had its
rounds.

A contender is a function `make() -> round()` in the benchmark's own file; `round()` does one portion of the
work and returns the seconds it took. Its process is started with all others and waits for its turn, so that
allocator settings, compilation and memory are its own, while the machine's mood, which changes over minutes,
is shared by all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

RESULTS = Path(__file__).parent / "results"
Contender = Callable[[], Callable[[], float]]


def serve_rounds(contender: Contender) -> int:
    """The child's side: prepare, then do a round for each line on stdin; one line of JSON for each on
    stdout."""
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


class Died(Exception):
    """A contender's process ended before it answered; the message says who and how."""


class Contestant:
    """A contender's process: `python program --contender NAME` with more options, prepared when this is made.

    Use as a context manager, or `close` it. With `own_session` the scheduler of Linux may count it as a group
    of its own (autogroup). Raises Died, here and in `round`.
    """

    def __init__(
        self,
        program: str,
        name: str,
        options: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, program, *options, "--contender", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=own_session,
        )
        self.pid = self.process.pid
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def round(self) -> dict[str, float]:
        """Let it do one round: `seconds` and, so far, `peak_mb`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: how, `_answer` finds out
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Died(f"{self.name} {how_ended(self.process.wait())}; see its messages above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def how_ended(code: int) -> str:
    """A process's exit code in words; a negative one is a signal's number."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name} ({signal.strsignal(-code)})"
    except ValueError:
        return f"was ended by signal {-code}"


def run_iterations(program: str, names: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Start `python program --contender NAME` for each name; `rounds` rounds in turns. Samples by name.

    A peer that dies is named, left out of the samples, and the others go on: llama.cpp for one was seen to
    end with an illegal instruction on some processors. One that all others are compared with (`is_needed`)
    ends the benchmark when it dies.
    """
    contestants: dict[str, Contestant] = {}
    samples: dict[str, dict[str, Any]] = {}
    deaths: list[str] = []

    def leave_out(name: str, death: Died) -> None:
        if is_needed(name):
            raise SystemExit(str(death))
        deaths.append(f"  LEFT OUT: {death}")
        print(deaths[-1], flush=True)
        samples.pop(name, None)
        gone = contestants.pop(name, None)
        if gone is not None:
            gone.close()

    try:
        for name in names:  # one after the other: two compilations at once would take longer
            print(f"  {name}: preparing ...", flush=True)
            try:
                contestants[name] = Contestant(program, name)
                samples[name] = {"seconds": []}
            except Died as death:
                leave_out(name, death)
        for number in range(rounds):
            for name, contestant in list(contestants.items()):
                try:
                    answer = contestant.round()
                except Died as death:
                    leave_out(name, death)
                    continue
                samples[name]["seconds"].append(answer["seconds"])
                samples[name]["peak_mb"] = answer["peak_mb"]
            line = "  ".join(f"{name} {row['seconds'][-1]:.3f}" for name, row in samples.items())
            print(f"  round {number + 1}/{rounds}: {line}", flush=True)
    finally:
        for contestant in contestants.values():
            contestant.close()
    print("\n".join(deaths), end="\n" if deaths else "", flush=True)  # once more, below the rounds
    return samples


def is_needed(name: str) -> bool:
    """Whether a contender is our own code or the machine's peak: the last part of its name begins with `ours`
    or is `gemm`."""
    last = name.replace("/", ":").rpartition(":")[2]
    return last.startswith("ours") or last == "gemm"


def products() -> dict[str, str]:
    """What multiplies matrices on this processor: torch's instruction set, oneDNN's, and oneDNN's kernels by
    precision.

    oneDNN tells it in a process of its own (ONEDNN_VERBOSE). A kernel of `amx` computes with tiles; `mkl`
    says that torch gave the product to that library instead.
    """
    program = (
        "import torch; from torch import mm, randn as r; a = r(512, 512); "
        "print(torch.backends.cpu.get_cpu_capability());b = a.bfloat16(); print('> bf16', flush=True); mm(b, "
        "b); print('> fp32', flush=True); mm(a, a)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return products_of(done.stdout)


def products_of(text: str) -> dict[str, str]:
    """`products` from the lines that torch and oneDNN print."""
    lines = text.splitlines()
    found = {"torch": lines[0], "oneDNN": "not told", "bf16": "mkl", "fp32": "mkl"}
    precision = ""
    for line in lines[1:]:
        fields = line.split(",")
        if line.startswith("> "):
            precision = line[2:]
        elif "info,cpu,isa:" in line:
            found["oneDNN"] = line.partition("isa:")[2]
        elif len(fields) > 7 and "exec" in fields and "matmul" in fields:
            found[precision] = fields[fields.index("matmul") + 1]
    return found


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
