"""OLMo 2: Llama with norms behind attention and MLP, and QK-norm over all heads' features together. OLMo 3
has windows besides, in layers whose rotary angles are not stretched."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config, window_settings
from chatwright.interop.families.qwen import QK_NORMS
from chatwright.interop.families.rotary import rotary_by_layer, rotary_by_layer_values
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import GPTConfig

_NORMS_BEHIND = tuple(
    Rule(f"model.layers.{{}}.post_{theirs}_layernorm.weight", f"blocks.{{}}.{own}_out_norm.weight")
    for theirs, own in (("attention", "attention"), ("feedforward", "mlp"))
)
_RULES = (
    LLAMA_RULES[0],
    *_NORMS_BEHIND,
    *QK_NORMS,
    *(rule for rule in LLAMA_RULES[1:] if "layernorm" not in rule.theirs),
)
_PARTS: dict[str, Any] = {"branch_norm": "after", "qk_norm": True, "qk_norm_whole": True}


def _olmo2_config(settings: Settings) -> GPTConfig:
    return llama_config(settings, eps=1e-5, **_PARTS)


def _olmo2_settings(config: GPTConfig) -> dict[str, Any]:
    # transformers would not train the row of its default, token 1.
    return {**gated_settings(config), "pad_token_id": None}


def _olmo3_config(settings: Settings) -> GPTConfig:
    windows = settings.windows([(layer + 1) % 4 != 0 for layer in range(settings.layers())], 4096)
    rope = rotary_by_layer(settings, windows, base=500_000.0, window_base=None)
    return llama_config(settings, eps=1e-5, windows=windows, **rope, **_PARTS)


def _olmo3_settings(config: GPTConfig) -> dict[str, Any]:
    return {**_olmo2_settings(config), **window_settings(config), **rotary_by_layer_values(config)}


OLMO2 = Family("Olmo2ForCausalLM", _olmo2_config, _olmo2_settings, _RULES)
OLMO3 = Family("Olmo3ForCausalLM", _olmo3_config, _olmo3_settings, _RULES)
