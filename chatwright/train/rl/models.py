"""The models of RL from a reward model, how they score completions, and what is logged about them.

Shared by PPO and REINFORCE, and meant for later methods too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chatwright import checkpoint, files, runtime
from chatwright.config import UserError
from chatwright.data.cuts import cause_of
from chatwright.interop.loaded import Loaded
from chatwright.language_model import find_checkpoint
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel, ValueHead
from chatwright.model.lora import LoRAConfig, sharing_copy, without_adapter
from chatwright.objectives import policy as objective
from chatwright.train import adapters
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext
from chatwright.train.rl.rollout import (
    Completions,
    Entropy,
    all_gather_completions,
    completion_log_probs,
    concat,
    degenerate,
    values_before,
)
from chatwright.train.statistics import standard_error

PORTION = 64
"""Completions per forward pass when rollouts are scored; bounds the memory of the logits."""


@dataclass
class RLModels:
    """Policy, reference, reward model, and the critic, which REINFORCE does not need.

    A reference of None is the policy with its adapter off. The reward model and a separate critic compute in
    `dtype`. Policy and reference compute in `policy_dtype`: in the same one, for their difference is the KL.
    """

    policy: GPT
    reference: GPT | None
    reward: ScalarModel
    critic: ScalarModel | ValueHead | None = None
    dtype: torch.dtype = torch.float32
    policy_dtype: torch.dtype = torch.float32
    parallel: ParallelContext = SINGLE_PROCESS
    """The processes that hold these models; each samples and scores its part of the completions."""

    twin: GPT | None = None
    """With a sharded policy: the whole copy of it that samples (`ParallelContext.twin`)."""

    def share(self, parallel: ParallelContext) -> None:
        """Share these models among many processes; call it before the plan distributes them."""
        self.parallel, self.twin = parallel, parallel.twin(self.policy)

    def sampler(self) -> GPT:
        """A policy with the current weights that one process can sample from. All processes must call it."""
        if self.twin is None:
            return self.policy
        self.parallel.refresh(self.twin, self.policy)
        return self.twin

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """Models that are not trained, by name."""
        return {"reward": self.reward, **({} if self.reference is None else {"reference": self.reference})}

    @property
    def computing(self) -> list[nn.Module]:
        """Models that have forward passes of their own."""
        return [one for one in (self.policy, self.reference, self.reward, self.critic) if one is not None]

    @contextmanager
    def as_reference(self) -> Iterator[GPT]:
        """The reference model. It is valid inside the context only, for it may be the policy."""
        if self.reference is not None:
            yield self.reference
        else:
            with without_adapter(self.policy):
                yield self.policy


@dataclass(frozen=True)
class PolicyOutputs:
    """Outputs of policy and critic for every completion token; 0 elsewhere. An entropy that was not asked
    for, and values without a critic, are 0 everywhere."""

    log_probs: Float[Tensor, "batch time"]
    entropy: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]


def policy_outputs(
    models: RLModels, answers: Completions, temperature: float, *, entropy: Entropy = "known"
) -> PolicyOutputs:
    """One forward pass of the policy, and one of the critic unless it reads the policy's hidden states."""
    policy, critic = models.policy, models.critic
    with runtime.autocast(models.policy_dtype):
        hidden = policy.hidden_at(answers.ids, answers.before, lengths=answers.lengths)
        log_probs, entropies = completion_log_probs(
            policy, answers, temperature=temperature, entropy=entropy, hidden=hidden
        )
    if isinstance(critic, ValueHead):
        values = answers.placed(critic(hidden.float()))
    elif critic is not None:
        with runtime.autocast(models.dtype):
            values = values_before(critic, answers)
    else:
        values = torch.zeros_like(log_probs)
    return PolicyOutputs(log_probs, entropies, values)


class ScoringConfig(Protocol):
    """The settings that decide the score of a completion."""

    @property
    def temperature(self) -> float: ...
    @property
    def unfinished_score(self) -> float: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def max_repeats(self) -> float: ...


def score_completions(
    reward: ScalarModel, answers: Completions, config: ScoringConfig, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Scores, and which completions are penalised (unfinished or degenerate): they get a fixed score instead
    of the reward model's."""
    with runtime.autocast(dtype):
        scores = reward.score(answers.ids, answers.real)
    penalised = (
        degenerate(answers, min_tokens=config.min_tokens, max_repeats=config.max_repeats) | ~answers.finished
    )
    return torch.where(penalised, config.unfinished_score, scores), penalised


@dataclass(frozen=True)
class Scored:
    """Sampled completions, and the outputs of all models for them before any update."""

    answers: Completions
    policy_outputs: PolicyOutputs
    reference: Float[Tensor, "batch time"]
    scores: Float[Tensor, " batch"]
    penalised: Bool[Tensor, " batch"]


@torch.no_grad()
def score_rollout(models: RLModels, answers: Completions, config: ScoringConfig) -> Scored:
    """Run all models on sampled completions. With many processes each runs them on its own completions and
    gets the results of all."""
    return all_gather_completions(
        models.parallel.forward(_score_rollout, models, answers, config), models.parallel
    )


def _score_rollout(models: RLModels, answers: Completions, config: ScoringConfig) -> Scored:
    """Score in micro-batches. Not with many processes: their micro-batches might differ in number, and all
    must take part in each forward pass of a sharded model."""
    if models.parallel.together:
        return _score_part(models, answers, config)
    micro_batches = torch.split(torch.arange(len(answers.ids)), PORTION)
    return concat([_score_part(models, answers.rows(chosen), config) for chosen in micro_batches])


def _score_part(models: RLModels, answers: Completions, config: ScoringConfig) -> Scored:
    own = policy_outputs(models, answers, config.temperature)
    with models.as_reference() as model, runtime.autocast(models.policy_dtype):
        reference, _ = completion_log_probs(model, answers, temperature=config.temperature)
    scores, penalised = score_completions(models.reward, answers, config, models.dtype)
    return Scored(answers, own, reference, scores, penalised)


def iteration_facts(seen: Scored, beta: float) -> dict[str, float]:
    """What to log about an iteration's completions, before the updates."""
    answers, own, mask = seen.answers, seen.policy_outputs, seen.answers.response
    kl = torch.where(mask, objective.kl_k1(own.log_probs, seen.reference), 0.0).sum(1)
    gaps = (answers.sampled - own.log_probs)[mask]
    k3 = torch.where(mask, objective.kl_k3(own.log_probs, seen.reference), 0.0).sum(1)
    return {
        "score": float(seen.scores.mean()),
        "score_error": standard_error(seen.scores),
        "kl": float(kl.mean()),
        "kl_k3": float(k3.mean()),
        "kl_error": standard_error(kl),
        "entropy": float(objective.masked_mean(own.entropy, mask)),
        "length": float(mask.sum(1).float().mean()),
        "finished": float(answers.finished.float().mean()),
        "degenerate": float(seen.penalised.float().mean()),
        "sampler_gap": float(gaps.abs().max()) if len(gaps) else 0.0,
        "sampler_error": float(gaps.square().mean().sqrt()) if len(gaps) else 0.0,
        "tokens": float(mask.sum()),
        "beta": beta,
    }


def step_facts(
    now: PolicyOutputs,
    before: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    weight: float,
    per_token: float = 1.0,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """What to log about how far the policy has moved since it sampled, when its log-probabilities were
    `before`.

    These are sums for `Step.logged`, over the batch's `weight`; `per_token` is the weight of one token of the
    whole minibatch.
    """
    change = torch.where(mask, (now.log_probs - before).detach(), 0.0)
    ratio = change.exp()
    gap = (ratio - 1).abs().max()
    # The maximum over the whole minibatch, of which this process has a part. NaN cannot be compared.
    if parallel.together:
        gap = torch.tensor(parallel.all_reduce_max([float(gap.nan_to_num(nan=math.inf, posinf=math.inf))])[0])
    tokens = mask.sum() * per_token
    return {
        "moved": 0.5
        * objective.masked_mean(change.square(), mask)
        * tokens,  # k2 estimate of KL(old || new) per token
        "ratio": objective.masked_mean(ratio, mask) * tokens,
        "ratio_gap": gap * weight,
    }


def make_models(
    base: Loaded,
    reward: ScalarModel,
    critic: str = "none",
    lora: LoRAConfig | None = None,
    *,
    precision: str = "auto",
    policy_precision: str = "fp32",
) -> RLModels:
    """Policy and reference from the SFT model. The critic is a copy of the reward model with a body of its
    own (`separate`), a head on the policy that starts at zero (`shared`), or there is `none`.

    With adapters there are only two whole models. The policy without its adapter is the reference. A separate
    critic has an adapter and a head of its own over the frozen body of the reward model.
    """
    device, lora = runtime.device(), lora or LoRAConfig()
    policy, reward = base.model.to(device), reward.to(device)
    reference = None
    if not lora.rank:
        reference = GPT(policy.config).to(device)
        reference.load_state_dict(policy.state_dict())
    predicts: ScalarModel | ValueHead | None = None
    if critic == "separate" and lora.rank:
        predicts = sharing_copy(reward)
        predicts.scalar = copy.deepcopy(reward.scalar)  # trained; the reward model's head must not change
    elif critic == "separate":
        predicts = ScalarModel(reward.config).to(device)
        predicts.load_state_dict(reward.state_dict())
    elif critic == "shared":
        predicts = ValueHead(policy.config.width).to(device)
    adapters.adapt(policy, lora, "policy")
    if isinstance(predicts, ScalarModel):
        adapters.adapt(predicts, lora, "critic")
    for model in (policy, reference, reward, predicts):
        if model is None:
            continue
        if model in (reference, reward):
            model.requires_grad_(False)
        model.eval()  # no dropout, neither in rollouts nor in updates
        body = model.body if isinstance(model, ScalarModel) else model
        if device.type == "cpu" and isinstance(body, GPT):
            body.use_attention(plain_attention)
    return RLModels(
        policy,
        reference,
        reward,
        predicts,
        runtime.compute_dtype(precision),
        runtime.compute_dtype(policy_precision),
    )


def load_reward(directory: Path, base: Loaded, min_correlation: float) -> ScalarModel:
    """The reward model of a stage. Raises UserError when there is none, or it has another tokenizer or is too
    weak."""
    found = find_checkpoint(directory)
    if found is None or found.state().get("kind") != "reward":
        raise UserError(f"{directory} holds no reward model")
    state = found.state()
    assert base.tokenizer is not None
    if state["tokenizer"] != base.tokenizer.fingerprint:
        raise UserError(f"the reward model in {directory} has another tokenizer than the policy")
    result = directory / "result.json"
    facts = files.read_json(result).get("facts", {}) if result.is_file() else {}
    quality = facts.get("held_out_correlation")
    if quality is None or quality < min_correlation:
        told = "is not known" if quality is None else f"is {quality:.3f}"
        cut = cause_of(facts.get("cut"))
        more = f"First of all keep its answers whole: {cut}. Or train" if cut else "Train"
        raise UserError(
            f"the reward model's correlation with held-out ratings {told}, PPO wants {min_correlation:g}: a "
            "weaker one is exploited, not followed (answers collapse while its score rises). "
            f"{more} it longer or on more ratings, start it from a better model, or lower min_correlation at "
            "your own risk"
        )
    return read_reward(found)


def read_reward(found: checkpoint.Checkpoint) -> ScalarModel:
    """The reward model in a checkpoint of kind `reward`. Raises UserError when it is damaged."""
    found.verify()
    reward = ScalarModel(GPTConfig.from_dict(found.state()["model"]))
    checkpoint.load_model_tensors(reward, found.tensors("model"), where=str(found.path))
    return reward
