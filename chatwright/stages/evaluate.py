"""Evaluate: two chat models on held-out prompts, by a measure that no training saw.

The measure is the lexicon score of VADER (Hutto and Gilbert 2014). It adds up word ratings by rules and knows
nothing of our reward model. It measures sentiment in words, not quality: a model that only says "love love
love" scores high, which is why distinct-2, length and KL stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chatwright import files
from chatwright.config import UserError
from chatwright.data.cuts import check_limit
from chatwright.data.examples import Dialogue
from chatwright.data.records import read_records, records_of
from chatwright.evaluate.answers import ENDED, LENGTH, bootstrap_interval, mean_kl, side_by_side
from chatwright.metrics import progress_bar
from chatwright.model.gpt import GPT
from chatwright.train.api import (
    Answered,
    ChatBase,
    Measure,
    Report,
    Stage,
    Workspace,
    open_base,
    open_chat_base,
)
from chatwright.train.rl.gold import sentiment
from chatwright.train.rl.prompts import Asked, ask
from chatwright.train.rl.rollout import Completions, distinct, sample_completions, texts_of

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
    max_prompt_tokens: int = 0
    """Longer prompts are left out; 0: the length that holds 99 % of the data's prompts, as far as the model's
    context allows."""
    max_new_tokens: int = 0
    """Length at which an answer is cut off; 0: the length that holds 99 % of the answers in the data's
    conversations, as far as the model's context allows."""
    temperature: float = 1.0
    """Sampling temperature."""

    def __post_init__(self) -> None:
        check_limit("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_limit("max_new_tokens", self.max_new_tokens, 1)


def run(config: Config, workspace: Workspace) -> Report:
    """Sample answers from both models to the same held-out prompts and compare them."""
    policy, reference = open_chat_base(config.policy, workspace), open_base(config.reference, workspace)
    other, tokenizer = reference.tokenizer, policy.tokenizer
    if other is None or other.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{config.policy} and {config.reference} are not chat models with one tokenizer")
    asked = held_out_prompts(config, workspace, policy)
    config, prompts = asked.config, asked.prompts
    with progress_bar("evaluate") as bar:
        bar.update(0.0, f"sampling from {config.reference}")
        before = sample(reference.model, policy, prompts, config, workspace.seed)
        bar.update(1 / 3, f"sampling from {config.policy}")
        after = sample(policy.model, policy, prompts, config, workspace.seed)
        bar.update(2 / 3, "measuring KL")
        kl = mean_kl(policy.model, reference.model, after, config.temperature)
        bar.update(1.0)
    texts = {"before": texts_of(before, tokenizer), "after": texts_of(after, tokenizer)}
    gold = {
        side: torch.tensor(sentiment(found)).view(config.samples, -1).mean(0) for side, found in texts.items()
    }
    names, values = (
        (config.reference, config.policy),
        {GOLD: (gold["before"].tolist(), gold["after"].tolist())},
    )
    answers = side_by_side(names, prompts, (before, after), tokenizer, kl=kl, values=values)
    report = report_of(
        gold, {side: distinct(found) for side, found in texts.items()}, answers, workspace.seed
    )
    report.facts["tokens"] = sum(int(side.response.sum()) for side in (before, after))
    return asked.tell(report)


def held_out_prompts(config: Config, workspace: Workspace, base: ChatBase) -> Asked[Config]:
    """Prompts of held-out conversations, and the limits that hold. Raises UserError when there are fewer than
    two."""
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-validation.jsonl", Dialogue))
    asked = ask("evaluate", config, dialogues, base, most=config.prompts)
    if len(asked.prompts) < 2:
        raise UserError(
            "there is only one held-out prompt short enough; raise max_prompt_tokens or the validation share"
        )
    return asked


def sample(model: GPT, framed: ChatBase, prompts: list[list[int]], config: Config, seed: int) -> Completions:
    """`samples` completions per prompt. The prompts are in the chat template of `framed`, whose end token
    ends a completion."""
    return sample_completions(
        model,
        prompts * config.samples,
        end=framed.tokenizer.control_ids[framed.template.end],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed_parts=(seed, "eval"),
    )


def report_of(gold: dict[str, Tensor], variety: dict[str, float], answers: Answered, seed: int) -> Report:
    """The measures of both models, and by how much the gold measure rose."""
    gain = float((gold["after"] - gold["before"]).mean())
    low, high = bootstrap_interval(gold["after"] - gold["before"], seed=seed)
    return Report(
        measures=[
            Measure(
                GOLD,
                float(gold["before"].mean()),
                float(gold["after"].mean()),
                "higher",
                f"{gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}",
                bootstrap_interval(gold["after"], seed=seed),
            ),
            Measure("KL on held-out prompts", 0.0, answers.kl, "context", "nats per answer"),
            Measure("distinct-2, held-out prompts", variety["before"], variety["after"], "higher"),
            Measure("answer length", *answers.measures[LENGTH], "context", "tokens"),
            Measure("answers that come to their end", *answers.measures[ENDED], "higher"),
        ],
        facts={"gain": gain, "interval": [low, high], "kl": answers.kl, "distinct_2": variety},
        answers=answers,
    )


def kl_budget(config: Config, workspace: Workspace, report: Report) -> dict[str, Any]:
    """KL on held-out prompts, with the KL budget of the policy's own stage."""
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
