"""Conversations, answers and models in the system's Chromium."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatwright.language_model import LanguageModel
from support.browsing import (
    answered,
    answers,
    button,
    chat,
    expect,
    last,
    needs_browser,
    rows,
    say,
    set_fields,
    users,
    visiting,
)
from support.serving import DIALOGUES, Running, TinyModel, run_server

pytestmark = needs_browser

# ---- conversations -----------------------------------------------------------------------------------------


def test_conversations_are_kept_and_have_addresses(page: Any) -> None:
    chat(page, "hello")
    first = page.url
    assert "/c/" in first
    button(page, "New chat").click()
    expect(page.get_by_role("heading", name="Say something.")).to_be_visible()
    chat(page, "name?")
    expect(rows(page)).to_have_text(["name?", "hello"])
    expect(rows(page).first).to_have_attribute("aria-current", "page")
    rows(page).nth(1).click()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    assert page.url == first
    assert page.title() == "hello · chatwright"
    page.go_back()
    expect(answers(page)).to_have_text(DIALOGUES["name?"])
    page.go_forward()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    page.reload()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    chat(page, "name?")
    expect(users(page)).to_have_text(["hello", "name?"])
    expect(rows(page)).to_have_text(["hello", "name?"])  # what was said last comes first


def test_rename_search_and_delete(page: Any) -> None:
    for text in ("hello", "name?"):
        button(page, "New chat").click()
        chat(page, text)
    rows(page).nth(1).hover()
    button(page, "Rename hello").click()
    title = "<b>Größe</b> & more"
    page.get_by_label("New title").fill(title)
    page.keyboard.press("Enter")
    expect(rows(page)).to_have_text(["name?", title])
    page.get_by_label("Search conversations").fill("GRÖSSE".replace("SS", "ß"))
    expect(rows(page)).to_have_text([title])
    rows(page).first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(title)
    page.get_by_label("Search conversations").fill("nothing")
    expect(page.locator("#list-note")).to_have_text("No title has these words.")
    page.get_by_label("Search conversations").press("Escape")
    expect(rows(page)).to_have_count(2)
    rows(page).nth(1).hover()
    button(page, f"Rename {title}").click()
    page.get_by_label("New title").fill("thrown away")
    page.keyboard.press("Escape")
    expect(rows(page)).to_have_text(["name?", title])
    for choice, left in (("Cancel", 2), ("Delete", 1)):
        rows(page).nth(1).hover()
        button(page, f"Delete {title}").click()
        dialog = page.get_by_role("dialog", name="Delete this conversation?")
        expect(dialog).to_contain_text(title)
        expect(button(dialog, "Cancel")).to_be_focused()
        button(dialog, choice).click()
        expect(rows(page)).to_have_count(left)
    expect(page.get_by_role("heading", name="Say something.")).to_be_visible()  # it was the one that was open
    page.reload()
    expect(rows(page)).to_have_text(["name?"])


def test_a_long_list_comes_in_pages(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatwright.serve.conversations.PAGE", 2)
    for text in ("hello", "name?", "snowman"):
        button(page, "New chat").click()
        chat(page, text)
    expect(rows(page)).to_have_text(["snowman", "name?"])
    button(page, "Show more").click()
    expect(rows(page)).to_have_text(["snowman", "name?", "hello"])
    expect(rows(page).nth(2)).to_be_focused()
    expect(button(page, "Show more")).to_have_count(0)


def test_a_conversation_that_is_not_there(page: Any, server: Running) -> None:
    page.expected = ["404 (Not Found)"]
    page.goto(f"{server.url}/c/nothing")
    expect(page.get_by_role("alert")).to_contain_text("not here")
    button(page, "New chat").click()
    chat(page, "hello")
    expect(answers(page)).to_have_text(DIALOGUES["hello"])


def test_another_browser_sees_nothing(browser: Any, page: Any, server: Running) -> None:
    chat(page, "hello")
    with visiting(browser, server.url) as other:
        expect(other.locator("#list-note")).to_have_text("Your conversations will be here.")
        other.expected = ["404 (Not Found)"]
        other.goto(page.url)
        expect(other.get_by_role("alert")).to_contain_text("not here")


def test_coming_by_a_link_from_elsewhere_keeps_the_conversations(page: Any, server: Running) -> None:
    """The cookie is not sent with such a visit; nothing may put another in its place."""
    chat(page, "hello")
    page.route(
        "https://elsewhere.example/",
        lambda route: route.fulfill(body=f"<a href='{server.url}/'>go</a>", content_type="text/html"),
    )
    page.expected = ["https://elsewhere.example/"]
    page.goto("https://elsewhere.example/")
    with page.expect_request(f"{server.url}/") as visit:
        page.get_by_role("link", name="go").click()
    assert "cookie" not in visit.value.all_headers()
    expect(rows(page)).to_have_text(["hello"])


def test_a_restart_loses_nothing(browser: Any, tiny: TinyModel, tmp_path: Path) -> None:
    """The same file under another server: what was said is there, and what was cut off says so and can go
    on."""
    store = str(tmp_path / "store.db")
    again = TinyModel(tiny.model, tiny.tokenizer)
    with run_server(again, store=store) as second:
        with run_server(tiny, store=store) as first, visiting(browser, first.url, second.url) as page:
            chat(page, "hello")
            button(page, "New chat").click()
            first.model.engine.allow(8)
            say(page, "story")
            expect(answers(page)).to_contain_text("Once upon")
            address = page.url.replace(first.url, second.url)
            page.goto(second.url)  # the first server ends without a page
            first.app.state.pool.cancel_all()
            expect(rows(page)).to_have_text(["story", "hello"])
            page.goto(address)
            expect(answers(page)).to_contain_text("Once upon")
            expect(page.locator(".note")).to_contain_text("interrupted")
            partial = answers(page).inner_text()
            assert len(partial) < len(DIALOGUES["story"]) / 2
            button(page, "Continue").click()
            answered(page)
            assert answers(page).inner_text().startswith(partial)
            expect(page.locator(".note")).not_to_contain_text("interrupted")
            rows(page).nth(1).click()
            expect(answers(page)).to_have_text(DIALOGUES["hello"])


# ---- answers -----------------------------------------------------------------------------------------------


def test_regenerate_and_switch(page: Any) -> None:
    chat(page, "hello")
    set_fields(page, Longest_answer="2")
    button(last(page, "answer"), "Regenerate").click()
    expect(page.locator(".count")).to_have_text("2 / 2")
    answered(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()  # the button that had the focus is gone
    short = answers(page).inner_text()
    assert len(short) < len(DIALOGUES["hello"])
    previous, following = button(page, "Previous version"), button(page, "Next version")
    expect(following).to_be_disabled()
    previous.click()
    expect(page.locator(".count")).to_have_text("1 / 2")
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    expect(following).to_be_focused()  # there is none before; the keyboard stays where it is
    page.reload()
    expect(page.locator(".count")).to_have_text("1 / 2")
    following.click()
    expect(answers(page)).to_have_text(short)


def test_edit_makes_a_branch(page: Any) -> None:
    chat(page, "hello")
    chat(page, "name?")
    first = page.locator(".user.turn").first
    first.hover()
    button(first, "Edit").click()
    field = page.get_by_label("Edit the message")
    expect(field).to_be_focused()
    page.keyboard.press("Escape")
    expect(field).to_have_count(0)
    expect(button(first, "Edit")).to_be_focused()
    page.keyboard.press("Enter")
    field.fill("snowman")
    page.keyboard.press("Enter")
    expect(users(page)).to_have_text(["snowman"])
    expect(answers(page)).to_have_text([DIALOGUES["snowman"]])
    expect(page.locator(".count")).to_have_text("2 / 2")
    answered(page)
    button(page, "Previous version").click()
    expect(users(page)).to_have_text(["hello", "name?"])  # with all that followed
    page.reload()
    expect(users(page)).to_have_text(["hello", "name?"])


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Any, server: Running) -> None:
    chat(page, "hello")
    button(page, "New chat").click()
    server.model.engine.allow(8)
    say(page, "story")
    expect(answers(page)).to_contain_text("Once upon")
    expect(rows(page)).to_have_text(["story", "hello"])
    rows(page).nth(1).click()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    expect(button(page, "Send")).to_be_visible()
    rows(page).first.click()
    expect(answers(page)).to_contain_text("Once upon")
    expect(button(page, "Stop")).to_be_visible()
    server.model.engine.allow(float("inf"))
    expect(answers(page)).to_have_text(DIALOGUES["story"].strip())


def test_a_cut_off_answer_goes_on(page: Any) -> None:
    set_fields(page, Longest_answer="12")
    chat(page, "story")
    expect(page.locator(".note")).to_contain_text("cut off")
    begun = answers(page).inner_text()
    set_fields(page, Longest_answer="128")
    button(page, "Continue").click()
    expect(answers(page)).to_have_text(DIALOGUES["story"].strip())
    assert DIALOGUES["story"].startswith(begun)
    answered(page)
    expect(button(page, "Continue")).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(2)


def test_nothing_else_is_asked_while_an_answer_is_written(page: Any, server: Running) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    chat(page, "hello")
    server.model.engine.allow(8)
    say(page, "story")
    expect(answers(page).nth(1)).not_to_be_empty()
    before = len(sent)
    button(page.locator(".answer.turn").first, "Regenerate").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Message", exact=True).fill("too early")
    page.keyboard.press("Enter")
    assert len(sent) == before
    assert page.get_by_label("Message", exact=True).input_value() == "too early"
    button(page, "Stop").click()
    answered(page)
    page.keyboard.press("Enter")
    expect(users(page)).to_have_text(["hello", "story", "too early"])
    server.model.engine.allow(float("inf"))
    answered(page)


def test_copy(browser: Any, server: Running) -> None:
    with visiting(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        chat(page, "markdown")
        button(last(page, "answer"), "Copy").click()
        expect(page.get_by_role("status")).to_have_text("Copied.")
        assert page.evaluate("navigator.clipboard.readText()") == DIALOGUES["markdown"]


def test_export(page: Any) -> None:
    chat(page, "hello")
    button(page, "Settings").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    line = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert line["messages"][1] == {"role": "assistant", "content": DIALOGUES["hello"]}


# ---- models ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_models(tiny: TinyModel, small: LanguageModel) -> Iterator[tuple[Running, threading.Event]]:
    """A server of two models; the second is loaded once the event is set."""
    gate = threading.Event()

    def load(_: Any) -> LanguageModel:
        assert gate.wait(60)
        return small

    with run_server(tiny, models=["small=somewhere"], loader=load) as server:
        yield server, gate
        gate.set()


def test_switching_models(browser: Any, two_models: tuple[Running, threading.Event]) -> None:
    server, gate = two_models
    with visiting(browser, server.url) as page:
        set_fields(page, Longest_answer="3")
        expect(page.locator("#welcome")).to_contain_text("tiny/taught. It sees the last 256 tokens")
        page.get_by_label("Model", exact=True).select_option("small")
        expect(page.locator("#welcome")).to_contain_text("small. It is loaded when you first write to it.")
        say(page, "hello")
        expect(page.locator(".note")).to_have_text("loading small …")
        page.reload()
        expect(page.locator(".note")).to_have_text("loading small …")
        gate.set()
        answered(page)
        expect(last(page, "answer").locator(".note")).to_contain_text("small")
        page.get_by_label("Model", exact=True).select_option("tiny/taught")
        button(last(page, "answer"), "Regenerate").click()
        expect(page.locator(".count")).to_have_text("2 / 2")
        answered(page)
        expect(last(page, "answer").locator(".note")).to_contain_text("tiny/taught")
        page.reload()
        expect(page.locator(".count")).to_have_text("2 / 2")
        assert page.get_by_label("Model", exact=True).input_value() == "tiny/taught"
        button(page, "New chat").click()
        assert page.get_by_label("Model", exact=True).input_value() == "tiny/taught"  # what was chosen last


def test_stop_while_a_model_is_loaded(browser: Any, two_models: tuple[Running, threading.Event]) -> None:
    server, _ = two_models
    with visiting(browser, server.url) as page:
        page.get_by_label("Model", exact=True).select_option("small")
        say(page, "hello")
        expect(page.locator(".note")).to_have_text("loading small …")
        page.keyboard.press("Escape")
        answered(page)
        expect(page.locator(".note")).to_contain_text("stopped")
        page.get_by_label("Model", exact=True).select_option("tiny/taught")
        button(last(page, "answer"), "Regenerate").click()
        expect(answers(page)).to_have_text(DIALOGUES["hello"])


def test_a_full_store_says_what_to_do(browser: Any, tiny: TinyModel) -> None:
    with run_server(tiny, max_conversations=1) as server, visiting(browser, server.url) as page:
        page.expected = ["403"]
        chat(page, "hello")
        button(page, "New chat").click()
        say(page, "name?")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(
            "delete some that you no longer need, or have --max_conversations raised"
        )
        expect(page.get_by_label("Message", exact=True)).to_have_value("name?")  # nothing typed is lost
        rows(page).first.hover()
        button(page, "Delete hello").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(rows(page)).to_have_count(0)
        page.get_by_label("Message", exact=True).press("Enter")
        answered(page)
        expect(answers(page)).to_have_text(DIALOGUES["name?"])
