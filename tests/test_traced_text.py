"""Texts that know who wrote each of their characters: what comes out is what Jinja makes of plain texts, and
nothing that a message wrote counts as the template's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chatwright import sandbox
from chatwright.sandbox import Sandbox
from chatwright.traced_text import (
    BLEND,
    CONTENT,
    TEMPLATE,
    UNSURE,
    Traced,
    kind_of,
    message_of,
    of_message,
    owned,
    runs_of,
)

ONE, TWO = of_message(0, CONTENT), of_message(1, CONTENT)
PLAIN = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
for name in (
    "tojson",
    "strftime_now",
):  # as transformers has them; the sandbox's own text is compared elsewhere
    PLAIN.filters.pop(name, None)
PLAIN.filters["tojson"] = Sandbox().filters["tojson"]

CAPITALS = st.text(st.sampled_from("ABCDE <|>é\nß"), max_size=9)
"""What a message writes: none of these letters are in the expressions below."""

EXPRESSIONS = [
    "a",
    "a ~ 'x' ~ b",
    "a + 'x' + b",
    "'x' + a",
    "a * 3",
    "a.strip()",
    "a.strip('A')",
    "a.lstrip() ~ b.rstrip()",
    "a[1:]",
    "a[:-1]",
    "a[::-1]",
    "a[::2]",
    "a[0] if a else 'none'",
    "a.split()",
    "a.split('A')",
    "a.split('A', 1)",
    "a.rsplit('A', 1)[0]",
    "a.rsplit(none, 1)",
    "a.split('A')[-1].lstrip('B')",
    "a.splitlines()",
    "a.splitlines(true)",
    "a.partition('B')",
    "a.rpartition('B')[2]",
    "a.replace('A', 'xyz')",
    "a.replace('A', b)",
    "a.replace(b, 'x') if b else ''",
    "'xAy'.replace('A', a)",
    "'x-y'.replace('-', a, 1)",
    "', '.join([a, 'x', b])",
    "a.join(['x', 'y', b])",
    "a.upper()",
    "a.lower()",
    "a.title()",
    "a.capitalize()",
    "a.swapcase()",
    "a.casefold()",
    "a.center(12)",
    "a.center(13, 'x')",
    "a.ljust(12, '.')",
    "a.rjust(12)",
    "a.zfill(12)",
    "a.expandtabs()",
    "a.removeprefix('A')",
    "a.removesuffix('A')",
    "a.encode().decode()",
    "a.startswith('A')",
    "a in b",
    "a == b",
    "a < b",
    "'%s and %s' % (a, b)",
    "'%s' % a",
    "'%-9s|%r' % (a, b)",
    "'%(k)s!' % {'k': a}",
    "'%d%%' % 5 ~ a",
    "'{} and {}'.format(a, b)",
    "'{1}{0!r:>9}'.format(a, b)",
    "'{x}'.format(x=a)",
    "'{x}'.format_map({'x': a})",
    "a.format()",
    "'%s: %s' | format(a, b)",
    "a | trim",
    "a | trim('A')",
    "a | upper",
    "a | lower",
    "a | title",
    "a | capitalize",
    "a | replace('A', 'x')",
    "'x' | replace('x', a)",
    "[a, 'x', b] | join(', ')",
    "[a, 'x', b] | join(a)",
    "[{'k': a}, {'k': 'x'}] | join('-', attribute='k')",
    "[a, b] | map('upper') | join",
    "[a, b] | map('trim') | list",
    "[a, b, 'x'] | sort",
    "[a, b, 'x'] | unique | list",
    "[a, b] | first",
    "[a, b] | last",
    "[a, b] | reverse | list",
    "a | reverse",
    "a | list",
    "a | first",
    "a | last",
    "a | length",
    "a | string",
    "[a, 'x'] | string",
    "{'k': a}",
    "[a, b]",
    "(a, b) | tojson",
    "{'k': a, 'n': [1, none]} | tojson(indent=2)",
    "a | tojson",
    "a | indent",
    "a | indent(2, true, true)",
    "a | indent('x ')",
    "a | safe",
    "(a | safe) ~ '<x>'",
    "(a | safe) + '<x>' + b",
    "'<x>' + (a | safe)",
    "a | e",
    "(a | e) + '<x>'",
    "a | forceescape",
    "a | center(9)",
    "a | truncate(5)",
    "a | truncate(3, true, 'x', 0)",
    "a | wordwrap(3)",
    "a | wordcount",
    "a | urlencode",
    "a | urlize",
    "a | striptags",
    "a | pprint",
    "{'k': a} | xmlattr",
    "{'k': a} | dictsort",
    "{'k': a} | items | list",
    "{a: 'x'}.items() | list",
    "a | default('x')",
    "nothing | default(a)",
    "a | batch(2) | list",
    "a | slice(2) | list",
    "[a, b] | groupby(0) if a and b else ''",
    "[a, b] | select('equalto', b) | list",
    "[{'k': a}] | selectattr('k', 'in', [a]) | map(attribute='k') | list",
    "dict(k=a).k",
    "dict.fromkeys([a]) | list",
    "namespace(k=a).k",
    "cycler(a, b).next()",
    "[a, b] | max",
    "[a, 'x'] | min",
    "a if a else b",
    "a and b",
    "a or b",
    "a is string",
    "a is mapping",
    "a is sameas a",
    "a.isspace() or a.find('A')",
    "('x' ~ a)[1:]",
    "('xx' ~ a ~ 'yy')[1:-1].split('x')",
    "(a ~ 'y')[-1]",
]
BLOCKS = [
    "{% for c in a %}[{{ c }}]{% endfor %}",
    "{% for c in a + 'x' %}{% if c == 'A' %}{% continue %}{% endif %}{{ c }}{% endfor %}",
    "{% set x %}<{{ a }}>{% endset %}{{ x | upper }}{{ x[1:] }}",
    "{% macro m(x, y='z') %}({{ x }}{{ y }}{{ varargs }}){% endmacro %}{{ m(a) }}{{ m(a, b, a) | trim }}",
    "{% macro m() %}[{{ caller(a) }}]{% endmacro %}{% call(x) m() %}{{ x }}{{ b }}{% endcall %}",
    "{% filter upper %}x{{ a }}y{% endfilter %}",
    "{% set n = namespace(t='') %}{% for x in [a, b] %}{% set n.t = n.t + x + ';' %}{% endfor %}{{ n.t }}",
    "{% for x in [a, b] recursive %}{{ x }}{% if loop.depth == 1 %}{{ loop([b]) }}{% endif %}{% endfor %}",
    "{% block k %}{{ a }}{% endblock %}{{ self.k() }}",
    "{% with x = a ~ b %}{{ x }}{% endwith %}",
    "{% for x in [a, b] %}{{ loop.cycle(x, 'y') }}{{ loop.previtem }}{% endfor %}",
    "{% set x, y = [a, b] %}{{ y ~ x }}",
    "{% set j = joiner(', ') %}{% for x in [a, b] %}{{ j() }}{{ x }}{% endfor %}",
    "{% autoescape true %}{{ a }}{{ a ~ '<x>' }}{% endautoescape %}{{ b }}",
    "{{ a }}{{ nothing }}{{ none }}{{ 1.5 }}{{ true }}{{ b }}",
]
SOURCES = ["{{ " + one + " }}" for one in EXPRESSIONS] + BLOCKS


@lru_cache
def compiled(source: str) -> tuple[jinja2.Template, jinja2.Template]:
    return Sandbox().from_string(source), PLAIN.from_string(source)


def rendered(source: str, a: str, b: str) -> tuple[str | None, str | None]:
    """What the sandbox makes of traced texts, and Jinja of plain ones; None for an error."""
    results: list[str | None] = []
    traced, plain = compiled(source)
    for render in (
        lambda: sandbox.render(traced, {"a": owned(a, ONE), "b": owned(b, TWO)}),
        lambda: plain.render(a=a, b=b),
    ):
        try:
            results.append(render())
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            results.append(None)
    return results[0], results[1]


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=12)
@given(a=CAPITALS, b=CAPITALS)
def test_traced_texts_are_rendered_as_plain_ones(source: str, a: str, b: str) -> None:
    """The same text; and every capital in it, for only messages have some, is not the template's."""
    found, wanted = rendered(source, a, b)
    assert found == wanted
    if found is None or "'xAy'" in source:
        return
    at = 0
    for size, origin in runs_of(found):
        piece = str.__getitem__(found, slice(at, at + size))
        at += size
        if origin == TEMPLATE:
            assert not set(piece) & set("ABCDEÉéß"), (piece, runs_of(found))
    assert at == len(found)


def origins(text: str) -> list[tuple[str, Any]]:
    """A text's pieces with who wrote them: "t" for the template, else the number of the message."""
    at, pieces = 0, []
    for size, origin in runs_of(text):
        who = "t" if origin == TEMPLATE else "?" if origin == UNSURE else message_of(origin)
        pieces.append(
            (
                str.__getitem__(text, slice(at, at + size)),
                f"{who}~" if kind_of(origin) == BLEND and who != "?" else who,
            )
        )
        at += size
    return pieces


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("<{{ a | trim }}>{{ b }}", [("<", "t"), ("AB CD", 0), (">", "t"), ("E<E", 1)]),
        ("{{ a.split(' ')[2] ~ '!' ~ b[1:] }}", [("CD", 0), ("!", "t"), ("<E", 1)]),
        ("{{ 'x%sy%s' % (b, a.strip()) }}", [("x", "t"), ("E<E", 1), ("y", "t"), ("AB CD", 0)]),
        ("{{ 'x{}y'.format(b) }}", [("x", "t"), ("E<E", 1), ("y", "t")]),
        ("{{ b.replace('<', ' or ') }}", [("E", 1), (" or ", "t"), ("E", 1)]),
        ("{{ [b, 'x', b] | join('/') }}", [("E<E", 1), ("/x/", "t"), ("E<E", 1)]),
        ("{{ {'k': b} | tojson }}", [('{"k": "E<E"}', 1)]),
        ("{{ b | tojson }}{{ 'k' | tojson }}", [('"E<E"', 1), ('"k"', "t")]),
        ("{{ [a, b] }}", [("[' AB CD ', 'E<E']", "?")]),
        ("{{ b.zfill(5) }}", [("00E<E", "1~")]),
        ("{{ b.encode().decode() }}", [("E<E", "?")]),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(b) | upper }}", [("<", "t"), ("E<E", 1), (">", "t")]),
        ("{% macro m(x) %}yes{% endmacro %}{{ m(b) }}", [("yes", "t")]),
        ("{{ 'x' if a else b }}{{ 'E' * (b | length) }}", [("xEEE", "t")]),
        ("{% autoescape true %}x{{ b }}{% endautoescape %}", [("xE&lt;E", "?")]),
    ],
)
def test_who_wrote_what(source: str, wanted: list[tuple[str, Any]]) -> None:
    text = sandbox.render(Sandbox().from_string(source), {"a": owned(" AB CD ", ONE), "b": owned("E<E", TWO)})
    assert origins(text) == wanted


def test_an_empty_text_leaves_a_mark_where_it_stands() -> None:
    text = sandbox.render(Sandbox().from_string("<{{ a.strip() }}>"), {"a": owned("  ", ONE)})
    assert runs_of(text) == ((1, TEMPLATE), (0, ONE), (1, TEMPLATE))


def test_a_text_in_too_many_pieces_is_blended() -> None:
    """So that a template cannot fill the memory with them."""
    text = Traced("AB" * 20_000, ((40_000, ONE),)).replace("B", "x")
    assert len(text) == 40_000 and len(runs_of(text)) == 1 and message_of(runs_of(text)[0][1]) == 0


def test_generation_blocks_are_marked() -> None:
    source = "<a>{% generation %}{{ a }}<e>{% endgeneration %}\n{% generation %}{% endgeneration %}"
    text = sandbox.render(Sandbox().from_string(source), {"a": owned("E", ONE)})
    assert text == "<a>E<e>"
    assert [bool(origin >> 40) for _, origin in runs_of(text)] == [False, True, True]
