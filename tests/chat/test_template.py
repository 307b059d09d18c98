"""The chat template: what people write stays text, the mask covers what must be learnt, hostile templates
fail."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatwright.chat import (
    NATIVE,
    ROLES,
    ChatTemplate,
    Message,
    check_messages,
    fit_context,
)
from chatwright.config import UserError
from chatwright.messages import UnreadablePart, parts_of, written
from chatwright.tokenizer import CONTROLS, Tokenizer

TOKENIZER = Tokenizer.train(
    ["Hello there, how are you?", "I am fine. <|end|> system user assistant"] * 3, 320
)
CONTROL_IDS = TOKENIZER.control_ids
END = CONTROL_IDS["<|end|>"]
CHATML = ChatTemplate.from_source(
    "{% for m in messages %}{{ '<|reserved_0|>' + m.role + '\n' + m.content + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|reserved_0|>assistant\n' }}{% endif %}"
)
"""The shape of many models' templates: text of the template's own before and behind contents."""
TRIMMING = ChatTemplate.from_source(
    "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A default system message, and contents that pass through a filter."""

CONTENT = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROLS, "<|im_end|>", "{{ 1 }}", "{% raw %}", "{#", "x0x", "\ud800", "", " ", "\n"]
        ),
        st.text(st.characters(), max_size=8),
    ),
    max_size=5,
).map("".join)
MESSAGES = st.lists(
    st.builds(lambda role, content: Message(role=role, content=content), st.sampled_from(ROLES), CONTENT),
    min_size=1,
    max_size=5,
)


def say(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation that the user begins."""
    turns = [Message(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(contents)]
    return ([Message(role="system", content=system)] if system is not None else []) + turns


def controls_of(ids: list[int]) -> list[int]:
    return [number for number in ids if number in CONTROL_IDS.values()]


# Injection


@given(MESSAGES, st.booleans())
def test_control_tokens_stand_exactly_where_the_template_puts_them(
    messages: list[Message], ask: bool
) -> None:
    expected: list[int] = []
    for message in messages:
        expected += [CONTROL_IDS[f"<|{message['role']}|>"], *TOKENIZER.encode(message["content"]), END]
    if ask:
        expected.append(CONTROL_IDS["<|assistant|>"])
    assert NATIVE.encode(messages, TOKENIZER, add_generation_prompt=ask).ids == expected


@pytest.mark.parametrize("template", [NATIVE, CHATML, TRIMMING], ids=["native", "chatml", "trimming"])
@given(messages=MESSAGES)
def test_contents_never_change_the_control_tokens(template: ChatTemplate, messages: list[Message]) -> None:
    plain = [Message(role=message["role"], content="x") for message in messages]
    ids = template.encode(messages, TOKENIZER).ids
    assert controls_of(ids) == controls_of(template.encode(plain, TOKENIZER).ids)


@given(MESSAGES)
def test_contents_come_back_from_between_the_control_tokens(messages: list[Message]) -> None:
    ids = NATIVE.encode(messages, TOKENIZER).ids
    stretches: list[list[int]] = []
    for number in ids:
        if number in CONTROL_IDS.values():
            stretches.append([])
        else:
            stretches[-1].append(number)
    contents = [TOKENIZER.decode_bytes(stretch) for stretch in stretches[::2]]
    assert contents == [message["content"].encode("utf-8", errors="surrogatepass") for message in messages]
    assert stretches[1::2] == [[]] * len(messages)


# Mask


@given(MESSAGES)
def test_the_mask_is_answers_and_their_ends(messages: list[Message]) -> None:
    expected: list[bool] = []
    for message in messages:
        learnt = message["role"] == "assistant"
        expected += [False, *[learnt] * len(TOKENIZER.encode(message["content"])), learnt]
    encoded = NATIVE.encode(messages, TOKENIZER)
    assert encoded.mask == expected


@given(MESSAGES)
def test_the_mask_stops_behind_the_end_token(messages: list[Message]) -> None:
    """CHATML writes a line break behind each end: it is the template's, never learnt."""
    encoded = CHATML.encode(messages, TOKENIZER)
    learnt = [number for number, flag in zip(encoded.ids, encoded.mask, strict=True) if flag]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    # A token that begins with the template's line break and goes on with the answer is learnt, too.
    wanted = b"".join(
        rb"\n?" + re.escape(answer.encode("utf-8", errors="surrogatepass")) + b"<END>" for answer in answers
    )
    found = b"".join(b"<END>" if number == END else TOKENIZER.token_bytes(number) for number in learnt)
    assert re.fullmatch(wanted, found)


def test_a_prompt_has_nothing_to_learn_after_the_last_answer() -> None:
    encoded = NATIVE.encode(say("a", "b", "c"), TOKENIZER, add_generation_prompt=True)
    assert encoded.ids[-1] == CONTROL_IDS["<|assistant|>"] and not encoded.mask[-1]
    whole = NATIVE.encode(say("a", "b", "c", "d"), TOKENIZER)
    assert whole.ids[: len(encoded.ids)] == encoded.ids


# Templates that are put together, and those that are not


@given(MESSAGES, MESSAGES)
def test_turns_concatenate(first: list[Message], second: list[Message]) -> None:
    """What packing relies on when a template says that it concatenates."""
    both = NATIVE.encode(first + second, TOKENIZER)
    one, two = NATIVE.encode(first, TOKENIZER), NATIVE.encode(second, TOKENIZER)
    assert (both.ids, both.mask) == (one.ids + two.ids, one.mask + two.mask)


def test_concatenates_tells_templates_apart() -> None:
    assert NATIVE.concatenates and CHATML.concatenates
    assert not TRIMMING.concatenates
    head = ChatTemplate.from_source("<|system|>" + NATIVE.source)
    numbered = ChatTemplate.from_source(
        "{% for m in messages %}{{ loop.index }}{{ m.content }}<|end|>{% endfor %}"
    )
    refusing = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + NATIVE.source,
        "<|end|>",
    )
    assert not head.concatenates and not numbered.concatenates and not refusing.concatenates


def test_the_end_is_found_by_rendering() -> None:
    assert CHATML.end == TRIMMING.end == "<|end|>"
    assert ChatTemplate.from_source(NATIVE.source) == NATIVE
    with pytest.raises(UserError, match=r"no control token after an assistant's turn"):
        ChatTemplate.from_source("{% for m in messages %}{{ m.content }}\n{% endfor %}")


def test_end_ids() -> None:
    assert NATIVE.end_ids(TOKENIZER) == {END, TOKENIZER.end_of_text_id}
    with pytest.raises(UserError, match=r"ends turns with <\|eot\|>, which the tokenizer does not know"):
        ChatTemplate(NATIVE.source, "<|eot|>").end_ids(TOKENIZER)


def test_saved_and_loaded(tmp_path: Path) -> None:
    CHATML.save(tmp_path)
    assert (
        ChatTemplate.load(tmp_path) == CHATML
        and ChatTemplate.load(tmp_path).fingerprint == CHATML.fingerprint
    )
    assert CHATML.fingerprint != NATIVE.fingerprint and hash(CHATML) != hash(NATIVE)
    assert ChatTemplate.load(tmp_path, end="<|tool|>").end == "<|tool|>"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(UserError, match="is it a base model"):
        ChatTemplate.load(tmp_path / "none")


@pytest.mark.parametrize("template", [NATIVE, CHATML, TRIMMING], ids=["native", "chatml", "trimming"])
def test_rendering_is_transformers(template: ChatTemplate, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    TOKENIZER.save(tmp_path)
    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=template.source
    )
    for messages in (say("Hi", "Hello ", "x\ny"), say("Hi", system="Be brief.")):
        for ask in (False, True):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
            assert template.render(messages, add_generation_prompt=ask) == wanted
            ids = theirs.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
            assert template.encode(messages, TOKENIZER, add_generation_prompt=ask).ids == ids


# Messages


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        (["hi"], "message 0: a message must be an object with role and content"),
        ([{"role": "user"}], "message 0: the content of a user message must be text or parts, found nothing"),
        (
            [{"role": "user", "content": "x"}, {"role": "root", "content": "x"}],
            "message 1: a message has role 'root'; known roles: system, user",
        ),
        ([{"role": "user", "content": None}], "must be text or parts, found nothing (null)"),
        (
            [{"role": "user", "content": ["x"]}],
            "message 0: a part of a content must be an object with a type, found str",
        ),
        ([{"role": ["user"], "content": "x"}], "role"),
    ],
)
def test_messages_that_are_none(messages: list[object], said: str) -> None:
    with pytest.raises(UserError) as error:
        check_messages(messages)
    assert said in str(error.value)


def test_messages_lose_what_else_they_carry() -> None:
    assert check_messages([{"role": "user", "content": "x", "name": "n"}]) == [
        {"role": "user", "content": "x"}
    ]


# Contents in parts

LISTING = ChatTemplate.from_source(
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Goes through lists and knows nothing else, as templates of models that see do."""
EITHER = ChatTemplate.from_source(
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'text' %}"
    "{{ part.text }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|end|>' }}{% endfor %}"
)
"""Takes both, and writes a line break between the parts of a list."""
PRINTING = ChatTemplate.from_source(
    "{# text #}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)
"""Would write a list as Python does."""

TEXT_PARTS = CONTENT.map(lambda text: {"type": "text", "text": text})
PARTS_OF: dict[str, st.SearchStrategy[Any]] = {
    "system": TEXT_PARTS,
    "user": TEXT_PARTS,
    "assistant": st.one_of(
        TEXT_PARTS,
        CONTENT.map(lambda text: {"type": "thinking", "thinking": text}),
        st.builds(
            lambda name, text: {"type": "tool_call", "id": name, "name": f"n{name}", "arguments": text},
            CONTENT,
            CONTENT,
        ),
    ),
    "tool": st.builds(
        lambda call, text: {"type": "tool_result", "tool_call_id": call, "content": text}, CONTENT, CONTENT
    ),
}
IN_PARTS = st.lists(
    st.one_of(
        *(
            st.builds(
                lambda role, content: {"role": role, "content": content},
                st.just(role),
                st.one_of(CONTENT, st.lists(parts, min_size=1, max_size=3)),
            )
            for role, parts in PARTS_OF.items()
        )
    ),
    min_size=1,
    max_size=4,
).map(check_messages)


@given(IN_PARTS)
def test_no_part_of_any_kind_brings_a_control_token(messages: list[Message]) -> None:
    """Ids and mask of a conversation in parts are those of its text, as for plain messages."""
    ids: list[int] = []
    mask: list[bool] = []
    for message in messages:
        content = TOKENIZER.encode(written(message["content"]))
        learnt = message["role"] == "assistant"
        ids += [CONTROL_IDS[f"<|{message['role']}|>"], *content, END]
        mask += [False, *[learnt] * len(content), learnt]
    assert not controls_of(
        [number for message in messages for number in TOKENIZER.encode(written(message["content"]))]
    )
    for template in (NATIVE, LISTING):
        encoded = template.encode(messages, TOKENIZER)
        assert (encoded.ids, encoded.mask) == (ids, mask)


@pytest.mark.parametrize(
    "template", [NATIVE, CHATML, TRIMMING, LISTING, EITHER, PRINTING], ids=lambda one: one.fingerprint
)
@given(messages=IN_PARTS)
def test_parts_never_change_the_control_tokens(template: ChatTemplate, messages: list[Message]) -> None:
    plain = [Message(role=message["role"], content="x") for message in messages]
    ids = template.encode(messages, TOKENIZER).ids
    assert controls_of(ids) == controls_of(template.encode(plain, TOKENIZER).ids)


def texts(*parts: str) -> list[Message]:
    return check_messages([{"role": "user", "content": [{"type": "text", "text": text} for text in parts]}])


def test_a_template_gets_a_list_where_it_goes_through_lists() -> None:
    assert EITHER.render(texts("a", "b")) == "<|user|>a\nb<|end|>"
    assert EITHER.render(say("a")) == "<|user|>a<|end|>"
    assert LISTING.render(texts("a", "b")) == LISTING.render(say("ab")) == "<|user|>ab<|end|>"
    for template in (NATIVE, PRINTING):
        assert template.render(texts("a", "b")) == "<|user|>ab<|end|>"
        assert template.encode(texts("a", "b"), TOKENIZER) == template.encode(say("ab"), TOKENIZER)
    assert EITHER.encode(texts("a", "b"), TOKENIZER).ids == EITHER.encode(say("a\nb"), TOKENIZER).ids


def test_parts_with_nothing_between_them_are_one_text_for_the_tokenizer() -> None:
    word = TOKENIZER.encode("Hello")
    assert len(word) < len(TOKENIZER.encode("Hel") + TOKENIZER.encode("lo"))
    assert LISTING.encode(texts("Hel", "lo"), TOKENIZER).ids[1:-1] == word
    # So are two messages with nothing between them, as in transformers.
    bare = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}<|end|>", "<|end|>")
    assert bare.encode(say("Hel", "lo"), TOKENIZER).ids == [*word, END]


@pytest.mark.parametrize("template", [LISTING, EITHER], ids=["listing", "either"])
def test_lists_are_rendered_as_in_transformers(template: ChatTemplate, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    TOKENIZER.save(tmp_path)
    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=template.source
    )
    messages = [*texts("Hello ", "there", ""), *texts("how are you?")]
    assert template.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert template.encode(messages, TOKENIZER).ids == theirs.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("template", [NATIVE, LISTING], ids=["native", "listing"])
def test_an_image_is_refused_by_a_model_that_reads_text(template: ChatTemplate) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    messages = check_messages([{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}])
    for refused in (
        lambda: template.encode(messages, TOKENIZER),
        lambda: template.render(messages),
        lambda: fit_context(messages, template, TOKENIZER, 1000),
    ):
        with pytest.raises(
            UnreadablePart, match=r"^a message holds an image \(https://example\.org/a\.png\)"
        ):
            refused()


def test_conversations_in_parts_are_fitted() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "first " * 30},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "a result"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]
    fitted = fit_context(talk, NATIVE, TOKENIZER, 30)  # type: ignore[arg-type]
    assert (fitted.messages, fitted.dropped) == (talk[3:], 3)
    whole = fit_context(talk, NATIVE, TOKENIZER, 1000)  # type: ignore[arg-type]
    assert [parts_of(one["content"])[0]["type"] for one in whole.messages] == [
        "text",
        "tool_call",
        "tool_result",
        "text",
    ]


# Fitting


def size(messages: list[Message]) -> int:
    return len(NATIVE.encode(messages, TOKENIZER, add_generation_prompt=True).ids)


TALK = say("first question", "first answer", "second", "answer two", "third question", system="Be brief.")


@pytest.mark.parametrize("budget", range(12, 120))
def test_fitting_keeps_the_system_message_and_the_latest_turns(budget: int) -> None:
    """For every budget: the most of the latest exchanges that fit, by trying all."""
    endings = [TALK, [TALK[0], *TALK[3:]], [TALK[0], *TALK[5:]]]
    best = next((ending for ending in endings if size(ending) <= budget), None)
    if best is None:
        with pytest.raises(UserError, match=f"room for {budget}; shorten it"):
            fit_context(TALK, NATIVE, TOKENIZER, budget)
        return
    fitted = fit_context(TALK, NATIVE, TOKENIZER, budget)
    assert (fitted.messages, fitted.dropped) == (best, len(TALK) - len(best))
    assert fitted.ids == NATIVE.encode(best, TOKENIZER, add_generation_prompt=True).ids


@given(st.lists(CONTENT, min_size=1, max_size=9), st.one_of(st.none(), CONTENT), st.integers(1, 200))
def test_whatever_is_fitted_fits(contents: list[str], system: str | None, budget: int) -> None:
    messages = say(*contents, system=system)
    try:
        fitted = fit_context(messages, NATIVE, TOKENIZER, budget)
    except UserError:
        head = messages[:1] if system is not None else []
        last = max(n for n, message in enumerate(messages) if message["role"] == "user")
        assert size(head + messages[last:]) > budget
        return
    assert len(fitted.ids) <= budget
    kept = fitted.messages[1:] if system is not None else fitted.messages
    assert kept[0]["role"] == "user" and messages[len(messages) - len(kept) :] == kept
    assert fitted.dropped == len(messages) - len(fitted.messages)
    assert system is None or fitted.messages[0] == messages[0]


# Templates come from whoever made the model

HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ lipsum(n=100000) }}",
    "{{ undefined_thing.x }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ 'x' + 1 }}",
    "{{ messages | nothing }}",
    "{% for %}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% "
    "endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor "
    "%}",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', 'aa') %}{% "
    "endfor %}",
    "{% set n = namespace(x=2) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ 10**10**10 }}",
    "{{ 2**(2**40) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a' | indent(10**10) }}",
    "{{ [1] | batch(10**10, 'x') | list }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{" * 50 + "{{" + "(" * 5000 + ")" * 5000 + "}}",
    "{{ " + "-" * 50_000 + "1 }}",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{% if x %}" * 200 + "{% endif %}" * 200,
    "{{ " + "(" * 300 + "x" + ".y)" * 300 + " }}",
    "x" * 300_000,
    # Things of moderate size that one operation multiplies.
    "{{ ('x' * 4000).replace('x', 'y' * 4000000) }}",
    "{{ ('x' * 4000) | replace('x', 'y' * 4000000) }}",
    "{{ ('y' * 4000000).join(['x'] * 4000) }}",
    "{{ (['x'] * 4000) | join('y' * 4000000) }}",
    "{{ ('\t' * 4000).expandtabs(999999) }}",
    "{{ ('%s' * 4000) % (('y' * 4000000,) * 4000) }}",
    "{{ ('{0}' * 4000).format('y' * 4000000) }}",
    "{{ range(99999) | join('y' * 4000000) }}",
    "{{ strftime_now('%99999d' * 40000) }}",
    "{{ range(99999) | map('string') | join('y' * 4000000) }}",
    "{{ ('y' * 4000000).join((['x'] * 9999) | reverse) }}",
    "{{ ([1] * 4000000) | groupby('a') }}",
    "{{ ([1] * 200000) | groupby('a') }}",
    "{% set x = messages[0].content * 30000 %}" + "{% set x = x + x[1:] %}" * 400,
    # Texts that are taken apart, each character for itself.
    *(
        "{{ ('y' * 4000000) | " + end + " }}"
        for end in (
            "groupby('a')",
            "list",
            "map('upper') | list",
            "map(attribute='a') | list",
            "select('odd') | list",
            "rejectattr('a') | list",
            "sort",
            "unique | list",
            "sum",
            "max",
            "batch(1) | list",
            "slice(2) | list",
            "join(',')",
        )
    ),
    "{{ cycler(*('y' * 4000000)) }}",
    # Lists that hold one another: small, and endless when they are written, compared or hashed.
    *(
        "{% set n = namespace(x=('a',), y=('a',)) %}{% for i in range(99) %}{% set n.x = (n.x, n.x) %}"
        "{% set n.y = (n.y, n.y) %}{% endfor %}" + end
        for end in (
            "{{ n.x }}",
            "{{ n }}",
            "{{ n.x ~ 1 }}",
            "{{ n.x | string }}",
            "{{ n.x | tojson }}",
            "{{ n.x == n.y }}",
            "{{ n.x is eq n.y }}",
            "{{ {n.x: 1} }}",
            "{{ {'a': 1}[n.x] }}",
            "{{ {'a': 1}.get(n.x) }}",
            "{{ {'a': n.x}.items() }}",
            "{{ '%s' % (n.x,) }}",
        )
    ),
    # What a loop repeats.
    "{% for i in range(99999) %}" + "t" * 5_000 + "{% endfor %}",
    "{% for i in range(99999) %}{{ '" + "t" * 5_000 + "' }}{% endfor %}",
    "{% for i in range(99999) %}{% set x = 'a' * 4000000 %}{% endfor %}",
    "{% set x = 'a' * 4000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "{% set x = 'a' * 4000000 %}{% for i in range(99999) %}{% if 'ab' in x %}{% endif %}{% endfor %}",
    "{% set x = 'a' * 4000000 %}{% for i in range(99999) %}{% if x is in [x ~ 'a'] %}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_fail_in_one_line_and_soon(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^the chat template"):
        ChatTemplate(source, "<|end|>").render(say("Hi"))
    assert time.monotonic() - started < 20.0  # without limits: for ever, or until the memory is full


@pytest.mark.parametrize(
    "expression",
    ["self._TemplateReference__context", "raise_exception.__globals__", "'{0.__class__}'.format(1)"],
)
def test_what_lies_behind_an_underscore_is_not_there(expression: str) -> None:
    assert ChatTemplate("[{{ " + expression + " }}]", "<|end|>").render(say("Hi")) == "[]"


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "<|end|>")
    with pytest.raises(
        UserError, match=r"^the chat template refuses this conversation: roles must alternate$"
    ):
        template.render(say("Hi"))
    assert not template.concatenates


def test_what_real_templates_do_is_allowed() -> None:
    """Macros, namespaces, filters, string methods, JSON, slices: as the templates of known models use
    them."""
    source = (
        "{%- set ns = namespace(system='', n=0) -%}"
        "{%- macro line(role, self='x', context='', function=1) -%}{{ '<|' ~ role ~ '|>' }}{%- endmacro -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' %}{% set ns.system = message['content'].strip() %}{% endif -%}"
        "{%- set ns.n = ns.n + 1 * 2 ** 1 % 3 -%}"
        "{{- line(message.role, context='y', function=2) }}{{ message.content | trim }}"
        "{%- if not loop.last %}{{ '<|end|>' }}{% endif -%}"
        "{%- endfor -%}"
        "{{- messages[1:] | length }} {{ {'a': [1, 2]} | tojson(indent=2) }} {{ '%s:%02d' % ('k', 7) }}"
        " {{ '{}-{:>3}'.format('a', 'b') }} {{ messages | map(attribute='role') | join(',') }}"
        " {{ '%s' | format('f') }} {{ 'a,b'.split(',')[-1] }} {{ 'Ab'.upper() }} {{ 'x'.startswith('x') }}"
        " {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ ns.n }}"
    )
    text = ChatTemplate(source, "<|end|>").render(say("Hi ", "Yo"))
    assert text == (
        '<|user|>Hi<|end|><|assistant|>Yo1 {\n  "a": [\n    1,\n    2\n  ]\n} k:07 a-  b user,assistant '
        "f b AB True 1 4"
    )


@settings(max_examples=20)
@given(st.integers(1, 400))
def test_long_conversations_are_within_the_budget(turns: int) -> None:
    messages = say(*["x"] * turns)
    assert len(NATIVE.encode(messages, TOKENIZER).ids) == 3 * turns


def test_a_long_content_is_within_the_budget() -> None:
    assert len(NATIVE.render(say("é" * 3_000_000))) > 3_000_000
    assert NATIVE.encode(say("ab " * 100_000), TOKENIZER).ids.count(END) == 1
