"""The outcome of an RL run: which policy is the result, and the report.

The report's measures are those of the result on held-out prompts, beside those of the model that training
started from on the same prompts with the same seeds. A difference is said to be one only where the 95 %
interval of the paired differences leaves out 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatwright.metrics import read_metrics
from chatwright.train.rl.fixed_prompts import Answers
from chatwright.train.statistics import bootstrap_interval, paired_difference
from chatwright.train.workspace import Curve, Measure, Report, Workspace

SCORE, GOLD = "reward model's score, held-out prompts", "gold measure, held-out prompts"
KL = "KL to the SFT model"

COMMON = (
    Curve("Reward model's score", ["score", "fixed_score"]),
    Curve("KL to the SFT model", ["kl", "kl_k3", "fixed_kl"], "nats per answer"),
    Curve("Entropy", ["entropy"], "nats per token"),
    Curve("Answer length", ["length"], "tokens"),
    Curve("Gold measure", ["gold", "fixed_gold"]),
)
"""Curves of every method; a curve without numbers is not drawn."""


def result_of(extra: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """Step and values of the policy that is the result: the EMA where there is one and it is allowed, else
    the policy of the best iteration, if any."""
    average = extra.get("average")
    if average is not None and average["allowed"]:
        return {"step": step, **average}
    best: dict[str, Any] | None = extra["best"]
    return best


def report_of(
    extra: Mapping[str, Any],
    step: int,
    *,
    selection_metric: str,
    curves: Sequence[Curve] = (),
    held_out: tuple[Answers, Answers] | None = None,
    tax: tuple[float, float] | None = None,
    trouble: str = "",
    more: Mapping[str, Any] | None = None,
    seed: int = 0,
    note: str = "",
) -> Report:
    """The report of a run that has a result, or of one that was stopped as unhealthy (`trouble` says why).

    `held_out` are the answers of the model that training started from and of the result to the held-out
    prompts, `note` says where these come from. `tax` is the perplexity of general text before and after,
    `selection_metric` what chose the checkpoint, `more` further facts.
    """
    result = result_of(extra, step)
    stopped = trouble or extra["stopped"]
    facts: dict[str, Any] = {
        "best": extra["best"],
        "iterations": step - ("average" in extra),
        "stopped": stopped,
        **(more or {}),
    }
    measures: list[Measure] = []
    notes: list[str] = []
    if held_out is not None:
        measures, notes, facts["held_out"] = held_out_measures(*held_out, seed)
    elif trouble and result is not None:
        measures = [Measure(KL, 0.0, result["kl"], "context", note="nats per answer, fixed training prompts")]
    if tax is not None:
        measures.append(Measure("perplexity of general text", *tax, note="per token; the alignment tax"))
    if trouble:
        notes = [f"broken off: {trouble}; the checkpoint is the state before that iteration"]
    elif result is not None:
        if "average" in extra:
            facts["average"] = extra["average"]
        notes.append(_kept(extra, result, selection_metric))
        if held_out is None:
            notes.append("nothing was measured: there are no held-out prompts, and too few to leave any out")
    notes += [note] if note else []
    model = None if result is None or trouble else f"checkpoints/step-{result['step']:06}"
    return Report(measures, [*COMMON, *curves], model, facts, notes)


def _kept(extra: Mapping[str, Any], result: Mapping[str, Any], selection_metric: str) -> str:
    """Why training stopped, and which policy is the result."""
    stopped, average = extra["stopped"], extra.get("average")
    if average is not None and average["allowed"]:
        return f"stopped: {stopped}; kept: the average of the weights"
    why = f"the best {selection_metric} on the fixed prompts within the KL budget"
    if average is not None:
        why = "the best iteration: the average was beyond the limits"
    elif result["step"] == 0:
        why = "the model that training started from: no later candidate was better on the fixed prompts"
    return f"stopped: {stopped}; kept: iteration {result['step']}, {why}"


def held_out_measures(
    before: Answers, after: Answers, seed: int
) -> tuple[list[Measure], list[str], dict[str, Any]]:
    """Measures of two models on the same held-out prompts, lines on whether anything was shown, and the same
    as numbers: name of a measure -> {difference, interval, prompts}."""
    measures: list[Measure] = []
    notes: list[str] = []
    facts: dict[str, Any] = {}
    for key, name in (("score", SCORE), ("gold", GOLD)):
        sides = getattr(before, key), getattr(after, key)
        if not sides[1]:
            continue
        difference = paired_difference(*sides, seed=seed)
        interval = bootstrap_interval(torch.tensor(sides[1]), seed=seed)
        means = (before.means()[key], after.means()[key])
        measures.append(Measure(name, *means, "higher", difference.told(), interval))
        notes.append(f"{name}: {difference.told()}")
        facts[key] = {
            "difference": difference.mean,
            "interval": list(difference.interval),
            "prompts": difference.count,
        }
    kl = after.means()["kl"]
    measures += [
        Measure(KL, 0.0, kl, "context", note="nats per answer, held-out prompts"),
        Measure("distinct-2 of answers, held-out prompts", before.distinct_2, after.distinct_2, "higher"),
        Measure(
            "answers that come to their end, held-out prompts",
            before.means()["finished"],
            after.means()["finished"],
            "higher",
        ),
    ]
    return measures, notes, facts


def kl_budget(config: Any, workspace: Workspace, report: Report) -> dict[str, Any]:
    """{spent, allowed, largest, iteration, kept, stopped}: nats per completion between the reference and the
    policy."""
    rows = [row for row in read_metrics(workspace.directory / "metrics.jsonl") if row.get("kl") is not None]
    best = report.facts.get("best") or {}
    return {
        "spent": report.value(KL),
        "allowed": config.kl_budget,
        "largest": max((row["kl"] for row in rows), default=None),
        "iteration": rows[-1]["step"] if rows else None,
        "kept": best.get("step"),
        "stopped": report.facts.get("stopped", ""),
    }
