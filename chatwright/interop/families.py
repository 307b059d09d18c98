"""The families of transformers that our decoder carries exactly: what `config.json` means, what tensors are
called.

Whatever a configuration asks for beyond that is refused by name, never ignored: a model that computes
something slightly different is worse than none. Dropout acts in training only, and we carry one rate: of
several different ones the largest is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chatwright.config import UserError
from chatwright.interop.loaded import Rule, located
from chatwright.model.config import Activation, GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling

_HEAD = (Rule("lm_head.weight", "head.weight"),)

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

GPT1_RULES = (
    Rule("transformer.tokens_embed.weight", "embed.weight"),
    Rule("transformer.positions_embed.weight", "positions.weight"),
    *_CONV1D_BLOCK,
    *_HEAD,
)

GPT2_RULES = (
    Rule("transformer.wte.weight", "embed.weight"),
    Rule("transformer.wpe.weight", "positions.weight"),
    *_CONV1D_BLOCK,
    Rule("transformer.ln_f.weight", "final_norm.weight"),
    Rule("transformer.ln_f.bias", "final_norm.bias"),
    *_HEAD,
)

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
    *_HEAD,
)

QWEN3_RULES = (
    *LLAMA_RULES,
    Rule("model.layers.{}.self_attn.q_norm.weight", "blocks.{}.attention.query_norm.weight"),
    Rule("model.layers.{}.self_attn.k_norm.weight", "blocks.{}.attention.key_norm.weight"),
)

ARCEE_RULES = tuple(rule for rule in LLAMA_RULES if "gate_proj" not in rule.theirs)


def shown(value: Any) -> str:
    """A value of a file for a message, not all of it when it is long or deep."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _python(value: Any) -> str:
    """The same in Python's spelling, which names have in messages."""
    return f"{value!r:.80}" if value is None or isinstance(value, str) else shown(value)


class _Settings:
    """`config.json`, read with care."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; null and absence mean `default`."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.where}: {key} must be a positive whole number, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that is not negative; null and absence mean `default`."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
            raise UserError(f"{self.where}: {key} must be a number, not {shown(value)}")
        return float(value)

    def only(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value, if it is among `allowed`; anything else is a feature that we do not carry."""
        value = self.values.get(key, default)
        if value not in allowed:
            known = " or ".join(json.dumps(one) for one in allowed)
            raise UserError(f"{self.where}: {key} = {shown(value)} is not supported, only {known}")
        return value

    def truth(self, key: str, default: bool) -> bool:
        return bool(self.only(key, True, False, default=default))


def _gpt1_config(settings: _Settings) -> GPTConfig:
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


def _gpt2_config(settings: _Settings) -> GPTConfig:
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


def _dropout(settings: _Settings) -> float:
    return max(settings.number(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"))


def _llama_config(settings: _Settings) -> GPTConfig:
    settings.only("hidden_act", "silu", default="silu")
    settings.only("attention_bias", False, default=False)
    settings.only("mlp_bias", False, default=False)
    heads = settings.whole("num_attention_heads")
    width = settings.whole("hidden_size")
    return GPTConfig(
        vocab_size=settings.whole("vocab_size"),
        context=settings.whole("max_position_embeddings"),
        layers=settings.whole("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=settings.whole("num_key_value_heads", heads),
        head_dim=settings.whole("head_dim", width // heads),
        mlp_width=settings.whole("intermediate_size"),
        position="rotary",
        **_rotary(settings),
        norm="rms",
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        activation="swiglu",
        bias=False,
        tied=settings.truth("tie_word_embeddings", False),
        dropout=settings.number("attention_dropout", 0.0),
    )


def _arcee_config(settings: _Settings) -> GPTConfig:
    """Llama with ReLU-squared in place of the gated MLP."""
    settings.only("hidden_act", "relu2", default="relu2")
    like_llama = _Settings({"rms_norm_eps": 1e-5, **settings.values, "hidden_act": "silu"}, settings.where)
    return replace(_llama_config(like_llama), activation="relu2")


def _qwen3_config(settings: _Settings) -> GPTConfig:
    layers = settings.whole("num_hidden_layers")
    kinds = settings.values.get("layer_types")
    if kinds is None:
        windowed = settings.values.get("use_sliding_window") and settings.values.get("sliding_window", 4096)
        kinds = ["sliding"] if windowed and settings.whole("max_window_layers", 28) < layers else []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{settings.where}: sliding-window attention is not supported, only full attention")
    return replace(_llama_config(settings), head_dim=settings.whole("head_dim", 128), qk_norm=True)


# The settings that each kind of rotary scaling has, next to its base.
_ROTARY: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    },
}


def _rotary(settings: _Settings) -> dict[str, Any]:
    """Base and scaling of the rotary angles, out of the places where versions of transformers keep them."""
    settings.only("partial_rotary_factor", None, 1, 1.0)
    found = settings.values.get("rope_parameters") or settings.values.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{settings.where}: rope_parameters must be an object, not {shown(found)}")
    rope = _Settings(found, settings.where)
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROTARY:
        raise UserError(f"{settings.where}: rotary scaling of type {_python(kind)} is not supported")
    rope.only("partial_rotary_factor", None, 1, 1.0)
    strange = sorted(
        set(found) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} - _ROTARY[kind]
    )
    if strange:
        raise UserError(f"{settings.where}: rotary setting {strange[0]!r:.80} is not supported")
    base = rope.number("rope_theta", settings.number("rope_theta", 10_000.0))
    return {"rope_base": base, "rope_scaling": _scaling(kind, rope, settings)}


def _scaling(kind: str, rope: _Settings, settings: _Settings) -> RotaryScaling | None:
    if kind == "default":
        return None
    factor = rope.number("factor")
    if kind == "linear":
        return RotaryScaling("linear", factor)
    # Where it stands at the top it is meant; else it stands with the scaling, else the context has not grown.
    context = settings.values.get("original_max_position_embeddings")
    original = rope.whole("original_max_position_embeddings", settings.whole("max_position_embeddings"))
    original = original if context is None else settings.whole("original_max_position_embeddings")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RotaryScaling("llama3", factor, original, low, high)
    usual = RotaryScaling.usual_attention_factor
    attention = usual(factor)
    if rope.values.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        attention = usual(factor, rope.number("mscale")) / usual(factor, rope.number("mscale_all_dim"))
    return RotaryScaling(
        "yarn",
        factor,
        original,
        low_turns=rope.number("beta_slow", 1.0) or 1.0,  # transformers takes 0 for absent
        high_turns=rope.number("beta_fast", 32.0) or 32.0,
        whole_pairs=rope.truth("truncate", True),
        attention_factor=attention,
    )


@dataclass(frozen=True)
class Family:
    """What `model_type` in config.json stands for."""

    config: Callable[[_Settings], GPTConfig]
    rules: tuple[Rule, ...]
    base: str
    """Prefix of all names but the output matrix's; files saved from the bare model lack it."""


FAMILIES = {
    "openai-gpt": Family(_gpt1_config, GPT1_RULES, "transformer."),
    "gpt2": Family(_gpt2_config, GPT2_RULES, "transformer."),
    "llama": Family(_llama_config, LLAMA_RULES, "model."),
    "qwen3": Family(_qwen3_config, QWEN3_RULES, "model."),
    "arcee": Family(_arcee_config, ARCEE_RULES, "model."),
}


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """What `model_type` says. Raises UserError when we do not carry it."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: models of type {_python(kind)} are not supported; supported: {', '.join(FAMILIES)}"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: quantised safetensors are not supported; use the original weights or a GGUF file"
        )
    return FAMILIES[kind]


def config_from_hf(values: Mapping[str, Any], *, where: str = "config.json") -> GPTConfig:
    """The shape that a `config.json` describes. Raises UserError for whatever we do not carry."""
    with located(where):
        return family_of(values, where).config(_Settings(values, where))
