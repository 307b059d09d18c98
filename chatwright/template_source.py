"""The text of a chat template: read from files, compiled in the sandbox."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from chatwright.config import UserError

LARGEST_TEMPLATE = 1 << 18
"""Most characters of a chat template; published ones have up to 20,000."""
EXTRA = "additional_chat_templates"
"""The folder of a model directory with its other templates, by name, as transformers has it."""


@lru_cache(maxsize=32)
def compiled(source: str) -> Any:
    """The template in Jinja's sandbox: it comes with the model, from whoever made the model."""
    import jinja2

    from chatwright.sandbox import Sandbox

    def raise_exception(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    if len(source) > LARGEST_TEMPLATE:
        raise UserError(f"the chat template is longer than {LARGEST_TEMPLATE:,} characters")
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # Python has opinions on the code that Jinja makes of it
            return Sandbox(raise_exception=raise_exception).from_string(source)
    except (
        jinja2.TemplateError,
        SyntaxError,
        ValueError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        reason = str(error) or type(error).__name__  # Jinja writes Python, and Python has limits of its own
        raise UserError(f"the chat template is broken: {reason}") from None


def read_template(file: Path) -> str:
    """The text of a chat template. Raises UserError when it is missing, no text, or too long to be one."""
    try:
        if file.stat().st_size > 4 * LARGEST_TEMPLATE:
            raise UserError(f"{file} is longer than {LARGEST_TEMPLATE:,} characters")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: this model has no chat template (is it a base model?)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from None


def read_named(directory: Path) -> dict[str, str]:
    """The other templates of a model directory, by name. Raises UserError as `read_template`."""
    folder = directory / EXTRA
    found = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
    return {file.name.removesuffix(".jinja"): read_template(file) for file in found}
