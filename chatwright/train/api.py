"""The names that a stage file needs, in one import. Each is explained where it is defined."""

from __future__ import annotations

from chatwright.data.loader import SampleOrder
from chatwright.metrics import Metric, say
from chatwright.model.config import GPTConfig
from chatwright.model.lora import LoRAConfig
from chatwright.optim import OptimConfig
from chatwright.train.adapters import write_adapter
from chatwright.train.base import ChatBase, open_base, open_chat_base
from chatwright.train.cost import training_flop
from chatwright.train.fit_config import FitConfig
from chatwright.train.loop import Fitted
from chatwright.train.loop_metrics import (
    ANSWERS_PER_SECOND,
    FLOP_METRICS,
    LOOP_METRICS,
    LOSS_TROUBLE,
    TOKENS_PER_SECOND,
)
from chatwright.train.paper import DETAILS, INSTRUCT, Paper
from chatwright.train.parallel.context import ParallelConfig, ParallelContext
from chatwright.train.planning.limits import room_for
from chatwright.train.planning.program import (
    PlannedStage,
    StagePlan,
    StepProgram,
    fake_tokens,
    tokens_of_data,
)
from chatwright.train.stage import Stage, kl_from_base
from chatwright.train.stage_training import StageTraining, planned_model, start_training
from chatwright.train.trainer import Step
from chatwright.train.workspace import Answered, Curve, Measure, Report, Table, Unhealthy, Workspace

__all__ = [
    "ANSWERS_PER_SECOND",
    "DETAILS",
    "FLOP_METRICS",
    "INSTRUCT",
    "LOOP_METRICS",
    "LOSS_TROUBLE",
    "TOKENS_PER_SECOND",
    "Answered",
    "ChatBase",
    "Curve",
    "FitConfig",
    "Fitted",
    "GPTConfig",
    "LoRAConfig",
    "Measure",
    "Metric",
    "OptimConfig",
    "Paper",
    "ParallelConfig",
    "ParallelContext",
    "PlannedStage",
    "Report",
    "SampleOrder",
    "Stage",
    "StagePlan",
    "StageTraining",
    "Step",
    "StepProgram",
    "Table",
    "Unhealthy",
    "Workspace",
    "fake_tokens",
    "kl_from_base",
    "open_base",
    "open_chat_base",
    "planned_model",
    "room_for",
    "say",
    "start_training",
    "tokens_of_data",
    "training_flop",
    "write_adapter",
]
