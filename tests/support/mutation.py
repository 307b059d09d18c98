"""Code with a planted mistake: a test is worth something when it fails for it.

    WRONG_MEANS = mutants(statistics.mean, {"sum instead": ("sum(values) / len(values)", "sum(values)")})

    @pytest.mark.parametrize("mutant", WRONG_MEANS, ids=str)
    def test_wrong_means_show(mutant: Mutant) -> None:
        mutant.must_fail(check_mean)

`check_mean(statistics)` is the same function of a module that the test of the right code calls.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

Check = Callable[[Any], None]
"""Asserts something about a module: `check(module)`."""


@dataclass(frozen=True)
class Mutant:
    """One change of the source of `target`, a function or class: its text `old` becomes `new`."""

    name: str
    target: Callable[..., Any]
    old: str
    new: str

    def __str__(self) -> str:
        return self.name

    def module(self) -> ModuleType:
        """The target's module, run anew from its source with the change.

        All of it, so that the module's other functions call the changed one, and decorators apply as they do
        in the real one. Raises LookupError where `old` is not in the target's source exactly once.
        """
        original, lines, first, last = _place(self.target)
        body = "".join(lines[first:last])
        if body.count(self.old) != 1 or self.old == self.new:
            raise LookupError(
                f"mutation {self.name!r}: {self.old!r} stands {body.count(self.old)} times in "
                f"{self.target.__qualname__}, not once; adapt the mutation to the code"
            )
        changed = body.replace(self.old, self.new)
        return _run(original, "".join([*lines[:first], changed, *lines[last:]]), self.name)

    def must_fail(self, check: Check) -> None:
        """The check passes for the code as it is and fails, by an assertion, for the mutant.

        Any other exception goes through: code that breaks down tells nothing about what the check compares.
        """
        check(_unchanged(_place(self.target)[0]))
        mutant = self.module()
        try:
            check(mutant)
        except AssertionError:
            return
        pytest.fail(f"{check.__name__} does not notice the mutation {self.name!r}")


def mutants(target: Callable[..., Any], changes: Mapping[str, tuple[str, str]]) -> list[Mutant]:
    """A mutant for each of `changes`: its name, the text that is replaced and the text that replaces it."""
    return [Mutant(name, target, old, new) for name, (old, new) in changes.items()]


def _place(target: Callable[..., Any]) -> tuple[ModuleType, list[str], int, int]:
    """The target's module, its lines, and between which of them the target stands.

    Found by name in the syntax tree: a decorator may hide the function that it wraps.
    """
    module = inspect.getmodule(inspect.unwrap(target))
    if module is None:
        raise LookupError(f"{target!r} comes from no module")
    source = inspect.getsource(module)
    found: ast.AST = ast.parse(source)
    for part in target.__qualname__.split("."):
        names = [node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == part]
        if len(names) != 1:
            raise LookupError(f"{target.__qualname__} stands {len(names)} times in {module.__name__}")
        (found,) = names
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return module, source.splitlines(keepends=True), first - 1, found.end_lineno or found.lineno


@functools.cache
def _unchanged(original: ModuleType) -> ModuleType:
    """The module run anew as it is: what a mutant differs from by its change alone."""
    return _run(original, inspect.getsource(original), "unchanged")


def _run(original: ModuleType, source: str, name: str) -> ModuleType:
    """A module of this source, under the name of the original (which dataclasses look up)."""
    made = ModuleType(original.__name__)
    made.__file__ = original.__file__
    made.__package__ = original.__package__
    exec(compile(source, f"<{original.__name__}: {name}>", "exec"), made.__dict__)
    return made
