"""Shared code of the stages that train a scalar model: the reward model and the classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chatwright import runtime
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.train.base import ChatBase
from chatwright.train.planning.program import PlannedStage, StepProgram, fake_tokens
from chatwright.train.stage_training import StageTraining, planned_model
from chatwright.train.trainer import Trainer

PURPOSE = "a judge of answers needs a model after sft"
"""End of the error message when a base model has no chat template."""


def scalar_trainer(training: StageTraining[Any], base: ChatBase) -> tuple[ScalarModel, Trainer]:
    """A scalar model with the base's body and a new head, and its trainer."""
    model = ScalarModel(base.model.config)
    model.start_from(base.model)
    if runtime.device().type == "cpu":
        model.body.use_attention(plain_attention)
    return model, training.trainer(model, base.tokenizer, base.template, base=base.model)


def scalar_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The training step on fake tensors, for the planner."""
    model = planned_model(ScalarModel, planned, shape)
    dtype = runtime.compute_dtype(planned.fit.precision)
    rows, length = planned.rows

    def step(samples: int) -> Tensor:
        with runtime.autocast(dtype):
            ids = fake_tokens(samples * rows, length)
            return model.at(ids, ids.new_zeros(samples * rows)).sum()

    return StepProgram([model], step, vocabulary=shape.vocab_size)
