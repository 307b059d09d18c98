"""The outcome of an RL run: which policy is the result, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatwright.metrics import read_metrics
from chatwright.train.workspace import Curve, Measure, Report, Workspace

COMMON = (
    Curve("Reward model's score", ["score"]),
    Curve("KL to the SFT model", ["kl", "kl_k3"], "nats per answer"),
    Curve("Entropy", ["entropy"], "nats per token"),
    Curve("Answer length", ["length"], "tokens"),
    Curve("Gold measure", ["gold"]),
)
"""Curves of every method; a curve without numbers is not drawn."""


def kept(logged: Mapping[str, float]) -> dict[str, float]:
    """The logged values that are kept of a policy that may be the result."""
    return {
        key: logged[key]
        for key in ("score", "kl", "distinct_2", "length", "finished", "gold")
        if key in logged
    }


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
    tax: tuple[float, float] | None = None,
    trouble: str = "",
    more: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a run that has a result, or of one that was stopped as unhealthy (`trouble` says why).
    `tax` is the perplexity of general text before and after, `selection_metric` the selection metric, `more`
    further facts."""
    first, result = extra["history"][0], result_of(extra, step)
    measures = []
    if result is not None:
        measures = [
            Measure("reward model's score (training prompts)", first["score"], result["score"], "higher"),
            Measure("KL to the SFT model", 0.0, result["kl"], "context", note="nats per answer"),
            Measure("distinct-2 of answers", first["distinct_2"], result["distinct_2"], "higher"),
        ]
        if "gold" in result:
            measures.insert(
                1, Measure("gold measure (training prompts)", first["gold"], result["gold"], "higher")
            )
    if tax is not None:
        measures.append(Measure("perplexity of general text", *tax, note="per token; the alignment tax"))
    stopped = trouble or extra["stopped"]
    facts = {
        "best": extra["best"],
        "iterations": step - ("average" in extra),
        "stopped": stopped,
        **(more or {}),
    }
    notes = []
    if trouble:
        notes.append(f"broken off: {trouble}; the checkpoint is the state before that iteration")
    elif result is not None and "average" not in extra:
        notes.append(
            f"stopped: {stopped}; kept: iteration {result['step']}, the best {selection_metric} within the "
            "KL budget"
        )
    else:
        facts["average"] = extra["average"]
        chosen = (
            "the average of the weights"
            if extra["average"]["allowed"]
            else "the best iteration: the average was beyond the limits"
        )
        notes.append(f"stopped: {stopped}; kept: {chosen}")
    model = None if result is None or trouble else f"checkpoints/step-{result['step']:06}"
    return Report(measures, [*COMMON, *curves], model, facts, notes)


def kl_budget(config: Any, workspace: Workspace, report: Report) -> dict[str, Any]:
    """{spent, allowed, largest, iteration, kept, stopped}: nats per completion between the reference and the
    policy."""
    rows = [row for row in read_metrics(workspace.directory / "metrics.jsonl") if row.get("kl") is not None]
    best = report.facts.get("best") or {}
    return {
        "spent": report.value("KL to the SFT model"),
        "allowed": config.kl_budget,
        "largest": max((row["kl"] for row in rows), default=None),
        "iteration": rows[-1]["step"] if rows else None,
        "kept": best.get("step"),
        "stopped": report.facts.get("stopped", ""),
    }
