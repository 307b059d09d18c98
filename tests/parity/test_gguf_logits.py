"""GGUF files written here, read by us and by transformers: same numbers out of the same file.

The files are laid out as llama.cpp's converter does it: Llama's queries and keys with rotary pairs side by
side, GPT-2's three in one, linear layers (outputs, inputs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import quantize

from chatwright.interop.gguf import load_gguf

WIDTH, HEADS, LAYERS, MLP, VOCAB, CONTEXT = 64, 4, 2, 96, 70, 32
KV_HEADS = {"llama": 2, "qwen3": 2, "gpt2": HEADS}
HEAD_DIM = {"llama": WIDTH // HEADS, "qwen3": 32, "gpt2": WIDTH // HEADS}
TOLERANCE = 1e-4  # float32, logits of order one


def side_by_side(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + K / 2 of every head become neighbours, as convert_hf_to_gguf.py does it for Llama."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def make(architecture: str, *, tied: bool) -> dict[str, np.ndarray]:
    """Random tensors of a small model, as named and laid out in GGUF."""
    random = np.random.default_rng(0)
    size, kv = HEADS * HEAD_DIM[architecture], KV_HEADS[architecture] * HEAD_DIM[architecture]

    def draw(*shape: int) -> np.ndarray:
        return (0.2 * random.standard_normal(shape)).astype(np.float32)

    def norm(width: int) -> np.ndarray:
        return 1 + draw(width)

    tensors = {"token_embd.weight": 2 * draw(VOCAB, WIDTH), "output_norm.weight": norm(WIDTH)}
    if not tied:
        tensors["output.weight"] = draw(VOCAB, WIDTH)
    if architecture == "gpt2":
        tensors |= {"position_embd.weight": draw(CONTEXT, WIDTH), "output_norm.bias": draw(WIDTH)}
    for layer in range(LAYERS):
        block: dict[str, np.ndarray] = {"attn_norm.weight": norm(WIDTH), "ffn_norm.weight": norm(WIDTH)}
        if architecture == "gpt2":
            shapes = {"attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
            shapes |= {"ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
            block |= {f"{name}.bias": draw(shape[0]) for name, shape in shapes.items()}
            block |= {"attn_norm.bias": draw(WIDTH), "ffn_norm.bias": draw(WIDTH)}
        else:
            shapes = {"attn_v": (kv, WIDTH), "attn_output": (WIDTH, size)}
            shapes |= {"ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
            query, key = draw(size, WIDTH), draw(kv, WIDTH)
            if architecture == "llama":
                query, key = side_by_side(query, HEADS), side_by_side(key, KV_HEADS["llama"])
            else:
                block |= {"attn_q_norm.weight": norm(32), "attn_k_norm.weight": norm(32)}
            block |= {"attn_q.weight": query, "attn_k.weight": key}
        block |= {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    return tensors


def write(
    path: Path,
    architecture: str,
    tensors: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    """A GGUF file; matrices are stored as `kind`, vectors as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_vocab_size(VOCAB)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(KV_HEADS[architecture])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(50_000.0)
        writer.add_key_length(HEAD_DIM[architecture])
        writer.add_value_length(HEAD_DIM[architecture])
        writer.add_rope_dimension_count(HEAD_DIM[architecture])
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CASES = [
    ("llama", True, "F32"),
    ("llama", False, "Q8_0"),
    ("llama", True, "Q4_1"),
    ("llama", True, "BF16"),
    ("qwen3", True, "F16"),
    ("qwen3", False, "F32"),
    ("gpt2", True, "F32"),
    ("gpt2", False, "Q4_0"),
]


@pytest.mark.parametrize(("architecture", "tied", "kind"), CASES)
@torch.no_grad()
def test_same_logits(architecture: str, tied: bool, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", architecture, make(architecture, tied=tied), gguf.GGMLQuantizationType[kind])
    loaded = load_gguf(tmp_path / "m.gguf")
    config = loaded.model.config
    assert (config.tied, config.qk_norm, config.head_dim) == (
        tied,
        architecture == "qwen3",
        HEAD_DIM[architecture],
    )
    assert loaded.tokenizer is None
    # What transformers does not take out of the file itself.
    extra: dict[str, Any] = {
        "llama": {},
        "qwen3": {"head_dim": HEAD_DIM["qwen3"]},
        "gpt2": {"n_positions": CONTEXT, "n_inner": MLP, "vocab_size": VOCAB},
    }[architecture]
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **extra
    )
    ids = torch.randint(0, VOCAB, (2, 23), generator=torch.Generator().manual_seed(0))
    logits = theirs.eval()(ids).logits
    assert logits.std() > 0.3
    assert (loaded.model(ids) - logits).abs().max() <= TOLERANCE
