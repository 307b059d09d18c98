"""What `chatwright doctor` looks at in a recipe: stages and their inputs, data, shapes that must fit, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatwright import runtime
from chatwright.config import UsageError, UserError
from chatwright.data import archives, sources
from chatwright.recipe import Recipe, Stage, find_recipe, read_recipe
from chatwright.serve.doctor import Finding
from chatwright.serve.doctor_machine import gigabytes

if TYPE_CHECKING:
    from chatwright.model.config import GPTConfig

COPIES = {"pretrain": 1.0, "sft": 1.0, "reward": 1.0, "classifier": 1.0, "ppo": 2.5, "reinforce": 1.5}
"""Trained models a stage holds: PPO trains policy and critic and keeps the frozen reference and reward model,
REINFORCE has no critic."""


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
        if stage.verb == "data":
            findings += _data(stage, recipe)
    shapes = dict(_shapes(recipe, findings))
    for stage in stages:
        findings += _lengths(stage, recipe, shapes)
    findings += _memory(recipe, shapes)
    return findings


def _inputs(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """Each input must be a stage of the recipe that comes before, a path, or a model by name."""
    for name in stage.inputs:
        if name in recipe.stages or Path(name).exists() or name == "smollm2" or name.startswith("hf:"):
            continue
        known = ", ".join(other for other in recipe.stages if other != stage.name) or "none"
        yield Finding(
            "problem",
            stage.name,
            f"its input {name!r} is neither a stage of this recipe nor an existing path",
            f"add that stage, or name one of: {known}",
        )


def _portions(stage: Stage) -> Iterator[Finding]:
    """Length of training, batches, and how long it will take."""
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
    if fit.compile and (missing := runtime.compiler_missing()):
        yield Finding(
            "warning", stage.name, f"it would be compiled, but {missing}", "install one: training is faster"
        )


def _data(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """The sources of a data stage: known, of the right kind, and whether they must be downloaded."""
    config = stage.config
    wanted: list[tuple[str, str, sources.Kind, Any]] = [
        ("text", config.path or config.text, "text", sources.documents),
        (
            "dialogues",
            config.dialogues,
            "dialogue",
            partial(sources.dialogues, format=config.dialogue_format),
        ),
        ("ratings", config.ratings, "labelled", sources.labelled_texts),
        (
            "comparisons",
            config.comparisons,
            "comparison",
            partial(sources.comparisons, format=config.comparison_format),
        ),
    ]
    for setting, specs, kind, read in wanted:
        if specs:
            for spec in sources.split_specs(specs):
                yield _source(stage, setting, spec, kind, read)
    for setting, verbs in (
        ("dialogues", ("sft", "ppo", "reinforce", "bestofn", "eval")),
        ("ratings", ("reward", "classifier")),
    ):
        users = [
            other.name
            for other in recipe.stages.values()
            if other.verb in verbs
            and stage.name in other.inputs
            and not getattr(other.config, "comparisons", "")
        ]
        if users and not getattr(config, setting):
            yield Finding(
                "problem",
                stage.name,
                f"`{setting}` is empty, but {', '.join(users)} learns from them",
                f"name a source of {setting} (chatwright data list)",
            )
    users = [
        other.name
        for other in recipe.stages.values()
        if getattr(other.config, "comparisons", "") == stage.name
    ]
    if users and not config.comparisons:
        yield Finding(
            "problem",
            stage.name,
            f"`comparisons` is empty, but {', '.join(users)} learns from them",
            "name a file or folder of comparisons, or hf:owner/name (docs/alignment.md)",
        )


def _source(stage: Stage, setting: str, spec: str, kind: sources.Kind, read: Any) -> Finding:
    topic = f"{stage.name}.{setting}"
    named = {source.name: source for source in sources.catalogue()}
    if spec in named:
        source = named[spec]
        if kind not in source.kinds:
            return Finding(
                "problem",
                topic,
                f"{spec} holds {' and '.join(source.kinds)} records, not {kind}",
                "chatwright data list names the kinds",
            )
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


def _shapes(recipe: Recipe, findings: list[Finding]) -> Iterator[tuple[str, GPTConfig]]:
    """The shape of the model of each stage that makes or trains one; findings where there can be none."""
    from chatwright.model.config import GPTConfig

    shapes: dict[str, GPTConfig] = {}
    for stage in recipe.stages.values():
        shape = shapes.get(getattr(stage.config, "base", "")) or shapes.get(
            getattr(stage.config, "policy", "")
        )
        if stage.verb == "pretrain":
            source = recipe.stages.get(stage.config.tokenizer)
            size = source.config.vocab_size if source is not None and source.verb == "tokenizer" else None
            changes = {**stage.config.model, **({"vocab_size": size} if size else {})}
            try:
                shape = GPTConfig.preset(stage.config.preset, **changes)
            except (UserError, TypeError) as error:
                findings.append(Finding("problem", stage.name, str(error), "correct `preset` and `model`"))
        elif stage.verb == "tokenizer" and stage.config.vocab_size < 264:
            findings.append(
                Finding(
                    "problem",
                    stage.name,
                    f"vocab_size {stage.config.vocab_size} is too small",
                    "256 bytes and 8 control tokens need 264",
                )
            )
        if shape is not None:
            shapes[stage.name] = shape
            yield stage.name, shape


def _lengths(stage: Stage, recipe: Recipe, shapes: dict[str, GPTConfig]) -> Iterator[Finding]:
    """What a stage feeds its model must fit into the context."""
    shape = shapes.get(stage.name)
    if shape is None:
        return
    if stage.verb == "pretrain":
        table = shape.vocab_size * shape.width
        share = table / max(1, parameters(shape))
        if share > 0.5:
            yield Finding(
                "warning",
                stage.name,
                f"{100 * share:.0f} % of the parameters are the token table",
                f"a smaller vocabulary than {shape.vocab_size:,} (tokenizer.vocab_size) leaves more to think with",
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
    """Number of parameters of a shape, counted on a model without memory."""
    import torch

    from chatwright.model.gpt import GPT

    with torch.device("meta"):
        return GPT(shape).parameter_count()


def activation_bytes(shape: GPTConfig, samples: int) -> int:
    """Roughly what a forward pass keeps for its backward pass, and the working copies beside it.

    Per token and layer the float32 inputs of every product and norm (about 10 widths and 3 MLP widths), per token two
    rows of logits; all of it twice, for copies in bf16 and what the allocator holds. On recipes/tiny.yaml this is
    within a third of the measured peak of each stage.
    """
    token = 4 * shape.layers * (10 * shape.width + 3 * shape.mlp_width) + 2 * 4 * shape.vocab_size
    return 2 * samples * shape.context * token


def _memory(recipe: Recipe, shapes: dict[str, GPTConfig]) -> Iterator[Finding]:
    """The largest stage against the machine's memory, and the checkpoints against the disk."""
    needs: dict[str, float] = {}
    disk = 0
    for name, shape in shapes.items():
        config, verb = recipe.stages[name].config, recipe.stages[name].verb
        if verb not in COPIES:
            continue
        count = parameters(shape)
        fit = getattr(config, "fit", None)
        samples = (fit.micro_batch or fit.batch_size) if fit is not None else config.minibatch_size
        samples *= config.k if verb == "reward" else 1
        needs[name] = 16 * count * COPIES[verb] + activation_bytes(shape, samples)
        disk += 12 * count * ((fit.keep if fit is not None else 2) + 1)
    if not needs:
        return
    name = max(needs, key=lambda key: needs[key])
    have = runtime.total_memory_bytes()
    text = f"about {gigabytes(needs[name] + 5e8)} for {name}, the largest stage"
    if have is not None and needs[name] + 5e8 > 0.9 * have:
        yield Finding(
            "problem" if needs[name] > 1.5 * have else "warning",
            "memory",
            f"{text}; there is {gigabytes(have)}",
            f"set {name}.fit.micro_batch (changes no result), or choose a smaller shape",
        )
    else:
        yield Finding("ok", "memory", text + (f"; there is {gigabytes(have)}" if have is not None else ""))
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
