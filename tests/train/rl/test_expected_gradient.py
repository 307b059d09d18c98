"""What REINFORCE and PPO learn from is the gradient of what they are to raise: exactly, over every answer
there is.

With 7 tokens and at most 2 of them there are 43 answers. The objective, the mean over them of the score less
beta times the KL, is then a sum that autograd differentiates; the mean over them of a method's own loss must
have the opposite gradient. No answer is drawn, so nothing here hangs on a seed. That whole runs learn as well
is tested by planted rewards (`learns`), which need room for luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig, add_lora, lora_parameters
from chatwright.stages import ppo, reinforce
from chatwright.train.rl.models import RLModels, score_completions
from chatwright.train.rl.rollout import Completions, completion_log_probs

VOCABULARY, END, PROMPT, BETA = 7, 5, [3, 1, 4], 0.3
BOUNDS = {"batch_size": 43, "minibatch_size": 43, "max_new_tokens": 2, "min_tokens": 0, "max_repeats": 1.0}


def every_answer() -> Completions:
    """The end at once; each other token, and then any token: those that do not come to their end are cut
    off."""
    others = [token for token in range(VOCABULARY) if token != END]
    tails = [[END], *([one, two] for one in others for two in range(VOCABULARY))]
    ids = torch.tensor([[*PROMPT, *tail, *[0] * (2 - len(tail))] for tail in tails])
    real = torch.arange(5) < torch.tensor([3 + len(tail) for tail in tails])[:, None]
    finished = torch.tensor([tail[-1] == END for tail in tails])
    return Completions(ids, real, real & (torch.arange(5) >= 3), finished, torch.zeros(ids.shape))


def objective_of(models: RLModels, answers: Completions, config: Any) -> tuple[Tensor, Tensor]:
    """The expected score less beta x KL, with its gradient; and each answer's probability."""
    log_p, _ = completion_log_probs(models.policy, answers, temperature=1.0)
    with torch.no_grad(), models.as_reference() as model:
        reference, _ = completion_log_probs(model, answers, temperature=1.0)
        scores, _ = score_completions(models.reward, answers, config)
    log_p, reference = log_p.sum(1), reference.sum(1)
    return (log_p.exp() * (scores - BETA * (log_p - reference))).sum(), log_p.exp().detach()


def gradient(value: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([one.flatten() for one in torch.autograd.grad(value, parameters)])


METHODS: dict[str, tuple[Any, Any]] = {
    "ppo": (ppo, ppo.Config(**BOUNDS, lam=1.0, value_coefficient=0.0)),
    "no baseline": (reinforce, reinforce.Config(**BOUNDS, baseline="none", whiten=False)),
    "mean": (reinforce, reinforce.Config(**BOUNDS, baseline="mean")),
}


@pytest.fixture(params=["all weights", "adapter"])
def models(
    request: pytest.FixtureRequest,
    lively_gpt: Callable[..., GPT],
    lively_scalar: Callable[..., ScalarModel],
) -> tuple[RLModels, list[torch.nn.Parameter]]:
    """Four different models, and what is trained. The policy with an adapter is not what it is without."""
    shape = {"vocab_size": VOCABULARY, "context": 8}
    policy, reference = lively_gpt(1, **shape), lively_gpt(2, **shape)
    policy.head.weight.data.mul_(0.3)  # no answer is so rare that it does not count
    judges = lively_scalar(3, **shape), lively_scalar(4, **shape)
    if request.param == "all weights":
        return RLModels(policy, reference, *judges), list(policy.parameters())
    add_lora(policy, LoRAConfig(rank=4, alpha=8.0), "policy")
    trained, draw = lora_parameters(policy), torch.Generator().manual_seed(5)
    for one in trained:
        one.data.add_(0.3 * torch.randn(one.shape, generator=draw))
        one.requires_grad_(True)
    return RLModels(policy, None, *judges), trained


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_gradient_is_that_of_the_objective(
    method: str, models: tuple[RLModels, list[torch.nn.Parameter]]
) -> None:
    (module, config), (models, trained), answers = METHODS[method], models, every_answer()
    value, chances = objective_of(models, answers, config)
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-5) and float(chances.min()) > 1e-4
    wanted = gradient(value, trained)

    rollout, _ = module.score_rollouts(models, answers, BETA, config)

    def found(rollout: Any, advantages: Tensor) -> Tensor:
        """The loss is linear in the advantages: those of each answer count as often as it would be drawn."""
        likely = chances.view(-1, *[1] * (advantages.ndim - 1)) * advantages
        return -gradient(module.step(models, replace(rollout, advantages=likely), config).loss, trained)

    # scaled advantages make a step longer or shorter, and turn it nowhere
    mean = found(rollout, rollout.advantages)
    scale = float(mean.norm() / wanted.norm())
    assert scale == pytest.approx(1.0, abs=1e-4) or method != "no baseline"
    torch.testing.assert_close(mean / scale, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    # what all answers share teaches nothing
    alike = found(rollout, torch.ones_like(rollout.advantages))
    assert float(alike.norm()) < 1e-4 * float(wanted.norm())
    # mutations: the sign turned, no KL, the KL with the other sign
    for wrong, sign, beta in (("sign", -1.0, BETA), ("no KL", 1.0, 0.0), ("KL", 1.0, -BETA)):
        other, _ = module.score_rollouts(models, answers, beta, config)
        turned = found(other, sign * other.advantages)
        assert float(turned @ wanted / (turned.norm() * wanted.norm())) < 0.99, wrong
