"""Reward model: which of K answers would people prefer?  Ouyang et al. 2022, section 3.5.

Departures from the paper:
* By default the comparisons are made from texts that people rated one by one: a prompt with K rated texts as
  its answers, ranked by their mean ratings. Only such human preference data installs as a package.
* Answers closer than `tie_tolerance` tie, and pairs that tie are left out (`ties`).
* After training the scores are shifted so that demonstrations score 0, as in the paper, and also scaled so
  that training answers have standard deviation 1.

classifier.py trains another model that PPO can optimise against, on single texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from chatwright import runtime
from chatwright.config import UsageError, UserError
from chatwright.data.cuts import Room, check_limit
from chatwright.data.examples import Comparison
from chatwright.data.records import has_records, is_record_file, records_of
from chatwright.model.heads import ScalarModel
from chatwright.objectives.preference import Ties, bradley_terry_loss, pair_accuracy
from chatwright.train.api import (
    ANSWERS_PER_SECOND,
    FLOP_METRICS,
    INSTRUCT,
    LOOP_METRICS,
    LOSS_TROUBLE,
    Answered,
    ChatBase,
    Curve,
    FitConfig,
    Fitted,
    GPTConfig,
    LoRAConfig,
    Measure,
    Metric,
    OptimConfig,
    Paper,
    ParallelConfig,
    Report,
    SampleOrder,
    Stage,
    StagePlan,
    Step,
    Workspace,
    open_chat_base,
    room_for,
    say,
    start_training,
    tokens_of_data,
    training_flop,
)
from chatwright.train.preference import measures, reward_report
from chatwright.train.preference.limits import RowLimits, split_within
from chatwright.train.preference.rankings import (
    FROM_RATINGS,
    AnswerEncoder,
    RankedBatch,
    Rankings,
    Split,
    demonstrations,
    own_comparisons,
    rated_comparisons,
    refuse_ties,
    without_annotators,
)
from chatwright.train.preference.scalar import PURPOSE, scalar_program, scalar_trainer


@dataclass(frozen=True)
class Config:
    """Settings of the reward model."""

    base: str = field(default="sft", metadata={"input": True})
    """The model whose body to start from; its template frames prompt and answer."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with ratings-*.jsonl and dialogues-*.jsonl (prompts, and demonstrations)."""
    labels: int = 0
    """Rated texts to learn from, drawn by the seed; 0 takes all. Few make a judge that can be exploited
    (recipes/hacking.yaml)."""
    comparisons: str = field(default="", metadata={"input": True, "words": ("",)})
    """Your own comparisons instead of ratings: the stage, or directory, with comparisons-*.jsonl."""
    k: int = 0
    """Answers per prompt when comparisons are made from ratings (the paper: 4 to 9; here they cost no
    labeller's time). 0: 16, or as many as there are. Your own comparisons have as many as they have."""
    tie_tolerance: float = 0.5
    """Ratings (or scores) closer than this are ties."""
    ties: Ties = "leave_out"
    """A pair that ties is left out of loss and accuracy, or is won by `half` each way in both."""
    rating_margin: float = 0.0
    """By how much a score is to exceed another's per unit by which the rating does: Llama 2's margin; 0 for
    none."""
    held_out_annotators: str = ""
    """Annotators, comma-separated, none of whose comparisons is trained on: the report has the accuracy on
    theirs."""
    center_on: Literal["auto", "demonstrations", "answers"] = "auto"
    """What scores 0 on average: people's own answers in the dialogues of `data`, or the training answers;
    auto: the former where there are any. The report says which."""
    max_tokens: int = 0
    """Tokens of a row, prompt and answer: longer prompts lose their beginning, longer answers their end.
    Answers that are then the same as another one of their comparison are left out. 0: the longest row of the
    data, at most the base's context and what memory holds."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train a low-rank adapter and the scalar head instead of all weights: `lora.rank` above 0."""
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(seconds=90.0, batch_size=2, micro_batch=1, compile=False)
    )
    """Length of training, batches and micro-batches; a sample is a prompt with its K answers."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            name="adamw", learning_rate=1e-3, schedule="trapezoid", decay=0.7, weight_decay=0.01
        )
    )
    """Optimiser and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""

    def __post_init__(self) -> None:
        check_limit("max_tokens", self.max_tokens, 4)
        check_limit("k", self.k, 2)
        if self.held_out_annotators and not self.comparisons:
            raise UsageError("held_out_annotators is for comparisons of your own: ratings name no annotators")


PAPER = (
    Paper("k", (4, 9), f"{INSTRUCT}, section 3.5", lambda config, facts: facts.get("k") or config.k or None),
    Paper("passes over the comparisons", 1, INSTRUCT, lambda config, facts: facts.get("epochs")),
    Paper("fit.batch_size", 64, f"{INSTRUCT}: prompts, each with all its answers"),
    Paper("optim.learning_rate", 9e-6, f"{INSTRUCT}: 6B"),
    Paper("optim.schedule", "cosine", INSTRUCT),
    Paper("optim.final", 0.1, INSTRUCT),
    Paper("optim.beta1", 0.9, INSTRUCT),
    Paper("optim.beta2", 0.95, INSTRUCT),
    Paper("rating_margin", 0.0, f"{INSTRUCT}: no margin; Llama 2 has one"),
    Paper("lora.rank", 0, f"{INSTRUCT}: all weights are trained"),
)

DEMONSTRATIONS = 256
"""Number of demonstrations (answers written by people) whose mean score becomes 0."""


def step(model: ScalarModel, batch: RankedBatch) -> Step:
    """Bradley-Terry loss over all pairs of each prompt, one forward pass per answer; logs the accuracy."""
    scores = model.score(batch.ids, batch.mask).view(batch.labels.shape)
    right, pairs = pair_accuracy(scores.detach(), batch.labels, batch.tie_tolerance, batch.ties)
    accuracy = torch.tensor(batch.weight * right / max(pairs, 1))
    apart = batch.labels[:, :, None] - batch.labels[:, None, :]
    margin = batch.rating_margin * apart if batch.rating_margin else None
    return Step(
        bradley_terry_loss(scores, batch.labels, batch.tie_tolerance, margin=margin, ties=batch.ties),
        {"accuracy": accuracy},
    )


def load_split(config: Config, workspace: Workspace) -> Split:
    """Training and held-out comparisons: the user's own, or those made from ratings. Raises UserError."""
    if not config.comparisons:
        train, held_out = rated_comparisons(
            records_of(workspace.resolve(config.data)), config.k, workspace.seed, labels=config.labels
        )
        refuse_ties(train, config)
        return Split(train, held_out, [])
    train, held_out = own_comparisons(records_of(workspace.resolve(config.comparisons)))
    refuse_ties(train, config)
    return without_annotators(train, held_out, config.held_out_annotators)


def find_demonstrations(config: Config, workspace: Workspace) -> list[Comparison]:
    """Demonstrations whose scores are to average 0; empty when the scores of the training answers are to.
    Raises UserError."""
    if config.center_on == "answers":
        return []
    there = config.data in workspace.inputs or Path(config.data).exists() or is_record_file(config.data)
    file = records_of(workspace.resolve(config.data)) / "dialogues-train.jsonl" if there else None
    found = demonstrations(file, DEMONSTRATIONS) if file is not None and has_records(file) else []
    if not found and config.center_on == "demonstrations":
        raise UserError(
            f"center_on demonstrations: {file or config.data} has no conversation with an answer; name a "
            "data stage with dialogues as `data`, or set center_on to answers"
        )
    return found


def rows_planned(config: Config, shape: GPTConfig) -> tuple[int, int]:
    """Answers of a comparison, tokens of a row; assumed where they come from data that are not yet read."""
    return config.k or (2 if config.comparisons else FROM_RATINGS), tokens_of_data(config.max_tokens, shape)


PLAN = StagePlan(build=scalar_program, rows=rows_planned, full_rows=False)


def fitted_rows(
    config: Config, split: Split, base: ChatBase, encoder: AnswerEncoder
) -> tuple[Config, Split, RowLimits]:
    """The settings with the real number of answers and length of a row, the comparisons that can be learnt
    from at this length, and what was cut. Raises UserError when there are none."""
    shape = base.model.config
    config = replace(config, k=max(len(one.responses) for one in split.train))

    def room(wanted: int) -> Room:
        if config.max_tokens:  # an explicit value holds; the plan refuses what does not fit
            return Room(shape.context, "the base's context")
        return room_for("reward", PLAN, shape, wanted, lambda most: replace(config, max_tokens=most))

    split, limits = split_within(split, encoder, config, room)
    for line in limits.notes or [str(limits.cuts)]:
        say(f"  {line}")
    return replace(config, max_tokens=limits.limit), split, limits


def run(config: Config, workspace: Workspace) -> Report:
    """Train the reward model and measure its accuracy on held-out comparisons before and after."""
    base = open_chat_base(config.base, workspace, purpose=PURPOSE)
    split, shown = load_split(config, workspace), find_demonstrations(config, workspace)
    encoder = AnswerEncoder(base.template, base.tokenizer)
    config, split, limits = fitted_rows(config, split, base, encoder)
    train, held_out = split.train, split.held_out
    say(f"  {len(train):,} comparisons of {_sizes(train)} answers, {len(held_out):,} held out")
    training = start_training("reward", PLAN, config, workspace, base.model.config)
    model, trainer = scalar_trainer(training, base)
    order = SampleOrder(len(train), workspace.seed)
    rankings = Rankings(train, base.template, base.tokenizer, training.config, order, encoder)
    score = training.in_precision(partial(measures.score_comparisons, model, rankings))
    some = rankings.batch(train[:64])  # to estimate the mean tokens of a comparison and of a row
    tokens, width = float(some.mask.sum()) / len(train[:64]), float(some.mask.sum(1).float().mean())
    fitted = training.fit(
        trainer,
        rankings,
        training.in_precision(partial(step, model)),
        lambda: measures.held_out_measures(score(held_out), config),
        throughput=("answers", sum(len(one.responses) for one in train) / len(train)),
        best=("held_out_accuracy", "higher"),
        flop_per_sample=training_flop(model.body, width) * tokens / width,
        samples=len(train),
    )
    report = report_of(config, fitted, split, tokens, limits)
    report.model = measures.normalise(trainer, model, rankings, train[:64], training.dtype, shown)
    report.facts["scores 0 on average"] = f"{len(shown)} demonstrations" if shown else "training answers"
    report.facts["sample"] = reward_report.example(model, rankings, training.parallel)
    with runtime.evaluating(model):
        scored = partial(training.parallel.forward, score)
        reward_report.look_closer(report, model, scored, split, config, workspace)
        accuracy = measures.accuracy_of(scored(train[:64]), config)
    measures.refuse_if_learnt_by_heart(report, accuracy, held_out, config)
    return report


def report_of(config: Config, fitted: Fitted, split: Split, tokens: float, limits: RowLimits) -> Report:
    """Accuracy and correlation before and after; `tokens` is the mean length of a comparison."""
    guess = measures.length_baseline(split.train, split.held_out, config.tie_tolerance, config.ties)
    return Report(
        measures=[
            fitted.measure("held_out_accuracy", "accuracy on held-out pairs", "higher"),
            Measure("accuracy of length alone", None, guess, "context"),
            fitted.measure("held_out_correlation", "correlation with held-out ratings", "higher"),
        ],
        curves=[Curve("Reward model loss", ["loss"], "nats per prompt"), Curve("Accuracy", ["accuracy"])],
        facts={
            "comparisons": len(split.train),
            "k": config.k,
            **limits.facts,
            "steps": fitted.progress.step,
            "epochs": fitted.samples / len(split.train),
            "tokens": round(fitted.samples * tokens),
            "held_out_correlation": fitted.after["held_out_correlation"],
            "held_out_accuracy": fitted.after["held_out_accuracy"],
            **fitted.facts,
        },
        notes=[*limits.notes, *fitted.notes],
    )


def _sizes(comparisons: list[Comparison]) -> str:
    """'16', or '2 to 9'."""
    sizes = {len(one.responses) for one in comparisons}
    return str(*sizes) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


def records_read(config: Config) -> dict[str, str]:
    """The records that are read: the user's own comparisons, or ratings to make comparisons from."""
    return {"comparisons": config.comparisons} if config.comparisons else {"ratings": config.data}


def compare_scores(config: Config, workspace: Workspace, report: Report) -> Answered:
    """The margin of the better one of ten held-out pairs, before training and after."""
    held_out = load_split(config, workspace).held_out
    config = replace(config, max_tokens=report.facts["max_tokens"])
    return reward_report.compare_scores(config, workspace, str(report.model), held_out)


METRICS = (
    Metric(
        "loss",
        "nats per prompt",
        "starts near ln 2 = 0.69, which is guessing, and falls",
        "Mean loss over the prompts of the last step: the mean over all pairs of a prompt's answers.",
        unhealthy=LOSS_TROUBLE,
    ),
    Metric(
        "accuracy",
        "share, 0 to 1",
        "rises from 0.5",
        "Training pairs that the scores order as the ratings do (ties as `ties` says), mean over the batches "
        "since the last row.",
        unhealthy="0.5 for good: nothing is learnt",
    ),
    Metric(
        "held_out_accuracy",
        "share, 0 to 1",
        "clearly above 0.5 and above the accuracy of length alone, which the report has",
        "The same on held-out pairs.",
        unhealthy="0.5 while `accuracy` is high: learnt by heart, leaked prompts or a length bias",
    ),
    Metric(
        "held_out_correlation",
        "correlation, -1 to 1",
        "at least `min_correlation` of the stage that follows it (0.6)",
        "Pearson's correlation of scores with held-out ratings.",
        unhealthy="below: that stage refuses to start (`chatwright/train/rl/models.py::load_reward`)",
    ),
    *LOOP_METRICS,
    ANSWERS_PER_SECOND,
    *FLOP_METRICS,
)

STAGE = Stage(
    config=Config,
    run=run,
    plan=PLAN,
    metrics=METRICS,
    paper=PAPER,
    reads=records_read,
    answers=compare_scores,
    renamed={"margin": "tie_tolerance", "lead": "rating_margin"},
)
