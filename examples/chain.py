"""A chain of five states: REINFORCE and PPO against Bellman's equations.

    python examples/chain.py

One walks from the middle, a step to the left or to the right at a time, and is paid at the ends alone: 0
beyond the left one, 1 beyond the right one (Sutton and Barto, example 6.2). As with a chat model, every step
costs beta times log(pi / pi_ref), where the reference walks at random, and the score comes with the last
step: an answer is a walk, a token is a step.

Two things are known exactly.
* Of the walk at random, the values of the five states: V(s) = 1/2 V(s - 1) + 1/2 V(s + 1), which is 1/6, 2/6
  ... 5/6.
* Of the best policy, from the soft Bellman equation: V(s) = beta log(sum over a of pi_ref(a) exp(V(next) /
  beta)), and
  pi*(a | s) = pi_ref(a) exp((V(next) - V(s)) / beta). With u = exp(V / beta) it is linear: u(s) = 1/2 u(s -
  1) + 1/2 u(s + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chatwright.objectives import policy as objective

STATES, LONGEST, BETA = 5, 100, 0.25
"""LONGEST: steps after which a walk is cut off; at random that happens to one in a million."""
ROUNDS, BATCH = 120, 256


def line(left: float, right: float) -> Tensor:
    """x(s) = 1/2 x(s - 1) + 1/2 x(s + 1) for the five states, with x beyond the ends given: a linear
    system."""
    system = torch.eye(STATES, dtype=torch.float64)
    given = torch.zeros(STATES, dtype=torch.float64)
    for s in range(STATES):
        for other, beyond in ((s - 1, left), (s + 1, right)):
            if 0 <= other < STATES:
                system[s, other] -= 0.5
            else:
                given[s] += 0.5 * beyond
    return torch.linalg.solve(system, given)


def values_at_random() -> Tensor:
    """V of the walk at random, by Bellman's equation."""
    return line(0.0, 1.0).float()


def best() -> tuple[Tensor, Tensor]:
    """V of the best policy under the KL penalty, and its probability of a step to the right, state by
    state."""
    end = torch.tensor(1 / BETA, dtype=torch.float64).exp()
    u = line(1.0, float(end))
    after = torch.cat((u[1:], end[None]))
    return (BETA * u.log()).float(), (0.5 * after / u).float()


@dataclass(frozen=True)
class Walks:
    """A batch of walks, (batch, time): `states` before each step, `steps` 1 to the right, `mask` True until
    the end."""

    states: Tensor
    steps: Tensor
    mask: Tensor
    scores: Tensor


def walk(right: Tensor, walks: int, draw: torch.Generator) -> Walks:
    """Walk with the probabilities `right` of a step to the right."""
    place = torch.full((walks,), STATES // 2)
    states, steps, alive = [], [], []
    for _ in range(LONGEST):
        walking = (place >= 0) & (place < STATES)
        if not walking.any():
            break
        here = place.clamp(0, STATES - 1)
        step = (torch.rand(walks, generator=draw) < right[here]).long()
        states.append(here)
        steps.append(step)
        alive.append(walking)
        place = torch.where(walking, place + 2 * step - 1, place)
    return Walks(
        torch.stack(states, 1), torch.stack(steps, 1), torch.stack(alive, 1), (place == STATES).float()
    )


@dataclass(frozen=True)
class Learnt:
    """The probability of a step to the right, and the critic's values, state by state."""

    right: Tensor
    values: Tensor


def learn(
    method: str, *, train_policy: bool = True, rounds: int = ROUNDS, batch: int = BATCH, seed: int = 0
) -> Learnt:
    """Learn from walks alone, by `reinforce` (leave-one-out baseline) or `ppo`. Without `train_policy` one
    goes on walking at random and PPO's critic alone learns; there is no penalty then, and the values are
    those of the walk."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.zeros(STATES, 2, requires_grad=train_policy)
    critic = torch.zeros(STATES, requires_grad=True)
    adam = torch.optim.Adam([one for one in (logits, critic) if one.requires_grad], lr=0.1, eps=1e-5)
    for number in range(rounds):
        for group in adam.param_groups:
            group["lr"] = 0.1 * (1 - number / rounds)
        walks = walk(logits.detach().softmax(1)[:, 1], batch, draw)
        states, steps, mask = walks.states, walks.steps, walks.mask
        old = logits.detach().log_softmax(1)[states, steps]
        reference = torch.full_like(old, 0.5).log()
        rewards = objective.token_rewards(walks.scores, old, reference, mask, beta=BETA)
        values = critic.detach()[states]
        advantages = objective.generalized_advantages(rewards, values, mask, lam=1.0)
        returns, white = advantages + values, objective.whiten(advantages, mask)
        others = objective.reinforce_advantages(rewards.sum(1)[None], baseline="leave-one-out").flatten()
        for _ in range(4 if method == "ppo" else 1):
            now = logits.log_softmax(1)[states, steps]
            if method == "ppo":
                loss = objective.value_loss(critic[states], values, returns, mask, clip=10.0).loss
                if train_policy:
                    loss = loss + objective.policy_loss(now, old, white, mask).loss
            else:
                loss = objective.reinforce_loss(now, others, mask)
            adam.zero_grad()
            loss.backward()
            adam.step()
    return Learnt(logits.detach().softmax(1)[:, 1], critic.detach())


def critic_at_random() -> Tensor:
    """What the critic learns of the walk at random; chance decides each walk's pay, so there are many of
    them."""
    return learn("ppo", train_policy=False, rounds=20, batch=4096).values


def main() -> None:
    """Print exact and learnt numbers, and a plot."""
    random_values, (values, right) = values_at_random(), best()
    critic = critic_at_random()
    found = {name: learn(name) for name in ("reinforce", "ppo")}
    print(
        "values of the walk at random          values under the penalty     probability of a step to the "
        "right"
    )
    print(
        f"{'state':>5} {'Bellman':>9} {'critic':>8} {'Bellman':>21} {'ppo':>8} {'Bellman':>16} "
        f"{'reinforce':>10} {'ppo':>7}"
    )
    for s in range(STATES):
        row = (random_values[s], critic[s], values[s], found["ppo"].values[s], right[s])
        bar = "#" * round(30 * float(right[s]))
        print("{:>5} {:>9.3f} {:>8.3f} {:>21.3f} {:>8.3f} {:>16.3f}".format(s + 1, *map(float, row)), end="")
        print(f" {float(found['reinforce'].right[s]):>10.3f} {float(found['ppo'].right[s]):>7.3f}  {bar}")


if __name__ == "__main__":
    main()
