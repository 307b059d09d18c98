"""What keeps the origins of texts (traced_text.py) through the filters, calls and operators of a template.

Jinja's filters are Python functions on `str`. Most of them call the text's own methods, which follow by
themselves once all texts among the arguments are `Traced`; some need a form of their own, which is here. The
result of any other that made a plain text out of a traced one is blended.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2.filters import FILTERS, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.utils import pass_eval_context
from markupsafe import Markup

from chatwright.traced_text import (
    TEMPLATE,
    UNSURE,
    Traced,
    blend,
    escaped,
    formatted,
    joined,
    origins_in,
    owned,
    percent,
    safe,
    text_of,
)

_CHOOSING = frozenset(("attr", "d", "default", "first", "last", "max", "min", "random", "sum"))
"""Filters whose result is one of the things that they were given, not made out of them."""


def _lifted(value: Any) -> Any:
    """A plain text as a traced one, so that its methods follow their arguments."""
    return Traced(value, ((len(value), TEMPLATE),)) if type(value) is str else value


def _is_traced(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(one, Traced) for one in value)
    return isinstance(value, Traced)


def is_plain(value: Any) -> bool:
    """Whether a value is a text of which nothing is known."""
    return isinstance(value, str) and not isinstance(value, Traced) and bool(value)


# ---- filters


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
    if context.autoescape:
        return FILTERS["join"](context, value, d, attribute)
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return Traced.join(_lifted(text_of(d)), map(text_of, value))


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    if isinstance(s, Markup):
        return FILTERS["indent"](s, width, first, blank)
    by = width if isinstance(width, str) else " " * width
    lines = _lifted(s + "\n").splitlines()
    whole = [lines[0], *("\n" + by + one if one or blank else "\n" + one for one in lines[1:])]
    return joined([by, *whole] if first else whole)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: without the escapes of Jinja's own, which is made for HTML."""
    text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return blend(text, x, own=False)


def _safe(value: Any) -> str:
    return safe(value) if isinstance(value, Traced) else Markup(value)


def _escape(value: Any) -> str:
    return safe(escaped(value)) if isinstance(value, Traced) else FILTERS["escape"](value)


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    if _untraced(value, args, kwargs) or (args and kwargs):
        return FILTERS["format"](value, *args, **kwargs)
    return percent(text_of(value), kwargs or args)


def _untraced(*values: Any) -> bool:
    return not origins_in(*values)


FOLLOWED: Mapping[str, Callable[..., Any]] = {
    "join": _join,
    "indent": _indent,
    "tojson": _tojson,
    "safe": _safe,
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "string": text_of,
}
"""Filters in a form that follows origins, or that is transformers' own."""


def filtered(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a filter, with its origins."""
    if name not in FOLLOWED and any(map(_is_traced, (*args, *kwargs.values()))):
        args, kwargs = tuple(map(_lifted, args)), {key: _lifted(value) for key, value in kwargs.items()}
    result = function(*args, **kwargs)
    if not is_plain(result) or name in _CHOOSING:
        return result
    made = blend(result, *args, *kwargs.values())
    if not isinstance(made, Traced):
        return result
    return safe(made) if isinstance(result, Markup) else made


# ---- calls and operators


def followed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function to call: the method of a plain text that gets a traced one becomes that of a traced."""
    owner = getattr(function, "__self__", None)
    if type(owner) is str and not _untraced(args, kwargs):
        return getattr(_lifted(owner), function.__name__)
    return function


def called(function: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call, with its origins."""
    if not is_plain(result) or isinstance(function, Macro | LoopContext | BlockReference):
        return result
    owner = getattr(function, "__self__", None)
    if isinstance(owner, bytes | bytearray):
        return owned(result, UNSURE)
    if type(owner) is str or isinstance(owner, list | tuple | Mapping | LoopContext):
        return result  # a plain text's method without traced arguments; something out of a container
    if getattr(function, "follows", False):
        return result
    made = blend(result, owner, args, kwargs)
    return made if isinstance(made, Traced) else result


def operated(operator: str, compute: Callable[[], Any], left: Any, right: Any) -> Any:
    """The result of `left operator right`, with its origins."""
    if operator == "%" and type(left) in (str, Traced) and not _untraced(left, right):
        return percent(left, right)
    if type(left) is str and type(right) is str:
        return compute()
    if operator == "+" and isinstance(left, Markup) and isinstance(right, Traced):
        return safe(left) + right
    result = compute()
    if not is_plain(result) or _untraced(left, right):
        return result
    made = blend(result, left, right)
    return safe(made) if isinstance(result, Markup) else made


def formatting(value: Any, formatter: string.Formatter) -> Callable[..., str] | None:
    """In place of a text's method `format` or `format_map`: one that follows. None for any other value."""
    if not isinstance(value, MethodType | BuiltinMethodType) or value.__name__ not in (
        "format",
        "format_map",
    ):
        return None
    pattern = value.__self__
    if not isinstance(pattern, str) or type(pattern) not in (str, Traced):
        return None
    mapped = value.__name__ == "format_map"

    def wrapper(*args: Any, **kwargs: Any) -> str:
        if not mapped:
            return formatted(pattern, formatter, args, kwargs)
        if kwargs or len(args) != 1:
            raise TypeError("format_map() takes exactly one argument")
        return formatted(pattern, formatter, (), args[0])

    wrapper.__name__ = value.__name__
    wrapper.__wrapped__ = value  # type: ignore[attr-defined]
    wrapper.follows = True  # type: ignore[attr-defined]
    return wrapper


__all__ = ["FOLLOWED", "called", "filtered", "followed", "formatting", "is_plain", "operated"]
