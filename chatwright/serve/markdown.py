"""Markdown of a model as safe HTML: rendered by markdown-it, coloured by Pygments, sanitised by nh3.

Raw HTML in the text stays text. Images are not shown: loading one would tell a third party that the answer
was read. The sanitiser enforces both rules a second time.
"""

from __future__ import annotations

from functools import cache

import nh3
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "del", "a", "span", "code", "pre", "blockquote"),
    *("ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "span": {"class"}, "ol": {"start"}}


def render(text: str) -> str:
    """HTML that may be put into a page as it is."""
    return nh3.clean(
        _markdown().render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


@cache
def _markdown() -> MarkdownIt:
    options = {"html": False, "linkify": False, "breaks": True, "highlight": _colour}
    return MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable("image")


def _colour(code: str, language: str, _: str) -> str:
    """Spans with Pygments' short class names, or "" (markdown-it then escapes the code itself)."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))
