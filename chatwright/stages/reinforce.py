"""REINFORCE: the plain policy gradient, with a baseline instead of a critic.  Williams 1992.

A completion is one action with one return: the reward model's score less beta times the KL of the whole
completion. There is no critic, no clip, no credit to single tokens. With the baseline `leave-one-out` it is
RLOO (Ahmadian et al. 2024). PPO has to beat it at equal KL. Everything else is as in PPO:
train/rl/training.py.

Departures from the papers: where an iteration has several minibatches, the later ones learn from completions
of a policy that is a step or more older, without a correction. With `minibatch_size` equal to `batch_size` it
is the published method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright.config import UsageError
from chatwright.metrics import Metric
from chatwright.objectives import policy as objective
from chatwright.objectives.policy import Baseline
from chatwright.train.api import Curve, Paper, Report, Stage, Step, Workspace
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
    """Settings of REINFORCE."""

    minibatch_size: int = 64
    """Completions per optimiser step; below batch_size the later steps of an iteration learn from answers of
    an older policy."""
    baseline: Baseline = "mean"
    """What is subtracted from an answer's return: the batch's `mean`, the mean of the other answers to the
    same prompt (`leave-one-out`, RLOO), or `none`."""
    samples_per_prompt: int = 1
    """Completions to each prompt of an iteration; leave-one-out needs 2 or more."""
    whiten: bool = True
    """Divide advantages by their standard deviation over the iteration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in ("mean", "leave-one-out", "none"):
            raise UsageError(f"baseline {self.baseline!r} is none of mean, leave-one-out, none")
        if self.samples_per_prompt < 1 or self.batch_size % self.samples_per_prompt:
            raise UsageError(
                f"batch_size {self.batch_size} must be a multiple of samples_per_prompt "
                f"{self.samples_per_prompt}"
            )
        if self.baseline == "leave-one-out" and self.samples_per_prompt < 2:
            raise UsageError(
                "baseline leave-one-out compares answers to one prompt: set samples_per_prompt to 2 or more"
            )


PAPER = (
    *SHARED_PAPER,
    Paper(
        "steps per iteration (batch_size / minibatch_size)",
        1,
        "Williams 1992",
        lambda config, facts: config.batch_size // config.minibatch_size,
    ),
)
"""Values of InstructGPT too, although it used PPO: REINFORCE is compared with PPO."""


@dataclass(frozen=True)
class Rollout:
    """An iteration's completions with their returns; constants for the updates that follow."""

    answers: Completions
    log_probs: Float[Tensor, "batch time"]
    returns: Float[Tensor, " batch"]
    """Score less beta x KL (k1) of the whole completion."""
    advantages: Float[Tensor, " batch"]

    @property
    def weight(self) -> float:
        """Number of completions."""
        return float(len(self.returns))

    def rows(self, chosen: Tensor) -> Rollout:
        """Some of the rows."""
        return chosen_rows(self, chosen)


@torch.no_grad()
def score_rollouts(
    models: RLModels, answers: Completions, beta: float, config: Config
) -> tuple[Rollout, dict[str, float]]:
    """Score sampled completions and compute advantages; also return what to log. With many processes each
    passes its own completions and gets those of all."""
    seen = score_rollout(models, answers, config)
    answers, mask = seen.answers, seen.answers.response
    log_probs = seen.policy_outputs.log_probs
    returns = objective.token_rewards(seen.scores, log_probs, seen.reference, mask, beta=beta).sum(1)
    grouped = returns.view(-1, config.samples_per_prompt)
    advantages = objective.reinforce_advantages(
        grouped, baseline=config.baseline, scaled=config.whiten
    ).flatten()
    return Rollout(answers, log_probs, returns, advantages), iteration_facts(seen, beta)


def step(models: RLModels, batch: Rollout, config: Config) -> Step:
    """The loss of some rows of a rollout, summed over completions.

    Entropy is a mean over the minibatch's tokens, those of all processes together.
    """
    mask = batch.answers.response
    now = policy_outputs(
        models, batch.answers, config.temperature, entropy="learnt" if config.entropy_coefficient else ""
    )
    answers, tokens = models.parallel.sum([batch.weight, float(mask.sum())])
    actor = objective.reinforce_loss(now.log_probs, batch.advantages, mask) * batch.weight
    bonus = objective.masked_mean(now.entropy, mask) * mask.sum() * (answers / tokens)
    facts = step_facts(
        now, batch.log_probs, mask, weight=batch.weight, per_token=answers / tokens, parallel=models.parallel
    )
    return Step(actor - config.entropy_coefficient * bonus, {"policy_loss": actor.detach(), **facts})


class _Run(PolicyTraining[Config, Rollout]):
    title = "reinforce"
    rolled = Rollout
    curves: ClassVar = (Curve("Change of log-probabilities in an iteration", ["moved"], "nats per token"),)

    @property
    def per_prompt(self) -> int:
        return self.config.samples_per_prompt

    def score_rollouts(self, answers: Completions, beta: float) -> tuple[Rollout, dict[str, float]]:
        rollout, logged = score_rollouts(self.models, answers, beta, self.config)
        return rollout, logged

    def step(self, batch: Rollout) -> Step:
        return step(self.models, batch, self.config)


def run(config: Config, workspace: Workspace) -> Report:
    """Run REINFORCE; report score, KL and variety on training prompts before and after. Stage evaluate
    measures on held-out prompts."""
    return train_policy(_Run, config, workspace)


METRICS = (
    *RL_METRICS,
    Metric(
        "policy_loss",
        "advantage times nats",
        "no course of its own; its size says little",
        "Minus the advantage times the log-probability of a completion. Mean over completions and updates.",
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
