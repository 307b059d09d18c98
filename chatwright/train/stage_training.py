"""The steps that every training stage takes in the same order.

    training = start_training("sft", PLAN, config, workspace, shape)    processes, plan, allocator, seed
    trainer = training.trainer(model, tokenizer)                         adapter, compilation, optimiser
    fitted = training.fit(trainer, batches, step, evaluate)              the loop of loop.py

The order decides which random numbers a stage draws. `start_training` sets the seed, then the stage draws new
weights, then `trainer` draws those of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, TypeVar

import torch

from chatwright import memory, runtime
from chatwright.chat import ChatTemplate
from chatwright.generation_config import GenerationConfig, own_default
from chatwright.metrics import say
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig
from chatwright.tokenizer import Tokenizer
from chatwright.train import adapters
from chatwright.train.base import model_metadata, model_texts
from chatwright.train.compiled import compile_blocks
from chatwright.train.loop import Batches, Best, Fit, Fitted
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext
from chatwright.train.parallel.start import start_parallel
from chatwright.train.planning import plan as planning
from chatwright.train.planning.program import PlannedStage, StagePlan
from chatwright.train.trainer import AnyBatch, Step, Trainer
from chatwright.train.workspace import Workspace

Settings = TypeVar("Settings")
Model = TypeVar("Model", GPT, ScalarModel)
Result = TypeVar("Result")


def start_training(
    stage: str,
    plan: StagePlan,
    config: Settings,
    workspace: Workspace,
    shape: GPTConfig,
    *,
    learnt: float = 1.0,
    compile_blocks: bool = False,
    refused: Mapping[str, str] | None = None,
) -> StageTraining[Settings]:
    """Arrange the processes, print the plan, and set the seed.

    `config` has `optim`, and `fit` or `minibatch_size`; also `parallel` where several processes may share the
    work. `refused` maps the parallel plans that the stage cannot use to the reason. `learnt` is the share of
    the tokens that are in the loss. With `compile_blocks`, several processes compile the blocks of models
    that the plan shards. Raises UserError when the processes cannot be arranged, or when not even the
    smallest micro-batch fits into memory.
    """
    fit: Any = getattr(config, "fit", None)
    wanted = getattr(config, "parallel", None)
    parallel = SINGLE_PROCESS
    if wanted is not None:
        parallel = start_parallel(
            wanted,
            batch_size=fit.batch_size if fit else config.minibatch_size,  # type: ignore[attr-defined]
            micro_batch=fit.micro_batch if fit else 0,
            named="batch_size" if fit else "minibatch_size",
            shape=shape,
            precision=fit.precision if fit else "fp32",
            compile_blocks=compile_blocks,
            refused=refused,
        )
    config = planning.ahead(stage, plan, config, shape, parallel, learnt=learnt)
    memory.tune_allocator()
    torch.manual_seed(runtime.seed_for(workspace.seed, stage))  # for new weights and dropout
    return StageTraining(stage, config, workspace, parallel)


@dataclass(frozen=True)
class StageTraining(Generic[Settings]):
    """The training of one stage, as `start_training` begins it."""

    stage: str
    config: Settings
    """Its settings, with the micro-batch that the plan has chosen."""
    workspace: Workspace
    parallel: ParallelContext

    @property
    def settings(self) -> Any:
        """The same settings, for the fields that all stages have: `fit`, `optim`, `lora`."""
        return self.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of matrix products: bfloat16 or float32. Weights are float32."""
        return runtime.compute_dtype(self.settings.fit.precision)

    def trainer(
        self,
        model: GPT | ScalarModel,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        base: GPT | None = None,
        generation: GenerationConfig | None = None,
        compiling: Callable[..., str] | None = compile_blocks,
    ) -> Trainer:
        """Prepare a model for training (adapter, device, compilation) and make its trainer.

        `base` is the model whose weights an adapter is trained over, where it is not the model itself;
        `generation` are the sampling settings that the result keeps; by default our own.
        `compiling(model, cut=...)` compiles the model when the settings ask for it, and returns a line about
        it; None leaves compilation to the stage. Raises UserError for impossible adapter settings.
        """
        fit, name = self.settings.fit, "model" if isinstance(model, GPT) else f"{self.stage} model"
        lora: LoRAConfig | None = getattr(self.config, "lora", None)
        adapter = adapters.metadata(lora, base=base or model) if lora else {}
        if lora:
            adapters.adapt(model, lora, name)
        model.to(runtime.device())
        (model if isinstance(model, GPT) else model.body).activation_checkpointing = fit.recompute
        if compiling is not None and fit.compile:
            say(f"  {compiling(model, cut=self.parallel.is_tensor_parallel)}")
        kind = "language" if isinstance(model, GPT) else "reward"
        recommended = generation or (own_default() if kind == "language" else None)
        return Trainer(
            {"model": model},
            self.settings.optim,
            self.workspace,
            metadata=model_metadata(kind, model.config, tokenizer, template, adapter=adapter),
            texts=model_texts(tokenizer, template, recommended),
            keep=fit.keep,
            parallel=self.parallel,
        )

    def in_precision(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The same function, with products in the precision that the settings ask for."""

        @wraps(function)
        def inside(*arguments: Any, **named: Any) -> Result:
            with runtime.autocast(self.dtype):
                return function(*arguments, **named)

        return inside

    def fit(
        self,
        trainer: Trainer,
        batches: Batches[AnyBatch],
        step: Callable[[AnyBatch], Step],
        evaluate: Callable[[], dict[str, float]],
        *,
        throughput: tuple[str, float] = ("samples", 1.0),
        best: Best | None = None,
        flop_per_sample: float | None = None,
        samples: int = 0,
    ) -> Fitted:
        """Train to the end, measuring before and after. `samples` is the number of different ones, where
        known; other arguments are those of `loop.Fit`. Raises Interrupted, after saving, when the run is
        asked to stop, and UserError when a budget in seconds does not hold two steps."""
        if note := few_samples(samples, self.settings.fit.batch_size, "fit.batch_size"):
            say(f"  {note}")
        fitted = Fit(
            trainer,
            self.settings.fit,
            batches,
            step,
            evaluate,
            title=self.stage,
            throughput=throughput,
            best=best,
            flop_per_sample=flop_per_sample,
            settings=self.settings,
        ).run()
        fitted.notes.extend([note] if note else [])
        return fitted


def few_samples(samples: int, batch: int, setting: str) -> str:
    """The line that says that a batch holds the same samples more than once; empty where it does not."""
    if not 0 < samples < batch:
        return ""
    return (
        f"{samples:,} samples are fewer than a batch of {batch:,}: every step sees each of them "
        f"{batch / samples:.1f} times; {setting} {samples} would see each once"
    )


def planned_model(kind: type[Model], planned: PlannedStage, shape: GPTConfig) -> Model:
    """A model on fake tensors for a stage's plan, prepared as `StageTraining.trainer` would prepare it."""
    with torch.device(runtime.device()):
        model = kind(shape)
    (model if isinstance(model, GPT) else model.body).activation_checkpointing = planned.fit.recompute
    lora: LoRAConfig | None = getattr(planned.config, "lora", None)
    if lora:
        adapters.add_if_asked(model, lora)
    return model
