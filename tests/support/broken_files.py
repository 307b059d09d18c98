"""Damage, drawn from a generator of random numbers: the same seed, the same damage.

Three levels: bytes that know nothing of their meaning, numbers written where a format keeps its lengths and
offsets, and values changed in what JSON and GGUF spell out.
"""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

SIZES = (0, 1, 2, 3, 7, 31, 255, 256, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**60)
EDGES = (*SIZES, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ODD: tuple[Any, ...] = (
    *EDGES,
    -1,
    -2,
    -(2**31),
    -(2**63),
    2**64,
    10**30,
    10**400,
    0.0,
    -0.5,
    0.5,
    1.5,
    1e-320,
    1e300,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    True,
    False,
    None,
    "",
    "a",
    "\0",
    "\ud800",
    "\x1b[2J",
    "é" * 9,
    "x" * 3_000,
    "../../../etc/passwd",
    "/dev/zero",
    "model.safetensors",
    ".",
    "a/b",
    "{{",
    "<|endoftext|>",
    "ByteLevel",
    "BPE",
    "Ġ",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    ["a", "b"],
    {"a": 1},
    {"type": "ByteLevel"},
    {"content": 7},
    [{}],
    [[[[]]]],
)


def damage_bytes(random: Random, data: bytes, others: tuple[bytes, ...] = (), *, head: int = 0) -> bytes:
    """One to four of: flipped bits, overwritten stretches, numbers, cuts, doubled, exchanged and foreign
    stretches.

    With `head`, half of the places lie among that many first bytes, where formats keep their structure.
    """
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        size = len(content)
        if not size:
            break
        place = random.randrange(min(head, size) if head and random.random() < 0.5 else size)
        length = min(random.choice((1, 2, 4, 8, 16, 64, 1_000)), size - place)
        match random.randrange(9):
            case 0:
                content[place] ^= 1 << random.randrange(8)
            case 1:
                content[place : place + length] = (
                    bytes([random.choice((0, 255, 127, 128, random.randrange(256)))]) * length
                )
            case 2:
                number = random.choice(EDGES).to_bytes(8, "little")[: random.choice((4, 8))]
                content[place : place + len(number)] = number
            case 3:
                del content[place:]
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length] * random.choice((1, 2, 50))
            case 6:
                other = random.randrange(size)
                content[place : place + length] = content[other : other + length]
            case 7:
                content[place:place] = random.randbytes(length)
            case _:
                foreign = random.choice((*others, data))
                start = random.randrange(len(foreign))
                content[place:] = foreign[start:]
    return bytes(content)


def damage_json(random: Random, value: Any, times: int | None = None) -> Any:
    """A copy with values changed, removed, renamed, moved or put inside others, somewhere within."""
    value = json.loads(json.dumps(value))
    for _ in range(times or random.choice((1, 1, 2, 3, 6))):
        value = json.loads(json.dumps(_damage_one(random, value)))  # no part of it is another part of it
    return value


def _damage_one(random: Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or random.random() < 0.02:
        return _odd(random, value)
    key: Any = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    inner = value[key]
    if isinstance(inner, dict | list) and inner and random.random() < 0.75:
        value[key] = _damage_one(random, inner)
        return value
    match random.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[random.choice(("", "type", "x", key + "x", "vocab", "\ud800", "a\nb"))] = value.pop(key)
        case 2:
            if isinstance(value, dict):
                value[str(random.choice(ODD))[:50]] = _odd(random, inner)
            else:
                value.insert(key, value[key])
        case 3:
            for _ in range(random.choice((1, 3, 200))):
                inner = (
                    [inner]
                    if random.random() < 0.5
                    else {"type": "Sequence", random.choice(("pretokenizers", "decoders")): [inner]}
                )
            value[key] = inner
        case 4:
            other = random.choice(list(value.values()) if isinstance(value, dict) else value)
            value[key] = json.loads(json.dumps(other))
        case _:
            value[key] = _odd(random, inner)
    return value


def _odd(random: Random, value: Any) -> Any:
    """Something else, often of the same type."""
    same = [one for one in ODD if type(one) is type(value)]
    return random.choice(same if same and random.random() < 0.6 else ODD)


def json_text(random: Random, value: Any) -> bytes:
    """A damaged value as text, which now and then is damaged itself."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    match random.randrange(16):
        case 0:
            return damage_bytes(random, text)
        case 1:  # deep, or long
            many = random.choice((100, 5_000, 300_000))
            return text.replace(b"null", b"[" * many + b"]" * many, 1)[: 1 << 20] or b"[" * many
        case 2:  # keys twice
            return text[:-1] + b"," + text[1:] if text.startswith(b"{") else text
        case 3:
            return text.replace(b"1", b"9" * random.choice((20, 400, 5_000)), 1)
        case _:
            return text


# --- GGUF ---

_CODES = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value of metadata with its type: numbers as whoever wrote the file would have chosen, or as fits."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        value = max(-(2**63), min(value, 2**64 - 1))
        code = "I" if 0 <= value < 2**32 else "Q" if 0 <= value < 2**64 else "q"
        return struct.pack(f"<I{code}", _CODES[code], value)
    if isinstance(value, float):
        code = "f" if abs(value) < 1e38 else "d"
        return struct.pack(f"<I{code}", _CODES[code], value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value, list) and any(isinstance(item, float) for item in value):
        reals = [_within_float32(item) for item in value if isinstance(item, int | float)]
        return struct.pack(f"<IIQ{len(reals)}f", 9, 6, len(reals), *reals)
    if isinstance(value, list):
        numbers = [item & 0xFFFFFFFF for item in value if isinstance(item, int)]
        return struct.pack(f"<IIQ{len(numbers)}I", 9, 4, len(numbers), *numbers)
    return struct.pack("<I", 8) + _text(value if isinstance(value, str) else repr(value))


def _within_float32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]  # type: ignore[no-any-return]
    except (OverflowError, struct.error):  # an integer beyond all floats
        return float("inf")


def gguf_bytes(
    values: dict[str, Any], tensors: list[tuple[str, list[int], int, int]], data: bytes
) -> tuple[bytes, list[int]]:
    """A GGUF file, right or wrong, and the places of its lengths, counts, types, sizes and offsets."""
    places: list[int] = [4, 8, 16]
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        places += [len(out), len(out) + 8 + len(key.encode("utf-8", "surrogatepass"))]
        out += _text(key)
        item = _value(value)
        places += [len(out) + 4] + ([len(out) + 8] if item[:4] == b"\x09\0\0\0" else [])
        out += item
    for name, shape, kind, offset in tensors:
        places.append(len(out))
        out += _text(name)
        places += [len(out), *(len(out) + 4 + 8 * number for number in range(len(shape)))]
        out += struct.pack(f"<I{len(shape)}Q", len(shape), *(size & (2**64 - 1) for size in shape))
        places += [len(out), len(out) + 4]
        out += struct.pack("<IQ", kind & 0xFFFFFFFF, offset & (2**64 - 1))
    return out + bytes(-len(out) % 32) + data, places


def damage_gguf(
    random: Random, values: dict[str, Any], tensors: list[tuple[str, list[int], int, int]], data: bytes
) -> bytes:
    """A GGUF file with wrong values, wrong tensors, wrong numbers in its header, or damaged bytes."""
    way = random.randrange(5)
    values, tensors = (
        dict(values),
        [(name, list(shape), kind, offset) for name, shape, kind, offset in tensors],
    )
    if way in (0, 4):
        damaged = damage_json(random, values)
        values = {str(key): value for key, value in damaged.items()} if isinstance(damaged, dict) else {}
    if way in (1, 4):
        for _ in range(random.choice((1, 2))):
            number = random.randrange(len(tensors))
            name, shape, kind, offset = tensors[number]
            match random.randrange(6):
                case 0:
                    shape[-1:] = [random.choice(EDGES)]
                case 1:
                    kind = random.choice((*range(42), 2**31, 2**32 - 1))
                case 2:
                    offset = random.choice((*EDGES, offset + 1, offset + 32, 0))
                case 3:
                    shape = shape[::-1] if random.random() < 0.5 else shape * random.choice((0, 2, 3))
                case 4:
                    name = random.choice(
                        (
                            tensors[0][0],
                            "",
                            "x\ny",
                            "rope_freqs.weight",
                            "output.weight",
                            "blk.9.ffn_up.weight",
                        )
                    )
                case _:
                    tensors.append(tensors[number])
            tensors[number] = (name, shape, kind, offset)
    content, places = gguf_bytes(values, tensors, data)
    if way == 2:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 2))):
            place = random.choice(places)
            number = random.choice(EDGES).to_bytes(8, "little")[: random.choice((4, 8))]
            changed[place : place + len(number)] = number
        content = bytes(changed)
    return damage_bytes(random, content, head=2_000) if way == 3 else content


# --- chat templates ---

_VALUES = (
    "'x'",
    "'xy' * 99",
    "'x' * 4000000",
    "x",
    "y",
    "messages",
    "range(99999)",
    "range(9)",
    "[x, x, x]",
    "[y] * 1000",
    "7",
    "-1",
    "4000000",
    "10 ** 9",
    "{'a': x}",
    "(x, y)",
    "''",
    "none",
    "true",
    "messages[0]",
    "messages[0].content",
    "loop",
    "self",
    "ns",
    "ns.a",
    "cycler('a', 'b')",
    "joiner(x)",
    "dict(a=x)",
    "namespace",
    "raise_exception",
    "m",
    "1.5",
    "'%s' * 9",
    "'%999999d'",
    "'{:>999999}'",
    "y[::-1]",
    "x[1:]",
)
_FILTERS = (
    "abs",
    "attr('__class__')",
    "batch(999999, 'x')",
    "capitalize",
    "center(4000000)",
    "default(x)",
    "dictsort",
    "escape",
    "first",
    "float",
    "format(x, x)",
    "groupby('a')",
    "indent(99999)",
    "int",
    "items",
    "join(x)",
    "join(y)",
    "last",
    "length",
    "list",
    "lower",
    "map('upper')",
    "max",
    "pprint",
    "random",
    "reject",
    "replace('x', x)",
    "replace('', y)",
    "reverse",
    "round",
    "select",
    "selectattr('role')",
    "slice(999999)",
    "sort",
    "string",
    "striptags",
    "sum",
    "sum(start=[])",
    "title",
    "tojson",
    "tojson(indent=99999)",
    "trim",
    "truncate(9)",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap(1, wrapstring=x)",
    "xmlattr",
)
_METHODS = (
    ".replace('x', x)",
    ".replace('', y)",
    ".join([y] * 1000)",
    ".join(y)",
    ".split('x')",
    ".expandtabs(999999)",
    ".zfill(999999)",
    ".ljust(999999)",
    ".format(x, y)",
    ".format_map({'a': x})",
    ".translate({120: x})",
    ".append(x)",
    ".__class__",
    ".__mro__",
    ".items()",
    ".encode()",
    ".splitlines()",
    ".title()",
    ".partition('x')",
    ".count('x')",
    ".index('y')",
    "[0]",
    "['a']",
    "[:-1]",
)
_OPERATORS = ("+", "*", "**", "%", "~", "//", "/", "-", "==", "in", "<", "and", "or", "not in")


def _expression(random: Random, depth: int = 0) -> str:
    text = random.choice(_VALUES)
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        match random.randrange(4):
            case 0:
                text = f"({text} | {random.choice(_FILTERS)})"
            case 1:
                text = f"({text}){random.choice(_METHODS)}"
            case _ if depth < 4:
                text = f"({text} {random.choice(_OPERATORS)} {_expression(random, depth + 1)})"
    return text


def _statement(random: Random, depth: int) -> str:
    inside = (
        "".join(_statement(random, depth + 1) for _ in range(random.choice((1, 1, 2)))) if depth < 3 else "z"
    )
    match random.randrange(10):
        case 0:
            return f"{{% for x in {_expression(random)} %}}{inside}{{% endfor %}}"
        case 1:
            return f"{{% for i in range(99999) %}}{inside}{{% endfor %}}"
        case 2:
            return f"{{% if {_expression(random)} %}}{inside}{{% else %}}{inside}{{% endif %}}"
        case 3:
            return f"{{% set {random.choice('xy')} = {_expression(random)} %}}"
        case 4:
            doubled = random.choice(("ns.a + ns.a", "[ns.a, ns.a]", "ns.a ~ ns.a", _expression(random)))
            return f"{{% set ns.a = {doubled} %}}"
        case 5:
            again = random.choice(("{{ m(x) }}", ""))
            call = f"{{{{ m({_expression(random)}) }}}}"
            return f"{{% macro m(x) %}}{inside}{again}{{% endmacro %}}{call}"
        case 6:
            return f"{{% set y %}}{inside}{{% endset %}}"
        case 7:
            return f"{{% filter {random.choice(_FILTERS)} %}}{inside}{{% endfilter %}}"
        case 8:
            return "t" * random.choice((1, 5_000))
        case _:
            return f"{{{{ {_expression(random)} }}}}"


def hostile_template(random: Random, real: str) -> str:
    """A Jinja text that tries to run long, grow large or reach out; or a real one, damaged."""
    way = random.randrange(12)
    if way == 0:
        return damage_bytes(random, real.encode()).decode("utf-8", "replace")
    if way == 1:
        many = random.choice((20, 200, 20_000))
        pairs = (
            ("{{ (", "1", ") }}"),
            ("{{ [", "1", "] }}"),
            ("{{ -", "1", "}}"),
            ("{% if 1 %}", "x", "{% endif %}"),
        )
        pairs += (
            ("{% for i in range(3) %}", "x", "{% endfor %}"),
            ("{{ not ", "1", "}}"),
            ("{{ x.", "a", "}}"),
            ("{{ 'a' ~ ", "x", "}}"),
        )
        start, middle, end = random.choice(pairs)
        if start.startswith("{{"):
            return "{{ " + start[3:] * many + middle + end[:-2].rstrip() * many + " }}"
        return start * many + middle + end * many
    body = "".join(_statement(random, 0) for _ in range(random.choice((1, 2, 4, 30))))
    head = (
        "{% set x = 'x' * 1000 %}{% set y = 'y' * 1000000 %}"
        if random.random() < 0.7
        else "{% set x = 'ab' %}{% set y = [x] * 1000 %}"
    )
    return head + "{% set ns = namespace(a='a') %}" + body + (real if random.random() < 0.5 else "")
