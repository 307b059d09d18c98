"""The model that a stage starts from, and the metadata of the checkpoints that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatwright import generation_config
from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.generation_config import GenerationConfig
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.tokenizer import Tokenizer
from chatwright.train.workspace import Workspace


@dataclass(frozen=True)
class ChatBase(Loaded):
    """A model that has a tokenizer and a chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate


def open_base(name: str, workspace: Workspace) -> Loaded:
    """The model that a setting names: a stage of this run, a directory, smollm2, hf:owner/name. Raises
    UserError."""
    return load_parts(workspace.resolve(name) if name in workspace.inputs else name)


def open_chat_base(
    name: str,
    workspace: Workspace,
    *,
    purpose: str = "name a model after sft",
    template: ChatTemplate | None = None,
) -> ChatBase:
    """As `open_base`, for a stage that needs the tokenizer and the chat template. A model without a template
    gets `template`. Raises UserError when either is missing; `purpose` ends the message about the template.
    """
    base = open_base(name, workspace)
    if base.tokenizer is None:
        raise UserError(f"{name} has no tokenizer")
    template = base.template or template
    if template is None:
        raise UserError(f"{name} has no chat template; {purpose}")
    return ChatBase(base.model, base.tokenizer, template, base.source, base.generation)


def model_metadata(
    kind: str,
    shape: GPTConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    *,
    adapter: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metadata of a model for a checkpoint's state.json. `kind` is `language` or `reward`, `adapter` comes
    from `adapters.metadata`."""
    known = {
        "kind": kind,
        "model": shape.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": tokenizer.end_of_text,
        "texts": tokenizer.frame.to_state(),
    }
    if template is not None:
        known["template"] = template.fingerprint
    return {**known, **(adapter or {})}


def model_texts(
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    generation: GenerationConfig | None = None,
) -> dict[str, str]:
    """The files that make a checkpoint self-contained: the tokenizer, and where there are any the chat
    template and the sampling settings of the model that training started from."""
    texts = {"tokenizer.json": tokenizer.to_json()}
    if template is not None:
        texts |= template.files()
    if generation is not None:
        texts[generation_config.FILE] = generation.to_json()
    return texts
