"""Predicted against what then happens: memory and time of pre-training steps.

    python benchmarks/plan.py [--rounds 5] [--only NAME ...]

Each case is predicted in one process and run in another, the way `chatwright pretrain` runs it. Memory is the
largest resident size above that before the model is made. A shared machine can change its speed between the
two by more than what is asked here, so the running process also predicts its own step, in turns with five
steps of it: `seconds` compares the medians of these, `seconds_before` the first prediction, as a user gets
it. Results go to benchmarks/results/plan.json; docs/lab/plan.md quotes them. Exit code 1 when memory or
`seconds` is off by more than 20 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"

SMALL_GPT2 = {"layers": 6, "width": 384, "heads": 6, "vocab_size": 8192, "context": 256}
CASES: dict[str, dict[str, Any]] = {
    "tiny-eager": {"preset": "modern-tiny", "batch": 8, "compile": False},
    "tiny-eager-fp32-adamw": {
        "preset": "modern-tiny",
        "batch": 8,
        "compile": False,
        "precision": "fp32",
        "optim": "adamw",
    },
    "tiny-eager-32": {"preset": "modern-tiny", "batch": 32, "compile": False},
    "tiny-eager-2-of-8": {"preset": "modern-tiny", "batch": 8, "micro": 2, "compile": False},
    "14m-eager": {"preset": "gpt2", "model": SMALL_GPT2, "batch": 16, "compile": False, "optim": "adamw"},
    "14m-eager-fp32": {
        "preset": "gpt2",
        "model": SMALL_GPT2,
        "batch": 8,
        "compile": False,
        "precision": "fp32",
    },
    "small-eager": {
        "preset": "modern-small",
        "model": {"layers": 4, "context": 512},
        "batch": 4,
        "compile": False,
    },
    "tiny-compiled": {"preset": "modern-tiny", "batch": 8},
    "tiny-compiled-32": {"preset": "modern-tiny", "batch": 32},
    "14m-compiled": {"preset": "gpt2", "model": SMALL_GPT2, "batch": 16, "optim": "adamw"},
    "small-compiled": {"preset": "modern-small", "model": {"layers": 4, "context": 512}, "batch": 4},
}


def settings(case: dict[str, Any]) -> Any:
    """The stage's settings of a case."""
    from chatwright.optim import OptimConfig
    from chatwright.stages.pretrain import Config
    from chatwright.train.fit_config import FitConfig

    fit = FitConfig(
        steps=1000,
        batch_size=case["batch"],
        micro_batch=case.get("micro", 0),
        compile=case.get("compile", True),
        precision=case.get("precision", "auto"),
    )
    return Config(
        preset=case["preset"],
        model=case.get("model", {}),
        fit=fit,
        optim=OptimConfig(name=case.get("optim", "muon")),
    )


def subject_of(case: dict[str, Any]) -> Any:
    """A case as the planner sees it."""
    from chatwright.model.config import GPTConfig
    from chatwright.stages import pretrain
    from chatwright.train.planning.program import PlannedStage

    config = settings(case)
    return PlannedStage("pretrain", pretrain.PLAN, GPTConfig.preset(config.preset, **config.model), config)


def predicted(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes above the baseline and seconds a step, by the planner, in a process that does nothing else."""
    from chatwright import memory, runtime
    from chatwright.train.planning.plan import choose

    runtime.set_threads()
    memory.tune_allocator()
    began = time.monotonic()
    plan = choose(subject_of(case))
    parts = {name: size for name, size in plan.memory.items() if name not in ("allocator", "program")}
    return {
        "bytes": plan.above_baseline,
        "live": sum(parts.values()),
        "seconds": plan.seconds,
        "planning": time.monotonic() - began,
        "parts": plan.memory,
    }


def happened(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The same of real steps on made-up tokens, by the stage's own step and trainer; and, `rounds` times,
    predictions of their time in between. No rounds: memory alone is of interest, no time is predicted."""
    import torch

    from chatwright import memory, runtime
    from chatwright.model.gpt import GPT
    from chatwright.stages import pretrain
    from chatwright.train.held_out import held_out_nats, held_out_rows
    from chatwright.train.planning import timing
    from chatwright.train.planning.plan import predict
    from chatwright.train.trainer import Trainer
    from chatwright.train.workspace import Workspace

    subject = subject_of(case)
    config, shape = subject.config, subject.shape
    micro = config.fit.micro_batch or config.fit.batch_size
    runtime.set_threads()
    memory.tune_allocator()
    before = resident("VmRSS")
    model = GPT(shape).to(runtime.device())
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer({"model": model}, config.optim, Workspace(Path(directory)), metadata={}, texts={})
        step, dtype, _ = pretrain.fast_step(model, config.fit, alone=True)
        with runtime.evaluating(model), runtime.autocast(dtype):
            held_out_nats(
                model,
                list(torch.randint(shape.vocab_size, (held_out_rows(shape), shape.context + 1))),
            )

        def seconds() -> float:
            batches = [
                pretrain.TokenBatch(torch.randint(shape.vocab_size, (micro, shape.context + 1)))
                for _ in range(config.fit.batch_size // micro)
            ]
            started = time.perf_counter()
            trainer.update(batches, step, 0.1)
            return time.perf_counter() - started

        first = seconds()
        if config.fit.compile:
            memory.trim_heap()  # as the stage does
        spent = [[first, *(seconds() for _ in range(7))][3:]]
        largest = resident("VmHWM") - before
        operations = predict(subject)[1] if rounds else []
        timed: list[tuple[float, float, float]] = []
        for _ in range(rounds):
            products, others = timing.parts_of(operations)
            timed.append((timing.together(products, others, compiled=subject.one_graph), products, others))
            spent.append([seconds() for _ in range(5)])
    return {
        "bytes": largest,
        "seconds": statistics.median(seconds for round_ in spent for seconds in round_),
        "steps": spent,
        "predicted": statistics.median(total for total, _, _ in timed) if timed else None,
        "timed": timed,
    }


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs /proc/self/status")


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--part", choices=("predicted", "happened"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        case = CASES[options.only[0]]
        print(json.dumps(predicted(case) if options.part == "predicted" else happened(case, options.rounds)))
        return 0
    rows = json.loads(RESULTS.read_text())["samples"] if RESULTS.exists() else {}
    for name in options.only:
        row: dict[str, Any] = {}
        for part in ("predicted", "happened"):
            command = [
                sys.executable,
                __file__,
                "--part",
                part,
                "--only",
                name,
                "--rounds",
                str(options.rounds),
            ]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row[part] = json.loads(printed.splitlines()[-1])
        rows[name] = row
        ratios = write(rows)  # after each case: a whole run takes half an hour
        a, b = row["predicted"], row["happened"]
        print(
            f"{name:24} memory {a['bytes'] / 1e6:6,.0f} of {b['bytes'] / 1e6:6,.0f} MB = "
            f"{ratios[f'{name}/bytes']:.2f}  (live {a['live'] / 1e6:,.0f})   time {b['predicted']:.3f} of "
            f"{b['seconds']:.3f} s = {ratios[f'{name}/seconds']:.2f}   before {a['seconds']:.3f} = "
            f"{ratios[f'{name}/seconds_before']:.2f}, planned in {a['planning']:.0f} s",
            flush=True,
        )
    bounded = {key: ratio for key, ratio in write(rows).items() if not key.endswith("before")}
    astray = {key: ratio for key, ratio in bounded.items() if not 0.8 <= ratio <= 1.2}
    for key, ratio in astray.items():
        print(f"beyond 20 %: {key} {ratio}")
    return 1 if astray else 0


def write(rows: dict[str, Any]) -> dict[str, float]:
    """benchmarks/results/plan.json; returns the ratios of predicted to measured."""
    import torch

    from chatwright import runtime

    ratios = {}
    for name, row in rows.items():
        a, b = row["predicted"], row["happened"]
        ratios[f"{name}/bytes"] = round(a["bytes"] / b["bytes"], 3)
        ratios[f"{name}/seconds"] = round(b["predicted"] / b["seconds"], 3)
        ratios[f"{name}/seconds_before"] = round(a["seconds"] / b["seconds"], 3)
    RESULTS.parent.mkdir(exist_ok=True)
    content = {
        "ratios": ratios,
        "command": "python benchmarks/plan.py",
        "machine": runtime.describe(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "samples": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return ratios


if __name__ == "__main__":
    sys.exit(main())
