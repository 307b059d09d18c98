"""Classifier as reward: how likely would people call this text good?  Ziegler et al. 2019, section 3.1.

It replaces the reward model: PPO, REINFORCE and best-of-n use it with `reward: classifier`. It learns from
single texts instead of comparisons. Each text is the answer to a prompt drawn at random, so that a row looks
as it will in PPO.

Departures from the paper:
* There the classifier is a separate model of reviews. Here it starts from the chat model.
* There the log odds are the reward. Here they are calibrated (Platt 1999) on texts that training does not
  see: of the texts with sigmoid(score) = p a share p is good, and a score of 0 means even odds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chatwright import runtime
from chatwright.chat import Message
from chatwright.config import UsageError, UserError
from chatwright.data.cuts import Room, cause_of, check_limit
from chatwright.data.examples import LabelledText
from chatwright.data.records import records_of
from chatwright.model.heads import ScalarModel
from chatwright.objectives.preference import logistic_loss
from chatwright.train.api import (
    ANSWERS_PER_SECOND,
    LOOP_METRICS,
    LOSS_TROUBLE,
    Curve,
    FitConfig,
    Fitted,
    GPTConfig,
    LoRAConfig,
    Measure,
    Metric,
    OptimConfig,
    Report,
    SampleOrder,
    Stage,
    StagePlan,
    Step,
    Unhealthy,
    Workspace,
    open_chat_base,
    room_for,
    say,
    start_training,
    tokens_of_data,
)
from chatwright.train.preference import calibration
from chatwright.train.preference.limits import RowLimits
from chatwright.train.preference.measures import correlation, example_scores
from chatwright.train.preference.rankings import AnswerEncoder, first_prompts
from chatwright.train.preference.rated_texts import (
    Parts,
    TextBatch,
    Texts,
    are_good,
    load_texts,
    parts_within,
)
from chatwright.train.preference.scalar import PURPOSE, scalar_program, scalar_trainer
from chatwright.train.statistics import wilson_interval
from chatwright.train.trainer import Trainer


@dataclass(frozen=True)
class Config:
    """Settings of the classifier."""

    base: str = field(default="sft", metadata={"input": True})
    """The model whose body to start from; its template frames prompt and text."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with ratings-*.jsonl, and dialogues-*.jsonl, whose first turns are the
    prompts."""
    threshold: float = 0.0
    """Texts rated higher are good, lower ones bad; 0.5 for data whose labels are 0 and 1."""
    neutral: float = 0.5
    """Texts rated within this of the threshold are neither, and left out."""
    calibration: float = 0.1
    """Share of the training texts that is not trained on: the scale of the scores is fitted to them."""
    max_tokens: int = 0
    """Tokens of a row, prompt and text: longer prompts lose their beginning, longer texts their end. Good and
    bad texts that are then the same are left out. 0: the longest text behind the longest prompt, at most the
    base's context and what memory holds."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train a low-rank adapter and the scalar head instead of all weights: `lora.rank` above 0."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(seconds=90.0, batch_size=32, compile=False))
    """Length of training, batches and micro-batches; a sample is a text."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            name="adamw", learning_rate=1e-3, schedule="trapezoid", decay=0.7, weight_decay=0.01
        )
    )
    """Optimiser and schedule."""

    def __post_init__(self) -> None:
        check_limit("max_tokens", self.max_tokens, 4)
        if not 0 < self.calibration < 1:
            raise UsageError(f"calibration {self.calibration:g} must lie between 0 and 1")
        if self.neutral < 0:
            raise UsageError(f"neutral {self.neutral:g} must be at least 0")


def step(model: ScalarModel, batch: TextBatch) -> Step:
    """Cross entropy of good and bad; logs the accuracy."""
    scores = model.score(batch.ids, batch.mask)
    right = ((scores.detach() > 0) == batch.positive).float().sum()
    return Step(logistic_loss(scores, batch.positive), {"accuracy": right})


@torch.no_grad()
def scores_of(model: ScalarModel, texts: Texts, chosen: Sequence[LabelledText]) -> Float[Tensor, " n"]:
    """The score of each text, as the answer to a prompt chosen by the text's index."""
    found = []
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        asked = [texts.prompts[(start + n) % len(texts.prompts)] for n in range(len(part))]
        batch = runtime.on_device(texts.batch(part, asked))
        found.append(model.score(batch.ids, batch.mask).float().cpu())
    return torch.cat(found)


PLAN = StagePlan(
    build=scalar_program,
    rows=lambda config, shape: (1, tokens_of_data(config.max_tokens, shape)),
    full_rows=False,
)


def fitted_rows(
    config: Config,
    parts: Parts,
    prompts: Sequence[Sequence[Message]],
    shape: GPTConfig,
    encoder: AnswerEncoder,
) -> tuple[Config, Parts, RowLimits]:
    """The settings with the real length of a row, the texts that can be learnt from at this length, and what
    was cut. Raises UserError when there are too few."""

    def room(wanted: int) -> Room:
        if config.max_tokens:  # an explicit value holds; the plan refuses what does not fit
            return Room(shape.context, "the base's context")
        return room_for("classifier", PLAN, shape, wanted, lambda most: replace(config, max_tokens=most))

    parts, limits = parts_within(parts, prompts, encoder, config, room)
    say(f"  {limits.cuts}")
    return replace(config, max_tokens=limits.limit), parts, limits


def load_prompts(records: Path) -> list[tuple[Message, ...]]:
    """What the texts may be answers to. Raises UserError when there is nothing."""
    prompts = first_prompts(records / "dialogues-train.jsonl")
    if not prompts:
        raise UserError("there are no conversations to take prompts from; set `dialogues` in the data stage")
    return prompts


def run(config: Config, workspace: Workspace) -> Report:
    """Train the classifier, calibrate it, and measure it on held-out texts before and after."""
    base = open_chat_base(config.base, workspace, purpose=PURPOSE)
    records, shape = records_of(workspace.resolve(config.data)), base.model.config
    parts, prompts = load_texts(config, records), load_prompts(records)
    encoder = AnswerEncoder(base.template, base.tokenizer)
    config, parts, limits = fitted_rows(config, parts, prompts, shape, encoder)
    training = start_training("classifier", PLAN, config, workspace, shape)
    model, trainer = scalar_trainer(training, base)
    order = SampleOrder(len(parts.train), workspace.seed)
    texts = Texts(parts.train, prompts, base.template, base.tokenizer, training.config, order, encoder)
    say(f"  {parts}")
    asked = training.in_precision(partial(scores_of, model, texts))

    def score(chosen: Sequence[LabelledText]) -> Tensor:
        with runtime.evaluating(model):
            return asked(chosen)

    fitted = training.fit(
        trainer,
        texts,
        training.in_precision(partial(step, model)),
        lambda: held_out_measures(score, parts, config),
        throughput=("answers", 1.0),
        best=("held_out_loss", "lower"),
        samples=len(parts.train),
    )
    report, good = report_of(fitted, parts, limits), are_good(parts.held_out, config)
    constants = calibrate_once(report, trainer, model, score, parts, config)
    report.model = f"checkpoints/{trainer.save(final=True).path.name}"
    measure(report, fitted.before, held_out_measures(score, parts, config), good)
    reliable = calibration.reliability(score(parts.held_out).sigmoid(), good.float())
    show_calibration(report, reliable, constants, workspace)
    report.facts["sample"] = example(model, texts)
    return report


Score = Callable[[Sequence[LabelledText]], Tensor]
"""The scores of texts."""


def held_out_measures(score: Score, parts: Parts, config: Config) -> dict[str, float]:
    """Accuracy and loss on held-out texts that are good or bad, correlation on all of them."""
    scores, good = score(parts.held_out), are_good(parts.held_out, config)
    labels = torch.tensor([one.label for one in parts.all_held_out])
    return {
        "held_out_accuracy": float(((scores > 0) == good).float().mean()),
        "held_out_loss": calibration.log_loss(scores, good),
        "held_out_correlation": correlation(score(parts.all_held_out), labels),
    }


def report_of(fitted: Fitted, parts: Parts, limits: RowLimits) -> Report:
    """Curves and facts; measures are added after calibration."""
    return Report(
        curves=[Curve("Loss of the classifier", ["loss"], "nats per text"), Curve("Accuracy", ["accuracy"])],
        facts={
            "texts": len(parts.train),
            **limits.facts,
            "steps": fitted.progress.step,
            "held_out_accuracy": fitted.after["held_out_accuracy"],
            "held_out_correlation": fitted.after["held_out_correlation"],
            **fitted.facts,
        },
        notes=[*limits.notes, *fitted.notes],
    )


def show_calibration(
    report: Report, reliable: calibration.Reliability, constants: dict[str, float], workspace: Workspace
) -> None:
    """Add the calibration error to the report: the number before and after, and a picture."""
    report.facts["calibration"] = constants
    note = "before: the same model without calibration"
    before = constants["error_before"]
    report.measures.append(
        Measure("calibration error on held-out texts", before, reliable.error, "lower", note=note)
    )
    what = "share that people call good"
    report.pictures.append(calibration.draw(workspace.directory, reliable, low=0.0, what=what))


def example(model: ScalarModel, texts: Texts) -> str:
    """The model's scores of two example answers."""

    def score(prompt: Sequence[Message], answers: Sequence[str]) -> list[float]:
        batch = runtime.on_device(
            texts.batch([LabelledText.of(one, 0.0) for one in answers], [prompt] * len(answers))
        )
        with runtime.evaluating(model):
            return [float(value) for value in model.score(batch.ids, batch.mask)]

    return example_scores(score)


def calibrate_once(
    report: Report, trainer: Trainer, model: ScalarModel, score: Score, parts: Parts, config: Config
) -> dict[str, float]:
    """Scale and offset of the scores, and the calibration error before: found at the first call. A stage that
    is run again after that keeps the constants it has. Raises Unhealthy."""
    known: dict[str, Any] = trainer.progress.extra
    if "calibration" not in known:
        good = are_good(parts.held_out, config).float()
        error = calibration.reliability(score(parts.held_out).sigmoid(), good).error
        scores, positive = score(parts.calibration), are_good(parts.calibration, config)
        scale, offset = calibrate(report, model, scores, positive)
        known["calibration"] = {"scale": scale, "offset": offset, "error_before": error}
    return dict(known["calibration"])


def calibrate(
    report: Report, model: ScalarModel, scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]
) -> tuple[float, float]:
    """Set scale and offset so that sigmoid(score) is a probability, and return them. Raises Unhealthy, with
    the report, when the scores carry no information."""
    try:
        scale, offset = calibration.platt(scores, positive)
    except ValueError as error:
        report.notes.insert(0, str(error))
        cut = cause_of(report.facts.get("cut"))
        more = f"First of all keep the texts whole: {cut}. Or train" if cut else "Train"
        raise Unhealthy(
            f"classifier: {error}. {more} it longer, on more ratings, or start it from a better model", report
        ) from None
    with torch.no_grad():  # scale' (y - offset'), where y = s (x - o) is the score so far
        model.offset.add_(offset / model.scale)
        model.scale.mul_(scale)
    return scale, offset


def measure(
    report: Report, before: dict[str, float], after: dict[str, float], good: Bool[Tensor, " n"]
) -> None:
    """Add the held-out measures of the calibrated classifier to the report."""
    share, accuracy = float(good.float().mean()), after["held_out_accuracy"]
    commoner = max(share, 1 - share)
    low, high = wilson_interval(accuracy * len(good), len(good))
    note = f"95 % interval {low:.3f} to {high:.3f}, {len(good)} texts"
    if low <= commoner:
        report.warnings.append(
            f"nothing was shown: the accuracy is {accuracy:.3f} ({note}), and always saying the commoner "
            f"class has {commoner:.3f}; do not train a policy on this model before it is better, or before "
            "more texts are held out"
        )
    report.facts |= {key: after[key] for key in ("held_out_accuracy", "held_out_correlation")}
    report.facts["held_out_accuracy_interval"] = [low, high]
    report.measures += [
        Measure(
            "accuracy on held-out texts",
            before["held_out_accuracy"],
            accuracy,
            "higher",
            note,
            (low, high),
        ),
        Measure("accuracy of the commoner class", None, commoner, "context"),
        Measure(
            "loss on held-out texts",
            before["held_out_loss"],
            after["held_out_loss"],
            note="nats per text; guessing: 0.693",
        ),
        Measure(
            "correlation with held-out ratings",
            before["held_out_correlation"],
            after["held_out_correlation"],
            "higher",
        ),
    ]


METRICS = (
    Metric(
        "loss",
        "nats per text",
        "starts near ln 2 = 0.69, which is guessing, and falls",
        "Mean cross entropy of good and bad over the texts of the last step.",
        unhealthy=LOSS_TROUBLE,
    ),
    Metric(
        "accuracy",
        "share, 0 to 1",
        "rises from 0.5",
        "Training texts that are put into their class, mean over the batches since the last row.",
        unhealthy="0.5 for good: nothing is learnt",
    ),
    Metric(
        "held_out_accuracy",
        "share, 0 to 1",
        "clearly above the accuracy of the commoner class, which the report has",
        "The same on held-out texts.",
        unhealthy="no better than the commoner class while `accuracy` is high: learnt by heart",
    ),
    Metric(
        "held_out_loss",
        "nats per text",
        "falls below 0.69, which is guessing",
        "Cross entropy on held-out texts, before calibration.",
        unhealthy="rising while `loss` falls: overfitting, train for less",
    ),
    Metric(
        "held_out_correlation",
        "correlation, -1 to 1",
        "at least `min_correlation` of the stage that follows it (0.6)",
        "Pearson's correlation of scores with held-out ratings, those of neutral texts included.",
        unhealthy="below: that stage refuses to start (`chatwright/train/rl/models.py::load_reward`)",
    ),
    *LOOP_METRICS,
    ANSWERS_PER_SECOND,
)

STAGE = Stage(
    config=Config,
    run=run,
    plan=PLAN,
    metrics=METRICS,
    reads=lambda config: {"ratings": config.data, "dialogues": config.data},
)
