"""The chat page in the system's Chromium: a person's way through it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from serving import DIALOGUES, Running, TinyModel, run_server, server, taught, tiny  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
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
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="NO BROWSER: the chat page goes untested; install chromium (apt-get install chromium)",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=15_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:  # noqa: F811
    """The chat page, at temperature 0. Whatever the browser complains about fails the test."""
    context = browser.new_context()
    context.set_default_timeout(15_000)
    context.add_init_script(
        "localStorage.setItem('chatwright.settings', JSON.stringify({temperature: 0, maxTokens: 128}))"
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request",
        lambda request: None if request.url.startswith(server.url) else complaints.append(request.url),
    )
    page.expected = []
    page.goto(server.url)
    yield page
    left = [text for text in complaints if not any(part in text for part in page.expected)]
    context.close()
    assert left == []


def expect(thing: Any) -> Any:
    return playwright.expect(thing)


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    return page.locator(".answer .text")


def test_a_message_is_answered_as_it_is_written(page: Any, server: Running) -> None:  # noqa: F811
    server.model.engine.allow(8)
    expect(page.get_by_role("heading", name="Say something.")).to_be_visible()
    say(page, "story")
    expect(page.locator(".user .text")).to_have_text("story")
    expect(answers(page)).to_contain_text("Once upon")  # while the model is held in the middle
    expect(page.locator(".answer.writing")).to_be_visible()
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    server.model.engine.allow(float("inf"))
    expect(page.locator(".note")).to_contain_text("tokens")
    expect(answers(page)).to_have_text(DIALOGUES["story"].strip())
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")


def test_stop_button_and_escape(page: Any, server: Running) -> None:  # noqa: F811
    for press in (
        lambda: page.get_by_role("button", name="Stop").click(),
        lambda: page.keyboard.press("Escape"),
    ):
        page.get_by_role("button", name="New chat").click()
        server.model.engine.allow(8)
        say(page, "story")
        expect(answers(page)).to_contain_text("Once upon")
        press()
        expect(page.locator(".note")).to_contain_text("stopped")
        assert len(answers(page).inner_text()) < len(DIALOGUES["story"]) / 2
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.model.engine.allow(float("inf"))
    page.get_by_role("button", name="New chat").click()
    say(page, "hello")
    expect(answers(page)).to_have_text(DIALOGUES["hello"])


def test_reload_in_the_middle_of_an_answer(page: Any, server: Running) -> None:  # noqa: F811
    server.model.engine.allow(8)
    say(page, "story")
    expect(answers(page)).to_contain_text("Once upon")
    page.reload()
    expect(page.locator(".user .text")).to_have_text("story")
    expect(answers(page)).to_contain_text("Once upon")
    server.model.engine.allow(float("inf"))
    expect(page.locator(".note")).to_contain_text("tokens")
    expect(answers(page)).to_have_text(DIALOGUES["story"].strip())
    page.reload()
    expect(answers(page)).to_have_text(DIALOGUES["story"].strip())
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.get_by_role("heading", name="Say something.")).to_be_visible()


def test_what_people_and_models_write_stays_text(page: Any) -> None:
    page.add_init_script("window.hacked = 0")
    say(page, "markdown")
    for _ in range(2):
        expect(page.locator(".note")).to_be_visible()
        expect(answers(page).locator("strong")).to_have_text("bold")
        expect(answers(page)).to_contain_text("<script>window.hacked=1</script>")
        expect(answers(page).locator("pre .n")).to_have_text("x")
        page.reload()
    page.get_by_role("button", name="New chat").click()
    attack = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    say(page, attack)
    expect(page.locator(".user .text")).to_have_text(attack)
    expect(page.locator(".note")).to_be_visible()
    assert page.locator("main img, main script, main iframe").count() == 0
    assert not page.evaluate("window.hacked")


def test_inline_scripts_do_not_run(page: Any) -> None:
    """The policy itself: even markup that got into the page could not run a script."""
    page.expected = ["Content Security Policy", "404 (Not Found)"]
    image = "<img src=nothing onerror='window.hacked=1'>"
    script = "const s = document.createElement('script'); s.textContent = 'window.hacked=1'; document.body.append(s)"
    for attack in (f'document.body.insertAdjacentHTML("beforeend", "{image}")', script):
        with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            page.evaluate(attack)
    assert not page.evaluate("window.hacked")


def test_settings_are_used_and_kept(page: Any) -> None:
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request) if request.url.endswith("/chat/jobs") else None)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("5")
    page.get_by_role("button", name="Done").click()
    say(page, "story")
    expect(page.locator(".note")).to_contain_text("5 tokens")
    expect(page.locator(".note")).to_contain_text("cut off")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("Temperature").fill("0.5")
    page.keyboard.press("Escape")  # closes the dialog
    say(page, "hello")
    expect(page.locator(".note")).to_have_count(2)
    first, second = (json.loads(request.post_data) for request in sent)
    assert first["messages"] == [{"role": "user", "content": "story"}]
    assert (first["temperature"], first["max_tokens"]) == (0, 5)
    assert second["messages"][0] == {"role": "system", "content": "Be kind."}
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert (second["temperature"], second["max_tokens"]) == (0.5, 5)
    page.reload()
    assert page.get_by_label("System prompt").input_value() == "Be kind."


def test_keyboard_makes_lines(page: Any) -> None:
    field = page.get_by_label("Message", exact=True)
    field.press_sequentially("one")
    low = field.bounding_box()["height"]
    field.press("Shift+Enter")
    field.press_sequentially("two")
    assert field.input_value() == "one\ntwo"
    assert field.bounding_box()["height"] > low
    field.press("Enter")
    expect(page.locator(".user .text")).to_have_text("one\ntwo")
    expect(page.locator(".note")).to_be_visible()


def test_errors_and_dropped_turns_are_shown(page: Any) -> None:
    page.expected = ["400 (Bad Request)"]
    say(page, "long " * 400)
    expect(page.get_by_role("alert")).to_contain_text("too long")
    page.get_by_role("button", name="New chat").click()
    for count in range(1, 4):
        say(page, "many words " * 10)
        expect(page.locator(".note")).to_have_count(count)
    expect(page.locator(".notice")).to_contain_text("no longer fit the model's window of 256 tokens")


def test_a_lost_answer_can_be_asked_again(page: Any, server: Running) -> None:  # noqa: F811
    page.expected = ["404 (Not Found)"]
    page.evaluate(
        """sessionStorage.setItem("chatwright.chat", JSON.stringify(
            {messages: [{role: "user", content: "hello"}], system: "", job: "from-before-a-restart", dropped: 0}))"""
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("no longer on the server")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_fits_its_width(browser: Any, tiny: TinyModel, width: int) -> None:  # noqa: F811
    with run_server(tiny, name="runs/a-rather-long-name/of-a-model/ppo") as long_named:
        context = browser.new_context(viewport={"width": width, "height": 640})
        page = context.new_page()
        page.goto(long_named.url)
        say(page, "markdown")
        expect(page.locator(".note")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("header").bounding_box()["height"] < 64  # one line
        for name in ("Settings", "New chat", "Send"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert min(box["width"], box["height"]) >= 32
        context.close()
