"""Qwen 2 (also Qwen 2.5): Llama with biases of queries, keys and values. Qwen 3: Llama with QK-norm."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config, window_settings
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import GPTConfig

_BIASES = tuple(
    Rule(f"model.layers.{{}}.self_attn.{theirs}_proj.bias", f"blocks.{{}}.attention.{own}.bias")
    for theirs, own in (("q", "query"), ("k", "key"), ("v", "value"))
)
QK_NORMS = tuple(
    Rule(f"model.layers.{{}}.self_attn.{theirs}_norm.weight", f"blocks.{{}}.attention.{own}_norm.weight")
    for theirs, own in (("q", "query"), ("k", "key"))
)


def _windows(settings: Settings) -> tuple[int, ...]:
    """Layers from `max_window_layers` on have a window, if windows are used at all."""
    layers, first = settings.layers(), settings.count("max_window_layers", 28)
    used = (
        settings.truth("use_sliding_window", False)
        and settings.values.get("sliding_window", 4096) is not None
    )
    return settings.windows([used and layer >= first for layer in range(layers)], 4096, used=used)


def _qwen2_config(settings: Settings) -> GPTConfig:
    return llama_config(settings, windows=_windows(settings), qkv_bias=True)


def _qwen3_config(settings: Settings) -> GPTConfig:
    head_dim = settings.whole("head_dim", 128)
    return llama_config(settings, windows=_windows(settings), head_dim=head_dim, qk_norm=True)


def _qwen_settings(config: GPTConfig) -> dict[str, Any]:
    windows = window_settings(config) if config.windows else {"sliding_window": None}
    return {
        **gated_settings(config),
        "use_sliding_window": bool(config.windows),
        **windows,
        "max_window_layers": config.layers,
    }


QWEN2 = Family(
    "Qwen2ForCausalLM", _qwen2_config, _qwen_settings, (LLAMA_RULES[0], *_BIASES, *LLAMA_RULES[1:])
)
QWEN3 = Family(
    "Qwen3ForCausalLM", _qwen3_config, _qwen_settings, (LLAMA_RULES[0], *QK_NORMS, *LLAMA_RULES[1:])
)
