"""Supervised fine-tuning: answer as people did.  Ouyang et al. 2022, section 3.5.

Departures from the paper: short conversations share a row (packing; they cannot see each other, so that no
result changes), and a conversation longer than the context is cut between exchanges instead of being left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from chatwright import runtime
from chatwright.chat import NATIVE, ChatTemplate
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.data.packing import ChatBatch, PackedRow, batch_rows, cut_dialogue, pack
from chatwright.data.picture import legend, row_picture
from chatwright.data.records import read_records, records_of
from chatwright.metrics import Metric, console, say
from chatwright.model.compile_friendly import make_compile_friendly
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.lora import LoRAConfig
from chatwright.objectives.language import chunked_next_token_loss
from chatwright.optim import OptimConfig
from chatwright.tokenizer import Tokenizer
from chatwright.train import adapters
from chatwright.train.base import open_base
from chatwright.train.compiled import compile_blocks
from chatwright.train.cost import training_flop
from chatwright.train.loop import Fit, FitConfig
from chatwright.train.loop_metrics import FLOP_METRICS, LOOP_METRICS, LOSS_TROUBLE, TOKENS_PER_SECOND
from chatwright.train.paper import INSTRUCT, Paper
from chatwright.train.parallel.context import ParallelConfig
from chatwright.train.parallel.start import start_parallel
from chatwright.train.planning import plan
from chatwright.train.planning.program import PlannedStage, StagePlan, StepProgram, fake_tokens
from chatwright.train.stage import Stage
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Curve, Measure, Report, Table, Workspace


@dataclass(frozen=True)
class Config:
    """Settings of supervised fine-tuning."""

    base: str = field(default="pretrain", metadata={"input": True})
    """The model to start from: a stage, a directory, smollm2, hf:owner/name ..."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-train.jsonl and dialogues-validation.jsonl."""
    context: int = 0
    """Tokens of a row: what is longer is cut, between exchanges; 0 takes the model's whole context."""
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


@dataclass(frozen=True)
class Rows:
    """Packed rows in an order that depends on the seed and the index alone."""

    rows: list[PackedRow]
    length: int
    order: SampleOrder

    def take(self, start: int, count: int) -> ChatBatch:
        """Samples start ... start + count - 1."""
        return batch_rows([self.rows[n] for n in self.order.take(start, count)], self.length)


def rows_of(
    file: Path, template: ChatTemplate, tokenizer: Tokenizer, length: int, *, packing: bool, limit: int = 0
) -> list[PackedRow]:
    """The conversations of a file as rows; those of the first `limit` rows' worth of tokens when it is above
    0."""
    pieces, tokens = [], 0
    for dialogue in read_records(file, Dialogue):
        for piece in cut_dialogue(dialogue.messages, template, tokenizer, length):
            if any(piece.mask):
                pieces.append(piece)
                tokens += len(piece.ids)
        if limit and tokens > limit * length:
            break
    if not pieces:
        raise UserError(f"{file} holds no conversation with an assistant's answer; nothing to learn from")
    return pack(pieces, length, enabled=packing)


def check_end_is_learnt(rows: list[PackedRow], template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the token that ends an answer is inside the loss: without it, no answer would
    end."""
    end = tokenizer.control_ids[template.end]
    if not any(flag and token == end for row in rows for token, flag in zip(row.ids, row.mask, strict=True)):
        raise UserError(
            f"no training row learns the end token {template.end}: the model would never stop talking. "
            "Look at the chat template (chatwright doctor MODEL shows the loss mask)"
        )


PORTION = 256
"""Positions that are learnt from come in multiples of this: a buffer of a new size in every step would fit
into no hole that the one before has left, and the process would grow to several times what it uses."""


SHORT = 1024
"""Tokens of a row up to which compiled products with a mask are faster, on a CPU, than the fused kernel:
their memory grows with the square."""


def is_compile_friendly(length: int) -> bool:
    """Whether compiled rows of this length take the compile-friendly forms (model/compile_friendly.py)."""
    return runtime.device().type == "cpu" and runtime.compiler_missing() is None and length <= SHORT


def compiled_for(model: GPT, length: int, *, cut: bool = False) -> str:
    """Compile the model for rows of this length; a line that says whether that works, and why not. `cut`: as
    in `compile_blocks`."""
    if is_compile_friendly(length) and not cut:
        make_compile_friendly(model)
    return compile_blocks(model, cut=cut)


def step(model: GPT, batch: ChatBatch) -> Step:
    """Loss of the answers' tokens and their end tokens."""
    learnt = F.pad(batch.learn[:, 1:], (1, 0)).flatten().nonzero()[:, 0]  # the first of a row follows nothing
    rows = model.hidden_at(batch.ids, learnt - 1, documents=batch.documents, positions=batch.positions)
    targets = batch.ids.flatten()[learnt]
    more = PORTION * max(1, -(-len(rows) // PORTION)) - len(rows)
    rows, targets = F.pad(rows, (0, 0, 0, more)), F.pad(targets, (0, more))
    counted = torch.arange(len(rows), device=rows.device) < len(rows) - more
    cap = model.config.logit_softcap
    return Step(
        chunked_next_token_loss(rows[None], model.head.weight, targets[None], counted[None], softcap=cap)
    )


def start(config: Config, workspace: Workspace) -> tuple[GPT, Tokenizer, ChatTemplate, Path]:
    """The model to start from, how it writes conversations, and where these are. Raises UserError."""
    base = open_base(config.base, workspace)
    if base.tokenizer is None:
        raise UserError(f"{config.base} has no tokenizer")
    template = base.template or NATIVE
    template.end_ids(base.tokenizer)
    return base.model, base.tokenizer, template, records_of(workspace.resolve(config.data))


def row_length(config: Config, model: GPT) -> int:
    """Tokens of a row."""
    return min(config.context or model.config.context, model.config.context)


def tally(rows: Sequence[PackedRow], length: int) -> str:
    """How full the rows are, and how much of them is learnt, in a sentence."""
    tokens, learnt = sum(len(row.ids) for row in rows), sum(learnt_tokens(row) for row in rows)
    return (
        f"{len(rows):,} rows of {length} tokens, {100 * tokens / (len(rows) * length):.0f} % filled; "
        f"{learnt:,} of {tokens:,} tokens are learnt ({100 * learnt / tokens:.0f} %)"
    )


def learnt_tokens(row: PackedRow) -> int:
    """Tokens of a row that are in the loss; the first of a conversation follows nothing and is not."""
    return sum(flag and position > 0 for flag, position in zip(row.mask, row.positions, strict=True))


def preview(config: Config, workspace: Workspace, count: int) -> None:
    """Print the first `count` rows that training would see, with their loss mask, and what all of them amount
    to.

    Nothing is trained or written. Raises UserError as `run` does, after the rows where the end token is not
    learnt.
    """
    model, tokenizer, template, records = start(config, workspace)
    length, colours = row_length(config, model), console.is_terminal
    rows = rows_of(records / "dialogues-train.jsonl", template, tokenizer, length, packing=config.packing)
    console.print(Text("What the model learns to write is ").append(legend(colours=colours)), soft_wrap=True)
    for number in SampleOrder(len(rows), workspace.seed).take(0, min(count, len(rows))):
        row = rows[number]
        say(
            f"\nrow {number}: {len(row.ids)} of {length} tokens in {row.documents[-1]} conversations, "
            f"{learnt_tokens(row)} learnt"
        )
        console.print(row_picture(row, tokenizer, end=template.end, colours=colours), soft_wrap=True)
    say(f"\n{tally(rows, length)}")
    check_end_is_learnt(rows, template, tokenizer)


EXCERPT = 600
"""Characters of a row that the report shows."""


def excerpt(row: PackedRow, tokenizer: Tokenizer, template: ChatTemplate) -> Table:
    """The beginning of a row with its loss mask, for the report."""
    text = row_picture(row, tokenizer, end=template.end, colours=False).plain
    cut = text if len(text) <= EXCERPT else f"{text[:EXCERPT]} ..."
    return Table(
        "The beginning of the first row; what stands in [[ ]] is learnt",
        ["row"],
        [[line] for line in cut.splitlines() if line],
    )


def step_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The training step on fake tensors, for the planner."""
    with torch.device(runtime.device()):
        model = GPT(shape)
    model.activation_checkpointing = planned.fit.recompute
    adapters.add_if_asked(model, planned.config.lora)
    dtype = runtime.compute_dtype(planned.fit.precision)
    _, length = planned.rows
    if planned.compiled and is_compile_friendly(length):
        make_compile_friendly(model)

    def step(samples: int) -> Tensor:
        ids = fake_tokens(samples, length)
        with runtime.autocast(dtype):
            places = ids.new_zeros(max(1, round(planned.learnt * samples * length)))
            learnt = model.hidden_at(ids, places, documents=ids, positions=ids)
            return chunked_next_token_loss(
                learnt[None], model.head.weight, ids.flatten()[None, : learnt.shape[0]]
            )

    return StepProgram([model], step, vocabulary=shape.vocab_size)


PLAN = StagePlan(build=step_program)


def run(config: Config, workspace: Workspace) -> Report:
    """Fine-tune on conversations and measure the loss of held-out answers before and after."""
    model, tokenizer, template, records = start(config, workspace)
    model.to(runtime.device())
    model.activation_checkpointing = config.fit.recompute
    length = row_length(config, model)
    rows = rows_of(records / "dialogues-train.jsonl", template, tokenizer, length, packing=config.packing)
    check_end_is_learnt(rows, template, tokenizer)
    held_out = rows_of(
        records / "dialogues-validation.jsonl",
        template,
        tokenizer,
        length,
        packing=True,
        limit=config.held_out,
    )[: config.held_out]
    filled = sum(len(row.ids) for row in rows) / (len(rows) * length)
    learnt = sum(map(learnt_tokens, rows))
    parallel = start_parallel(
        config.parallel,
        batch_size=config.fit.batch_size,
        micro_batch=config.fit.micro_batch,
        shape=model.config,
        precision=config.fit.precision,
    )
    config = plan.ahead("sft", PLAN, config, model.config, parallel, learnt=learnt / (len(rows) * length))
    runtime.tune_allocator()
    torch.manual_seed(runtime.seed_for(workspace.seed, "sft"))  # dropout, where the model has any
    dtype = runtime.compute_dtype(config.fit.precision)
    adapted = adapters.metadata(config.lora, base=model)
    adapters.adapt(model, config.lora, "model")
    if config.fit.compile:
        say(f"  {compiled_for(model, length, cut=parallel.is_tensor_parallel)}")
    trainer = Trainer(
        {"model": model},
        config.optim,
        workspace,
        metadata={
            "kind": "language",
            "model": model.config.to_dict(),
            "tokenizer": tokenizer.fingerprint,
            "template": template.fingerprint,
            **adapted,
        },
        texts={"tokenizer.json": tokenizer.to_json(), "chat_template.jinja": template.source},
        keep=config.fit.keep,
        parallel=parallel,
    )
    say(f"  {tally(rows, length)}")

    def train_step(batch: ChatBatch) -> Step:
        with runtime.autocast(dtype):
            return step(model, batch)

    def evaluate() -> dict[str, float]:
        total = weight = 0.0
        for start in range(0, len(held_out), 16):
            batch = runtime.on_device(batch_rows(held_out[start : start + 16], length))
            total += float(train_step(batch).loss)
            weight += batch.weight
        return {"held_out_loss": total / weight}

    fitted = Fit(
        trainer,
        config.fit,
        Rows(rows, length, SampleOrder(len(rows), workspace.seed)),
        train_step,
        evaluate,
        title="sft",
        throughput=("tokens", filled * length),
        best=("held_out_loss", "lower"),
        flop_per_sample=training_flop(model, length),
    ).run()
    return Report(
        measures=[
            Measure(
                "loss of held-out answers",
                fitted.before["held_out_loss"],
                fitted.after["held_out_loss"],
                note="nats per token",
            )
        ],
        curves=[Curve("SFT loss", ["loss"], "nats per answer token")],
        model=f"checkpoints/{fitted.checkpoint.path.name}",
        facts={
            "rows": len(rows),
            "filled": filled,
            "tokens learnt": learnt,
            "steps": fitted.progress.step,
            "epochs": fitted.samples / len(rows),
            "tokens": round(fitted.samples * filled * length),
            **fitted.facts,
            **adapters.write_adapter(model, workspace.directory, base=config.base, parallel=parallel),
        },
        notes=fitted.notes,
        tables=[excerpt(rows[SampleOrder(len(rows), workspace.seed)[0]], tokenizer, template)],
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
