"""Check a recipe or a model before the hours are spent; a finding comes with its remedy.

Nothing is trained, no data is downloaded, and nothing is left on the disk. A finding is `ok`, a `warning` (it
works but perhaps not as meant, or something is not possible) or a `problem` (it will fail, or do something
unexpected). With a problem the exit code is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatwright.commands.doctor.finding import STYLES, Finding
from chatwright.config import UsageError, UserError, harmless, parse
from chatwright.data.picture import legend

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class DoctorConfig:
    """What is looked at beside the model or recipe itself."""

    dialogue: str = ""
    """Conversations of yours (.jsonl with a column `messages`, .json, .parquet): shows the loss mask of the
    first and counts what would be cut or left out among the first 1,000. For models only."""


def main(argv: Sequence[str]) -> int:
    """Check a model or a recipe; returns 1 if there is a problem. Raises UserError for an unknown name."""
    config, positionals = parse(
        DoctorConfig,
        argv,
        prog="chatwright doctor",
        description=(
            "Check RECIPE_OR_MODEL before the hours are spent. Nothing is trained, no data downloaded, and "
            "nothing left on the disk."
        ),
        positionals={
            "recipe_or_model": "A recipe (a .yaml file, or the name of a built-in one), or a model: a run, "
            "a model directory, smollm2, hf:owner/name or a .gguf file."
        },
    )
    name = str(positionals["recipe_or_model"])
    picture: Text | None = None
    if is_recipe(name):
        if config.dialogue:
            raise UsageError(
                "--dialogue shows what a model learns from; give it with a model instead of a recipe"
            )
        from chatwright.commands.doctor.recipe import check_recipe

        findings = check_recipe(name)
    else:
        from chatwright.commands.doctor.model import check_model

        findings, picture = check_model(name, config.dialogue)
    return show(findings, picture)


def is_recipe(name: str) -> bool:
    """Whether a name means a recipe. Raises UserError when it means neither a recipe nor a model."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.exists() or name == "smollm2" or name.startswith("hf:"):
        return False
    from chatwright.recipe import find_recipe

    try:
        find_recipe(name)
    except UsageError:
        raise UserError(
            f"{name!r} is no recipe (a .yaml file, or tiny) and no model (a directory, .gguf file, smollm2, "
            "hf:owner/name)"
        ) from None
    return True


def show(findings: Sequence[Finding], picture: Text | None) -> int:
    """Print the findings and the loss mask; returns the exit code."""
    from rich.text import Text

    from chatwright.metrics import console

    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.level:8}", style=STYLES[finding.level])
        line.append(f" {finding.topic:{width}}  ", style="bold").append(
            harmless(finding.text), style="default not bold"
        )
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':{width + 11}}-> {harmless(finding.remedy)}"), soft_wrap=True)
    if picture is not None:
        shown = legend(colours=console.is_terminal)
        console.print(
            Text("\nThe loss mask; what the model learns to write is ").append(shown), soft_wrap=True
        )
        console.print(picture, soft_wrap=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    summary = f"{len(findings)} checks: {counts['problem']} problems, {counts['warning']} warnings"
    console.print(Text(f"\n{summary}", style="red" if counts["problem"] else "default"))
    return 1 if counts["problem"] else 0
