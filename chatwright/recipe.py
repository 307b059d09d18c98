"""Recipes: which stages there are, in which order they come, and with which settings.

A stage's settings name the stages it needs (fields marked as inputs), and these make the order.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from chatwright.config import UsageError, build, check_keys, near_match, read_yaml

STAGES = {
    "data": "chatwright.train.data",
    "tokenizer": "chatwright.train.tokenizer",
    "pretrain": "chatwright.train.pretrain",
    "sft": "chatwright.train.sft",
    "reward": "chatwright.train.reward",
    "classifier": "chatwright.train.classifier",
    "ppo": "chatwright.train.ppo",
    "reinforce": "chatwright.train.reinforce",
    "bestofn": "chatwright.evaluate.best_of_n",
    "eval": "chatwright.evaluate.replies",
}
"""Verb -> the module with its Config and run."""

PROMPT = "Hi! How are you today?"


@dataclass(frozen=True)
class Stage:
    """One entry of a recipe."""

    name: str
    verb: str
    config: Any

    @property
    def inputs(self) -> list[str]:
        """What its settings name as inputs: stages or paths."""
        return input_names(self.config)


@dataclass(frozen=True)
class Recipe:
    """A whole road."""

    name: str
    stages: dict[str, Stage]
    seed: int = 1337
    prompt: str = PROMPT


def input_names(config: Any) -> list[str]:
    """The values of a configuration's input fields, without those that name nothing (`words` of the field)."""
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("input")]
    return [value for f in fields if (value := getattr(config, f.name)) not in f.metadata.get("words", ())]


def module_of(verb: str, *, where: str = "") -> Any:
    """The module of a stage verb. Raises UsageError with a near match."""
    if verb not in STAGES:
        raise UsageError(f"{where}no stage is called {verb!r}{near_match(verb, list(STAGES))}")
    return importlib.import_module(STAGES[verb])


def find_recipe(name: str) -> Path:
    """A recipe file by path, or by its bare name out of the package (`tiny`). Raises UsageError."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = resources.files("chatwright") / "recipes"
    beside = Path(__file__).parent.parent / "recipes"  # a checkout keeps them at its top
    for folder in (Path(str(packaged)), beside):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(file.stem for folder in (Path(str(packaged)), beside) for file in folder.glob("*.yaml"))
    raise UsageError(
        f"no recipe {name!r}: no such file, and none of that name is built in{near_match(name, known)}"
    )


def read_recipe(path: Path, overrides: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """A recipe with overrides applied. Raises UsageError naming the stage and the setting that is wrong."""
    values = read_yaml(path)
    check_keys(values, ["name", "seed", "prompt", "stages"], where=str(path))
    entries = values.get("stages")
    if not isinstance(entries, dict) or not entries:
        raise UsageError(f"{path}: `stages` must be a mapping with at least one stage")
    check_keys(overrides, list(entries), where=f"{path.name} has no such stage")
    stages = {}
    for name, settings in entries.items():
        if settings is not None and not isinstance(settings, dict):
            raise UsageError(f"{path}: the settings of stage {name} must be a mapping")
        merged = _merge(dict(settings or {}), overrides.get(name, {}))
        verb = str(merged.pop("use", name))
        stages[name] = Stage(
            name, verb, build(module_of(verb, where=f"{path}: ").Config, merged, where=f"{path}: {name}")
        )
    seed = values.get("seed", 1337)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"{path}: seed is {seed!r}; it must be a whole number, at least 0")
    name = str(values.get("name") or path.stem)
    return Recipe(name, _ordered(stages, str(path)), seed, str(values.get("prompt", PROMPT)))


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = _merge(dict(values[key]), change) if both else change
    return values


def _ordered(stages: dict[str, Stage], where: str) -> dict[str, Stage]:
    """The stages so that each comes after those it needs, else as written. Raises UsageError on a circle."""
    done: dict[str, Stage] = {}
    left = dict(stages)
    while left:
        ready = next((s for s in left.values() if not any(name in left for name in s.inputs)), None)
        if ready is None:
            raise UsageError(f"{where}: the stages {', '.join(left)} wait for each other")
        done[ready.name] = left.pop(ready.name)
    return done


def parse_overrides(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`--ppo.iterations 3 --pretrain.fit.steps=5` -> {"ppo": {"iterations": 3}, ...}. Raises UsageError."""
    import yaml

    result: dict[str, dict[str, Any]] = {}
    pending = list(arguments)
    while pending:
        option = pending.pop(0)
        if not option.startswith("--") or "." not in option:
            raise UsageError(
                f"unexpected argument {option!r}; settings of a stage look like --ppo.iterations 20"
            )
        key, equals, text = option[2:].partition("=")
        if not equals:
            if not pending:
                raise UsageError(f"{option} needs a value")
            text = pending.pop(0)
        *path, last = key.split(".")
        target: dict[str, Any] = result
        for part in path:
            target = target.setdefault(part, {})
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            target[last] = text
    return result
