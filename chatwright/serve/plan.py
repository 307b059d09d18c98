"""The verb `plan`: memory, micro-batch, operations and time of a recipe's stages before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from chatwright import runtime
from chatwright.config import UsageError, UserError, build, parse
from chatwright.metrics import console, duration, say
from chatwright.pipeline import split_arguments
from chatwright.recipe import Recipe, Stage, find_recipe, module_of, parse_overrides, read_recipe

if TYPE_CHECKING:
    from chatwright.model.config import GPTConfig
    from chatwright.train.plan import Plan, Subject


@dataclass(frozen=True)
class PlanConfig:
    """What is planned beside the stages' own settings."""

    memory_gb: float = 0.0
    """Memory that may be used, in GB (10^9 bytes); 0: CHATWRIGHT_MEMORY where it is set, else 92 % of the machine's."""
    time: bool = True
    """Time each kind of operation on this machine: seconds for a small model, a minute for a large one."""


def main_plan(argv: Sequence[str]) -> int:
    """`chatwright plan RECIPE_OR_PRESET`; 1 when a stage fits in no way."""
    own = {field.name for field in fields(PlanConfig)} | {"config", "debug", "help"}
    plain, overrides = split_arguments(argv, own)
    config, positionals = parse(
        PlanConfig,
        plain,
        prog="chatwright plan",
        description="Predict memory and time of each training stage and the micro-batch that fits. Nothing is trained. Any "
        "setting of a stage can be given as --STAGE.KEY VALUE, for example --pretrain.fit.batch_size 32.",
        positionals={
            "recipe_or_preset": "A recipe (a .yaml file, or the name of a built-in one), or the name of a model "
            "shape, planned for pre-training."
        },
    )
    if config.memory_gb < 0:
        raise UsageError(f"memory_gb is {config.memory_gb:g}; it must be above 0, or 0 for the machine's")
    from chatwright.train.plan import choose

    runtime.set_threads()
    runtime.tune_allocator()
    plans, refusals = [], []
    for subject in subjects(_recipe(str(positionals["recipe_or_preset"]), parse_overrides(overrides))):
        try:
            plans.append(choose(subject, timed=config.time, available=config.memory_gb * 1e9 or None))
        except UserError as refusal:
            refusals.append(str(refusal))
    if not plans and not refusals:
        raise UserError("nothing to plan: the recipe trains no model whose shape it names")
    _show(plans)
    for text in refusals:
        say(f"does not fit: {text}")
    return 1 if refusals else 0


def _recipe(name: str, overrides: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe of this name, or one that pre-trains the shape of this name."""
    from chatwright.model.config import PRESETS

    if name not in PRESETS:
        return read_recipe(find_recipe(name), overrides)
    if set(overrides) - {"pretrain"}:
        raise UsageError(
            "a shape is planned for pre-training: settings look like --pretrain.fit.batch_size 32"
        )
    config = build(
        module_of("pretrain").Config, {"preset": name, **overrides.get("pretrain", {})}, where="pretrain"
    )
    return Recipe(name, {"pretrain": Stage("pretrain", "pretrain", config)})


def subjects(recipe: Recipe) -> Iterator[Subject]:
    """The training stages whose model's shape the recipe tells."""
    from chatwright.train.plan import PLANNED, Subject

    for stage, shape in shapes_of(recipe):
        if stage.verb in PLANNED:
            yield Subject(stage.name, stage.verb, shape, stage.config)


def shapes_of(recipe: Recipe) -> Iterator[tuple[Stage, GPTConfig]]:
    """Each stage that makes or trains a model, and the model's shape. Raises UserError where there can be no such shape."""
    from chatwright.model.config import GPTConfig

    shapes: dict[str, GPTConfig] = {}
    for stage in recipe.stages.values():
        shape = shapes.get(getattr(stage.config, "base", ""))
        if stage.verb == "pretrain":
            source = recipe.stages.get(stage.config.tokenizer)
            size = (
                {"vocab_size": source.config.vocab_size}
                if source is not None and source.verb == "tokenizer"
                else {}
            )
            try:
                shape = GPTConfig.preset(stage.config.preset, **{**stage.config.model, **size})
            except TypeError as error:
                raise UserError(f"{stage.name}: {error}") from None
        if shape is not None:
            shapes[stage.name] = shape
            yield stage, shape


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
        "tokens", *(f"{plan.expected_steps * plan.batch * plan.length / 1e6:,.1f} M" for plan in plans)
    )
    table.add_row(
        "time of the steps",
        *(duration(plan.expected_steps * plan.seconds) if plan.seconds else "-" for plan in plans),
    )
    console.print(table)
    available = plans[0].available
    if available is not None:
        say(f"memory there is to plan with: {available / 1e9:,.1f} GB")
