"""Parts of a reward model's report beside its loss: calibration, accuracy by number of answers and by
annotator, and its scores of single pairs before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from chatwright import checkpoint, runtime
from chatwright.chat import Message
from chatwright.config import UserError
from chatwright.data.examples import Comparison
from chatwright.data.loader import SampleOrder
from chatwright.messages import described
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.train.base import open_chat_base
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext
from chatwright.train.preference import calibration, doubts, measures
from chatwright.train.preference.counting import ScoredComparisons, counted
from chatwright.train.preference.measures import score_comparisons
from chatwright.train.preference.rankings import Rankings, Split
from chatwright.train.workspace import Answered, Measure, Report, Workspace

PAIRS_SHOWN = 10
"""Held-out pairs that the report shows with their scores before and after: the first ones, unselected."""


def look_closer(
    report: Report,
    model: ScalarModel,
    scored: Callable[[Sequence[Comparison]], ScoredComparisons],
    split: Split,
    config: Any,
    workspace: Workspace,
) -> None:
    """Add to the report of a trained model: the interval of its accuracy and what makes it doubtful,
    calibration, accuracy by number of answers and by annotator."""
    found = scored(split.held_out)
    held_out = counted(found, config)
    low, high = held_out.interval(workspace.seed)
    report.measures[0] = replace(
        report.measures[0],
        note=f"95 % interval {low:.3f} to {high:.3f}, {held_out.total:,} pairs",
        interval=(low, high),
    )
    report.facts |= {"held_out_pairs": held_out.total, "held_out_accuracy_interval": [low, high]}
    report.warnings += doubts.doubts(found, split, config, workspace.seed)
    raw = found.scores / model.scale.cpu()  # the scale of training, on which sigmoid gives probabilities
    reliable = calibration.pair_reliability(raw, found.labels, config.tie_tolerance, config.ties)
    report.measures.append(
        Measure(
            "calibration error on held-out pairs",
            None,
            reliable.error,
            "lower",
            note="mean distance of predicted and observed preference",
        )
    )
    report.facts["calibration_error"] = reliable.error
    report.pictures.append(
        calibration.draw(workspace.directory, reliable, low=0.5, what="share preferred by people")
    )
    report.tables.append(measures.by_candidates(found, config))
    held_out_annotators = scored(split.held_out_annotators) if split.held_out_annotators else None
    if held_out_annotators is not None:
        accuracy = measures.accuracy_of(held_out_annotators, config)
        report.measures.insert(
            2,
            Measure(
                "accuracy on held-out pairs, annotators held out",
                None,
                accuracy,
                "higher",
                note=f"{config.held_out_annotators}; nothing of theirs was trained on",
            ),
        )
        report.facts["held_out_annotators_accuracy"] = accuracy
    table = measures.by_annotator(
        found, split.held_out, held_out_annotators, split.held_out_annotators, config
    )
    if table is not None:
        report.tables.append(table)


def example(model: ScalarModel, rankings: Rankings, parallel: ParallelContext = SINGLE_PROCESS) -> str:
    """The model's scores of two example answers."""

    def score(prompt: Sequence[Message], answers: Sequence[str]) -> list[float]:
        batch = runtime.on_device(rankings.batch([Comparison.of(prompt, answers, [0.0] * len(answers))]))
        with runtime.evaluating(model):
            return [float(value) for value in parallel.forward(model.score, batch.ids, batch.mask)]

    return measures.example_scores(score)


def compare_scores(config: Any, workspace: Workspace, model: str, held_out: Sequence[Comparison]) -> Answered:
    """The margin of the higher rated answer in ten held-out pairs: its score less the other's, before
    training and after."""
    chosen = [
        pair for pair in map(_extremes, held_out) if pair.scores[0] - pair.scores[1] > config.tie_tolerance
    ][:PAIRS_SHOWN]
    base = open_chat_base(config.base, workspace)
    if not chosen:
        raise UserError("there is no held-out pair that is no tie")
    found = checkpoint.Checkpoint(workspace.directory / model)
    after = ScalarModel(GPTConfig.from_dict(found.state()["model"]))
    checkpoint.load_model_tensors(after, found.tensors("model"), where=str(found.path))
    with torch.random.fork_rng(devices=[]):  # the head that training began with
        torch.manual_seed(runtime.seed_for(workspace.seed, "reward"))
        before = ScalarModel(base.model.config)
    before.start_from(base.model)
    rankings = Rankings(
        chosen, base.template, base.tokenizer, config, SampleOrder(len(chosen), workspace.seed)
    )
    margins = []
    for one in (before, after):
        with runtime.evaluating(one.to(runtime.device())):
            scores, _ = score_comparisons(one, rankings, chosen)
        margins.append((scores[:, 0] - scores[:, 1]).tolist())
    prompts = [
        f"{' / '.join(described(one['content']) for one in pair.prompt)} - higher: {pair.responses[0]} - "
        f"lower: {pair.responses[1]}"
        for pair in chosen
    ]
    pairs = [
        {"prompt": prompt, "before": f"{first:+.2f}", "after": f"{second:+.2f}"}
        for prompt, first, second in zip(prompts, *margins, strict=True)
    ]
    return Answered("margin of the higher rated answer, untrained", "trained", prompts, pairs)


def _extremes(one: Comparison) -> Comparison:
    """The answers rated highest and lowest, in this order."""
    rated = sorted(zip(one.scores, one.responses, strict=True), key=lambda pair: pair[0])
    low, high = rated[0], rated[-1]
    return Comparison(one.id, one.prompt, (high[1], low[1]), (high[0], low[0]))
