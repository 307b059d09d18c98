"""Models in GGUF, the format of llama.cpp: weights (often quantised), shape, tokenizer and template in one
file.

gguf_file.py reads the file, the `gguf` library dequantises its blocks; here they are named and laid out as
our decoder has them. Carried: the architectures llama, qwen3, arcee and gpt2, with byte-level BPE. Metadata
that we do not know is refused, because it may change what the model computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.interop.gguf_file import read_gguf
from chatwright.interop.loaded import (
    Loaded,
    Rule,
    Stored,
    build,
    end_of_text,
    located,
    translate,
)
from chatwright.interop.templates import chat_template
from chatwright.model.config import GPTConfig, RotaryScaling
from chatwright.tokenizer import PATTERN, Tokenizer, library

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

# How text is cut before merging, by llama.cpp's name for it.
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's pattern
_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])


def _split(digits: str) -> pre_tokenizers.Sequence:
    """The pattern of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    pattern = PATTERN.replace(r"|\p{N}|", f"|{digits}|")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "gpt-2": _WORDS,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of llama.cpp. Unused ones fill the vocabulary up to the size of the model's table."""
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

    def items(self, name: str, kind: type[Any]) -> list[Any]:
        """A list of metadata whose items are all of this kind; empty when absent."""
        found = self.values.get(name, [])
        if not isinstance(found, list) or any(type(item) is not kind for item in found):
            raise UserError(f"{self.where}: {name} is damaged: not a list of items of type {kind.__name__}")
        return found


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


def _tokenizer(metadata: _Metadata) -> Tokenizer | None:
    """The tokenizer that the metadata spells out; None when there is none."""
    values, where = metadata.values, metadata.where
    if "tokenizer.ggml.model" not in values:
        return None
    if values["tokenizer.ggml.model"] != "gpt2":
        raise UserError(
            f"{where}: its tokenizer is of kind {values['tokenizer.ggml.model']!r:.80}; only byte-level BPE "
            "('gpt2') is supported, load_gguf(..., tokenizer=False) reads the weights alone"
        )
    kind = values.get("tokenizer.ggml.pre")
    if not isinstance(kind, str) or kind not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{where}: pre-tokenizer {kind!r:.80} is not supported; supported: {known}")
    tokens, types = (
        metadata.items("tokenizer.ggml.tokens", str),
        metadata.items("tokenizer.ggml.token_type", int),
    )
    merges = [tuple(merge.split(" ")) for merge in metadata.items("tokenizer.ggml.merges", str)]
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: its list of tokens is damaged (missing types, or tokens that occur twice)")
    while types and types[-1] == UNUSED:
        tokens, types = tokens[:-1], types[:-1]
    with library(f"{where}: its merges do not fit its tokens"):
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: number for number, token in enumerate(tokens)},
                merges=merges,  # type: ignore[arg-type,unused-ignore]
                ignore_merges=kind
                == "llama-bpe",  # Llama 3 takes a whole word first, if the vocabulary has it
            )
        )
    backend.pre_tokenizer = PRE_TOKENIZERS[kind]
    backend.decoder = decoders.ByteLevel()
    controls = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    plain = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    end = end_of_text(controls, _named(metadata, "eos"), where=where)
    return Tokenizer(backend, end_of_text=end, controls=controls)


def _named(metadata: _Metadata, role: str) -> str | None:
    """The token that plays a role (bos, eos), or None."""
    number, tokens = (
        metadata.values.get(f"tokenizer.ggml.{role}_token_id"),
        metadata.items("tokenizer.ggml.tokens", str),
    )
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise UserError(
            f"{metadata.where}: tokenizer.ggml.{role}_token_id is {number!r:.80}, not one of its tokens"
        )
    return str(tokens[number])


def _template(metadata: _Metadata) -> ChatTemplate | None:
    source = metadata.values.get("tokenizer.chat_template")
    if not source:
        return None
    if not isinstance(source, str):
        raise UserError(f"{metadata.where}: tokenizer.chat_template is no text")
    roles = {"unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator", "mask_token": "mask"}
    others = {name: token for name, role in roles.items() if (token := _named(metadata, role)) is not None}
    prefix = "tokenizer.chat_template."
    named = {
        key.removeprefix(prefix): text
        for key, text in metadata.values.items()
        if key.startswith(prefix) and isinstance(text, str)
    }
    begin, end = _named(metadata, "bos"), _named(metadata, "eos")
    return chat_template(source, begin=begin, end=end, others=others, named=named)


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
    text = _tokenizer(metadata) if tokenizer else None
    if text is not None and text.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: {text.vocab_size} tokens in its tokenizer, {config.vocab_size} in the model"
        )
    state = translate(tensors, RULES[metadata.architecture], config, where=str(path), dtype=dtype)
    return Loaded(build(config, state), text, _template(metadata) if text else None, str(path))
