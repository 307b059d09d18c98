"""A whole run of PPO or REINFORCE: load the models, make their trainer, iterate to the end, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from chatwright import files, memory
from chatwright.data.examples import Dialogue
from chatwright.data.records import read_records, records_of
from chatwright.generation_config import own_default
from chatwright.interop.loaded import Loaded
from chatwright.metrics import duration, progress_bar, say
from chatwright.model.heads import ScalarModel
from chatwright.train import adapters
from chatwright.train.base import ChatBase, model_metadata, model_texts, open_chat_base
from chatwright.train.compiled import compile_blocks
from chatwright.train.parallel.context import ParallelContext
from chatwright.train.planning.budget import seconds
from chatwright.train.rl.config import RLConfig
from chatwright.train.rl.ema import ema_of
from chatwright.train.rl.fixed_prompts import prompt_sets
from chatwright.train.rl.gold import gold_of
from chatwright.train.rl.models import RLModels, load_reward, make_models
from chatwright.train.rl.prompts import ask
from chatwright.train.rl.ptx import GeneralText
from chatwright.train.rl.step_program import PLAN
from chatwright.train.rl.training import PolicyTraining
from chatwright.train.stage_training import start_training
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Report, Unhealthy, Workspace

MOST_PROMPTS = 4_000
"""Prompts that are taken from the conversations."""


def train_policy(
    method: type[PolicyTraining[Any, Any]], config: RLConfig, workspace: Workspace, *, critic: str = "none"
) -> Report:
    """A whole run: load, make the models, iterate to the end, report. Raises UserError, Unhealthy,
    Interrupted."""
    title = method.title
    base = open_chat_base(config.base, workspace, purpose=f"{title.upper()} needs a model after sft")
    reward = load_reward(workspace.resolve(config.reward), base, config.min_correlation)
    records = records_of(workspace.resolve(config.data))
    dialogues = list(read_records(records / "dialogues-train.jsonl", Dialogue))
    asked = ask(title, config, dialogues, base, most=MOST_PROMPTS, plan=PLAN)
    config, prompts = asked.config, prompt_sets(asked.prompts, records, base, asked.config)
    gold, text = gold_of(config.gold, workspace.resolve, base), None
    if config.text:
        context = config.ptx_context or base.model.config.context
        text = GeneralText.open(workspace.resolve(config.text), base.tokenizer, context, workspace.seed)
    cut = f"{title} samples from whole weights, which this plan does not put together: use ddp, fsdp or hsdp"
    training = start_training(title, PLAN, config, workspace, base.model.config, refused={"tp": cut})
    trainer, models = trainer_and_models(config, workspace, base, reward, critic, training.parallel)
    if trainer.resume():
        # An iteration writes its row before its step is counted.
        workspace.metrics.forget_after(trainer.progress.step - 1)
    else:
        trainer.progress.extra = {"beta": config.beta, "best": None, "history": []}
    say(
        f"  {len(prompts.training):,} prompts; {config.iterations} iterations of {config.batch_size} "
        f"completions; KL budget {config.kl_budget:g} nats"
    )
    with Stopper().listening() as stopper:
        cause = asked.own.cause
        run = method(config, workspace, trainer, models, base, prompts, gold=gold, text=text, too_short=cause)
        if len(prompts.training) < (each := config.batch_size // run.per_prompt):
            times = f"{each / len(prompts.training):.1f} times"
            say(f"  fewer prompts than the {each} of an iteration: each is asked {times} in it")
        run.asked = lambda: stopper.asked
        try:
            run_iterations(run)
        except Unhealthy as found:
            asked.tell(found.report)
            raise
    report = asked.tell(run.report())
    report.warnings += doubts_of_reward(workspace.resolve(config.reward))
    return report


def doubts_of_reward(directory: Path) -> list[str]:
    """What the reward model's own stage warned of: a policy that follows it is as doubtful."""
    file = directory / "result.json"
    warned = files.read_json(file).get("warnings", []) if file.is_file() else []
    return [f"the score is only as good as the reward model, whose report says: {one}" for one in warned]


def run_iterations(run: PolicyTraining[Any, Any]) -> None:
    """Iterate to the end. Raises Interrupted when the run is asked to stop, after saving."""
    trainer, config = run.trainer, run.config
    with progress_bar(run.title) as bar:
        compiled, done = config.compile, 0
        while not run.finished:
            began = time.monotonic()
            line = run.iteration()
            done += 1
            if done == 2 and not run.finished:  # the first one compiles, and measures where the policy begins
                say_how_long(config, time.monotonic() - began, trainer.progress.step)
            if compiled:
                memory.trim_heap()  # the compiler has seen all shapes of a block by now
                compiled = False
            bar.update(trainer.progress.step / config.iterations, line)
            if run.parallel.all_reduce_max([float(run.asked())])[0]:
                if "average" not in run.extra:  # the run saved everything together with the EMA
                    if run.finished:
                        run.extra["history"].pop()  # the last iteration counts no step: it is repeated
                    trainer.save(protected=run.protected)
                where = f"saved at iteration {trainer.progress.step}"
                raise Interrupted(f"{run.title}: {where}; the same command goes on from there")


LONG = 600.0
"""Seconds; a run that will take longer says so after its second iteration."""


def say_how_long(config: RLConfig, spent: float, done: int) -> None:
    """Say how long the iterations that are left will take, where that is long, and what makes them shorter.
    An iteration took `spent` seconds."""
    left = config.iterations - done
    if left * spent < LONG:
        return
    ways = [
        f"{name} below {getattr(config, name)}" for name in ("iterations", "batch_size", "max_new_tokens")
    ]
    ways += [] if config.lora.rank else ["lora.rank 8"]
    took = (
        f"an iteration takes {seconds(spent)}: the {left} that are left take about {duration(left * spent)}"
    )
    say(f"  {took}; shorter: {', '.join(ways)}")


def trainer_and_models(
    config: RLConfig,
    workspace: Workspace,
    base: ChatBase,
    reward: ScalarModel,
    critic: str,
    parallel: ParallelContext,
) -> tuple[Trainer, RLModels]:
    """The models of a run, with adapters, distributed and compiled; and their trainer."""
    bodies = {"base": base.model, **({"judge": reward} if critic == "separate" else {})}
    adapter = adapters.metadata(config.lora, **bodies)
    precisions = {"precision": config.precision, "policy_precision": config.policy_precision}
    models = make_models(base, reward, critic, config.lora, **precisions)
    models.share(parallel)
    if config.compile:
        say(f"  {compile_blocks(*models.computing)}")
    return trainer_of(models, config, workspace, base, adapter), models


def trainer_of(
    models: RLModels, config: RLConfig, workspace: Workspace, base: Loaded, adapter: Mapping[str, Any]
) -> Trainer:
    """The trainer of the policy, of a critic if there is one, and of an EMA of the policy's weights if asked
    for. `adapter` is the adapters' metadata for checkpoints (`adapters.metadata`)."""
    assert base.tokenizer is not None and base.template is not None
    modules: dict[str, nn.Module] = {"model": models.policy}
    if models.critic is not None:
        modules["critic"] = models.critic
    if config.ema:
        modules["average"] = ema_of(models.policy)
    shape, tokenizer, template = base.model.config, base.tokenizer, base.template
    return Trainer(
        modules,
        config.optim,
        workspace,
        metadata=model_metadata("language", shape, tokenizer, template, adapter=adapter),
        texts=model_texts(tokenizer, template, base.generation or own_default()),
        parallel=models.parallel,
        frozen=models.frozen,
        keep=config.keep,
    )
