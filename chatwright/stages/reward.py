"""Reward model: which of K answers would people prefer?  Ouyang et al. 2022, section 3.5.

Departures from the paper: by default the comparisons are made from texts that people rated one by one (a
prompt with K rated texts as its answers, ranked by their mean ratings), because that is the human preference
data that installs as a package; answers closer than `tie_tolerance` tie, and pairs that tie are left out
(`ties`). After training the scores are shifted so that demonstrations score 0, as in the paper, and scaled so
that training answers have standard deviation 1.

Another judge that PPO can follow, trained on single texts: classifier.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from chatwright import checkpoint, runtime
from chatwright.chat import Message
from chatwright.config import UsageError, UserError
from chatwright.data.examples import Comparison
from chatwright.data.loader import SampleOrder
from chatwright.data.records import records_of
from chatwright.messages import described
from chatwright.metrics import Metric, say
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig
from chatwright.objectives.preference import Ties, bradley_terry_loss, pair_accuracy
from chatwright.optim import OptimConfig
from chatwright.train.base import open_base
from chatwright.train.cost import training_flop
from chatwright.train.loop import Fit, FitConfig
from chatwright.train.loop_metrics import ANSWERS_PER_SECOND, FLOP_METRICS, LOOP_METRICS, LOSS_TROUBLE
from chatwright.train.paper import INSTRUCT, Paper
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelConfig, ParallelContext
from chatwright.train.parallel.start import start_parallel
from chatwright.train.planning import plan
from chatwright.train.planning.program import StagePlan
from chatwright.train.preference import calibration, measures
from chatwright.train.preference.measures import Scored, score_comparisons
from chatwright.train.preference.rankings import (
    RankedBatch,
    Rankings,
    Split,
    demonstrations,
    own_comparisons,
    rated_comparisons,
    without_annotators,
)
from chatwright.train.preference.scalar import chat_base, make_scalar_model, scalar_program
from chatwright.train.stage import Stage
from chatwright.train.trainer import Step
from chatwright.train.workspace import Answered, Curve, Measure, Report, Workspace


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
    k: int = 16
    """Completions per prompt when comparisons are made from ratings (the paper: 4 to 9; here they cost no
    labeller's time)."""
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
    max_tokens: int = 80
    """Longer prompts lose their beginning, longer answers their end."""
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
        if self.held_out_annotators and not self.comparisons:
            raise UsageError("held_out_annotators is for comparisons of your own: ratings name no annotators")


PAPER = (
    Paper("k", (4, 9), f"{INSTRUCT}, section 3.5"),
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

PAIRS_SHOWN = 10
"""Held-out pairs whose scores before and after the report shows: the first ones, not chosen."""
DEMONSTRATIONS = 256
"""Completions of people's own whose mean score becomes 0."""


def step(model: ScalarModel, batch: RankedBatch) -> Step:
    """Bradley-Terry loss over all pairs of each prompt, every answer forwarded once; accuracy beside it."""
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
    """What to train on and what to measure: the user's own comparisons, or those made from ratings. Raises
    UserError."""
    if not config.comparisons:
        train, held_out = rated_comparisons(
            records_of(workspace.resolve(config.data)), config.k, workspace.seed, labels=config.labels
        )
        return Split(train, held_out, [])
    train, held_out = own_comparisons(records_of(workspace.resolve(config.comparisons)))
    return without_annotators(train, held_out, config.held_out_annotators)


def find_demonstrations(config: Config, workspace: Workspace) -> list[Comparison]:
    """The answers that are to score 0 on average; none where the training answers are to. Raises
    UserError."""
    if config.center_on == "answers":
        return []
    there = config.data in workspace.inputs or Path(config.data).exists()
    file = records_of(workspace.resolve(config.data)) / "dialogues-train.jsonl" if there else None
    found = demonstrations(file, DEMONSTRATIONS) if file is not None and file.is_file() else []
    if not found and config.center_on == "demonstrations":
        raise UserError(
            f"center_on demonstrations: {file or config.data} has no conversation with an answer; "
            "name a data stage with dialogues as `data`, or set center_on to answers"
        )
    return found


PLAN = StagePlan(build=scalar_program, rows=lambda config, shape: (config.k, config.max_tokens))


def run(config: Config, workspace: Workspace) -> Report:
    """Train the reward model and measure its accuracy on held-out comparisons before and after."""
    base = chat_base(config.base, workspace)
    assert base.tokenizer is not None and base.template is not None
    split, shown = load_split(config, workspace), find_demonstrations(config, workspace)
    train, held_out = split.train, split.held_out
    parallel = start_parallel(
        config.parallel,
        batch_size=config.fit.batch_size,
        micro_batch=config.fit.micro_batch,
        shape=base.model.config,
        precision=config.fit.precision,
    )
    config = plan.ahead("reward", PLAN, config, base.model.config, parallel)
    model, trainer, dtype = make_scalar_model("reward", config, workspace, base, parallel)
    rankings = Rankings(train, base.template, base.tokenizer, config, SampleOrder(len(train), workspace.seed))
    say(f"  {len(train):,} comparisons of {_sizes(train)} answers, {len(held_out):,} held out")

    def train_step(batch: RankedBatch) -> Step:
        with runtime.autocast(dtype):
            return step(model, batch)

    def judged(comparisons: Sequence[Comparison]) -> Scored:
        with runtime.autocast(dtype):
            return score_comparisons(model, rankings, comparisons)

    def evaluate() -> dict[str, float]:
        found = judged(held_out)
        known = ~found.labels.isnan()
        return {
            "held_out_accuracy": measures.accuracy_of(found, config),
            "held_out_correlation": measures.correlation(found.scores[known], found.labels[known]),
        }

    some = rankings.batch(train[:64])  # tokens of a comparison and of a row: their means over these
    tokens, width = float(some.mask.sum()) / len(train[:64]), float(some.mask.sum(1).float().mean())
    fitted = Fit(
        trainer,
        config.fit,
        rankings,
        train_step,
        evaluate,
        title="reward",
        throughput=("answers", float(config.k)),
        best=("held_out_accuracy", "higher"),
        flop_per_sample=training_flop(model.body, width) * tokens / width,
    ).run()
    saved = measures.normalise(trainer, model, rankings, train[:64], dtype, shown)
    before, after = fitted.before, fitted.after
    report = Report(
        measures=[
            Measure(
                "accuracy on held-out pairs",
                before["held_out_accuracy"],
                after["held_out_accuracy"],
                "higher",
            ),
            Measure(
                "accuracy of length alone",
                None,
                measures.length_baseline(train, held_out, config.tie_tolerance, config.ties),
                "context",
            ),
            Measure(
                "correlation with held-out ratings",
                before["held_out_correlation"],
                after["held_out_correlation"],
                "higher",
            ),
        ],
        curves=[Curve("Reward model loss", ["loss"], "nats per prompt"), Curve("Accuracy", ["accuracy"])],
        model=saved,
        facts={
            "comparisons": len(train),
            "steps": fitted.progress.step,
            "epochs": fitted.samples / len(train),
            "tokens": round(fitted.samples * tokens),
            "held_out_correlation": after["held_out_correlation"],
            "held_out_accuracy": after["held_out_accuracy"],
            "scores 0 on average": f"{len(shown)} demonstrations" if shown else "training answers",
            "sample": example(model, rankings, parallel),
            **fitted.facts,
        },
        notes=fitted.notes,
    )
    with runtime.evaluating(model):
        look_closer(report, model, lambda asked: parallel.forward(judged, asked), split, config, workspace)
        accuracy = measures.accuracy_of(parallel.forward(judged, train[:64]), config)
    measures.refuse_if_learnt_by_heart(report, accuracy, held_out, config)
    return report


def _sizes(comparisons: Sequence[Comparison]) -> str:
    """'16', or '2 to 9'."""
    sizes = {len(one.responses) for one in comparisons}
    return str(*sizes) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


def look_closer(
    report: Report,
    model: ScalarModel,
    judged: Callable[[Sequence[Comparison]], Scored],
    split: Split,
    config: Config,
    workspace: Workspace,
) -> None:
    """Add calibration, accuracy by number of answers and by annotator to the report of a trained model."""
    found = judged(split.held_out)
    raw = found.scores / model.scale.cpu()  # as in training: a probability is of the scale that was learnt
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
    held_out_annotators = judged(split.held_out_annotators) if split.held_out_annotators else None
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
    """What the model thinks of two answers."""

    def score(prompt: Sequence[Message], answers: Sequence[str]) -> list[float]:
        batch = runtime.on_device(rankings.batch([Comparison.of(prompt, answers, [0.0] * len(answers))]))
        with runtime.evaluating(model):
            return [float(value) for value in parallel.forward(model.score, batch.ids, batch.mask)]

    return measures.example_scores(score)


def compare_scores(config: Any, workspace: Workspace, report: Report) -> Answered:
    """What a reward model thinks of ten held-out pairs of answers, before training and after: by how much the
    score of the one that was rated higher leads."""
    held_out = load_split(config, workspace).held_out
    chosen = [
        pair for pair in map(_extremes, held_out) if pair.scores[0] - pair.scores[1] > config.tie_tolerance
    ][:PAIRS_SHOWN]
    base = open_base(config.base, workspace)
    if base.tokenizer is None or base.template is None or not chosen:
        raise UserError("there is no held-out pair that is no tie")
    found = checkpoint.Checkpoint(workspace.directory / str(report.model))
    after = ScalarModel(GPTConfig.from_dict(found.state()["model"]))
    checkpoint.load_model_tensors(after, found.tensors("model"), where=str(found.path))
    with torch.random.fork_rng(devices=[]):  # the head that training began with
        torch.manual_seed(runtime.seed_for(workspace.seed, "reward"))
        before = ScalarModel(base.model.config)
    before.start_from(base.model)
    rankings = Rankings(
        chosen, base.template, base.tokenizer, config, SampleOrder(len(chosen), workspace.seed)
    )
    leads = []
    for model in (before, after):
        with runtime.evaluating(model.to(runtime.device())):
            scores, _ = score_comparisons(model, rankings, chosen)
        leads.append((scores[:, 0] - scores[:, 1]).tolist())
    prompts = [
        f"{' / '.join(described(one['content']) for one in pair.prompt)} - higher: {pair.responses[0]} "
        f"- lower: {pair.responses[1]}"
        for pair in chosen
    ]
    pairs = [
        {"prompt": prompt, "before": f"{first:+.2f}", "after": f"{second:+.2f}"}
        for prompt, first, second in zip(prompts, *leads, strict=True)
    ]
    return Answered("margin of the higher rated answer, untrained", "trained", prompts, pairs)


def _extremes(one: Comparison) -> Comparison:
    """The answers rated highest and lowest, in this order."""
    rated = sorted(zip(one.scores, one.responses, strict=True), key=lambda pair: pair[0])
    low, high = rated[0], rated[-1]
    return Comparison(one.id, one.prompt, (high[1], low[1]), (high[0], low[0]))


def records_read(config: Config) -> dict[str, str]:
    """Comparisons of the user's own, or ratings to make comparisons from."""
    return {"comparisons": config.comparisons} if config.comparisons else {"ratings": config.data}


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
