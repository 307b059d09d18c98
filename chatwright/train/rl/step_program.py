"""PPO's and REINFORCE's update on fake tensors, for the planner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.objectives.language import projected_log_probs
from chatwright.train import adapters
from chatwright.train.planning.program import (
    PlannedStage,
    StagePlan,
    StepProgram,
    fake_tokens,
    tokens_of_data,
)


def step_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The update of PPO or REINFORCE. A critic that is a head on the policy is too small to count."""
    needed, adapted = planned.config, bool(planned.config.lora.rank)
    with torch.device(runtime.device()):
        policy = GPT(shape)
        critic = ScalarModel(shape) if getattr(needed, "critic", "none") == "separate" else None
        frozen: list[GPT | ScalarModel] = []
        if not adapted:  # else the policy is the reference too, and an EMA has only small matrices
            frozen = [GPT(shape) for _ in range(2 if needed.ema else 1)]
        if not adapted or critic is None:  # else the critic's frozen body is the reward model's
            frozen.append(ScalarModel(shape))
    for model in frozen:
        model.requires_grad_(False)
    trained: list[GPT | ScalarModel] = [policy] if critic is None else [policy, critic]
    for model in trained:
        adapters.add_if_asked(model, planned.config.lora)
    length, dtype = planned.rows[1], runtime.compute_dtype(needed.policy_precision)

    def step(samples: int) -> Tensor:
        ids = fake_tokens(samples, length)
        # Of general text all positions are learnt from.
        places = ids.new_zeros(samples * (length if needed.ptx else lengths(needed, shape)[1]))
        with runtime.autocast(dtype):
            hidden = policy.hidden_at(ids, places)
            loss = projected_log_probs(hidden, policy.head.weight, places, softcap=shape.logit_softcap).sum()
        return loss if critic is None else loss + critic.at(ids, places).sum()

    return StepProgram(trained, step, frozen=frozen, vocabulary=shape.vocab_size)


def lengths(config: Any, shape: GPTConfig) -> tuple[int, int]:
    """Tokens of a prompt and of a completion; half of the assumed row each while they come from data that are
    not yet read."""
    assumed = tokens_of_data(0, shape) // 2
    return config.max_prompt_tokens or assumed, config.max_new_tokens or assumed


def rows(config: Any, shape: GPTConfig) -> tuple[int, int]:
    """(1, tokens of a row): prompt and completion, or a window of general text, whichever is longer."""
    completion = sum(lengths(config, shape))
    text = (config.ptx_context or shape.context) if config.ptx else 0
    return 1, max(completion, text)  # the two passes run one after the other


def steps(config: Any) -> int:
    """Optimiser steps of all iterations."""
    epochs = getattr(config, "epochs", 1)
    return int(config.iterations * epochs * config.batch_size // config.minibatch_size)


PLAN = StagePlan(build=step_program, rows=rows, steps=steps, samples=True)
