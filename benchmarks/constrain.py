"""What a grammar costs: to compile, and per token for its mask.

python benchmarks/constrain.py [MODEL]          (default: smollm2)
"""

from __future__ import annotations

import json
import sys
import time
from statistics import mean, median

import numpy as np

from chatwright.generate.grammar import Grammar, json_object, json_schema
from chatwright.generate.tools import check_tools, tool_grammar
from chatwright.language_model import load
from chatwright.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["city"],
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
VALUE = {
    "name": "Ada Lovelace, Countess of Lovelace. " * 6,
    "age": 36,
    "tags": ["mathematics", "machines"],
    "address": {"city": "London", "zip": "12345"},
}
TOOLS = check_tools(
    [
        {"type": "function", "function": {"name": f"tool_{number}", "parameters": PERSON}}
        for number in range(8)
    ]
)
PASSES = 20


def masks(grammar: Grammar, tokenizer: Tokenizer, text: str) -> list[float]:
    """Milliseconds of every mask along a text."""
    mask = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    times = []
    for _ in range(PASSES):
        matcher = grammar.start()
        for token in tokenizer.encode(text):
            begun = time.perf_counter()
            matcher.allow(mask)
            matcher.accept(token)
            times.append(1e3 * (time.perf_counter() - begun))
            assert mask[token]
    return times


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    model = load(name)
    tokenizer, ends = model.tokenizer, [model.tokenizer.end_of_text_id]
    begun = time.perf_counter()
    json_object(tokenizer, ends)
    print(
        f"{name}: {tokenizer.vocab_size:,} tokens; the first grammar, vocabulary included: "
        f"{1e3 * (time.perf_counter() - begun):.0f} ms"
    )
    makers = {
        "object": (lambda: json_object(tokenizer, ends), json.dumps(VALUE)),
        "schema": (lambda: json_schema(tokenizer, ends, PERSON), json.dumps(VALUE)),
        "8 tools or text": (
            lambda: tool_grammar(tokenizer, ends, TOOLS, "auto"),
            "The weather is fine, isn't it? " * 8,
        ),
    }
    for kind, (make, text) in makers.items():
        begun = time.perf_counter()
        grammar = make()
        compiled = 1e3 * (time.perf_counter() - begun)
        times = masks(grammar, tokenizer, text)
        print(
            f"{kind:16} compiled in {compiled:5.1f} ms; a mask takes {mean(times):.3f} ms (median "
            f"{median(times):.3f}, most {max(times):.2f})"
        )


if __name__ == "__main__":
    main()
