"""`chatwright doctor`'s checks of a recipe: stages and their inputs, data, model shapes, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from chatwright import compiler, memory
from chatwright.commands.doctor.finding import Finding
from chatwright.commands.doctor.machine import gigabytes
from chatwright.config import UsageError, UserError
from chatwright.data import archives, sources
from chatwright.data.catalogue import Kind, find
from chatwright.data.records import is_record_file
from chatwright.model.config import GPTConfig
from chatwright.recipe import Recipe, RecipeStage, find_recipe, read_recipe, shape_of
from chatwright.stages import data
from chatwright.train.planning.plan import Plan, choose
from chatwright.train.planning.program import PlannedStage


def check_recipe(name: str) -> list[Finding]:
    """Findings about a recipe. Raises UsageError when there is no such recipe."""
    path = find_recipe(name)
    try:
        recipe = read_recipe(path, {})
    except UserError as error:
        return [
            Finding(
                "problem",
                "recipe",
                str(error),
                "correct it; `chatwright VERB --help` lists a stage's settings",
            )
        ]
    stages = list(recipe.stages.values())
    findings = [
        Finding("ok", "recipe", f"{path}: {' -> '.join(stage.name for stage in stages)}, seed {recipe.seed}")
    ]
    for stage in stages:
        findings += _inputs(stage, recipe)
        findings += _portions(stage)
        if isinstance(stage.config, data.Config):
            findings += _data(stage, recipe)
    shapes = _shapes(recipe, findings)
    for stage in stages:
        findings += _lengths(stage, recipe, shapes)
    findings += _memory(recipe, shapes)
    return findings


def _inputs(stage: RecipeStage, recipe: Recipe) -> Iterator[Finding]:
    """Each input must be a stage of the recipe that comes before, a path, or a model by name. One that a
    stage can do without may be missing under its usual name."""
    left_out = [f.default for f in fields(stage.config) if f.metadata.get("optional")]
    for name in stage.inputs:
        there = Path(name).exists() or is_record_file(name)
        if name in recipe.stages or there or name == "smollm2" or name.startswith("hf:"):
            continue
        if name in left_out:
            continue
        known = ", ".join(other for other in recipe.stages if other != stage.name) or "none"
        yield Finding(
            "problem",
            stage.name,
            f"its input {name!r} is neither a stage of this recipe nor an existing path",
            f"add that stage, or name one of: {known}",
        )


def _portions(stage: RecipeStage) -> Iterator[Finding]:
    """Length of training and size of the batches, and whether a compiler is missing."""
    fit = getattr(stage.config, "fit", None)
    if fit is None:
        return
    try:
        fit.check(stage.config.optim.schedule)
    except UsageError as error:
        yield Finding("problem", stage.name, str(error), f"correct {stage.name}.fit in the recipe")
        return
    length = f"{fit.steps:,} steps" if fit.steps else f"about {fit.seconds / 60:.1f} minutes"
    micro = f" in portions of {fit.micro_batch}" if fit.micro_batch else ""
    yield Finding("ok", stage.name, f"{length} of {fit.batch_size} samples each{micro}")
    if fit.compile and (missing := compiler.compiler_missing()):
        yield Finding(
            "warning", stage.name, f"it would be compiled, but {missing}", "install one: training is faster"
        )


def _data(stage: RecipeStage, recipe: Recipe) -> Iterator[Finding]:
    """The sources of a data stage: whether they exist, are of the right kind, and must be downloaded."""
    config, named = stage.config, data.sources_of(stage.config)
    wanted: list[tuple[str, Kind, Any]] = [
        ("text", "text", sources.documents),
        ("dialogues", "dialogue", partial(sources.dialogues, format=config.dialogue_format)),
        ("ratings", "labelled", sources.labelled_texts),
        ("comparisons", "comparison", partial(sources.comparisons, format=config.comparison_format)),
    ]
    for setting, kind, read in wanted:
        if named[setting]:
            for spec in sources.split_specs(named[setting]):
                yield _source(stage, setting, spec, kind, read)
    needed: dict[str, list[str]] = {}
    for other in recipe.stages.values():
        for records, source in other.stage.reads(other.config).items():
            if source == stage.name:
                needed.setdefault(records, []).append(other.name)
    for records, users in needed.items():
        if not named[records]:
            yield Finding(
                "problem",
                stage.name,
                f"`{records}` is empty, but {', '.join(users)} learns from them",
                f"name a source of {records}: `chatwright data list`, a file or folder of your own, "
                "hf:owner/name",
            )


def _source(stage: RecipeStage, setting: str, spec: str, kind: Kind, read: Any) -> Finding:
    topic = f"{stage.name}.{setting}"
    try:
        source = find(spec)
    except UserError as error:
        return Finding("problem", topic, str(error), "mend or remove that package, or name another source")
    if source is not None:
        if kind not in source.kinds:
            return Finding(
                "problem",
                topic,
                f"{spec} holds {' and '.join(source.kinds)} records, not {kind}",
                "chatwright data list names the kinds",
            )
        if source.archive is None:
            return Finding("ok", topic, f"{spec} finds its data by itself ({source.licence})")
        if (archives.cache_dir() / "archives" / source.archive.filename).is_file():
            return Finding("ok", topic, f"{spec} is in the cache ({source.licence})")
        return Finding(
            "ok", topic, f"{spec} will be downloaded: {gigabytes(source.archive.size)} ({source.licence})"
        )
    if spec.startswith("hf:"):
        return Finding("ok", topic, f"{spec} will be read from the hub; not looked at now")
    try:
        next(read(spec))
    except (UserError, StopIteration) as error:
        return Finding(
            "problem", topic, str(error) or f"{spec}: nothing to read in it", "correct the path or the file"
        )
    return Finding("ok", topic, f"{spec}: its first record can be read")


def _shapes(recipe: Recipe, findings: list[Finding]) -> dict[str, GPTConfig]:
    """The model's shape for each stage that makes or trains a model. Adds findings for impossible shapes."""
    shapes: dict[str, GPTConfig] = {}
    for stage in recipe.stages.values():
        try:
            shape = shape_of(stage, recipe, shapes)
        except UserError as error:
            findings.append(Finding("problem", stage.name, str(error), "correct `preset` and `model`"))
            continue
        if shape is not None:
            shapes[stage.name] = shape
    return shapes


def _lengths(stage: RecipeStage, recipe: Recipe, shapes: dict[str, GPTConfig]) -> Iterator[Finding]:
    """Whether a stage's sequences fit into the context. For a stage that makes a model, also whether the
    token table is too large and the context too short."""
    shape = shapes.get(stage.name)
    if shape is None:
        return
    if stage.stage.shape is not None:
        table = shape.vocab_size * shape.width
        share = table / max(1, parameters(shape))
        if share > 0.5:
            yield Finding(
                "warning",
                stage.name,
                f"{100 * share:.0f} % of the parameters are the token table",
                f"a smaller vocabulary than {shape.vocab_size:,} (tokenizer.vocab_size) leaves more to think "
                "with",
            )
        if shape.context < 64:
            yield Finding(
                "warning",
                stage.name,
                f"a context of {shape.context} tokens is a sentence or two",
                "conversations want 128 or more",
            )
    config = stage.config
    parts = [
        (name, getattr(config, name, 0)) for name in ("max_prompt_tokens", "max_new_tokens", "max_tokens")
    ]
    longest = sum(size for _, size in parts)
    if longest > shape.context:
        told = " + ".join(f"{name} {size}" for name, size in parts if size)
        yield Finding(
            "problem",
            stage.name,
            f"{told} do not fit into the model's context of {shape.context}",
            "lower them, or give the model a longer context (pretrain.model.context)",
        )


def parameters(shape: GPTConfig) -> int:
    """Number of parameters of a shape, counted on a model on the meta device (no memory)."""
    import torch

    from chatwright.model.gpt import GPT

    with torch.device("meta"):
        return GPT(shape).parameter_count()


def _memory(recipe: Recipe, shapes: dict[str, GPTConfig]) -> Iterator[Finding]:
    """Compare the planner's prediction for the largest stage with the machine's memory, and the size of the
    checkpoints with the free disk space."""
    plans: list[Plan] = []
    for name, shape in shapes.items():
        stage = recipe.stages[name]
        if stage.stage.plan is None:
            continue
        planned = PlannedStage(name, stage.stage.plan, shape, stage.config)
        try:
            plans.append(choose(planned, timed=False))
        except UserError as refusal:
            yield Finding("problem", "memory", str(refusal), "`chatwright plan` shows every stage")
    if plans:
        largest = max(plans, key=lambda plan: plan.total)
        have = memory.memory_budget_bytes()
        text = f"about {gigabytes(largest.total)} for {largest.stage}, the largest stage"
        yield Finding(
            "ok", "memory", text + (f"; there is {gigabytes(have)} to give" if have is not None else "")
        )
    disk = sum(_checkpoint_bytes(recipe.stages[plan.stage], plan.parameters) for plan in plans)
    if not disk:
        return
    free = shutil.disk_usage(Path.cwd()).free
    if disk > free:
        yield Finding(
            "problem",
            "disk",
            f"checkpoints take {gigabytes(disk)}, {gigabytes(free)} are free here",
            "free some, or give --out on another disk",
        )
    else:
        yield Finding(
            "ok", "disk", f"checkpoints take about {gigabytes(disk)}, {gigabytes(free)} are free here"
        )


def _checkpoint_bytes(stage: RecipeStage, parameters: float) -> float:
    """Bytes of a stage's checkpoints: weights and two moments in float32, for each checkpoint that is kept
    and for one being written."""
    keep = getattr(getattr(stage.config, "fit", stage.config), "keep", 2)
    return 12 * parameters * (keep + 1)
