"""Write the lists of parameters in docs/guide/serving.md from the bodies of chatwright/serve/api; with
--check, fail when they are out of date."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from chatwright.serve.api.chat import ChatRequest
from chatwright.serve.api.completions import CompletionRequest
from chatwright.serve.api.embeddings import EmbeddingRequest
from chatwright.serve.api.parameters import Body
from chatwright.serve.api.responses import ResponsesRequest

FILE = Path(__file__).parent.parent / "docs" / "guide" / "serving.md"
BEGIN = "<!-- parameters: written by `make docs` from chatwright/serve/api; do not edit -->"
END = "<!-- end of parameters -->"

BODIES: Mapping[str, type[Body]] = {
    "POST /v1/chat/completions": ChatRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/responses": ResponsesRequest,
    "POST /v1/embeddings": EmbeddingRequest,
}
"""Route -> its body."""


def honoured(body: type[Body]) -> list[str]:
    """The parameters that take effect."""
    return sorted(field.alias or name for name, field in body.model_fields.items())


def harmless(body: type[Body]) -> dict[str, str]:
    """The parameters that are taken and change no answer -> what they are for."""
    return {name: why for name, why in sorted(body.harmless.items()) if name not in honoured(body)}


def refused(body: type[Body]) -> dict[str, str]:
    """The parameters that are refused -> the values, besides null, that ask for nothing and are taken."""
    return {name: ", ".join(map(_json, values)) for name, values in sorted(body.refused.items())}


def _json(value: object) -> str:
    return f"`{json.dumps(value)}`"


def _lines(route: str, body: type[Body]) -> Iterator[str]:
    yield f"### `{route}`"
    yield ""
    yield "* **Honoured**: " + ", ".join(f"`{name}`" for name in honoured(body)) + "."
    reasons: dict[str, list[str]] = {}
    for name, why in harmless(body).items():
        reasons.setdefault(why, []).append(f"`{name}`")
    yield (
        "* **Harmless**: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + "."
    )
    if body.refused:
        values = refused(body).items()
        names = [f"`{name}`" + (f" (but for {taken})" if taken else "") for name, taken in values]
        yield "* **Refused**: " + ", ".join(names) + "."
    yield ""


def block() -> str:
    """The generated part of the page."""
    lines = [BEGIN, ""]
    for route, body in BODIES.items():
        lines += _lines(route, body)
    return "\n".join([*lines, END])


def main() -> int:
    """Write or check."""
    page = FILE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"docs/guide/serving.md has lost its lines {BEGIN!r} and {END!r}", file=sys.stderr)
        return 1
    wanted = before + block() + after
    if "--check" in sys.argv:
        if page != wanted:
            print("docs/guide/serving.md is out of date: run `make docs` and commit it", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
