"""Models in GGUF, the format of llama.cpp: weights (often quantised), shape, tokenizer and template in one
file.

gguf_file.py reads the file, the `gguf` library dequantises its blocks; here they are named and laid out as
our decoder has them. Carried: the architectures llama, qwen3, arcee and gpt2; gguf_tokenizer.py has the
tokenizers. Metadata that we do not know is refused, because it may change what the model computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.interop.gguf_file import read_gguf
from chatwright.interop.gguf_tokenizer import named, read_tokenizer
from chatwright.interop.loaded import (
    Loaded,
    Rule,
    Stored,
    build,
    chat_template,
    located,
    translate,
)
from chatwright.model.config import GPTConfig, RotaryScaling

_ENDS = (
    Rule("token_embd.weight", "embed.weight"),
    Rule("output_norm.weight", "final_norm.weight"),
    Rule("output.weight", "head.weight"),
)
_GATED_BLOCK = (
    Rule("blk.{}.attn_norm.weight", "blocks.{}.attention_norm.weight"),
    Rule("blk.{}.attn_v.weight", "blocks.{}.attention.value.weight"),
    Rule("blk.{}.attn_output.weight", "blocks.{}.attention.output.weight"),
    Rule("blk.{}.ffn_norm.weight", "blocks.{}.mlp_norm.weight"),
    Rule("blk.{}.ffn_gate.weight", "blocks.{}.mlp.gate.weight"),
    Rule("blk.{}.ffn_up.weight", "blocks.{}.mlp.up.weight"),
    Rule("blk.{}.ffn_down.weight", "blocks.{}.mlp.down.weight"),
)
LLAMA_RULES = (
    *_ENDS,
    *_GATED_BLOCK,
    Rule("blk.{}.attn_q.weight", "blocks.{}.attention.query.weight", paired="heads"),
    Rule("blk.{}.attn_k.weight", "blocks.{}.attention.key.weight", paired="kv_heads"),
)
ARCEE_RULES = tuple(rule for rule in LLAMA_RULES if "ffn_gate" not in rule.theirs)
QWEN3_RULES = (
    *_ENDS,
    *_GATED_BLOCK,
    Rule("blk.{}.attn_q.weight", "blocks.{}.attention.query.weight"),
    Rule("blk.{}.attn_k.weight", "blocks.{}.attention.key.weight"),
    Rule("blk.{}.attn_q_norm.weight", "blocks.{}.attention.query_norm.weight"),
    Rule("blk.{}.attn_k_norm.weight", "blocks.{}.attention.key_norm.weight"),
)
GPT2_RULES = (
    *_ENDS,
    Rule("position_embd.weight", "positions.weight"),
    Rule("output_norm.bias", "final_norm.bias"),
    *(
        rule
        for kind in ("weight", "bias")
        for rule in (
            Rule(f"blk.{{}}.attn_norm.{kind}", f"blocks.{{}}.attention_norm.{kind}"),
            Rule(
                f"blk.{{}}.attn_qkv.{kind}",
                tuple(f"blocks.{{}}.attention.{part}.{kind}" for part in ("query", "key", "value")),
            ),
            Rule(f"blk.{{}}.attn_output.{kind}", f"blocks.{{}}.attention.output.{kind}"),
            Rule(f"blk.{{}}.ffn_norm.{kind}", f"blocks.{{}}.mlp_norm.{kind}"),
            Rule(f"blk.{{}}.ffn_up.{kind}", f"blocks.{{}}.mlp.up.{kind}"),
            Rule(f"blk.{{}}.ffn_down.{kind}", f"blocks.{{}}.mlp.down.{kind}"),
        )
    ),
)
RULES = {"llama": LLAMA_RULES, "qwen3": QWEN3_RULES, "gpt2": GPT2_RULES, "arcee": ARCEE_RULES}

# Metadata of an architecture that `_config` reads, and what else is harmless at the given values.
_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned",  # says only how the model came about
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),  # versions of llama.cpp disagree on what others mean
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
}

ROPE_DIVISORS = "rope_freqs.weight"
"""What the rotary rates are divided by, one number a pair: the converter writes Llama 3.1's scaling so."""
LARGEST_HEAD = 1 << 16


class _Metadata:
    """Keys and values of the file; names without a prefix belong to its architecture."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.architecture = str(values.get("general.architecture"))
        if self.architecture not in RULES:
            known = ", ".join(RULES)
            raise UserError(
                f"{where}: architecture {self.architecture!r:.80} is not supported; supported: {known}"
            )
        if values.get("split.count", 1) not in (0, 1):
            raise UserError(f"{where}: one of several pieces; merge them with llama-gguf-split --merge first")
        for key, value in self.values.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name != key and name not in _READ and value not in _HARMLESS.get(name, ()):
                raise UserError(f"{where}: {key} = {value!r:.80} is not supported")

    def whole(self, name: str, default: int | None = None) -> int:
        """A positive whole number of the architecture."""
        value = self.values.get(f"{self.architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{self.where}: {self.architecture}.{name} must be a whole number, not {value!r:.80}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number of the architecture. It is stored as float32: the shortest decimal is what its maker
        wrote."""
        value = self.values.get(f"{self.architecture}.{name}", default)
        if not isinstance(value, float):
            raise UserError(f"{self.where}: {self.architecture}.{name} must be a number, not {value!r:.80}")
        return float(str(np.float32(value)))


def _config(metadata: _Metadata, tensors: dict[str, Stored]) -> GPTConfig:
    """The shape of the model, from the metadata and the size of the vocabulary.

    The divisors of rotary rates become a part of it and are no longer among `tensors`.
    """
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise UserError(f"{metadata.where}: no token_embd.weight in it: this is not a language model")
    width, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    shared: dict[str, Any] = {
        "vocab_size": metadata.whole("vocab_size", tensors["token_embd.weight"].shape[0]),
        "context": metadata.whole("context_length"),
        "layers": metadata.whole("block_count"),
        "width": width,
        "heads": heads,
        "mlp_width": metadata.whole("feed_forward_length"),
        "tied": "output.weight" not in tensors,
    }
    if metadata.architecture == "gpt2":
        return GPTConfig(
            **shared, norm_eps=metadata.number("attention.layer_norm_epsilon"), activation="gelu_tanh"
        )
    # llama.cpp reads divisors for Llama alone.
    divisors = tensors.pop(ROPE_DIVISORS, None) if metadata.architecture == "llama" else None
    head_dim = metadata.whole("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(name, head_dim) != head_dim:
            raise UserError(f"{metadata.where}: {name} differs from the head size {head_dim}; not supported")
    return GPTConfig(
        **shared,
        kv_heads=metadata.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        position="rotary",
        rope_base=metadata.number("rope.freq_base", 10_000.0),
        rope_scaling=_scaling(metadata, divisors),
        norm="rms",
        norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        activation="relu2" if metadata.architecture == "arcee" else "swiglu",
        bias=False,
        qk_norm=metadata.architecture == "qwen3",
    )


def _scaling(metadata: _Metadata, divisors: Stored | None) -> RotaryScaling | None:
    """How the rotary angles are stretched, as llama.cpp understands the metadata and the tensor of
    divisors."""
    kind = metadata.values.get(f"{metadata.architecture}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{metadata.where}: rotary scaling of type {kind!r} is not supported")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0)) or 1.0
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    each: tuple[float, ...] = ()
    if divisors is not None:
        if len(divisors.shape) != 1 or divisors.shape[0] > LARGEST_HEAD:
            raise UserError(f"{metadata.where}: {ROPE_DIVISORS} has a strange shape")
        each = tuple(float(str(number)) for number in divisors.read().numpy())
    if kind == "yarn":
        original = metadata.whole("rope.scaling.original_context_length", metadata.whole("context_length"))
        low = metadata.number("rope.scaling.yarn_beta_slow", 1.0)
        high = metadata.number("rope.scaling.yarn_beta_fast", 32.0)
        attention *= RotaryScaling.usual_attention_factor(factor)
        return RotaryScaling("yarn", factor, original, low, high, attention_factor=attention, divisors=each)
    scaling = RotaryScaling(
        "linear", 1.0 if kind == "none" else factor, attention_factor=attention, divisors=each
    )
    return None if scaling == RotaryScaling("linear") else scaling


def _template(metadata: _Metadata) -> ChatTemplate | None:
    source = metadata.values.get("tokenizer.chat_template")
    if not source:
        return None
    if not isinstance(source, str):
        raise UserError(f"{metadata.where}: tokenizer.chat_template is no text")
    begin, end = (named(metadata.values, role, metadata.where) for role in ("bos", "eos"))
    return chat_template(source, begin=begin, end=end)


def gguf_shape(path: Path) -> GPTConfig:
    """The shape of the model in a GGUF file, without its weights. Raises UserError."""
    file = read_gguf(path)
    tensors = {tensor.name: Stored(tensor.shape, tensor.read) for tensor in file.tensors}
    with located(str(path)):
        return _config(_Metadata(file.values, str(path)), tensors)


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True) -> Loaded:
    """A model out of one GGUF file, dequantised to `dtype` (bfloat16 halves the memory).

    `tokenizer=False` reads the weights alone. Raises UserError, in one line, for a file that is damaged or
    that asks for something we do not carry.
    """
    path = Path(path)
    file = read_gguf(path)
    metadata = _Metadata(file.values, str(path))
    tensors = {tensor.name: Stored(tensor.shape, tensor.read) for tensor in file.tensors}
    with located(str(path)):
        config = _config(metadata, tensors)
    text = read_tokenizer(file.values, str(path)) if tokenizer else None
    if text is not None and text.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: {text.vocab_size} tokens in its tokenizer, {config.vocab_size} in the model"
        )
    state = translate(tensors, RULES[metadata.architecture], config, where=str(path), dtype=dtype)
    return Loaded(build(config, state), text, _template(metadata) if text else None, str(path))
