"""A whole PPO round of two minibatches worked by hand: rewards, advantages, both losses, both gradients, both
updates of Adam.

The policy is a table of logits by the token before (softmax(W[token before])), the critic a number for it
(v[token before]). What is expected was computed with Python's floats alone, by `by_hand` below, which shares
no line with the package; its stages are written out as numbers as well, so that both would have to be wrong
in the same way.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from chatwright.optim import OptimConfig
from chatwright.stages.ppo import Config, score_rollouts, step
from chatwright.train.rl.models import RLModels
from chatwright.train.rl.rollout import Completions
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Workspace

# Tokens 0, 1 and the end token 2. Four answers to the prompt [0]; the logits, the reference's logits and the
# critic's values by the token before (the end token is before nothing that counts).
ANSWERS = [[1, 2], [0, 2], [1, 1, 2], [2]]
LOGITS = [[0.5, 0.0, -0.5], [0.0, 0.3, 0.2], [0.0, 0.0, 0.0]]
REFERENCE = [[0.0, 0.0, 0.0], [0.1, 0.0, -0.1], [0.0, 0.0, 0.0]]
VALUES = [0.2, -0.1, 0.0]
SCORES = [1.0, -0.5, 2.0, 0.0]
BETA, LAMBDA, CLIP, VALUE_CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.1, 0.95, 0.08, 0.05, 0.1, 0.01
RATE, BETA1, BETA2, EPS, NORM = 0.1, 0.9, 0.95, 1e-5, 0.3
MINIBATCHES = [[0, 3], [1, 2]]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def tokens_of(answer: list[int]) -> list[tuple[int, int]]:
    """(token before, token) of each token of an answer."""
    return list(zip([0, *answer[:-1]], answer, strict=True))


class ByHand:
    """The round in plain Python."""

    def __init__(self) -> None:
        self.logits = [row[:] for row in LOGITS]
        self.values = VALUES[:]
        self.moments = [[0.0, 0.0] for _ in range(12)]  # Adam's, of 9 logits and 3 values
        self.steps = 0
        self.old = [[math.log(softmax(LOGITS[b])[a]) for b, a in tokens_of(answer)] for answer in ANSWERS]
        self.kl = [
            [o - math.log(softmax(REFERENCE[b])[a]) for o, (b, a) in zip(old, tokens_of(answer), strict=True)]
            for old, answer in zip(self.old, ANSWERS, strict=True)
        ]
        raw, self.returns = [], []
        for kl, answer, score in zip(self.kl, ANSWERS, SCORES, strict=True):
            rewards = [-BETA * k for k in kl]
            rewards[-1] += score
            values = [VALUES[b] for b, _ in tokens_of(answer)]
            following, made = 0.0, []
            for t in reversed(range(len(answer))):
                after = values[t + 1] if t + 1 < len(answer) else 0.0
                following = rewards[t] + after - values[t] + LAMBDA * following
                made.insert(0, following)
            raw.append(made)
            self.returns.append([a + v for a, v in zip(made, values, strict=True)])
        flat = [a for row in raw for a in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
        self.raw = raw
        self.advantages = [[(a - mean) / deviation for a in row] for row in raw]

    def minibatch(self, rows: list[int]) -> dict[str, float]:
        """Losses before the update, then the update."""
        count = sum(len(ANSWERS[n]) for n in rows)
        policy = value = entropy = clipped = 0.0
        grad = [[0.0] * 3 for _ in range(3)]
        grad_v = [0.0] * 3
        for n in rows:
            for t, (before, act) in enumerate(tokens_of(ANSWERS[n])):
                p = softmax(self.logits[before])
                ratio = math.exp(math.log(p[act]) - self.old[n][t])
                a = self.advantages[n][t]
                near = min(max(ratio, 1 - CLIP), 1 + CLIP)
                policy -= min(ratio * a, near * a) / count
                clipped += (near * a < ratio * a) / count
                h = -sum(x * math.log(x) for x in p)
                entropy += h / count
                for k in range(3):
                    log_slope = (k == act) - p[k]  # d log p[act] / d logit k
                    if ratio * a <= near * a:  # the plain side is the smaller one, or both are the same
                        grad[before][k] -= ratio * a * log_slope / count
                    grad[before][k] -= ENTROPY_WEIGHT * -p[k] * (math.log(p[k]) + h) / count
                v, old_v, r = self.values[before], VALUES[before], self.returns[n][t]
                near_v = min(max(v, old_v - VALUE_CLIP), old_v + VALUE_CLIP)
                value += 0.5 * max((v - r) ** 2, (near_v - r) ** 2) / count
                if (v - r) ** 2 >= (near_v - r) ** 2:
                    grad_v[before] += VALUE_WEIGHT * (v - r) / count
        flat = [g for row in grad for g in row] + grad_v
        norm = math.sqrt(sum(g * g for g in flat))
        self.adam([g * min(1.0, NORM / (norm + 1e-6)) for g in flat])
        return {
            "policy_loss": policy,
            "value_loss": value,
            "entropy": entropy,
            "clip_fraction": clipped,
            "norm": norm,
        }

    def adam(self, gradients: list[float]) -> None:
        self.steps += 1
        for n, g in enumerate(gradients):
            self.moments[n][0] = BETA1 * self.moments[n][0] + (1 - BETA1) * g
            self.moments[n][1] = BETA2 * self.moments[n][1] + (1 - BETA2) * g * g
            m = self.moments[n][0] / (1 - BETA1**self.steps)
            v = self.moments[n][1] / (1 - BETA2**self.steps)
            change = RATE * m / (math.sqrt(v) + EPS)
            if n < 9:
                self.logits[n // 3][n % 3] -= change
            else:
                self.values[n - 9] -= change


class Table(nn.Module):
    """A policy that knows the token before alone; the parts of a GPT that a round uses."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(logit_softcap=0.0)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = torch.tensor(logits).T.contiguous()

    def hidden_at(self, ids: Tensor, places: Tensor, *, lengths: Tensor) -> Tensor:
        return nn.functional.one_hot(ids, 3).float().flatten(0, 1)[places]


class Values(nn.Module):
    """A critic of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(VALUES))

    def at(self, ids: Tensor, places: Tensor, *, lengths: Tensor) -> Tensor:
        return self.table[ids.flatten()[places]]


class Scores(nn.Module):
    """A reward model that says the planned scores."""

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        given = [tuple(row[real][1:].tolist()) for row, real in zip(ids, mask, strict=True)]
        return torch.tensor([SCORES[[tuple(one) for one in ANSWERS].index(answer)] for answer in given])


def answers_of() -> Completions:
    ids = torch.zeros(4, 4, dtype=torch.long)
    response = torch.zeros(4, 4, dtype=torch.bool)
    for row, answer in enumerate(ANSWERS):
        ids[row, 1 : 1 + len(answer)] = torch.tensor(answer)
        response[row, 1 : 1 + len(answer)] = True
    real = response.clone()
    real[:, 0] = True
    return Completions(ids, real, response, torch.ones(4, dtype=torch.bool), torch.zeros(4, 4))


CONFIG = Config(
    batch_size=4,
    minibatch_size=2,
    clip=CLIP,
    value_clip=VALUE_CLIP,
    value_coefficient=VALUE_WEIGHT,
    entropy_coefficient=ENTROPY_WEIGHT,
    lam=LAMBDA,
    min_tokens=0,
    max_repeats=1.0,
    optim=OptimConfig(
        name="adamw", learning_rate=RATE, beta1=BETA1, beta2=BETA2, eps=EPS, clip=NORM, weight_decay=0.0
    ),
)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), atol=2e-6, rtol=2e-6
    )


def test_a_round_of_two_minibatches(tmp_path: Path) -> None:
    hand, policy, critic = ByHand(), Table(LOGITS), Values()
    models = cast("Any", RLModels)(policy, Table(REFERENCE), Scores(), critic)
    trainer = Trainer(
        {"model": policy, "critic": critic}, CONFIG.optim, Workspace(tmp_path), metadata={}, texts={}
    )
    answers = answers_of()
    rollout, logged = score_rollouts(models, answers, BETA, CONFIG)
    mask = answers.response

    # -- looking back, in numbers: the first answer is [1, end] log pi = ln(e^0 / (e^0.5 + e^0 + e^-0.5)),
    # ln(e^0.2 / (e^0 + e^0.3 + e^0.2)); reference ln(1 / 3), ln(e^-0.1 / (...))
    close(rollout.log_probs[0, 1:3], [-1.180270, -1.072919])
    close(rollout.reference[0, 1:3], [-1.098612, -1.201943])
    # rewards -0.1 x (-1.180270 + 1.098612) = 0.008166 and 1 - 0.1 x (-1.072919 + 1.201943) = 0.987098
    # A(end) = 0.987098 + 0.1 = 1.087098;  A(first) = 0.008166 - 0.1 - 0.2 + 0.95 x 1.087098 = 0.740908
    close(hand.raw[0], [0.740908, 1.087098])
    close((rollout.returns - rollout.values)[mask], [a for row in hand.raw for a in row])
    close(rollout.advantages[mask], [a for row in hand.advantages for a in row])
    close(rollout.returns[mask], [r for row in hand.returns for r in row])
    close(logged["kl"], sum(map(sum, hand.kl)) / 4)

    seen: list[dict[str, float]] = []
    for rows in MINIBATCHES:
        batch = rollout.rows(torch.tensor(rows))
        trainer.update([batch], lambda batch: step(models, batch, CONFIG), 1.0)
        seen.append(trainer.take_logged())
        expected = hand.minibatch(rows)
        for key in ("policy_loss", "value_loss", "clip_fraction"):
            close(seen[-1][key], expected[key])
        close(seen[-1]["gradient_norm"], expected["norm"])
        close(policy.head.weight.detach().T, hand.logits)
        close(critic.table.detach(), hand.values)

    assert seen[0]["ratio"] == pytest.approx(1.0, abs=1e-6) and seen[0]["clip_fraction"] == 0.0
    # the second minibatch meets both clips, and both gradients are cut to norm 0.3
    assert (
        seen[1]["ratio_gap"] > 0.08
        and 0.0 < seen[1]["clip_fraction"] < 1.0
        and seen[1]["value_clip_fraction"] > 0.0
    )
    assert all(round_["gradient_norm"] > 0.3 for round_ in seen)
    close([round_["policy_loss"] for round_ in seen], POLICY_LOSSES)
    close([round_["value_loss"] for round_ in seen], VALUE_LOSSES)
    close(policy.head.weight.detach().T, AFTER)
    close(critic.table.detach(), VALUES_AFTER)


POLICY_LOSSES = [0.182943, -0.131243]
VALUE_LOSSES = [0.291807, 1.129]
AFTER = [[0.581395, 0.195497, -0.662295], [-0.197731, 0.249228, 0.292274], [0.0, 0.0, 0.0]]
VALUES_AFTER = [0.281693, 0.06781, 0.0]
