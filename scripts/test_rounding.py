"""Run the tests of what training achieves (marker `learns`) with several seeds, each under several
processors' rounding.

    make test-rounding                                   # all of it: some hours on 2 cores
    python scripts/test_rounding.py --seeds 1 2 --roundings native plain tests/stages/test_ppo.py

A processor with other vector instructions adds in another order; after some steps of training a run with
another rounding is another run. So a test may pass on one machine by luck. Here the libraries are told to do
without the newest instructions, and the seed of the tests is shifted (CHATWRIGHT_TEST_SEED). What each test
asked for with `learnt` is shown with the values found. A margin is called thin where another seed might well
fail: less than four standard deviations between the mean and the bound, and a worst value that clears the
bound by less than half of what the mean does. The exit code is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
ROUNDINGS = {
    "native": ("DEFAULT", {}),
    "avx512": (
        "AVX512",
        {
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "ATEN_CPU_CAPABILITY": "avx512",
        },
    ),
    "avx2": (
        "AVX2",
        {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    ),
    "plain": (
        "DEFAULT",
        {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    ),
}
"""Name -> the instructions it needs (in torch's words), and the environment that has MKL, oneDNN and torch
use no newer ones. MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors alone, MKL_CBWR on all."""
LEVELS = ("DEFAULT", "AVX2", "AVX512")


@dataclass
class Asked:
    """One number that a test compares with a bound, over all runs."""

    above: float | None
    below: float | None
    values: list[float] = field(default_factory=list)

    def row(self) -> list[str]:
        """Bound, worst value, mean, deviation, and whether the margin is thin."""
        bound = self.above if self.above is not None else self.below
        assert bound is not None
        side = 1 if self.above is not None else -1
        lead = [side * (value - bound) for value in self.values]
        mean, deviation = statistics.fmean(lead), statistics.pstdev(lead)
        thin = mean < 4 * deviation and min(lead) < 0.5 * mean
        return [
            f"{'>' if side > 0 else '<'} {bound:.3g}",
            f"{bound + side * min(lead):.3f}",
            f"{bound + side * mean:.3f}",
            f"{deviation:.3f}",
            "thin" if thin else "",
        ]


def available(needs: str) -> bool:
    """Whether this processor has these instructions. On others than x86 torch has names of its own, and all
    tests are native."""
    has = torch.backends.cpu.get_cpu_capability()
    return needs == "DEFAULT" or (has in LEVELS and LEVELS.index(has) >= LEVELS.index(needs))


def run(seed: int, rounding: str, pytest_args: list[str], report: Path) -> None:
    """The tests once, in processes of their own; what they said goes to `report`."""
    environment = {
        **os.environ,
        **ROUNDINGS[rounding][1],
        "CHATWRIGHT_TEST_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-m", "learns", "--tb=line", f"--junitxml={report}"]
    subprocess.run(
        [*command, *pytest_args], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, check=False
    )


def read(
    report: Path, asked: dict[tuple[str, str], Asked], failed: dict[str, dict[str, str]], variant: str
) -> int:
    """Add a run's outcome to the tables; the number of tests that ran."""
    if not report.is_file():
        raise SystemExit(f"pytest wrote no report with {variant}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        for trouble in [*case.iter("failure"), *case.iter("error")]:
            failed[name][variant] = (trouble.get("message") or "failed").splitlines()[0]
        for entry in case.iter("property"):
            told = json.loads(entry.get("value") or "{}")
            key = name, (entry.get("name") or "").removeprefix("learnt: ")
            asked.setdefault(key, Asked(told["above"], told["below"])).values.append(told["value"])
    return len(cases)


def show(rows: list[list[str]]) -> None:
    """Columns of equal width."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    """Run all variants, show the tables; 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--roundings", nargs="+", choices=list(ROUNDINGS), default=list(ROUNDINGS))
    options, pytest_args = parser.parse_known_args()
    asked: dict[tuple[str, str], Asked] = {}
    failed: dict[str, dict[str, str]] = defaultdict(dict)
    for rounding in options.roundings:
        if not available(ROUNDINGS[rounding][0]):
            print(f"{rounding}: this processor has no {ROUNDINGS[rounding][0]}; left out", flush=True)
            continue
        for seed in options.seeds:
            variant = f"seed {seed}, {rounding}"
            with tempfile.TemporaryDirectory() as directory:
                report = Path(directory) / "report.xml"
                run(seed, rounding, pytest_args, report)
                count = read(report, asked, failed, variant)
            wrong = [name for name, where in failed.items() if variant in where]
            print(f"{variant}: {count} tests, {len(wrong)} failed", flush=True)
    table = [[*key, *numbers.row()] for key, numbers in sorted(asked.items())]
    show([["test", "what", "asked", "worst", "mean", "deviation", ""], *table])
    for name, where in sorted(failed.items()):
        for variant, message in where.items():
            print(f"FAILED {name} ({variant}): {message}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
