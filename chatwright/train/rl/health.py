"""Health checks of an RL run: signs of trouble in the metrics of its iterations, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WATCHED = (
    "score",
    "score_error",
    "kl",
    "kl_error",
    "entropy",
    "explained_variance",
    "length",
    "finished",
    "sampler_gap",
    "sampler_error",
    "tokens",
    "distinct_2",
    "gold",
    "gold_error",
)
"""Logged values that `diagnose` reads. Checkpoints keep them, so that a resumed run decides as an
uninterrupted one. A run without a critic has no `explained_variance`, one without a gold measure no `gold`.
"""

Row = Mapping[str, float]
History = Sequence[Row]

YOUNG = 15
"""Iterations after which a critic should have learnt something."""
WINDOW = 5
"""Iterations over which a gold measure is averaged when `patience` is 0."""


@dataclass(frozen=True)
class Rounding:
    """The largest errors that rounding explains, with some slack, for one precision of the policy."""

    token: float = 1e-2
    """Nats by which sampler and trainer may disagree about a token (float32: below 1e-4)."""
    sampler: float = 2e-3
    """The same as a root mean square over an iteration's tokens (float32: 2e-5 was seen)."""
    ratio: float = 1e-3
    """By how much a ratio may differ from 1 before the first update (float32: below 1e-5)."""


FLOAT32 = Rounding()
BFLOAT16 = Rounding(token=2.0, sampler=0.1, ratio=0.3)
"""Measured root mean squares between sampler and trainer:
* SmolLM2-135M with adapters, 80 iterations, sampler in float32: 0.02 nats at first, 0.08 at 5 nats from the
  reference; single tokens up to 0.53.
* The tiny recipe's model, 12 iterations, sampler in bf16: 0.008 throughout; single tokens up to 0.09, with
  compiled blocks as without.
Ratios were 1 to four digits, for a row's products do not depend on the other rows. A wrong temperature of
0.95 instead of 1 makes 0.13 nats, one of 0.9 makes 0.28. That is close to the rounding of bf16, so the
default precision of a policy is float32."""


@dataclass(frozen=True)
class Diagnosis:
    """Why to stop. A fatal one means that something is broken; the others only end the run."""

    text: str
    fatal: bool


@dataclass(frozen=True)
class Limits:
    """The settings that the rules depend on."""

    kl_budget: float
    """Nats per answer."""
    patience: int = 0
    """Iterations that are averaged to find a peak; 0 looks for no peak of the score."""
    rounding: Rounding = FLOAT32
    """Limits for the precision of the policy's products."""
    too_short: str = ""
    """What `max_new_tokens` cuts of people's own answers, and what to set, where it cuts most of them
    (`chatwright/train/rl/prompts.py::OwnAnswers`)."""


def diagnose(history: History, limits: Limits) -> Diagnosis | None:
    """The first rule that the latest iteration breaks, or None. Rules about broken runs come first."""
    return next((found for rule in RULES if (found := rule(history, limits)) is not None), None)


def diagnose_ratio(gap: float, rounding: Rounding = FLOAT32) -> Diagnosis | None:
    """`gap` is the largest |ratio - 1| in an iteration's first minibatch, before its update."""
    if gap <= rounding.ratio:
        return None
    return Diagnosis(
        f"in the first minibatch, before any update, a token's ratio of new to old probability is {gap:.3g} "
        "away from 1: the log-probabilities of learning are not those of looking back (temperature, dropout, "
        "padding, or weights that moved)",
        fatal=True,
    )


MORE_COMPARISONS = "More comparisons, fewer passes, or a split by prompt"


def diagnose_reward(
    *, train: float, held_out: float, length: float, pairs: int, cut: str = ""
) -> Diagnosis | None:
    """Whether a reward model has only learnt its training prompts: its accuracy is good on training pairs
    (`train`), and on `pairs` held-out ones (`held_out`) within two standard errors of chance. A model that
    orders all of them rightly has shown no fault, however few they are.

    `length` is the accuracy of length alone on the held-out pairs. `cut` says what was cut of the answers
    (`chatwright/data/cuts.py::cause_of`), if anything was.
    """
    error = 0.5 / math.sqrt(max(pairs, 1))
    if train < 0.7 or held_out > min(0.5 + 2 * error, 0.999):
        return None
    biased = abs(length - 0.5) > 2 * error
    return Diagnosis(
        f"the reward model orders {100 * train:.0f} % of its training pairs rightly and {100 * held_out:.0f} "
        f"% of {pairs:,} held-out ones, which is chance: it knows the training prompts by "
        f"heart{', or their lengths' if biased else ''} (length alone: {100 * length:.0f} %). "
        + (f"First of all keep the answers whole: {cut}" if cut else MORE_COMPARISONS),
        fatal=True,
    )


def _sampler_is_not_the_policy(history: History, limits: Limits) -> Diagnosis | None:
    now, rounding = history[-1], limits.rounding
    if now["sampler_gap"] <= rounding.token and now["sampler_error"] <= rounding.sampler:
        return None
    known = "" if rounding == FLOAT32 else " If nothing is, it is bf16: set policy_precision to fp32"
    return Diagnosis(
        f"sampler and trainer disagree on log-probabilities by {now['sampler_gap']:.3g} nats at a token, "
        f"{now['sampler_error']:.3g} as a root mean square; is the temperature, the template or the padding "
        f"different in one of them?{known}",
        fatal=True,
    )


def _kl_is_negative(history: History, limits: Limits) -> Diagnosis | None:
    now = history[-1]
    if now["tokens"] <= 500 or now["kl"] >= -0.5 or now["kl"] >= -4 * now["kl_error"]:
        return None
    return Diagnosis(
        f"KL to the reference is {now['kl']:.2f} nats, clearly negative, which no true KL is: the tokens "
        "were not drawn from the policy that is being measured",
        fatal=True,
    )


def _no_end_was_learnt(history: History, limits: Limits) -> Diagnosis | None:
    if len(history) != 3 or any(row["finished"] >= 0.02 for row in history):
        return None
    cause = limits.too_short or (
        "the end token was outside the loss of SFT (chatwright doctor MODEL shows the loss mask), or the "
        "model's answers are longer than people's own, and than max_new_tokens"
    )
    return Diagnosis(f"no answer has come to its end since the start (three iterations): {cause}", fatal=True)


def _critic_is_broken(history: History, limits: Limits) -> Diagnosis | None:
    last = history[-5:]
    if len(history) < YOUNG or not all(row.get("explained_variance", 0.0) < -1.0 for row in last):
        return None
    return Diagnosis(
        "the critic is worse than a constant by far (explained variance under -1 for five iterations): it "
        "misleads the policy; lower the learning rate or raise value_coefficient",
        fatal=True,
    )


def _budget_is_spent(history: History, limits: Limits) -> Diagnosis | None:
    kl, jump = history[-1]["kl"], _kl_jumps(history, limits)
    if kl <= limits.kl_budget:
        return jump
    how = f"; {jump.text}" if jump is not None else ""
    return Diagnosis(f"KL {kl:.1f} is beyond the budget of {limits.kl_budget:g} nats{how}", fatal=False)


def _kl_jumps(history: History, limits: Limits) -> Diagnosis | None:
    if len(history) < 2:
        return None
    before, now = history[-2], history[-1]
    rise = now["kl"] - before["kl"]
    if rise <= max(3.0, limits.kl_budget / 2) or rise <= 4 * math.hypot(before["kl_error"], now["kl_error"]):
        return None
    return Diagnosis(
        f"KL jumped from {before['kl']:.1f} to {now['kl']:.1f} nats in one iteration: an update went much "
        "too far (lower the learning rate), or template, temperature or padding have changed under way",
        fatal=False,
    )


def _entropy_is_gone(history: History, limits: Limits) -> Diagnosis | None:
    recent = history[-3:]
    if len(recent) < 3 or not all(row["entropy"] < 0.1 for row in recent):
        return None
    return Diagnosis("entropy is gone (under 0.1 nats a token for three iterations): collapse", fatal=False)


def _answers_end_no_more(history: History, limits: Limits) -> Diagnosis | None:
    recent = history[-3:]
    if len(recent) < 3 or not all(row["finished"] < 0.02 for row in recent):
        return None
    cause = f": {limits.too_short}" if limits.too_short else ""
    return Diagnosis(f"no answer comes to its end any more (three iterations){cause}", fatal=False)


def _reward_is_hacked(history: History, limits: Limits) -> Diagnosis | None:
    if "gold" not in history[-1]:
        return None
    size = limits.patience or WINDOW
    peak = past_peak(history, "gold", size)
    if peak is None:
        return None
    best, now = history[peak : peak + size], history[-size:]
    score, gold, length = ((_mean(best, key), _mean(now, key)) for key in ("score", "gold", "length"))
    if score[1] <= score[0]:
        return Diagnosis(
            f"gold fell from {gold[0]:.3f} to {gold[1]:.3f} since iteration {peak}, with the score",
            fatal=False,
        )
    return Diagnosis(
        f"the reward model is exploited: since iteration {peak} its score rose from {score[0]:.2f} to "
        f"{score[1]:.2f} while gold fell from {gold[0]:.3f} to {gold[1]:.3f}; length {length[0]:.0f} -> "
        f"{length[1]:.0f} tokens",
        fatal=False,
    )


def _score_is_past_its_peak(history: History, limits: Limits) -> Diagnosis | None:
    if not limits.patience:
        return None
    peak = past_peak(history, "score", limits.patience)
    if peak is None:
        return None
    high, low = (
        _mean(history[peak : peak + limits.patience], "score"),
        _mean(history[-limits.patience :], "score"),
    )
    return Diagnosis(
        f"the score is past its peak: {high:.2f} in the iterations from {peak}, {low:.2f} now", fatal=False
    )


def past_peak(history: History, key: str, size: int) -> int | None:
    """Find the `size` consecutive iterations with the highest mean of `key`. Returns the first of them when
    the mean has fallen since by more than two standard errors of the difference (sampling error of the
    completions alone), else None."""
    if len(history) < 2 * size:
        return None
    ends = range(len(history) - 2 * size + 1)  # windows that do not overlap the last one
    peak = max(ends, key=lambda start: _mean(history[start : start + size], key))
    best, now = history[peak : peak + size], history[-size:]
    error = math.sqrt(sum(row[f"{key}_error"] ** 2 for row in [*best, *now])) / size
    return peak if _mean(best, key) - _mean(now, key) > 2 * error else None


def _mean(rows: History, key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


RULES: tuple[Callable[[History, Limits], Diagnosis | None], ...] = (
    _sampler_is_not_the_policy,
    _kl_is_negative,
    _no_end_was_learnt,
    _critic_is_broken,
    _budget_is_spent,
    _entropy_is_gone,
    _answers_end_no_more,
    _reward_is_hacked,
    _score_is_past_its_peak,
)
"""The rules, in the order in which `diagnose` tries them (docs/reference/reports.md, "How a run goes wrong").
"""
