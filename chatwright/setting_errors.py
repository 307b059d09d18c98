"""What is wrong with an option, in plain words: jsonargparse's messages speak of Python's types.

The parser knows the type of each setting. So the message is made anew from the setting's name, the value that
was given, and what the type asks for; only where nothing is known is jsonargparse's own text shown.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

_KEY = re.compile(r'Parser key "([\w.]+)"')
_VALUE = re.compile(r"(?:Got value|Given value): ?(.*)", re.DOTALL)
_UNKNOWN = (
    re.compile(r"[Gg]roup '(?P<group>[\w.\-]+)' does not accept option '(?P<word>[\w.\-]+)'"),
    re.compile(r"[Oo]ption '(?P<word>[\w.\-]+)' is not accepted"),
    re.compile(r"[Kk]ey '(?P<word>[\w.\-]+)' is not expected"),
    re.compile(r"does not accept nested key '(?P<word>[\w.\-]+)'"),
)
_YAML = {"None": "null", "True": "true", "False": "false"}
"""How values that are no text look where they were written."""
_SIMPLE = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def wanted(hint: Any) -> str:
    """What a value of this type looks like, in words: `a whole number`, `one of linear, cosine`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin is Literal:
        return f"one of {', '.join(str(one) for one in inner)}"
    if origin in (Union, types.UnionType):
        named = [wanted(one) for one in inner if one is not type(None)]
        return " or ".join([*named, "null for none"] if type(None) in inner else named)
    if hint is list or origin in (list, Sequence):
        return f"a list such as {_list_example(inner[0] if inner else str)}"
    if hint is tuple or origin is tuple:
        kinds = [one for one in inner if one is not Ellipsis]
        count = "" if Ellipsis in inner or not inner else f" of {len(kinds)}"
        return f"a list{count} such as {_list_example(kinds[0] if kinds else str)}"
    if hint is dict or origin in (dict, Mapping):
        return "a mapping such as '{key: value}'"
    if dataclasses.is_dataclass(hint):
        return "a mapping of settings"
    return "another value"


def _list_example(kind: Any) -> str:
    examples = {int: "'[1, 2]'", float: "'[0.5, 1.0]'"}
    return examples.get(kind, """'["one", "two"]'""")


def hints(parser: Any) -> dict[str, Any]:
    """The type of each setting of a parser, by its name as people write it; None for a group of settings."""
    return {_written(action): getattr(action, "_typehint", None) for action in parser._actions}


def _written(action: Any) -> str:
    """The name of a setting on the command line. jsonargparse calls my-stage.key my_stage.key inside."""
    long = [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
    return long[0] if long else str(action.dest)


def not_text(name: str, value: Any) -> str:
    """The message for a setting in YAML that must be a text, and that YAML has read as something else."""
    if value is None:
        return f"{name} is null; it must be a text: an empty one is written ''"
    if isinstance(value, Mapping | list | tuple):
        return f"{name} is {value!r:.80}; it must be a text: put it in quotes"
    written = _YAML.get(str(value), str(value))
    kinds = {"bool": "true or false", "int": "a number", "float": "a number"}
    kind = kinds.get(type(value).__name__, "a date or a time")
    others = " (and so it reads on, off, yes and no)" if isinstance(value, bool) else ""
    return (
        f"{name} is {written}; it must be a text: without quotes, YAML reads this as {kind}{others}; write "
        f"it as you mean it, in quotes: {name.rpartition('.')[2]}: '{'on' if value is True else written}'"
    )


def explain(message: str, parser: Any, argv: Sequence[str]) -> str:
    """An error of jsonargparse in one line of plain words, with what to do."""
    known = hints(parser)
    if found := re.search(r"[Uu]nrecognized arguments?: (.+)", message, re.DOTALL):
        return _unexpected(found[1].strip(), known, argv)
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            word = found["word"]
            group = found.groupdict().get("group")
            return unknown_option(f"{group}.{word}" if group else word, known)
    if found := re.search(r"arguments? are required: (.+)", message):
        return _missing(found[1], parser)
    if found := re.search(r"argument --([\w.]+): expected one argument", message):
        return f"--{found[1]} has no value; it must be {_wanted_of(found[1], known)}"
    keys = _KEY.findall(message)
    if not keys:
        return _last_lines(message)
    key = next((_written(action) for action in parser._actions if action.dest == keys[-1]), keys[-1])
    if "Unable to load config" in message and known.get(key) is None:
        return _group(key, known)
    value = _VALUE.search(message)
    if value is None or known.get(key) is None:
        return f"--{key}: {_plain(message)}"
    given = typed if (typed := _typed(key, argv)) is not None else value[1]
    first = next(iter(given.strip().splitlines()), "")
    shown = _YAML.get(first, first if first in _YAML.values() else repr(first[:80])) if first else "empty"
    return f"--{key} is {shown}; it must be {wanted(known[key])}"


def _typed(key: str, argv: Sequence[str]) -> str | None:
    """What was typed as the value of an option, the last time; None where it was not."""
    found = None
    for number, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == f"--{key}":
            found = value if equals else next(iter(argv[number + 1 : number + 2]), None)
    return found


def unknown_option(word: str, known: Mapping[str, Any]) -> str:
    """The message for an option that there is none of, with the nearest one."""
    near = near_option(word, [name for name in known if name != "help"])
    return f"unknown option --{word}" + (
        f"; did you mean --{near}?" if near else "; --help lists the options"
    )


def near_option(word: str, options: Sequence[str]) -> str | None:
    """The option that was probably meant. First those that end in the same part are asked (`--rank` for
    --lora.rank), those of the same stage or group before others; then those with similar names."""
    spelled = word.replace("-", "_").lower()
    head, _, end = spelled.rpartition(".")
    near = [one for one in options if one.lower() == spelled]
    near += [
        one for one in options if one.rpartition(".")[2] == end and (not head or _root(one) == _root(word))
    ]
    if near:
        return min(near, key=len)
    root = _root(spelled)
    inside = {one.partition(".")[2]: one for one in options if "." in one and _root(one) == root}
    if "." in spelled and inside:
        found = difflib.get_close_matches(spelled.partition(".")[2], list(inside), n=1, cutoff=0.6)
        return inside[found[0]] if found else None
    found = difflib.get_close_matches(spelled, options, n=1, cutoff=0.6)
    return found[0] if found else None


def _root(name: str) -> str:
    return name.partition(".")[0].replace("-", "_")


def _wanted_of(name: str, known: Mapping[str, Any]) -> str:
    if name == "config":
        return "a YAML file"
    hint = known.get(name)
    return "given" if hint is None else wanted(hint)


def _group(name: str, known: Mapping[str, Any]) -> str:
    """The message for a single value that is given to a group of settings."""
    inside = [one for one in known if one.startswith(f"{name}.")]
    example = inside[0] if inside else f"{name}.KEY"
    return f"--{name} is a group of settings, which are given one by one, for example --{example} VALUE"


def _unexpected(rest: str, known: Mapping[str, Any], argv: Sequence[str]) -> str:
    """The message for arguments that nothing asks for: an unknown option, or a value without an option."""
    word = rest.split()[0]
    option = re.match(r"--([\w.\-]+)", word)
    if option:
        return unknown_option(option[1], known)
    if word.startswith("-") and len(word) > 1:
        return f"unknown option {word}; options begin with two dashes, and --help lists them"
    at = argv.index(word) if word in argv else 0
    if at and known.get(argv[at - 1].removeprefix("--")) is bool:
        return f"{argv[at - 1]} is {word!r}; it must be true or false"
    quotes = "; a value with spaces needs quotes around it" if len(rest.split()) > 1 or at else ""
    return f"unexpected {word!r}: settings are given as --NAME VALUE{quotes}"


def _missing(names: str, parser: Any) -> str:
    options = {action.dest for action in parser._actions if action.option_strings}
    needed = [name.strip() for name in names.split(",")]
    shown = [f"--{name}" if name in options else name for name in needed]
    return f"{' and '.join(shown)} must be given; {parser.prog} --help tells what"


def _plain(message: str) -> str:
    """jsonargparse's own words, without its names of types and keys."""
    text = _KEY.sub("", _last_lines(message))
    for kind, words in _SIMPLE.items():
        text = text.replace(f"a {kind}", words)
    return re.sub(r"^[\s:\-]+", "", text).strip() or "this value cannot be used"


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^error: ", "", " ".join(lines[-3:])) or "wrong arguments"
