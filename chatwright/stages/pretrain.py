"""Pre-training: predict the next token of raw text.  Radford et al. 2018, section 3.1.

Departures from the papers, each for small budgets and each measured (docs/lab/performance.md):
* Muon for the blocks' matrices (Jordan et al. 2024) instead of AdamW for all.
* A constant learning rate with a linear decay at the end, instead of a cosine: the number of steps need not
  be known at first.
* Windows follow one another in the token stream, as in GPT-2 and GPT-3: documents are marked, but attention
  crosses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from chatwright import compiler, runtime
from chatwright.config import UsageError, UserError
from chatwright.data.shards import TokenShards
from chatwright.model.compile_friendly import make_compile_friendly
from chatwright.model.gpt import GPT
from chatwright.objectives.language import chunked_next_token_loss
from chatwright.tokenizer import Tokenizer
from chatwright.train.api import (
    FLOP_METRICS,
    LOOP_METRICS,
    LOSS_TROUBLE,
    TOKENS_PER_SECOND,
    Curve,
    FitConfig,
    Fitted,
    GPTConfig,
    Measure,
    Metric,
    OptimConfig,
    ParallelConfig,
    PlannedStage,
    Report,
    SampleOrder,
    Stage,
    StagePlan,
    Step,
    StepProgram,
    Workspace,
    fake_tokens,
    planned_model,
    say,
    start_training,
    training_flop,
)
from chatwright.train.held_out import held_out_bits_per_byte, held_out_nats, held_out_rows
from chatwright.train.precision import WorkingCopy


@dataclass(frozen=True)
class Config:
    """Settings of pre-training."""

    tokenizer: str = field(default="tokenizer", metadata={"input": True})
    """The stage, or directory, with tokenizer.json and the token shards."""
    preset: str = "modern-tiny"
    """Shape of the model: gpt1, gpt2, gpt3-125m, modern-tiny, ... (docs/reference/cli.md lists them)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the shape to change, for example {layers: 6}. The vocabulary is always the tokenizer's."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(seconds=300.0))
    """Length of training, batches and micro-batches."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="muon", learning_rate=6e-3, schedule="trapezoid", decay=0.6)
    )
    """Optimiser and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens: inputs are all but the last column, targets all but the first."""

    tokens: Int[Tensor, "batch time+1"]

    @property
    def weight(self) -> float:
        """Number of targets."""
        return float(self.tokens.shape[0] * (self.tokens.shape[1] - 1))


@dataclass(frozen=True)
class Windows:
    """Training windows in a random order; a sample depends on the seed and its index alone."""

    shards: TokenShards
    context: int
    order: SampleOrder

    def take(self, start: int, count: int) -> TokenBatch:
        """Samples start ... start + count - 1."""
        return TokenBatch(
            torch.stack([self.shards.window(n, self.context) for n in self.order.take(start, count)])
        )


def step(model: GPT, batch: TokenBatch, angles: tuple[Tensor, ...] | None = None) -> Step:
    """Next-token loss of a batch. `angles` are the rotary angles of its positions, where already computed."""
    hidden = model.hidden(batch.tokens[:, :-1], angles=angles)
    loss = chunked_next_token_loss(
        hidden, model.head.weight, batch.tokens[:, 1:], softcap=model.config.logit_softcap
    )
    return Step(loss)


def fast_step(
    model: GPT, config: FitConfig, *, alone: bool, is_sharded: bool = False
) -> tuple[Callable[[TokenBatch], Step], torch.dtype, str]:
    """`step` in the machine's best precision, compiled where that works; its dtype; and a line about both.

    Four things make it fast on a CPU, each measured in docs/lab/performance.md: bf16 copies of the matrices,
    attention in blocks, rotary angles computed once, one compiled graph. The bf16 copies are for one process
    `alone`: with several, the plan decides what is cast, and compiles the blocks when they are `is_sharded`.
    """
    dtype = runtime.compute_dtype(config.precision)
    copies = WorkingCopy(model) if alone and dtype == torch.bfloat16 else None
    used = copies.twin if copies else model
    if config.compile and runtime.device().type == "cpu" and not compiler.compiler_missing():
        make_compile_friendly(used)
    # Computed here: inside the graph they would be recomputed for every layer and every head.
    angles = model.angles(torch.arange(model.config.context, device=runtime.device())[None])

    def loss_of(tokens: Tensor) -> Tensor:
        with runtime.autocast(dtype):
            here = tuple(part[:, :, : tokens.shape[1] - 1] for part in angles) if angles else None
            return step(used, TokenBatch(tokens), here).loss  # type: ignore[arg-type]

    compiled, line = compiler.compile_function(loss_of, enabled=config.compile and not is_sharded)
    if is_sharded and config.compile:
        line = compiler.compiler_missing() or "compile: on, block by block"

    def train_step(batch: TokenBatch) -> Step:
        if copies:
            copies.refresh()
        return Step(compiled(batch.tokens))

    name = "bf16 products, float32 weights" if dtype == torch.bfloat16 else "float32"
    return train_step, dtype, f"{name}; {line}"


def step_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The training step on fake tensors, for the planner."""
    model = planned_model(GPT, planned, shape)
    train, dtype, _ = fast_step(model, planned.fit, alone=planned.processes * planned.shards == 1)

    def measure() -> None:
        model.eval()
        with runtime.autocast(dtype):
            held_out_nats(model, list(fake_tokens(held_out_rows(shape), shape.context + 1)))

    return StepProgram(
        [model],
        lambda samples: train(TokenBatch(fake_tokens(samples, shape.context + 1))).loss,
        vocabulary=shape.vocab_size,
        measure=measure,
    )


PLAN = StagePlan(build=step_program, one_graph=True, holds_records=False)


def run(config: Config, workspace: Workspace) -> Report:
    """Train a new model on token shards and measure bits per byte on held-out text before and after."""
    directory = workspace.resolve(config.tokenizer)
    tokenizer = Tokenizer.load(directory).dividing_documents()
    shards = TokenShards.open(directory / "train", tokenizer)
    held_out = TokenShards.open(directory / "validation", tokenizer)
    shape = shape_of(config, tokenizer.vocab_size)
    context, compiled = shape.context, config.fit.compile
    windows = Windows(shards, context, SampleOrder(windows_of(shards, context), workspace.seed))
    training = start_training("pretrain", PLAN, config, workspace, shape, compile_blocks=compiled)
    model = GPT(shape)
    trainer = training.trainer(model, tokenizer, compiling=None)
    alone, is_sharded = not training.parallel.together, training.parallel.is_sharded
    train_step, dtype, line = fast_step(model, training.config.fit, alone=alone, is_sharded=is_sharded)
    parameters, tokens = model.parameter_count(), shards.tokens
    size = f"{parameters / 1e6:.1f} M parameters; {tokens / 1e6:.1f} M training tokens"
    say(f"  {config.preset}: {size}; {line}")

    def evaluate() -> dict[str, float]:
        return {"bits_per_byte": held_out_bits_per_byte(model, held_out, context=context, dtype=dtype)}

    fitted = training.fit(
        trainer,
        windows,
        train_step,
        evaluate,
        throughput=("tokens", float(context)),
        best=("bits_per_byte", "lower"),
        flop_per_sample=training_flop(model, context),
        samples=windows.order.size,
    )
    made = {"parameters": parameters, "tokens": fitted.samples * context, "how": line}
    made["tokens in no window"] = shards.rest(context)
    return report_of(fitted, made, compressors(config, workspace))


MUCH = 0.01
"""Share of the training tokens that may be in no window without a line."""


def windows_of(shards: TokenShards, context: int) -> int:
    """The number of training windows; says when much of the text is in none. Raises UserError without any."""
    windows, rest = shards.windows(context), shards.rest(context)
    if not windows:
        raise UserError(
            f"the training text has {shards.tokens:,} tokens, less than one window of {context}: add "
            f"text, or set model.context to {max(1, shards.tokens // 8)} or less"
        )
    if rest > MUCH * shards.tokens:
        say(f"  {rest:,} of {shards.tokens:,} training tokens fill no window of {context} and are left out")
    return windows


def compressors(config: Config, workspace: Workspace) -> list[Measure]:
    """Bits per byte of gzip and xz on the same text, where the tokenizer's stage has measured them."""
    known = workspace.result(config.tokenizer) if config.tokenizer in workspace.inputs else {}
    facts = known.get("facts", {})
    return [
        Measure(f"{name} -9, the same text", None, facts[key], "context")
        for name in ("gzip", "xz")
        if (key := f"{name}_bits_per_byte") in facts
    ]


def report_of(fitted: Fitted, made: dict[str, Any], yardsticks: list[Measure]) -> Report:
    """The report: bits per byte beside those of compressors, and the cost of training."""
    return Report(
        measures=[fitted.measure("bits_per_byte", "bits per byte, held out"), *yardsticks],
        curves=[
            Curve("Pre-training loss", ["loss"], "nats per token"),
            Curve("Held out", ["bits_per_byte"], "bits"),
        ],
        model=fitted.model,
        facts={
            **made,
            "steps": fitted.progress.step,
            "training_seconds": fitted.progress.elapsed,
            **fitted.facts,
        },
        notes=fitted.notes,
    )


def shape_of(config: Config, vocab_size: int | None) -> GPTConfig:
    """The shape of the new model. Raises UsageError for settings that no model can have."""
    size = {} if vocab_size is None else {"vocab_size": vocab_size}
    try:
        return GPTConfig.preset(config.preset, **{**config.model, **size})
    except TypeError as error:
        raise UsageError(f"model: {error}") from None


METRICS = (
    Metric(
        "loss",
        "nats per token",
        "starts near ln(vocabulary size), which is guessing, and falls",
        "Mean loss of the next token over the last step.",
        unhealthy=LOSS_TROUBLE,
    ),
    Metric(
        "bits_per_byte",
        "bits per byte",
        "below what gzip and xz need for the same text, which the report has",
        "Negative log-likelihood of held-out text per UTF-8 byte.",
        unhealthy="rising while `loss` falls: the text is learnt by heart, take more data or fewer passes",
    ),
    *LOOP_METRICS,
    TOKENS_PER_SECOND,
    *FLOP_METRICS,
)

STAGE = Stage(config=Config, run=run, plan=PLAN, metrics=METRICS, shape=shape_of)
