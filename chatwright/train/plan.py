"""Before a stage starts: what it will need, how long it will take, the micro-batch that fits, or a refusal with the arithmetic.

Memory is what a rehearsal on fake tensors finds (rehearsal.py) and what the allocator adds to it; time is the sum of the
rehearsal's operations, each timed on this machine (timing.py). docs/plan.md compares both with what then happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.config import UserError
from chatwright.metrics import duration, say
from chatwright.model.compile_friendly import make_compile_friendly
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import add_lora
from chatwright.objectives.language import chunked_next_token_loss, projected_log_probs
from chatwright.train.parallel import Spread
from chatwright.train.rehearsal import Operation, Rehearsed, Scene, rehearse
from chatwright.train.timing import SECONDS, seconds_of

PLANNED = ("pretrain", "sft", "reward", "classifier", "ppo", "reinforce")
"""Stages that can be planned."""

ROUNDS = ("ppo", "reinforce")
"""Those that sample what they learn from."""

PROGRAM = 2.5e8
"""Bytes of Python, torch and this program themselves; on a GPU they are not in its memory."""
RECORDS = 2.5e8
"""Bytes of conversations, ratings and rows of tokens, which all but pre-training hold as Python's objects: those of the default data, by
what stages took alone (docs/plan.md). Token shards are memory-mapped."""

EAGER = (1.40, 1e8)
"""Allocator, factor and bytes: live tensors leave holes in glibc's heap that do not all fit what comes next; the bytes are
those of the libraries' own buffers. Both are fitted to benchmarks/plan.py."""
COMPILED = (0.9, 2.6e8)
"""The same for compiled steps: the share of the activations that the rehearsal sees which they keep, and bytes, some of which the
compiler leaves."""
GPU = (1.08, 6e8)
"""The same for CUDA's caching allocator; the bytes are those of its context and cuBLAS."""

SMALL = 10.0
"""Seconds of a whole run that is over before a plan would be worth reading."""
ROUGH = 2e11
"""Floating-point operations a second, where nothing is known yet."""
SHARE = 0.02
"""Of a run's length that timing its operations may take, when it starts."""


@dataclass(frozen=True)
class Plan:
    """What one stage will take."""

    stage: str
    batch: int
    """Samples per optimiser step in this process."""
    micro: int
    """Samples per forward pass."""
    length: int
    """Tokens per sample."""
    steps: int
    """Optimiser steps; 0 where a budget in seconds decides."""
    budget_seconds: float
    parameters: float
    memory: Mapping[str, float]
    """Part -> bytes at the largest moment, the allocator's and the program's own among them."""
    available: float | None
    """Bytes that may be used; None where nobody knows."""
    flop: float
    """Floating-point operations of a step."""
    seconds: float | None
    """Of an optimiser step; None when it was not timed."""

    @property
    def total(self) -> float:
        """Bytes at the largest moment."""
        return sum(self.memory.values())

    @property
    def above_baseline(self) -> float:
        """Bytes beyond those of the program, and its data, before the model is made."""
        return self.total - self.memory.get("program", 0.0) - self.memory.get("records", 0.0)

    @property
    def fits(self) -> bool:
        """Whether it fits into the memory there is."""
        return self.available is None or self.total <= self.available

    @property
    def expected_steps(self) -> int:
        """Optimiser steps, those of a budget in seconds predicted."""
        if self.steps or not self.seconds:
            return self.steps
        return max(1, round(self.budget_seconds / self.seconds))

    def arithmetic(self) -> str:
        """'31.2 GB = weights 4.2 + gradients 4.2 + ...'."""
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        digits = 1 if self.total / unit < 1000 else 0
        shown = [
            f"{part} {size / unit:,.{digits}f}"
            for part, size in self.memory.items()
            if size / self.total > 0.005
        ]
        return f"{self.total / unit:,.{digits}f} {name} = {' + '.join(shown)}"

    def line(self) -> str:
        """The plan in one line."""
        micro = (
            f", {self.batch // self.micro} micro-batches of {self.micro}" if self.micro != self.batch else ""
        )
        took = ""
        if self.seconds is not None:
            steps = self.expected_steps
            took = f"; {self.seconds:.2f} s a step, {steps:,} steps in {duration(steps * self.seconds)}"
        return f"plan: {self.arithmetic()}{micro}; {self.flop / 1e9:,.0f} GFLOP a step{took}"


@dataclass(frozen=True)
class Subject:
    """A stage as the planner sees it."""

    stage: str
    verb: str
    shape: GPTConfig
    config: Any
    """The stage's own settings."""
    learnt: float = 1.0
    """Share of the tokens that SFT learns from; known once the data is read."""
    shards: int = 1
    """Processes that share one copy of weights, gradients and optimiser."""
    processes: int = 1
    """Processes that see different samples."""

    @property
    def fit(self) -> Any:
        """Length and portions; PPO's come from settings of its own."""
        return getattr(self.config, "fit", None)

    @property
    def batch(self) -> int:
        """Samples per optimiser step in one process."""
        size = self.fit.batch_size if self.fit is not None else self.config.minibatch_size
        return max(1, int(size) // self.processes)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows per sample, tokens per row."""
        if self.verb == "reward":
            return self.config.k, self.config.max_tokens
        if self.verb == "classifier":
            return 1, self.config.max_tokens
        if self.verb in ROUNDS:
            answer = self.config.max_prompt_tokens + self.config.max_new_tokens
            text = (self.config.ptx_context or self.shape.context) if self.config.ptx else 0
            return 1, max(answer, text)  # one after the other
        return 1, min(getattr(self.config, "context", 0) or self.shape.context, self.shape.context)

    @property
    def steps(self) -> int:
        """Optimiser steps; 0 where seconds decide."""
        if self.fit is not None:
            return int(self.fit.steps)
        epochs = getattr(self.config, "epochs", 1)
        return int(self.config.iterations * epochs * self.config.batch_size // self.config.minibatch_size)

    @property
    def compiled(self) -> bool:
        """Whether its step will be compiled here."""
        wanted = self.config.compile if self.fit is None else self.fit.compile
        return bool(wanted) and runtime.compiler_missing() is None

    @property
    def compiled_whole(self) -> bool:
        """Whether it is one compiled graph, not blocks with plain functions between them: what `COMPILED` and `FUSED` were measured on."""
        return self.verb == "pretrain" and self.compiled


def scene_of(subject: Subject) -> Callable[[int], Scene]:
    """What builds the stage's scene with a given number of layers, inside a rehearsal."""
    build = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "classifier": _reward}.get(
        subject.verb, _rounds
    )
    return lambda layers: build(subject, replace(subject.shape, layers=layers))


def _tokens(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device=runtime.device())


def _pretrain(subject: Subject, shape: GPTConfig) -> Scene:
    from chatwright.train import pretrain  # which imports this module

    with torch.device(runtime.device()):
        model = GPT(shape)
    model.activation_checkpointing = subject.fit.recompute
    train, dtype, _ = pretrain.fast_step(model, subject.fit, alone=subject.processes * subject.shards == 1)

    def measure() -> None:
        model.eval()
        with runtime.autocast(dtype):
            pretrain._sum_of(model, list(_tokens(pretrain.held_out_rows(shape), shape.context + 1)))

    return Scene(
        [model],
        lambda samples: train(pretrain.TokenBatch(_tokens(samples, shape.context + 1))).loss,
        vocabulary=shape.vocab_size,
        measure=measure,
    )


def _adapt(model: GPT | ScalarModel, subject: Subject) -> None:
    """Put the stage's adapter on, if its settings have one."""
    if subject.config.lora.rank:
        add_lora(model, subject.config.lora)


def _sft(subject: Subject, shape: GPTConfig) -> Scene:
    from chatwright.train import sft  # which imports this module

    with torch.device(runtime.device()):
        model = GPT(shape)
    model.activation_checkpointing = subject.fit.recompute
    _adapt(model, subject)
    dtype = runtime.compute_dtype(subject.fit.precision)
    _, length = subject.rows
    if subject.compiled and sft.is_compile_friendly(length):
        make_compile_friendly(model)

    def step(samples: int) -> Tensor:
        ids = _tokens(samples, length)
        with runtime.autocast(dtype):
            places = ids.new_zeros(max(1, round(subject.learnt * samples * length)))
            learnt = model.hidden_at(ids, places, documents=ids, positions=ids)
            return chunked_next_token_loss(
                learnt[None], model.head.weight, ids.flatten()[None, : learnt.shape[0]]
            )

    return Scene([model], step, vocabulary=shape.vocab_size)


def _reward(subject: Subject, shape: GPTConfig) -> Scene:
    with torch.device(runtime.device()):
        model = ScalarModel(shape)
    model.body.activation_checkpointing = subject.fit.recompute
    _adapt(model, subject)
    dtype = runtime.compute_dtype(subject.fit.precision)
    rows, length = subject.rows

    def step(samples: int) -> Tensor:
        with runtime.autocast(dtype):
            ids = _tokens(samples * rows, length)
            return model.at(ids, ids.new_zeros(samples * rows)).sum()

    return Scene([model], step, vocabulary=shape.vocab_size)


def _rounds(subject: Subject, shape: GPTConfig) -> Scene:
    """PPO and REINFORCE; a critic that is a head on the policy is too small to count."""
    needed, adapted = subject.config, bool(subject.config.lora.rank)
    with torch.device(runtime.device()):
        policy = GPT(shape)
        critic = ScalarModel(shape) if getattr(needed, "critic", "none") == "separate" else None
        frozen: list[GPT | ScalarModel] = []
        if not adapted:  # else the reference is in the policy, and an average is one of small matrices
            frozen = [GPT(shape) for _ in range(2 if needed.average else 1)]
        if not adapted or critic is None:  # else the judge is in the critic
            frozen.append(ScalarModel(shape))
    for model in frozen:
        model.requires_grad_(False)
    trained: list[GPT | ScalarModel] = [policy] if critic is None else [policy, critic]
    for model in trained:
        _adapt(model, subject)
    length, dtype = subject.rows[1], runtime.compute_dtype(needed.policy_precision)

    def step(samples: int) -> Tensor:
        ids = _tokens(samples, length)
        places = ids.new_zeros(
            samples * (length if needed.ptx else needed.max_new_tokens)
        )  # of general text, all are looked at
        with runtime.autocast(dtype):
            hidden = policy.hidden_at(ids, places)
            loss = projected_log_probs(hidden, policy.head.weight, places, softcap=shape.logit_softcap).sum()
        return loss if critic is None else loss + critic.at(ids, places).sum()

    return Scene(trained, step, frozen=frozen, vocabulary=shape.vocab_size)


def predict(
    subject: Subject, *, micro: int = 0, available: float | None = None
) -> tuple[Plan, Mapping[Operation, float]]:
    """What the stage will take with micro-batches of `micro` samples (0: its own setting, or the whole batch), not yet
    timed; and the operations of a step."""
    micro = micro or (subject.fit.micro_batch if subject.fit is not None else 0) or subject.batch
    micro = min(micro, subject.batch)
    portions = subject.batch // micro
    with torch.compiler.set_stance("force_eager"):  # fake tensors are for the plain functions
        seen = rehearse(
            scene_of(subject), subject.shape.layers, subject.config.optim, micro=micro, portions=portions
        )
    rows, length = subject.rows
    plan = Plan(
        subject.stage,
        subject.batch,
        micro,
        rows * length,
        subject.steps,
        getattr(subject.fit, "seconds", 0.0),
        seen.parameters,
        memory_of(seen, subject),
        available,
        seen.flop,
        None,
    )
    return plan, seen.operations


def memory_of(seen: Rehearsed, subject: Subject) -> dict[str, float]:
    """The parts of the largest moment, with what the allocator and the program add."""
    parts = {
        name: size / subject.shards if name in ("weights", "gradients", "optimiser") else size
        for name, size in seen.memory.items()
    }
    if subject.verb in ROUNDS and subject.shards > 1:
        with torch.device("meta"):
            parts["sampler"] = (
                4.0 * GPT(subject.shape).parameter_count()
            )  # the whole policy, in every process
    on_gpu = runtime.device().type == "cuda"
    if subject.compiled_whole and not on_gpu:
        share, parts["allocator"] = COMPILED
        parts["activations"] *= share
    else:
        factor, constant = GPU if on_gpu else EAGER
        parts["allocator"] = (factor - 1) * sum(parts.values()) + constant
    if not on_gpu:
        parts["program"] = PROGRAM
        if subject.verb != "pretrain":
            parts["records"] = RECORDS
    return {name: size for name, size in parts.items() if size > 0}


def choose(
    subject: Subject, *, timed: bool = True, available: float | None = None, budget: float = SECONDS
) -> Plan:
    """The plan with the largest micro-batch that fits, after about `budget` seconds of timing. Raises UserError, with the arithmetic,
    when none does.

    The memory it must fit into is the machine's, not what happens to be free: a resumed run chooses the same.
    """
    available = available or runtime.memory_budget_bytes()
    plan, operations = predict(subject, available=available)
    if not plan.fits:
        if subject.fit is None or subject.fit.micro_batch:
            raise _refusal(subject, plan)
        plan, operations = _smaller(subject, available)
    if not timed:
        return plan
    return replace(plan, seconds=seconds_of(operations, compiled=subject.compiled_whole, budget=budget))


def _smaller(subject: Subject, available: float | None) -> tuple[Plan, Mapping[Operation, float]]:
    """Bisection over the divisors of the batch: memory grows with the micro-batch."""
    divisors = [n for n in range(1, subject.batch) if subject.batch % n == 0] or [1]
    best, operations = predict(subject, micro=1, available=available)
    if not best.fits:
        raise _refusal(subject, best)
    low, high = 0, len(divisors)
    while high - low > 1:
        middle = (low + high) // 2
        plan, found = predict(subject, micro=divisors[middle], available=available)
        if plan.fits:
            best, operations, low = plan, found, middle
        else:
            high = middle
    return best, operations


def _refusal(subject: Subject, plan: Plan) -> UserError:
    assert plan.available is not None
    unit, name = (1e9, "GB") if plan.total >= 1e9 else (1e6, "MB")
    fixed = sum(plan.memory.get(part, 0.0) for part in ("weights", "gradients", "optimiser"))
    if subject.fit is None and plan.micro > 1:
        advice = f"a smaller {subject.stage}.minibatch_size"
    elif plan.micro > 1:
        advice = f"{subject.stage}.fit.micro_batch 0 lets the plan choose a smaller one"
    elif fixed > 0.7 * plan.available:
        advice = "a smaller shape, or several processes that share it (docs/scaling.md)"
    else:
        advice = "a shorter context (model.context), a smaller vocabulary or shape"
    return UserError(
        f"{subject.stage} with micro-batches of {plan.micro} needs {plan.arithmetic()}; this machine has "
        f"{plan.available / unit:,.1f} {name} to give (CHATWRIGHT_MEMORY overrides); smaller: {advice}"
    )


def rough_seconds(subject: Subject) -> float:
    """Of the whole run, by its budget or by 6 N FLOP per token: good to a factor of a few."""
    if not subject.steps:
        return float(getattr(subject.fit, "seconds", 0.0))
    rows, length = subject.rows
    with torch.device("meta"):
        parameters = GPT(subject.shape).parameter_count()
    return 6 * parameters * subject.batch * rows * length * subject.steps / ROUGH


def worth_planning(subject: Subject) -> bool:
    """Whether the run is long enough for a plan; always when CHATWRIGHT_MEMORY is set."""
    return runtime.memory_is_limited() or rough_seconds(subject) > SMALL


def ahead(verb: str, config: Any, shape: GPTConfig, spread: Spread, *, learnt: float = 1.0) -> Any:
    """Say the plan of a stage that is about to start; returns its settings with the micro-batch that fits.

    Raises UserError, in every process, when none does.
    """
    box = getattr(spread, "box", None)
    subject = Subject(
        verb,
        verb,
        shape,
        config,
        learnt,
        shards=box.shard * box.tensor if box else 1,
        processes=spread.data_size,
    )
    if not worth_planning(subject):
        return config
    micro = runtime.told_by_first(lambda: _ahead(subject))
    return replace(config, fit=replace(config.fit, micro_batch=micro)) if micro else config


def _ahead(subject: Subject) -> int:
    started = time.monotonic()
    plan = choose(subject, budget=min(SECONDS, SHARE * rough_seconds(subject)))
    besides = "; sampling comes on top" if subject.verb in ROUNDS else ""
    say(f"  {plan.line()}{besides} (planned in {time.monotonic() - started:.0f} s)")
    if subject.fit is None or subject.fit.micro_batch or plan.micro == plan.batch:
        return 0
    say(f"  the whole batch of {plan.batch} does not fit; micro-batches of {plan.micro} change no result")
    return plan.micro
