"""Predict memory and time of a recipe, a stage or a model's shape, before a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatwright import discovery, memory, runtime
from chatwright.commands._plan_lengths import with_lengths
from chatwright.config import UsageError, UserError, parse_all
from chatwright.metrics import console, duration, say
from chatwright.model.config import PRESETS
from chatwright.model_names import near_hub
from chatwright.recipe import Recipe, RecipeStage, find_stage, parse_with_recipe, planned_stages

if TYPE_CHECKING:
    from chatwright.train.planning.plan import Plan


@dataclass(frozen=True)
class PlanConfig:
    """What is planned beside the stages' own settings."""

    memory_gb: float = 0.0
    """Memory that may be used, in GB (10^9 bytes); 0: CHATWRIGHT_MEMORY where it is set, else 92 % of the
    machine's."""
    time: bool = True
    """Time each kind of operation on this machine: seconds for a small model, a minute for a large one."""


def main(argv: Sequence[str]) -> int:
    """`chatwright plan RECIPE`, `plan STAGE` or `plan PRESET`; returns 1 if a stage does not fit. Raises
    UserError."""
    config, recipe = _asked(argv)
    if config.memory_gb < 0:
        raise UsageError(f"memory_gb is {config.memory_gb:g}; it must be above 0, or 0 for the machine's")
    from chatwright.train.planning.plan import choose

    runtime.set_threads()
    memory.tune_allocator()
    plans, refusals = [], []
    for one in planned_stages(recipe):
        try:
            planned, lengths = with_lengths(one, recipe)
            if lengths:
                say(lengths)
            plans.append(choose(planned, timed=config.time, available=config.memory_gb * 1e9 or None))
        except UserError as refusal:
            refusals.append(str(refusal))
    if not plans and not refusals:
        raise UserError(_nothing(recipe))
    _show(plans)
    for text in refusals:
        say(f"does not fit: {text}")
    return 1 if refusals else 0


def _asked(argv: Sequence[str]) -> tuple[PlanConfig, Recipe]:
    """What to plan: a recipe, or a single stage or shape as a recipe of its own. Raises UsageError."""
    first = argv[0] if argv else ""
    verb = discovery.current_name(first)
    if verb in discovery.stages() and verb not in PRESETS and not Path(first).is_file():
        stage = find_stage(verb)
        if stage.plan is None:
            raise UsageError(f"the stage {verb} trains nothing that could be planned")
        (settings, config), _ = parse_all(
            (stage.config, PlanConfig),
            argv[1:],
            f"chatwright plan {verb}",
            f"Predict what the stage {verb} takes on this machine: memory, micro-batch, time.",
            renamed=stage.renamed,
        )
        return config, Recipe(verb, {verb: RecipeStage(verb, verb, settings)})
    config, _, recipe = parse_with_recipe(
        PlanConfig,
        argv,
        prog="chatwright plan",
        description="Predict what each training stage of a recipe, a single stage (plan sft --base smollm2 "
        "--lora.rank 8), or pre-training a shape takes on this machine: memory, micro-batch, time. Settings "
        "of a recipe's stages follow as --STAGE.KEY VALUE, of a stage as --KEY VALUE, of a shape as "
        "--pretrain.KEY VALUE.",
        presets=list(PRESETS),
    )
    return config, recipe


def _nothing(recipe: Recipe) -> str:
    """Why there is nothing to plan, and what to do."""
    trained = [stage for stage in recipe.stages.values() if stage.stage.plan is not None]
    if not trained:
        return "nothing to plan: the recipe trains no model"
    name, base = trained[0].name, str(getattr(trained[0].config, "base", ""))
    setting = "--base" if len(recipe.stages) == 1 and name == recipe.name else f"--{name}.base"
    hint = near_hub(base) or f"; name one whose shape is known, for example {setting} smollm2"
    return f"nothing to plan: {name} starts from {base!r}, which is no model that is there yet{hint}"


def _show(plans: Sequence[Plan]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not plans:
        return
    parts = list(dict.fromkeys(part for plan in plans for part in plan.memory))
    table = Table(title="Predicted, per process", title_justify="left")
    table.add_column("")
    for plan in plans:
        table.add_column(Text(plan.stage), justify="right")
    table.add_row("parameters", *(f"{plan.parameters / 1e6:,.1f} M" for plan in plans))
    table.add_section()
    for part in parts:
        table.add_row(part, *(f"{plan.memory.get(part, 0.0) / 1e6:,.0f} MB" for plan in plans))
    table.add_row("memory", *(f"{plan.total / 1e6:,.0f} MB" for plan in plans))
    table.add_section()
    table.add_row("batch", *(f"{plan.batch:,} x {plan.length:,} tokens" for plan in plans))
    table.add_row("micro-batch", *(f"{plan.micro:,}" for plan in plans))
    table.add_row("GFLOP a step", *(f"{plan.flop / 1e9:,.1f}" for plan in plans))
    table.add_row(
        "seconds a step", *("-" if plan.seconds is None else f"{plan.seconds:.3g}" for plan in plans)
    )
    table.add_row("steps", *(f"{plan.expected_steps:,}" if plan.expected_steps else "-" for plan in plans))
    table.add_row(
        "tokens",
        *(
            f"{plan.expected_steps * plan.batch * plan.length / 1e6:,.1f} M" if plan.expected_steps else "-"
            for plan in plans
        ),
    )
    table.add_row(
        "time of the steps",
        *(duration(plan.expected_steps * plan.seconds) if plan.seconds else "-" for plan in plans),
    )
    console.print(table)
    available = plans[0].available
    if available is not None:
        say(f"memory there is to plan with: {available / 1e9:,.1f} GB")
