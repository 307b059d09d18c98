"""SmolLM3: Llama with some layers, usually every fourth, that do not rotate positions."""

from __future__ import annotations

from typing import Any

from chatwright.config import UserError
from chatwright.interop.families.family import Family
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config, window_settings
from chatwright.interop.families.rotary import rotary
from chatwright.interop.families.settings import Settings, shown
from chatwright.model.config import GPTConfig


def _config(settings: Settings) -> GPTConfig:
    layers, interval = settings.layers(), settings.whole("no_rope_layer_interval", 4)
    rotated = settings.values.get("no_rope_layers")  # 1 for layers that do rotate
    if rotated is None:
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(one not in (0, 1) for one in rotated):
        raise UserError(f"{settings.where}: no_rope_layers = {shown(rotated)} is not 0 or 1 for each layer")
    rotated = [bool(one) for one in rotated[:layers]]
    used = settings.truth("use_sliding_window", False) and settings.values.get("sliding_window") is not None
    windows = settings.windows([used and not one for one in rotated], used=used)
    rope = rotary(settings, base=2_000_000.0)
    return llama_config(settings, tied=True, windows=windows, rotary_layers=tuple(rotated), **rope)


def _settings(config: GPTConfig) -> dict[str, Any]:
    return {
        **gated_settings(config),
        "pad_token_id": None,  # transformers' default may lie beyond the vocabulary
        "no_rope_layers": [int(config.is_rotated(layer)) for layer in range(config.layers)],
        "use_sliding_window": bool(config.windows),
        **window_settings(config),
    }


SMOLLM3 = Family("SmolLM3ForCausalLM", _config, _settings, LLAMA_RULES)
