"""Llama, and what nearly all later families share with it; Arcee is a Llama with another MLP."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.rotary import rotary, rotary_values
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import GPTConfig

LLAMA_RULES = (
    Rule("model.embed_tokens.weight", "embed.weight"),
    Rule("model.layers.{}.input_layernorm.weight", "blocks.{}.attention_norm.weight"),
    Rule("model.layers.{}.self_attn.q_proj.weight", "blocks.{}.attention.query.weight"),
    Rule("model.layers.{}.self_attn.k_proj.weight", "blocks.{}.attention.key.weight"),
    Rule("model.layers.{}.self_attn.v_proj.weight", "blocks.{}.attention.value.weight"),
    Rule("model.layers.{}.self_attn.o_proj.weight", "blocks.{}.attention.output.weight"),
    Rule("model.layers.{}.post_attention_layernorm.weight", "blocks.{}.mlp_norm.weight"),
    Rule("model.layers.{}.mlp.gate_proj.weight", "blocks.{}.mlp.gate.weight"),
    Rule("model.layers.{}.mlp.up_proj.weight", "blocks.{}.mlp.up.weight"),
    Rule("model.layers.{}.mlp.down_proj.weight", "blocks.{}.mlp.down.weight"),
    Rule("model.norm.weight", "final_norm.weight"),
    Rule("lm_head.weight", "head.weight"),
)


def llama_config(settings: Settings, *, eps: float = 1e-6, tied: bool = False, **fields: Any) -> GPTConfig:
    """The shape that Llama's settings describe, with other `fields` of a family. `eps` and `tied` hold where
    the settings do not say them."""
    if "activation" not in fields:
        settings.only("hidden_act", "silu", default="silu")
    settings.only("attention_bias", False, default=False)
    settings.only("mlp_bias", False, default=False)
    heads = settings.whole("num_attention_heads")
    width = settings.whole("hidden_size")
    usual: dict[str, Any] = {
        "vocab_size": settings.whole("vocab_size"),
        "context": settings.whole("max_position_embeddings"),
        "layers": settings.whole("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": settings.whole("num_key_value_heads", heads),
        "head_dim": settings.whole("head_dim", max(1, width // heads)),
        "mlp_width": settings.whole("intermediate_size"),
        "position": "rotary",
        "norm": "rms",
        "norm_eps": settings.number("rms_norm_eps", eps),
        "activation": "swiglu",
        "bias": False,
        "tied": settings.truth("tie_word_embeddings", tied),
        "dropout": settings.number("attention_dropout", 0.0),
    }
    if "rope_base" not in fields:
        usual |= rotary(settings)
    return GPTConfig(**{**usual, **fields})


def gated_settings(config: GPTConfig) -> dict[str, Any]:
    """What Llama and its relatives have in common, out of a shape."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **rotary_values(config),
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
    }


def _llama_settings(config: GPTConfig) -> dict[str, Any]:
    return {**gated_settings(config), "mlp_bias": False}


def window_settings(config: GPTConfig) -> dict[str, Any]:
    """Windows in the words of transformers: which layers have one, and how large it is."""
    kinds = [
        "sliding_attention" if config.window(layer) else "full_attention" for layer in range(config.layers)
    ]
    return {"layer_types": kinds, "sliding_window": max(config.windows, default=None)}


def _arcee_config(settings: Settings) -> GPTConfig:
    settings.only("hidden_act", "relu2", default="relu2")
    return llama_config(settings, eps=1e-5, activation="relu2")


def _arcee_settings(config: GPTConfig) -> dict[str, Any]:
    return {**_llama_settings(config), "hidden_act": "relu2"}


LLAMA = Family("LlamaForCausalLM", llama_config, _llama_settings, LLAMA_RULES)
ARCEE = Family(
    "ArceeForCausalLM",
    _arcee_config,
    _arcee_settings,
    tuple(rule for rule in LLAMA_RULES if "gate_proj" not in rule.theirs),
)
