"""70 published chat templates: what the model is given is what transformers makes of the same conversation,
token for token.

What transformers refuses is refused, and whatever a message, a tool or a variable spells stays text.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest
import tokenizers

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.interop.templates import chat_template
from chatwright.tokenizer import Tokenizer
from support.chat_templates import (
    CONVERSATIONS,
    SPECIAL,
    SPELLED,
    backend_for,
    collection,
    controls_in,
)

HAVE_SPELLED = {"control tokens", "tools", "a tool call", "a call without content"}
"""Conversations (and tools in them) that spell control tokens: there ids differ from transformers', on
purpose."""


@lru_cache
def sides() -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers', with all control tokens that the templates name."""
    from transformers import PreTrainedTokenizerFast

    backend = backend_for(set().union(*map(controls_in, collection().values())))
    ours = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), end_of_text="</s>")
    return ours, PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)  # type: ignore[no-untyped-call]


@lru_cache
def template(name: str) -> ChatTemplate:
    others = {key: SPECIAL[key] for key in ("unk_token", "pad_token")}
    return chat_template(collection()[name], begin="<s>", end="</s>", others=others)


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    """Ids as text, control tokens by their names."""
    names = {number: name for name, number in tokenizer.control_ids.items()}
    parts = [names[one].encode() if one in names else tokenizer.token_bytes(one) for one in ids]
    return b"".join(parts).decode("utf-8", errors="replace")


def compared(name: str, conversation: str, *, ask: bool) -> bool | None:
    """Compare one conversation; None where both refuse it. Raises AssertionError where they differ."""
    tokenizer, theirs = sides()
    given = dict(CONVERSATIONS[conversation])
    messages, variables = given.pop("messages"), given.pop("variables", {})
    apply = {"chat_template": collection()[name], "add_generation_prompt": ask, **given, **variables}
    try:
        wanted = theirs.apply_chat_template(messages, tokenize=False, **apply)
        ids = theirs.apply_chat_template(messages, return_dict=False, **apply)
    except Exception:  # the template's own, Jinja's, or the library's
        with pytest.raises(UserError, match=r"^the chat template"):
            template(name).render(messages, add_generation_prompt=ask, variables=variables, **given)
        return None
    own = template(name)
    assert own.render(messages, add_generation_prompt=ask, variables=variables, **given) == wanted
    encoded = own.encode(messages, tokenizer, add_generation_prompt=ask, variables=variables, **given)
    assert spelled(encoded.ids, tokenizer) == wanted
    assert not encoded.doubt
    if conversation not in HAVE_SPELLED:
        assert encoded.ids == list(ids)
    return True


def names() -> list[str]:
    return list(collection())


def test_every_template_is_given_what_transformers_gives() -> None:
    """All templates; of the conversations a few, which others take turns in."""
    refused, drawn = 0, random.Random(0)
    for name in names():
        for conversation in drawn.sample(list(CONVERSATIONS), 4):
            for ask in (False, True):
                try:
                    refused += compared(name, conversation, ask=ask) is None
                except AssertionError as error:
                    raise AssertionError(f"{name}, {conversation}, prompt {ask}: {error}") from error
    assert refused < 0.2 * 8 * len(names())


@pytest.mark.slow
def test_every_conversation_in_every_template() -> None:
    refused = []
    for name in names():
        for conversation in CONVERSATIONS:
            for ask in (False, True):
                try:
                    if compared(name, conversation, ask=ask) is None:
                        refused.append((name, conversation, ask))
                except AssertionError as error:
                    raise AssertionError(f"{name}, {conversation}, prompt {ask}: {error}") from error
    assert len(refused) < 0.2 * 2 * len(names()) * len(CONVERSATIONS)


def controls_of(name: str, messages: list[dict[str, Any]], **given: Any) -> list[str]:
    tokenizer = sides()[0]
    known = {number: control for control, number in tokenizer.control_ids.items()}
    try:
        ids = template(name).encode(messages, tokenizer, **given).ids
    except UserError:
        return []
    return [known[one] for one in ids if one in known]


def filled(text: str, system: str = "s", call: str = "t") -> list[dict[str, Any]]:
    """A conversation with one text in every place that a user or a model may write."""
    function = {"name": "f", "arguments": {"k": call}}
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": text},
        {
            "role": "assistant",
            "content": text,
            "reasoning_content": call,
            "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
        },
        {"role": "tool", "content": text, "name": "f", "tool_call_id": "call00001"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]


def test_no_text_becomes_a_control_token() -> None:
    """In no template, in no place: the control tokens are those of the conversation with harmless texts."""
    parts = [*sides()[0].controls, "<|", "|>", "\n", "im_end", " ", "x", "\ud800"]
    for number, name in enumerate(names()):
        drawn = random.Random(number)
        tools = [{"type": "function", "function": {"name": "f", "description": SPELLED, "parameters": {}}}]
        harmless = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
        for talk in (filled("a", "b", "c"), filled("a", "b", "c")[:2], [filled("a")[1]]):
            wanted = controls_of(name, talk, tools=harmless)
            for _ in range(2):
                # A letter on both sides: what a template trims or leaves out when empty is not asked here.
                text, system, call = ("v" + "".join(drawn.choices(parts, k=6)) + "w" for _ in range(3))
                texts = dict(zip("abc", (text, system, call), strict=True))
                hostile = [
                    {
                        key: texts.get(value, value) if key != "tool_calls" else filled("", "", call)[2][key]
                        for key, value in one.items()
                    }
                    for one in talk
                ]
                if "</think>" not in text + call:
                    assert controls_of(name, hostile, tools=tools) == wanted, (name, hostile)


ENDS = {
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_OF_TURN_TOKEN|>",
    "ibm-granite-granite-3.3-2B-Instruct": "<|end_of_text|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_turn(name: str) -> None:
    assert template(name).ends(sides()[0]).last == ENDS[name]


@pytest.mark.parametrize("name", ENDS)
def test_what_is_learnt_of_published_templates(name: str) -> None:
    """Answers and their ends, and nothing that another wrote."""
    tokenizer = sides()[0]
    talk = CONVERSATIONS["several turns"]["messages"]
    encoded = template(name).encode(talk, tokenizer)
    learnt = [token if flag else 0 for token, flag in zip(encoded.ids, encoded.mask, strict=True)]
    text = spelled([token for token in learnt if token], tokenizer)
    assert not encoded.doubt
    text = text.replace("<|END_RESPONSE|>", "")  # stands in front of this template's end
    assert "".join(text.split()) == "".join(answer + ENDS[name] for answer in ("Two.", "Four.", "Six."))
