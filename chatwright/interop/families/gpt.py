"""OpenAI GPT and GPT-2: post-norm and pre-norm, learned positions, fused queries, keys and values."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import Activation, GPTConfig

HEAD = Rule("lm_head.weight", "head.weight")

# OpenAI GPT and GPT-2 name the parts of a block alike; linear layers are Conv1D, that is (inputs, outputs).
_CONV1D_BLOCK = tuple(
    rule
    for kind in ("weight", "bias")
    for rule in (
        Rule(f"transformer.h.{{}}.ln_1.{kind}", f"blocks.{{}}.attention_norm.{kind}"),
        Rule(
            f"transformer.h.{{}}.attn.c_attn.{kind}",
            tuple(f"blocks.{{}}.attention.{part}.{kind}" for part in ("query", "key", "value")),
            transposed=kind == "weight",
        ),
        Rule(
            f"transformer.h.{{}}.attn.c_proj.{kind}",
            f"blocks.{{}}.attention.output.{kind}",
            transposed=kind == "weight",
        ),
        Rule(f"transformer.h.{{}}.ln_2.{kind}", f"blocks.{{}}.mlp_norm.{kind}"),
        Rule(
            f"transformer.h.{{}}.mlp.c_fc.{kind}", f"blocks.{{}}.mlp.up.{kind}", transposed=kind == "weight"
        ),
        Rule(
            f"transformer.h.{{}}.mlp.c_proj.{kind}",
            f"blocks.{{}}.mlp.down.{kind}",
            transposed=kind == "weight",
        ),
    )
)

_GPT1_RULES = (
    Rule("transformer.tokens_embed.weight", "embed.weight"),
    Rule("transformer.positions_embed.weight", "positions.weight"),
    *_CONV1D_BLOCK,
    HEAD,
)

_GPT2_RULES = (
    Rule("transformer.wte.weight", "embed.weight"),
    Rule("transformer.wpe.weight", "positions.weight"),
    *_CONV1D_BLOCK,
    Rule("transformer.ln_f.weight", "final_norm.weight"),
    Rule("transformer.ln_f.bias", "final_norm.bias"),
    HEAD,
)


def _gpt1_config(settings: Settings) -> GPTConfig:
    settings.only("afn", "gelu", default="gelu")  # OpenAI GPT's "gelu" is the tanh approximation
    return GPTConfig(
        vocab_size=settings.whole("vocab_size"),
        context=settings.whole("n_positions"),
        layers=settings.whole("n_layer"),
        width=settings.whole("n_embd"),
        heads=settings.whole("n_head"),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        pre_norm=False,
        activation="gelu_tanh",
        tied=settings.truth("tie_word_embeddings", True),
        dropout=_dropout(settings),
    )


def _gpt2_config(settings: Settings) -> GPTConfig:
    names: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    settings.only("scale_attn_weights", True, default=True)
    settings.only("scale_attn_by_inverse_layer_idx", False, default=False)
    settings.only("add_cross_attention", False, default=False)
    # reorder_and_upcast_attn changes precision and order, not the function: nothing to refuse.
    width = settings.whole("n_embd")
    return GPTConfig(
        vocab_size=settings.whole("vocab_size"),
        context=settings.whole("n_positions"),
        layers=settings.whole("n_layer"),
        width=width,
        heads=settings.whole("n_head"),
        mlp_width=settings.whole("n_inner", 4 * width),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        activation=names[settings.only("activation_function", *names, default="gelu_new")],
        tied=settings.truth("tie_word_embeddings", True),
        dropout=_dropout(settings),
    )


def _dropout(settings: Settings) -> float:
    return max(settings.number(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"))


def _conv1d(config: GPTConfig) -> dict[str, Any]:
    """What OpenAI GPT and GPT-2 have in common."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_ctx": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tied,
    }


def _gpt1_settings(config: GPTConfig) -> dict[str, Any]:
    return {**_conv1d(config), "afn": "gelu"}  # its "gelu" is the tanh approximation


def _gpt2_settings(config: GPTConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
    return {
        **_conv1d(config),
        "n_inner": config.mlp_width,
        "activation_function": names.get(config.activation, "gelu_new"),
    }


GPT1 = Family("OpenAIGPTLMHeadModel", _gpt1_config, _gpt1_settings, _GPT1_RULES, "transformer.")
GPT2 = Family("GPT2LMHeadModel", _gpt2_config, _gpt2_settings, _GPT2_RULES, "transformer.")
