"""What the test of adapters on many processes starts: a few steps of an adapted model by each plan, and what
was trained.

`python -m support.many_lora OUT PLAN ...`, alone or under torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from chatwright import runtime, tensor_files
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.lora import LoRAConfig, add_lora, trained_tensors
from chatwright.optim import OptimConfig
from chatwright.stages import pretrain
from chatwright.train.parallel.context import ParallelConfig
from chatwright.train.parallel.start import process_group, start_parallel
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Workspace

STEPS, PART, BATCH = 8, 4, 4
SHAPE = GPTConfig.preset("modern-nano", vocab_size=96, context=24, tied=False)


def lively_model() -> GPT:
    """The base, the same in every process."""
    model = GPT(SHAPE)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
    torch.manual_seed(7)
    add_lora(model, LoRAConfig(rank=4))
    return model


def train(out: Path, plan: str, *, stop: int = STEPS) -> None:
    """Up to step `stop` from wherever the directory stands; everything that was trained goes to
    `out`.safetensors."""
    model = lively_model()
    parallel = start_parallel(ParallelConfig(plan), batch_size=BATCH, shape=SHAPE, precision="fp32")  # type: ignore[arg-type]
    card = {"kind": "language", "model": SHAPE.to_dict()}
    optim = OptimConfig(learning_rate=1e-2, clip=1.0)
    trainer = Trainer({"model": model}, optim, Workspace(out, 7), metadata=card, texts={}, parallel=parallel)
    trainer.resume()
    mine = BATCH // parallel.data_size
    while trainer.progress.step < stop:
        draw = torch.Generator().manual_seed(trainer.progress.step)
        tokens = torch.randint(96, (BATCH, 25), generator=draw)[parallel.data_rank * mine :][:mine]
        loss = trainer.update([pretrain.TokenBatch(tokens)], lambda batch: pretrain.step(model, batch), 1.0)
        trainer.progress.step += 1
        trainer.workspace.metrics.write(trainer.progress.step, {"loss": loss, **trainer.take_logged()})
    trainer.workspace.metrics.close()
    trainer.save(final=stop == STEPS)
    trained = parallel.full_tensors_on_rank_zero(trained_tensors(model))
    if runtime.is_rank_zero():
        tensor_files.save_tensors(out.with_suffix(".safetensors"), trained)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        for plan in sys.argv[2:]:
            directory = Path(sys.argv[1]) / plan
            if plan == "fsdp":  # in two goes: the adapter lies in parts on the disk in between
                train(directory, plan, stop=PART)
            train(directory, plan)
