"""Mini-DPO: prefer the better of two answers, without a reward model.  Rafailov et al. 2023, eq. 7.

A stage in one file, written with CONTRIBUTING.md alone, for the tests of what a package of others brings. It
is a fixture and no product: one process, two answers to a prompt, no ties, no length normalisation.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chatwright import runtime
from chatwright.chat import Message
from chatwright.data.examples import Comparison
from chatwright.data.loader import pad
from chatwright.data.records import records_of
from chatwright.model.gpt import GPT
from chatwright.objectives.language import projected_log_probs
from chatwright.train.api import (
    ANSWERS_PER_SECOND,
    FLOP_METRICS,
    LOOP_METRICS,
    ChatBase,
    Curve,
    FitConfig,
    GPTConfig,
    LoRAConfig,
    Metric,
    OptimConfig,
    Paper,
    PlannedStage,
    Report,
    SampleOrder,
    Stage,
    StagePlan,
    Step,
    StepProgram,
    Workspace,
    fake_tokens,
    kl_from_base,
    open_chat_base,
    planned_model,
    start_training,
    training_flop,
    write_adapter,
)
from chatwright.train.preference.rankings import own_comparisons


@dataclass(frozen=True)
class Config:
    """Settings of Mini-DPO."""

    base: str = field(default="sft", metadata={"input": True})
    """The chat model to start from; it stays the reference."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with comparisons-*.jsonl."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    max_tokens: int = 80
    """Longer rows lose their end."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train a low-rank adapter instead of all weights: `lora.rank` above 0."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=40, batch_size=8, compile=False))
    """Length of training, batches and micro-batches; a sample is a pair of answers."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=5e-4, schedule="trapezoid"))
    """Optimiser and schedule."""


PAPER = (
    Paper("beta", 0.1, "Rafailov et al. 2023, appendix B"),
    Paper("fit.batch_size", 64, "Rafailov et al. 2023, appendix B"),
    Paper("optim.learning_rate", 1e-6, "Rafailov et al. 2023, appendix B"),
)


@dataclass(frozen=True)
class PairBatch:
    """Two rows for each pair: the preferred answers in the first half, the others in the second."""

    ids: Int[Tensor, "rows time"]
    learn: Bool[Tensor, "rows time"]
    """True at the tokens of answers and their end tokens."""

    @property
    def weight(self) -> float:
        """Number of pairs."""
        return len(self.ids) / 2


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers in an order that depends on the seed and the index alone."""

    comparisons: list[Comparison]
    base: ChatBase
    max_tokens: int
    order: SampleOrder

    def take(self, start: int, count: int) -> PairBatch:
        """Samples start ... start + count - 1."""
        return self.batch([self.comparisons[n] for n in self.order.take(start, count)])

    def batch(self, chosen: list[Comparison]) -> PairBatch:
        """The best and the worst answer of each comparison as tensors."""
        ranked = [sorted(zip(one.scores, one.responses, strict=True), reverse=True) for one in chosen]
        rows = [
            self.base.template.encode(
                [*one.prompt, Message(role="assistant", content=answers[place][1])], self.base.tokenizer
            )
            for place in (0, -1)
            for one, answers in zip(chosen, ranked, strict=True)
        ]
        end = self.base.tokenizer.end_of_text_id
        ids = pad([row.ids[: self.max_tokens] for row in rows], end)
        return PairBatch(ids, pad([[*map(int, row.mask[: self.max_tokens])] for row in rows], 0).bool())


def log_probs(model: GPT, batch: PairBatch) -> Float[Tensor, " rows"]:
    """Log-probability of each row's answer, in nats."""
    hidden = model.hidden(batch.ids[:, :-1])
    targets, cap = batch.ids[:, 1:], model.config.logit_softcap
    each = projected_log_probs(hidden.flatten(0, 1), model.head.weight, targets.flatten(), softcap=cap)
    return torch.where(batch.learn[:, 1:], each.view(targets.shape), 0.0).sum(1)


def step(model: GPT, reference: GPT, beta: float, batch: PairBatch) -> Step:
    """-log sigmoid of beta times the difference of the two log-ratios, summed over pairs."""
    with torch.no_grad():
        before = log_probs(reference, batch)
    better, worse = (log_probs(model, batch) - before).chunk(2)
    right = (better > worse).float().sum()
    return Step(-F.logsigmoid(beta * (better - worse)).sum(), {"accuracy": right.detach()})


def step_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The training step on fake tensors, for the planner."""
    model = planned_model(GPT, planned, shape)
    reference = GPT(shape).requires_grad_(False).to(runtime.device())
    rows, length = planned.rows

    def once(samples: int) -> Tensor:
        ids = fake_tokens(samples * rows, length)
        return step(model, reference, planned.config.beta, PairBatch(ids, ids == 0)).loss

    return StepProgram([model], once, frozen=[reference], vocabulary=shape.vocab_size)


PLAN = StagePlan(build=step_program, rows=lambda config, shape: (2, config.max_tokens))


def run(config: Config, workspace: Workspace) -> Report:
    """Train on pairs and measure loss and accuracy on held-out ones before and after."""
    base = open_chat_base(config.base, workspace)
    train, held_out = own_comparisons(records_of(workspace.resolve(config.data)))
    training = start_training("mini_dpo", PLAN, config, workspace, base.model.config)
    reference = deepcopy(base.model).requires_grad_(False).to(runtime.device()).eval()
    trainer = training.trainer(base.model, base.tokenizer, base.template)
    pairs = Pairs(train, base, config.max_tokens, SampleOrder(len(train), workspace.seed))
    train_step = training.in_precision(partial(step, base.model, reference, config.beta))

    def evaluate() -> dict[str, float]:
        batch = runtime.on_device(pairs.batch(held_out))
        found = train_step(batch)
        accuracy = float(found.logged["accuracy"]) / batch.weight
        return {"held_out_loss": float(found.loss) / batch.weight, "held_out_accuracy": accuracy}

    fitted = training.fit(
        trainer,
        pairs,
        train_step,
        evaluate,
        throughput=("answers", 2.0),
        best=("held_out_loss", "lower"),
        flop_per_sample=2 * training_flop(base.model, config.max_tokens),
    )
    return Report(
        measures=[
            fitted.measure("held_out_loss", "loss on held-out pairs", note="nats per pair; guessing: 0.693"),
            fitted.measure("held_out_accuracy", "accuracy on held-out pairs", "higher"),
        ],
        curves=[Curve("Loss of Mini-DPO", ["loss"], "nats per pair"), Curve("Accuracy", ["accuracy"])],
        model=fitted.model,
        facts={**fitted.facts, **write_adapter(base.model, workspace.directory, base=config.base)},
        notes=fitted.notes,
    )


METRICS = (
    Metric("loss", "nats per pair", "falls from 0.693", "Mean loss over the pairs of the last step."),
    Metric("accuracy", "share of pairs", "rises", "How often the policy moved towards the better answer."),
    Metric("held_out_loss", "nats per pair", "falls", "The loss on held-out pairs; 0.693 is guessing."),
    Metric("held_out_accuracy", "share of pairs", "rises", "`accuracy` on held-out pairs."),
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
    reads=lambda config: {"comparisons": config.data},
    kl_budget=kl_from_base,
)
