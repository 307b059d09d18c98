"""What the stages that train a judge have in common: the reward model (reward.py) and the classifier
(classifier.py)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.config import UserError
from chatwright.interop.loaded import Loaded
from chatwright.metrics import say
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig
from chatwright.optim import OptimConfig
from chatwright.train import adapters
from chatwright.train.base import open_base
from chatwright.train.compiled import compile_blocks
from chatwright.train.loop import FitConfig
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext
from chatwright.train.planning.program import PlannedStage, StepProgram, fake_tokens
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Workspace


class JudgeStage(Protocol):
    """The settings that both stages have."""

    @property
    def base(self) -> str: ...
    @property
    def lora(self) -> LoRAConfig: ...
    @property
    def fit(self) -> FitConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


def chat_base(name: str, workspace: Workspace) -> Loaded:
    """The chat model whose body a judge starts from. Raises UserError when it has no template or
    tokenizer."""
    base = open_base(name, workspace)
    if base.tokenizer is None or base.template is None:
        raise UserError(f"{name} has no chat template; a judge of answers needs a model after sft")
    return base


def make_scalar_model(
    verb: str,
    config: JudgeStage,
    workspace: Workspace,
    base: Loaded,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> tuple[ScalarModel, Trainer, torch.dtype]:
    """A scalar model with the base's body, what trains it, and the type that it computes in."""
    assert base.tokenizer is not None and base.template is not None
    torch.manual_seed(runtime.seed_for(workspace.seed, verb))
    model = ScalarModel(base.model.config)
    model.start_from(base.model)
    adapters.adapt(model, config.lora, f"{verb} model")
    model.to(runtime.device())
    model.body.activation_checkpointing = config.fit.recompute
    if runtime.device().type == "cpu":
        model.body.use_attention(plain_attention)
    if config.fit.compile:
        say(f"  {compile_blocks(model, cut=parallel.is_tensor_parallel)}")
    runtime.tune_allocator()
    metadata: dict[str, Any] = {
        "kind": "reward",
        "model": model.config.to_dict(),
        "tokenizer": base.tokenizer.fingerprint,
        "template": base.template.fingerprint,
        **adapters.metadata(config.lora, base=base.model),
    }
    texts = {"tokenizer.json": base.tokenizer.to_json(), "chat_template.jinja": base.template.source}
    trainer = Trainer(
        {"model": model},
        config.optim,
        workspace,
        metadata=metadata,
        texts=texts,
        keep=config.fit.keep,
        parallel=parallel,
    )
    return model, trainer, runtime.compute_dtype(config.fit.precision)


def scalar_program(planned: PlannedStage, shape: GPTConfig) -> StepProgram:
    """The training step on fake tensors, for the planner."""
    with torch.device(runtime.device()):
        model = ScalarModel(shape)
    model.body.activation_checkpointing = planned.fit.recompute
    adapters.add_if_asked(model, planned.config.lora)
    dtype = runtime.compute_dtype(planned.fit.precision)
    rows, length = planned.rows

    def step(samples: int) -> Tensor:
        with runtime.autocast(dtype):
            ids = fake_tokens(samples * rows, length)
            return model.at(ids, ids.new_zeros(samples * rows)).sum()

    return StepProgram([model], step, vocabulary=shape.vocab_size)
