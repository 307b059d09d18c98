"""Shows models side by side: tables in the terminal, or a Markdown file."""

from __future__ import annotations

from pathlib import Path

from chatwright import files
from chatwright.evaluate.model_comparison import ModelComparison, shown
from chatwright.metrics import console, say
from chatwright.reports.compare import label
from chatwright.reports.compare_page import Sheet
from chatwright.reports.markdown import harmless, item, table
from chatwright.reports.report import number

LONGEST = 2_000
"""Most characters of an answer that are shown."""


def sheets(found: ModelComparison) -> list[Sheet]:
    """The table of measures, and the table of answers."""
    labels = [label(n) for n in range(len(found.models))]
    against = [f"{one} - {labels[0]}" for one in labels[1:]]
    measures = [
        (
            row["measure"],
            *map(number, row["values"]),
            *(row["differences"] or ["-"] * len(against)),
        )
        for row in found.rows
    ]
    answers = []
    for n, prompt in enumerate(found.prompts):
        cells = [_answer(found, side, n) for side in range(len(labels))]
        answers.append((shown(prompt), *cells))
    return [
        Sheet("Measures", ("", *labels, *against), measures),
        Sheet("Answers to the same prompts, all of them", ("prompt", *labels), answers),
    ]


def _answer(found: ModelComparison, side: int, n: int) -> str:
    one = found.models[side]
    score = f"[{one.scores[n]:+.2f}] " if one.scores else ""
    cut = "" if one.ended[n] else f" (cut at {found.most} tokens)"
    return f"{score}{one.texts[n]}{cut}"


def heads(found: ModelComparison) -> list[str]:
    """A line for each model: its label, its name, and how it was sampled."""
    return [
        f"{label(n)} = {one.name}, sampled at {one.sampling}, at most {found.most} tokens, seed {found.seed}"
        for n, one in enumerate(found.models)
    ]


def show(found: ModelComparison, out: Path | None) -> None:
    """Print the tables in the terminal."""
    from rich.table import Table
    from rich.text import Text

    for line in heads(found):
        say(harmless(line))
    for sheet in sheets(found):
        shown_table = Table(title=Text(sheet.title), title_justify="left", show_lines=True)
        for column in sheet.columns:
            shown_table.add_column(Text(harmless(column)), overflow="fold")
        for row in sheet.rows:
            shown_table.add_row(*(Text(harmless(one, longest=LONGEST)) for one in row))
        console.print(shown_table)
    if out is not None:
        say(f"The comparison as a page: {out}")


HEADING = "# Models side by side"
"""The first line of a comparison of models: only files that begin with it are replaced."""


def write(found: ModelComparison, out: Path) -> None:
    """Write the Markdown file."""
    lines = [HEADING, "", *(f"- {item(line)}" for line in heads(found))]
    for sheet in sheets(found):
        lines += ["", f"{sheet.title}:", "", *table(sheet.columns, sheet.rows)]
    files.write_text(out, "\n".join(lines) + "\n")
