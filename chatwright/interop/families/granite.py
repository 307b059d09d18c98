"""Granite: Llama with four multipliers, of embeddings, attention scores, sub-layers and logits."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config
from chatwright.interop.families.settings import Settings
from chatwright.model.config import GPTConfig


def _config(settings: Settings) -> GPTConfig:
    return llama_config(
        settings,
        embed_scale=settings.number("embedding_multiplier", 1.0),
        residual_scale=settings.number("residual_multiplier", 1.0),
        attention_scale=settings.positive("attention_multiplier", 1.0),
        logit_scale=1.0 / settings.positive("logits_scaling", 1.0),
    )


def _settings(config: GPTConfig) -> dict[str, Any]:
    return {
        **gated_settings(config),
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "logits_scaling": inverse(config.logit_scale),
    }


def inverse(value: float, power: float = -1.0) -> float:
    """x with x ** power = value, a whole number where one fits exactly: what was read is written again."""
    found: float = value ** (1.0 / power)
    whole = round(found)
    return whole if whole and float(whole) ** power == value else found


GRANITE = Family("GraniteForCausalLM", _config, _settings, LLAMA_RULES)
