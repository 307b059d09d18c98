"""What the tests of many processes start under torchrun: pre-training by several plans, one after the other,
in one launch.

`python -m torch.distributed.run ... -m support.many WORK.json`: a list of {"out", "inputs", "settings",
"stop", "copy_to"}, or {"muon": FILE}.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from chatwright import files, runtime, tensor_files
from chatwright.config import build
from chatwright.optim import Muon
from chatwright.stages import pretrain
from chatwright.train import loop
from chatwright.train.parallel.start import process_group
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.workspace import Workspace

SEED = 11


def stopping_after(steps: int) -> type[Stopper]:
    """A Stopper that is asked at the look after so many steps, of which there is one a step."""

    class Impatient(Stopper):
        looks = 0

        def __init__(self) -> None:
            super().__init__()

        @property
        def asked(self) -> bool:
            self.looks += 1
            return 0 < steps <= self.looks

        @asked.setter
        def asked(self, value: bool) -> None:
            assert value is False

    return Impatient


def muon(out: Path) -> None:
    """Muon on matrices in parts, tall and wide ones, beside Muon on the whole ones with equal gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (runtime.world_size(),))
    draw = torch.Generator().manual_seed(SEED)
    whole, parts = [], []
    for shape, dim in (((6, 4), 0), ((4, 6), 1), ((4, 6), 0), ((3, 5), 0)):  # 3 rows: parts of 2 and 1
        start = torch.randn(shape, generator=draw)
        whole.append(torch.nn.Parameter(start.clone()))
        parts.append(torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(dim)])))
    optimisers = [Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.1) for parameters in (whole, parts)]
    for _ in range(3):
        for one, part in zip(whole, parts, strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            part.grad = distribute_tensor(one.grad, mesh, part.placements)
        for optimiser in optimisers:
            optimiser.step()
    pairs = [(one.detach(), part.full_tensor().detach()) for one, part in zip(whole, parts, strict=True)]
    if runtime.is_rank_zero():
        tensor_files.save_tensors(
            out,
            {
                f"{n}.{kind}": pair[k]
                for n, pair in enumerate(pairs)
                for k, kind in enumerate(("whole", "parts"))
            },
        )


def main(work: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for one in work:
        if "muon" in one:
            muon(Path(one["muon"]))
            continue
        config = build(pretrain.Config, one["settings"], where="test")
        loop.Stopper = stopping_after(one.get("stop", 0))  # type: ignore[misc]
        inputs = {name: Path(path) for name, path in one["inputs"].items()}
        workspace = Workspace(Path(one["out"]), SEED, inputs, described=pretrain.STAGE.metrics)
        try:
            report = pretrain.run(config, workspace)
        except Interrupted:
            if "copy_to" in one and runtime.is_rank_zero():
                shutil.copytree(one["out"], one["copy_to"])
            runtime.barrier()
            continue
        if runtime.is_rank_zero():
            files.write_json(
                workspace.directory / "result.json", {"model": report.model, "facts": report.facts}
            )


if __name__ == "__main__":
    with process_group():
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
