"""The chat page in the system's Chromium: a person's way through it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.browsing import answers, button, expect, needs_browser, say, set_fields, visiting
from support.serving import DIALOGUES, Running, TinyModel, run_server

pytestmark = needs_browser


def test_a_message_is_answered_as_it_is_written(page: Any, server: Running) -> None:
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


def test_who_writes_before_the_page_is_ready_is_heard(page: Any, server: Running) -> None:
    held: list[Any] = []
    page.route("**/chat/owner", lambda route: held.append(route))
    with page.expect_request("**/chat/owner"):
        page.goto(server.url, wait_until="commit")
    say(page, "hello")
    expect(page.locator(".user")).to_have_count(0)
    held[0].continue_()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])


def test_stop_button_and_escape(page: Any, server: Running) -> None:
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


def test_reload_in_the_middle_of_an_answer(page: Any, server: Running) -> None:
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
    script = (
        "const s = document.createElement('script'); s.textContent = 'window.hacked=1'; "
        "document.body.append(s)"
    )
    for attack in (f'document.body.insertAdjacentHTML("beforeend", "{image}")', script):
        with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            page.evaluate(attack)
    assert not page.evaluate("window.hacked")


def test_settings_are_used_and_kept(page: Any) -> None:
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request) if request.url.endswith("/answers") else None)
    set_fields(page, Longest_answer="5")
    say(page, "story")
    expect(page.locator(".note")).to_contain_text("5 tokens")
    expect(page.locator(".note")).to_contain_text("cut off")
    changed = {
        "System prompt": "Be kind.",
        "Temperature": "0.5",
        "Top-p": "0.9",
        "Top-k": "7",
        "Min-p": "0.1",
        "Repetition penalty": "1.1",
        "Presence penalty": "0.5",
        "Frequency penalty": "-0.5",
        "Seed": "11",
        "Stop texts": "one\\n\ntwo",
    }
    button(page, "Settings").click()
    for label, value in changed.items():
        page.get_by_label(label).fill(value)
    page.keyboard.press("Escape")  # closes the dialog
    say(page, "hello")
    expect(page.locator(".note")).to_have_count(2)
    first, second = (json.loads(request.post_data) for request in sent)
    assert (first["system"], first["settings"]["temperature"], first["settings"]["max_tokens"]) == ("", 0, 5)
    assert second["system"] == "Be kind."
    assert second["settings"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 11,
        "max_tokens": 5,
        "stop": ["one\n", "two"],
    }
    page.reload()
    expect(page.locator(".user")).to_have_count(2)
    for label, value in changed.items():
        assert page.get_by_label(label).input_value() == value, label
    button(page, "Settings").click()
    button(page, "Reset").click()
    assert page.get_by_label("Top-p").input_value() == "1"
    assert page.get_by_label("Seed").input_value() == ""
    assert page.get_by_label("Stop texts").input_value() == ""
    assert page.get_by_label("System prompt").input_value() == "Be kind."  # no sampling setting
    button(page, "Done").click()


def test_a_number_that_makes_no_sense_is_not_sent(page: Any) -> None:
    set_fields(page, **{"Top-p": "7", "Top-k": "-3"})
    say(page, "hello")
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    assert page.get_by_label("Top-p").input_value() == "1"


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
    say(page, "long " * 400)
    expect(page.get_by_role("alert")).to_contain_text("too long")
    button(page, "New chat").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    for count in range(1, 4):
        say(page, "many words " * 10)
        expect(page.locator(".note")).to_have_count(count)
    expect(page.locator(".notice")).to_contain_text("no longer fit the model's window of 256 tokens")
    page.reload()
    expect(page.locator(".notice")).to_contain_text("no longer fit")


def test_a_failed_answer_can_be_asked_again(
    page: Any, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(server.model, "template", None)
        say(page, "hello")
        expect(page.get_by_role("alert")).to_contain_text("it is a base model")
        page.reload()
        expect(page.locator(".notice")).to_contain_text("no answer yet")
    button(page, "Answer it").click()
    expect(answers(page)).to_have_text(DIALOGUES["hello"])
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator(".notice")).to_have_count(0)


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_fits_its_width(browser: Any, tiny: TinyModel, width: int) -> None:
    with run_server(tiny, name="runs/a-rather-long-name/of-a-model/ppo") as long_named:
        with visiting(browser, long_named.url, viewport={"width": width, "height": 640}) as page:
            say(page, "markdown")
            expect(page.locator(".note")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("header").bounding_box()["height"] < 64  # one line
            for name in ("Settings", "New chat", "Send"):
                box = page.get_by_role("button", name=name).bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
                assert min(box["width"], box["height"]) >= 32
