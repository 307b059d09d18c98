"""SFT: supervised fine-tuning, answer as people did.  Ouyang et al. 2022, section 3.5.

Departures from the paper:
* Short conversations share a row (packing). They cannot see each other, so that no result changes.
* A conversation longer than the context is cut between exchanges instead of being left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from chatwright import compiler, runtime
from chatwright.chat import NATIVE, ChatTemplate
from chatwright.data.chat_rows import Rows, check_end_is_learnt, conversations_of, learnt_tokens, rows_of
from chatwright.data.cuts import Cuts, check_limit, length_of_data
from chatwright.data.packing import ChatBatch, PackedRow, batch_rows
from chatwright.data.picture import legend, row_picture
from chatwright.data.records import records_of
from chatwright.metrics import console
from chatwright.model.compile_friendly import make_compile_friendly
from chatwright.model.gpt import GPT
from chatwright.objectives.language import chunked_next_token_loss
from chatwright.tokenizer import Tokenizer
from chatwright.train.api import (
    FLOP_METRICS,
    INSTRUCT,
    LOOP_METRICS,
    LOSS_TROUBLE,
    TOKENS_PER_SECOND,
    ChatBase,
    Curve,
    FitConfig,
    Fitted,
    GPTConfig,
    LoRAConfig,
    Metric,
    OptimConfig,
    Paper,
    ParallelConfig,
    PlannedStage,
    Report,
    SampleOrder,
    Stage,
    StagePlan,
    StageTraining,
    Step,
    StepProgram,
    Table,
    Workspace,
    fake_tokens,
    open_chat_base,
    planned_model,
    room_for,
    say,
    start_training,
    training_flop,
    write_adapter,
)
from chatwright.train.compiled import compile_blocks


@dataclass(frozen=True)
class Config:
    """Settings of supervised fine-tuning."""

    base: str = field(default="pretrain", metadata={"input": True})
    """The model to start from: a stage, a directory, smollm2, hf:owner/name ..."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-train.jsonl and dialogues-validation.jsonl."""
    context: int = 0
    """Tokens of a row: what is longer is cut, between exchanges. 0: the longest conversation, rounded up to a
    multiple of 64, at most the model's context and what memory holds; a conversation of more than 1,024
    tokens and four times the usual length does not count, and is cut."""
    packing: bool = True
    """Let short conversations share a row; they cannot see each other."""
    held_out: int = 128
    """Rows to measure the held-out loss on."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train a low-rank adapter instead of all weights: `lora.rank` above 0."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(seconds=75.0, compile=False))
    """Length of training, batches and micro-batches; a sample is a packed row."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="adamw", learning_rate=1e-3, schedule="trapezoid", decay=0.6)
    )
    """Optimiser and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""

    def __post_init__(self) -> None:
        check_limit("context", self.context, 8)


PAPER = (
    Paper("passes over the conversations", 16, INSTRUCT, lambda config, facts: facts.get("epochs")),
    Paper(
        "fit.batch_size",
        32,
        f"{INSTRUCT}: 1.3B and 6B; there a sample is one conversation, here a packed row",
    ),
    Paper("optim.learning_rate", 9.65e-6, f"{INSTRUCT}: 1.3B and 6B"),
    Paper("optim.schedule", "cosine", INSTRUCT),
    Paper("optim.final", 0.1, INSTRUCT),
    Paper("optim.warmup", 0.0, INSTRUCT),
    Paper("optim.beta1", 0.9, INSTRUCT),
    Paper("optim.beta2", 0.95, INSTRUCT),
    Paper("lora.rank", 0, f"{INSTRUCT}: all weights are trained"),
)


PORTION = 256
"""The number of learnt positions is padded to a multiple of this. Buffers of a new size in every step would
fragment the heap, and the process would grow to several times what it uses."""


SHORT = 1024
"""Longest row, in tokens, for which compiled attention with a mask is faster on a CPU than the fused kernel.
Its memory grows with the square of the length."""


def is_compile_friendly(length: int) -> bool:
    """Whether compiled rows of this length take the compile-friendly forms (model/compile_friendly.py)."""
    return runtime.device().type == "cpu" and compiler.compiler_missing() is None and length <= SHORT


def compiled_for(model: GPT, length: int, *, cut: bool = False) -> str:
    """Compile the model for rows of this length; returns a line that says whether that works, or why not.
    `cut` is that of `compile_blocks`."""
    if is_compile_friendly(length) and not cut:
        make_compile_friendly(model)
    return compile_blocks(model, cut=cut)


def step(model: GPT, batch: ChatBatch) -> Step:
    """Loss of the answers' tokens, end tokens included."""
    learnt = (
        F.pad(batch.learn[:, 1:], (1, 0)).flatten().nonzero()[:, 0]
    )  # nothing predicts a row's first token
    rows = model.hidden_at(batch.ids, learnt - 1, documents=batch.documents, positions=batch.positions)
    targets = batch.ids.flatten()[learnt]
    more = PORTION * max(1, -(-len(rows) // PORTION)) - len(rows)
    rows, targets = F.pad(rows, (0, 0, 0, more)), F.pad(targets, (0, more))
    counted = torch.arange(len(rows), device=rows.device) < len(rows) - more
    cap = model.config.logit_softcap
    return Step(
        chunked_next_token_loss(rows[None], model.head.weight, targets[None], counted[None], softcap=cap)
    )


STEP = 64
"""A row length that comes from the data is a multiple of this."""


def start(config: Config, workspace: Workspace) -> tuple[ChatBase, Path]:
    """The base model, and the directory of the conversations. Raises UserError."""
    base = open_chat_base(config.base, workspace, template=NATIVE)
    base.template.check_end(base.tokenizer)
    return base, records_of(workspace.resolve(config.data))


def training_rows(config: Config, workspace: Workspace, base: ChatBase, records: Path) -> tuple[Rows, Cuts]:
    """The training rows, in their random order, and what was cut. Their length is the setting `context`, or
    that of the conversations. Raises UserError."""
    file, shape = records / "dialogues-train.jsonl", base.model.config
    cuts = Cuts("conversations", "context", min(config.context or shape.context, shape.context), step=STEP)
    read = conversations_of(file, base.template, base.tokenizer)
    if not config.context:
        read = iter(known := list(read))
        lengths = [len(one.whole.ids) for one in known if one.whole is not None]
        wanted = length_of_data(lengths, step=STEP, floor=SHORT) or STEP
        cuts.room = room_for(
            "sft", PLAN, shape, wanted, lambda tokens: replace(config, context=tokens), step=STEP
        )
        cuts.limit = min(wanted, cuts.room.most)
    rows = rows_of(
        file, base.template, base.tokenizer, cuts.limit, packing=config.packing, cuts=cuts, read=read
    )
    return Rows(rows, cuts.limit, SampleOrder(len(rows), workspace.seed)), cuts


def preview(config: Config, workspace: Workspace, count: int) -> None:
    """Print the first `count` rows that training would see, with their loss mask, and a summary of all rows.

    Nothing is trained or written. Raises UserError as `run` does. When the end token is not learnt, the rows
    are printed first.
    """
    base, records = start(config, workspace)
    (rows, cuts), colours = training_rows(config, workspace, base, records), console.is_terminal
    console.print(Text("What the model learns to write is ").append(legend(colours=colours)), soft_wrap=True)
    for number in rows.order.take(0, min(count, len(rows.rows))):
        row = rows.rows[number]
        held = f"{len(row.ids)} of {rows.length} tokens in {row.documents[-1]} conversations"
        say(f"\nrow {number}: {held}, {learnt_tokens(row)} learnt")
        picture = row_picture(
            row, base.tokenizer, end=base.template.ends(base.tokenizer).last, colours=colours
        )
        console.print(picture, soft_wrap=True)
    say(f"\n{rows}\n{cuts}")
    check_end_is_learnt(rows.rows, base.template, base.tokenizer)


EXCERPT = 600
"""Characters of a row that the report shows."""


def excerpt(row: PackedRow, tokenizer: Tokenizer, template: ChatTemplate) -> Table:
    """The beginning of a row with its loss mask, for the report."""
    text = row_picture(row, tokenizer, end=template.ends(tokenizer).last, colours=False).plain
    cut = text if len(text) <= EXCERPT else f"{text[:EXCERPT]} ..."
    return Table(
        "The beginning of the first row; what stands in [[ ]] is learnt",
        ["row"],
        [[line] for line in cut.splitlines() if line],
    )


def step_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The training step on fake tensors, for the planner."""
    model = planned_model(GPT, planned, shape)
    dtype = runtime.compute_dtype(planned.fit.precision)
    _, length = planned.rows
    if planned.compiled and is_compile_friendly(length):
        make_compile_friendly(model)

    def step(samples: int) -> Tensor:
        ids = fake_tokens(samples, length)
        with runtime.autocast(dtype):
            indices = ids.new_zeros(max(1, round(planned.learnt * samples * length)))
            learnt = model.hidden_at(ids, indices, documents=ids, positions=ids)
            return chunked_next_token_loss(
                learnt[None], model.head.weight, ids.flatten()[None, : learnt.shape[0]]
            )

    return StepProgram([model], step, vocabulary=shape.vocab_size)


PLAN = StagePlan(build=step_program)


def held_out_loss(step: Callable[[ChatBatch], Step], rows: list[PackedRow], length: int) -> dict[str, float]:
    """Mean loss of a held-out answer token, in nats."""
    total = weight = 0.0
    for start in range(0, len(rows), 16):
        batch = runtime.on_device(batch_rows(rows[start : start + 16], length))
        total += float(step(batch).loss)
        weight += batch.weight
    return {"held_out_loss": total / weight}


def run(config: Config, workspace: Workspace) -> Report:
    """Fine-tune on conversations and measure the loss of held-out answers before and after."""
    base, records = start(config, workspace)
    model = base.model.to(runtime.device())
    rows, cuts = training_rows(config, workspace, base, records)
    say(f"  {rows}\n  {cuts}")
    check_end_is_learnt(rows.rows, base.template, base.tokenizer, cuts)
    length, most = rows.length, config.held_out
    held_out = held_out_rows(records, base, length, most)
    config, share = replace(config, context=length), rows.learnt / rows.size
    training = start_training("sft", PLAN, config, workspace, model.config, learnt=share)
    compiling = partial(compiled_for, length=length)
    trainer = training.trainer(
        model, base.tokenizer, base.template, generation=base.generation, compiling=compiling
    )
    train_step = training.in_precision(partial(step, model))
    fitted = training.fit(
        trainer,
        rows,
        train_step,
        lambda: held_out_loss(train_step, held_out, length),
        throughput=("tokens", rows.tokens / rows.size * length),
        best=("held_out_loss", "lower"),
        flop_per_sample=training_flop(model, length),
        samples=len(rows.rows),
    )
    return report_of(training, fitted, rows, base, cuts)


def held_out_rows(records: Path, base: ChatBase, length: int, most: int) -> list[PackedRow]:
    """At most `most` rows of held-out conversations; says what is cut of them. Raises UserError."""
    cuts = Cuts("held-out conversations", "context", length, step=STEP)
    file = records / "dialogues-validation.jsonl"
    rows = rows_of(file, base.template, base.tokenizer, length, packing=True, limit=most, cuts=cuts)
    if cuts.causes:
        say(f"  {cuts}")
    return rows[:most]


def report_of(
    training: StageTraining[Config], fitted: Fitted, rows: Rows, base: ChatBase, cuts: Cuts
) -> Report:
    """The report: held-out loss, amounts of data, what was cut, and the beginning of the first row."""
    filled = rows.tokens / rows.size
    directory, named = training.workspace.directory, training.config.base
    return Report(
        measures=[fitted.measure("held_out_loss", "loss of held-out answers", note="nats per token")],
        curves=[Curve("SFT loss", ["loss"], "nats per answer token")],
        model=fitted.model,
        facts={
            "rows": len(rows.rows),
            "context": rows.length,
            "cut": cuts.facts,
            "filled": filled,
            "tokens learnt": rows.learnt,
            "steps": fitted.progress.step,
            "epochs": fitted.samples / len(rows.rows),
            "tokens": round(fitted.samples * filled * rows.length),
            **fitted.facts,
            **write_adapter(base.model, directory, base=named, parallel=training.parallel),
        },
        notes=[*cuts.notes, *fitted.notes],
        tables=[excerpt(rows.rows[rows.order[0]], base.tokenizer, base.template)],
    )


METRICS = (
    Metric(
        "loss",
        "nats per token",
        "starts at the base model's loss on such answers, and falls",
        "Mean loss over the last step, of the tokens that are learnt: answers and their end tokens.",
        unhealthy=LOSS_TROUBLE,
    ),
    Metric(
        "held_out_loss",
        "nats per token",
        "falls below its value before SFT, which the report has",
        "Loss of held-out answers and their end tokens.",
        unhealthy="rising while `loss` falls: overfitting, train for less",
    ),
    *LOOP_METRICS,
    TOKENS_PER_SECOND,
    *FLOP_METRICS,
)

STAGE = Stage(
    config=Config,
    run=run,
    plan=PLAN,
    metrics=METRICS,
    preview=preview,
    paper=PAPER,
    reads=lambda config: {"dialogues": config.data},
)
