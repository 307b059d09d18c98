"""Damaged and hostile model files by the thousand: each is loaded or refused in one line, and nothing else.

    PYTHONPATH=tests python -m support.fuzz --count 10000 --seed 0 [--kind gguf] [--only 1234]

A case is a number: seed, kind and number make the same file each time. Cases run in a process of their own,
with 3 GB of memory beyond what it has and five seconds of its processor's time. A case has failed when it
raises anything but UserError, writes a UserError of several lines, dies, or takes more memory or time.
Failures are printed with what is needed to see them again: `--only NUMBER --keep DIR` runs one alone, here,
and leaves its files.
"""

from __future__ import annotations

import argparse
import os
import resource
import selectors
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from chatwright.chat import sandbox
from chatwright.config import UserError
from support import specimens

MEMORY = 3 << 30
SECONDS = 5.0
BATCH = 400
"""Cases that one process does before it makes room for a fresh one."""


def memory_trouble(error: BaseException | None) -> bool:
    """Whether memory ran out on the way to this error, even if someone caught that."""
    seen = 0
    while error is not None and seen < 50:
        if (
            isinstance(error, MemoryError)
            or "allocate memory" in str(error)
            or "not enough memory" in str(error)
        ):
            return True
        error, seen = error.__context__ or error.__cause__, seen + 1
    return False


def judge(action: Callable[[], None]) -> tuple[str, str]:
    """`accepted`, `refused` or `FAILED`, and why."""
    try:
        action()
    except UserError as error:
        if memory_trouble(error):
            return "FAILED", f"memory: {error}"
        if not str(error).isprintable() or not str(error):
            return "FAILED", f"not one printable line: {str(error)!r}"
        return "refused", str(error)
    except BaseException as error:
        return "FAILED", f"{type(error).__name__}: {error}"
    return "accepted", ""


def virtual_memory() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def work_through(numbers: list[int], action: Callable[[int], tuple[str, str]], pipe: int) -> None:
    """In a child process: a line when a case begins and a line when it has ended."""
    limit = virtual_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        verdict, why = action(number)
        why = why[:300].encode("unicode_escape").decode()
        os.write(pipe, f"{number}\t{verdict}\t{why}\n".encode())
    os._exit(0)


@dataclass
class Result:
    """What became of the cases."""

    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, number: int, verdict: str, why: str, seconds: float) -> None:
        """One more case."""
        self.verdicts[verdict] += 1
        self.slowest = max(self.slowest, seconds)
        if verdict == "FAILED":
            self.failures.append((number, why))


def processor_seconds(process: int) -> float:
    """Time that a process has spent computing: a busy machine is not the file's fault."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_batch(numbers: list[int], action: Callable[[int], tuple[str, str]], result: Result) -> list[int]:
    """Run cases in a child process; the numbers that are still to do when it died or had to be stopped."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            work_through(numbers, action, writing)
        finally:
            os._exit(70)
    os.close(writing)
    chooser = selectors.DefaultSelector()
    chooser.register(reading, selectors.EVENT_READ)
    waiting = list(numbers)
    rest, begun, used, sleeping = b"", time.monotonic(), 0.0, ""
    while True:
        if not chooser.select(timeout=0.5):
            spent = processor_seconds(child) - used
            if spent > SECONDS or time.monotonic() - begun > 10 * SECONDS:
                os.kill(child, signal.SIGKILL)
                sleeping = f"more than {SECONDS:.0f} seconds"
            continue
        data = os.read(reading, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if b"\t" not in line:
                begun, used = time.monotonic(), processor_seconds(child)
                continue
            number, verdict, why = line.decode().split("\t", 2)
            result.add(int(number), verdict, why, time.monotonic() - begun)
            waiting.remove(int(number))
    _, status = os.waitpid(child, 0)
    os.close(reading)
    if waiting:
        how = sleeping or (
            f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {status >> 8}"
        )
        result.add(waiting.pop(0), "FAILED", how, time.monotonic() - begun)
    return waiting


def run_all(numbers: list[int], action: Callable[[int], tuple[str, str]]) -> Result:
    """Run all cases, in as many processes as it takes, one after the other."""
    result = Result()
    while numbers:
        left = run_batch(numbers[:BATCH], action, result)
        numbers = left + numbers[BATCH:]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000, help="cases in all, spread evenly over the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=specimens.KINDS, action="append", help="one kind of file (all)")
    parser.add_argument("--only", type=int, help="this number alone, without a process of its own")
    parser.add_argument(
        "--keep", type=Path, help="with --only: the directory in which the damaged model is left"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    sandbox.SECONDS = 0.5  # a quarter of what templates usually have: many here use all of it
    kinds = options.kind or specimens.KINDS
    failed, began = 0, time.monotonic()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        models = specimens.Specimens(place)
        for kind in kinds:

            def prepared(number: int, kind: str = kind) -> Path:
                work = options.keep or place / "work"
                specimens.empty(work)
                return models.damaged(kind, Random(f"{options.seed}/{kind}/{number}"), work)

            if options.only is not None:
                specimens.use(prepared(options.only))
                continue
            numbers = list(range(-(-options.count // len(kinds))))
            start = time.monotonic()
            result = run_all(numbers, lambda number: judge(lambda: specimens.use(prepared(number))))
            figures = ", ".join(
                f"{result.verdicts[verdict]} {verdict}" for verdict in ("accepted", "refused", "FAILED")
            )
            seconds = time.monotonic() - start
            print(
                f"{kind:12} {len(numbers):6} cases: {figures}; {seconds:.0f} s, slowest "
                f"{result.slowest:.2f} s",
                flush=True,
            )
            for number, why in result.failures:
                print(f"  FAILED --seed {options.seed} --kind {kind} --only {number}: {why}", flush=True)
            failed += len(result.failures)
            totals += result.verdicts
    figures = ", ".join(f"{totals[verdict]} {verdict}" for verdict in ("accepted", "refused", "FAILED"))
    print(f"{'all':12} {totals.total():6} cases: {figures}; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
