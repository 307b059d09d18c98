"""What the tests of alignment on many processes start under torchrun: stages by several plans, one after the
other, in one launch.

`python -m torch.distributed.run ... -m support.many_alignment WORK.json`: a list of {"stage", "out",
"inputs", "settings", "stop"}; `stop` asks the stage to stop at the look of that number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from chatwright import files, runtime
from chatwright.config import build
from chatwright.discovery import stage_verb
from chatwright.train import loop
from chatwright.train.parallel.start import process_group
from chatwright.train.rl import run as rl_run
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.workspace import Workspace
from support.many import SEED, stopping_after


def train(one: dict[str, Any]) -> None:
    """One stage from where its directory stands, as the pipeline does it; with `stop`, until it has been
    stopped."""
    module = stage_verb(one["stage"]).load()
    config = build(module.Config, one["settings"], where="test")
    stop = one.get("stop", 0)
    for owner in (loop, rl_run):
        owner.Stopper = stopping_after(stop) if stop else Stopper  # type: ignore[attr-defined]
    inputs = {name: Path(path) for name, path in one["inputs"].items()}
    workspace = Workspace(Path(one["out"]), SEED, inputs, described=module.STAGE.metrics)
    try:
        report = module.run(config, workspace)
    except Interrupted:
        assert stop
        return
    finally:
        loop.Stopper = rl_run.Stopper = Stopper  # type: ignore[misc, attr-defined]
    assert not stop, "nobody was asked to stop"
    if runtime.is_rank_zero():
        content = {
            "model": report.model,
            "facts": report.facts,
            "fingerprint": workspace.directory.name,
            "measures": [[measure.before, measure.after] for measure in report.measures],
        }
        files.write_json(workspace.directory / "result.json", content)
    runtime.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        for work in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            train(work)
