"""What the tests of many processes start under torchrun: pre-training by several plans, one after the other, in one launch.

`python -m torch.distributed.run ... tests/train/many.py WORK.json`: a list of {"out", "inputs", "settings", "stop"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from chatwright import checkpoint
from chatwright.config import build
from chatwright.train import loop, parallel, pretrain
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


def main(work: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for one in work:
        config = build(pretrain.Config, one["settings"], where="test")
        loop.Stopper = stopping_after(one.get("stop", 0))  # type: ignore[misc]
        inputs = {name: Path(path) for name, path in one["inputs"].items()}
        workspace = Workspace(Path(one["out"]), SEED, inputs)
        try:
            report = pretrain.run(config, workspace)
        except Interrupted:
            continue
        if parallel.runtime.is_first():
            checkpoint.write_json(workspace.directory / "result.json", {"model": report.model, "facts": report.facts})


if __name__ == "__main__":
    with parallel.processes():
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
