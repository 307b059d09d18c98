"""Tokens, keyboard, colours, phones and accessibility of the chat page in the system's Chromium."""

from __future__ import annotations

from typing import Any

import pytest

from support import axe
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

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


# ---- tokens ------------------------------------------------------------------------------------------------


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
    expect(last(page, "answer").get_by_role("button", name="Token probabilities")).to_have_count(
        0
    )  # not asked for
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
    assert all(
        share < 0.1
        for share in marked.evaluate_all(
            "(all) => all.map((token) => token.style.getPropertyValue('--p')).map(Number)"
        )
    )


# ---- keyboard ----------------------------------------------------------------------------------------------


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
        assert page.evaluate(
            "document.activeElement === document.body || !!document.activeElement.closest('dialog[open]')"
        )
    page.keyboard.press("Escape")
    expect(settings).to_be_focused()


# ---- colours and sizes -------------------------------------------------------------------------------------


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
            assert page.get_by_role("dialog", name="Settings").evaluate(
                "(one) => one.scrollWidth <= one.clientWidth"
            )


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


# ---- axe ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def axe_script() -> str:
    return axe.source()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_nothing_serious(
    browser: Any, server: Running, axe_script: str, scheme: str, size: str
) -> None:
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
