"""Rounds: sample answers, look back at them, keep the best policy so far, learn. What PPO and REINFORCE share.

A method brings `look_back` (answers -> what is learnt from) and `step` (minibatch -> loss); everything else is here: prompts,
the KL coefficient, the watch over the run (health.py), the checkpoint that is kept, an average of the weights, general text
beside the answers (ptx.py), a gold measure (gold.py), resuming, and the report (outcome.py).

Departures from the papers, each for small reward models that are easily exploited:
* Refuse to start on a reward model that is too weak on held-out data.
* Unfinished and degenerate (very short, repetitive) answers get a fixed score, however well they are liked.
* The KL coefficient has a floor, training stops beyond a KL budget, and what is kept is the best-scoring checkpoint
  inside that budget whose answers have not lost their variety.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from chatwright import optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.metrics import progress_bar, say
from chatwright.model.gpt import GPT
from chatwright.model.lora import lora_parameters
from chatwright.objectives import policy as objective
from chatwright.train import adapters, health, plan
from chatwright.train.gold import Gold, gold_of
from chatwright.train.outcome import report_of, result_of
from chatwright.train.parallel import ALONE
from chatwright.train.players import Players, load_reward, make_players
from chatwright.train.ptx import GeneralText, TextBatch, text_step
from chatwright.train.rollout import Answers, distinct, prompts_from, sample_answers, texts_of
from chatwright.train.rounds_config import RoundsConfig
from chatwright.train.sft import read_records
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.tokenizer import records_of
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Curve, Report, Unhealthy, Workspace


class Rollout(Protocol):
    """A round's answers with what was known when they were sampled; constants for the updates that follow."""

    @property
    def answers(self) -> Answers:
        """The answers."""

    @property
    def weight(self) -> float:
        """What the loss is summed over."""

    def rows(self, chosen: Tensor) -> Any:
        """Some of the rows."""


Settings = TypeVar("Settings", bound=RoundsConfig)
Rolled = TypeVar("Rolled", bound=Rollout)


class Rounds(ABC, Generic[Settings, Rolled]):
    """One run of a method, round by round."""

    title: ClassVar[str]
    curves: ClassVar[Sequence[Curve]] = ()
    """Those of the method alone, for the report."""

    def __init__(
        self,
        config: Settings,
        workspace: Workspace,
        trainer: Trainer,
        players: Players,
        base: Loaded,
        prompts: Sequence[list[int]],
        *,
        gold: Gold | None = None,
        text: GeneralText | None = None,
    ) -> None:
        self.config, self.workspace, self.trainer, self.players = config, workspace, trainer, players
        self.prompts, self.order = prompts, SampleOrder(len(prompts), workspace.seed)
        self.gold, self.text = gold, text
        assert base.tokenizer is not None and base.template is not None
        self.tokenizer = base.tokenizer
        self.end = base.tokenizer.control_ids[base.template.end]
        self.finished = "average" in self.extra  # which is written at the very end
        self.latest: dict[str, float] = {}
        """What was logged of the round that is going on."""
        self.first_gap: float | None = None

    @abstractmethod
    def look_back(self, answers: Answers, beta: float) -> tuple[Rolled, dict[str, float]]:
        """What is to be learnt from sampled answers, and what to log about them."""

    @abstractmethod
    def step(self, batch: Rolled) -> Step:
        """The loss of some rows of a round. `ratio_gap` is among what it logs: the largest |ratio - 1| of a token."""

    @property
    def epochs(self) -> int:
        """Passes over a round's answers."""
        return 1

    @property
    def per_prompt(self) -> int:
        """Answers to each prompt; they stand side by side."""
        return 1

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint remembers of the run."""
        return self.trainer.progress.extra

    @property
    def spare(self) -> list[int]:
        """The step of the best checkpoint, which is not to be pruned."""
        best = self.extra["best"]
        return [best["step"]] if best else []

    @property
    def aim(self) -> str:
        """What the kept checkpoint is the best by."""
        return "gold" if self.gold is not None else "score"

    def sample(self) -> Answers:
        """This round's answers: prompts and random streams are functions of the seed and the round."""
        progress = self.trainer.progress
        chosen = self.order.take(progress.consumed, self.config.batch_size // self.per_prompt)
        return sample_answers(
            self.players.policy,
            [self.prompts[n] for n in chosen for _ in range(self.per_prompt)],
            end=self.end,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed_parts=(self.workspace.seed, self.title, progress.step),
        )

    def sampled(self) -> tuple[Rolled, dict[str, float]]:
        """Sample, look back, and measure what only texts show."""
        answers = self.sample()
        rollout, logged = self.look_back(answers, self.extra["beta"])
        logged["distinct_2"] = distinct(texts_of(answers, self.tokenizer))
        if self.gold is not None:
            gold = self.gold(answers)
            logged["gold"] = float(gold.mean())
            logged["gold_error"] = float(gold.std() / math.sqrt(len(gold)))
        return rollout, logged

    def round(self) -> str:
        """Sample, look back, keep the best, and unless this was the last round, update. Returns a line to show."""
        config, progress = self.config, self.trainer.progress
        rollout, logged = self.sampled()
        self.latest = logged
        self.extra["history"].append({key: logged[key] for key in health.WATCHED if key in logged})
        diagnosis = health.diagnose(self.extra["history"], health.Limits(config.kl_budget, config.patience))
        if diagnosis is not None and diagnosis.fatal:
            self._break_off(diagnosis)
        self._keep_if_best(logged)
        last = progress.step >= config.iterations or diagnosis is not None
        if not last:
            self._update(rollout)
            logged |= self.trainer.take_logged()
            logged["first_ratio_gap"] = self.first_gap or 0.0
            logged["learning_rate"] = self.trainer.optimisers[-1].param_groups[0]["lr"]
        self.workspace.metrics.write(progress.step, logged)
        if last:
            self.extra["stopped"] = diagnosis.text if diagnosis else "all rounds done"
            self._measure_average()
            self.finished = True
            return ""
        if config.kl_target > 0:
            self.extra["beta"] = objective.next_beta(
                self.extra["beta"], logged["kl"], target=config.kl_target, episodes=config.batch_size,
                horizon=config.kl_horizon, floor=config.beta_floor,
            )  # fmt: skip
        progress.step += 1
        progress.consumed += config.batch_size // self.per_prompt
        if progress.step % config.save_every == 0:
            self.trainer.save(spare=self.spare)
        return f"score {logged['score']:+.2f}  KL {logged['kl']:.1f}  length {logged['length']:.0f}"

    def _break_off(self, diagnosis: health.Diagnosis) -> None:
        """Write the row of this round, save the state before it, and raise Unhealthy with the report so far."""
        step = self.trainer.progress.step
        self.workspace.metrics.write(step, self.latest)
        self._save_before_round()
        text = f"{self.title} stopped in round {step}: {diagnosis.text}"
        raise Unhealthy(text, report_of(self.extra, step, aim=self.aim, curves=self.curves, trouble=text))

    def _save_before_round(self) -> None:
        """Save so that a resume does this round again."""
        history = self.extra["history"]
        self.extra["history"] = history[:-1]
        self.trainer.save(spare=self.spare)
        self.extra["history"] = history

    def _allowed(self, logged: dict[str, float]) -> bool:
        """Whether a policy that gave such answers may be the result."""
        varied = logged["distinct_2"] >= self.config.min_distinct * self.extra["history"][0]["distinct_2"]
        return logged["kl"] <= self.config.kl_budget and varied

    def _keep_if_best(self, logged: dict[str, float]) -> None:
        """Save the policy as it was when it gave these answers, if they are the best so far and allowed."""
        best = self.extra["best"]
        if self._allowed(logged) and (best is None or logged[self.aim] > best[self.aim]):
            self.extra["best"] = {"step": self.trainer.progress.step, **kept(logged)}
            self._save_before_round()

    def _update(self, rollout: Rolled) -> None:
        """Passes over the round's answers in minibatches, in an order of their own."""
        config, progress = self.config, self.trainer.progress
        share = optim.learning_rate(progress.step, config.iterations, config.optim)
        rows, self.first_gap = len(rollout.answers.ids), None
        for epoch in range(self.epochs):
            draw = runtime.generator(self.workspace.seed, f"{self.title} minibatches", progress.step, epoch)
            order = torch.randperm(rows, generator=draw)
            for number, chosen in enumerate(torch.split(order, config.minibatch_size)):
                batch = rollout.rows(chosen)
                self.trainer.update([batch, *self._texts(batch.weight, epoch, number)], self._loss, share)
                if "average" in self.trainer.modules:
                    follow(self.trainer.modules["average"], self.players.policy, config.average)

    def _loss(self, batch: Any) -> Step:
        if isinstance(batch, TextBatch):
            return text_step(self.players.policy, batch)
        outcome = self.step(batch)
        if self.first_gap is None:
            self.first_gap = float(outcome.logged["ratio_gap"]) / batch.weight
            diagnosis = health.diagnose_ratio(self.first_gap)
            if diagnosis is not None:
                self._break_off(diagnosis)
        return outcome

    def _texts(self, weight: float, epoch: int, number: int) -> list[TextBatch]:
        """General text for the minibatch of this number, in portions of as many windows as it has answers."""
        if self.text is None or not self.config.ptx:
            return []
        size, windows = self.config.minibatch_size, self.config.ptx_windows
        before = (self.trainer.progress.step * self.epochs + epoch) * self.config.batch_size + number * size
        share = self.config.ptx * weight / windows
        return [TextBatch(self.text.take(before * windows + n * size, size), share) for n in range(windows)]

    def _measure_average(self) -> None:
        """Ask the average of the weights the last round's prompts, and save it; `outcome.result_of` chooses."""
        average = self.trainer.modules.get("average")
        if average is None:
            return
        with torch.no_grad():
            for mine, theirs in zip(averaged(self.players.policy), average.parameters(), strict=True):
                mine.copy_(theirs)
        self.trainer.progress.step += 1  # a random stream and a checkpoint of its own
        _, logged = self.sampled()
        self.extra["average"] = {"allowed": self._allowed(logged), **kept(logged)}
        self.trainer.save(final=True, spare=self.spare)

    def report(self) -> Report:
        """What the run did to the policy, by its own measures. Raises UserError when there is no result."""
        step = self.trainer.progress.step
        result = result_of(self.extra, step)
        if result is None:
            raise UserError(f"{self.title}: no round gave answers within the KL budget that were varied enough; lower the learning rate")
        tax, policy = None, self.players.policy
        if self.text is not None or self.config.lora.rank:  # what follows is about the result, not the last round's policy
            self.trainer.load_weights(Checkpoint(self.workspace.checkpoints / f"step-{result['step']:06}"))
        if self.text is not None:
            say("  measuring what it costs on general text")
            with self.players.as_reference() as reference:
                before = self.text.perplexity(reference)
            tax = (before, self.text.perplexity(policy))
        adapter = adapters.write_adapter(policy, self.workspace.directory, base=self.config.base)
        return report_of(self.extra, step, aim=self.aim, curves=self.curves, tax=tax, adapter=adapter)


def kept(logged: dict[str, float]) -> dict[str, float]:
    """What is remembered of the answers of a policy that may be the result."""
    return {key: logged[key] for key in ("score", "kl", "distinct_2", "length", "finished", "gold") if key in logged}


def averaged(policy: nn.Module) -> list[nn.Parameter]:
    """What an average is made of: the matrices of the policy's adapter if it has one, else all its weights."""
    return lora_parameters(policy) or list(policy.parameters())


def average_of(policy: GPT) -> nn.Module:
    """Where an average of a policy begins, frozen. A and B of an adapter are averaged each on its own: the average of their
    products would have a higher rank than the adapter."""
    own = lora_parameters(policy)
    if own:
        return nn.ParameterList([one.detach().clone() for one in own]).requires_grad_(False)
    average = GPT(policy.config).to(runtime.device()).requires_grad_(False)
    average.load_state_dict(policy.state_dict())
    return average


@torch.no_grad()
def follow(average: nn.Module, policy: nn.Module, decay: float) -> None:
    """average <- decay x average + (1 - decay) x policy (Ouyang et al. 2022, appendix C.4)."""
    for mine, theirs in zip(average.parameters(), averaged(policy), strict=True):
        mine.lerp_(theirs, 1 - decay)


def carry_out(method: type[Rounds[Any, Any]], config: RoundsConfig, workspace: Workspace, *, critic: str = "none") -> Report:
    """A whole run: load, make the players, rounds until the last, report. Raises UserError, Unhealthy, Interrupted."""
    title = method.title
    base = load_parts(workspace.resolve(config.base) if config.base in workspace.inputs else config.base)
    if base.tokenizer is None or base.template is None:
        raise UserError(f"{config.base} has no chat template; {title.upper()} needs a model after sft")
    reward = load_reward(workspace.resolve(config.reward), base, config.min_correlation)
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-train.jsonl", Dialogue))
    longest = min(config.max_prompt_tokens, base.model.config.context - config.max_new_tokens)
    prompts = prompts_from(dialogues, base.template, base.tokenizer, max_tokens=longest, most=4_000)
    if not prompts:
        raise UserError(f"no prompt in {records} has at most {longest} tokens; raise max_prompt_tokens")
    gold = gold_of(config.gold, workspace.resolve, base)
    context = config.ptx_context or base.model.config.context
    text = None
    if config.text:
        text = GeneralText.open(workspace.resolve(config.text), base.tokenizer, context, workspace.seed)
    plan.ahead(title, config, base.model.config, ALONE)
    runtime.tune_allocator()
    torch.manual_seed(runtime.seed_for(workspace.seed, title))
    bodies = {"base": base.model, **({"judge": reward} if critic == "separate" else {})}
    adapted = adapters.card(config.lora, **bodies)
    players = make_players(base, reward, critic, config.lora)
    trainer = trainer_of(players, config, workspace, base, adapted)
    if trainer.resume():
        workspace.metrics.forget_after(trainer.progress.step - 1)  # the row of a round stands before its step is counted
    else:
        trainer.progress.extra = {"beta": config.beta, "best": None, "history": []}
    say(f"  {len(prompts):,} prompts; {config.iterations} rounds of {config.batch_size} answers; KL budget "
        f"{config.kl_budget:g} nats")  # fmt: skip
    with progress_bar(title) as bar, Stopper().listening() as stopper:
        run_ = method(config, workspace, trainer, players, base, prompts, gold=gold, text=text)
        while not run_.finished:
            line = run_.round()
            bar.update(trainer.progress.step / config.iterations, line)
            if stopper.asked:
                if "average" not in run_.extra:  # with which all is saved
                    if run_.finished:
                        run_.extra["history"].pop()  # the last round counts no step: it is done again
                    trainer.save(spare=run_.spare)
                raise Interrupted(f"{title}: saved at round {trainer.progress.step}; the same command goes on from there")
    return run_.report()


def trainer_of(
    players: Players, config: RoundsConfig, workspace: Workspace, base: Loaded, adapted: Mapping[str, Any]
) -> Trainer:
    """What is trained and saved: the policy, a critic if there is one, and an average of the policy's weights if asked for.
    `adapted` is what a checkpoint says of the adapters (`adapters.card`)."""
    assert base.tokenizer is not None and base.template is not None
    modules: dict[str, nn.Module] = {"model": players.policy}
    if players.critic is not None:
        modules["critic"] = players.critic
    if config.average:
        modules["average"] = average_of(players.policy)
    return Trainer(
        modules,
        config.optim,
        workspace,
        card={"kind": "language", "model": base.model.config.to_dict(), "tokenizer": base.tokenizer.fingerprint,
              "template": base.template.fingerprint, **adapted},
        texts={"tokenizer.json": base.tokenizer.to_json(), "chat_template.jinja": base.template.source},
        keep=config.keep,
    )  # fmt: skip
