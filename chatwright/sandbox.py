"""The sandbox in which chat templates are rendered: they come with a model, from whoever made it.

Jinja's own immutable sandbox keeps a template away from Python's attributes. Added here: it can neither run for ever
nor fill the memory. Loops and macros take their turns from a budget, and no text or list may become huge.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Template, TemplateRuntimeError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 200_000
"""Turns of all loops and macros of one rendering together. Real templates take a few per message."""
LARGEST = 1 << 22
"""Most characters of a text or items of a list, most of any number that sizes one, and of what is written in all."""

_SIZE = "chatwright size"  # no template can spell a name with a space


class _Budget:
    def __init__(self) -> None:
        self.steps, self.characters = STEPS, LARGEST


_budget: ContextVar[_Budget | None] = ContextVar("template budget", default=None)


@contextmanager
def budget() -> Iterator[None]:
    """Rendering inside is bounded."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _tick() -> None:
    """A turn of a loop or macro begins."""
    left = _budget.get()
    if left is not None:
        left.steps -= 1
        if left.steps < 0:
            raise TemplateRuntimeError(f"it takes more than {STEPS:,} steps")


def _written(value: Any) -> Any:
    """What an expression is about to write."""
    left = _budget.get()
    if left is not None:
        left.characters -= len(value) if isinstance(value, str) else 1
        if left.characters < 0:
            raise TemplateRuntimeError(f"it writes more than {LARGEST:,} characters")
    return value


def _bounded(value: Any) -> Any:
    """A result, unless it is huge."""
    if isinstance(value, (str, bytes, list, tuple, dict)) and len(value) > LARGEST:
        raise SecurityError(f"it makes a {type(value).__name__} of more than {LARGEST:,} items")
    if isinstance(value, int) and value.bit_length() > 4_096:
        raise SecurityError("it makes a number of more than 4,096 bits")
    return value


def _check_sizes(values: Any) -> None:
    """Numbers that are given to functions and filters become widths and counts there."""
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise SecurityError(f"it uses a number above {LARGEST:,}")


def _check_format(text: Any) -> None:
    """The same for the widths that stand in a text for `%` or `format`."""
    if isinstance(text, (str, bytes)) and re.search(r"[0-9]{7}", str(text)):
        raise SecurityError(f"it uses a number above {LARGEST:,}")


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps Jinja's marks on the function
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_sizes((*args, *kwargs.values()))
        if function.__name__ == "do_format":
            _check_format(args[0])
        return _bounded(function(*args, **kwargs))

    return checked


class _Guard(NodeTransformer):
    """Adds the checks to a parsed template: a tick in each loop and macro, a size to each `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, _SIZE, [], [], None, None, lineno=node.lineno)

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with budgets; render inside `budget()`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **functions: Callable[..., Any]) -> None:
        """`functions` are those that templates may call by name."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_written)
        self.filters = {name: _checked(function) for name, function in self.filters.items()}
        del self.globals["lipsum"]  # endless text on demand
        self.globals.update(functions)
        self.filters[_SIZE] = _bounded
        self.tick = _tick

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, refused before it is computed when the result would be huge."""
        if operator == "%":
            _check_format(left)
            _check_sizes(right if isinstance(right, tuple) else (right,))
        if operator == "**":
            _check_sizes((left, right))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4_096:
                raise SecurityError("it makes a number of more than 4,096 bits")
        for many, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and hasattr(many, "__len__") and len(many) * times > LARGEST:
                raise SecurityError(f"it makes a {type(many).__name__} of more than {LARGEST:,} items")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, RUF100
        """A call in the template, with checked arguments and result. (A macro may have an argument `self`.)"""
        _check_sizes((*args, *kwargs.values()))
        if getattr(__function, "__name__", "") in ("format", "format_map"):  # Jinja wraps these two
            _check_format(getattr(getattr(__function, "__wrapped__", __function), "__self__", ""))
        return _bounded(super().call(__context, __function, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Guard().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]


def render(template: Template, values: Mapping[str, Any]) -> str:
    """`template` rendered within a budget."""
    with budget():
        return template.render(**values)
