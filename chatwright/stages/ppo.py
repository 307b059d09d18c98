"""PPO: answers that score higher, from a policy that stays near its reference.  Ouyang et al. 2022, eq. 2.

The details that decide whether it works are those of Ziegler et al. 2019 and Stiennon et al. 2020, as listed
in "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031); docs/papers.md names the line of code
for each. train/rl/training.py has the iterations, the guards, the choice of the best checkpoint and the
departures from the papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright.config import UsageError
from chatwright.metrics import Metric
from chatwright.objectives import policy as objective
from chatwright.train.api import DETAILS, INSTRUCT, Curve, Paper, Report, Stage, Step, Workspace
from chatwright.train.rl.config import RENAMED, SHARED_PAPER, RLConfig
from chatwright.train.rl.metrics import RL_METRICS
from chatwright.train.rl.models import RLModels, iteration_facts, policy_outputs, score_rollout, step_facts
from chatwright.train.rl.outcome import kl_budget
from chatwright.train.rl.rollout import Completions, chosen_rows
from chatwright.train.rl.run import train_policy
from chatwright.train.rl.step_program import PLAN
from chatwright.train.rl.training import PolicyTraining


@dataclass(frozen=True)
class Config(RLConfig):
    """Settings of PPO."""

    epochs: int = 1
    """Passes over an iteration's completions (InstructGPT: 1, the earlier papers: 4)."""
    clip: float = 0.2
    """Ratio clip of the policy."""
    value_clip: float = 0.2
    """How far a value may move per iteration at full gradient."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    discount: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1 (mean kept) before advantages are computed."""
    critic: Literal["separate", "shared"] = "separate"
    """`separate`: a copy of the reward model with a body of its own. `shared`: a head on the policy's body
    that starts at zero (Ziegler et al. 2019), which takes half the memory and time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise UsageError(f"epochs {self.epochs} must be at least 1")
        if self.critic not in ("separate", "shared"):
            raise UsageError(f"critic {self.critic!r} is neither separate nor shared")


PAPER = (
    *SHARED_PAPER,
    Paper("minibatch_size", 64, INSTRUCT),
    Paper("epochs", 1, INSTRUCT),
    Paper("clip", 0.2, INSTRUCT),
    Paper("value_clip", 0.2, DETAILS),
    Paper("value_coefficient", 0.1, DETAILS),
    Paper("discount", 1.0, INSTRUCT),
    Paper("lam", 0.95, DETAILS),
    Paper("critic", "separate", f"{INSTRUCT}: from the reward model; shared in Ziegler et al. 2019"),
)


@dataclass(frozen=True)
class Rollout:
    """An iteration's completions with everything computed before its updates; constants for the updates."""

    answers: Completions
    log_probs: Float[Tensor, "batch time"]
    reference: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    scores: Float[Tensor, " batch"]
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]

    @property
    def weight(self) -> float:
        """Number of completion tokens."""
        return float(self.answers.response.sum())

    def rows(self, chosen: Tensor) -> Rollout:
        """Some of the rows."""
        return chosen_rows(self, chosen)


@torch.no_grad()
def score_rollouts(
    models: RLModels, answers: Completions, beta: float, config: Config
) -> tuple[Rollout, dict[str, float]]:
    """Score sampled completions and compute advantages; also return what to log.

    With many processes each passes its own completions and gets those of all: means over an iteration are
    then the same in every process, and the same as with one process.
    """
    seen = score_rollout(models, answers, config)
    answers, mask = seen.answers, seen.answers.response
    log_probs, values = seen.policy_outputs.log_probs, seen.policy_outputs.values
    rewards = objective.token_rewards(seen.scores, log_probs, seen.reference, mask, beta=beta)
    if config.whiten_rewards:
        rewards = objective.whiten(rewards, mask, shift_mean=False)
    advantages = objective.generalized_advantages(
        rewards, values, mask, discount=config.discount, lam=config.lam
    )
    returns = advantages + values
    logged = iteration_facts(seen, beta)
    logged["explained_variance"] = objective.explained_variance(values, returns, mask)
    whitened = objective.whiten(advantages, mask)
    return Rollout(answers, log_probs, seen.reference, values, seen.scores, whitened, returns), logged


def step(models: RLModels, batch: Rollout, config: Config) -> Step:
    """The clipped losses of policy and critic on some rows of a rollout, summed over completion tokens."""
    mask = batch.answers.response
    now = policy_outputs(
        models, batch.answers, config.temperature, entropy="learnt" if config.entropy_coefficient else ""
    )
    actor = objective.policy_loss(now.log_probs, batch.log_probs, batch.advantages, mask, clip=config.clip)
    critic = objective.value_loss(now.values, batch.values, batch.returns, mask, clip=config.value_clip)
    bonus = objective.masked_mean(now.entropy, mask)
    loss = actor.loss + config.value_coefficient * critic.loss - config.entropy_coefficient * bonus
    logged = {
        "policy_loss": actor.loss.detach(),
        "value_loss": critic.loss.detach(),
        "clip_fraction": actor.fraction,
        "value_clip_fraction": critic.fraction,
    }
    facts = step_facts(now, batch.log_probs, mask, weight=batch.weight, parallel=models.parallel)
    return Step(
        loss * batch.weight, {**{key: value * batch.weight for key, value in logged.items()}, **facts}
    )


class _Run(PolicyTraining[Config, Rollout]):
    title = "ppo"
    rolled = Rollout
    curves: ClassVar = (
        Curve("Share of tokens clipped", ["clip_fraction", "value_clip_fraction"]),
        Curve("Explained variance of the critic", ["explained_variance"]),
    )

    @property
    def epochs(self) -> int:
        return self.config.epochs

    def score_rollouts(self, answers: Completions, beta: float) -> tuple[Rollout, dict[str, float]]:
        rollout, logged = score_rollouts(self.models, answers, beta, self.config)
        return rollout, logged

    def step(self, batch: Rollout) -> Step:
        return step(self.models, batch, self.config)


def run(config: Config, workspace: Workspace) -> Report:
    """Run PPO; report score, KL and variety on training prompts before and after. Stage evaluate measures on
    held-out prompts."""
    return train_policy(_Run, config, workspace, critic=config.critic)


METRICS = (
    *RL_METRICS,
    Metric(
        "policy_loss",
        "whitened advantage",
        "around 0; its size says little",
        "Clipped policy loss per token of the completions. Mean over the updates.",
    ),
    Metric(
        "value_loss",
        "score squared",
        "falls, then steady",
        "Clipped value loss per token of the completions, before `value_coefficient`. Mean over the updates.",
        unhealthy="rising: the critic does not follow, take more `epochs` or a larger `value_coefficient`",
    ),
    Metric(
        "clip_fraction",
        "share, 0 to 1",
        "above 0 and under about 0.3",
        "Tokens on which the clipped side of the policy loss was taken. Mean over the updates.",
        unhealthy="0 for good: the updates are too small to matter; above: too large, lower the learning "
        "rate or `epochs`",
    ),
    Metric(
        "value_clip_fraction",
        "share, 0 to 1",
        "small",
        "The same of the value loss.",
        unhealthy="large: the critic moves by more than `value_clip` an iteration",
    ),
    Metric(
        "explained_variance",
        "share, at most 1",
        "rises above 0",
        "Share of the returns' variance that the critic explains, before it learns from them.",
        unhealthy="below 0: worse than a constant; five iterations below -1 (from the 15th on): broken off",
    ),
)

STAGE = Stage(
    config=Config,
    run=run,
    plan=PLAN,
    metrics=METRICS,
    paper=PAPER,
    reads=lambda config: {"dialogues": config.data},
    kl_budget=kl_budget,
    renamed=RENAMED,
)
