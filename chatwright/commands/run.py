"""Run every stage of a recipe, from raw text to a chat model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatwright import discovery
from chatwright.config import UsageError
from chatwright.language_model import find_checkpoint
from chatwright.metrics import console, duration, say
from chatwright.pipeline import run_recipe
from chatwright.recipe import Recipe, parse_with_recipe
from chatwright.reports import report as reports
from chatwright.trackers import Reporting
from chatwright.train.parallel.start import process_group
from chatwright.train.stopping import Interrupted


@dataclass(frozen=True)
class RunConfig:
    """Settings of `chatwright run`. Any setting of a stage can follow as --STAGE.KEY VALUE."""

    out: str = "runs"
    """Directory in which the run's own directory is made."""
    name: str = ""
    """Name of the run; empty takes the recipe's."""
    seed: int = -1
    """Seed of everything random; -1 takes the recipe's."""
    until: str = ""
    """Stop after this stage."""
    report: Reporting = dataclasses.field(default_factory=Reporting)
    """Where metrics go beside metrics.jsonl, and what energy and hours cost. Changes no result."""


@process_group()
def main(argv: Sequence[str]) -> int:
    """`chatwright run RECIPE`."""
    config, _, recipe = parse_with_recipe(
        RunConfig,
        argv,
        prog="chatwright run",
        description="Run every stage of a recipe; finished stages are skipped. Any setting of a stage can "
        "be given as --STAGE.KEY VALUE behind the recipe, for example --pretrain.fit.seconds 60; `chatwright "
        f"run RECIPE --help` lists them. Stages that a recipe can have: {', '.join(discovery.stages())}.",
    )
    if config.seed >= 0:
        recipe = dataclasses.replace(recipe, seed=config.seed)
    if config.name:
        recipe = dataclasses.replace(recipe, name=config.name)
    root = Path(config.out) / recipe.name
    if Path(recipe.name).is_absolute() or not Path(recipe.name).parts or ".." in Path(recipe.name).parts:
        raise UsageError(f"--name {recipe.name} is no name of a run: a run is a folder inside {config.out}")
    config.report.check()
    try:
        results = run_recipe(recipe, root, until=config.until, reporting=config.report)
    except Interrupted as stop:
        say(str(stop))
        return 0
    print_results(root, recipe, results)
    return 0


def print_results(root: Path, recipe: Recipe, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the final table, one prompt after each stage, and the commands to try next."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Run {recipe.name}", title_justify="left")
    for column, side in (
        ("stage", "left"),
        ("measured on held-out data", "left"),
        ("before", "right"),
        ("after", "right"),
        ("time", "right"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for stage, result in results.items():
        for row in reports.table_rows(stage, result):
            table.add_row(*map(Text, row))
    total = sum(result["seconds"] for result in results.values())
    memory = max(result["memory_bytes"] for result in results.values())
    table.add_section()
    table.add_row("total", f"largest resident size {memory / 1e9:.1f} GB", "", "", duration(total))
    console.print(table)
    say(f"\nOne prompt, {recipe.prompt!r}, after each stage:")
    for stage, result in results.items():
        if result.get("sample"):
            say(
                f"  {stage:9} {result['sample']!r}"
                if stage not in ("reward", "classifier")
                else f"  {stage:9} {result['sample']}"
            )
    say(f"\nThe report with pictures: {root / 'report.md'}")
    say(what_next(root))


def what_next(root: Path) -> str:
    """The commands that a finished run is for: a base model continues a text, a chat model answers."""
    found = find_checkpoint(root)
    if found is None:
        return "Next:  the same command without --until: no stage has made a language model yet"
    if not (found.path / "chat_template.jinja").is_file():
        return (
            f'Next:  chatwright generate {root} --prompt "Once upon a time"\n'
            "       (a base model: it continues a text; it answers after the sft stage)"
        )
    return (
        f"Next:  chatwright chat {root}      (or: make chat)\n"
        f"       chatwright serve {root}     (or: make serve)"
    )
