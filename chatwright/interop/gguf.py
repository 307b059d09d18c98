"""Models in GGUF, the format of llama.cpp: weights (often quantised), shape, tokenizer and template in one
file.

gguf_file.py reads the file, the `gguf` library dequantises its blocks; gguf_shapes.py says what architectures
are carried, what their metadata means and what their tensors are called. Here is the tokenizer, byte-level
BPE, and what puts all together.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.interop.gguf_file import read_gguf
from chatwright.interop.gguf_metadata import Metadata
from chatwright.interop.gguf_shapes import ARCHITECTURES, config_of, known_metadata
from chatwright.interop.loaded import (
    Loaded,
    Stored,
    build,
    end_of_text,
    located,
    translate,
)
from chatwright.interop.templates import chat_template
from chatwright.model.config import GPTConfig
from chatwright.tokenizer import PATTERN, Tokenizer, library

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


def _tokenizer(metadata: Metadata) -> Tokenizer | None:
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


def _named(metadata: Metadata, role: str) -> str | None:
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


def _template(metadata: Metadata) -> ChatTemplate | None:
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
        return config_of(known_metadata(file.values, str(path)), tensors)


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True) -> Loaded:
    """A model out of one GGUF file, dequantised to `dtype` (bfloat16 halves the memory).

    `tokenizer=False` reads the weights alone. Raises UserError, in one line, for a file that is damaged or
    that asks for something we do not carry.
    """
    path = Path(path)
    file = read_gguf(path)
    metadata = known_metadata(file.values, str(path))
    tensors = {tensor.name: Stored(tensor.shape, tensor.read) for tensor in file.tensors}
    with located(str(path)):
        config = config_of(metadata, tensors)
    text = _tokenizer(metadata) if tokenizer else None
    if text is not None and text.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: {text.vocab_size} tokens in its tokenizer, {config.vocab_size} in the model"
        )
    state = translate(
        tensors, ARCHITECTURES[metadata.architecture].rules, config, where=str(path), dtype=dtype
    )
    return Loaded(build(config, state), text, _template(metadata) if text else None, str(path))
