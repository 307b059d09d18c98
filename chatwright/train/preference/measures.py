"""Measures of a reward model: accuracy by number of answers and by annotator, and of length alone; and the
normalisation of its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.chat import Message
from chatwright.data.cuts import cause_of
from chatwright.data.examples import Comparison
from chatwright.model.heads import ScalarModel
from chatwright.objectives.policy import all_equal
from chatwright.objectives.preference import Ties, pair_accuracy, pair_wins
from chatwright.train.preference.counting import GUESSING, ScoredComparisons
from chatwright.train.preference.rankings import RankingConfig, Rankings
from chatwright.train.rl.health import diagnose_reward
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Report, Table, Unhealthy

MOST_ROWS = 20
"""Most annotators that the report names: those with the most comparisons."""


def score_comparisons(
    model: ScalarModel, rankings: Rankings, chosen: Sequence[Comparison]
) -> ScoredComparisons:
    """Scores and labels of comparisons of up to K answers."""
    scores, labels = [], []
    k = max(len(one.responses) for one in chosen)
    for start in range(0, len(chosen), 16):
        batch = runtime.on_device(rankings.batch(chosen[start : start + 16], k))
        scores.append(model.score(batch.ids, batch.mask).view(batch.labels.shape).float().cpu())
        labels.append(batch.labels.cpu())
    return ScoredComparisons(torch.cat(scores), torch.cat(labels))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 0 where one side is all the same number, which goes with nothing."""
    if bool(all_equal(a)) or bool(all_equal(b)):  # else their rounding errors would be correlated
        return 0.0
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))


def accuracy_of(scored: ScoredComparisons, config: RankingConfig) -> float:
    """Share of the pairs that the scores order as people did; that of guessing where all answers tie."""
    right, pairs = pair_accuracy(*scored, config.tie_tolerance, config.ties)
    return right / pairs if pairs else GUESSING


def held_out_measures(scored: ScoredComparisons, config: RankingConfig) -> dict[str, float]:
    """Accuracy on held-out pairs, and correlation with people's ratings."""
    known = ~scored.labels.isnan()
    return {
        "held_out_accuracy": accuracy_of(scored, config),
        "held_out_correlation": correlation(scored.scores[known], scored.labels[known]),
    }


def length_baseline(
    train: Sequence[Comparison],
    held_out: Sequence[Comparison],
    tie_tolerance: float,
    ties: Ties = "leave_out",
) -> float:
    """Accuracy of "the longer (or the shorter) answer wins", whichever is better on the training pairs. 0.5
    where all answers tie: no pair shows anything."""

    def accuracy(comparisons: Sequence[Comparison]) -> float:
        right = pairs = 0.0
        for one in comparisons:
            lengths = torch.tensor([[float(len(answer)) for answer in one.responses]])
            won, count = pair_accuracy(lengths, torch.tensor([one.scores]), tie_tolerance, ties)
            right, pairs = right + won, pairs + count
        return right / pairs if pairs else GUESSING

    longer = accuracy(held_out)
    return longer if accuracy(train) >= 0.5 else 1 - longer


# ---- tables ------------------------------------------------------------------------------------------------


def accuracy_rows(
    scored: ScoredComparisons, groups: Iterable[tuple[str, Sequence[int]]], config: RankingConfig
) -> list[list[str]]:
    """Table rows (name, prompts, pairs, accuracy) for groups of comparisons, given by their indices. The
    error is the standard error over prompts, for the pairs of a prompt are not independent."""
    rows = []
    for name, numbers in groups:
        part = ScoredComparisons(*(values[list(numbers)] for values in scored))
        each = [
            pair_accuracy(one[None], label[None], config.tie_tolerance, config.ties)
            for one, label in zip(*part, strict=True)
        ]
        shares = torch.tensor([right / pairs for right, pairs in each if pairs])
        error = f" ± {float(shares.std() / len(shares) ** 0.5):.3f}" if len(shares) > 1 else ""
        pairs = sum(count for _, count in each)
        rows.append(
            [name, str(len(each)), str(pairs), f"{accuracy_of(part, config):.3f}{error}" if pairs else "-"]
        )
    return rows


def by_candidates(scored: ScoredComparisons, config: RankingConfig) -> Table:
    """Accuracy for each number of answers that were ranked together."""
    sizes = (~scored.labels.isnan()).sum(1).tolist()
    groups = [(str(k), [n for n, size in enumerate(sizes) if size == k]) for k in sorted(set(sizes))]
    rows = accuracy_rows(scored, groups, config)
    return Table(
        "Accuracy on held-out prompts, by number of answers",
        ["answers", "prompts", "pairs", "accuracy"],
        rows,
    )


def by_annotator(
    scored: ScoredComparisons,
    comparisons: Sequence[Comparison],
    held_out_annotators: ScoredComparisons | None,
    strange: Sequence[Comparison],
    config: RankingConfig,
) -> Table | None:
    """Accuracy for each annotator, first those whose comparisons were trained on; None where no annotator is
    named."""
    rows: list[list[str]] = []
    for kind, found, asked in (
        ("in training", scored, comparisons),
        ("held out", held_out_annotators, strange),
    ):
        names: dict[str, list[int]] = {}
        for number, one in enumerate(asked):
            names.setdefault(one.annotator, []).append(number)
        if found is None or set(names) <= {""}:
            continue
        groups = sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_ROWS]
        rows += [
            [kind, *row]
            for row in accuracy_rows(found, [(name or "(not named)", part) for name, part in groups], config)
        ]
    if not rows:
        return None
    return Table(
        "Accuracy on held-out prompts, by annotator",
        ["annotator is", "name", "prompts", "pairs", "accuracy"],
        rows,
    )


# ---- where scores begin, and what is not to be used --------------------------------------------------------


def normalise(
    trainer: Trainer,
    model: ScalarModel,
    rankings: Rankings,
    chosen: Sequence[Comparison],
    dtype: torch.dtype,
    demonstrations: Sequence[Comparison] = (),
) -> str:
    """Shift and scale the scores, save, and return the checkpoint's name.

    The standard deviation of the `chosen` training answers becomes 1; equal scores keep their scale. The mean
    score of the demonstrations' first answers becomes 0 (Ouyang et al. 2022, section 3.5); without
    demonstrations, that of the training answers. This is done once: a stage that is run again afterwards
    keeps its constants.
    """
    with runtime.evaluating(model), runtime.autocast(dtype):
        ask = partial(trainer.parallel.forward, score_comparisons, model, rankings)
        scores, labels = ask(chosen)
        scores = scores[~labels.isnan()]
        zero = ask(demonstrations).scores[:, 0].mean() if demonstrations else scores.mean()
    with torch.no_grad():
        deviation = torch.ones(()) if bool(all_equal(scores)) else scores.std().clamp(min=1e-6)
        model.offset.add_(zero / model.scale)
        model.scale.div_(deviation)
    saved = trainer.save(final=True)
    return f"checkpoints/{saved.path.name}"


def refuse_if_learnt_by_heart(
    report: Report, accuracy: float, held_out: Sequence[Comparison], config: RankingConfig
) -> None:
    """Raise Unhealthy, with the report, when the model is good on training pairs but guesses on held-out
    ones."""
    pairs = sum(
        round(float(pair_wins(torch.tensor([one.scores]), config.tie_tolerance, config.ties).sum()))
        for one in held_out
    )
    diagnosis = diagnose_reward(
        train=accuracy,
        held_out=report.facts["held_out_accuracy"],
        length=report.measures[1].after or 0.5,
        pairs=pairs,
        cut=cause_of(report.facts.get("cut")),
    )
    if diagnosis is not None:
        report.model = None  # no other stage may use it
        report.notes.insert(0, diagnosis.text)
        raise Unhealthy(f"reward: {diagnosis.text}", report)


def example_scores(score: Callable[[Sequence[Message], Sequence[str]], Sequence[float]]) -> str:
    """The scores of two example answers, in a sentence for the report."""
    answers = ("That sounds great, I love it!", "That sounds awful, I hate it.")
    prompt = (Message(role="user", content="I will go hiking on Saturday."),)
    found: Mapping[str, float] = dict(zip(answers, score(prompt, answers), strict=True))
    return ", ".join(f"scores {answer!r} {value:+.2f}" for answer, value in found.items())
