"""EMA (exponential moving average) of a policy's weights, which may be better than those of any step.
Ouyang et al. 2022."""

from __future__ import annotations

import torch
from torch import nn

from chatwright import runtime
from chatwright.model.gpt import GPT
from chatwright.model.lora import lora_parameters


def averaged(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that are averaged: the matrices of the policy's adapter if it has one, else all."""
    return lora_parameters(policy) or list(policy.parameters())


def ema_of(policy: GPT) -> nn.Module:
    """The EMA of a policy at its start: a frozen copy. A and B of an adapter are averaged separately: an
    average of their products would have a higher rank than the adapter."""
    own = lora_parameters(policy)
    if own:
        return nn.ParameterList([one.detach().clone() for one in own]).requires_grad_(False)
    average = GPT(policy.config).to(runtime.device()).requires_grad_(False)
    average.load_state_dict(policy.state_dict())
    return average


@torch.no_grad()
def update_ema(average: nn.Module, policy: nn.Module, decay: float) -> None:
    """average <- decay x average + (1 - decay) x policy (Ouyang et al. 2022, appendix C.4). With sharded
    models each process averages its shards."""
    for mine, theirs in zip(average.parameters(), averaged(policy), strict=True):
        mine.lerp_(theirs, 1 - decay)


@torch.no_grad()
def copy_weights(policy: nn.Module, average: nn.Module) -> None:
    """Copy the weights of the EMA into the policy."""
    for mine, theirs in zip(averaged(policy), average.parameters(), strict=True):
        mine.copy_(theirs)
