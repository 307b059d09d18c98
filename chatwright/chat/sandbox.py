"""The sandbox for chat templates, which come with a model and are not trusted.

What templates find in it is what transformers gives them (its chat_template_utils.py): Jinja's immutable
sandbox with loop controls, {% generation %} blocks, `tojson`, `raise_exception`, `strftime_now`, and a
`dict` and a `namespace` of its own. Only `lipsum`, endless text on demand, is missing. Texts keep their
origins (traced_text.py): `render` says who wrote each character of its result.

Jinja's own immutable sandbox keeps a template from Python's attributes. This file adds limits, so that a
template can neither run for ever nor fill the memory. A rendering has budgets for the turns of loops and
macros, for processor time, and for the size of everything that it makes; a single text or list is limited
too. The size ("weight") of a list that contains another list many times counts that list each time: it takes
that much when it is printed, compared or hashed.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from itertools import islice
from typing import Any

from jinja2 import Template, TemplateRuntimeError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from chatwright.chat import tracing
from chatwright.chat.traced_text import UNSURE, Traced, generated, joined, owned, text_of

STEPS = 200_000
"""Most turns of all loops and macros of one rendering. Real templates take a few per message."""
LARGEST = 1 << 22
"""Most characters of a text and of the whole output, and the largest number that may set a size."""
ITEM = 16
"""Weight of a list's item, in characters: about the memory that it takes."""
LONGEST_FORMAT = 1_000
"""Most characters of a format for the time."""
ARGUMENTS = 1_000
"""Most arguments of one call."""
_TOO_LARGE = f"of more than {LARGEST:,} characters, an item counted as {ITEM}"
WORK = 1 << 26
"""Largest weight of the results of all operations of one rendering together."""
PRODUCT = 1 << 26
"""Largest product of the weights of a function's two largest arguments: `replace` and `join` repeat one by
the other."""
SECONDS = 2.0
"""Most processor time for one rendering, in seconds."""

_APART = frozenset(  # filters that make an item of every character of a text
    (
        "batch",
        "groupby",
        "join",
        "list",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "select",
        "selectattr",
        "slice",
        "sort",
        "sum",
        "unique",
    )
)
_LISTED = frozenset(("count", "length", "tojson"))
_TEXTS = (str, Traced)  # and no Markup, which escapes what it is added to
_SIZE, _TIME, _JOIN = (f"chatwright {name}" for name in ("size", "time", "join"))
"""Filters of our own: no template can spell a name with a space."""


class _Budget:
    def __init__(self) -> None:
        self.steps, self.characters, self.work = STEPS, LARGEST, WORK
        self.end = time.thread_time() + SECONDS
        self.quick = 0


_budget: ContextVar[_Budget | None] = ContextVar("template budget", default=None)


@contextmanager
def budget() -> Iterator[None]:
    """A context whose rendering has a new budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _tick() -> None:
    """Count a turn of a loop or macro. Raises TemplateRuntimeError when there were too many."""
    left = _budget.get()
    if left is not None:
        left.steps -= 1
        if left.steps < 0:
            raise TemplateRuntimeError(f"it takes more than {STEPS:,} steps")
        _timed()


def _timed(value: Any = None) -> Any:
    """`value`. Raises TemplateRuntimeError when the time is up."""
    left = _budget.get()
    if left is not None and time.thread_time() > left.end:
        raise TemplateRuntimeError(f"it takes more than {SECONDS:.0f} seconds")
    return value


def _wrote(characters: int) -> None:
    """Count characters that are about to be written. Raises TemplateRuntimeError when there are too many."""
    left = _budget.get()
    if left is not None:
        left.characters -= characters
        if left.characters < 0:
            raise TemplateRuntimeError(f"it writes more than {LARGEST:,} characters")


@pass_eval_context  # makes Jinja write constants at run time too, where the budget counts them
def _written(_: Any, value: Any) -> Any:
    """The text of `value`, which an expression is about to write, counted."""
    _wrote(_weight(value) + 1)
    return text_of(value)


def _weight(*values: Any) -> int:
    """Weight of values: all characters in them, and ITEM for each item. An object that occurs several times
    counts each time. Stops counting beyond LARGEST."""
    if len(values) == 1 and isinstance(values[0], str):  # nearly all are texts
        return len(values[0])
    total, left = 0, list(values)
    while left and total <= LARGEST:
        value = left.pop()
        if isinstance(value, (str, bytes)):
            total += len(value)
        elif isinstance(value, dict):
            total += ITEM * len(value)
            left += (*value.keys(), *value.values())
        elif isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
            total += ITEM * len(value)
            left += value
        elif isinstance(value, range):
            total += ITEM * len(value)
        elif isinstance(value, Namespace):
            left.append(object.__getattribute__(value, "_Namespace__attrs"))
    return total


def _bounded(value: Any, *, quick: bool = False) -> Any:
    """`value`, the result of an operation. Raises SecurityError if it is too large, or all results together
    are. `quick`: an operation so short that the clock is looked at after every sixteenth only."""
    left = _budget.get()
    if left is not None and quick:
        left.quick += 1
    if left is None or not quick or left.quick % 16 == 0:
        _timed()
    weight = _weight(value)
    if weight > LARGEST:
        raise SecurityError(f"it makes a {type(value).__name__} {_TOO_LARGE}")
    if left is not None:
        left.work -= weight
        if left.work < 0:
            raise SecurityError(f"it makes more than {WORK:,} characters and items")
    if isinstance(value, int) and value.bit_length() > 4_096:
        raise SecurityError("it makes a number of more than 4,096 bits")
    return value


def _check_sizes(values: Any, *, multiply: bool = False) -> None:
    """Raise SecurityError for too large arguments of functions and filters, which use numbers as widths and
    counts, and repeat texts."""
    sizes = []
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise SecurityError(f"it uses a number above {LARGEST:,}")
        sizes.append(abs(value) if isinstance(value, int) else _weight(value))
        if sizes[-1] > LARGEST:
            raise SecurityError(f"it works on a {type(value).__name__} {_TOO_LARGE}")
    *_, second, first = sorted([0, 0, *sizes])
    if multiply and first * second > PRODUCT:
        raise SecurityError("it multiplies large things")


def _check_format(text: Any) -> None:
    """The same for the widths in a format text for `%` or `format`."""
    if isinstance(text, (str, bytes)) and re.search(r"[0-9]{7}", str(text)):
        raise SecurityError(f"it uses a number above {LARGEST:,}")


def _counted(value: Any) -> Any:
    """A list in place of an iterator, because a list can be weighed. Raises SecurityError if too long."""
    if not isinstance(value, Iterator) or isinstance(value, LoopContext):
        return value
    items = list(islice(value, LARGEST // ITEM + 1))
    if len(items) > LARGEST // ITEM:
        raise SecurityError(f"it makes a list of more than {LARGEST // ITEM:,} items")
    return items


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a function or filter, iterators made into lists. Raises SecurityError if too many."""
    if len(args) + len(kwargs) > ARGUMENTS:
        raise SecurityError(f"it gives more than {ARGUMENTS:,} arguments")
    return tuple(map(_counted, args)), {name: _counted(arg) for name, arg in kwargs.items()}


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with checks of its arguments and result, whose texts keep their origins."""
    apart = name in _APART

    @functools.wraps(function)  # keeps Jinja's marks on the function
    def checked(*args: Any, **kwargs: Any) -> Any:
        if name in _LISTED and args and isinstance(args[0], Iterator):
            return function(*args, **kwargs)  # an error: this is for lists, and an iterator is none
        args, kwargs = _given(args, kwargs)
        _check_sizes((*args, *kwargs.values()), multiply=True)
        if apart and any(isinstance(arg, str) and ITEM * len(arg) > LARGEST for arg in args):
            raise SecurityError(f"it takes a text of more than {LARGEST // ITEM:,} characters apart")
        if name == "format":
            _check_format(args[0])
        return _bounded(tracing.filtered(name, function, args, kwargs))

    return checked


def _weighed(function: Any) -> Any:
    @functools.wraps(function)
    def weighed(*args: Any) -> Any:
        _timed()
        _check_sizes(arg for arg in args if not isinstance(arg, int))
        return function(*args)

    return weighed


class _Guard(NodeTransformer):
    """Adds the checks to a parsed template: a tick in each loop and macro, a size check for each `~`,
    comparison, slice and key of a dict, and the count of plain text. A `~` becomes a filter that keeps
    origins, unless the template switches the escapes for HTML on (`escapes`)."""

    def __init__(self, escapes: bool) -> None:
        self.escapes = escapes

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        node.nodes = [self._through(_SIZE, one) for one in node.nodes]
        joined = node if self.escapes else self._through(_JOIN, nodes.List(node.nodes, lineno=node.lineno))
        return self._through(_SIZE, joined)

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        node.expr = self._through(_SIZE, node.expr)
        for operand in node.ops:
            operand.expr = self._through(_SIZE, operand.expr)
        return self._through(_TIME, node)

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        self.generic_visit(node)
        return self._through(_SIZE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._through(_SIZE, node.key)
        return node

    def visit_Output(self, node: nodes.Output) -> Any:
        self.generic_visit(node)
        plain = sum(len(one.data) for one in node.nodes if isinstance(one, nodes.TemplateData))
        return [self._calling("wrote", nodes.Const(plain), line=node.lineno), node] if plain else node

    def _through(self, name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _calling(self, name: str, *args: Any, line: int) -> nodes.Node:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
        return nodes.ExprStmt(call, lineno=line)

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._calling("tick", line=node.lineno))
        return node  # type: ignore[no-any-return]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant writes, for the loss mask."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Macro) -> str:
        return generated(caller())


class _Dict:
    """`dict` as templates of transformers have it: without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` as templates of transformers have it: no name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # an attribute may be called `self`
        for name in dict(*args[1:], **kwargs):
            _check_attribute(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r:.80}: it begins with an underscore")


def _strftime_now(format: str) -> str:
    """The time of day. Raises SecurityError for a long format: the system's function takes memory of hundreds
    of times its length, before anybody can weigh the result."""
    if len(format) > LONGEST_FORMAT:
        raise SecurityError(f"it writes the time by a format of more than {LONGEST_FORMAT:,} characters")
    return datetime.now().strftime(format)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with budgets; render inside `budget()`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(joined)
    escapes = False
    """Whether the template that was read last switches the escapes for HTML on: then nobody knows who wrote
    what."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        """`functions`: those that templates may call by name."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_written,
            optimized=False,
            extensions=[_Generation, LoopControlExtension],
        )
        filters = {**self.filters, **tracing.FOLLOWED}
        self.filters = {name: _checked(name, function) for name, function in filters.items()}
        del self.globals["lipsum"]
        own = {"dict": _Dict(), "namespace": _Namespace, "strftime_now": _strftime_now}
        self.globals.update({**own, **functions})
        self.filters |= {_SIZE: _bounded, _TIME: _timed, _JOIN: _concatenated}
        self.tests = {name: _weighed(function) for name, function in self.tests.items()}
        self.tick, self.wrote = _tick, _wrote

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`. Raises SecurityError if the argument is too large."""
        _check_sizes((argument,) if isinstance(argument, tuple) else ())
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`. Raises SecurityError, before computing, if the result would be too large."""
        if operator == "+" and type(left) in _TEXTS and type(right) in _TEXTS:  # most of what templates do
            return _bounded(left + right, quick=True)
        if operator == "%":
            _check_format(left)
            _check_sizes(right if isinstance(right, tuple) else (right,))
            _check_sizes((left, right), multiply=True)
        if operator == "**":
            _check_sizes((left, right))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4_096:
                raise SecurityError("it makes a number of more than 4,096 bits")
        for many, times in ((left, right), (right, left)):
            if (
                operator == "*"
                and isinstance(times, int)
                and hasattr(many, "__len__")
                and _weight(many) * times > LARGEST
            ):
                raise SecurityError(f"it makes a {type(many).__name__} {_TOO_LARGE}")
        compute = super().call_binop
        return _bounded(
            tracing.operated(operator, lambda: compute(context, operator, left, right), left, right)
        )

    def wrap_str_format(self, value: Any) -> Any:
        """A text's method `format`, which must not reach what the sandbox forbids."""
        return tracing.formatting(value, SandboxedFormatter(self)) or super().wrap_str_format(value)

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, RUF100
        """A call in the template, with checked arguments and result. (A macro may have an argument
        `self`.)"""
        args, kwargs = _given(args, kwargs)
        # Jinja wraps `str.format`; the wrapped method has the text as its owner.
        owner = getattr(getattr(__function, "__wrapped__", __function), "__self__", None)
        _check_sizes((owner, *args, *kwargs.values()), multiply=not isinstance(__function, Macro))
        if getattr(__function, "__name__", "") in ("format", "format_map"):
            _check_format(owner)
        function = tracing.followed(__function, args, kwargs)
        result = super().call(__context, function, *args, **kwargs)
        return _bounded(tracing.called(function, result, args, kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self.escapes = any(tree.find_all((nodes.ScopedEvalContextModifier, nodes.EvalContextModifier)))
        return _Guard(self.escapes).visit(tree)  # type: ignore[no-any-return]


def _concatenated(values: Iterable[Any]) -> str:
    """`a ~ b ~ c`."""
    return joined(map(text_of, values))


def render(template: Template, values: Mapping[str, Any]) -> str:
    """`template` rendered within a budget. The result is a `Traced` text (traced_text.py), or a plain one
    where all of it is the template's."""
    with budget():
        text = template.render(**values)
    return owned(text, UNSURE) if getattr(template.environment, "escapes", False) else text
