"""Conversations, models, tokens, keyboard, colours and phones in the system's Chromium."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parent))

import axe
from browsing import (  # noqa: F401
    answered,
    answers,
    browser,
    button,
    chat,
    expect,
    needs_browser,
    page,
    say,
    set_fields,
    users,
    visiting,
)
from serving import DIALOGUES, Running, TinyModel, run_server, server, small, taught, tiny  # noqa: F401

from chatwright.language_model import LanguageModel

pytestmark = needs_browser

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


def rows(page: Any) -> Any:
    """The conversations in the sidebar."""
    return page.get_by_role("navigation", name="Earlier conversations").get_by_role("link")


def last(page: Any, kind: str) -> Any:
    """The last turn of a kind."""
    return page.locator(f".{kind}.turn").last


# ---- conversations -----------------------------------------------------------------------------------------------


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
    page.route("https://elsewhere.example/", lambda route: route.fulfill(body=f"<a href='{server.url}/'>go</a>", content_type="text/html"))
    page.expected = ["https://elsewhere.example/"]
    page.goto("https://elsewhere.example/")
    with page.expect_request(f"{server.url}/") as visit:
        page.get_by_role("link", name="go").click()
    assert "cookie" not in visit.value.all_headers()
    expect(rows(page)).to_have_text(["hello"])


def test_a_restart_loses_nothing(browser: Any, tiny: TinyModel, tmp_path: Path) -> None:
    """The same file under another server: what was said is there, and what was cut off says so and can go on."""
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


# ---- answers -----------------------------------------------------------------------------------------------------


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


# ---- models ------------------------------------------------------------------------------------------------------


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


# ---- tokens ------------------------------------------------------------------------------------------------------


def test_token_probabilities_by_mouse(page: Any) -> None:
    button(page, "Token probabilities").click()
    chat(page, "snowman")
    tokens = page.locator(".token")
    assert "".join(tokens.all_text_contents()) == DIALOGUES["snowman"]
    snowman = page.locator(".token", has_text="☃")
    snowman.hover()
    card = page.get_by_role("tooltip")
    expect(card).to_be_visible()
    expect(card.locator(".card-head")).to_contain_text("☃")
    expect(card.locator("li")).to_have_count(5)
    expect(card).to_contain_text("%")
    card.hover()  # the card itself may be pointed at
    page.wait_for_timeout(300)
    expect(card).to_be_visible()
    page.mouse.move(2, 2)
    expect(card).to_be_hidden()
    snowman.hover()
    expect(card).to_be_visible()
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()


def test_token_probabilities_by_keyboard(page: Any) -> None:
    button(page, "Token probabilities").click()
    chat(page, "hello")
    page.get_by_role("log").locator('.user [aria-label="Edit"]').focus()
    page.keyboard.press("Tab")  # one stop for the whole answer
    card, tokens = page.get_by_role("tooltip"), page.locator(".token")
    expect(tokens.first).to_be_focused()
    expect(card).to_be_visible()
    expect(tokens.first).to_have_attribute("aria-describedby", "card")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(card.locator(".card-head .card-text")).to_have_text(tokens.nth(1).text_content().replace(" ", "␣"))
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    page.keyboard.press("Tab")
    expect(card).to_be_hidden()


def test_tokens_and_markdown(page: Any) -> None:
    chat(page, "name?")
    expect(last(page, "answer").get_by_role("button", name="Token probabilities")).to_have_count(0)  # not asked for
    button(page, "New chat").click()
    pill = page.locator("#show-tokens")
    pill.click()
    chat(page, "markdown")
    expect(page.locator(".token").first).to_be_visible()
    page.reload()
    expect(page.locator(".token").first).to_be_visible()
    assert "".join(page.locator(".token").all_text_contents()) == DIALOGUES["markdown"]
    own = last(page, "answer").get_by_role("button", name="Token probabilities")
    expect(own).to_have_attribute("aria-pressed", "true")
    own.click()
    expect(page.locator(".answer strong")).to_have_text("bold")
    expect(own).to_have_attribute("aria-pressed", "false")
    own.click()
    expect(page.locator(".token").first).to_be_visible()
    pill.click()
    expect(page.locator(".answer strong")).to_have_text("bold")
    assert not page.evaluate("window.hacked")


def test_tokens_come_while_they_are_written(page: Any, server: Running) -> None:
    button(page, "Token probabilities").click()
    server.model.engine.allow(8)
    say(page, "story")
    expect(page.locator(".token").nth(2)).to_be_visible()
    expect(page.locator(".answer.writing")).to_be_visible()
    page.reload()
    expect(page.locator(".token").nth(2)).to_be_visible()
    server.model.engine.allow(float("inf"))
    answered(page)
    assert "".join(page.locator(".token").all_text_contents()) == DIALOGUES["story"]


def test_what_is_unlikely_is_marked_without_colour(page: Any) -> None:
    """An untaught continuation at the highest temperature has unlikely tokens."""
    set_fields(page, Temperature="2", Seed="1")
    button(page, "Token probabilities").click()
    chat(page, "say anything")
    marked = page.locator(".token.unlikely")
    assert marked.count() > 0
    assert marked.first.evaluate("(token) => getComputedStyle(token).textDecorationStyle") == "dotted"
    assert all(share < 0.1 for share in marked.evaluate_all("(all) => all.map((token) => token.style.getPropertyValue('--p'))"
                                                             ".map(Number)"))  # fmt: skip


# ---- keyboard ----------------------------------------------------------------------------------------------------


def test_shortcuts(page: Any) -> None:
    message = page.get_by_label("Message", exact=True)
    chat(page, "hello")
    message.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_have_value("hello")
    page.keyboard.press("Escape")
    message.fill("a draft")
    message.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_have_count(0)
    message.fill("what / is ?")  # in a field they are characters
    assert page.locator("dialog[open]").count() == 0
    message.fill("")
    page.get_by_role("button", name="Keyboard shortcuts").focus()
    page.keyboard.press("/")
    expect(message).to_be_focused()
    assert message.input_value() == ""
    page.get_by_role("button", name="Keyboard shortcuts").focus()
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_be_visible()
    page.keyboard.press("/")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Keyboard shortcuts")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_role("heading", name="Say something.")).to_be_visible()
    expect(message).to_be_focused()


def test_dialogs_give_the_focus_back(page: Any) -> None:
    settings = button(page, "Settings")
    settings.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    for _ in range(20):
        page.keyboard.press("Tab")
        # Behind the last field is the browser's own bar, for which the page has its body.
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog[open]')")
    page.keyboard.press("Escape")
    expect(settings).to_be_focused()


# ---- colours and sizes -------------------------------------------------------------------------------------------


def background(page: Any) -> int:
    """How bright the page is, 0 to 255."""
    return int(page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"))


def test_dark_mode_follows_the_system_or_the_choice(browser: Any, server: Running) -> None:
    with visiting(browser, server.url, color_scheme="dark") as page:
        assert background(page) < 64
        page.emulate_media(color_scheme="light")
        assert background(page) > 192
        button(page, "Settings").click()
        page.get_by_role("radio", name="Dark").check()
        button(page, "Done").click()
        assert background(page) < 64
        page.reload()
        assert background(page) < 64
        button(page, "Settings").click()
        expect(page.get_by_role("radio", name="Dark")).to_be_checked()
        page.get_by_role("radio", name="System").check()
        assert background(page) > 192


def test_a_phone(browser: Any, tiny: TinyModel) -> None:
    def fits(page: Any) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("header").bounding_box()["height"] < 64

    with run_server(tiny, name="runs/a-rather-long-name/of-a-model/ppo") as server:
        with visiting(browser, server.url, **PHONE) as page:
            expect(page.locator("#sidebar")).to_be_hidden()
            fits(page)
            page.locator("#show-tokens").tap()
            chat(page, "hello")
            page.locator(".token").first.tap()
            card = page.get_by_role("tooltip")
            expect(card).to_be_visible()
            box = card.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360
            page.locator("#show-tokens").tap()
            button(page, "New chat").tap()
            chat(page, "markdown")
            fits(page)
            chat(page, "x" * 150)
            fits(page)
            opener = button(page, "List of conversations")
            opener.tap()
            expect(page.locator("#sidebar")).to_be_visible()
            expect(page.locator("#sidebar")).to_be_focused()
            expect(opener).to_have_attribute("aria-expanded", "true")
            expect(rows(page)).to_have_count(2)
            fits(page)
            page.keyboard.press("Escape")
            expect(page.locator("#sidebar")).to_be_hidden()
            expect(opener).to_be_focused()
            opener.tap()
            rows(page).nth(1).tap()
            expect(page.locator("#sidebar")).to_be_hidden()
            expect(users(page)).to_have_text(["hello"])
            button(page, "Settings").tap()
            fits(page)
            dialog = page.get_by_role("dialog", name="Settings").bounding_box()
            assert dialog["x"] >= 0 and dialog["x"] + dialog["width"] <= 360
            assert page.get_by_role("dialog", name="Settings").evaluate("(one) => one.scrollWidth <= one.clientWidth")


def test_the_sidebar_folds_and_stays_folded(page: Any) -> None:
    button(page, "List of conversations").click()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.reload()
    expect(page.locator("#sidebar")).to_be_hidden()
    button(page, "List of conversations").click()
    expect(page.locator("#sidebar")).to_be_visible()


def test_nothing_moves_for_those_who_want_that(browser: Any, server: Running) -> None:
    with visiting(browser, server.url, reduced_motion="reduce", **PHONE) as page:
        server.model.engine.allow(4)
        say(page, "story")
        expect(page.locator(".answer.writing")).to_be_visible()
        moving = "document.getAnimations().filter((one) => one.playState === 'running').length"
        button(page, "List of conversations").tap()
        assert page.evaluate(moving) == 0
        server.model.engine.allow(float("inf"))
        page.keyboard.press("Escape")
        answered(page)


# ---- axe ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def axe_script() -> str:
    return axe.source()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_nothing_serious(browser: Any, server: Running, axe_script: str, scheme: str, size: str) -> None:
    settings = {"color_scheme": scheme, "reduced_motion": "reduce", **(PHONE if size == "phone" else {})}
    with visiting(browser, server.url, **settings) as page:

        def check(state: str) -> None:
            assert (state, axe.findings(page, axe_script)) == (state, [])

        check("empty")
        chat(page, "markdown")
        button(last(page, "answer"), "Regenerate").click()
        expect(page.locator(".count")).to_have_text("2 / 2")
        answered(page)
        check("conversation")
        last(page, "user").hover()
        button(last(page, "user"), "Edit").click()
        check("editing")
        page.keyboard.press("Escape")
        for opener, name in (("Settings", "Settings"), ("Keyboard shortcuts", "Keyboard shortcuts")):
            if size == "phone" and opener == "Keyboard shortcuts":
                button(page, "List of conversations").click()
                check("drawer")
            button(page, opener).click()
            expect(page.get_by_role("dialog", name=name)).to_be_visible()
            check(name)
            page.keyboard.press("Escape")
        rows(page).first.hover()
        button(page, "Rename markdown").click()
        check("rename")
        page.keyboard.press("Escape")
        button(page, "Delete markdown").click()
        check("confirm")
        page.keyboard.press("Escape")
        if size == "phone":
            page.keyboard.press("Escape")
        button(page, "New chat").click()
        page.locator("#show-tokens").click()
        chat(page, "say anything")
        page.locator(".token").first.focus()
        expect(page.get_by_role("tooltip")).to_be_visible()
        check("tokens")
        say(page, "long " * 400)
        expect(page.get_by_role("alert")).to_be_visible()
        check("error")
        server.model.engine.allow(6)
        button(page, "New chat").click()
        say(page, "story")
        expect(answers(page)).to_contain_text("Once")
        check("writing")
        server.model.engine.allow(float("inf"))
        answered(page)
