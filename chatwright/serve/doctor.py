"""The verb `doctor`: the checks that save hours, of a model or of a recipe, each finding with its remedy.

Nothing is trained, no data downloaded, and nothing left on the disk. What is found is `ok`, a `warning` (it works, but
perhaps not as meant, or is not possible) or a `problem` (it will fail, or do something else than it seems); with a problem
the exit code is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chatwright.config import UsageError, UserError, parse
from chatwright.serve.terminal import harmless

if TYPE_CHECKING:
    from rich.text import Text

    from chatwright.chat import EncodedChat
    from chatwright.tokenizer import Tokenizer

Level = Literal["ok", "warning", "problem"]
LEARNT = "black on green"
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    level: Level
    topic: str
    text: str
    remedy: str = ""
    """What to do about it; empty when there is nothing to do."""


@dataclass(frozen=True)
class DoctorConfig:
    """What is looked at beside the model or recipe itself."""

    dialogue: str = ""
    """Conversations of yours (.jsonl with a column `messages`, .json, .parquet): shows the loss mask of the first and
    counts what would be cut or left out among the first 1,000. For models only."""


def main_doctor(argv: Sequence[str]) -> int:
    """Check a model or a recipe; 1 when there is a problem. Raises UserError when the name leads nowhere."""
    config, positionals = parse(
        DoctorConfig,
        argv,
        prog="chatwright doctor",
        description="Check RECIPE_OR_MODEL before the hours are spent. Nothing is trained, no data downloaded, and nothing left on the disk.",
        positionals={
            "recipe_or_model": "A recipe (a .yaml file, or the name of a built-in one), or a model: a run, a model "
            "directory, smollm2, hf:owner/name or a .gguf file."
        },
    )
    name = str(positionals["recipe_or_model"])
    picture: Text | None = None
    if is_recipe(name):
        if config.dialogue:
            raise UsageError("--dialogue shows what a model learns from; give it with a model instead of a recipe")
        from chatwright.serve.doctor_recipe import check_recipe

        findings = check_recipe(name)
    else:
        from chatwright.serve.doctor_model import check_model

        findings, picture = check_model(name, config.dialogue)
    return show(findings, picture)


def is_recipe(name: str) -> bool:
    """Whether a name means a recipe. Raises UserError when it means neither a recipe nor a model."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.exists() or name == "smollm2" or name.startswith("hf:"):
        return False
    from chatwright.pipeline import find_recipe

    try:
        find_recipe(name)
    except UsageError:
        raise UserError(f"{name!r} is no recipe (a .yaml file, or tiny) and no model (a directory, .gguf file, smollm2, "
                        "hf:owner/name)") from None  # fmt: skip
    return True


def show(findings: Sequence[Finding], picture: Text | None) -> int:
    """Print the findings and the loss mask; returns the exit code."""
    from rich.text import Text

    from chatwright.metrics import console

    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.level:8}", style=STYLES[finding.level])
        line.append(f" {finding.topic:{width}}  ", style="bold").append(harmless(finding.text), style="default not bold")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':{width + 11}}-> {harmless(finding.remedy)}"), soft_wrap=True)
    if picture is not None:
        legend = Text("like this", style=LEARNT) if console.is_terminal else Text("in [[brackets]]")
        console.print(Text("\nThe loss mask; what the model learns to write is ").append(legend), soft_wrap=True)
        console.print(picture, soft_wrap=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    summary = f"{len(findings)} checks: {counts['problem']} problems, {counts['warning']} warnings"
    console.print(Text(f"\n{summary}", style="red" if counts["problem"] else "default"))
    return 1 if counts["problem"] else 0


def mask_picture(encoded: EncodedChat, tokenizer: Tokenizer, *, end: str, colours: bool) -> Text:
    """A conversation as the model sees it: learnt stretches on green, or in [[brackets]] where there are no colours.

    Control tokens are shown by their names. A line break follows each `end` of a turn, for the eye.
    """
    from rich.text import Text

    picture = Text()
    start = 0
    while start < len(encoded.ids):
        stop = start
        while stop < len(encoded.ids) and encoded.mask[stop] == encoded.mask[start]:
            stop += 1
        text = harmless(_spelled(encoded.ids[start:stop], tokenizer))
        if encoded.mask[start]:
            picture.append(text if colours else f"[[{text}]]", style=LEARNT)
        else:
            picture.append(text, style="dim")
        following = tokenizer.token_bytes(encoded.ids[stop]) if stop < len(encoded.ids) else b"\n"
        if encoded.ids[stop - 1] == tokenizer.control_ids.get(end) and not following.startswith(b"\n"):
            picture.append("\n")
        start = stop
    return picture


def _spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of ids with control tokens by name; bytes of neighbouring tokens are joined before they are decoded."""
    names = {number: name for name, number in tokenizer.control_ids.items()}
    parts = [names[number].encode() if number in names else tokenizer.token_bytes(number) for number in ids]
    return b"".join(parts).decode("utf-8", errors="replace")
