"""report.md: what a stage, and a whole run, measured; with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatwright import checkpoint
from chatwright.metrics import duration, read_metrics

Result = Mapping[str, Any]


def draw_curves(directory: Path, curves: Sequence[Mapping[str, Any]]) -> Path | None:
    """`curves.png` in a stage's directory from its metrics.jsonl; None when there is nothing to draw."""
    rows = read_metrics(directory / "metrics.jsonl")
    drawable = [
        (curve, [key for key in curve["keys"] if sum(row.get(key) is not None for row in rows) > 1]) for curve in curves
    ]
    drawable = [(curve, keys) for curve, keys in drawable if keys]
    if not drawable:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(drawable))
    lines = -(-len(drawable) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (curve, keys) in enumerate(drawable, 1):
        axes = figure.add_subplot(lines, columns, place)
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=key, linewidth=1.4)
        axes.set_title(curve["title"], fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(curve.get("unit", ""), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=8)
    file = directory / "curves.png"
    aside = directory / ".curves.partial.png"
    figure.savefig(aside, dpi=110)
    aside.replace(file)
    return file


def number(value: float | None) -> str:
    """A measured value for people: three significant decimals, a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def table_rows(name: str, result: Result) -> list[tuple[str, str, str, str, str]]:
    """Rows (stage, measure, before, after, minutes) of one stage; name and minutes on the first row only."""
    rows = []
    for place, measure in enumerate(result["measures"]):
        note = f" ({measure['note']})" if measure.get("note") else ""
        first = place == 0
        rows.append((
            name if first else "", measure["name"] + note, number(measure["before"]), number(measure["after"]),
            duration(result["seconds"]) if first else "",
        ))  # fmt: skip
    return rows or [(name, "", "-", "-", duration(result["seconds"]))]


def _cell(text: str) -> str:
    """Text that stays inside a cell of a Markdown table and is not read as markup."""
    for character in "\\|`<>*_[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def write_stage_report(directory: Path, name: str, result: Result) -> None:
    """report.md of one stage."""
    lines = [f"# {name}", "", f"Took {duration(result['seconds'])} (minutes:seconds).", ""]
    lines += ["| measure | before | after |", "|---|---|---|"]
    lines += [f"| {row[1]} | {row[2]} | {row[3]} |" for row in table_rows(name, result)]
    for table in result.get("tables", ()):
        lines += ["", f"{_cell(table['title'])}:", "", _row(table["columns"]), _row(["---"] * len(table["columns"]), raw=True)]
        lines += map(_row, table["rows"])
    picture = draw_curves(directory, result["curves"])
    if picture is not None:
        lines += ["", f"![curves of {name}]({picture.name})"]
    for file in result.get("pictures", ()):
        lines += ["", f"![{Path(file).stem} of {name}]({file})"]
    lines += ["", *map(_note, result["notes"])]
    lines += ["", "Facts:", "", *(f"- {key}: {value}" for key, value in result["facts"].items())]
    checkpoint.write_text(directory / "report.md", "\n".join(lines) + "\n")


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells if raw else map(_cell, cells))} |"


def _note(text: str) -> str:
    """A note as an item of a list; what is empty, or introduces others with a colon, stands by itself."""
    if not text or text.endswith(":"):
        return _cell(text)
    return "- " + _cell(text.removeprefix("- "))


def write_run_report(directory: Path, name: str, results: Mapping[str, Result], prompt: str) -> str:
    """report.md of a whole run, with the pictures of its stages; returns its text."""
    total = sum(result["seconds"] for result in results.values())
    lines = [f"# Run {name}", "", f"{len(results)} stages in {duration(total)} (minutes:seconds).", ""]
    lines += ["| stage | measured on held-out data | before | after | time |", "|---|---|---|---|---|"]
    for stage, result in results.items():
        lines += [f"| {' | '.join(row)} |" for row in table_rows(stage, result)]
    lines += ["", f"## One prompt after each stage: {_cell(prompt)}", ""]
    for stage, result in results.items():
        if result.get("sample"):
            lines.append(f"- **{stage}**: {_cell(result['sample'])}")
    for stage in results:
        if (directory / stage / "curves.png").is_file():
            lines += ["", f"## {stage}", "", f"![curves of {stage}]({stage}/curves.png)", "",
                      f"More: [{stage}/report.md]({stage}/report.md)"]  # fmt: skip
    text = "\n".join(lines) + "\n"
    checkpoint.write_text(directory / "report.md", text)
    return text
