"""Compare runs or stages side by side, or let models answer the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatwright.config import UsageError, parse

MOST = 8
"""Most runs or models that fit side by side."""
SAMPLED = ("temperature", "top_p")
"""Options that the models' own settings stand in for."""


@dataclass(frozen=True)
class Config:
    """Settings of `chatwright compare`. Those from `prompts` on are for models."""

    out: str = ""
    """Also write the comparison as Markdown into this file; of runs, with a PNG of overlaid curves per shared
    metric beside it."""
    json: bool = False
    """Print one JSON object instead of tables."""
    prompts: str = ""
    """What to ask the models: a text file with a prompt a line, or a file of conversations (.jsonl, .json,
    .parquet), each up to its last user turn. Empty: a few general questions. Given with runs or stages, it
    asks their models."""
    reward: str = ""
    """The stage, or directory, of a reward model (runs/my/reward): adds its scores, and how often each model
    wins against the first. Given with runs or stages, it asks their models."""
    count: int = 16
    """Most prompts to ask."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float | None = None
    """Sampling temperature of all models. Not given: each model's own chat setting, as in `chatwright chat`.
    """
    top_p: float | None = None
    """Top-p of all models. Not given: each model's own."""
    seed: int = 1
    """Prompt n (from 0) is answered with the seed `seed` + n."""

    def __post_init__(self) -> None:
        for name in ("count", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} must be at least 0")


def main(argv: Sequence[str]) -> int:
    """`chatwright compare A B [...]`."""
    config, given = parse(
        Config,
        argv,
        prog="chatwright compare",
        description="Put runs, or stages of runs, side by side: settings that differ, measures with their "
        "intervals, curves, cost, and the answers to the same prompts. Says what makes the comparison "
        "unfair. Or compare models: `chatwright compare smollm2 runs/my/sft` asks both the same prompts at "
        "their chat settings, and shows the answers with their length, how many end, their variety, and "
        "with --reward who wins.",
        positionals={
            "run+": "Two or more runs (runs/tiny), stages (runs/tiny/ppo) or models (smollm2, hf:owner/name, "
            "a .gguf file, a model directory; runs and stages may stand beside them)."
        },
    )
    names = [str(one) for one in given["run"] or ()]
    if not 2 <= len(names) <= MOST:
        raise UsageError(
            f"{len(names)} directory given; compare takes two to {MOST} runs, stages or models, for example "
            "runs/a runs/b"
        )
    if config.out and Path(config.out).is_dir():
        raise UsageError(f"--out {config.out} is a directory; give a file, for example comparison.md")
    if config.prompts or config.reward or any(map(is_model, names)):
        return _models(names, config)
    return _runs(names, config)


def is_model(name: str) -> bool:
    """Whether a name can only mean a model, not a run or a stage with its report."""
    path = Path(name)
    if path.is_dir():
        return (path / "state.json").is_file() or (path / "config.json").is_file()
    return path.is_file() or name == "smollm2" or name.startswith("hf:") or "+" in name


def _runs(names: Sequence[str], config: Config) -> int:
    from chatwright.reports import compare_page
    from chatwright.reports.compare import align, compare
    from chatwright.reports.runs import read_run

    if config.out:
        compare_page.check_target(Path(config.out))
    runs = [read_run(Path(name)) for name in names]
    groups = align(runs)
    found = compare(runs, groups)
    if config.out:
        compare_page.write(found, groups, Path(config.out))
    if config.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        compare_page.show(found, Path(config.out) if config.out else None)
    return 0


def _models(names: Sequence[str], config: Config) -> int:
    from chatwright.evaluate.model_comparison import compare_models, read_prompts
    from chatwright.metrics import say
    from chatwright.reports import compare_page, models_page

    if config.out:
        compare_page.check_target(Path(config.out), models_page.HEADING)
    given = {name: getattr(config, name) for name in SAMPLED if getattr(config, name) is not None}
    found = compare_models(
        names,
        read_prompts(config.prompts, config.count),
        given,
        reward=config.reward,
        most=config.max_new_tokens,
        seed=config.seed,
        tell=(lambda line: None) if config.json else say,
    )
    if config.out:
        models_page.write(found, Path(config.out))
    if config.json:
        print(json.dumps(found.plain(), ensure_ascii=False, indent=1))
    else:
        models_page.show(found, Path(config.out) if config.out else None)
    return 0
