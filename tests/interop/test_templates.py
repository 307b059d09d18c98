"""Chat templates of other programs' models: several by name, special tokens, and both kept wherever a model
is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.commands import import_
from chatwright.config import UserError
from chatwright.interop.export import write_export
from chatwright.interop.gguf import load_gguf
from chatwright.interop.hf import load_hf
from chatwright.interop.templates import chat_template
from chatwright.language_model import load_parts
from chatwright.tokenizer import Tokenizer

from .conftest import SHAPES, export_hf, parts_of, their_tokenizer

TOOL_USE = "{{ tools | tojson }}" + NATIVE.source
TALK = [Message(role="user", content="hi")]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
TALK_TEXT = "<|user|>hi<|end|>"


def with_settings(directory: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    """A model directory with these settings in tokenizer_config.json."""
    made = export_hf(parts_of(SHAPES["llama"], tokenizer), directory)
    (made / "chat_template.jinja").unlink(missing_ok=True)
    known = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps({**known, **settings}))
    return made


def template_in(directory: Path) -> ChatTemplate:
    found = load_hf(directory).template
    assert found is not None
    return found


NAMED = [{"name": "default", "template": NATIVE.source}, {"name": "tool_use", "template": TOOL_USE}]


def test_templates_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As transformers chooses: `tool_use` where tools are given, though it be an empty list."""
    directory = with_settings(tmp_path / "model", tokenizer, chat_template=NAMED)
    template, theirs = template_in(directory), their_tokenizer(directory)
    for tools in (None, [], TOOLS):
        wanted = theirs.apply_chat_template(TALK, tools=tools, tokenize=False)
        assert template.render(TALK, tools=tools) == wanted
        assert wanted.startswith("[") == (tools is not None)


def test_templates_in_files_count_before_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = with_settings(
        tmp_path / "model", tokenizer, chat_template=[{"name": "default", "template": "x"}]
    )
    folder = directory / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(TOOL_USE)
    with pytest.raises(
        UserError, match=r"several chat templates \(tool_use\) and none of them is the default"
    ):
        template_in(directory).render(TALK)
    (directory / "chat_template.jinja").write_text(NATIVE.source)
    template, theirs = template_in(directory), their_tokenizer(directory)
    assert template.render(TALK) == theirs.apply_chat_template(TALK, tokenize=False) == TALK_TEXT
    wanted = theirs.apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    assert template.render(TALK, tools=TOOLS) == wanted != TALK_TEXT


def test_every_written_form_keeps_all_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    named = ChatTemplate(NATIVE.source, named={"tool_use": TOOL_USE, "rag": "r" + NATIVE.source})
    parts = replace(parts_of(SHAPES["llama"], tokenizer), template=named)
    import_.write_model(parts, tmp_path / "ours", source="x")
    ours = load_parts(tmp_path / "ours").template
    again = load_parts(tmp_path / "ours")
    write_export(again, tmp_path / "hf", form="hf", dtype="fp32", verify=True, source="x")
    again = load_parts(tmp_path / "ours")
    write_export(again, tmp_path / "m.gguf", form="gguf", dtype="f32", verify=True, source="x")
    for found in (ours, load_hf(tmp_path / "hf").template, load_gguf(tmp_path / "m.gguf").template):
        assert found is not None and found.named == named.named and found == named
        assert found.fingerprint == named.fingerprint
    theirs = their_tokenizer(tmp_path / "hf")
    assert theirs.apply_chat_template(TALK, tools=TOOLS, tokenize=False) == named.render(TALK, tools=TOOLS)


def test_a_damaged_template_of_another_name_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    named = ChatTemplate(NATIVE.source, named={"tool_use": TOOL_USE})
    import_.write_model(
        replace(parts_of(SHAPES["llama"], tokenizer), template=named), tmp_path / "ours", source="x"
    )
    (tmp_path / "ours" / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    with pytest.raises(UserError, match=r"additional_chat_templates/tool_use\.jinja is damaged"):
        load_parts(tmp_path / "ours")


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No file has such a name: it leads out of the directory, or is too long."""
    named = [*NAMED, {"name": name, "template": "x"}]
    directory = with_settings(tmp_path / "model", tokenizer, chat_template=named)
    with pytest.raises(
        UserError, match=re.escape(f"has the name {name!r:.80}, which cannot be that of a file")
    ):
        load_hf(directory)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}[{{ pad_token is defined }}{{ unk_token }}]{{ messages[0].content }}{{ eos_token }}",
        "\n  {% if bos_token %}{{ bos_token }}{% endif %}\n{{ messages[0].content }}{{ eos_token }}\n",
        "{% macro m() %}{{ eos_token }}{% endmacro %}{{ m() }}{{ messages[0].content ~ pad_token }}",
        "{{ bos_token + messages[0].content }}",
        "{{ sep_token + messages[0].content }}",
    ],
)
@pytest.mark.parametrize("begin", ["<|endoftext|>", None])
def test_special_tokens_are_what_transformers_gives(
    source: str, begin: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Those that the tokenizer has, and no others; white space at the beginning stays."""
    settings = {"bos_token": begin, "eos_token": "<|end|>", "unk_token": None, "pad_token": "<|image|>"}
    directory = with_settings(tmp_path / "model", tokenizer, chat_template=source, **settings)
    template, theirs = template_in(directory), their_tokenizer(directory)
    try:
        wanted = theirs.apply_chat_template(TALK, tokenize=False)
    except Exception:  # the template's own, or Jinja's
        with pytest.raises(UserError, match=r"^the chat template fails on this conversation"):
            template.render(TALK)
        return
    assert template.render(TALK) == wanted
    assert template.encode(TALK, tokenizer).ids == theirs.apply_chat_template(TALK, return_dict=False)


def test_a_last_message_that_stays_open(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = with_settings(tmp_path / "model", tokenizer, chat_template=NATIVE.source)
    template, theirs = template_in(directory), their_tokenizer(directory)
    trimming = chat_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    )
    for begun in ("The weather ", "It is", "  x\n"):
        talk: list[Any] = [*TALK, {"role": "assistant", "content": begun}]
        for one in (template, trimming):
            apply = {"chat_template": one.source, "continue_final_message": True}
            wanted = theirs.apply_chat_template(talk, tokenize=False, **apply)
            assert one.render(talk, continue_final_message=True) == wanted
            ids = theirs.apply_chat_template(talk, return_dict=False, **apply)
            assert one.encode(talk, tokenizer, continue_final_message=True).ids == ids
        assert talk[-1]["content"] == begun
    for wrong, said in (
        ({"content": None}, "there is no 'content' in the last message"),
        ({}, "set one of them"),
    ):
        with pytest.raises(UserError, match=said):
            template.render(
                [*TALK, {"role": "assistant", **wrong}],
                continue_final_message=True,
                add_generation_prompt=not wrong,
            )


def test_all_ends_of_a_turn_are_told_to_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """`eos_token_id` of generation_config.json has all of them, the last turn's first."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loop.last and m.role == 'assistant' %}"
        "<|reserved_0|>{% else %}<|end|>{% endif %}{% endfor %}"
    )
    parts = replace(parts_of(SHAPES["llama"], tokenizer), template=ChatTemplate(source))
    written = json.loads((export_hf(parts, tmp_path / "out") / "generation_config.json").read_text())
    ids = [tokenizer.control_ids[name] for name in ("<|reserved_0|>", "<|end|>", "<|endoftext|>")]
    assert written["eos_token_id"] == ids
