"""Chat templates of other programs' models: which there are, and the special tokens that they speak of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatwright.chat import ChatTemplate, read_template
from chatwright.config import UserError
from chatwright.interop.hf_tokenizer import special_tokens
from chatwright.template_source import EXTRA, read_named

ROLES = {"unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator", "mask_token": "mask"}
"""The variables of special tokens, as GGUF calls their roles; begin and end are asked for apart."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The variables in which templates of transformers find the special tokens of the tokenizer."""


def chat_template(
    source: str,
    *,
    begin: str | None = None,
    end: str | None = None,
    others: Mapping[str, str] | None = None,
    named: Mapping[str, str] | None = None,
) -> ChatTemplate:
    """A template from elsewhere. `begin` and `end` are its begin- and end-of-sequence tokens, None where
    unknown; `others` are special tokens by their variables' names, `named` other templates.

    The tokens are written into the texts, so that a template means the same wherever it is rendered. A token
    that does not exist stays undefined, as in transformers.
    """
    tokens = {**(others or {}), "bos_token": begin, "eos_token": end}
    known = {name: token for name, token in tokens.items() if token is not None}
    texts = {name: with_tokens(text, known) for name, text in (named or {}).items()}
    return ChatTemplate(with_tokens(source, known), named=texts)


def with_tokens(source: str, tokens: Mapping[str, str]) -> str:
    """A template's text that sets the special tokens that it speaks of."""
    used = [name for name in SPECIAL_TOKENS if name in tokens and re.search(rf"\b{name}\b", source)]
    head = "".join(f"{{% set {name} = {tokens[name]!r} %}}" for name in used)
    return (
        f"{head}\n{source}" if head else source
    )  # the line break belongs to the block before: it is not written


def template_of(directory: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat templates of a model directory in transformers' format; `settings` are those of its
    tokenizer_config.json. As there, files count before settings. Raises UserError."""
    named = _from_files(directory) or _from_settings(settings.get("chat_template"), directory)
    if not named:
        return None
    found = special_tokens(directory, settings, SPECIAL_TOKENS)
    tokens = {name: token for name, token in found.items() if token is not None}
    source = named.pop("default", None)
    return chat_template(
        no_default(named) if source is None else source,
        begin=tokens.pop("bos_token", None),
        end=tokens.pop("eos_token", None),
        others=tokens,
        named=named,
    )


def no_default(named: Mapping[str, str]) -> str:
    """The template of a model with several of which none is the default: it says so."""
    names = ", ".join(sorted(named))
    return (
        "{{ raise_exception('this model has several chat templates (" + names.replace("'", "") + ") and none "
        "of them is the default: copy one to chat_template.jinja in its directory') }}"
    )


def _from_files(directory: Path) -> dict[str, str]:
    jinja = directory / "chat_template.jinja"
    found = {"default": read_template(jinja)} if jinja.exists() else {}
    return found | (read_named(directory) if (directory / EXTRA).is_dir() else {})


def _from_settings(value: Any, directory: Path) -> dict[str, str]:
    where = directory / "tokenizer_config.json"
    if isinstance(value, list):  # several, by name
        value = {str(one.get("name")): one.get("template") for one in value if isinstance(one, dict)}
    if isinstance(value, str):
        value = {"default": value} if value else {}
    if value is not None and not (
        isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    ):
        raise UserError(f"{where}: its chat_template is no text")
    return dict(value or {})
