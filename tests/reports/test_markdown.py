"""What a model says cannot become markup, whatever it says; and it can still be read."""

from __future__ import annotations

import re
from html import unescape

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from chatwright.reports.markdown import LONGEST, cell, harmless, item, table

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

HOSTILE = [
    "# head",
    "###### x",
    "- x",
    "+ x",
    "* x",
    "1. a",
    "12) a",
    "-",
    "---",
    "- - -",
    "===",
    "> quoted",
    "    code",
    "```",
    "~~~",
    "<script>alert(1)</script>",
    "<!-- gone",
    "<img src=x onerror=y>",
    "![p](http://e.com/p.png)",
    "[a](javascript:x)",
    "[a]: http://b",
    "**b** _i_ ~~s~~ `c`",
    "a | b |",
    "\\",
    "\\\\|",
    "&lt;script&gt;",
    "&#60;b&#62;",
    "line one\n\n# line two\r\n<b>",
    "$x$",
    "<http://e.com>",
]


def tags(html: str) -> list[str]:
    return re.findall(r"<[^>]*>", html)


def told(html: str) -> str:
    """The text that a reader sees."""
    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_text(text: str) -> None:
    line = " ".join(text.split())
    listed = MARKDOWN.render(f"- {item(text)}")
    assert tags(listed) == ["<ul>", "<li>", "</li>", "</ul>"], listed
    assert told(listed).strip() == line
    paragraph = MARKDOWN.render(item(text))
    assert tags(paragraph) == ["<p>", "</p>"] and told(paragraph).strip() == line
    shown = MARKDOWN.render("\n".join(table(("a", "b"), [(text, "end")])))
    plain = MARKDOWN.render("\n".join(table(("a", "b"), [("x", "end")])))
    assert tags(shown) == tags(plain), shown
    assert told(shown).split() == ["a", "b", *line.split(), "end"]


@given(st.text(max_size=60))
@example("\\|<b>")
@example("&amp;\\")
def test_any_text_stays_in_its_cell(text: str) -> None:
    line = " ".join(harmless(text).split())
    listed = MARKDOWN.render(f"- {item(text)}")
    assert set(tags(listed)) <= {"<ul>", "<li>", "</li>", "</ul>"}
    assert told(listed).strip() == line.strip()
    assert MARKDOWN.render("\n".join(table(("a", "b"), [(text, "end")]))).count("<td>") == 2


def test_what_cannot_be_printed_is_spelt_out() -> None:
    assert harmless("a\u202eb\x1b[2Jc") == "a\\u202eb\\x1b[2Jc"
    assert harmless("  two\n lines\t") == "two lines"


def test_a_long_text_is_cut_and_says_so() -> None:
    assert harmless("x" * LONGEST) == "x" * LONGEST
    assert harmless("x" * 1_500) == "x" * LONGEST + "… (+1,100 characters)"
    assert len(cell("|" * 5_000)) < 2 * LONGEST + 30


def test_addresses_become_no_links_of_github() -> None:
    assert cell("see http://e.com and WWW.e.com") == r"see http:\//e.com and WWW\.e.com"
    assert cell("0.389 - 1.5%") == "0.389 - 1.5%"  # numbers stay as they are
