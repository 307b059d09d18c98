"""Mistral: Llama with a window in every layer, or in none. Ministral: each layer says whether it has one."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config, window_settings
from chatwright.interop.families.settings import Settings
from chatwright.model.config import GPTConfig


def _mistral_config(settings: Settings) -> GPTConfig:
    layers = settings.layers()
    settings.only("layer_types", None)  # transformers' Mistral does not read it
    windowed = settings.values.get("sliding_window", 4096) is not None
    return llama_config(settings, windows=settings.windows([windowed] * layers, 4096))


def _mistral_settings(config: GPTConfig) -> dict[str, Any]:
    return {**gated_settings(config), "sliding_window": max(config.windows, default=None)}


def _ministral_config(settings: Settings) -> GPTConfig:
    windowed = settings.values.get("sliding_window", 4096) is not None
    return llama_config(settings, windows=settings.windows([windowed] * settings.layers(), 4096))


def _ministral_settings(config: GPTConfig) -> dict[str, Any]:
    return {**gated_settings(config), **window_settings(config)}


MISTRAL = Family("MistralForCausalLM", _mistral_config, _mistral_settings, LLAMA_RULES)
MINISTRAL = Family("MinistralForCausalLM", _ministral_config, _ministral_settings, LLAMA_RULES)
