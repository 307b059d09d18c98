"""Why a text is no JSON, in words: the likely mistake at the place where the parser stopped."""

from __future__ import annotations

import json
import re

PYTHON_WORDS = ("None", "True", "False")
COMMENTS = ("#", "//", "/*")
TYPOGRAPHIC = "“”„‘’«»"
EXCERPT = 24
"""Characters of the text that an error shows."""


def reason(text: str, error: json.JSONDecodeError, *, lines: bool = False, last: bool = True) -> str:
    """The likely mistake, as the end of a sentence.

    `lines`: the text is one line of a file with one object a line; `last`: and nothing stands behind it.
    """
    at = error.pos
    rest, before = text[at:].lstrip(), text[:at].rstrip()
    if not rest or error.msg.startswith("Unterminated string"):
        return _unfinished(text, lines=lines, last=last)
    if error.msg.startswith("Extra data"):
        return _extra(text, rest, lines=lines)
    if rest[0] in "}]" and before.endswith(","):
        return f"the comma before the closing {rest[0]} is one too many"
    if before.endswith(",") and error.msg.startswith("Illegal trailing comma"):
        return "the comma before the closing bracket is one too many"
    if error.msg.startswith("Illegal trailing comma"):  # from Python 3.13 on, the error stands at the comma
        return f"the comma before the closing {rest[1:].lstrip()[:1]} is one too many"
    if "control character" in error.msg:
        return "a line break or tab stands inside a text; it is written \\n or \\t"
    if "escape" in error.msg:
        return "a backslash inside a text is written twice: \\\\"
    return _misplaced(rest, before, error.msg, lines=lines)


def _unfinished(text: str, *, lines: bool, last: bool) -> str:
    """The text ends too early."""
    if not lines:
        return "the file ends too early: was it cut off when it was copied or downloaded?"
    start = text.strip()
    if last:
        return "the file ends in the middle of a record: was it cut off when it was copied or downloaded?"
    if start.startswith("["):
        return "it begins a list; in a .jsonl file each line is one object. A list of objects is a .json file"
    if start.startswith('"') or _open_text(start):
        return "a text is not closed on its line; a line break inside a text is written \\n"
    return (
        "one object goes over several lines; in a .jsonl file each line is one whole object (jq -c . FILE > "
        "NEW joins the lines)"
    )


def _open_text(text: str) -> bool:
    """Whether a quote is open at the end of the text."""
    return len(re.findall(r'(?<!\\)(?:\\\\)*"', text)) % 2 == 1


def _extra(text: str, rest: str, *, lines: bool) -> str:
    """Something stands behind a whole value."""
    if rest.startswith(","):
        if rest[1:].strip():
            return "several objects stand on the line, with commas between; write one object a line"
        return "a comma stands behind the object; in a .jsonl file nothing stands between the lines"
    if rest[0] in "{[":
        if lines:
            return "several objects stand on one line; write one object a line"
        return (
            "one object follows another without a list around them; a file of one object a line is a .jsonl"
        )
    if rest.startswith(COMMENTS):
        return "JSON has no comments"
    if lines and not text.lstrip().startswith(("{", "[")):
        return "the line is no JSON object; is the file a .txt or a .csv?"
    return f"behind the end of the value stands {rest[:EXCERPT]!r}"


def _misplaced(rest: str, before: str, message: str, *, lines: bool) -> str:
    """Something else stands where a name, a value or a separator belongs."""
    first = rest[0]
    if first == "\ufeff":
        return "a byte-order mark stands here: were files joined that each begin with one?"
    if first == "'":
        return (
            "single quotes stand where JSON has double ones (Python's json.dumps writes JSON, str does not)"
        )
    if first in TYPOGRAPHIC:
        return f'the typographic quote {first} stands where JSON has a plain "'
    if rest.startswith(COMMENTS):
        return "JSON has no comments"
    if rest.startswith(PYTHON_WORDS):
        word = next(word for word in PYTHON_WORDS if rest.startswith(word))
        return f"JSON writes {'null' if word == 'None' else word.lower()}, not {word}"
    if "property name" in message:
        return f"the name of a column stands in double quotes; found {rest[:EXCERPT]!r}"
    if "':' delimiter" in message:
        return f"between a name and its value stands a colon; found {rest[:EXCERPT]!r}"
    if "',' delimiter" in message:
        return (
            'a comma is missing, or a double quote inside a text is not written \\"; '
            f"found {rest[:EXCERPT]!r}"
        )
    if not before:
        return "it is no JSON; is the file a .txt or a .csv?" if lines else "the file is no JSON"
    return f"a value is missing, or is no JSON; found {rest[:EXCERPT]!r}"
