"""chatwright: the whole road of the GPT lineage, from raw text to an aligned chat model.

    import chatwright as cw
    model = cw.load("runs/tiny/ppo")
    model.chat([{"role": "user", "content": "hi"}])

Names are imported when first used, so that `import chatwright` costs next to nothing. Import it before torch
where you import both: on macOS and Windows it then tells torch's threads to wait shortly, which keeps
training and answering fast beside other programs (openmp.py).
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from chatwright import openmp

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "ChatTemplate",
    "GPTConfig",
    "LanguageModel",
    "Tokenizer",
    "UserError",
    "__version__",
    "load",
]

_HOME = {
    "ChatTemplate": "chatwright.chat",
    "GPT": "chatwright.model.gpt",
    "GPTConfig": "chatwright.model.config",
    "LanguageModel": "chatwright.language_model",
    "Tokenizer": "chatwright.tokenizer",
    "UserError": "chatwright.config",
    "load": "chatwright.language_model",
}

openmp.wait_shortly(os.environ)

if TYPE_CHECKING:
    from chatwright.chat import ChatTemplate
    from chatwright.config import UserError
    from chatwright.language_model import LanguageModel, load
    from chatwright.model.config import GPTConfig
    from chatwright.model.gpt import GPT
    from chatwright.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chatwright' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
