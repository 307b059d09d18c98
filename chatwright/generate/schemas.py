"""Limits for JSON schemas before they are compiled. Schemas are untrusted, and some crash the compiler.

Schemas of a few kilobytes had these effects on llguidance 1.9 without the limits. A chain of a thousand
`$ref` crashed the process (its compiler recurses at each link). Eighty thousand characters of `a?a?a?` took
32 s and 3 GB for one mask. Twenty patterns that must hold at once (`allOf`) had not finished after 25 s.
Within the limits the worst cases found take half a second to compile and 50 ms for a mask (the shapes are in
tests/generate/test_grammar.py). Nothing is ever fetched: references must point into the schema itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from chatwright.config import UserError

LARGEST_SCHEMA = 1 << 17
"""Most characters of a schema, written as JSON."""
DEEPEST_SCHEMA = 64
"""Deepest nesting of objects and lists; an object of a schema takes two levels."""
DEEPEST_REFERENCES = 800
"""Largest sum of the depths of all references' targets, for each can be reached through the others."""
MOST_PROPERTIES = 2000
"""Most properties of one object: the time to compile grows with their square (3,000 take a second)."""
LONGEST_PATTERN = 512
"""Most characters of a regular expression."""
JOINED_PATTERNS = 8
"""Most patterns and formats of a schema in which several may have to hold at once."""


def check_schema(schema: Any, what: str = "the JSON schema") -> dict[str, Any]:
    """The schema, if it is within the limits. Otherwise raises UserError, which begins with `what`.

    The compiler checks its keywords (grammar.py).
    """
    if not isinstance(schema, Mapping):
        raise UserError(f"{what} must be an object, not {type(schema).__name__}")
    if "x-guidance" in schema:
        raise UserError(f"{what}: x-guidance is no keyword of JSON schema")
    _check_values(schema, what)
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise UserError(f"{what} has a number that JSON does not know (NaN or infinite)") from None
    if size > LARGEST_SCHEMA:
        raise UserError(f"{what} has {size:,} characters; at most {LARGEST_SCHEMA:,} are read")
    _check_references(schema, what)
    _check_patterns(schema, what)
    return dict(schema)


def _check_values(schema: Mapping[str, Any], what: str) -> None:
    """Check that every value is JSON, and how deep it is nested. Depth comes first: an object that contains
    itself is endless."""
    for value, depth in _walk(schema):
        if depth > DEEPEST_SCHEMA:
            raise UserError(f"{what} has more than {DEEPEST_SCHEMA} objects and lists within each other")
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise UserError(f"{what} has a key that is not text")
            properties = value.get("properties")
            if isinstance(properties, Mapping) and len(properties) > MOST_PROPERTIES:
                raise UserError(
                    f"{what} has an object of {len(properties):,} properties; at most {MOST_PROPERTIES:,} "
                    "are read"
                )
        elif not isinstance(value, list | str | int | float | bool | None):
            raise UserError(f"{what} holds a value of type {type(value).__name__}, which is not JSON")


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """All values within one, each with its nesting depth. Not recursive, for the depth is untrusted."""
    left = [(value, 0)]
    seen = 0
    while left:
        one, depth = left.pop()
        seen += 1
        if seen > LARGEST_SCHEMA:  # each takes at least one character
            raise UserError(f"the JSON schema has more than {LARGEST_SCHEMA:,} values")
        yield one, depth
        inner = one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
        left += [(part, depth + 1) for part in inner]


def _check_references(schema: Mapping[str, Any], what: str) -> None:
    targets: set[str] = set()
    for value, depth in _walk(schema):
        if isinstance(value, Mapping):
            if depth and isinstance(value.get("$id"), str):
                raise UserError(
                    f"{what}: $id inside of a schema is not supported, references start from its root"
                )
            for name in ("$ref", "$dynamicRef", "$recursiveRef"):
                reference = value.get(name)
                if isinstance(reference, str):
                    if name != "$ref" or not (reference == "#" or reference.startswith("#/")):
                        raise UserError(
                            f"{what}: {name} {reference!r:.80} is not supported; only references into the "
                            "schema itself are, as in #/$defs/name"
                        )
                    targets.add(reference)
    depth = sum(max(1, *(depth for _, depth in _walk(_target(schema, one, what)))) for one in targets)
    if depth > DEEPEST_REFERENCES:
        raise UserError(
            f"{what}: what its {len(targets)} references lead to is {depth} objects and lists deep "
            f"altogether; at most {DEEPEST_REFERENCES} are read"
        )


def _target(schema: Mapping[str, Any], reference: str, what: str) -> Any:
    """The target of a reference (a JSON pointer, RFC 6901)."""
    value: Any = schema
    for part in reference.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise UserError(f"{what}: $ref {reference!r:.80} leads to nothing in the schema")
    return value


def _check_patterns(schema: Mapping[str, Any], what: str) -> None:
    """Check the length of patterns, and their number where several may have to hold for one text.

    The cost of a single one is proportional to its length, and llguidance's own limits hold. A conjunction of
    several, as `allOf` and keywords beside `$ref` or `anyOf` ask for, multiplies their states.
    """
    count = 0
    joined = False
    for value, _ in _walk(schema):
        if not isinstance(value, Mapping):
            continue
        keyed = value.get("patternProperties")
        patterns = [value["pattern"]] if isinstance(value.get("pattern"), str) else []
        patterns += list(keyed) if isinstance(keyed, Mapping) else []
        for pattern in patterns:
            if len(pattern) > LONGEST_PATTERN:
                raise UserError(
                    f"{what} has a pattern of {len(pattern):,} characters; at most {LONGEST_PATTERN} are read"
                )
        own = len(patterns) + isinstance(value.get("format"), str)
        count += own
        joined |= "allOf" in value or bool(own and {"$ref", "anyOf", "oneOf"} & value.keys())
    if joined and count > JOINED_PATTERNS:
        raise UserError(
            f"{what} has {count} patterns and formats, and some of them may have to hold at once (allOf, or "
            f"beside $ref or anyOf): then at most {JOINED_PATTERNS} are read"
        )
