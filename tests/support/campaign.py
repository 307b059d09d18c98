"""Kill a training run again and again, and compare what it becomes with a run that was left alone.

    PYTHONPATH=tests python -m support.campaign --kills 30

A process of `chatwright pretrain` that saves after nearly every step is killed with SIGKILL: at moments
spread over its life (starting, resuming, training, measuring), and aimed into the writing of a checkpoint.
The same command follows each time. After each kill every checkpoint on disk must pass its checksums; at the
end weights, optimiser state, position in the data and rows of metrics must be those of the uninterrupted run,
bit for bit (what a clock measures is left out). When a run ends before the kills are used up, another one
begins. Moments come from a seed; where exactly a kill falls is the machine's affair, hence the table of what
was found on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatwright import checkpoint, files
from chatwright.data.shards import write_shards
from chatwright.metrics import TIMED, read_metrics
from chatwright.tokenizer import Tokenizer

STEPS = 240
SETTINGS = [
    "--preset",
    "modern-nano",
    "--model",
    "{context: 32, dropout: 0.2}",
    "--fit.batch_size",
    "4",
    "--fit.compile",
    "false",
    "--fit.precision",
    "fp32",
    "--fit.save_every",
    "0",
    "--fit.log_every",
    "3",
    "--fit.evaluate_every",
    "40",
    "--fit.keep_best",
    "true",
]
"""A model of 0.1 M parameters; dropout, so that the random stream counts; a checkpoint after each step."""


def write_input(directory: Path) -> Path:
    """A tokenizer and token shards of made-up text."""
    draw = random.Random(1)
    words = ["".join(draw.choice("aeioubdgklmnrst") for _ in range(draw.randint(2, 7))) for _ in range(60)]
    texts = [" ".join(draw.choice(words) for _ in range(60)) for _ in range(80)]
    tokenizer = Tokenizer.train(texts, 300)
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    write_shards(directory / "train", texts[:70], tokenizer)
    write_shards(directory / "validation", texts[70:], tokenizer)
    return directory


def command(source: Path, out: Path, *more: str) -> list[str]:
    """The command that is given again and again."""
    return [
        sys.executable,
        "-m",
        "chatwright",
        "pretrain",
        "--tokenizer",
        str(source),
        "--out",
        str(out),
        *SETTINGS,
        *more,
    ]


def start(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start it, with one thread: sums are then made in the same order."""
    return subprocess.Popen(
        command(source, out, *more),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def contents(out: Path) -> dict[str, Any]:
    """All that must be equal: every kept checkpoint's tensors and state, and the rows of metrics, without the
    clock's."""
    found: dict[str, Any] = {}
    for one in checkpoint.checkpoints(out / "checkpoints"):
        for file in one.path.iterdir():
            if file.name != "state.json":
                found[f"{one.path.name}/{file.name}"] = files.sha256(file)
        state = one.state()
        state["files"].pop("state.json")  # the checksum of a text with times in it
        state.pop("runtime")
        for timed in ("elapsed", "joules"):
            state["progress"].pop(timed)
        found[f"{one.path.name}/state"] = state
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(out / "metrics.jsonl")]
    found["metrics"] = rows
    found["best"] = (out / "checkpoints" / "best").read_text()
    result = files.read_json(out / "result.json")
    found["result"] = [result["model"], result["measures"]]
    return found


@dataclass
class Campaign:
    """What happened."""

    kills: int = 0
    runs: int = 0
    fell: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def leftovers(checkpoints: Path, kind: str) -> bool:
    """Whether a writer or deleter is, or was, at work: `partial`, `old` or `gone`."""
    return any(checkpoints.glob(f".step-*.{kind}"))


def wait_for_moment(process: subprocess.Popen[str], out: Path, draw: random.Random, begun: float) -> None:
    """Sleep until the process is to be killed: half of the time aimed into the writing of a checkpoint."""
    checkpoints = out / "checkpoints"
    before = {one.step for one in checkpoint.checkpoints(checkpoints)}
    aimed = draw.random() < 0.5
    if draw.random() < 0.15:  # in its start
        time.sleep(draw.uniform(0.0, begun))
        return
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:  # until it makes progress
        if {one.step for one in checkpoint.checkpoints(checkpoints)} - before:
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.5))
    while (
        aimed
        and process.poll() is None
        and time.monotonic() < deadline
        and not leftovers(checkpoints, "partial")
    ):
        pass
    time.sleep(draw.uniform(0.0, 0.004) if aimed else 0.0)


def where_it_fell(out: Path) -> str:
    """What the killed process was doing, by what it left."""
    checkpoints = out / "checkpoints"
    if leftovers(checkpoints, "old"):
        return "between the renames of a checkpoint"
    if leftovers(checkpoints, "partial"):
        return "writing a checkpoint"
    if leftovers(checkpoints, "gone"):
        return "deleting a checkpoint"
    return "training" if checkpoint.checkpoints(checkpoints) else "before the first checkpoint"


def run_campaign(kills: int, seed: int, work: Path, *, steps: int = STEPS) -> Campaign:
    """Kill `kills` times; faults are collected, not raised."""
    more = ("--fit.steps", str(steps))
    draw, done = random.Random(seed), Campaign()
    source = write_input(work / "input")
    started = time.monotonic()
    whole = start(source, work / "whole", *more)
    told, _ = whole.communicate(timeout=280)
    if whole.returncode:
        raise RuntimeError(f"the uninterrupted run failed:\n{told}")
    expected, begun = contents(work / "whole"), min(6.0, time.monotonic() - started)
    while done.kills < kills:
        out = work / f"killed-{done.runs}"
        done.runs += 1
        while True:
            process = start(source, out, *more)
            if done.kills < kills:
                wait_for_moment(process, out, draw, begun)
            else:
                process.wait(timeout=280)
            process.send_signal(signal.SIGKILL)
            told, _ = process.communicate()
            if process.returncode == -signal.SIGKILL:
                done.kills += 1
                done.fell[where_it_fell(out)] += 1
                for one in checkpoint.checkpoints(out / "checkpoints"):
                    try:
                        one.verify()
                    except Exception as error:
                        done.faults.append(f"kill {done.kills}: {error}")
                continue
            if process.returncode:
                done.faults.append(f"after kill {done.kills} the same command failed:\n{told}")
            break
        found = contents(out) if not process.returncode else {}
        done.faults += [
            f"run {done.runs}: {key} differs" for key in expected if found.get(key) != expected[key]
        ]
        done.faults += [f"run {done.runs}: {key} is too much" for key in found if key not in expected]
        print(f"run {done.runs}: {done.kills} kills so far, {len(done.faults)} faults")
        shutil.rmtree(out)
    return done


def main() -> int:
    """The campaign by hand."""
    parser = argparse.ArgumentParser(description="Kill a training run again and again.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        done = run_campaign(options.kills, options.seed, Path(work))
    print(
        json.dumps(
            {
                "kills": done.kills,
                "runs": done.runs,
                "fell": dict(done.fell),
                "faults": done.faults,
                "seconds": round(time.monotonic() - started),
            },
            indent=1,
        )
    )
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())
