"""Is this PPO run still healthy? Signs of trouble, from the numbers of its rounds so far, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WATCHED = (
    "score", "kl", "kl_error", "entropy", "explained_variance", "length", "finished", "sampler_gap", "tokens",
    "distinct_2",
)  # fmt: skip
"""Logged values that `diagnose` looks at; kept in the checkpoint so that a resumed run judges as the whole one."""


@dataclass(frozen=True)
class Diagnosis:
    """Why to stop. A fatal one means that the numbers cannot be trusted, the others only that it is enough."""

    text: str
    fatal: bool


def diagnose(history: Sequence[Mapping[str, float]], *, kl_budget: float) -> Diagnosis | None:
    """The first rule that the latest round breaks, or None."""
    now = history[-1]
    if now["sampler_gap"] > 1e-2:
        return Diagnosis(
            f"sampler and trainer disagree on log-probabilities by {now['sampler_gap']:.3g} nats; is the temperature, "
            "the template or the padding different in one of them?",
            fatal=True,
        )
    if now["tokens"] > 500 and now["kl"] < -0.5 and now["kl"] < -4 * now["kl_error"]:
        return Diagnosis(
            f"KL to the reference is {now['kl']:.2f} nats, clearly negative, which no true KL is: the tokens were not "
            "drawn from the policy that is being measured",
            fatal=True,
        )
    if now["kl"] > kl_budget:
        return Diagnosis(f"KL {now['kl']:.1f} is beyond the budget of {kl_budget:g} nats", fatal=False)
    recent = history[-3:]
    if len(recent) == 3 and all(row["entropy"] < 0.1 for row in recent):
        return Diagnosis("entropy is gone (under 0.1 nats a token for three rounds): collapse", fatal=False)
    if len(recent) == 3 and all(row["finished"] < 0.02 for row in recent):
        return Diagnosis("no answer comes to its end any more (three rounds)", fatal=False)
    if len(history) >= 15 and all(row["explained_variance"] < -1.0 for row in history[-5:]):
        return Diagnosis("the critic is worse than a constant by far (five rounds): it misleads the policy", fatal=False)
    return None
