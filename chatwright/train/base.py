"""The model that a stage starts from."""

from __future__ import annotations

from chatwright.config import UserError
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.train.workspace import Workspace


def open_base(name: str, workspace: Workspace) -> Loaded:
    """The model that a setting names: a stage of this run, a directory, smollm2, hf:owner/name. Raises
    UserError."""
    return load_parts(workspace.resolve(name) if name in workspace.inputs else name)


def open_chat_base(name: str, workspace: Workspace, *, purpose: str) -> Loaded:
    """The same, for a stage that needs the tokenizer and the chat template. Raises UserError when one is
    missing."""
    base = open_base(name, workspace)
    if base.tokenizer is None or base.template is None:
        raise UserError(f"{name} has no chat template; {purpose}")
    return base
