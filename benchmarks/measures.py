"""What the proofs of docs/lab/results.md measure of a policy: score, gold, KL, variety, win rates; with
intervals.

Everything is measured on prompts of held-out conversations, several sampled answers to each, at temperature
1, as in training.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatwright.data.examples import LabelledText
from chatwright.interop.loaded import Loaded
from chatwright.objectives.policy import kl_k1
from chatwright.stages import best_of_n
from chatwright.train.preference.measures import correlation
from chatwright.train.rl import health
from chatwright.train.rl.rollout import Completions, completion_log_probs, distinct, texts_of
from chatwright.train.statistics import bootstrap_interval

SAMPLES = 4
"""Completions to each prompt."""
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Number of runs -> the 97.5 % quantile of Student's t with one degree of freedom less."""


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over runs and half the width of its 95 % interval (Student's t); None for the width of one run, or
    of too many."""
    mean = statistics.fmean(values)
    if len(values) not in STUDENT:
        return mean, None
    return mean, STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def win_rates(mine: Tensor, theirs: Tensor) -> Tensor:
    """Of all pairs of my and their answers to a prompt the share that mine win, a tie counted half; (prompts,
    S), (prompts, S) -> (prompts,). The judge that made these numbers has seen single answers: it cannot know
    whose they are, or their order."""
    ahead = mine[:, :, None] - theirs[:, None, :]
    return ((ahead > 0).double() + 0.5 * (ahead == 0).double()).mean((1, 2))


class WordBag:
    """A judge of another kind than a reward model: ridge regression of ratings on which words a text has.

    Words are counted that at least `least` texts have; `penalty` is the ridge. It knows no order, no context
    and no negation.
    """

    def __init__(self, texts: Sequence[LabelledText], *, least: int = 5, penalty: float = 5.0) -> None:
        if not texts:
            raise ValueError("no rated texts to learn from")
        seen = Counter(word for one in texts for word in self.words(one.text))
        self.place = {
            word: n for n, word in enumerate(sorted(word for word, count in seen.items() if count >= least))
        }
        matrix, labels = self._matrix([one.text for one in texts]), torch.tensor([one.label for one in texts])
        self.mean = float(labels.mean())
        inner = matrix.T @ matrix + penalty * torch.eye(len(self.place))
        self.weights = torch.linalg.solve(inner, matrix.T @ (labels - self.mean))

    @staticmethod
    def words(text: str) -> set[str]:
        """Its words, small letters."""
        return set(re.findall(r"[a-z']+", text.lower()))

    def _matrix(self, texts: Sequence[str]) -> Tensor:
        matrix = torch.zeros(len(texts), len(self.place))
        for row, text in enumerate(texts):
            matrix[row, [self.place[word] for word in self.words(text) if word in self.place]] = 1.0
        return matrix

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """The rating that each text would get."""
        return [float(value) for value in self._matrix(texts) @ self.weights + self.mean]

    def agreement(self, texts: Sequence[LabelledText]) -> float:
        """Correlation with the ratings of texts that it did not learn from."""
        return correlation(
            torch.tensor(self([one.text for one in texts])), torch.tensor([one.label for one in texts])
        )


TextJudge = Callable[[Sequence[str]], list[float]]


@dataclass
class Table:
    """Those who sit at it: the model that policies came from, the reward model with the gold measure,
    prompts, judges."""

    base: Loaded
    ask: best_of_n.Scorer
    prompts: Sequence[Sequence[int]]
    settings: best_of_n.Config
    seed: int
    judges: Mapping[str, TextJudge]
    third: Loaded | None = None
    """A model that had no part in training; how likely it finds the answers is shown as `fluency`."""

    def measure(self, policy: Loaded, reference: Measured | None = None) -> Measured:
        """Sample from a policy and measure. Win rates are against the answers of `reference`."""
        repeated = [prompt for prompt in self.prompts for _ in range(SAMPLES)]
        answers = best_of_n.answered(policy, repeated, self.settings, self.seed)
        scores, gold = self.ask(answers)
        assert gold is not None and self.base.tokenizer is not None
        texts = texts_of(answers, self.base.tokenizer)
        values = {"score": scores, "gold": gold, "kl": self.kl(policy, answers)}
        values |= {name: torch.tensor(judge(texts)) for name, judge in self.judges.items()}
        if self.third is not None:
            values["fluency"] = per_token(self.third, answers)
        by_prompt = {name: value.view(-1, SAMPLES).double() for name, value in values.items()}
        facts = {
            "distinct_2": distinct(texts),
            "length": float(answers.response.sum(1).double().mean()),
            "finished": float(answers.finished.double().mean()),
            "prompts": len(self.prompts),
            "samples": SAMPLES,
        }
        wins = {}
        if reference is not None:
            judged = [name for name in ("gold", *self.judges) if name in reference.by_prompt]
            wins = {name: win_rates(by_prompt[name], reference.by_prompt[name]) for name in judged}
        return Measured(by_prompt, facts, wins, texts[: 8 * SAMPLES : SAMPLES], self.seed)

    @torch.no_grad()
    def kl(self, policy: Loaded, answers: Completions) -> Tensor:
        """KL of the policy from the base on each of its own answers, k1, nats."""
        found = []
        for chosen in torch.split(torch.arange(len(answers.ids)), 64):
            part = answers.rows(chosen)
            own, base = (
                completion_log_probs(one.model, part, temperature=self.settings.temperature)[0]
                for one in (policy, self.base)
            )
            found.append(torch.where(part.response, kl_k1(own, base), 0.0).sum(1))
        return torch.cat(found).cpu()


@torch.no_grad()
def per_token(model: Loaded, answers: Completions) -> Tensor:
    """Mean log-probability of each answer's tokens under a model, nats."""
    found = []
    for chosen in torch.split(torch.arange(len(answers.ids)), 32):
        part = answers.rows(chosen)
        sums = completion_log_probs(model.model, part, temperature=1.0)[0].sum(1)
        found.append(sums / part.response.sum(1).clamp(min=1))
    return torch.cat(found).cpu()


@dataclass
class Measured:
    """A policy's numbers: of each prompt and answer, and of all."""

    by_prompt: Mapping[str, Tensor]
    """Measure -> (prompts, answers)."""
    facts: Mapping[str, float]
    wins: Mapping[str, Tensor]
    """Judge -> share of pairs won against the reference, of each prompt."""
    texts: Sequence[str]
    """The first answers to the first prompts, not chosen."""
    seed: int

    def row(self) -> dict[str, Any]:
        """Means with 95 % intervals over prompts (bootstrap), and the raw means of each prompt."""
        found: dict[str, Any] = dict(self.facts)
        raw = {}
        means = {name: values.mean(1) for name, values in self.by_prompt.items()}
        for name, values in {**means, **{f"wins_{name}": wins for name, wins in self.wins.items()}}.items():
            low, high = bootstrap_interval(values, seed=self.seed)
            found |= {
                name: round(float(values.mean()), 4),
                f"{name}_low": round(low, 4),
                f"{name}_high": round(high, 4),
            }
            raw[name] = [round(value, 3) for value in values.tolist()]
        return {**found, "raw": raw, "texts": list(self.texts)}


def replay(
    rows: Sequence[Mapping[str, float]], limits: health.Limits, *, aim: str = "gold"
) -> tuple[int, int, str]:
    """What a run with these limits would have done, from the rows of one that went on: the round in which it
    stops, the round that it keeps (the candidate with the best `fixed_` aim until then, within the KL
    budget), and why it stops. Raises ValueError when it keeps none."""
    best: int | None = None
    key = f"fixed_{aim}"
    for last, row in enumerate(rows):
        diagnosis = health.diagnose(rows[: last + 1], limits)
        candidate = diagnosis is None and key in row and row.get("fixed_kl", 0.0) <= limits.kl_budget
        if candidate and (best is None or row[key] > rows[best][key]):
            best = last
        if diagnosis is not None or last == len(rows) - 1:
            if best is None:
                break
            return last, best, diagnosis.text if diagnosis is not None else "all iterations done"
    raise ValueError("no round is within the KL budget")
