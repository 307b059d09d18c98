"""What PPO did to the answers, by a measure that no training saw: the lexicon score of VADER on held-out
prompts.

VADER (Hutto and Gilbert 2014) adds up word ratings by rules; it knows nothing of our reward model. It is a
measure of sentiment in words, not of quality: a model that only says "love love love" pleases it, which is
why distinct-2, length and KL stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chatwright import files
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.data.records import read_records, records_of
from chatwright.evaluate.answers import ENDED, LENGTH, bootstrap_interval, mean_kl, side_by_side
from chatwright.metrics import progress_bar
from chatwright.train.base import open_base
from chatwright.train.rl.gold import sentiment
from chatwright.train.rl.rollout import (
    Completions,
    distinct,
    prompts_from,
    sample_completions,
    texts_of,
)
from chatwright.train.stage import Stage
from chatwright.train.workspace import Measure, Report, Workspace

GOLD = "gold sentiment, held-out prompts"


@dataclass(frozen=True)
class Config:
    """Settings of the comparison of two chat models on held-out prompts."""

    policy: str = field(default="ppo", metadata={"input": True})
    """The model to measure."""
    reference: str = field(default="sft", metadata={"input": True})
    """The model to compare it with; KL is measured from here."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-validation.jsonl."""
    prompts: int = 256
    """Number of held-out prompts (fewer when there are fewer)."""
    samples: int = 2
    """Completions per prompt and model."""
    max_prompt_tokens: int = 96
    """Longer prompts are left out."""
    max_new_tokens: int = 32
    """Length at which an answer is cut off."""
    temperature: float = 1.0
    """Sampling temperature."""


def run(config: Config, workspace: Workspace) -> Report:
    """Sample answers of both models to the same held-out prompts and compare them."""
    names = {"before": config.reference, "after": config.policy}
    models = {side: open_base(name, workspace) for side, name in names.items()}
    tokenizer, template = models["after"].tokenizer, models["after"].template
    other = models["before"].tokenizer
    if tokenizer is None or template is None or other is None or other.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{config.policy} and {config.reference} are not chat models with one tokenizer")
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-validation.jsonl", Dialogue))
    prompts = prompts_from(
        dialogues, template, tokenizer, max_tokens=config.max_prompt_tokens, most=config.prompts
    )
    if len(prompts) < 2:
        raise UserError(
            "there are no held-out prompts short enough; raise max_prompt_tokens or the validation share"
        )
    texts: dict[str, list[str]] = {}
    gold: dict[str, Tensor] = {}
    sampled: dict[str, Completions] = {}
    with progress_bar("eval") as bar:
        for number, side in enumerate(models):
            bar.update(number / 3, f"sampling from {names[side]}")
            sampled[side] = sample_completions(
                models[side].model,
                prompts * config.samples,
                end=tokenizer.control_ids[template.end],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed_parts=(workspace.seed, "eval"),
            )
            texts[side] = texts_of(sampled[side], tokenizer)
            gold[side] = torch.tensor(sentiment(texts[side])).view(config.samples, -1).mean(0)
        bar.update(2 / 3, "measuring KL")
        kl = mean_kl(models["after"].model, models["before"].model, sampled["after"], config.temperature)
        bar.update(1.0)
    low, high = bootstrap_interval(gold["after"] - gold["before"], seed=workspace.seed)
    gain = float((gold["after"] - gold["before"]).mean())
    variety = {side: distinct(texts[side]) for side in texts}
    answers = side_by_side(
        (config.reference, config.policy),
        prompts,
        (sampled["before"], sampled["after"]),
        tokenizer,
        kl=kl,
        values={GOLD: (gold["before"].tolist(), gold["after"].tolist())},
    )
    within = bootstrap_interval(gold["after"], seed=workspace.seed)
    return Report(
        measures=[
            Measure(
                "gold sentiment, held-out prompts",
                float(gold["before"].mean()),
                float(gold["after"].mean()),
                "higher",
                f"{gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}",
                within,
            ),
            Measure("KL on held-out prompts", 0.0, kl, "context", "nats per answer"),
            Measure("distinct-2, held-out prompts", variety["before"], variety["after"], "higher"),
            Measure("answer length", *answers.measures[LENGTH], "context", "tokens"),
            Measure("answers that come to their end", *answers.measures[ENDED], "higher"),
        ],
        facts={
            "gain": gain,
            "interval": [low, high],
            "kl": kl,
            "prompts": len(prompts),
            "distinct_2": variety,
            "tokens": sum(int(side.response.sum()) for side in sampled.values()),
        },
        answers=answers,
    )


def kl_budget(config: Config, workspace: Workspace, report: Report) -> dict[str, Any]:
    """KL on held-out prompts, beside what the policy's own stage was allowed."""
    trained = workspace.inputs.get(config.policy)
    known = files.read_json(trained / "result.json").get("kl_budget") if trained else None
    return {
        "spent": report.value("KL on held-out prompts"),
        "allowed": (known or {}).get("allowed"),
        "stopped": f"measured on held-out prompts; the budget is that of {config.policy}",
    }


STAGE = Stage(
    config=Config, run=run, plan=None, reads=lambda config: {"dialogues": config.data}, kl_budget=kl_budget
)
