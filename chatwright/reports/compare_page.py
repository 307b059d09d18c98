"""Shows a comparison: tables in the terminal, or a Markdown file with pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatwright import files
from chatwright.config import UserError
from chatwright.metrics import console, say
from chatwright.reports.markdown import harmless, item, table
from chatwright.reports.report import COSTS, number
from chatwright.reports.runs import Stage
from chatwright.stage_folder import check_file_place

BARS = "▁▂▃▄▅▆▇█"
REPEATED = "the same settings, seed, inputs and results"
WIDTH = 24
"""Most characters of a sketched curve."""


LIMIT = 1e100
"""Values beyond this are drawn as this: matplotlib computes axes from differences and squares."""


@dataclass(frozen=True)
class Sheet:
    """One table of the page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def sketch(values: Sequence[float]) -> str:
    """A curve as one line of block characters, of the means over equal stretches."""
    count = min(WIDTH, len(values))
    parts = [values[n * len(values) // count : (n + 1) * len(values) // count] for n in range(count)]
    # Halves of the means: differences of finite halves are finite.
    means = [sum(value / len(one) / 2 for value in one) for one in parts]
    low, high = min(means), max(means)
    return "".join(BARS[round((one - low) / (high - low) * 7)] if high > low else BARS[3] for one in means)


def sheets(found: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[Sheet]:
    """The tables of one stage that have rows."""
    if stage["same"]:
        return
    labels = [run["label"] for run in found["runs"]]
    every = [
        Sheet(
            "Settings that differ",
            ("setting", *labels),
            [(one["setting"], *map(setting, one["values"])) for one in stage["settings"]],
        ),
        _measures(labels, stage["measures"]),
        Sheet(
            "The same prompts: mean of paired differences",
            ("measure", "difference", "95 % interval", "prompts", ""),
            [_paired(one) for one in stage["paired"]],
        ),
        Sheet(
            "Curves: first → last (lowest to highest)",
            ("metric", *labels),
            [_curve(one) for one in stage["curves"]],
        ),
        Sheet(
            "KL budget",
            ("", "nats per answer"),
            [(label, one or "-") for label, one in zip(labels, stage["kl_budget"] or (), strict=False)],
        ),
        Sheet(
            "Cost",
            ("", *labels, *(f"{label} / {labels[0]}" for label in labels[1:])),
            [_cost(one) for one in stage["cost"]],
        ),
        Sheet(
            "Answers to the same prompts, not chosen",
            ("prompt", *_sides(labels, stage["answers"])),
            [_answer(one, stage["answers"]) for one in stage["answers"]],
        ),
    ]
    yield from (one for one in every if one.rows)


def setting(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _measures(labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """The table of measures; the column of intervals only if some two can be compared."""
    known = any(text for one in rows for text in one["intervals"])
    columns = [
        "measure",
        *labels,
        *(f"{label} - {labels[0]}" for label in labels[1:]),
        *(["intervals"] if known else []),
    ]
    cells = [
        [*_measured(one), *(["; ".join(text for text in one["intervals"] if text)] if known else [])]
        for one in rows
    ]
    return Sheet("Measures: before → after (95 % interval of after)", columns, cells)


def _measured(one: Mapping[str, Any]) -> list[str]:
    cells = [one["measure"]]
    for value in one["values"]:
        text = "-" if value is None else f"{number(value['before'])} → {number(value['after'])}"
        if value is not None and value["interval"]:
            text += f" ({number(value['interval'][0])} to {number(value['interval'][1])})"
        cells.append(text)
    return [*cells, *("-" if value is None else f"{value:+.4g}" for value in one["differences"][1:])]


def _paired(one: Mapping[str, Any]) -> list[str]:
    first, other = one["runs"]
    low, high = one["interval"]
    verdict = (
        "the interval leaves out 0"
        if one["clear"]
        else "no difference"
        if low == high
        else "the interval holds 0: may be chance"
    )
    return [
        one["measure"],
        f"{other} - {first} = {one['difference']:+.4g}",
        f"{low:+.4g} to {high:+.4g}",
        str(one["prompts"]),
        verdict,
    ]


def _curve(one: Mapping[str, Any]) -> list[str]:
    name = f"{one['metric']}, {one['unit']}" if one["unit"] else one["metric"]
    cells = [
        "-"
        if value is None
        else f"{value['shape']} {number(value['first'])} → {number(value['last'])} "
        f"({number(value['lowest'])} to {number(value['highest'])}), to step {value['steps']:g}"
        for value in one["values"]
    ]
    return [name, *cells]


def _cost(one: Mapping[str, Any]) -> list[str]:
    name, write, _ = COSTS[one["cost"]]
    values = ["-" if value is None else write(value) for value in one["values"]]
    return [name, *values, *("-" if ratio is None else f"{ratio:.3g}" for ratio in one["ratios"][1:])]


def _one_start(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answers before training are the same in all runs, and can be shown once."""
    return all(len({text for text in one["before"] if text is not None}) == 1 for one in rows)


def _sides(labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if _one_start(rows):
        return ["before", *(f"{label} after" for label in labels)]
    return [f"{label} {side}" for label in labels for side in ("before", "after")]


def _answer(one: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    after = ["-" if text is None else text for text in one["after"]]
    if _one_start(rows):
        return [one["prompt"], next(text for text in one["before"] if text is not None), *after]
    before = ["-" if text is None else text for text in one["before"]]
    return [one["prompt"], *(text for pair in zip(before, after, strict=True) for text in pair)]


def show(found: Mapping[str, Any], out: Path | None) -> None:
    """Print the tables in the terminal."""
    from rich.table import Table
    from rich.text import Text

    for run in found["runs"]:
        say(f"{run['label']} = {harmless(run['path'])}")
    for remark in found["remarks"]:
        say(f"! {harmless(remark)}")
    for stage in found["stages"]:
        say(f"\n[{harmless(stage['stage'])}]{f' {REPEATED}' if stage['same'] else ''}")
        for sheet in sheets(found, stage):
            shown = Table(title=Text(sheet.title), title_justify="left")
            for column in sheet.columns:
                shown.add_column(Text(harmless(column)), overflow="fold")
            for row in sheet.rows:
                shown.add_row(*(Text(harmless(one)) for one in row))
            console.print(shown)
    if not found["stages"]:
        say("No stage is finished in both: nothing to compare.")
    if out is not None:
        say(f"\nThe comparison with pictures: {out}")


HEADING = "# Comparison"
"""The first line of a comparison: only files that begin with it are replaced."""


def check_target(out: Path, heading: str = HEADING) -> None:
    """Raise UserError when the comparison cannot go into this file: it is no place for a file, or holds
    something else than one, which begins with `heading`."""
    check_file_place(out, given=f"--out {out}")
    if not out.exists():
        return
    try:
        with out.open("rb") as file:
            ours = file.read(len(heading) + 1) == f"{heading}\n".encode()
    except OSError as error:
        raise UserError(f"--out {out} cannot be read: {error.strerror}") from None
    if not ours:
        raise UserError(f"--out {out} exists and is no comparison; name another file")


def write(found: Mapping[str, Any], groups: Mapping[str, Sequence[Stage | None]], out: Path) -> None:
    """Write the Markdown file, and a picture of each shared metric beside it. Raises UserError, and nothing
    is written, where a picture would replace another file than one of an earlier comparison in `out`."""
    check_pictures(found, out)
    lines = [HEADING, ""]
    lines += [f"- {run['label']} = {item(run['path'])}" for run in found["runs"]]
    if found["remarks"]:
        lines += [
            "",
            "What makes the comparison less than fair:",
            "",
            *(f"- {item(remark)}" for remark in found["remarks"]),
        ]
    for stage in found["stages"]:
        lines += ["", f"## {item(stage['stage'])}", *(["", REPEATED] if stage["same"] else [])]
        for sheet in sheets(found, stage):
            lines += ["", f"{sheet.title}:", "", *table(sheet.columns, sheet.rows)]
        for curve in () if stage["same"] else stage["curves"]:
            name = picture_name(out, stage, curve)
            series = [
                (run["label"], one.points(curve["metric"]) if one else [])
                for run, one in zip(found["runs"], groups[stage["stage"]], strict=True)
            ]
            overlay(out.parent / name, curve, series)
            lines += ["", f"![{item(curve['metric'])}]({name})"]
    files.write_text(out, "\n".join(lines) + "\n")


def picture_name(out: Path, stage: Mapping[str, Any], curve: Mapping[str, Any]) -> str:
    """The name of the picture of one metric, beside `out`."""
    return f"{plain(out.stem)}-{plain(stage['stage'])}-{plain(curve['metric'])}.png"


def check_pictures(found: Mapping[str, Any], out: Path) -> None:
    """Raise UserError when a picture of the comparison would replace a file that is none of an earlier
    comparison in `out`."""
    known = set(re.findall(r"!\[.*?\]\((.+?)\)", out.read_text(encoding="utf-8"))) if out.is_file() else set()
    for stage in found["stages"]:
        for curve in () if stage["same"] else stage["curves"]:
            name = picture_name(out, stage, curve)
            if (out.parent / name).exists() and name not in known:
                raise UserError(
                    f"--out {out}: the picture {out.parent / name} would be replaced, which is none of an "
                    f"earlier comparison in {out.name}; name another file"
                )


def plain(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w-]+", "_", text)[:80]


def overlay(
    file: Path, curve: Mapping[str, Any], series: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> None:
    """Draw one metric of all runs into one picture. Raises UserError when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in series:
        if points:
            places = [[max(-LIMIT, min(LIMIT, value)) for value in one] for one in zip(*points, strict=True)]
            axes.plot(*places, label=name, linewidth=1.4, marker="." if len(points) < 30 else "")
    axes.set_title(harmless(curve["metric"]).replace("$", r"\$"), fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(harmless(curve["unit"]).replace("$", r"\$"), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with files.whole_file(file) as aside:
        figure.savefig(aside, dpi=110, format="png")
