"""Compare runs or stages side by side: settings, measures, curves, cost, answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatwright.config import UsageError, parse

MOST = 8
"""Most runs that fit side by side."""


@dataclass(frozen=True)
class Config:
    """Settings of `chatwright compare`."""

    out: str = ""
    """Also write the comparison as Markdown into this file, with a PNG of overlaid curves per shared metric
    beside it."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: Sequence[str]) -> int:
    """`chatwright compare RUN_A RUN_B [...]`."""
    config, given = parse(
        Config,
        argv,
        prog="chatwright compare",
        description="Put runs, or stages of runs, side by side: settings that differ, measures with their "
        "intervals, curves, cost, and the answers to the same prompts. Says what "
        "makes the comparison unfair.",
        positionals={
            "run+": "Directories of two or more runs (runs/tiny), or of two or more stages (runs/tiny/ppo)."
        },
    )
    from chatwright.reports import compare_page
    from chatwright.reports.compare import align, compare
    from chatwright.reports.runs import read_run

    paths = [Path(one) for one in given["run"] or ()]
    if not 2 <= len(paths) <= MOST:
        raise UsageError(
            f"{len(paths)} directory given; compare takes two to {MOST}, for example runs/a runs/b"
        )
    if config.out:
        compare_page.check_target(Path(config.out))
    runs = [read_run(path) for path in paths]
    groups = align(runs)
    found = compare(runs, groups)
    if config.out:
        compare_page.write(found, groups, Path(config.out))
    if config.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        compare_page.show(found, Path(config.out) if config.out else None)
    return 0
