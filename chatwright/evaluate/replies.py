"""What PPO did to the answers, by a measure that no training saw: the lexicon score of VADER on held-out prompts.

VADER (Hutto and Gilbert 2014) adds up word ratings by rules; it knows nothing of our reward model. It is a measure of
sentiment in words, not of quality: a model that only says "love love love" pleases it, which is why distinct-2, length
and KL stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chatwright import checkpoint, runtime
from chatwright.chat import Message
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.language_model import load_parts
from chatwright.metrics import progress_bar
from chatwright.model.gpt import GPT
from chatwright.objectives.policy import kl_k1
from chatwright.tokenizer import Tokenizer
from chatwright.train.gold import sentiment
from chatwright.train.rollout import (
    Answers,
    answer_log_probs,
    distinct,
    prompts_from,
    sample_answers,
    texts_of,
)
from chatwright.train.sft import read_records
from chatwright.train.tokenizer import records_of
from chatwright.train.workspace import Measure, Report, Workspace


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
    """Answers per prompt and model."""
    max_prompt_tokens: int = 96
    """Longer prompts are left out."""
    max_new_tokens: int = 32
    """Length at which an answer is cut off."""
    temperature: float = 1.0
    """Sampling temperature."""


def bootstrap_interval(values: Tensor, *, seed: int, draws: int = 2_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of values (N,), by resampling (Efron 1979)."""
    generator = runtime.generator("bootstrap", seed)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def run(config: Config, workspace: Workspace) -> Report:
    """Sample answers of both models to the same held-out prompts and compare them."""
    names = {"before": config.reference, "after": config.policy}
    models = {
        side: load_parts(workspace.resolve(name) if name in workspace.inputs else name) for side, name in names.items()
    }
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
        raise UserError("there are no held-out prompts short enough; raise max_prompt_tokens or the validation share")
    texts: dict[str, list[str]] = {}
    gold: dict[str, Tensor] = {}
    sampled: dict[str, Answers] = {}
    with progress_bar("eval") as bar:
        for number, side in enumerate(models):
            bar.update(number / 3, f"sampling from {names[side]}")
            sampled[side] = sample_answers(
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
    length = {side: float(sampled[side].response.sum(1).float().mean()) for side in sampled}
    ended = {side: float(sampled[side].finished.float().mean()) for side in sampled}
    pairs = [
        {"prompt": _turns(prompts[n], tokenizer), "before": texts["before"][n], "after": texts["after"][n]}
        for n in range(min(10, len(prompts)))
    ]
    checkpoint.write_json(workspace.directory / "pairs.json", pairs)
    lines = ["Ten answers to held-out prompts, not chosen:", ""]
    lines += [f"- {pair['prompt']!r}: before {pair['before']!r}, after {pair['after']!r}" for pair in pairs]
    return Report(
        measures=[
            Measure("gold sentiment, held-out prompts", float(gold["before"].mean()), float(gold["after"].mean()),
                    "higher", f"{gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"),
            Measure("KL on held-out prompts", 0.0, kl, "context", "nats per answer"),
            Measure("distinct-2, held-out prompts", variety["before"], variety["after"], "higher"),
            Measure("answer length", length["before"], length["after"], "context", "tokens"),
            Measure("answers that come to their end", ended["before"], ended["after"], "higher"),
        ],
        facts={"gain": gain, "interval": [low, high], "kl": kl, "prompts": len(prompts),
               "distinct_2": variety},
        notes=lines,
    )  # fmt: skip


def _turns(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """A prompt for people to read: its turns with ` / ` between them."""
    controls = set(tokenizer.control_ids.values())
    turns: list[list[int]] = [[]]
    for number in ids:
        if number in controls:
            turns.append([])
        else:
            turns[-1].append(number)
    return " / ".join(tokenizer.decode(turn) for turn in turns if turn)


@torch.no_grad()
def mean_kl(policy: GPT, reference: GPT, answers: Answers, temperature: float) -> float:
    """KL of the policy from the reference on its own answers, k1, nats per answer."""
    total = 0.0
    for chosen in torch.split(torch.arange(len(answers.ids)), 64):
        part = answers.rows(chosen)
        own, _ = answer_log_probs(policy, part, temperature=temperature)
        base, _ = answer_log_probs(reference, part, temperature=temperature)
        total += float(torch.where(part.response, kl_k1(own, base), 0.0).sum())
    return total / len(answers.ids)


def one_answer(model: str, messages: Sequence[Message], *, seed: int) -> str:
    """What a model says to one conversation (a base model continues the last message's text)."""
    from chatwright.language_model import load

    ready = load(model)
    options = {"max_new_tokens": 40, "temperature": 0.7, "top_p": 0.9, "seed": seed}
    if ready.template is None:
        return ready.generate(messages[-1]["content"], **options)
    return ready.chat(messages, **options)
