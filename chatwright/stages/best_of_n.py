"""Best of n: of n answers, the one that the reward model scores highest.  Stiennon et al. 2020.

It is a policy without any training. Its KL from the model that it samples from is at most
log n - (n - 1) / n nats, which makes it the yardstick for PPO and REINFORCE at equal KL. One set of N answers
to each prompt gives the whole curve n = 1, 2, 4 ... N. It also gives the optimum of the objective of PPO and
REINFORCE (chatwright/evaluate/best_of_n.py).

Completions are scored as in PPO: unfinished and degenerate ones get a fixed score. Prompts are held out.
Equal scores count as if one were chosen at random, by its expected value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.config import UsageError, UserError
from chatwright.data.cuts import check_limit
from chatwright.data.examples import Dialogue
from chatwright.data.records import read_records, records_of
from chatwright.evaluate.answers import mean_kl, side_by_side
from chatwright.evaluate.best_of_n import Samples, at_kl, best_of_n, optima, point, sizes
from chatwright.metrics import progress_bar
from chatwright.model.attention import plain_attention
from chatwright.model.heads import ScalarModel
from chatwright.train.api import (
    Answered,
    ChatBase,
    Curve,
    Measure,
    Metric,
    ParallelConfig,
    ParallelContext,
    Report,
    Stage,
    Table,
    Workspace,
    open_chat_base,
)
from chatwright.train.parallel.context import SINGLE_PROCESS
from chatwright.train.parallel.start import start_parallel
from chatwright.train.rl.gold import SENTIMENT, Gold, gold_of
from chatwright.train.rl.metrics import GOLD as GOLD_MEANING
from chatwright.train.rl.metrics import SCORE as SCORE_MEANING
from chatwright.train.rl.models import load_reward, score_completions
from chatwright.train.rl.prompts import Asked, ask
from chatwright.train.rl.rollout import Completions, all_gather_completions, sample_completions
from chatwright.train.statistics import bootstrap_interval

SCORE, GOLD = "reward model's score, best of n", "gold measure, best of n"


@dataclass(frozen=True)
class Config:
    """Settings of best-of-n."""

    policy: str = field(default="sft", metadata={"input": True})
    """The model that answers."""
    reward: str = field(default="reward", metadata={"input": True})
    """The reward model that chooses."""
    baseline_policy: str = field(default="", metadata={"input": True, "words": ("",)})
    """A policy that was trained from the same model (the stage ppo, or reinforce): its score and gold beside
    those of best-of-n at the same KL. Empty for none."""
    gold: str = field(default=SENTIMENT, metadata={"input": True, "words": ("", SENTIMENT)})
    """What the chosen answers are measured by beside the score: `sentiment` (a lexicon) or the stage of
    another reward model; empty for nothing."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-validation.jsonl."""
    prompts: int = 128
    """Number of held-out prompts (fewer when there are fewer)."""
    n: int = 16
    """Completions to each prompt, the largest n of the curve."""
    max_prompt_tokens: int = 0
    """Longer prompts are left out; 0: the length that holds 99 % of the data's prompts, as far as the model's
    context allows."""
    max_new_tokens: int = 0
    """Length at which an answer is cut off; 0: the length that holds 99 % of the answers in the data's
    conversations, as far as the model's context allows."""
    temperature: float = 1.0
    """Sampling temperature."""
    unfinished_score: float = -2.0
    """Score of an answer that has no end token, is too short or repeats itself, as in PPO."""
    min_tokens: int = 4
    """Completions shorter than this count as degenerate."""
    max_repeats: float = 0.3
    """Largest share of an answer's bigrams that may have occurred in it before."""
    min_correlation: float = 0.6
    """Refuse a reward model whose held-out correlation with the ratings is lower."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the prompts: `ddp`, each with the whole models."""

    def __post_init__(self) -> None:
        check_limit("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_limit("max_new_tokens", self.max_new_tokens, 1)
        if self.n < 2:
            raise UsageError(f"n is {self.n}; there is nothing to choose from under 2")
        if self.temperature <= 0:
            raise UsageError("temperature must be above 0: n equal answers leave no choice")


@dataclass(frozen=True)
class Scorer:
    """Reward model and gold measure together."""

    reward: ScalarModel
    gold: Gold | None
    config: Config

    @classmethod
    def load(cls, config: Config, workspace: Workspace, base: ChatBase) -> Scorer:
        """Load both as the settings say. Raises UserError for a reward model that is too weak."""
        found = load_reward(workspace.resolve(config.reward), base, config.min_correlation)
        reward = found.to(runtime.device()).eval()
        if runtime.device().type == "cpu":
            reward.body.use_attention(plain_attention)
        return cls(reward, gold_of(config.gold, workspace.resolve, base), config)

    @torch.no_grad()
    def __call__(self, answers: Completions) -> tuple[Tensor, Tensor | None]:
        """Score and gold (if there is one) of each answer."""
        scores, gold = [], []
        for chosen in torch.split(torch.arange(len(answers.ids)), 64):
            part = answers.rows(chosen)
            scores.append(score_completions(self.reward, part, self.config)[0].float().cpu())
            if self.gold is not None:
                gold.append(self.gold(part))
        return torch.cat(scores), torch.cat(gold) if gold else None


def run(config: Config, workspace: Workspace) -> Report:
    """Sample N answers to each held-out prompt, and measure what choosing among n of them gains."""
    base = _load(config.policy, workspace)
    scorer = Scorer.load(config, workspace, base)
    asked = held_out_prompts(config, workspace, base)
    config, prompts = asked.config, asked.prompts
    parallel = sharing(config, prompts)
    with progress_bar("best_of_n") as bar:
        bar.update(0.0, f"{config.n} answers to each of {len(prompts)} prompts")
        mine = parallel.local_slice(len(prompts))
        repeated = [prompt for prompt in prompts[mine] for _ in range(config.n)]
        given = answered(base, repeated, config, workspace.seed, first=mine.start * config.n)
        scores, values = scorer(given)
        scores = together(scores, parallel).view(-1, config.n)
        values = together(values, parallel).view(-1, config.n) if values is not None else None
        given = all_gather_completions(given, parallel)
        rows = {n: point(scores, values, n, workspace.seed) for n in sizes(config.n)}
        for n, row in rows.items():
            workspace.metrics.write_once(n, row)
        bar.update(0.9, "the baseline policy" if config.baseline_policy else "")
        baseline = (
            measured_baseline(config, workspace, base, prompts, scorer, parallel)
            if config.baseline_policy
            else None
        )
        bar.update(1.0)
    report = report_of(config, rows, baseline, optima(scores, values, workspace.seed))
    report.answers = chosen_answers(config, base, asked.texts, given, scores, values)
    report.facts["tokens"] = int(given.response.sum())
    return asked.tell(report)


def chosen_answers(
    config: Config,
    base: ChatBase,
    prompts: Sequence[str],
    given: Completions,
    scores: Samples,
    values: Samples | None,
) -> Answered:
    """The first answer to each prompt beside the one with the highest score."""
    first = torch.arange(len(prompts)) * config.n
    best = first + scores.argmax(1)
    known = {SCORE: (scores.mean(1).tolist(), scores.max(1).values.tolist())}
    if values is not None:
        known[GOLD] = (values.mean(1).tolist(), best_of_n(scores, values, config.n).tolist())
    names = (
        f"{config.policy}, its first answer",
        f"{config.policy}, the best of {config.n} by {config.reward}",
    )
    sides = (given.rows(runtime.on_device(first)), given.rows(runtime.on_device(best)))
    sampling = f"temperature {config.temperature:g}, at most {config.max_new_tokens} tokens"
    return side_by_side(names, prompts, sides, base.tokenizer, values=known, sampling=sampling)


def sharing(config: Config, prompts: Sequence[Sequence[int]]) -> ParallelContext:
    """The processes that share the prompts. Raises UsageError for plans that cut models, UserError for too
    few prompts."""
    reason = "best_of_n trains nothing, every process has the whole models: use ddp"
    parallel = start_parallel(
        config.parallel,
        batch_size=runtime.world_size(),
        refused=dict.fromkeys(("fsdp", "hsdp", "tp"), reason),
    )
    if len(prompts) < parallel.data_size:
        raise UserError(
            f"{len(prompts)} held-out prompts are too few for {parallel.data_size} processes; start fewer"
        )
    return parallel


def together(values: Tensor, parallel: ParallelContext) -> Tensor:
    """All-gather the values of all processes, in the order of the prompts."""
    return torch.cat(parallel.all_gather(values.cpu()))


def _load(name: str, workspace: Workspace) -> ChatBase:
    found = open_chat_base(name, workspace, purpose="best-of-n needs a model after sft")
    found.model.to(runtime.device()).eval()
    return found


def held_out_prompts(config: Config, workspace: Workspace, base: ChatBase) -> Asked[Config]:
    """Prompts of held-out conversations, and the limits that hold. Raises UserError when there are fewer than
    two."""
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-validation.jsonl", Dialogue))
    asked = ask("best_of_n", config, dialogues, base, most=config.prompts)
    if len(asked.prompts) < 2:
        raise UserError(
            "there is only one held-out prompt short enough; raise max_prompt_tokens or the validation share"
        )
    return asked


def answered(
    base: ChatBase, prompts: Sequence[Sequence[int]], config: Config, seed: int, first: int = 0
) -> Completions:
    """One answer to each prompt; `first` is the number of the first prompt among those of all processes."""
    return sample_completions(
        base.model,
        prompts,
        end=base.template.end_id(base.tokenizer),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed_parts=(seed, "bestofn"),
        first=first,
    )


def measured_baseline(
    config: Config,
    workspace: Workspace,
    base: ChatBase,
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> dict[str, float]:
    """A trained policy on the same prompts: KL, score and gold with 95 % intervals over prompts."""
    baseline = _load(config.baseline_policy, workspace)
    if baseline.tokenizer.fingerprint != base.tokenizer.fingerprint:
        raise UserError(f"{config.baseline_policy} has another tokenizer than {config.policy}")
    mine = parallel.local_slice(len(prompts))
    repeated = [prompt for prompt in prompts[mine] for _ in range(4)]
    answers = answered(baseline, repeated, config, workspace.seed, first=mine.start * 4)
    scores, values = scorer(answers)
    kl = mean_kl(baseline.model, base.model, answers, config.temperature)
    result = {"kl": parallel.sum([kl * len(repeated)])[0] / (4 * len(prompts))}
    for name, found in (("score", scores), ("gold", values)):
        if found is not None:
            means = together(found, parallel).view(-1, 4).mean(1)
            low, high = bootstrap_interval(means, seed=workspace.seed)
            result |= {name: float(means.mean()), f"{name}_low": low, f"{name}_high": high}
    return result


def report_of(
    config: Config,
    rows: dict[int, dict[str, float]],
    baseline: dict[str, float] | None,
    best: dict[float, dict[str, float]] | None = None,
) -> Report:
    """The report: measures of the largest n, and a table with all n, the optimum at each KL coefficient
    (`optima`) and the `baseline` policy."""
    best = best or {}
    first, last = rows[1], rows[config.n]
    names = [name for name in ("score", "gold") if name in first]
    measures = [
        Measure(
            "reward model's score, best of n",
            first["score"],
            last["score"],
            "higher",
            _note(config.n, last, "score"),
            (last["score_low"], last["score_high"]),
        ),
        Measure("KL of best of n", 0.0, last["kl"], "context", "nats per answer, log n - (n - 1) / n"),
    ]
    if "gold" in names:
        note, within = _note(config.n, last, "gold"), (last["gold_low"], last["gold_high"])
        measures.insert(
            1, Measure("gold measure, best of n", first["gold"], last["gold"], "higher", note, within)
        )
    cells = [
        [f"best of {n}", f"{row['kl']:.2f}", *(_interval(row, name) for name in names)]
        for n, row in rows.items()
    ]
    cells += [
        [f"optimum at beta {beta:g}", f"{row['kl']:.2f}", *(_interval(row, name) for name in names)]
        for beta, row in best.items()
    ]
    facts: dict[str, Any] = {
        "curve": {str(n): row for n, row in rows.items()},
        "optima": {str(beta): row for beta, row in best.items()},
    }
    notes = []
    if baseline is not None:
        cells.append(
            [config.baseline_policy, f"{baseline['kl']:.2f}", *(_interval(baseline, name) for name in names)]
        )
        facts["baseline_policy"] = baseline
        for name in names:
            level = at_kl([(row["kl"], row[name]) for row in rows.values()], baseline["kl"])
            reach = (
                "beyond the largest n"
                if level is None
                else f"where best-of-n has {level:.3f} ({baseline[name] - level:+.3f})"
            )
            notes.append(
                f"{config.baseline_policy}: {name} {baseline[name]:.3f} at {baseline['kl']:.2f} nats, {reach}"
            )
    curves = [Curve(f"Best of n: {name}", [name, f"{name}_low", f"{name}_high"], "step: n") for name in names]
    title = "What choosing among n answers brings (95 % intervals over prompts, bootstrap)"
    return Report(measures, curves, None, facts, notes, [Table(title, ["", "KL, nats", *names], cells)])


def _note(n: int, row: dict[str, float], name: str) -> str:
    return f"n = {n}, held-out prompts, 95 % interval {row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}"


def _interval(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def kl_budget(config: Config, workspace: Workspace, report: Report) -> dict[str, Any]:
    """The KL of best of n; it has no budget."""
    bound = "nothing is trained; log n - (n - 1) / n is an upper bound"
    return {"spent": report.value("KL of best of n"), "allowed": None, "stopped": bound}


_INTERVAL = "95 % interval over prompts, by bootstrap"
METRICS = (
    Metric(
        "kl",
        "nats per completion",
        "log n - (n - 1) / n",
        "Upper bound of the KL from the model that is sampled. In this stage `step` is n.",
    ),
    Metric("score", "score", "rises with n", f"{SCORE_MEANING} Of each prompt's n, the best one counts."),
    Metric("score_low", "score", "close to `score`", f"Lower end of the {_INTERVAL}."),
    Metric("score_high", "score", "close to `score`", f"Upper end of the {_INTERVAL}."),
    Metric(
        "gold",
        "units of the gold measure",
        "rises with n, as `score` does",
        f"{GOLD_MEANING} Of each prompt's n, the one with the best score counts.",
        unhealthy="falling while `score` rises: the reward model can be exploited",
        when="`gold` is set",
    ),
    Metric(
        "gold_low",
        "units of the gold measure",
        "close to `gold`",
        f"Lower end of the {_INTERVAL}.",
        when="`gold` is set",
    ),
    Metric(
        "gold_high",
        "units of the gold measure",
        "close to `gold`",
        f"Upper end of the {_INTERVAL}.",
        when="`gold` is set",
    ),
)

STAGE = Stage(
    config=Config,
    run=run,
    plan=None,
    metrics=METRICS,
    reads=lambda config: {"dialogues": config.data},
    kl_budget=kl_budget,
    renamed={"rival": "baseline_policy"},
)
