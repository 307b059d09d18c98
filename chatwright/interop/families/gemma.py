"""Gemma 2 and Gemma 3 (text): norms on both sides of each branch, whose weights are stored less one, GEGLU,
scaled embeddings, soft caps, and windows in most layers, in Gemma 3 with a rotary base of their own."""

from __future__ import annotations

from typing import Any

from chatwright.config import UserError
from chatwright.interop.families.family import Family
from chatwright.interop.families.granite import inverse
from chatwright.interop.families.llama import LLAMA_RULES, gated_settings, llama_config, window_settings
from chatwright.interop.families.qwen import QK_NORMS
from chatwright.interop.families.rotary import rotary_by_layer, rotary_by_layer_values
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import GPTConfig

_NORMS = tuple(
    Rule(f"model.layers.{{}}.{theirs}_layernorm.weight", f"blocks.{{}}.{own}_norm.weight", plus=1.0)
    for theirs, own in (
        ("input", "attention"),
        ("post_attention", "attention_out"),
        ("pre_feedforward", "mlp"),
        ("post_feedforward", "mlp_out"),
    )
)
_GEMMA2_RULES = (
    LLAMA_RULES[0],
    *_NORMS,
    *(rule for rule in LLAMA_RULES[1:-2] if "layernorm" not in rule.theirs),
    Rule("model.norm.weight", "final_norm.weight", plus=1.0),
    LLAMA_RULES[-1],
)
_GEMMA3_RULES = (
    LLAMA_RULES[0],
    *(Rule(rule.theirs, rule.own, plus=1.0) for rule in QK_NORMS),
    *_GEMMA2_RULES[1:],
)


def _gemma_config(settings: Settings, **fields: Any) -> GPTConfig:
    """What both have in common."""
    settings.only("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    settings.only("use_bidirectional_attention", False, None)
    head_dim = settings.whole("head_dim", 256)
    return llama_config(
        settings,
        tied=True,
        head_dim=head_dim,
        activation="geglu",
        branch_norm="both",
        embed_scale=settings.whole("hidden_size") ** 0.5,
        attention_scale=settings.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        **fields,
    )


def _gemma2_config(settings: Settings) -> GPTConfig:
    return _gemma_config(
        settings,
        windows=settings.windows([layer % 2 == 0 for layer in range(settings.layers())], 4096),
        logit_softcap=settings.cap("final_logit_softcapping", 30.0),
        attention_softcap=settings.cap("attn_logit_softcapping", 50.0),
    )


def _gemma3_config(settings: Settings) -> GPTConfig:
    settings.only("attn_logit_softcapping", None)  # transformers does not apply it
    pattern = settings.whole("sliding_window_pattern", 6)
    windows = settings.windows([(layer + 1) % pattern != 0 for layer in range(settings.layers())], 4096)
    return _gemma_config(
        settings,
        windows=windows,
        qk_norm=True,
        logit_softcap=settings.cap("final_logit_softcapping"),
        **rotary_by_layer(settings, windows, base=1_000_000.0, window_base=10_000.0),
    )


def _gemma3_text_part(settings: Settings) -> GPTConfig:
    """The model that may read pictures as well, where it does not."""
    if settings.values.get("vision_config") is not None:
        raise UserError(
            f"{settings.where}: the model reads pictures (vision_config), which is not supported; the text "
            "models of the family are of type gemma3_text"
        )
    text = settings.values.get("text_config")
    return _gemma3_config(Settings(text, settings.where) if isinstance(text, dict) else settings)


def _gemma_settings(config: GPTConfig) -> dict[str, Any]:
    values = gated_settings(config)
    del values["hidden_act"]
    return {
        **values,
        "pad_token_id": None,  # transformers would not train the row of its default, token 0
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": inverse(config.attention_scale or config.head_dim**-0.5, -0.5),
        "final_logit_softcapping": config.logit_softcap or None,
        "attn_logit_softcapping": config.attention_softcap or None,
        **window_settings(config),
    }


def _gemma3_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        **_gemma_settings(config),
        **rotary_by_layer_values(config),
        "attn_logit_softcapping": None,
        "rope_local_base_freq": config.window_rope_base or config.rope_base,
    }


GEMMA2 = Family("Gemma2ForCausalLM", _gemma2_config, _gemma_settings, _GEMMA2_RULES)
GEMMA3_TEXT = Family("Gemma3ForCausalLM", _gemma3_config, _gemma3_settings, _GEMMA3_RULES)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    _gemma3_text_part,
    _gemma3_settings,
    _GEMMA3_RULES,
    written_as="gemma3_text",
    renamed=(("language_model.", ""), ("model.language_model.", "model.")),
)
