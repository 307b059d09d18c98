"""Two miniature runs as they lie on disk, written by hand: what `chatwright compare` reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from chatwright import files
from chatwright.config import to_yaml
from chatwright.metrics import MetricsLog


def measure(
    name: str, before: float | None, after: float, interval: list[float] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "before": before,
        "after": after,
        "better": "higher",
        "note": "",
        "interval": interval,
        **more,
    }


def write_stage(directory: Path, kind: str, settings: dict[str, Any], **result: Any) -> None:
    """A finished stage."""
    content = {
        "fingerprint": f"{kind}-1",
        "verb": kind,
        "model": None,
        "seconds": 60.0,
        "memory_bytes": 10**9,
        "measures": [],
        "curves": [],
        "tables": [],
        "facts": {},
        "notes": [],
        "seed": 7,
        "version": "1",
        "data": "d1",
        "inputs": {},
        **result,
    }
    files.write_json(directory / "clock.json", {"fingerprint": content["fingerprint"], "seconds": 60.0})
    files.write_text(directory / "config.yaml", to_yaml({"use": kind, **settings}))
    files.write_json(directory / "result.json", content)


def write_answers(directory: Path, after: list[str], values: list[float]) -> None:
    """pairs.json and per_prompt.json of twelve prompts."""
    prompts = [f"prompt {n}" for n in range(12)]
    pairs = [{"prompt": prompts[n], "before": f"old {n}", "after": after[n % len(after)]} for n in range(10)]
    files.write_json(directory / "pairs.json", pairs)
    marks = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
    sides = {"before": [0.0] * 12, "after": [values[n % len(values)] for n in range(12)]}
    files.write_json(directory / "per_prompt.json", {"prompts": marks, "values": {"gold": sides}})


def write_run(root: Path, *, rate: float, gold: float, kl: list[float], **changes: Any) -> Path:
    """data, sft and ppo; `gold` is the mean of the result, `changes` go into ppo's result.json."""
    write_stage(
        root / "data", "data", {"validation": 0.1}, measures=[measure("documents held out", None, 50.0)]
    )
    write_stage(
        root / "sft",
        "sft",
        {"base": "pretrain", "fit": {"steps": 60}},
        measures=[measure("loss of held-out answers", 5.0, 2.5)],
        inputs={"data": "data-1"},
    )
    ppo = root / "ppo"
    log = MetricsLog(ppo / "metrics.jsonl")
    for step, value in enumerate(kl):
        log.write(step, {"score": 0.1 * step, "kl": value, "entropy": float("nan")})
    result: dict[str, Any] = {
        "fingerprint": f"ppo-{rate}",
        "measures": [
            measure("gold", 0.0, gold, [gold - 0.05, gold + 0.05]),
            measure("KL to the SFT model", 0.0, kl[-1], better="context"),
        ],
        "curves": [
            {"title": "KL", "keys": ["kl", "missing"], "unit": "nats"},
            {"title": "Score", "keys": ["score"], "unit": ""},
        ],
        "kl_budget": {
            "spent": kl[-1],
            "allowed": 10.0,
            "largest": max(kl),
            "iteration": len(kl) - 1,
            "kept": 1,
            "stopped": "all iterations done",
        },
        "answers": {
            "before": "sft",
            "after": "ppo",
            "prompts": 12,
            "measures": {"tokens per answer": [12.0, 10.0 + rate]},
            "kl": 1.0,
        },
        "cost": {"seconds": 60.0 / rate, "tokens": 1000.0, "flop": 1e12, "memory_bytes": 1e9},
        "inputs": {"sft": "sft-1", "reward": "reward-1"},
        "seconds": 60.0 / rate,
    }
    write_stage(
        ppo,
        "ppo",
        {"base": "sft", "reward": "reward", "optim": {"learning_rate": rate}},
        **{**result, **changes},
    )
    write_answers(ppo, ["<b>good</b> | answer", f"at {rate}"], [gold - 0.1, gold + 0.1])
    return root


def write_both(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Runs a and b in a folder; `changes` are b's."""
    a = write_run(folder / "a", rate=0.5, gold=0.2, kl=[0.0, 1.0, 2.0, 4.0])
    return a, write_run(folder / "b", rate=2.0, gold=0.6, kl=[0.0, 3.0, 6.0], **changes)
