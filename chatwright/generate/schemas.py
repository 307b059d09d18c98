"""Is a JSON schema fit to be compiled?  Schemas come from strangers, and the compiler does not survive all of
them.

What a schema of a few kilobytes did to llguidance 1.9 before these limits: a chain of a thousand `$ref` ended
the process (its compiler calls itself for each link), eighty thousand characters of `a?a?a?` took 32 s and 3
GB for one mask, and twenty patterns that must hold at once (`allOf`) had not ended after 25 s. Within the
limits the worst that was found are half a second to compile and 50 ms for a mask (the shapes are in
tests/generate/test_grammar.py). Nothing is ever fetched: references lead into the schema itself.
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
"""Most objects and lists within each other; an object of a schema takes two."""
DEEPEST_REFERENCES = 800
"""The same along references: what all their targets have together, for each can be reached through the
others."""
MOST_PROPERTIES = 2000
"""Of one object: the time to compile them grows with their square (3,000 take a second)."""
LONGEST_PATTERN = 512
"""Most characters of a regular expression."""
JOINED_PATTERNS = 8
"""Most patterns and formats of a schema in which several may have to hold at once."""


def check_schema(schema: Any, what: str = "the JSON schema") -> dict[str, Any]:
    """The schema, if it keeps to the limits. Raises UserError, which begins with `what`, where it does not.

    Whether its keywords make sense is for the compiler to say (grammar.py).
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
    """Whether everything is JSON, and how deep it lies. Depth is asked first: an object that holds itself is
    endless."""
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
    """All values within one, and in how many objects and lists each lies. Without recursion: the depth is a
    stranger's."""
    left = [(value, 0)]
    seen = 0
    while left:
        one, depth = left.pop()
        seen += 1
        if seen > LARGEST_SCHEMA:  # each takes a character at least
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
                            "schema itself are, "
                            "as in #/$defs/name"
                        )
                    targets.add(reference)
    depth = sum(max(1, *(depth for _, depth in _walk(_target(schema, one, what)))) for one in targets)
    if depth > DEEPEST_REFERENCES:
        raise UserError(
            f"{what}: what its {len(targets)} references lead to is {depth} objects and lists deep "
            "altogether; "
            f"at most {DEEPEST_REFERENCES} are read"
        )


def _target(schema: Mapping[str, Any], reference: str, what: str) -> Any:
    """What a reference leads to (a JSON pointer, RFC 6901)."""
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
    """How long patterns are, and how many where several may have to hold for one text.

    A single one grows in proportion to its length, and llguidance's own limits hold. Their conjunction, which
    `allOf` and keywords beside `$ref` or `anyOf` ask for, multiplies their states.
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
            "beside $ref or anyOf): "
            f"then at most {JOINED_PATTERNS} are read"
        )
