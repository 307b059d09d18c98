"""Compares runs, or stages: settings, results and cost side by side, and whether the comparison is fair.

A difference counts as clear only in two cases: the two 95 % intervals do not overlap (a strict test: they may
overlap although the difference is real), or both were measured on the same prompts and the bootstrap interval
of the paired differences leaves out 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatwright.config import UsageError
from chatwright.evaluate.answers import SHOWN
from chatwright.reports import compare_page
from chatwright.reports.report import COSTS, kl_line
from chatwright.reports.runs import Run, Stage, finite
from chatwright.train.statistics import bootstrap_interval

FEWEST = 8
"""Prompts that two stages must share before their difference is tested."""


Group = Sequence[Stage | None]
"""One stage of each run, None where a run has not finished it."""


def align(runs: Sequence[Run]) -> dict[str, Group]:
    """Groups of stages to compare: the stages of runs by their names, or one group of all stages given by
    themselves. Raises UsageError for a mixture of runs and stages."""
    if len({run.whole for run in runs}) > 1:
        kinds = ", ".join(f"{run.path} is a {'run' if run.whole else 'stage'}" for run in runs)
        raise UsageError(f"runs go with runs and stages with stages: {kinds}")
    if not runs[0].whole:
        stages = [next(iter(run.stages.values())) for run in runs]
        return {" / ".join(dict.fromkeys(stage.name for stage in stages)): stages}
    names = dict.fromkeys(name for run in runs for name in run.stages)
    groups = {name: [run.stages.get(name) for run in runs] for name in names}
    return {name: group for name, group in groups.items() if sum(stage is not None for stage in group) > 1}


def compare(runs: Sequence[Run], groups: Mapping[str, Group]) -> dict[str, Any]:
    """The whole comparison, as the page, the tables and `--json` show it."""
    return {
        "runs": [{"label": label(number), "path": str(run.path)} for number, run in enumerate(runs)],
        "remarks": [*_missing(runs), *_unfair(groups)],
        "stages": [_stage(name, group) for name, group in groups.items()],
    }


def label(number: int) -> str:
    """A, B, C ..."""
    return chr(ord("A") + number)


def _labels(numbers: Sequence[int]) -> str:
    return ", ".join(map(label, numbers))


def _missing(runs: Sequence[Run]) -> list[str]:
    """Stages that not every run has, or has finished."""
    lines = []
    for name in (
        dict.fromkeys(name for run in runs for name in (*run.stages, *run.unfinished))
        if runs[0].whole
        else ()
    ):
        has = [number for number, run in enumerate(runs) if name in run.stages]
        begun = [number for number, run in enumerate(runs) if name in run.unfinished]
        if len(has) < len(runs):
            only = f"only in {_labels(has)}" if has else "finished in none"
            lines.append(f"{name}: {only}" + (f"; not finished in {_labels(begun)}" if begun else ""))
    return lines


def _unfair(groups: Mapping[str, Group]) -> list[str]:
    """Reasons why the comparison may be unfair, a line each."""
    lines = []
    everyone = [stage for group in groups.values() for stage in group if stage is not None]
    if any("seed" not in stage.result for stage in everyone):
        lines.append(
            "some results are of an older version and do not tell their seed and data: whether this is fair "
            "is not known"
        )
    seeds = _by_run(groups, "seed")
    if seeds:
        lines.append(
            f"the seeds differ ({seeds}): part of each difference is chance of the seed, which no interval "
            "here contains"
        )
    versions = _by_run(groups, "version")
    if versions:
        lines.append(f"the versions of chatwright differ ({versions})")
    other = [
        name
        for name, group in groups.items()
        if len({str(one.result["data"]) for one in group if one and one.result.get("data")}) > 1
    ]
    if other:
        lines.append(f"the data differ (stages {', '.join(other)}): what is held out is not the same")
    for name, group in groups.items():
        verbs = [f"{label(number)} {stage.verb}" for number, stage in enumerate(group) if stage]
        if len({stage.verb for stage in group if stage}) > 1:
            lines.append(f"{name}: different kinds of stages ({', '.join(verbs)})")
        if not seeds and not versions:  # with another seed or version, all inputs differ anyway
            lines += [f"{name}: {ROLES[role]}" for role in ROLES if _other_input(group, role)]
    return lines


ROLES = {
    "reward": "the reward models differ, and with them the unit of every score",
    "base": "it starts from different models: compare the changes, not the ends",
    "reference": "KL and the answers before are those of different models",
}
"""Setting that names an input -> the remark when the runs' inputs are not the same."""


def _by_run(groups: Mapping[str, Group], key: str) -> str:
    """'A 7, B 8' when the runs' results differ in `key`, else ""."""
    known: dict[int, Any] = {}
    for group in groups.values():
        for number, stage in enumerate(group):
            if stage is not None and stage.result.get(key) is not None:
                known.setdefault(number, stage.result[key])
    if len(set(map(str, known.values()))) < 2:
        return ""
    return ", ".join(f"{label(number)} {value}" for number, value in sorted(known.items()))


def _other_input(group: Group, role: str) -> bool:
    """Whether the fingerprints of the inputs that the setting `role` names differ."""
    stages = [stage for stage in group if stage]
    found = [(stage.result.get("inputs") or {}).get(str(stage.settings.get(role))) for stage in stages]
    return len({str(one) for one in found if one is not None}) > 1


def _same(group: Group) -> bool:
    """Whether all runs have the stage with the same settings, seed, inputs and measures."""
    stages = [stage for stage in group if stage]
    marks = {json.dumps([stage.result.get("fingerprint"), stage.result["measures"]]) for stage in stages}
    return len(stages) == len(group) and len(marks) == 1 and stages[0].result.get("fingerprint") is not None


def _stage(name: str, group: Group) -> dict[str, Any]:
    """One stage's comparison."""
    settings = dict.fromkeys(key for stage in group if stage for key in stage.settings)
    values = {key: [stage.settings.get(key) if stage else None for stage in group] for key in settings}
    kl = [kl_line(stage.result) if stage and stage.result.get("kl_budget") else None for stage in group]
    return {
        "stage": name,
        "same": _same(group),
        "settings": [{"setting": key, "values": row} for key, row in values.items() if _differ(row, group)],
        "measures": _measures(group),
        "paired": [
            row for number in range(1, len(group)) for row in _paired(group[0], group[number], number)
        ],
        "curves": _curves(group),
        "kl_budget": kl if any(kl) else None,
        "cost": _costs(group),
        "answers": _same_prompts(group),
    }


def _differ(row: Sequence[Any], group: Group) -> bool:
    """Whether a setting differs among the runs that have the stage."""
    return len({json.dumps(value, default=str) for value, stage in zip(row, group, strict=True) if stage}) > 1


def _measures(group: Group) -> list[dict[str, Any]]:
    """Held-out measures, then length and diversity of answers, in the order of the reports."""
    found: dict[str, list[dict[str, Any] | None]] = {}
    better: dict[str, str] = {}
    for number, stage in enumerate(group):
        if stage is None:
            continue
        told = [dict(one) for one in stage.result["measures"]]
        more = (stage.result.get("answers") or {}).get("measures", {})
        told += [
            {"name": key, "before": pair[0], "after": pair[1], "better": "context"}
            for key, pair in more.items()
        ]
        for one in told:
            row = found.setdefault(one["name"], [None] * len(group))
            row[number] = {key: one.get(key) for key in ("before", "after", "interval")}
            better.setdefault(one["name"], str(one.get("better", "context")))
    return [
        {
            "measure": name,
            "better": better[name],
            "values": row,
            "differences": _differences(row),
            "intervals": _overlap(row),
        }
        for name, row in found.items()
    ]


def _differences(row: Sequence[Mapping[str, Any] | None]) -> list[float | None]:
    """`after` of each run minus that of the first; None for the first."""
    after = [finite(one["after"]) if one else None for one in row]
    return [None] + [None if value is None or after[0] is None else value - after[0] for value in after[1:]]


def _overlap(row: Sequence[Mapping[str, Any] | None]) -> list[str | None]:
    """Whether the 95 % interval of each run overlaps with the first run's; None where one is missing."""
    spans = [one["interval"] if one else None for one in row]
    told: list[str | None] = [None]
    for span in spans[1:]:
        apart = spans[0] and span and (span[0] > spans[0][1] or span[1] < spans[0][0])
        told.append(None if not spans[0] or not span else "do not overlap" if apart else "overlap")
    return told


def _paired(first: Stage | None, other: Stage | None, number: int) -> list[dict[str, Any]]:
    """Mean differences (other minus first) on the prompts that both answered, with 95 % bootstrap intervals
    over prompts."""
    if first is None or other is None or not first.per_prompt or not other.per_prompt:
        return []
    places = [_places(stage.per_prompt["prompts"]) for stage in (first, other)]
    shared = [key for key in places[0] if key in places[1]]
    if len(shared) < FEWEST:
        return []
    rows = []
    for name, sides in first.per_prompt["values"].items():
        if name not in other.per_prompt["values"]:
            continue
        theirs = other.per_prompt["values"][name]["after"]
        change = torch.tensor(
            [float(theirs[places[1][key]]) - float(sides["after"][places[0][key]]) for key in shared]
        )
        low, high = bootstrap_interval(change, seed=0)
        rows.append(
            {
                "measure": name,
                "runs": [label(0), label(number)],
                "prompts": len(shared),
                "difference": float(change.mean()),
                "interval": [low, high],
                "clear": low > 0 or high < 0,
            }
        )
    return rows


def _places(prompts: Sequence[str]) -> dict[tuple[str, int], int]:
    """(prompt, how often it came before) -> its index. The count tells repeated prompts apart."""
    seen: Counter[str] = Counter()
    places = {}
    for place, prompt in enumerate(prompts):
        places[prompt, seen[prompt]] = place
        seen[prompt] += 1
    return places


def _curves(group: Group) -> list[dict[str, Any]]:
    """First, last, lowest and highest value of each metric that at least two runs have as a curve."""
    titles: dict[str, Mapping[str, Any]] = {}
    for stage in group:
        for curve in stage.result["curves"] if stage else ():
            for key in curve["keys"]:
                titles.setdefault(key, curve)
    rows = []
    for key, curve in titles.items():
        series = [stage.points(key) if stage else [] for stage in group]
        if sum(len(one) > 1 for one in series) > 1:
            rows.append(
                {
                    "metric": key,
                    "title": curve["title"],
                    "unit": curve.get("unit", ""),
                    "values": [
                        {
                            "first": one[0][1],
                            "last": one[-1][1],
                            "lowest": min(y for _, y in one),
                            "highest": max(y for _, y in one),
                            "steps": one[-1][0],
                            "shape": compare_page.sketch([y for _, y in one]),
                        }
                        if one
                        else None
                        for one in series
                    ],
                }
            )
    return rows


def _costs(group: Group) -> list[dict[str, Any]]:
    """Costs that are known for at least one run; `ratios` are to the first run."""
    known = [
        {"seconds": stage.result["seconds"], **(stage.result.get("cost") or {})} if stage else {}
        for stage in group
    ]
    rows = []
    for key in COSTS:
        values = [finite(one.get(key)) for one in known]
        if any(value is not None for value in values):
            first = values[0]
            ratios = [None] + [value / first if first and value is not None else None for value in values[1:]]
            rows.append({"cost": key, "values": values, "ratios": ratios})
    return rows


def _same_prompts(group: Group) -> list[dict[str, Any]]:
    """The answers to prompts that at least two runs show, for at most ten prompts."""
    found: dict[str, list[Mapping[str, str] | None]] = {}
    for number, stage in enumerate(group):
        for pair in stage.pairs if stage else ():
            found.setdefault(pair["prompt"], [None] * len(group))[number] = pair
    rows = [
        {
            "prompt": prompt,
            "before": [one["before"] if one else None for one in row],
            "after": [one["after"] if one else None for one in row],
        }
        for prompt, row in found.items()
        if sum(one is not None for one in row) > 1
    ]
    return rows[:SHOWN]
