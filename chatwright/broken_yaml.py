"""YAML, read so that a mistake is named in words: line, column, and what is probably wrong there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

GLUED = re.compile(r"\s*(?:- )?([\w.-]+):([^\s:/].*)")
"""A line on which no space stands behind the colon."""


LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What YAML counts as the end of a line."""


class BrokenYaml(ValueError):
    """A text that is no YAML, or YAML that cannot be meant. The message begins with line and column."""

    def __init__(self, line: int, column: int, reason: str) -> None:
        super().__init__(f"line {line}, column {column}: {reason}")
        self.line, self.column, self.reason = line, column, reason


def load(text: str) -> Any:
    """The value of a YAML text, made of plain types. Raises BrokenYaml."""
    import yaml  # here, for most commands read no YAML

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        for node, twice in repeated_keys(root):
            at = node.start_mark
            raise BrokenYaml(
                at.line + 1,
                at.column + 1,
                f"the key {node.value!r} stands here for the second time (first in line {twice}); the first "
                "would be lost",
            )
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        up, why = reason(LINE_END.split(text), error)
        raise BrokenYaml(line - up, 1 if up else column, why) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        raise BrokenYaml(
            before.count("\n") + 1,
            error.position - before.rfind("\n"),
            f"the character U+{error.character:04X} cannot stand in YAML"
            + (": is the file UTF-16? Save it as UTF-8" if error.character == 0 else ""),
        ) from None
    except (ValueError, RecursionError) as error:  # such as a date with a month 13
        if isinstance(error, BrokenYaml):
            raise
        raise BrokenYaml(1, 1, str(error)) from None


def repeated_keys(root: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, int]]:
    """Keys that stand twice in one mapping: the second one's node, and the line of the first."""
    import yaml

    left, seen = [root] if root is not None else [], set()
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                left.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in first and key.value != "<<":
                        yield key, first[key.value]
                    first.setdefault(key.value, key.start_mark.line + 1)


def reason(lines: list[str], error: yaml.MarkedYAMLError) -> tuple[int, str]:
    """What is probably wrong, and how many lines above the place where the parser stopped."""
    problem, mark, opened = error.problem or "", error.problem_mark, error.context_mark
    where = f"line {opened.line + 1}, column {opened.column + 1}" if opened else ""
    if "'\\t'" in problem:
        return 0, "a tab stands here; YAML is indented with spaces"
    if mark and ("mapping values are not allowed" in problem or "could not find expected ':'" in problem):
        return _not_a_key(lines, mark.line, problem)
    if "expected ',' or" in problem:
        bracket = "[" if "']'" in problem else "{"
        return 0, f"the bracket {bracket} that opens in {where} is not closed, or a comma is missing before"
    if "unexpected end of stream" in problem:
        return 0, f"the quote that opens in {where} is not closed"
    if "expected <block end>" in problem and mark:
        return 0, _not_the_end(lines[mark.line], mark.column, problem)
    if "undefined alias" in problem:
        return 0, f"{problem}: no &name of that kind stands above"
    if "escape" in problem:
        return 0, "a backslash between double quotes begins a special sign; single quotes take it as it is"
    if "cannot start any token" in problem:
        return 0, f"{problem}: put the text in quotes"
    if "another document" in problem:
        return 0, "a second document begins here (---); a file of settings is one"
    return 0, " ".join(filter(None, (error.context, problem)))


def _not_a_key(lines: list[str], at: int, problem: str) -> tuple[int, str]:
    """A colon where no key can be, or a line without one."""
    line = lines[at] if at < len(lines) else ""
    up = next((n for n in range(1, at + 1) if lines[at - n].strip()), 0)
    above = lines[at - up] if up else ""
    for far, one in ((up, above), (0, line)):
        if glued := glued_colon(one):
            return far, glued
    if "could not find" in problem:
        return up, f"{above.strip()[:40]!r} has no colon: settings are written `key: value`"
    if line.count(": ") > 1:
        return 0, "a text that holds a colon and a space stands in quotes"
    return (
        0,
        "the line is indented deeper than the one above, which has a value already: indent both alike",
    )


def _not_the_end(line: str, column: int, problem: str) -> str:
    """Something that belongs to no open mapping."""
    found = problem.partition("but found ")[2]
    if found in ("'}'", "']'"):
        return f"the bracket {found} closes nothing"
    if line[:column].strip():
        return "the text goes on behind its closing quote; a quote inside single quotes is written twice"
    return "the line's indentation fits none of the lines above: settings of one level begin in one column"


def glued_colon(line: Any) -> str:
    """The hint for a line, or a value, like `base:smollm2`; "" for others."""
    found = GLUED.fullmatch(line.rstrip()) if isinstance(line, str) else None
    return f"a space belongs behind the colon: `{found[1]}: {found[2][:40]}`" if found else ""
