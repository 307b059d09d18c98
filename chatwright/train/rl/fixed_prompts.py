"""Fixed sets of prompts: one chooses the checkpoint, the other measures the result.

An iteration's own completions answer other prompts each time, with other random numbers. The best of many
such means is the luckiest one. So the policy answers a fixed set besides, every `evaluate_every` iterations:
always the same prompts with the same seeds, so that two checkpoints differ by the policy alone.

There are two sets, for the same reason once more. The one that chooses is taken from the training
conversations; the best of its means is a little too good still. The result is measured on held-out
conversations, which had no say in the choice, beside the model that training started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.data.records import has_records, read_records
from chatwright.metrics import say
from chatwright.objectives import policy as objective
from chatwright.tokenizer import Tokenizer
from chatwright.train.base import ChatBase
from chatwright.train.rl.gold import Gold
from chatwright.train.rl.models import RLModels, ScoringConfig, score_rollout
from chatwright.train.rl.prompts import exchanges_from
from chatwright.train.rl.rollout import distinct, sample_completions, texts_of

LEFT_OUT = 5
"""Without held-out conversations, one in so many training prompts is left out of training."""


@dataclass(frozen=True)
class FixedPrompts:
    """A set of prompts that is always answered with the same seeds."""

    name: str
    prompts: Sequence[list[int]]
    completions: int
    """At least so many completions in all: few prompts are answered several times each."""

    @property
    def samples(self) -> int:
        """Completions per prompt; completion n answers prompt n modulo their number."""
        return max(1, -(-self.completions // len(self.prompts)))

    @property
    def rows(self) -> list[list[int]]:
        """One prompt per completion."""
        return list(self.prompts) * self.samples


@dataclass(frozen=True)
class PromptSets:
    """The prompts of a run: those of training, and the two fixed sets."""

    training: Sequence[list[int]]
    choosing: FixedPrompts
    """Training prompts, by whose completions the checkpoint is chosen."""
    held_out: FixedPrompts | None
    """Prompts that are not trained on, by which the result is measured; None when there are none at all."""
    note: str = ""
    """Which held-out prompts are left out, or where they come from, if not from held-out conversations."""


class SetSizes(ScoringConfig, Protocol):
    """The settings that decide the sizes of the sets, and how completions are sampled and scored."""

    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def evaluate_prompts(self) -> int: ...
    @property
    def held_out_prompts(self) -> int: ...


def prompt_sets(training: Sequence[list[int]], records: Path, base: ChatBase, config: SetSizes) -> PromptSets:
    """Divide the prompts. Held-out ones come from the data stage's held-out conversations. Where there are
    none, every fifth training prompt is left out of training and used instead."""
    file = records / "dialogues-validation.jsonl"
    limit, most = config.max_prompt_tokens, config.held_out_prompts
    found = exchanges_from(_held_out_dialogues(file), base.template, base.tokenizer, limit=limit, most=most)
    held_out, note = found.prompts, ""
    if held_out and (longer := sum(length > limit for length in found.lengths)):
        note = (
            f"{longer:,} of {len(found.lengths):,} held-out prompts are longer than max_prompt_tokens "
            f"{limit}, and left out"
        )
        say(f"  {note}")
    if not held_out and len(training) >= LEFT_OUT:
        held_out = list(training[LEFT_OUT - 1 :: LEFT_OUT][: config.held_out_prompts])
        out = set(range(LEFT_OUT - 1, len(training), LEFT_OUT)[: config.held_out_prompts])
        training = [prompt for n, prompt in enumerate(training) if n not in out]
        note = (
            f"there are no held-out conversations with a prompt of at most {limit} tokens: the result "
            f"is measured on {len(held_out)} training prompts that are left out of training"
        )
        say(f"  {note}")
    choosing = FixedPrompts("choosing", training[: config.evaluate_prompts], config.evaluate_prompts)
    measured = FixedPrompts("held out", held_out, config.held_out_prompts) if held_out else None
    return PromptSets(training, choosing, measured, note)


def _held_out_dialogues(file: Path) -> list[Dialogue]:
    """The held-out conversations; none where there is no such file, or a user's single file has none."""
    if not has_records(file):
        return []
    try:
        return list(read_records(file, Dialogue))
    except UserError:
        if file.parent.is_file():  # its training side was read: it is not damaged, it is short
            return []
        raise


@dataclass(frozen=True)
class Answers:
    """What a policy's completions of a fixed set are like. Each list has one number per prompt: the mean over
    its completions. Plain numbers, for a checkpoint keeps them."""

    score: list[float]
    kl: list[float]
    """Nats per completion, k1, from the reference."""
    length: list[float]
    finished: list[float]
    distinct_2: float
    """Over all completions together."""
    gold: list[float] = field(default_factory=list)
    """Empty without a gold measure."""

    def means(self) -> dict[str, float]:
        """The mean of each measure, under the names of an iteration's metrics."""
        found = {name: _mean(getattr(self, name)) for name in ("score", "kl", "length", "finished")}
        more = {"gold": _mean(self.gold)} if self.gold else {}
        return {**found, "distinct_2": self.distinct_2, **more}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Evaluator:
    """Answers fixed sets of prompts with the present policy, and measures the completions."""

    models: RLModels
    config: SetSizes
    tokenizer: Tokenizer
    end: int
    """The token that ends a completion."""
    seed_parts: Sequence[object]
    gold: Gold | None = None

    @torch.no_grad()
    def measure(self, chosen: FixedPrompts) -> Answers:
        """Sample and score. Every process must call it; all get the same numbers. It draws from random
        streams of its own: training is the same with and without."""
        parallel, rows = self.models.parallel, chosen.rows
        mine = parallel.local_slice(len(rows))
        answers = sample_completions(
            self.models.sampler(),
            rows[mine],
            end=self.end,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed_parts=(*self.seed_parts, chosen.name),
            first=mine.start,
            dtype=self.models.policy_dtype,
        )
        gold = torch.cat(parallel.all_gather(self.gold(answers).cpu())) if self.gold is not None else None
        seen = score_rollout(self.models, answers, self.config)
        answers, mask = seen.answers, seen.answers.response
        kl = torch.where(mask, objective.kl_k1(seen.policy_outputs.log_probs, seen.reference), 0.0).sum(1)

        def per_prompt(values: Float[Tensor, " completions"]) -> list[float]:
            grouped = values.double().cpu().view(-1, len(chosen.prompts))
            return [float(value) for value in grouped.mean(0)]

        found = Answers(
            per_prompt(seen.scores),
            per_prompt(kl),
            per_prompt(mask.sum(1)),
            per_prompt(answers.finished),
            distinct(texts_of(answers, self.tokenizer)),
            per_prompt(gold) if gold is not None else [],
        )
        return parallel.broadcast_from_rank0(lambda: found)
