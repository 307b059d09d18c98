"""Phi-3: Llama with fused matrices, and with rotary positions of a part of each head in some models."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config
from chatwright.interop.families.rotary import partial_rotary, partial_rotary_values
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import GPTConfig

_FUSED = (
    Rule(
        "model.layers.{}.self_attn.qkv_proj.weight",
        tuple(f"blocks.{{}}.attention.{part}.weight" for part in ("query", "key", "value")),
    ),
    Rule(
        "model.layers.{}.mlp.gate_up_proj.weight",
        tuple(f"blocks.{{}}.mlp.{part}.weight" for part in ("gate", "up")),
    ),
)
_APART = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_RULES = (
    LLAMA_RULES[0],
    *_FUSED,
    *(rule for rule in LLAMA_RULES[1:] if not any(name in rule.theirs for name in _APART)),
)


def _config(settings: Settings) -> GPTConfig:
    windowed = settings.values.get("sliding_window") is not None
    windows = settings.windows([windowed] * settings.layers())
    dropout = max(settings.number(key, 0.0) for key in ("resid_pdrop", "embd_pdrop", "attention_dropout"))
    rope = partial_rotary(settings, kinds=("default",))
    return llama_config(settings, eps=1e-5, windows=windows, dropout=dropout, **rope)


def _settings(config: GPTConfig) -> dict[str, Any]:
    dropout = {"resid_pdrop": config.dropout, "embd_pdrop": config.dropout}
    # transformers' default for pad_token_id may lie beyond the vocabulary.
    others = {"sliding_window": max(config.windows, default=None), "pad_token_id": None}
    return {**gated_settings(config), **partial_rotary_values(config), **others, **dropout}


PHI3 = Family("Phi3ForCausalLM", _config, _settings, _RULES)
