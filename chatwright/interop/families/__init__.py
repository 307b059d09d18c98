"""The families of transformers that our decoder carries exactly: what `config.json` means, what tensors are
called. One entry is one family; those alike share a file.

Whatever a configuration asks for beyond that is refused by name, never ignored: a model that computes
something slightly different is worse than none. Dropout acts in training only, and we carry one rate: of
several different ones the largest is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chatwright.config import UserError
from chatwright.interop.families.family import Family
from chatwright.interop.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from chatwright.interop.families.gpt import GPT1, GPT2
from chatwright.interop.families.gpt_neox import GPT_NEOX
from chatwright.interop.families.granite import GRANITE
from chatwright.interop.families.llama import ARCEE, LLAMA
from chatwright.interop.families.mistral import MINISTRAL, MISTRAL
from chatwright.interop.families.olmo import OLMO2, OLMO3
from chatwright.interop.families.phi3 import PHI3
from chatwright.interop.families.qwen import QWEN2, QWEN3
from chatwright.interop.families.settings import Settings, named, shown
from chatwright.interop.families.smollm3 import SMOLLM3
from chatwright.interop.loaded import located
from chatwright.model.config import GPTConfig

__all__ = ["FAMILIES", "Family", "config_from_hf", "family_of", "shown"]

FAMILIES: dict[str, Family] = {
    "openai-gpt": GPT1,
    "gpt2": GPT2,
    "llama": LLAMA,
    "arcee": ARCEE,
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi3": PHI3,
    "granite": GRANITE,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3": GEMMA3,
    "gpt_neox": GPT_NEOX,
}
"""By transformers' `model_type`. Of several families that can say a shape, the first here is taken."""


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """What `model_type` says. Raises UserError when we do not carry it."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: models of type {named(kind)} are not supported; supported: {', '.join(FAMILIES)}"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: quantised safetensors are not supported; use the original weights or a GGUF file"
        )
    return FAMILIES[kind]


def config_from_hf(values: Mapping[str, Any], *, where: str = "config.json") -> GPTConfig:
    """The shape that a `config.json` describes. Raises UserError for whatever we do not carry."""
    with located(where):
        family = family_of(values, where)
        config = family.config(Settings(values, where))
    return replace(config, family=family.written_as or str(values["model_type"]))
