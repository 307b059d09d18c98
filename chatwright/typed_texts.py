"""Texts stay as they were typed. jsonargparse reads every value as YAML, in which `null`, `~`, `# one` and
`[1, 2]` are no texts.

So it never sees them: each value of a setting that is a text is replaced by a stand-in, a word that no
reader takes for anything else, and gets its own text back once everything is parsed. Which settings are
texts follows from their types alone, so that a new one needs nothing. Values of other types (numbers,
switches, choices, mappings) are read as before.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar, Union

from chatwright import broken_yaml, setting_errors

Made = TypeVar("Made")

OPTION = re.compile(r"--([A-Za-z][\w.\-]*)(\+?)(?:=|\Z)")
"""An option, perhaps with its value behind `=`. A word with a space before that is a text."""
UNKNOWN = re.compile(r"-[^\d.\s-]\S*")
"""What looks like a short option, which no verb has: `-x`, but neither `-5` nor `- item`."""
ALONE = ("help", "debug", "print_config")
"""Options without a value."""
TRUTH = ("true", "false", "yes", "no")
"""What may stand behind a switch as its value."""


class NotText(ValueError):
    """A value in YAML that is no text, where a text is wanted."""


def is_text(hint: Any) -> bool:
    """Whether a setting of this type is a text, a path, or one of them or nothing."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = set(typing.get_args(hint)) - {type(None)}
        return bool(kinds) and kinds <= {str, Path}
    return hint in (str, Path)


def are_texts(hint: Any) -> bool:
    """Whether a setting of this type is a list of texts, perhaps an optional one."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not type(None)]
        return len(kinds) == 1 and are_texts(kinds[0])
    inner = [one for one in typing.get_args(hint) if one is not Ellipsis]
    return typing.get_origin(hint) in (list, tuple, Sequence) and bool(inner) and all(map(is_text, inner))


def is_optional(hint: Any) -> bool:
    """Whether a setting of this type may be null."""
    return type(None) in typing.get_args(hint)


class StandIns:
    """The words that stand for texts while they are parsed."""

    def __init__(self) -> None:
        self._mark = f"text{secrets.token_hex(8)}n"  # nobody can have typed it
        self._pattern = re.compile(f"{self._mark}([0-9]+)_")
        self._texts: list[str] = []

    def put(self, text: str) -> str:
        """The stand-in for a text."""
        self._texts.append(text)
        return f"{self._mark}{len(self._texts) - 1}_"

    def restored(self, value: Any) -> Any:
        """The value with every stand-in replaced by its text, inside mappings and lists and inside other text
        (error messages) too."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._texts[int(found[1])], value)
        if isinstance(value, PurePath):
            return type(value)(self.restored(str(value)))
        if isinstance(value, Mapping):
            return {key: self.restored(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.restored(one) for one in value)
        return value


def words(argv: Sequence[str], known: Mapping[str, Any], stand_ins: StandIns) -> list[str]:
    """The command line as the parser gets it: positional arguments first, each option with its value behind
    `=`, texts as stand-ins.

    `known`: the type of each option by its name. A switch may stand without a value: `--force` means
    `--force=true`. Behind `--` everything is positional.
    """
    first: list[str] = []
    options: list[str] = []
    left = list(reversed(argv))
    while left:
        word = left.pop()
        if word == "--":
            first += [stand_ins.put(one) for one in reversed(left)]
            break
        found = OPTION.match(word)
        if found is None:
            unknown = UNKNOWN.fullmatch(word) is not None
            (options if unknown else first).append(word if unknown else stand_ins.put(word))
            continue
        name, more = found[1], found[2]
        value = word[found.end() :] if found[0].endswith("=") else None
        if name in ALONE:
            options.append(word)
            continue
        if value is None and left:
            behind = left[-1]
            if known.get(name) is bool:
                value = left.pop() if behind.lower() in TRUTH else None
            elif OPTION.match(behind) is None:
                value = left.pop()
        if known.get(name) is bool:
            options.append(f"--{name}={'true' if value is None else value}")
        elif value is None:
            options.append(word)
        elif _takes(name, known):
            options.append(f"--{name}{more}={_value(name, value, known, stand_ins, more=bool(more))}")
        else:
            options += [word] if "=" in word else [word, value]  # the parser says that there is none
    return first + options


def _takes(name: str, known: Mapping[str, Any]) -> bool:
    """Whether there is an option of this name, or it is a key of one that is a mapping (--model.layers 3)."""
    above = name.rpartition(".")[0]
    return name in known or (bool(above) and known.get(above) is not None)


def _value(name: str, value: str, known: Mapping[str, Any], stand_ins: StandIns, *, more: bool) -> str:
    """The value of an option as the parser gets it; `more` says that it is added to a list."""
    hint = known.get(name)
    if is_text(hint) or (more and are_texts(hint)):
        return stand_ins.put(value)
    if are_texts(hint):
        listed = _listed(value)
        return value if listed is None else json.dumps([stand_ins.put(one) for one in listed])
    if hint is None and value.lstrip().startswith("{"):
        try:
            inside = broken_yaml.load(value)
            if isinstance(inside, dict):
                return json.dumps(guarded(inside, known, stand_ins, group=f"{name}."), default=str)
        except broken_yaml.BrokenYaml:
            pass  # the parser says so
    return value


def _listed(value: str) -> list[str] | None:
    """The texts of a list as they are written in it: `[null, 007, "a b"]` has three; None if it is no list of
    texts."""
    import yaml

    if not value.lstrip().startswith("["):
        return None
    try:
        found = yaml.load(value, Loader=yaml.BaseLoader)  # which makes nothing but texts
    except yaml.YAMLError:
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def guarded(
    values: Mapping[str, Any], known: Mapping[str, Any], stand_ins: StandIns, group: str = ""
) -> dict[str, Any]:
    """Settings from YAML with stand-ins for their texts. Raises NotText where YAML read something else: it
    has its own meaning for `on`, `007` and dates that stand there without quotes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{group}{key}"
        hint = known.get(name)
        if isinstance(value, Mapping) and any(one.startswith(f"{name}.") for one in known):
            found[key] = guarded(value, known, stand_ins, f"{name}.")
        elif is_text(hint) and not (value is None and is_optional(hint)):
            found[key] = _put(name, value, stand_ins)
        elif are_texts(hint) and isinstance(value, list | tuple):
            found[key] = [_put(name, one, stand_ins) for one in value]
        else:
            found[key] = value
    return found


def _put(name: str, value: Any, stand_ins: StandIns) -> str:
    """The stand-in for a text from YAML. Raises NotText."""
    if isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, str):
        raise NotText(setting_errors.not_text(name, value))
    return stand_ins.put(value)


def make(cls: type[Made], values: Mapping[str, Any]) -> Made:
    """The dataclass with these values, which are parsed; nested dataclasses are made of mappings.

    In place of jsonargparse's own `instantiate`, which would once more read texts as YAML.
    """
    hints = typing.get_type_hints(cls)
    given = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        value = values[field.name]
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        inner = next((one for one in kinds if dataclasses.is_dataclass(one)), None)
        nested = inner is not None and isinstance(value, Mapping)
        given[field.name] = make(typing.cast(Any, inner), value) if nested else value
    return cls(**given)
