"""Writes report.md, with pictures: the measurements of a stage, and of a whole run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatwright import files
from chatwright.metrics import duration, read_metrics
from chatwright.reports.markdown import cell, item, table
from chatwright.train.paper import shown

Result = Mapping[str, Any]


def draw_curves(directory: Path, curves: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw `curves.png` in a stage's directory from its metrics.jsonl; None when there is nothing to draw."""
    rows = read_metrics(directory / "metrics.jsonl")
    drawable = [
        (curve, [key for key in curve["keys"] if sum(row.get(key) is not None for row in rows) > 1])
        for curve in curves
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
    """A measured value as text: three decimals, none from 1000 on; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def table_rows(name: str, result: Result) -> list[tuple[str, str, str, str, str]]:
    """Rows (stage, measure, before, after, minutes) of one stage; name and minutes on the first row only."""
    rows = []
    for place, measure in enumerate(result["measures"]):
        note = f" ({measure['note']})" if measure.get("note") else ""
        first = place == 0
        rows.append(
            (
                name if first else "",
                measure["name"] + note,
                number(measure["before"]),
                number(measure["after"]),
                duration(result["seconds"]) if first else "",
            )
        )
    return rows or [(name, "", "-", "-", duration(result["seconds"]))]


def write_stage_report(directory: Path, name: str, result: Result) -> None:
    """Write report.md of one stage. A section without content says so; a stage that trains no policy has no
    sections about one."""
    lines = [f"# {item(name)}", "", f"Took {duration(result['seconds'])} (minutes:seconds).", ""]
    for warning in result.get("warnings", ()):
        lines += [f"**Warning:** {cell(warning)}", ""]
    lines += table(("measure", "before", "after"), [row[1:4] for row in table_rows(name, result)])
    for one in result.get("tables", ()):
        lines += ["", f"{item(one['title'])}:", "", *table(one["columns"], one["rows"])]
    lines += ["", *map(_note, result["notes"])] if result["notes"] else []
    if "paper" in result:
        lines += ["", "## Settings that differ from the paper's", "", *_paper(result["paper"])]
    picture = draw_curves(directory, result["curves"])
    if picture is not None:
        lines += ["", "## Curves", "", f"![curves of {cell(name)}]({picture.name})"]
    for file in result.get("pictures", ()):
        lines += ["", f"![{cell(Path(file).stem)} of {cell(name)}]({file})"]
    if "paper" in result:
        lines += ["", "## Before and after", "", *_answers(directory, result)]
        lines += ["", "## KL budget", "", item(kl_line(result))]
    if "cost" in result:
        lines += ["", "## Cost", "", *table(("", "whole stage"), cost_rows(result["cost"]))]
    facts = {key: value for key, value in result["facts"].items() if "cost" not in result or key not in COSTS}
    lines += ["", "## Facts", "", *(f"- {key}: {cell(str(value))}" for key, value in facts.items())]
    files.write_text(directory / "report.md", "\n".join(lines) + "\n")


def _note(text: str) -> str:
    """A note as a list item; an empty one, or one that ends with a colon, becomes a paragraph."""
    if not text or text.endswith(":"):
        return item(text)
    return "- " + item(text.removeprefix("- "))


def _paper(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the settings that differ, and a line with those that do not."""
    if not rows:
        return ["The papers of this method give no value for any of its settings."]
    differ = [
        (row["setting"], shown(row["ours"]), row["paper"], row["source"]) for row in rows if not row["same"]
    ]
    same = [row["setting"] for row in rows if row["same"]]
    lines = table(("setting", "ours", "paper", "source"), differ) if differ else ["None."]
    lines += ["", f"As in the paper: {cell(', '.join(same))}."] if same else []
    return [*lines, "", "Departures of method stand at the top of the stage's module, and in docs/papers.md."]


def _answers(directory: Path, result: Result) -> list[str]:
    """The first pairs of answers, then length and diversity of all answers."""
    answers, file = result.get("answers"), directory / "pairs.json"
    if not answers or not file.is_file():
        return ["There are no answers: see the notes above, or the stage made no model."]
    pairs, names = files.read_json(file), (answers["before"], answers["after"])
    what = (
        f"The first {len(pairs)} of {answers['prompts']} held-out prompts, not chosen; both sides with the "
        "same seeds."
    )
    if answers.get("sampling"):
        what = f"{what.removesuffix('.')}, sampled at {item(answers['sampling'])}."
    if not answers["measures"]:  # a reward model's pairs: it does not write answers
        what = f"The first {len(pairs)} held-out pairs of answers that are no tie, not chosen otherwise."
    lines = [what, ""]
    lines += table(
        ("", "prompt", *names),
        [(str(n), pair["prompt"], pair["before"], pair["after"]) for n, pair in enumerate(pairs, 1)],
    )
    if answers["measures"]:
        lines += ["", f"Length and diversity of the answers to all {answers['prompts']} prompts:", ""]
        lines += table(
            ("", *names), [(key, number(one[0]), number(one[1])) for key, one in answers["measures"].items()]
        )
    if answers["kl"] is not None:
        lines += [
            "",
            f"KL of the second from the first on its own answers: {number(answers['kl'])} nats per answer.",
        ]
    return lines


def kl_line(result: Result) -> str:
    """How much of the KL budget was spent, and why training ended there."""
    known = result.get("kl_budget")
    if not known:
        return "no budget: this stage has no reference to stay near."
    spent, allowed = known["spent"], known["allowed"]
    parts = [
        f"spent {number(spent)} of {number(allowed)} nats per answer"
        if allowed is not None
        else f"spent {number(spent)} nats per answer; no budget was set"
    ]
    if known.get("largest") is not None:
        parts.append(f"the most in any iteration was {number(known['largest'])}")
    ended = known.get("iteration", known.get("round"))  # "round" in runs of before 0.2
    if ended is not None:
        kept = "nothing was kept" if known.get("kept") is None else f"the best iteration was {known['kept']}"
        parts.append(f"ended in iteration {ended}, {kept}")
    return "; ".join([*parts, str(known["stopped"])]) + "."


def cost_rows(cost: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rows (name, value as text) of a stage's cost; an unknown value says why."""
    rows = []
    for key, (name, say, absent) in COSTS.items():
        rows.append((name, say(cost[key]) if key in cost else absent))
    return rows


COSTS: Mapping[str, tuple[str, Callable[[float], str], str]] = {
    "seconds": ("time", duration, "not known"),
    "tokens": ("tokens learnt from, or sampled", "{:,.0f}".format, "not counted"),
    "flop": ("floating-point operations", "{:.3g}".format, "not counted"),
    "energy_kwh": ("energy", "{:.4g} kWh".format, "not known (no meter; report.watts is not set)"),
    "cost": ("price", "{:.4g}".format, "not known (report.price is not set)"),
    "memory_bytes": ("largest resident size so far", lambda value: f"{value / 1e9:.2f} GB", "not known"),
}
"""Key in result.json -> its name in a report, its formatter, the text when it is not known."""


def write_run_report(directory: Path, name: str, results: Mapping[str, Result], prompt: str) -> str:
    """Write report.md of a whole run, with the pictures of its stages; returns its text."""
    total = sum(result["seconds"] for result in results.values())
    lines = [f"# Run {cell(name)}", "", f"{len(results)} stages in {duration(total)} (minutes:seconds).", ""]
    lines += table(
        ("stage", "measured on held-out data", "before", "after", "time"),
        [row for stage, result in results.items() for row in table_rows(stage, result)],
    )
    warned = [(stage, text) for stage, result in results.items() for text in result.get("warnings", ())]
    for stage, text in warned:
        lines += ["", f"**Warning, {cell(stage)}:** {cell(text)}"]
    lines += ["", f"## One prompt after each stage: {cell(prompt)}", ""]
    for stage, result in results.items():
        if result.get("sample"):
            lines.append(f"- **{stage}**: {cell(result['sample'])}")
    lines += _summary(results)
    for stage in results:
        if (directory / stage / "curves.png").is_file():
            lines += [
                "",
                f"## {stage}",
                "",
                f"![curves of {stage}]({stage}/curves.png)",
                "",
                f"More: [{stage}/report.md]({stage}/report.md)",
            ]
    text = "\n".join(lines) + "\n"
    files.write_text(directory / "report.md", text)
    return text


def _summary(results: Mapping[str, Result]) -> list[str]:
    """A summary of the stages' reports: settings, length and diversity, KL and cost."""
    told = {stage: result for stage, result in results.items() if "paper" in result}
    lines: list[str] = []
    if told:
        lines += [
            "",
            "## Alignment in short",
            "",
            "Ten pairs of answers, and the settings that differ from the paper's, stand in each stage's "
            "report.",
            "",
        ]
        for stage, result in told.items():
            differ = sum(not row["same"] for row in result["paper"])
            papers = (
                f"{differ} of the papers' {len(result['paper'])} settings differ. " if result["paper"] else ""
            )
            lines.append(f"- [{stage}]({stage}/report.md): {papers}KL: {cell(kl_line(result))}")
        rows = [
            (stage, key, number(one[0]), number(one[1]))
            for stage, result in told.items()
            if result["answers"]
            for key, one in result["answers"]["measures"].items()
        ]
        lines += (
            ["", *table(("stage", "answers to held-out prompts", "before", "after"), rows)] if rows else []
        )
    costs = {stage: result["cost"] for stage, result in results.items() if "cost" in result}
    if costs:
        spent = [(stage, *(value for _, value in cost_rows(cost))) for stage, cost in costs.items()]
        columns = ("stage", *(name for name, _, _ in COSTS.values()))
        lines += ["", "## Cost", "", *table(columns, [*spent, ("total", *_total(costs.values()))])]
    return lines


def _total(costs: Collection[Mapping[str, float]]) -> list[str]:
    """The sums over the stages (a sum over fewer than all says so), and the largest memory."""
    total = {key: sum(cost[key] for cost in costs if key in cost) for cost in costs for key in cost}
    total["memory_bytes"] = max(cost["memory_bytes"] for cost in costs)
    part = {key for key in total if sum(key in cost for cost in costs) < len(costs)}
    cells = [value for _, value in cost_rows(total)]
    return [
        f"{value} (of the stages that count)" if key in part else value
        for key, value in zip(COSTS, cells, strict=True)
    ]
