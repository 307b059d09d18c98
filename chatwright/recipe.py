"""Recipes: the stages of a run, their order and their settings.

A stage's settings name the stages that it needs (fields marked as inputs); the order follows from these.

A stage with `when: data.comparisons` is part of the run only where that setting of another stage is given.
Other stages may name it as an optional input all the same: they then have none.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from chatwright.config import (
    UsageError,
    UserError,
    build,
    check_keys,
    make_parser,
    near_match,
    not_a_mapping,
    parse_given,
    read_yaml,
    rename_settings,
)
from chatwright.discovery import current_name, stage_verb, tell_new_name
from chatwright.language_model import shape_of as model_shape
from chatwright.model.config import GPTConfig
from chatwright.model_names import is_known
from chatwright.setting_errors import not_text
from chatwright.train.planning.program import PlannedStage
from chatwright.train.stage import Stage, stage_of

PROMPT = "Hi! How are you today?"


@dataclass(frozen=True)
class RecipeStage:
    """One entry of a recipe."""

    name: str
    verb: str
    """The stage's name on the command line (discovery.py)."""
    config: Any

    @property
    def inputs(self) -> list[str]:
        """The inputs that its settings name: stages or paths."""
        return input_names(self.config)

    @property
    def stage(self) -> Stage:
        """The STAGE of its file. Raises UsageError when there is none."""
        return find_stage(self.verb)


@dataclass(frozen=True)
class Recipe:
    """The stages of a whole run, with its seed and its prompt for samples."""

    name: str
    stages: dict[str, RecipeStage]
    seed: int = 1337
    prompt: str = PROMPT
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Stages that are no part of this run -> the setting (`data.comparisons`) that was not given."""


def input_names(config: Any) -> list[str]:
    """The values of a configuration's input fields, except those that name no input (the field's `words`)."""
    return [getattr(config, f.name) for f in input_fields(config)]


def input_fields(config: Any) -> list[dataclasses.Field[Any]]:
    """A configuration's input fields, except those whose value names no input (the field's `words`)."""
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("input")]
    return [f for f in fields if getattr(config, f.name) not in f.metadata.get("words", ())]


def find_stage(verb: str, *, where: str = "") -> Stage:
    """The STAGE of a verb. Raises UsageError with a near match."""
    return stage_of(stage_verb(verb, where=where).load())


def find_recipe(name: str) -> Path:
    """A recipe file by path, or a built-in one by its name (`tiny`). Raises UsageError."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = resources.files("chatwright") / "recipes"
    beside = Path(__file__).parent.parent / "recipes"  # their place in a checkout of the repository
    for folder in (Path(str(packaged)), beside):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(file.stem for folder in (Path(str(packaged)), beside) for file in folder.glob("*.yaml"))
    raise UsageError(
        f"no recipe {name!r}: no such file, and none of that name is built in{near_match(name, known)}"
    )


def read_recipe(path: Path, overrides: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """A recipe with overrides applied. Raises UsageError naming the stage and the setting that is wrong."""
    values, entries = _read(path)
    check_keys(overrides, list(entries), where=f"{path.name} has no such stage")
    stages = {}
    conditions = {name: str(settings["when"]) for name, settings in entries.items() if "when" in settings}
    for name, settings in entries.items():
        verb, stage = _stage_named(name, settings, path)
        where = f"{path}: {name}"
        tell_new_name(str(settings.get("use", name)), where=where)
        given = {key: value for key, value in settings.items() if key not in ("use", "when")}
        merged = _merge(rename_settings(given, stage.renamed, where=where), overrides.get(name, {}))
        merged = rename_settings(merged, stage.renamed, where=where)
        stages[name] = RecipeStage(name, verb, build(stage.config, merged, where=where))
    seed = values.get("seed", 1337)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"{path}: seed is {seed!r}; it must be a whole number, at least 0")
    name = str(values.get("name") or path.stem)
    left_out = {one: setting for one, setting in conditions.items() if not _is_given(setting, stages, path)}
    for one in left_out:
        if one in overrides:
            raise UsageError(f"{one} has settings, but is no part of this run: give --{left_out[one]} too")
    ordered = _ordered(_without(stages, left_out, path), str(path))
    return Recipe(name, ordered, seed, str(values.get("prompt", PROMPT)), left_out)


def _is_given(setting: str, stages: Mapping[str, RecipeStage], path: Path) -> bool:
    """Whether a setting, written STAGE.KEY, has a value. Raises UsageError when there is no such setting."""
    stage, _, key = setting.partition(".")
    if stage not in stages or not hasattr(stages[stage].config, key):
        raise UsageError(f"{path}: `when: {setting}` names no setting of a stage of this recipe")
    return bool(getattr(stages[stage].config, key))


def _without(
    stages: Mapping[str, RecipeStage], left_out: Mapping[str, str], path: Path
) -> dict[str, RecipeStage]:
    """The stages without those left out; optional inputs that name one of these become empty. Raises
    UsageError for a stage that cannot do without."""
    kept = {}
    for name, stage in stages.items():
        if name in left_out:
            continue
        changes: dict[str, str] = {}
        for one in dataclasses.fields(stage.config):
            wanted = getattr(stage.config, one.name)
            if not one.metadata.get("input") or wanted not in left_out:
                continue
            if "" not in one.metadata.get("words", ()):
                raise UsageError(
                    f"{path}: {name} needs the stage {wanted}, which is left out without {left_out[wanted]}"
                )
            changes[one.name] = ""
        kept[name] = dataclasses.replace(stage, config=dataclasses.replace(stage.config, **changes))
    return kept


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A recipe file's values, and its stages' settings by name. Raises UsageError."""
    values = read_yaml(path)
    check_keys(values, ["name", "seed", "prompt", "stages"], where=str(path))
    for key in ("name", "prompt"):
        if not isinstance(values.get(key, ""), str):
            raise UsageError(f"{path}: {not_text(key, values[key])}")
    entries = values.get("stages")
    if not isinstance(entries, dict) or not entries:
        raise UsageError(f"{path}: `stages` must be a mapping with at least one stage")
    for name, settings in entries.items():
        if settings is not None and not isinstance(settings, dict):
            raise UsageError(
                f"{path}: the settings of stage {name} must be a mapping: {not_a_mapping(settings)}"
            )
    return values, {str(name): dict(settings or {}) for name, settings in entries.items()}


def _stage_named(name: str, settings: Mapping[str, Any], path: Path) -> tuple[str, Stage]:
    """The verb of a recipe's entry (its `use`, else the entry's name), and the verb's STAGE. Raises
    UsageError."""
    verb = current_name(str(settings.get("use", name)))
    return verb, find_stage(verb, where=f"{path}: ")


def parse_with_recipe(
    cls: type[Any], argv: Sequence[str], *, prog: str, description: str, presets: Sequence[str] = ()
) -> tuple[Any, str, Recipe]:
    """Settings of type `cls`, the recipe's name, and the recipe with the changes in `argv`.

    The first argument is the recipe. The settings of its stages become options of the same parser. The first
    argument may also be one of `presets`, the shape of a model; the recipe then only pre-trains this model.
    Raises UsageError.
    """
    positionals = {
        "recipe": "A YAML file, or the name of a built-in recipe (tiny)"
        + (", or of a model's shape." if presets else ".")
    }
    name = argv[0] if argv and not argv[0].startswith("-") else None
    parser = make_parser(prog, description, positionals)
    parser.add_class_arguments(cls, nested_key=None, fail_untyped=False)
    own = [field.name for field in dataclasses.fields(cls)]
    stages: dict[str, Stage] = {}
    if name in presets:
        stages = {"pretrain": find_stage("pretrain")}
    elif name is not None:
        path = find_recipe(name)
        stages = {entry: _stage_named(entry, settings, path)[1] for entry, settings in _read(path)[1].items()}
    for entry, stage in stages.items():
        parser.add_class_arguments(stage.config, nested_key=entry, fail_untyped=False)
        for old in stage.renamed:
            parser.add_argument(f"--{entry}.{old}", type=str, default=None, help=argparse.SUPPRESS)
    given = parse_given(parser, argv)
    overrides = {entry: given[entry] for entry in stages if given.get(entry)}
    config = build(cls, {key: given[key] for key in own if key in given}, where=prog)
    if name in presets:
        settings = build(
            stages["pretrain"].config, {"preset": name, **overrides.get("pretrain", {})}, where="pretrain"
        )
        return (
            config,
            str(name),
            Recipe(str(name), {"pretrain": RecipeStage("pretrain", "pretrain", settings)}),
        )
    return config, str(name), read_recipe(find_recipe(str(name)), overrides)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = _merge(dict(values[key]), change) if both else change
    return values


def _ordered(stages: dict[str, RecipeStage], where: str) -> dict[str, RecipeStage]:
    """The stages, each after those it needs, else in the order written. Raises UsageError on a cycle."""
    done: dict[str, RecipeStage] = {}
    left = dict(stages)
    while left:
        ready = next((s for s in left.values() if not any(name in left for name in s.inputs)), None)
        if ready is None:
            raise UsageError(f"{where}: the stages {', '.join(left)} wait for each other")
        done[ready.name] = left.pop(ready.name)
    return done


def shape_of(entry: RecipeStage, recipe: Recipe, known: Mapping[str, GPTConfig]) -> GPTConfig | None:
    """The shape of the model that a stage makes or trains; None if the recipe does not determine it.

    `known`: the shapes of the stages before it. Raises UserError for impossible settings of a model.
    """
    if entry.stage.shape is None:
        inside = next((known[name] for name in entry.inputs if name in known), None)
        return inside or _shape_of_base(entry)
    source = recipe.stages.get(getattr(entry.config, "tokenizer", ""))
    return entry.stage.shape(entry.config, getattr(source.config, "vocab_size", None) if source else None)


def _shape_of_base(entry: RecipeStage) -> GPTConfig | None:
    """The shape of a base model that no stage of the recipe makes: one that is on the disk, `smollm2`, or on
    the hub. None where the stage has no such base, or it is not there yet."""
    base = str(getattr(entry.config, "base", ""))
    if entry.stage.plan is None or not (is_known(base) or Path(base).exists()):
        return None
    return model_shape(base)


def planned_stages(recipe: Recipe) -> Iterator[PlannedStage]:
    """The training stages of a recipe whose model's shape is known. Raises UserError on impossible shapes."""
    shapes: dict[str, GPTConfig] = {}
    for entry in recipe.stages.values():
        try:
            shape = shape_of(entry, recipe, shapes)
        except UserError as error:
            raise UserError(f"{entry.name}: {error}") from None
        if shape is not None:
            shapes[entry.name] = shape
            if entry.stage.plan is not None:
                yield PlannedStage(entry.name, entry.stage.plan, shape, entry.config)
