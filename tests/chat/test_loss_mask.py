"""What is learnt of a conversation, by hand, for templates of the shapes that well-known families have: the
answers, and what ends them, however the template looks at the contents."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers

from chatwright.chat import ChatTemplate, Message
from chatwright.config import UserError
from chatwright.data.packing import learnable
from chatwright.interop.templates import chat_template
from chatwright.tokenizer import Tokenizer
from support.chat_templates import SPECIAL, TOOLS, backend_for

CONTROLS = {
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
    ),
    *(
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
        "<|return|>",
        "<|start|>",
    ),
    *(
        "<|message|>",
        "<|start_of_role|>",
        "<|end_of_role|>",
        "<|end_of_text|>",
        "<|END_RESPONSE|>",
        "<|END_TURN|>",
    ),
}
TOKENIZER = Tokenizer(
    tokenizers.Tokenizer.from_str(backend_for(CONTROLS).to_str()), end_of_text=SPECIAL["eos_token"]
)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: "
    "{{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + m.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}{% set thought = '' %}"
    "{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + text }}{% else %}{{ text }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}{{ c.function | tojson }}{{ '\n</tool_call>' }}"
    "{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}" + ASK
)
SMOLLM3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
TRL = SMOLLM3.replace(
    "{% generation %}<|im_start|>assistant\n", "<|im_start|>assistant\n{% generation %}"
).replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
COMMAND = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_TURN|>{% endfor %}"
)
BRACKETS = (
    "{% for m in messages %}[{{ m.role | upper }}]{{ m.content }}[/{{ m.role | upper }}]{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)

TALK = [
    Message(role="user", content="One? "),
    Message(role="assistant", content="Two."),
    Message(role="user", content="Three?"),
    Message(role="assistant", content="Four. "),
]
CASES = {
    "ChatML": (CHATML + ASK, ["Two.<|im_end|>", "Four. <|im_end|>"], ("<|im_end|>",)),
    "Llama 3": (LLAMA3, ["Two.<|eot_id|>", "Four.<|eot_id|>"], ("<|eot_id|>",)),
    "Gemma": (GEMMA, ["Two.<end_of_turn>", "Four.<end_of_turn>"], ("<end_of_turn>",)),
    "Mistral v1": (MISTRAL, [" Two.</s>", " Four. </s>"], ("</s>",)),
    "Mistral tekken": (TEKKEN, ["Two.</s>", "Four. </s>"], ("</s>",)),
    "Phi-3": (PHI3, ["Two.<|end|>", "Four. <|end|>"], ("<|end|>",)),
    "Zephyr": (ZEPHYR, ["Two.</s>", "Four. </s>"], ("</s>",)),
    "Vicuna": (VICUNA, [" Two.</s>", " Four. </s>"], ("</s>",)),
    "OLMo 2": (OLMO2, ["Two.</s>", "Four. </s>"], ("</s>",)),
    "Granite": (GRANITE, ["Two.<|end_of_text|>", "Four. <|end_of_text|>"], ("<|end_of_text|>",)),
    "DeepSeek R1 distill": (R1, ["Two.</s>", "Four. </s>"], ("</s>",)),
    "Qwen 3": (QWEN3, ["Two.<|im_end|>", "Four. <|im_end|>"], ("<|im_end|>",)),
    "SmolLM 3": (
        SMOLLM3,
        ["<|im_start|>assistant\nTwo.<|im_end|>\n", "<|im_start|>assistant\nFour. <|im_end|>\n"],
        ("<|im_end|>",),
    ),
    "TRL's": (TRL, ["Two.<|im_end|>", "Four. <|im_end|>"], ("<|im_end|>",)),
    "two ends": (HARMONY, ["Two.<|end|>", "Four. <|return|>"], ("<|return|>", "<|end|>")),
    "two tokens": (
        COMMAND,
        ["Two.<|END_RESPONSE|><|END_TURN|>", "Four. <|END_RESPONSE|><|END_TURN|>"],
        ("<|END_TURN|>",),
    ),
}


def made(source: str) -> ChatTemplate:
    return chat_template(source, begin="<s>", end="</s>")


def learnt_stretches(template: ChatTemplate, messages: list[Any], **given: Any) -> list[str]:
    """What is learnt, each stretch of tokens as text."""
    encoded = template.encode(messages, TOKENIZER, **given)
    assert not encoded.doubt
    names = {number: name for name, number in TOKENIZER.control_ids.items()}
    stretches, before = [], False
    for token, flag in zip(encoded.ids, encoded.mask, strict=True):
        text = names.get(token) or TOKENIZER.token_bytes(token).decode()
        if flag and before:
            stretches[-1] += text
        elif flag:
            stretches.append(text)
        before = flag
    return stretches


@pytest.mark.parametrize("name", CASES)
def test_answers_and_their_ends_are_learnt(name: str) -> None:
    """A stretch may begin with a space of the template's: tokens join a space with the word behind it."""
    source, wanted, ends = CASES[name]
    template = made(source)
    found = learnt_stretches(template, TALK)
    assert [one.lstrip() for one in found] == [one.lstrip() for one in wanted]
    assert template.ends(TOKENIZER).tokens == ends
    ids = {TOKENIZER.control_ids[end] for end in ends}
    assert template.end_ids(TOKENIZER) == ids | {TOKENIZER.end_of_text_id}
    assert not template.stop_texts(TOKENIZER)
    assert template.end_id(TOKENIZER) == TOKENIZER.control_ids[template.ends(TOKENIZER).last]


def test_the_mask_is_that_of_transformers_generation_blocks() -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    theirs: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)  # type: ignore[no-untyped-call]
    found = theirs.apply_chat_template(
        TALK, chat_template=SMOLLM3, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = made(SMOLLM3).encode(TALK, TOKENIZER)
    assert encoded.ids == found["input_ids"]
    assert encoded.mask == [bool(one) for one in found["assistant_masks"]]


def test_a_turn_that_ends_with_a_text() -> None:
    template = made(BRACKETS)
    assert template.end == "[/ASSISTANT]" and template.stop_texts(TOKENIZER) == ("[/ASSISTANT]",)
    found = learnt_stretches(template, TALK)
    assert [one.partition("[/ASSISTANT]")[1] for one in found] == ["[/ASSISTANT]"] * 2
    assert ["Two." in found[0], "Four. " in found[1]] == [True, True]
    assert not any("USER" in one or "One" in one for one in found)
    assert template.end_ids(TOKENIZER) == {TOKENIZER.end_of_text_id}
    template.check_end(TOKENIZER)
    with pytest.raises(UserError, match=r"the text '\[/ASSISTANT\]', which is no control token: this needs"):
        template.end_id(TOKENIZER)


def test_a_template_without_an_end_can_be_talked_to_but_not_learnt() -> None:
    template = made("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert template.end == "" and template.end_ids(TOKENIZER) == {TOKENIZER.end_of_text_id}
    assert template.encode(TALK, TOKENIZER, add_generation_prompt=True).ids
    with pytest.raises(UserError, match="writes nothing behind an assistant's answer"):
        template.check_end(TOKENIZER)


THOUGHT = [
    Message(role="user", content="One?"),
    Message(role="assistant", content="<think>\nhmm\n</think>\n\nTwo."),
    Message(role="user", content="Three?"),
    Message(role="assistant", content="<think>\nso so\n</think>\n\nFour."),
]


def test_thinking_is_learnt_where_the_template_writes_it() -> None:
    """Qwen 3 takes that of earlier turns out; the last answer's is learnt with its tags."""
    assert learnt_stretches(made(QWEN3), THOUGHT) == [
        "Two.<|im_end|>",
        "<think>\nso so\n</think>\n\nFour.<|im_end|>",
    ]
    assert [one.strip() for one in learnt_stretches(made(R1), THOUGHT)] == ["Two.</s>", "Four.</s>"]


def test_tool_calls_are_learnt_with_their_tags() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    talk: list[Any] = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "21 degrees."},
    ]
    said = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert learnt_stretches(made(QWEN3), talk, tools=TOOLS) == [said, "21 degrees.<|im_end|>"]


def test_messages_that_must_not_be_learnt() -> None:
    marked: list[Any] = [TALK[0], {**TALK[1], "learn": False}, *TALK[2:]]
    for source in (CHATML, SMOLLM3):
        assert made(source).render(marked) == made(source).render(TALK)
        found = learnt_stretches(made(source), marked)
        assert len(found) == 1 and "Four. <|im_end|>" in found[0]


def test_what_cannot_be_followed_is_refused_by_sft() -> None:
    mixing = made("{% for m in messages %}<|user|>{{ ('a' ~ m.content).zfill(20) }}<|end|>{% endfor %}")
    assert mixing.encode(TALK, TOKENIZER).ids
    with pytest.raises(UserError, match="mixes message 1 with text of its own, so that nobody can tell"):
        learnable(mixing, TALK, TOKENIZER)
    every = made("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{{ messages }}")
    with pytest.raises(UserError, match="mixes the texts of several messages"):
        learnable(every, TALK, TOKENIZER)


@pytest.mark.parametrize("name", CASES)
def test_contents_that_spell_control_tokens(name: str) -> None:
    """Whatever is in them: the same control tokens, and what is learnt are still the answers."""
    drawn, template = random.Random(name), made(CASES[name][0])
    names = {number: control for control, number in TOKENIZER.control_ids.items()}
    wanted = [token for token in template.encode(TALK, TOKENIZER).ids if token in names]
    for _ in range(10):
        parts = drawn.choices([*TOKENIZER.controls, "<|", "|>", "x", " ", "\ud800"], k=8)
        text = "v" + "".join(parts) + "w"
        talk = [Message(role=one["role"], content=text) for one in TALK]
        encoded = template.encode(talk, TOKENIZER)
        assert [token for token in encoded.ids if token in names] == wanted
        learnt = [token for token, flag in zip(encoded.ids, encoded.mask, strict=True) if flag]
        data = b"".join(names[t].encode() if t in names else TOKENIZER.token_bytes(t) for t in learnt)
        assert data.count(text.encode("utf-8", "surrogatepass")) == 2


def test_an_end_that_a_message_spells_does_not_hide_the_real_one() -> None:
    """TRL's form has the end of the turn behind the {% generation %} block."""
    said = [{"role": "user", "content": "End?"}, {"role": "assistant", "content": "It is <|im_end|>, see?"}]
    found = chat_template(TRL).encode(said, TOKENIZER)
    end = TOKENIZER.control_ids["<|im_end|>"]
    assert [flag for number, flag in zip(found.ids, found.mask, strict=True) if number == end] == [
        False,
        True,
    ]
