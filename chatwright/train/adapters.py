"""Adapters for stages that can train one instead of all weights (`lora` settings; model/lora.py).

A checkpoint of such a stage holds `adapter.safetensors`. Training resumes from it over the base model, which
the stage loads anyway and whose fingerprint is in state.json. Beside it `model.safetensors` has the adapter
merged, so that the directory is complete in itself. A finished stage also has `adapter/`: the adapter of its
result in PEFT's format.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatwright import checkpoint, runtime
from chatwright.config import to_plain
from chatwright.interop.adapter_origin import FOLDER, origin_of
from chatwright.interop.peft import write_peft
from chatwright.metrics import say
from chatwright.model.gpt import GPT
from chatwright.model.lora import LoRAConfig, adapter_names, adapters_of, add_lora, lora_parameters
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext


def metadata(config: LoRAConfig, **bases: nn.Module) -> dict[str, Any]:
    """Metadata of the adapter for checkpoints: the settings, and a fingerprint of each frozen base model,
    which a resume checks. Empty without an adapter. Call it before the adapter is added."""
    if not config.rank:
        return {}
    prints = {name: checkpoint.fingerprint(checkpoint.model_tensors(one)) for name, one in bases.items()}
    return {"lora": {**to_plain(config), **prints}}


def adapt(model: nn.Module, config: LoRAConfig, what: str) -> None:
    """Put an adapter on a stage's model when its settings ask for one, and say how much is trained."""
    if not config.rank:
        return
    add_lora(model, config)
    trained, total = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)
    )
    say(
        f"  {what}: LoRA of rank {config.rank}, {trained:,} of {total:,} numbers are trained "
        f"({100 * trained / total:.2g} %)"
    )


def _whole(model: GPT, tensors: Mapping[str, Tensor]) -> GPT:
    """A whole copy of a sharded model on the CPU, with these tensors."""
    with torch.random.fork_rng(devices=[]):
        whole = GPT(model.config)
        add_lora(whole, next(iter(adapters_of(model).values())).config)
    checkpoint.load_model_tensors(whole, tensors, where="the processes' parts")
    return whole


def write_adapter(
    model: GPT, directory: Path, *, base: str, parallel: ParallelContext = SINGLE_PROCESS
) -> dict[str, Any]:
    """Write the adapter of a stage's model, if it has one, to `directory`/adapter; returns facts for the
    stage's report. `base` is the stage's setting: another stage of the run, or any model."""
    if not adapter_names(model):
        return {}
    target = directory / FOLDER
    tensors = (
        parallel.full_tensors_on_rank_zero(checkpoint.model_tensors(model)) if parallel.is_sharded else {}
    )

    def write() -> None:
        shutil.rmtree(target, ignore_errors=True)  # from an earlier run of the same stage
        origin = origin_of(base, directory.parent)
        write_peft(_whole(model, tensors) if tensors else model, target, origin=origin)

    runtime.broadcast_from_rank0(write)
    return {"adapter": FOLDER, "trained_parameters": sum(p.numel() for p in lora_parameters(model))}


def add_if_asked(model: nn.Module, config: LoRAConfig) -> None:
    """As `adapt`, without printing: for the planner's dry run."""
    if config.rank:
        add_lora(model, config)
