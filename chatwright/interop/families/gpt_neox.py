"""GPT-NeoX and Pythia: attention and MLP read the same stream, a part of each head is rotated, and queries,
keys and values are fused head by head."""

from __future__ import annotations

from typing import Any

from chatwright.interop.families.family import Family
from chatwright.interop.families.rotary import partial_rotary, partial_rotary_values
from chatwright.interop.families.settings import Settings
from chatwright.interop.loaded import Rule
from chatwright.model.config import Activation, GPTConfig

_RULES = (
    Rule("gpt_neox.embed_in.weight", "embed.weight"),
    *(
        rule
        for kind in ("weight", "bias")
        for rule in (
            Rule(f"gpt_neox.layers.{{}}.input_layernorm.{kind}", f"blocks.{{}}.attention_norm.{kind}"),
            Rule(
                f"gpt_neox.layers.{{}}.attention.query_key_value.{kind}",
                tuple(f"blocks.{{}}.attention.{part}.{kind}" for part in ("query", "key", "value")),
                by_head=True,
            ),
            Rule(f"gpt_neox.layers.{{}}.attention.dense.{kind}", f"blocks.{{}}.attention.output.{kind}"),
            Rule(f"gpt_neox.layers.{{}}.post_attention_layernorm.{kind}", f"blocks.{{}}.mlp_norm.{kind}"),
            Rule(f"gpt_neox.layers.{{}}.mlp.dense_h_to_4h.{kind}", f"blocks.{{}}.mlp.up.{kind}"),
            Rule(f"gpt_neox.layers.{{}}.mlp.dense_4h_to_h.{kind}", f"blocks.{{}}.mlp.down.{kind}"),
            Rule(f"gpt_neox.final_layer_norm.{kind}", f"final_norm.{kind}"),
        )
    ),
    Rule("embed_out.weight", "head.weight"),
)
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _config(settings: Settings) -> GPTConfig:
    settings.only("attention_bias", True, default=True)
    width, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    settings.only("head_dim", None, width // heads)
    base = settings.number("rotary_emb_base", 10_000.0)
    return GPTConfig(
        vocab_size=settings.whole("vocab_size"),
        context=settings.whole("max_position_embeddings"),
        layers=settings.whole("num_hidden_layers"),
        width=width,
        heads=heads,
        mlp_width=settings.whole("intermediate_size"),
        position="rotary",
        **partial_rotary(settings, base=base, part=settings.number("rotary_pct", 0.25)),
        norm_eps=settings.number("layer_norm_eps", 1e-5),
        activation=_ACTIVATIONS[settings.only("hidden_act", *_ACTIVATIONS, default="gelu")],
        parallel=settings.truth("use_parallel_residual", True),
        tied=settings.truth("tie_word_embeddings", False),
        dropout=max(settings.number(key, 0.0) for key in ("attention_dropout", "hidden_dropout")),
    )


def _settings(config: GPTConfig) -> dict[str, Any]:
    rope = partial_rotary_values(config)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        **rope,
        "rotary_emb_base": config.rope_base,
        "rotary_pct": rope["partial_rotary_factor"],
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "use_parallel_residual": config.parallel,
        "attention_bias": True,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.dropout,
        "hidden_dropout": config.dropout,
    }


GPT_NEOX = Family(
    "GPTNeoXForCausalLM", _config, _settings, _RULES, "gpt_neox.", renamed=(("lm_head.", "embed_out."),)
)
