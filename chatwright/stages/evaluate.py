"""Evaluate: is a chat model better than the one it came from?  Held-out prompts, and held-out comparisons.

Both models answer the same held-out prompts with the same seeds. What they are measured by depends on what
there is; what is missing is left out, and the report says so:

* a reward model: its score of the answers, and how often the policy's answer wins against the reference's;
* comparisons of your own: how often a model gives the answer that people preferred the higher mean
  log-probability per token. No reward model is in it. The reward model's own accuracy stands beside it;
* the lexicon VADER (Hutto and Gilbert 2014), where the reward model learnt the sentiment of the built-in
  ratings, or where `gold` asks for it. It measures pleasant words, not quality.

Each measure has the 95 % interval of the paired difference, by bootstrap over prompts. A rise of a reward
model's score counts only if the reward model itself is better than guessing on held-out comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from chatwright import files, runtime
from chatwright.config import UsageError, UserError, read_yaml
from chatwright.data.catalogue import find
from chatwright.data.cuts import check_limit
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.records import has_records, read_records, records_of
from chatwright.evaluate.answers import ENDED, LENGTH, mean_kl, side_by_side
from chatwright.evaluate.findings import Findings
from chatwright.evaluate.preferences import ranked_by_policy, ranked_by_reward
from chatwright.generation_config import chat_options, told
from chatwright.metrics import progress_bar
from chatwright.model.attention import plain_attention
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.objectives.preference import Ties
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
from chatwright.train.preference.counting import GUESSING, Counted, counted
from chatwright.train.preference.limits import within_context
from chatwright.train.preference.rankings import AnswerEncoder
from chatwright.train.rl.gold import SENTIMENT, sentiment
from chatwright.train.rl.models import load_reward
from chatwright.train.rl.prompts import Asked, ask
from chatwright.train.rl.rollout import Completions, distinct, sample_completions, texts_of

GOLD = "gold sentiment, held-out prompts"
REWARD = "reward model's score, held-out prompts"
WINS = "win rate by the reward model"
LIKELIER = "own comparisons: the preferred answer is likelier"
ACCURACY = "reward model's accuracy on own comparisons"
AUTO = "auto"


@dataclass(frozen=True)
class Config:
    """Settings of the comparison of two chat models on held-out data."""

    policy: str = field(default="ppo", metadata={"input": True})
    """The model to measure."""
    reference: str = field(default="sft", metadata={"input": True})
    """The model to compare it with; KL is measured from here."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-validation.jsonl."""
    reward: str = field(default="reward", metadata={"input": True, "words": ("",), "optional": True})
    """The reward model that scores the answers. Left out where the run has none; empty for none."""
    comparisons: str = field(default="data", metadata={"input": True, "words": ("",), "optional": True})
    """The stage, directory or file with your own comparisons. Left out where it has none; empty for none."""
    gold: str = AUTO
    """A lexicon's measure of the answers besides: `sentiment`, empty for none, or `auto`: where the reward
    model learnt the built-in ratings of sentiment."""
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
    """Sampling temperature of what is measured; KL needs 1, the policy as it is."""
    unfinished_score: float = -2.0
    """What an answer without an end token counts instead of the reward model's score."""
    tie_tolerance: float = 0.5
    """Comparisons whose scores differ by no more are ties, and left out."""

    def __post_init__(self) -> None:
        if self.gold not in ("", AUTO, SENTIMENT):
            raise UsageError(f"gold {self.gold!r} is none of auto, sentiment, and empty for none")
        check_limit("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_limit("max_new_tokens", self.max_new_tokens, 1)

    @property
    def ties(self) -> Ties:
        """Ties are left out."""
        return "leave_out"


@dataclass(frozen=True)
class Sides:
    """Both models, and their answers to the same prompts."""

    reference: GPT
    policy: GPT
    base: ChatBase
    """Tokenizer and template of both."""
    asked: Asked[Config]
    """The prompts, and the limits that hold."""
    before: Completions
    after: Completions


def run(config: Config, workspace: Workspace) -> Report:
    """Sample answers from both models to the same held-out prompts, and measure all that can be measured."""
    sides = answered(config, workspace)
    config = sides.asked.config  # with the limits that hold
    found = Findings(workspace.seed)
    reward = open_reward(config, workspace, sides.base, found)
    if reward is not None:
        by_reward(config, reward, sides, found)
    by_comparisons(config, workspace, reward, sides, found)
    if wants_sentiment(config, workspace):
        by_sentiment(config, sides, found)
    of_answers(config, sides, found)
    found.conclude()
    return sides.asked.tell(found.report)


def answered(config: Config, workspace: Workspace) -> Sides:
    """Both models and their answers. Raises UserError when they cannot be compared."""
    policy, reference = open_chat_base(config.policy, workspace), open_base(config.reference, workspace)
    other, tokenizer = reference.tokenizer, policy.tokenizer
    if other is None or other.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{config.policy} and {config.reference} are not chat models with one tokenizer")
    for model in (policy.model, reference.model):
        model.to(runtime.device()).eval()
    asked = held_out_prompts(config, workspace, policy)
    config, prompts = asked.config, asked.prompts
    with progress_bar("evaluate") as bar:
        bar.update(0.0, f"sampling from {config.reference}")
        before = sample(reference.model, policy, prompts, config, workspace.seed)
        bar.update(0.5, f"sampling from {config.policy}")
        after = sample(policy.model, policy, prompts, config, workspace.seed)
        bar.update(1.0)
    return Sides(reference.model, policy.model, policy, asked, before, after)


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
        end=framed.template.end_id(framed.tokenizer),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed_parts=(seed, "eval"),
    )


def open_reward(config: Config, workspace: Workspace, base: ChatBase, found: Findings) -> ScalarModel | None:
    """The reward model, if there is one. Raises UserError for one of another tokenizer."""
    if not config.reward:
        return None
    if config.reward == Config.reward and not _is_there(config.reward, workspace):
        found.left_out("the reward model is", "the run has no stage reward")
        return None
    directory = workspace.resolve(config.reward)
    reward = load_reward(directory, base, min_correlation=-1.0).to(runtime.device()).eval()
    if runtime.device().type == "cpu":
        reward.body.use_attention(plain_attention)
    result = directory / "result.json"
    known = files.read_json(result) if result.is_file() else {}
    found.report.warnings += [f"of the reward model: {text}" for text in known.get("warnings", ())]
    interval = known.get("facts", {}).get("held_out_accuracy_interval")
    if interval and interval[0] <= GUESSING:
        found.untrusted |= {REWARD, WINS}
    return reward


def _is_there(name: str, workspace: Workspace) -> bool:
    """Whether an input may be opened. One that is missing under its default name is left out; another name is
    a mistake, and `Workspace.resolve` says so."""
    return name in workspace.inputs or Path(name).exists()


@torch.no_grad()
def by_reward(config: Config, reward: ScalarModel, sides: Sides, found: Findings) -> None:
    """The reward model's score of both sides' answers, and how often the policy's one wins."""
    scores = []
    for given in (sides.before, sides.after):
        parts = torch.split(torch.arange(len(given.ids)), 64)
        raw = torch.cat([reward.score(given.ids[part], given.real[part]).float() for part in parts])
        kept = torch.where(given.finished, raw, config.unfinished_score).cpu()
        scores.append(kept.view(config.samples, -1))
    before, after = scores
    means = [side.mean(0).tolist() for side in scores]
    found.add(REWARD, means[0], means[1])
    found.values[REWARD] = (means[0], means[1])
    wins = ((after > before).float() + 0.5 * (after == before).float()).mean(0).tolist()
    found.add(WINS, [0.5] * len(wins), wins)


def by_comparisons(
    config: Config, workspace: Workspace, reward: ScalarModel | None, sides: Sides, found: Findings
) -> None:
    """Own held-out comparisons: how both models rank the answers, and how the reward model does."""
    comparisons = own_comparisons(config, workspace)
    if not comparisons:
        found.left_out("own comparisons are", f"{config.comparisons or 'no stage'} has none held out")
        return
    template, tokenizer = sides.base.template, sides.base.tokenizer
    context = min(sides.policy.config.context, sides.reference.config.context)
    comparisons, limits = within_context(
        comparisons, AnswerEncoder(template, tokenizer), config.tie_tolerance, context
    )
    for line in limits.notes:
        found.tell(line)
    if not comparisons:
        found.left_out("own comparisons are", "their answers differ only beyond the model's context")
        return
    before, after = (
        counted(ranked_by_policy(model, comparisons, template, tokenizer), config)
        for model in (sides.reference, sides.policy)
    )
    if not before.total:
        found.left_out("own comparisons are", "all that are held out are ties")
        return
    likelier = [(one.right / one.pairs).tolist() for one in (before, after)]
    found.add(LIKELIER, likelier[0], likelier[1], "comparisons")
    if reward is not None:
        of_reward(counted(ranked_by_reward(reward, comparisons, template, tokenizer), config), found)


def own_comparisons(config: Config, workspace: Workspace) -> list[Comparison]:
    """The held-out comparisons; empty when there are none."""
    name = config.comparisons
    if not name or (name == Config.comparisons and not _is_there(name, workspace)):
        return []
    file = records_of(workspace.resolve(config.comparisons)) / "comparisons-validation.jsonl"
    if not has_records(file) or (file.parent.is_file() and config.comparisons == config.data):
        return []  # a single file is one kind of records: `data` has conversations
    return list(read_records(file, Comparison))


def of_reward(scored: Counted, found: Findings) -> None:
    """The reward model's accuracy. One that may be guessing says nothing about the policy."""
    low, high = scored.interval(found.seed)
    note = f"95 % interval {low:.3f} to {high:.3f}, {scored.total} pairs"
    found.report.measures.append(Measure(ACCURACY, None, scored.share, "higher", note, (low, high)))
    found.report.facts["reward_accuracy"] = {"share": scored.share, "interval": [low, high]}
    if low <= GUESSING:
        found.untrusted |= {REWARD, WINS}
        found.report.warnings.append(
            f"the reward model was not shown to be better than guessing on held-out comparisons "
            f"({scored.share:.3f}, {note}): its score and win rate say nothing about what people prefer"
        )


def wants_sentiment(config: Config, workspace: Workspace) -> bool:
    """Whether the lexicon's measure fits: it is asked for, or the reward model learnt the built-in ratings of
    sentiment."""
    if config.gold != AUTO:
        return config.gold == SENTIMENT
    settings = _settings(config.data, workspace)
    rated = [name for name in str(settings.get("ratings") or "").split(",") if name]
    own = _settings(config.reward, workspace).get("comparisons") if config.reward else None
    return bool(rated) and not own and all(find(name) is not None for name in rated)


def _settings(name: str, workspace: Workspace) -> dict[str, Any]:
    """The settings of a finished stage of this run; none for a path."""
    file = workspace.inputs[name] / "config.yaml" if name in workspace.inputs else None
    return dict(read_yaml(file)) if file is not None and file.is_file() else {}


def by_sentiment(config: Config, sides: Sides, found: Findings) -> None:
    """VADER's score of both sides' answers."""
    texts = [texts_of(side, sides.base.tokenizer) for side in (sides.before, sides.after)]
    means = [torch.tensor(sentiment(one)).view(config.samples, -1).mean(0).tolist() for one in texts]
    found.add(GOLD, means[0], means[1])
    found.values[GOLD] = (means[0], means[1])
    shown = found.shown[GOLD]
    found.report.facts |= {"gain": shown.mean, "interval": list(shown.interval)}


def of_answers(config: Config, sides: Sides, found: Findings) -> None:
    """KL, variety, length and ends of the answers; and the answers themselves."""
    kl = mean_kl(sides.policy, sides.reference, sides.after, config.temperature)
    names = (config.reference, config.policy)
    answers: Answered = side_by_side(
        names,
        sides.asked.texts,
        (sides.before, sides.after),
        sides.base.tokenizer,
        kl=kl,
        values=found.values,
    )
    answers = as_in_chat(answers, config, sides, found.seed)
    variety = [distinct(texts_of(side, sides.base.tokenizer)) for side in (sides.before, sides.after)]
    found.report.answers = answers
    found.report.measures += [
        Measure("KL on held-out prompts", 0.0, kl, "context", "nats per answer"),
        Measure("distinct-2, held-out prompts", variety[0], variety[1], "higher"),
        Measure("answer length", *answers.measures[LENGTH], "context", "tokens"),
        Measure("answers that come to their end", *answers.measures[ENDED], "higher"),
    ]
    found.report.facts |= {
        "kl": kl,
        "distinct_2": {"before": variety[0], "after": variety[1]},
        "prompts": len(sides.asked.prompts),
        "tokens": sum(int(side.response.sum()) for side in (sides.before, sides.after)),
    }


def as_in_chat(answers: Answered, config: Config, sides: Sides, seed: int) -> Answered:
    """The same with pairs of answers that are sampled as a chat samples them: what a user will see."""
    own = sides.base.generation
    options = chat_options(own)
    temperature = options.pop("temperature")
    count = len(answers.pairs)
    told_texts = [
        texts_of(
            sample_completions(
                model,
                sides.asked.prompts[:count],
                end=sides.base.template.end_id(sides.base.tokenizer),
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                seed_parts=(seed, "as in chat"),
                filters=options,
            ),
            sides.base.tokenizer,
        )
        for model in (sides.reference, sides.policy)
    ]
    pairs = [
        {"prompt": prompt, "before": before, "after": after}
        for prompt, before, after in zip(sides.asked.texts, *told_texts, strict=False)
    ]
    sampling = (
        f"{told(own)}, at most {config.max_new_tokens} tokens (what is measured: temperature "
        f"{config.temperature:g})"
    )
    return replace(answers, pairs=pairs, sampling=sampling)


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
