"""The system's Chromium, and how a person uses the chat page in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.serving import Running

CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="NO BROWSER: the chat page goes untested; install chromium (apt-get install chromium)",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="NO PLAYWRIGHT: the chat page goes untested"
    )
    playwright.expect.set_options(timeout=15_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Any, *urls: str, **settings: Any) -> Iterator[Any]:
    """The chat page at the first of `urls`, at temperature 0. Whatever the browser complains about fails the
    test, and so does a request to anybody else; `page.expected` lists parts of complaints that are meant to
    come."""
    context = browser.new_context(**settings)
    context.set_default_timeout(15_000)
    values = json.dumps({"temperature": 0, "max_tokens": 128})
    context.add_init_script(
        "if (location.protocol === 'http:' && !localStorage.getItem('chatwright.settings')) "
        f"localStorage.setItem('chatwright.settings', '{values}')"
    )
    complaints: list[str] = []

    def watch(page: Any) -> None:
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: None if request.url.startswith(urls) else complaints.append(request.url),
        )

    context.on("page", watch)
    page = context.new_page()
    page.expected = []
    page.goto(urls[0])
    yield page
    left = [text for text in complaints if not any(part in text for part in page.expected)]
    context.close()
    assert left == [], left


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The chat page of `server`."""
    with visiting(browser, server.url) as page:
        yield page


def expect(thing: Any) -> Any:
    """Playwright's assertions, which wait."""
    from playwright.sync_api import expect as expected

    return expected(thing)


def say(page: Any, text: str) -> None:
    """Write it and press Enter."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    """The texts of the answers that are shown."""
    return page.locator(".answer .text")


def users(page: Any) -> Any:
    """The texts of the messages that are shown."""
    return page.locator(".user .text")


def answered(page: Any) -> None:
    """Wait for the end of the answer."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".answer.writing")).to_have_count(0)


def chat(page: Any, text: str) -> None:
    """Say it and wait for the answer."""
    say(page, text)
    expect(page.locator(".user.turn").last).to_contain_text(text[:40])
    expect(page.locator(".answer.turn").last).to_be_visible()
    answered(page)


def button(page: Any, name: str, **more: Any) -> Any:
    """By its whole name."""
    return page.get_by_role("button", name=name, exact=True, **more)


def set_fields(page: Any, **values: str) -> None:
    """Change settings, by their labels with _ for spaces."""
    button(page, "Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    button(page, "Done").click()


def rows(page: Any) -> Any:
    """The conversations in the sidebar."""
    return page.get_by_role("navigation", name="Earlier conversations").get_by_role("link")


def last(page: Any, kind: str) -> Any:
    """The last turn of a kind."""
    return page.locator(f".{kind}.turn").last
