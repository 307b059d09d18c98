"""A server with API keys, as a person with a browser meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatwright.serve.operation.keys import line_for
from support.browsing import answered, answers, expect, needs_browser, say, visiting
from support.serving import DIALOGUES, TinyModel, run_server

pytestmark = needs_browser
KEY = "cw-" + "k" * 43


def ready(page: Any) -> None:
    """Wait until the page's scripts have begun."""
    expect(page.locator("#welcome-window")).not_to_be_empty()


def test_a_key_is_asked_for_once(browser: Any, tiny: TinyModel, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(line_for("anna", KEY))
    with run_server(tiny, api_keys=str(keys)) as server, visiting(browser, server.url) as page:
        page.expected = ["401"]  # the browser reports what it was refused
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("This key is not known here.")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Come in").click()
        ready(page)
        say(page, "hello")
        answered(page)
        expect(answers(page)).to_have_text(DIALOGUES["hello"])
        page.reload()
        expect(answers(page)).to_have_text(DIALOGUES["hello"])  # no key is asked for again
        assert page.evaluate("document.cookie") == ""  # no script sees the session
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("API key")).to_be_visible()
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        ready(page)
        keys.write_text(line_for("ben", KEY[::-1]))  # the key is taken out while the page is open
        say(page, "hello")
        expect(page.get_by_label("API key")).to_be_visible()
