"""Best of n: of n answers the one that the reward model likes best; a policy without any training.  Stiennon
et al. 2020.

It moves away from the model it samples from by at most log n - (n - 1) / n nats, which makes it the yardstick
for PPO and REINFORCE at equal KL. From ONE set of N answers to each prompt the whole curve n = 1, 2, 4 ... N
is estimated without bias, by the mean over all subsets of n (Nakano et al. 2021, arXiv:2112.09332; Gao et al.
2022, arXiv:2210.10760).

The same answers, weighted by exp(score / beta), show the optimum: of all policies with the KL that it has,
the one of the highest expected score (Korbak et al. 2022, arXiv:2205.11275), which PPO with this beta and
REINFORCE aim at.

Completions are judged as PPO judges them: unfinished and degenerate ones get the fixed score. Prompts are
held out. Ties of the score are broken at random, in expectation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright import runtime
from chatwright.config import UsageError, UserError
from chatwright.data.examples import Dialogue
from chatwright.data.records import read_records, records_of
from chatwright.evaluate.answers import bootstrap_interval, mean_kl, side_by_side
from chatwright.interop.loaded import Loaded
from chatwright.metrics import Metric, progress_bar
from chatwright.model.attention import plain_attention
from chatwright.model.heads import ScalarModel
from chatwright.train.base import open_base
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelConfig, ParallelContext
from chatwright.train.parallel.start import start_parallel
from chatwright.train.rl.gold import SENTIMENT, Gold, gold_of
from chatwright.train.rl.metrics import GOLD as GOLD_MEANING
from chatwright.train.rl.metrics import SCORE as SCORE_MEANING
from chatwright.train.rl.models import load_reward, score_completions
from chatwright.train.rl.rollout import Completions, all_gather_completions, prompts_from, sample_completions
from chatwright.train.stage import Stage
from chatwright.train.workspace import Answered, Curve, Measure, Report, Table, Workspace

Samples = Float[Tensor, "prompts n"]
SCORE, GOLD = "reward model's score, best of n", "gold measure, best of n"

BETAS = (3.2, 1.6, 0.8, 0.4, 0.2, 0.1)
"""KL coefficients whose optimum is estimated, as far as the number of answers allows."""
COUNTED = 8.0
"""So many answers must count, on average over prompts, for an estimate of an optimum."""


@dataclass(frozen=True)
class Config:
    """Settings of best-of-n."""

    policy: str = field(default="sft", metadata={"input": True})
    """The model that answers."""
    reward: str = field(default="reward", metadata={"input": True})
    """The reward model that chooses."""
    rival: str = field(default="", metadata={"input": True, "words": ("",)})
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
    max_prompt_tokens: int = 96
    """Longer prompts are left out."""
    max_new_tokens: int = 32
    """Length at which an answer is cut off."""
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
        if self.n < 2:
            raise UsageError(f"n is {self.n}; there is nothing to choose from under 2")
        if self.temperature <= 0:
            raise UsageError("temperature must be above 0: n equal answers leave no choice")


def best_of_n_kl(n: float) -> float:
    """KL of the best of n from the model that is sampled, log n - (n - 1) / n nats (Stiennon et al. 2020,
    appendix G.3).

    An upper bound, near the truth where no single answer is likely (Beirami et al. 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Samples, values: Samples, n: int) -> Float[Tensor, " prompts"]:
    """Expected `values` of the answer with the highest of n `scores`, from N >= n answers to each prompt.

    The mean over all subsets of n of the N answers: with answers in rising order, the i-th is the best of C(i
    - 1, n - 1) of the C(N, n) subsets. Completions of equal score stand for each other: each gets the mean of
    their values. Raises ValueError when n is not in 1 ... N.
    """
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n = {n} of {size} answers")
    weights = torch.tensor([math.comb(i, n - 1) for i in range(size)], dtype=torch.float64) / math.comb(
        size, n
    )
    order = scores.double().argsort(dim=1)
    ranked, told = scores.double().gather(1, order), values.double().gather(1, order)
    same = (ranked[:, :, None] == ranked[:, None, :]).double()  # (prompts, N, N): which answers tie
    shared = (same @ told[:, :, None]).squeeze(-1) / same.sum(-1)
    return shared @ weights


def at_kl(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """What best-of-n reaches at some KL, from points (KL, value) in rising order; None beyond them."""
    for (left, low), (right, high) in pairwise(curve):
        if left <= kl <= right:
            return low + (high - low) * (kl - left) / (right - left)
    return None


def tilted(
    scores: Samples, values: Samples, beta: float
) -> tuple[Float[Tensor, " prompts"], Float[Tensor, " prompts"]]:
    """KL from the model that was sampled, and expected `values`, of the policy that is its optimum for a KL
    coefficient: that model tilted by exp(score / beta).

    From N answers to each prompt, by self-normalised importance weights: exp(KL) answers count as one. Few
    answers hold no rare good one, so that both are too low, but together: with normal scores and 8 of 64
    answers that count, the KL is a third too low, and the score 5 % below what a policy of that KL can have.
    """
    log_weights = (scores.double() / beta).log_softmax(1)
    weights = log_weights.exp()
    # 0 x -inf, where a score is hopeless, is nothing
    kl = torch.special.xlogy(weights, weights).sum(1) + math.log(scores.shape[1])
    return kl, (weights * values.double()).sum(1)


@dataclass(frozen=True)
class Judge:
    """Reward model and gold measure together."""

    reward: ScalarModel
    gold: Gold | None
    config: Config

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


def sizes(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def run(config: Config, workspace: Workspace) -> Report:
    """Sample N answers to each held-out prompt, and say what choosing among n of them brings."""
    base = _load(config.policy, workspace)
    reward = (
        load_reward(workspace.resolve(config.reward), base, config.min_correlation)
        .to(runtime.device())
        .eval()
    )
    if runtime.device().type == "cpu":
        reward.body.use_attention(plain_attention)
    gold = gold_of(config.gold, workspace.resolve, base)
    prompts = held_out_prompts(config, workspace, base)
    ask, parallel = Judge(reward, gold, config), sharing(config, prompts)
    mine = parallel.local_slice(len(prompts))
    with progress_bar("bestofn") as bar:
        bar.update(0.0, f"{config.n} answers to each of {len(prompts)} prompts")
        repeated = [prompt for prompt in prompts[mine] for _ in range(config.n)]
        given = answered(base, repeated, config, workspace.seed, first=mine.start * config.n)
        scores, values = ask(given)
        scores = together(scores, parallel).view(-1, config.n)
        values = together(values, parallel).view(-1, config.n) if values is not None else None
        given = all_gather_completions(given, parallel)
        rows: dict[int, dict[str, float]] = {}
        for n in sizes(config.n):
            row = point(scores, values, n, workspace.seed)
            workspace.metrics.write_once(n, row)
            rows[n] = row
        bar.update(0.9, "the rival" if config.rival else "")
        rival = rival_of(config, workspace, base, prompts, ask, parallel) if config.rival else None
        bar.update(1.0)
    report = report_of(config, rows, rival, optima(scores, values, workspace.seed))
    report.answers = chosen_answers(config, base, prompts, given, scores, values)
    report.facts["tokens"] = int(given.response.sum())
    return report


def chosen_answers(
    config: Config,
    base: Loaded,
    prompts: Sequence[Sequence[int]],
    given: Completions,
    scores: Samples,
    values: Samples | None,
) -> Answered:
    """The first answer to each prompt beside the one with the highest score."""
    assert base.tokenizer is not None
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
    return side_by_side(names, prompts, sides, base.tokenizer, values=known)


def sharing(config: Config, prompts: Sequence[Sequence[int]]) -> ParallelContext:
    """The processes that share the prompts. Raises UsageError for plans that cut models, UserError for too
    few prompts."""
    reason = "bestofn trains nothing, every process has the whole models: use ddp"
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
    """What all processes found about their answers, in the order of the prompts."""
    return torch.cat(parallel.all_gather(values.cpu()))


def _load(name: str, workspace: Workspace) -> Loaded:
    found = open_base(name, workspace)
    if found.tokenizer is None or found.template is None:
        raise UserError(f"{name} has no chat template; best-of-n needs a model after sft")
    found.model.to(runtime.device()).eval()
    return found


def held_out_prompts(config: Config, workspace: Workspace, base: Loaded) -> list[list[int]]:
    """Prompts of held-out conversations. Raises UserError when there are fewer than two."""
    assert base.tokenizer is not None and base.template is not None
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-validation.jsonl", Dialogue))
    longest = min(config.max_prompt_tokens, base.model.config.context - config.max_new_tokens)
    prompts = prompts_from(dialogues, base.template, base.tokenizer, max_tokens=longest, most=config.prompts)
    if len(prompts) < 2:
        raise UserError(
            "there are no held-out prompts short enough; raise max_prompt_tokens or the validation share"
        )
    return prompts


def answered(
    base: Loaded, prompts: Sequence[Sequence[int]], config: Config, seed: int, first: int = 0
) -> Completions:
    """One answer to each prompt; `first` is the number of the first one among those of all processes."""
    assert base.tokenizer is not None and base.template is not None
    return sample_completions(
        base.model,
        prompts,
        end=base.tokenizer.control_ids[base.template.end],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed_parts=(seed, "bestofn"),
        first=first,
    )


def point(scores: Samples, values: Samples | None, n: int, seed: int) -> dict[str, float]:
    """A point of the curve: KL, score and gold with 95 % intervals over prompts."""
    best = best_of_n(scores, scores, n)
    low, high = bootstrap_interval(best, seed=seed)
    row = {"kl": best_of_n_kl(n), "score": float(best.mean()), "score_low": low, "score_high": high}
    if values is not None:
        chosen = best_of_n(scores, values, n)
        low, high = bootstrap_interval(chosen, seed=seed)
        row |= {"gold": float(chosen.mean()), "gold_low": low, "gold_high": high}
    return row


def optima(scores: Samples, values: Samples | None, seed: int) -> dict[float, dict[str, float]]:
    """For each KL coefficient at which enough answers count: KL, score and gold of its optimum, with 95 %
    intervals over prompts."""
    found: dict[float, dict[str, float]] = {}
    for beta in BETAS:
        kl, score = tilted(scores, scores, beta)
        if float(kl.mean()) > math.log(scores.shape[1] / COUNTED):
            break  # smaller ones are further away
        row = {"kl": float(kl.mean())}
        for name, told in (
            ("score", score),
            *([("gold", tilted(scores, values, beta)[1])] if values is not None else []),
        ):
            low, high = bootstrap_interval(told, seed=seed)
            row |= {name: float(told.mean()), f"{name}_low": low, f"{name}_high": high}
        found[beta] = row
    return found


def rival_of(
    config: Config,
    workspace: Workspace,
    base: Loaded,
    prompts: Sequence[Sequence[int]],
    ask: Judge,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> dict[str, float]:
    """A trained policy on the same prompts: KL, score and gold with 95 % intervals over prompts."""
    rival = _load(config.rival, workspace)
    assert rival.tokenizer is not None and base.tokenizer is not None
    if rival.tokenizer.fingerprint != base.tokenizer.fingerprint:
        raise UserError(f"{config.rival} has another tokenizer than {config.policy}")
    mine = parallel.local_slice(len(prompts))
    repeated = [prompt for prompt in prompts[mine] for _ in range(4)]
    answers = answered(rival, repeated, config, workspace.seed, first=mine.start * 4)
    scores, values = ask(answers)
    kl = mean_kl(rival.model, base.model, answers, config.temperature)
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
    rival: dict[str, float] | None,
    best: dict[float, dict[str, float]] | None = None,
) -> Report:
    """Measures of the largest n, the table of all, what is best at a KL coefficient (`optima`), and the rival
    beside it."""
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
    if rival is not None:
        cells.append([config.rival, f"{rival['kl']:.2f}", *(_interval(rival, name) for name in names)])
        facts["rival"] = rival
        for name in names:
            level = at_kl([(row["kl"], row[name]) for row in rows.values()], rival["kl"])
            reach = (
                "beyond the largest n"
                if level is None
                else f"where best-of-n has {level:.3f} ({rival[name] - level:+.3f})"
            )
            notes.append(f"{config.rival}: {name} {rival[name]:.3f} at {rival['kl']:.2f} nats, {reach}")
    curves = [Curve(f"Best of n: {name}", [name, f"{name}_low", f"{name}_high"], "step: n") for name in names]
    title = "What choosing among n answers brings (95 % intervals over prompts, bootstrap)"
    return Report(measures, curves, None, facts, notes, [Table(title, ["", "KL, nats", *names], cells)])


def _note(n: int, row: dict[str, float], name: str) -> str:
    return f"n = {n}, held-out prompts, 95 % interval {row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}"


def _interval(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def kl_budget(config: Config, workspace: Workspace, report: Report) -> dict[str, Any]:
    """The KL of best of n, which nothing limits."""
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
)
