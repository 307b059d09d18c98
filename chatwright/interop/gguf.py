"""Models in GGUF, the format of llama.cpp: weights (often quantised), shape, tokenizer and template in one
file.

gguf_file.py reads the file, the `gguf` library dequantises its blocks; gguf_shapes.py says what architectures
are carried, what their metadata means and what their tensors are called; gguf_tokenizer.py has the tokenizer.
Here is the chat template, and what puts all together.
"""

from __future__ import annotations

from pathlib import Path

import torch

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.interop.gguf_file import read_gguf
from chatwright.interop.gguf_metadata import Metadata
from chatwright.interop.gguf_shapes import ARCHITECTURES, config_of, known_metadata
from chatwright.interop.gguf_tokenizer import named, read_tokenizer
from chatwright.interop.loaded import (
    Loaded,
    Stored,
    build,
    located,
    translate,
)
from chatwright.interop.templates import ROLES, chat_template
from chatwright.model.config import GPTConfig


def _template(metadata: Metadata) -> ChatTemplate | None:
    source = metadata.values.get("tokenizer.chat_template")
    if not source:
        return None
    if not isinstance(source, str):
        raise UserError(f"{metadata.where}: tokenizer.chat_template is no text")
    others = {
        name: token
        for name, role in ROLES.items()
        if (token := named(metadata.values, role, metadata.where)) is not None
    }
    prefix = "tokenizer.chat_template."
    further = {
        key.removeprefix(prefix): text
        for key, text in metadata.values.items()
        if key.startswith(prefix) and isinstance(text, str)
    }
    begin, end = (named(metadata.values, role, metadata.where) for role in ("bos", "eos"))
    return chat_template(source, begin=begin, end=end, others=others, named=further)


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
    text = read_tokenizer(file.values, str(path)) if tokenizer else None
    if text is not None and text.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: {text.vocab_size} tokens in its tokenizer, {config.vocab_size} in the model"
        )
    state = translate(
        tensors, ARCHITECTURES[metadata.architecture].rules, config, where=str(path), dtype=dtype
    )
    return Loaded(build(config, state), text, _template(metadata) if text else None, str(path))
