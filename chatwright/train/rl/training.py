"""Iterations, shared by PPO and REINFORCE: sample completions, score them, keep the best policy, update.

A method adds `score_rollouts` (completions -> rollout) and `step` (minibatch -> loss). Everything else is
here: prompts, the KL coefficient, the health checks (health.py), the choice of the checkpoint by a fixed set
of prompts (fixed_prompts.py), an EMA of the weights, general text beside the completions (ptx.py), a gold
measure (gold.py), resuming, and the report (outcome.py).

Many processes share an iteration. Each samples and scores its part of the completions, then all get all of
them (rollout.py::all_gather_completions): advantages, the KL coefficient and every decision are then those of
one process. Each trains on its part of a minibatch. A run may be stopped between two minibatches: the
mid-step state is then saved, completions included.

Departures from the papers, each for small reward models that are easily exploited:
* A reward model that is too weak on held-out data is refused.
* Unfinished and degenerate (very short, repetitive) completions get a fixed score, whatever the reward model
  says.
* The KL coefficient has a floor, and training stops beyond a KL budget. The result is the checkpoint inside
  that budget that scores best on a fixed set of prompts, and whose completions have not lost their variety.
  The model that training starts from is one of the candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from chatwright import optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UserError
from chatwright.data.loader import SampleOrder
from chatwright.interop.loaded import Loaded
from chatwright.metrics import read_metrics, say
from chatwright.model.heads import ScalarModel
from chatwright.objectives import policy as objective
from chatwright.train import adapters, cost
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext
from chatwright.train.rl import health
from chatwright.train.rl.config import RLConfig
from chatwright.train.rl.ema import copy_weights, update_ema
from chatwright.train.rl.fixed_prompts import Answers, Evaluator, PromptSets
from chatwright.train.rl.gold import Gold
from chatwright.train.rl.models import RLModels
from chatwright.train.rl.outcome import report_of, result_of
from chatwright.train.rl.ptx import GeneralText, TextBatch, text_step
from chatwright.train.rl.rollout import (
    Completions,
    Rollout,
    as_tensors,
    distinct,
    from_tensors,
    sample_completions,
    texts_of,
)
from chatwright.train.statistics import standard_error
from chatwright.train.stopping import Interrupted
from chatwright.train.trainer import Step, Trainer
from chatwright.train.workspace import Curve, Report, Unhealthy, Workspace

FIXED = ("score", "kl", "distinct_2", "gold")
"""Measures on the fixed prompts that metrics.jsonl has, each as `fixed_` and its name."""

Settings = TypeVar("Settings", bound=RLConfig)
Rolled = TypeVar("Rolled", bound=Rollout)


class PolicyTraining(ABC, Generic[Settings, Rolled]):
    """One run of a method, iteration by iteration."""

    title: ClassVar[str]
    rolled: ClassVar[type[Any]]
    """The class of its rollouts."""
    curves: ClassVar[Sequence[Curve]] = ()
    """Curves of this method alone, for the report."""
    parallel: ParallelContext = SINGLE_PROCESS
    asked: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the run is asked to stop."""

    def __init__(
        self,
        config: Settings,
        workspace: Workspace,
        trainer: Trainer,
        models: RLModels,
        base: Loaded,
        prompts: PromptSets,
        *,
        gold: Gold | None = None,
        text: GeneralText | None = None,
        too_short: str = "",
    ) -> None:
        """`too_short` is that of `health.Limits`."""
        self.config, self.workspace, self.trainer, self.models = config, workspace, trainer, models
        self.parallel = trainer.parallel
        self.sets, self.prompts = prompts, prompts.training
        self.order = SampleOrder(len(self.prompts), workspace.seed)
        self.gold, self.text, self.too_short = gold, text, too_short
        assert base.tokenizer is not None and base.template is not None
        self.tokenizer = base.tokenizer
        self.end = base.template.end_id(base.tokenizer)
        self.evaluator = Evaluator(
            models, config, self.tokenizer, self.end, (workspace.seed, self.title), gold
        )
        self.finished = "average" in self.extra  # written at the very end
        self.latest: dict[str, float] = {}
        """What was logged of the current iteration."""
        self.first_gap: float | None = None

    @abstractmethod
    def score_rollouts(self, answers: Completions, beta: float) -> tuple[Rolled, dict[str, float]]:
        """The rollout to train on, from sampled completions, and what to log about them."""

    @abstractmethod
    def step(self, batch: Rolled) -> Step:
        """The loss of some rows of a rollout. It must log `ratio_gap`, the largest |ratio - 1| of a token."""

    @property
    def epochs(self) -> int:
        """Passes over an iteration's completions."""
        return 1

    @property
    def per_prompt(self) -> int:
        """Completions per prompt; those of one prompt are adjacent rows."""
        return 1

    @property
    def extra(self) -> dict[str, Any]:
        """State of the run that checkpoints keep: KL coefficient, best step, history ..."""
        return self.trainer.progress.extra

    @property
    def rounding(self) -> health.Rounding:
        """The errors of log-probabilities that rounding explains."""
        return health.FLOAT32 if self.models.policy_dtype == torch.float32 else health.BFLOAT16

    @property
    def protected(self) -> list[int]:
        """Protected steps: that of the best checkpoint, which must not be pruned."""
        best = self.extra["best"]
        return [best["step"]] if best else []

    @property
    def selection_metric(self) -> str:
        """The selection metric: the best checkpoint has its highest value."""
        return "gold" if self.gold is not None else "score"

    def sample(self) -> Completions:
        """This process's completions of the current iteration. Prompts and random streams are functions of
        the seed, the iteration and a completion's number in it."""
        progress, mine = self.trainer.progress, self.parallel.local_slice(self.config.batch_size)
        chosen = self.order.take(progress.consumed, self.config.batch_size // self.per_prompt)
        return sample_completions(
            self.models.sampler(),
            [self.prompts[n] for n in chosen for _ in range(self.per_prompt)][mine],
            end=self.end,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed_parts=(self.workspace.seed, self.title, progress.step),
            first=mine.start,
            dtype=self.models.policy_dtype,
        )

    def sampled(self) -> tuple[Rolled, dict[str, float]]:
        """Sample, score, and measure what needs the texts (distinct-2, gold). All processes get the same
        numbers, so that they decide alike."""
        answers = self.sample()
        rollout, logged = self.score_rollouts(answers, self.extra["beta"])
        logged["distinct_2"] = distinct(texts_of(rollout.answers, self.tokenizer))
        if self.gold is not None:
            gold = torch.cat(self.parallel.all_gather(self.gold(answers)))
            logged["gold"] = float(gold.mean())
            logged["gold_error"] = standard_error(gold)
        return rollout, self.parallel.broadcast_from_rank0(lambda: logged)

    def iteration(self) -> str:
        """One iteration: sample, score, measure the policy on the fixed prompts if it is time, keep the best
        and, unless it is the last one, update. Returns a line to show."""
        config, progress = self.config, self.trainer.progress
        begun = self.extra.get("unfinished")
        rollout, diagnosis = self._gone_on(begun) if begun else self._begun()
        logged = self.latest
        last = progress.step >= config.iterations or diagnosis is not None
        if not last:
            self._update(rollout, done=begun["done"] if begun else 0)
            logged |= self.trainer.take_logged()
            logged["first_ratio_gap"] = self.first_gap or 0.0
            logged["learning_rate"] = self.trainer.optimisers[-1].param_groups[0]["lr"]
        self.workspace.metrics.write(progress.step, logged)
        if last:
            self.extra["stopped"] = diagnosis.text if diagnosis else "all iterations done"
            self._measure_average()
            self.finished = True
            return ""
        if config.kl_target > 0:
            self.extra["beta"] = objective.next_beta(
                self.extra["beta"],
                logged["kl"],
                target=config.kl_target,
                episodes=config.batch_size,
                horizon=config.kl_horizon,
                floor=config.beta_floor,
            )
        progress.step += 1
        progress.consumed += config.batch_size // self.per_prompt
        self.extra.pop("unfinished", None)
        if begun or progress.step % config.save_steps == 0:
            self.trainer.save(protected=self.protected)
            self.trainer.finish()
        return f"score {logged['score']:+.2f}  KL {logged['kl']:.1f}  length {logged['length']:.0f}"

    def _begun(self) -> tuple[Rolled, health.Diagnosis | None]:
        """A new iteration's rollout, and the reason to stop if this is the last iteration."""
        rollout, logged = self.sampled()
        self.latest, history = logged, self.extra["history"]
        history.append({key: logged[key] for key in health.WATCHED if key in logged})
        diagnosis = health.diagnose(
            history,
            health.Limits(self.config.kl_budget, self.config.patience, self.rounding, self.too_short),
        )
        if diagnosis is not None and diagnosis.fatal:
            self._break_off(diagnosis)
        step = self.trainer.progress.step
        if step == 0 and self.sets.held_out is not None:  # the policy is the reference still
            self.extra["reference"] = asdict(self.evaluator.measure(self.sets.held_out))
        if diagnosis is None and (step % self.config.evaluate_every == 0 or step >= self.config.iterations):
            found = self.evaluator.measure(self.sets.choosing).means()
            logged |= {f"fixed_{key}": found[key] for key in FIXED if key in found}
            self._keep_if_best(found)
        return rollout, diagnosis

    def _gone_on(self, begun: Mapping[str, Any]) -> tuple[Rolled, None]:
        """The rollout of an iteration that was stopped between its minibatches (`_interrupt`)."""
        self.latest, self.first_gap = begun["row"], begun["first_gap"]
        return runtime.on_device(from_tensors(self.rolled, self.trainer.unfinished.tensors("mid_step"))), None

    def _break_off(self, diagnosis: health.Diagnosis) -> None:
        """Write this iteration's metrics, save the state before it, and raise Unhealthy with the report so
        far."""
        step = self.trainer.progress.step
        self.workspace.metrics.write(step, self.latest)
        self._save_before_iteration()
        text = f"{self.title} stopped in iteration {step}: {diagnosis.text}"
        raise Unhealthy(
            text,
            report_of(
                self.extra,
                step,
                selection_metric=self.selection_metric,
                curves=self.curves,
                trouble=text,
                more=self.spent(),
            ),
        )

    def _save_before_iteration(self) -> None:
        """Save so that a resume repeats this iteration."""
        history = self.extra["history"]
        self.extra["history"] = history[:-1]
        self.extra.pop("unfinished", None)
        self.trainer.save(protected=self.protected)
        self.extra["history"] = history

    def _allowed(self, found: Mapping[str, float]) -> bool:
        """Whether a policy with these numbers on the fixed prompts may be the result: within the KL budget,
        and as varied as `min_distinct` says beside the model that training starts from."""
        varied = found["distinct_2"] >= self.config.min_distinct * self.extra["first"]["distinct_2"]
        return found["kl"] <= self.config.kl_budget and varied

    def _keep_if_best(self, found: dict[str, float]) -> None:
        """Save the policy as it was when it sampled, if its numbers on the fixed prompts are the best so far
        and allowed."""
        step, best = self.trainer.progress.step, self.extra["best"]
        if step == 0:
            self.extra["first"] = found
        if self._allowed(found) and (
            best is None or found[self.selection_metric] > best[self.selection_metric]
        ):
            self.extra["best"] = {"step": step, **found}
            self._save_before_iteration()

    def _update(self, rollout: Rolled, *, done: int = 0) -> None:
        """Train on the iteration's rollout, in shuffled minibatches; the first `done` are done already.

        Each process trains on its part of a minibatch. Raises Interrupted between two minibatches.
        """
        config, progress = self.config, self.trainer.progress
        share = optim.learning_rate(progress.step, config.iterations, config.optim)
        for place, (epoch, number, chosen) in enumerate(self._minibatches(len(rollout.answers.ids))):
            if place < done:
                continue
            if self.parallel.all_reduce_max([float(self.asked())])[0]:
                self._interrupt(rollout, place)
            first = place == 0
            if first:
                self.first_gap = None
            texts = self._texts(rollout.rows(chosen).weight, epoch, number)
            batch = rollout.rows(chosen[self.parallel.local_slice(len(chosen))])
            # General text first: it has no gradient for a critic, and DDP reduces gradients in the last
            # backward pass.
            self.trainer.update([*texts, batch], self._loss, share, accept=self._is_right if first else None)
            if first:
                self._is_right()  # `update` has not called it where the gradient was not finite
            if "average" in self.trainer.modules:
                update_ema(self.trainer.modules["average"], self.models.policy, config.ema)

    def _minibatches(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Pass, number of the minibatch in it, and its rows: a function of the seed and the iteration."""
        for epoch in range(self.epochs):
            draw = runtime.generator(
                self.workspace.seed, f"{self.title} minibatches", self.trainer.progress.step, epoch
            )
            order = torch.randperm(rows, generator=draw)
            for number, chosen in enumerate(torch.split(order, self.config.minibatch_size)):
                yield epoch, number, chosen

    def _interrupt(self, rollout: Rolled, done: int) -> None:
        """Save the mid-step state before minibatch number `done`, completions included, and raise
        Interrupted."""
        self.extra["unfinished"] = {"done": done, "row": self.latest, "first_gap": self.first_gap}
        self.trainer.save(protected=self.protected, mid_step=as_tensors(rollout))
        where = f"saved in iteration {self.trainer.progress.step}, after {done} of its minibatches"
        raise Interrupted(f"{self.title}: {where}; the same command goes on from there")

    def _loss(self, batch: Any) -> Step:
        if isinstance(batch, TextBatch):
            with runtime.autocast(self.models.policy_dtype):
                return text_step(self.models.policy, batch)
        outcome = self.step(batch)
        if self.first_gap is None:
            self.first_gap = float(outcome.logged["ratio_gap"]) / batch.weight
        return outcome

    def _is_right(self, loss: float = 0.0) -> bool:
        """Check that the first minibatch, before its update, has the log-probabilities of the rollout (ratio
        1). Raises Unhealthy if not; else True.

        Each process has seen its part of the minibatch. All stop together, or the rest would wait for ever.
        """
        gap = self.first_gap or 0.0
        self.first_gap = self.parallel.all_reduce_max([math.inf if math.isnan(gap) else gap])[0]
        diagnosis = health.diagnose_ratio(self.first_gap, self.rounding)
        if diagnosis is not None:
            self._break_off(diagnosis)
        return True

    def _texts(self, weight: float, epoch: int, number: int) -> list[TextBatch]:
        """This process's part of the general text for a minibatch of `weight`, in micro-batches of as many
        windows as it has completions."""
        if self.text is None or not self.config.ptx:
            return []
        size, windows, mine = (
            self.config.minibatch_size,
            self.config.ptx_windows,
            self.parallel.local_slice(self.config.minibatch_size),
        )
        before = (self.trainer.progress.step * self.epochs + epoch) * self.config.batch_size + number * size
        count = mine.stop - mine.start
        share = self.config.ptx * weight / windows * count / size
        return [
            TextBatch(self.text.take(before * windows + n * size + mine.start, count), share)
            for n in range(windows)
        ]

    def _measure_average(self) -> None:
        """Measure the EMA of the weights on the fixed prompts, and save it; `outcome.result_of` chooses
        between it and the best iteration."""
        average = self.trainer.modules.get("average")
        if average is None:
            return
        copy_weights(self.models.policy, average)
        self.trainer.progress.step += 1  # gives it a checkpoint of its own
        found = self.evaluator.measure(self.sets.choosing).means()
        self.extra["average"] = {"allowed": self._allowed(found), **found}
        self.trainer.save(final=True, protected=self.protected)

    def report(self) -> Report:
        """The report: what the result is like on held-out prompts, beside the model that training started
        from. Raises UserError when there is no result."""
        step = self.trainer.progress.step
        result = result_of(self.extra, step)
        if result is None:
            raise UserError(
                f"{self.title}: no iteration gave completions within the KL budget that were varied enough; "
                "lower the learning rate"
            )
        tax, policy = None, self.models.policy
        kept = Checkpoint(self.workspace.checkpoints / f"step-{result['step']:06}")
        self.trainer.consolidate(kept)
        # What follows is about the result, not the policy of the last iteration.
        self.trainer.load_weights(kept)
        if self.text is not None:
            say("  measuring what it costs on general text")
            with torch.no_grad():
                tax = self.parallel.forward(self._tax, self.text)
        more = self.spent() | adapters.write_adapter(
            policy, self.workspace.directory, base=self.config.base, parallel=self.parallel
        )
        return report_of(
            self.extra,
            step,
            selection_metric=self.selection_metric,
            curves=self.curves,
            held_out=self._held_out(),
            tax=tax,
            more=more,
            seed=self.workspace.seed,
            note=self.sets.note,
        )

    def _held_out(self) -> tuple[Answers, Answers] | None:
        """The reference's and the result's completions of the held-out prompts; None when there are none."""
        if self.sets.held_out is None or "reference" not in self.extra:
            return None
        say(f"  measuring the result on {len(self.sets.held_out.prompts)} held-out prompts")
        return Answers(**self.extra["reference"]), self.evaluator.measure(self.sets.held_out)

    def spent(self) -> dict[str, float]:
        """Completion tokens and floating-point operations of all iterations so far, from their metrics."""
        policy, critic, text = self.models.policy, self.models.critic, 0.0
        # A head alone costs next to nothing.
        critics = [critic.body] if isinstance(critic, ScalarModel) else []
        if self.text is not None and self.config.ptx:
            windows = self.epochs * self.config.batch_size * self.config.ptx_windows
            text = windows * cost.training_flop(policy, self.config.ptx_context or policy.config.context)
        return cost.iterations_spent(
            read_metrics(self.workspace.directory / "metrics.jsonl"),
            sum(map(len, self.prompts)) / len(self.prompts),
            read=[policy, policy, self.models.reward.body, *critics],  # the second one is the reference
            trained=[policy, *critics],
            epochs=self.epochs,
            text=text,
        )

    def _tax(self, text: GeneralText) -> tuple[float, float]:
        """Perplexity of general text under the reference and under the policy."""
        with self.models.as_reference() as reference:
            before = text.perplexity(reference)
        return before, text.perplexity(self.models.policy)
