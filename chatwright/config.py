"""Settings: a frozen dataclass, filled from a YAML file and `--key value` options by jsonargparse.

A stage declares its settings as a dataclass whose fields each have a docstring, which is the command line's
help. Unknown keys fail; the error names the nearest known key. This file also defines the two errors that are
shown to users.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

from chatwright import broken_yaml, setting_errors, typed_texts

Config = TypeVar("Config")


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do. Exit code 1.

    The message may contain names from untrusted files: as text it is one line without control characters.
    """

    def __str__(self) -> str:
        text = " ".join(line.strip() for line in super().__str__().splitlines()).replace("\t", " ")
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(UserError):
    """The command line or a recipe is wrong; nothing has been started. Exit code 2."""


USAGE_ERRORS = (argparse.ArgumentError, TypeError, ValueError, OSError)
"""What jsonargparse raises for wrong arguments."""


def parse(
    cls: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    positionals: Mapping[str, str] | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Settings of type `cls` from `--config FILE` and `--key value`. These override `defaults`, and
    `defaults` override the dataclass's own.

    `positionals` maps the name of each leading positional argument to its help; a name that ends in `?` is
    optional, one that ends in `+` takes one or more. Returns the settings and the positionals. `--help`
    prints and exits with 0. Raises UsageError.
    """
    (config,), found = parse_all((cls,), argv, prog, description, defaults=defaults, positionals=positionals)
    return config, found


def parse_all(
    classes: Sequence[type[Any]],
    argv: Sequence[str],
    prog: str,
    description: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    positionals: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """`parse` for the settings of several classes together; returns an instance of each, and the positionals.

    `renamed` maps former names of settings of the first class to their names now. Former names are accepted,
    and a line on standard error names the new one.
    """
    parser = make_parser(prog, description, positionals)
    for cls in classes:
        parser.add_class_arguments(cls, nested_key=None, fail_untyped=False)
    for old in renamed or {}:
        parser.add_argument(f"--{old}", default=None, type=str, help=argparse.SUPPRESS)
    if defaults:
        check_keys(defaults, [field.name for field in _fields(classes[0])], where=prog)
        parser.set_defaults(dict(defaults))
    stand_ins = typed_texts.StandIns()
    argv = _checked_files(parser, argv, stand_ins)
    swallowed = io.StringIO()
    try:
        typed = typed_texts.words(argv, setting_errors.hints(parser), stand_ins)
        with redirect_stderr(swallowed):
            values = stand_ins.restored(parser.parse_args(typed).as_dict())
        found = [typed_texts.make(cls, values) for cls in classes]
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(stand_ins.restored(_one_line(swallowed.getvalue()))) from None
    except USAGE_ERRORS as error:
        told = stand_ins.restored(str(error))
        raise UsageError(setting_errors.explain(told, parser, argv)) from None
    former = {old: values[old] for old in renamed or {} if values[old] is not None}
    if former:
        found[0] = build(
            classes[0], to_plain(found[0]) | rename_settings(former, renamed or {}, where=prog), where=prog
        )
    return found, {name: values[name] for name in map(_bare, positionals or {})}


def make_parser(prog: str, description: str, positionals: Mapping[str, str] | None = None) -> Any:
    """A parser with `--config`, `--debug` and positional arguments, whose errors are exceptions."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, default_env=False, allow_abbrev=False
    )
    for name, help_text in (positionals or {}).items():
        number: dict[str, Any] = {"nargs": "?", "default": None} if name.endswith("?") else {}
        number |= {"nargs": "+"} if name.endswith("+") else {}
        parser.add_argument(_bare(name), help=help_text, **number)
    parser.add_argument("--config", action="config", help="A YAML file with any of the settings below.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _bare(name: str) -> str:
    """A positional argument's name without its mark `?` or `+`."""
    return name.rstrip("?+")


def parse_given(parser: Any, argv: Sequence[str]) -> dict[str, Any]:
    """The values given in `argv`, without defaults, nested at the dots of their names. Raises UsageError."""
    stand_ins = typed_texts.StandIns()
    argv = _checked_files(parser, argv, stand_ins)
    swallowed = io.StringIO()
    try:
        typed = typed_texts.words(argv, setting_errors.hints(parser), stand_ins)
        with redirect_stderr(swallowed):
            namespace = parser.parse_args(typed, defaults=False)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(stand_ins.restored(_one_line(swallowed.getvalue()))) from None
    except USAGE_ERRORS as error:
        told = stand_ins.restored(str(error))
        raise UsageError(setting_errors.explain(told, parser, argv)) from None
    return dict(stand_ins.restored(namespace.as_dict()))


def _checked_files(parser: Any, argv: Sequence[str], stand_ins: typed_texts.StandIns) -> list[str]:
    """`argv` with the content of each file behind --config in place of its name, its texts as stand-ins.

    Raises UsageError that names the file: it cannot be read, has unknown settings, or a value of the wrong
    type. A stage's own config.yaml, which also names the stage (`use`), is accepted by that stage.
    """
    found, known = list(argv), setting_errors.hints(parser)
    for at, word in enumerate(found):
        option, equals, file = word.partition("=")
        if option != "--config" or not (equals or at + 1 < len(found)):
            continue
        place = at if equals else at + 1
        file = file if equals else found[place]
        values = read_yaml(file)
        stage = values.pop("use", None) if "use" not in known else None
        if stage is not None and stage != parser.prog.split()[-1]:
            raise UsageError(
                f"{file} has the settings of the stage {stage}, not of {parser.prog.split()[-1]}"
            )
        _check_known(values, known, file)
        try:
            values = typed_texts.guarded(values, known, stand_ins)
            with redirect_stderr(io.StringIO()):
                parser.parse_object(values, defaults=False)
        except typed_texts.NotText as error:
            raise UsageError(f"{file}: {error}") from None
        except USAGE_ERRORS as error:
            said = setting_errors.explain(stand_ins.restored(str(error)), parser, [])
            raise UsageError(f"{file}: {said.removeprefix('--')}") from None
        found[place] = ("--config=" if equals else "") + (to_yaml(values) if values else "{}")
    return found


def _check_known(values: Mapping[str, Any], known: Mapping[str, Any], where: str, group: str = "") -> None:
    """Raise UsageError for a key that is no setting, and for a single value in place of a group."""
    siblings = {name.removeprefix(group).partition(".")[0] for name in known if name.startswith(group)}
    check_keys(map(str, values), sorted(siblings - {"help", "config", "print_config", "debug"}), where=where)
    for key, value in values.items():
        name = f"{group}{key}"
        if any(one.startswith(f"{name}.") for one in known):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {name}: expected a mapping of settings, found {value!r:.80}")
            _check_known(value, known, where, f"{name}.")


def rename_settings(values: Mapping[str, Any], renamed: Mapping[str, str], *, where: str) -> dict[str, Any]:
    """`values` with former names of settings replaced by the current ones; a line on standard error for each.

    Raises UsageError when both names of a setting are given.
    """
    found = dict(values)
    for old, new in renamed.items():
        if old in found:
            if new in found:
                raise UsageError(f"{where}: {old} is the former name of {new}; give {new} alone")
            print(
                f"{where}: {old} is called {new} now; the former name is read until version 0.3",
                file=sys.stderr,
            )
            found[new] = found.pop(old)
    return found


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def build(cls: type[Config], values: Mapping[str, Any], *, where: str) -> Config:
    """Settings of type `cls` from a mapping (a recipe's stage), typed and checked. Raises UsageError."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, nested_key=None, fail_untyped=False)
    _check_nested(cls, values, where)
    stand_ins = typed_texts.StandIns()
    try:
        given = typed_texts.guarded(values, setting_errors.hints(parser), stand_ins)
        return typed_texts.make(cls, stand_ins.restored(parser.parse_object(given).as_dict()))
    except typed_texts.NotText as error:
        raise UsageError(f"{where}: {error}") from None
    except (*USAGE_ERRORS, KeyError) as error:
        said = setting_errors.explain(stand_ins.restored(str(error)), parser, [])
        raise UsageError(f"{where}: {said.removeprefix('--')}") from None


def _check_nested(cls: Any, values: Mapping[str, Any], where: str) -> None:
    import typing

    hints = typing.get_type_hints(cls)
    check_keys(values, [field.name for field in _fields(cls)], where=where)
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}.{key}: {not_a_mapping(value)}")
            _check_nested(hints[key], value, f"{where}.{key}")


def check_keys(values: Iterable[str], known: Sequence[str], *, where: str) -> None:
    """Raise UsageError naming the nearest known key when `values` has a key that is not in `known`."""
    for key in values:
        if key not in known:
            glued = broken_yaml.glued_colon(key)
            hint = f"; {glued}" if glued else near_match(key, known)
            raise UsageError(f"{where}: unknown setting {key!r}{hint}")


def near_match(word: str, known: Sequence[str]) -> str:
    """The end of an error message: '; did you mean X?' or '; known: ...'."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises UsageError, with line and likely reason: missing, not UTF-8, not
    YAML, a key that stands twice, not a mapping."""
    path = Path(path)
    try:
        data = path.read_bytes()
        values = broken_yaml.load(data.decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save the "
            "file as UTF-8"
        ) from None
    except broken_yaml.BrokenYaml as error:
        raise UsageError(
            f"{path}:{error.line}: not valid YAML at column {error.column}: {_one_line(error.reason)}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {not_a_mapping(values)}")
    return values


def not_a_mapping(value: Any) -> str:
    """The error for a value that stands where a mapping of settings belongs."""
    glued = broken_yaml.glued_colon(value)
    found = "nothing" if value is None else f"{value!r:.60}"
    return f"expected a mapping of settings, found {found}" + (f"; {glued}" if glued else "")


def to_plain(config: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(values: Any) -> str:
    """YAML text with the keys in their given order."""
    import yaml

    return str(yaml.safe_dump(to_plain(values), sort_keys=False, allow_unicode=True, width=110))


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^error: ", "", " ".join(lines[-3:])) or "wrong arguments"


def fail(error: BaseException, *, debug: bool) -> int:
    """Print an error as one line on standard error and return its exit code."""
    if debug:
        raise error
    print(f"chatwright: {_one_line(str(error))}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def harmless(text: str) -> str:
    """`text` with visible signs for control characters except newline and tab, without carriage returns."""
    return text.translate(_PICTURES)


_PICTURES: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421", 0x0D: None} | dict.fromkeys(range(128, 160), "�")
# Line and paragraph separators, and the marks that change the direction of the text after them.
_PICTURES |= dict.fromkeys((8232, 8233, *range(8234, 8239), *range(8294, 8298)), "�")
