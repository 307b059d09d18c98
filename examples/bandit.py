"""A bandit with six arms: REINFORCE and PPO against the closed form.

    python examples/bandit.py

The reward is what an arm pays less beta times log(pi / pi_ref), as in training a chat model on a reward
model; an arm is an answer of one token. The best policy is known exactly:

    pi*(a) = pi_ref(a) exp(r(a) / beta) / Z,   Z = sum over a of pi_ref(a) exp(r(a) / beta)

and so is what it earns: beta log Z. The losses are chatwright's own; nothing here is a copy of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chatwright.objectives import policy as objective

PAYS = torch.tensor([1.0, 0.2, -0.5, 0.8, 0.0, 0.5])
"""What each arm pays on average; a draw is this and noise of deviation 0.3."""
REFERENCE = torch.tensor([0.1, 0.3, 0.2, 0.1, 0.2, 0.1])
BETA = 0.5
ROUNDS, BATCH = 500, 512


@dataclass(frozen=True)
class Learnt:
    """What a method came to: the policy, and what it earns (mean pay less beta x KL), both exact for its
    logits."""

    policy: Tensor
    earns: float


def best() -> Learnt:
    """The closed form."""
    weights = REFERENCE * (PAYS / BETA).exp()
    return Learnt(weights / weights.sum(), BETA * float(weights.sum().log()))


def value_of(policy: Tensor) -> float:
    """Mean pay less beta times the KL from the reference."""
    return float((policy * (PAYS - BETA * (policy / REFERENCE).log())).sum())


def learn(method: str, seed: int = 0) -> Learnt:
    """Learn from sampled arms alone, by `reinforce` (leave-one-out baseline) or `ppo` (four passes, clip,
    critic)."""
    draw = torch.Generator().manual_seed(seed)
    logits = REFERENCE.log().clone().requires_grad_(True)  # the policy starts as the reference
    critic = torch.zeros((), requires_grad=True)
    adam = torch.optim.Adam([logits, critic], lr=0.02, eps=1e-5)
    mask = torch.ones(BATCH, 1, dtype=torch.bool)  # (answers, tokens): one token each
    for number in range(ROUNDS):
        for group in adam.param_groups:
            group["lr"] = 0.02 * (1 - number / ROUNDS)
        arms = torch.multinomial(logits.detach().softmax(0), BATCH, replacement=True, generator=draw)
        paid = PAYS[arms] + 0.3 * torch.randn(BATCH, generator=draw)
        old = logits.detach().log_softmax(0)[arms][:, None]
        rewards = objective.token_rewards(paid, old, REFERENCE.log()[arms][:, None], mask, beta=BETA)
        values = critic.detach().expand(BATCH, 1)
        advantages = objective.generalized_advantages(rewards, values, mask)
        returns, white = advantages + values, objective.whiten(advantages, mask)
        for _ in range(4 if method == "ppo" else 1):
            now = logits.log_softmax(0)[arms][:, None]
            if method == "ppo":
                loss = objective.policy_loss(now, old, white, mask).loss
                loss = loss + objective.value_loss(critic.expand(BATCH, 1), values, returns, mask).loss
            else:
                others = objective.reinforce_advantages(rewards.view(1, -1), baseline="leave-one-out")
                loss = objective.reinforce_loss(now, others.flatten(), mask)
            adam.zero_grad()
            loss.backward()
            adam.step()
    policy = logits.detach().softmax(0)
    return Learnt(policy, value_of(policy))


def main() -> None:
    """Print exact and learnt numbers, and a plot."""
    exact = best()
    found = {name: learn(name) for name in ("reinforce", "ppo")}
    print(f"{'arm':>5} {'pays':>6} {'pi_ref':>7} {'exact':>7} {'reinforce':>10} {'ppo':>7}")
    for arm, pays in enumerate(PAYS.tolist()):
        row = [float(one.policy[arm]) for one in (exact, *found.values())]
        bar = "#" * round(60 * row[0])
        print(
            f"{arm:>5} {pays:>6.1f} {float(REFERENCE[arm]):>7.3f} {row[0]:>7.3f} {row[1]:>10.3f} "
            f"{row[2]:>7.3f}  {bar}"
        )
    told = {"the reference": value_of(REFERENCE), "exact": exact.earns} | {
        name: one.earns for name, one in found.items()
    }
    print("earns: " + ", ".join(f"{name} {earns:.4f}" for name, earns in told.items()))


if __name__ == "__main__":
    main()
