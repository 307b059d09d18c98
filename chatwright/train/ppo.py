"""PPO: make the model's answers score higher, without leaving the model it came from.  Ouyang et al. 2022, eq. 2.

The details that decide whether it works are those of Ziegler et al. 2019 and Stiennon et al. 2020 as listed in "The N+
implementation details of RLHF with PPO" (arXiv:2403.17031); docs/papers.md names the line for each.

Departures from the papers, each for small reward models that are easily exploited:
* Refuse to start on a reward model that is too weak on held-out data.
* Unfinished and degenerate (very short, repetitive) answers get a fixed score, however well they are liked.
* The KL coefficient has a floor, training stops beyond a KL budget, and what is kept is the best-scoring checkpoint
  inside that budget whose answers have not lost their variety.
* No pre-training mix (ptx).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright import checkpoint, optim, runtime
from chatwright.config import UsageError, UserError
from chatwright.data.examples import Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.interop.loaded import Loaded
from chatwright.language_model import find_checkpoint, load_parts
from chatwright.metrics import progress_bar, say
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig, sharing_copy, without_adapter
from chatwright.objectives import policy as objective
from chatwright.optim import OptimConfig
from chatwright.train import adapters, health, plan
from chatwright.train.parallel import ALONE
from chatwright.train.rollout import (
    Answers,
    answer_log_probs,
    degenerate,
    distinct,
    prompts_from,
    sample_answers,
    texts_of,
    values_before,
)
from chatwright.train.sft import read_records
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.tokenizer import records_of
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Curve, Measure, Report, Workspace


@dataclass(frozen=True)
class Config:
    """Settings of PPO."""

    base: str = field(default="sft", metadata={"input": True})
    """The policy to start from, and the frozen reference."""
    reward: str = field(default="reward", metadata={"input": True})
    """The reward model; the critic starts as a copy of it."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-train.jsonl: their user turns are the prompts."""
    iterations: int = 40
    """Rounds of sampling and updating."""
    batch_size: int = 64
    """Answers sampled per round."""
    minibatch_size: int = 32
    """Answers per optimiser step."""
    epochs: int = 1
    """Passes over a round's answers (InstructGPT: 1, the earlier papers: 4)."""
    max_prompt_tokens: int = 96
    """Prompts longer than this are left out."""
    max_new_tokens: int = 32
    """Length at which an answer is cut off."""
    temperature: float = 1.0
    """Sampling temperature; logits are divided by it in rollout and in training alike."""
    clip: float = 0.2
    """Ratio clip of the policy."""
    value_clip: float = 0.2
    """How far a value may move per round at full gradient."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    discount: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    beta: float = 0.15
    """First KL coefficient (score units per nat)."""
    beta_floor: float = 0.1
    """The adaptive coefficient never falls below this."""
    kl_target: float = 6.0
    """Nats per answer at which the coefficient stays as it is; 0 keeps it fixed for ever."""
    kl_horizon: float = 300.0
    """Answers over which the coefficient adapts; smaller is faster."""
    kl_budget: float = 10.0
    """Nats per answer beyond which training stops."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1 (mean kept) before advantages are computed."""
    unfinished_score: float = -2.0
    """Score of an answer that has no end token, is too short or repeats itself; scores have mean 0 and deviation 1."""
    min_tokens: int = 4
    """Answers shorter than this count as degenerate."""
    max_repeats: float = 0.3
    """Largest share of an answer's bigrams that may have occurred in it before."""
    min_correlation: float = 0.6
    """Refuse a reward model whose held-out correlation with the ratings is lower. At 0.36 answers collapsed to two tokens,
    at 0.617 and 0.668 PPO worked (docs/results.md)."""
    min_distinct: float = 0.8
    """A checkpoint is kept as the best only if distinct-2 is at least this share of the first round's."""
    save_every: int = 10
    """Rounds between checkpoints."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train low-rank adapters on policy and critic instead of all weights: `lora.rank` above 0. The reference is then the
    policy with its adapter off, and the critic's frozen weights are the reward model's: two models in memory, not four."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="adamw", learning_rate=1e-4, eps=1e-5, schedule="linear", warmup=0.05)
    )
    """Optimiser of policy and critic; the learning rate falls linearly to 0."""

    def __post_init__(self) -> None:
        if self.batch_size % self.minibatch_size:
            raise UsageError(f"batch_size {self.batch_size} must be a multiple of minibatch_size {self.minibatch_size}")
        if self.temperature <= 0:
            raise UsageError("temperature must be above 0: PPO needs samples")
        if self.lora.dropout:
            raise UsageError("ppo has no dropout, neither in rollouts nor in updates: lora.dropout must be 0")


@dataclass(frozen=True)
class Rollout:
    """A round's answers with what was known when they were sampled; constants for the updates that follow."""

    answers: Answers
    log_probs: Float[Tensor, "batch time"]
    reference: Float[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    scores: Float[Tensor, " batch"]
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]

    @property
    def weight(self) -> float:
        """Number of answer tokens."""
        return float(self.answers.response.sum())

    def rows(self, chosen: Tensor) -> Rollout:
        """Some of the rows."""
        rest = [getattr(self, item.name)[chosen] for item in fields(self) if item.name != "answers"]
        return Rollout(self.answers.rows(chosen), *rest)


@dataclass
class Players:
    """The four models: what is trained, what it is compared with, what judges, what predicts the judgement.

    A reference of None is the policy with its adapter off. Policy and reference compute in float32: their difference is the KL, and the first ratio must be 1. Reward model and
    critic compute in `dtype`.
    """

    policy: GPT
    reference: GPT | None
    reward: ScalarModel
    critic: ScalarModel
    dtype: torch.dtype = torch.float32

    def reference_log_probs(self, answers: Answers, temperature: float) -> Float[Tensor, "batch time"]:
        """Log-probability of every answer token under the reference."""
        if self.reference is not None:
            return answer_log_probs(self.reference, answers, temperature=temperature)[0]
        with without_adapter(self.policy):
            return answer_log_probs(self.policy, answers, temperature=temperature)[0]


@torch.no_grad()
def look_back(players: Players, answers: Answers, beta: float, config: Config) -> tuple[Rollout, dict[str, float]]:
    """Score sampled answers and work out advantages; also what to log about them."""
    mask = answers.response
    log_probs, spread = answer_log_probs(
        players.policy, answers, temperature=config.temperature, with_entropy=True
    )
    reference = players.reference_log_probs(answers, config.temperature)
    with runtime.autocast(players.dtype):
        values = values_before(players.critic, answers)
        scores = players.reward.score(answers.ids, answers.real)
    poor = degenerate(answers, min_tokens=config.min_tokens, max_repeats=config.max_repeats) | ~answers.finished
    scores = torch.where(poor, config.unfinished_score, scores)
    rewards = objective.token_rewards(scores, log_probs, reference, mask, beta=beta)
    if config.whiten_rewards:
        rewards = objective.whiten(rewards, mask, shift_mean=False)
    advantages = objective.generalized_advantages(rewards, values, mask, discount=config.discount, lam=config.lam)
    returns = advantages + values
    kl = torch.where(mask, objective.kl_k1(log_probs, reference), 0.0).sum(1)
    k3 = torch.where(mask, objective.kl_k3(log_probs, reference), 0.0).sum(1)
    logged = {
        "score": float(scores.mean()),
        "kl": float(kl.mean()),
        "kl_k3": float(k3.mean()),
        "kl_error": float(kl.std() / math.sqrt(len(kl))),
        "entropy": float(objective.masked_mean(spread, mask)),
        "explained_variance": objective.explained_variance(values, returns, mask),
        "length": float(mask.sum(1).float().mean()),
        "finished": float(answers.finished.float().mean()),
        "degenerate": float(poor.float().mean()),
        "sampler_gap": float((answers.sampled - log_probs).abs()[mask].max()),
        "tokens": float(mask.sum()),
        "beta": beta,
    }
    whitened = objective.whiten(advantages, mask)
    return Rollout(answers, log_probs, reference, values, scores, whitened, returns), logged


def step(players: Players, batch: Rollout, config: Config) -> Step:
    """The clipped losses of policy and critic on some rows of a round, as a sum over answer tokens."""
    mask = batch.answers.response
    log_probs, spread = answer_log_probs(
        players.policy, batch.answers, temperature=config.temperature, with_entropy=True
    )
    with runtime.autocast(players.dtype):
        values = values_before(players.critic, batch.answers)
    actor = objective.policy_loss(log_probs, batch.log_probs, batch.advantages, mask, clip=config.clip)
    critic = objective.value_loss(values, batch.values, batch.returns, mask, clip=config.value_clip)
    bonus = objective.masked_mean(spread, mask)
    loss = actor.loss + config.value_coefficient * critic.loss - config.entropy_coefficient * bonus
    moved = objective.masked_mean((log_probs - batch.log_probs).square(), mask).detach()
    ratio = torch.where(mask, (log_probs - batch.log_probs).detach(), 0.0).exp()
    logged = {
        "policy_loss": actor.loss.detach(),
        "value_loss": critic.loss.detach(),
        "clip_fraction": actor.fraction,
        "value_clip_fraction": critic.fraction,
        "moved": 0.5 * moved,  # k2 estimate of KL(old || new) per token
        "ratio": objective.masked_mean(ratio, mask),
    }
    return Step(loss * batch.weight, {key: value * batch.weight for key, value in logged.items()})


def run(config: Config, workspace: Workspace) -> Report:
    """Run PPO and report score, KL and variety before and after on training prompts (held-out ones: stage eval)."""
    base = load_parts(workspace.resolve(config.base) if config.base in workspace.inputs else config.base)
    if base.tokenizer is None or base.template is None:
        raise UserError(f"{config.base} has no chat template; PPO needs a model after sft")
    reward = load_reward(workspace.resolve(config.reward), base, config.min_correlation)
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-train.jsonl", Dialogue))
    longest = min(config.max_prompt_tokens, base.model.config.context - config.max_new_tokens)
    prompts = prompts_from(dialogues, base.template, base.tokenizer, max_tokens=longest, most=4_000)
    if not prompts:
        raise UserError(f"no prompt in {records} has at most {longest} tokens; raise max_prompt_tokens")
    plan.ahead("ppo", config, base.model.config, ALONE)
    runtime.tune_allocator()
    torch.manual_seed(runtime.seed_for(workspace.seed, "ppo"))
    adapted = adapters.card(config.lora, base=base.model, judge=reward)
    players = make_players(base, reward, config.lora)
    trainer = Trainer(
        {"model": players.policy, "critic": players.critic},
        config.optim,
        workspace,
        card={"kind": "language", "model": base.model.config.to_dict(), "tokenizer": base.tokenizer.fingerprint,
              "template": base.template.fingerprint, **adapted},
        texts={"tokenizer.json": base.tokenizer.to_json(), "chat_template.jinja": base.template.source},
    )  # fmt: skip
    if trainer.resume():
        workspace.metrics.forget_after(trainer.progress.step - 1)  # the row of a round stands before its step is counted
    else:
        trainer.progress.extra = {"beta": config.beta, "best": None, "history": []}
    say(f"  {len(prompts):,} prompts; {config.iterations} rounds of {config.batch_size} answers; KL budget "
        f"{config.kl_budget:g} nats")  # fmt: skip
    with progress_bar("ppo") as bar, Stopper().listening() as stopper:
        run_ = _Run(config, workspace, trainer, players, base, prompts, SampleOrder(len(prompts), workspace.seed))
        while not run_.finished:
            line = run_.round()
            bar.update(trainer.progress.step / config.iterations, line)
            if stopper.asked:
                if run_.finished:
                    run_.extra["history"].pop()  # the last round counts no step: it is done again
                trainer.save(spare=run_.spare)
                raise Interrupted(f"ppo: saved at round {trainer.progress.step}; the same command goes on from there")
    return run_.report()


def make_players(base: Loaded, reward: ScalarModel, lora: LoRAConfig | None = None) -> Players:
    """The four models: policy and reference from the SFT model, critic from the reward model (own backbone; with adapters an
    adapter and a head of its own)."""
    device = runtime.device()
    policy, reward = base.model.to(device), reward.to(device)
    reference = None
    if lora is not None and lora.rank:
        critic = sharing_copy(reward)
        critic.scalar = copy.deepcopy(reward.scalar)  # it is trained, and not the judge's
        adapters.adapt(policy, lora, "policy")
        adapters.adapt(critic, lora, "critic")
    else:
        reference = GPT(policy.config).to(device)
        reference.load_state_dict(policy.state_dict())
        critic = ScalarModel(reward.config).to(device)
        critic.load_state_dict(reward.state_dict())
        reference.requires_grad_(False)
    reward.requires_grad_(False)
    players = Players(policy, reference, reward, critic, runtime.compute_dtype())
    for model in (policy, reference, reward, critic):
        if model is None:
            continue
        model.eval()  # no dropout, neither in rollouts nor in updates
        body = model if isinstance(model, GPT) else model.body
        if device.type == "cpu":
            body.use_attention(plain_attention)
    return players


def load_reward(directory: Any, base: Loaded, min_correlation: float) -> ScalarModel:
    """The reward model of a stage. Raises UserError when it is none, of another tokenizer, or too weak."""
    found = find_checkpoint(directory)
    if found is None or found.state().get("kind") != "reward":
        raise UserError(f"{directory} holds no reward model")
    state = found.state()
    assert base.tokenizer is not None
    if state["tokenizer"] != base.tokenizer.fingerprint:
        raise UserError(f"the reward model in {directory} has another tokenizer than the policy")
    result = directory / "result.json"
    facts = checkpoint.read_json(result).get("facts", {}) if result.is_file() else {}
    quality = facts.get("held_out_correlation")
    if quality is None or quality < min_correlation:
        told = "is not known" if quality is None else f"is {quality:.3f}"
        raise UserError(
            f"the reward model's correlation with held-out ratings {told}, PPO wants {min_correlation:g}: a weaker one "
            "is exploited, not followed (answers collapse while its score rises). Train it longer or on more ratings, "
            "start it from a better model, or lower min_correlation at your own risk"
        )
    found.verify()
    reward = ScalarModel(GPTConfig.from_dict(state["model"]))
    checkpoint.load_model_tensors(reward, found.tensors("model"), where=str(found.path))
    return reward


class _Run:
    """One run of PPO, round by round."""

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        trainer: Trainer,
        players: Players,
        base: Loaded,
        prompts: Sequence[list[int]],
        order: SampleOrder,
    ) -> None:
        self.config, self.workspace, self.trainer, self.players = config, workspace, trainer, players
        self.prompts, self.order = prompts, order
        assert base.tokenizer is not None and base.template is not None
        self.tokenizer = base.tokenizer
        self.end = base.tokenizer.control_ids[base.template.end]
        self.finished = False

    @property
    def extra(self) -> dict[str, Any]:
        return self.trainer.progress.extra

    @property
    def spare(self) -> list[int]:
        """The step of the best checkpoint, which is not to be pruned."""
        best = self.extra["best"]
        return [best["step"]] if best else []

    def sample(self) -> Answers:
        """This round's answers: prompts and random streams are functions of the seed and the round."""
        progress = self.trainer.progress
        chosen = self.order.take(progress.consumed, self.config.batch_size)
        return sample_answers(
            self.players.policy,
            [self.prompts[n] for n in chosen],
            end=self.end,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed_parts=(self.workspace.seed, "ppo", progress.step),
        )

    def round(self) -> str:
        """Sample, look back, keep the best, and unless this was the last round, update. Returns a line to show."""
        config, progress = self.config, self.trainer.progress
        answers = self.sample()
        rollout, logged = look_back(self.players, answers, self.extra["beta"], config)
        logged["distinct_2"] = distinct(texts_of(answers, self.tokenizer))
        self.extra["history"].append({key: logged[key] for key in health.WATCHED})
        diagnosis = health.diagnose(self.extra["history"], kl_budget=config.kl_budget)
        if diagnosis is not None and diagnosis.fatal:
            raise UserError(f"ppo stopped in round {progress.step}: {diagnosis.text}")
        self._keep_if_best(logged)
        last = progress.step >= config.iterations or diagnosis is not None
        if not last:
            self._update(rollout)
            logged |= self.trainer.take_logged()
            logged["learning_rate"] = self.trainer.optimisers[-1].param_groups[0]["lr"]
        self.workspace.metrics.write(progress.step, logged)
        if last:
            self.extra["stopped"] = diagnosis.text if diagnosis else "all rounds done"
            self.finished = True
            return ""
        if config.kl_target > 0:
            self.extra["beta"] = objective.next_beta(
                self.extra["beta"], logged["kl"], target=config.kl_target, episodes=config.batch_size,
                horizon=config.kl_horizon, floor=config.beta_floor,
            )  # fmt: skip
        progress.step += 1
        progress.consumed += config.batch_size
        if progress.step % config.save_every == 0:
            self.trainer.save(spare=self.spare)
        return f"score {logged['score']:+.2f}  KL {logged['kl']:.1f}  length {logged['length']:.0f}"

    def _keep_if_best(self, logged: dict[str, float]) -> None:
        """Save the policy as it was when it gave these answers, if they are the best so far and allowed."""
        best, first = self.extra["best"], self.extra["history"][0]
        varied = logged["distinct_2"] >= self.config.min_distinct * first["distinct_2"]
        if logged["kl"] <= self.config.kl_budget and varied and (best is None or logged["score"] > best["score"]):
            kept = ("score", "kl", "distinct_2", "length", "finished")
            self.extra["best"] = {"step": self.trainer.progress.step, **{key: logged[key] for key in kept}}
            history = self.extra["history"]
            self.extra["history"] = history[:-1]  # a resume from here does this round again
            self.trainer.save(spare=self.spare)
            self.extra["history"] = history

    def _update(self, rollout: Rollout) -> None:
        """Several passes over the round's answers in minibatches, in an order of their own."""
        config, progress = self.config, self.trainer.progress
        share = optim.learning_rate(progress.step, config.iterations, config.optim)
        rows = len(rollout.scores)
        for epoch in range(config.epochs):
            draw = runtime.generator(self.workspace.seed, "ppo minibatches", progress.step, epoch)
            order = torch.randperm(rows, generator=draw)
            for chosen in torch.split(order, config.minibatch_size):
                batch = rollout.rows(chosen)
                self.trainer.update([batch], lambda batch: step(self.players, batch, config), share)

    def report(self) -> Report:
        """What the run did to the policy, by its own measures."""
        first, best = self.extra["history"][0], self.extra["best"]
        if best is None:
            raise UserError("ppo: no round gave answers within the KL budget that were varied enough; lower the learning rate")
        path = f"checkpoints/step-{best['step']:06}"
        if self.config.lora.rank:
            self.trainer.load_weights(checkpoint.Checkpoint(self.workspace.directory / path))
        adapter = adapters.write_adapter(self.players.policy, self.workspace.directory, base=self.config.base)
        return Report(
            measures=[
                Measure("reward model's score (training prompts)", first["score"], best["score"], "higher"),
                Measure("KL to the SFT model", 0.0, best["kl"], "context", note="nats per answer"),
                Measure("distinct-2 of answers", first["distinct_2"], best["distinct_2"], "higher"),
            ],
            curves=[
                Curve("Reward model's score", ["score"]),
                Curve("KL to the SFT model", ["kl", "kl_k3"], "nats per answer"),
                Curve("Entropy", ["entropy"], "nats per token"),
                Curve("Share of tokens clipped", ["clip_fraction", "value_clip_fraction"]),
                Curve("Explained variance of the critic", ["explained_variance"]),
                Curve("Answer length", ["length"], "tokens"),
            ],
            model=path,
            facts={"best": best, "rounds": self.trainer.progress.step, "stopped": self.extra["stopped"], **adapter},
            notes=[f"stopped: {self.extra['stopped']}; kept: round {best['step']}, the best score within the KL budget"],
        )
