"""K-quants: blocks of 256 numbers, read out of a file and compared with their layout written out by hand.

The library reads these kinds but does not write them, so that the blocks here are random bits under sane
scales. The layouts are those of llama.cpp's ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from chatwright.interop.gguf import load_gguf

WIDTH, MLP = 256, 8


def halves(block: bytes, place: int) -> float:
    return float(np.frombuffer(block[place : place + 2], "<f2")[0])


def scale_and_minimum(scales: bytes, group: int) -> tuple[int, int]:
    """Six bits each of eight groups in twelve bytes (Q4_K and Q5_K)."""
    if group < 4:
        return scales[group] & 63, scales[group + 4] & 63
    low = scales[group + 4]
    return (low & 15) | (scales[group - 4] >> 6) << 4, (low >> 4) | (scales[group] >> 6) << 4


def q2_k(block: bytes) -> list[float]:
    scales, quants, d, dmin = block[:16], block[16:80], halves(block, 80), halves(block, 82)
    numbers = []
    for place in range(256):
        scale = scales[place // 16]
        byte = quants[place // 128 * 32 + place % 32]
        numbers.append(d * (scale & 15) * (byte >> 2 * (place % 128 // 32) & 3) - dmin * (scale >> 4))
    return numbers


def q3_k(block: bytes) -> list[float]:
    high, quants, packed, d = block[:32], block[32:96], block[96:108], halves(block, 108)
    numbers = []
    for place in range(256):
        group = place // 16
        low = packed[group % 8] >> 4 * (group // 8) & 15
        scale = (low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
        two = quants[place // 128 * 32 + place % 32] >> 2 * (place % 128 // 32) & 3
        numbers.append(d * scale * (two - (0 if high[place % 32] >> place // 32 & 1 else 4)))
    return numbers


def q4_k(block: bytes) -> list[float]:
    d, dmin, scales, quants = halves(block, 0), halves(block, 2), block[4:16], block[16:]
    numbers = []
    for place in range(256):
        scale, minimum = scale_and_minimum(scales, place // 32)
        four = quants[place // 64 * 32 + place % 32] >> 4 * (place // 32 % 2) & 15
        numbers.append(d * scale * four - dmin * minimum)
    return numbers


def q5_k(block: bytes) -> list[float]:
    d, dmin, scales, high, quants = halves(block, 0), halves(block, 2), block[4:16], block[16:48], block[48:]
    numbers = []
    for place in range(256):
        scale, minimum = scale_and_minimum(scales, place // 32)
        four = quants[place // 64 * 32 + place % 32] >> 4 * (place // 32 % 2) & 15
        numbers.append(d * scale * (four + 16 * (high[place % 32] >> place // 32 & 1)) - dmin * minimum)
    return numbers


def q6_k(block: bytes) -> list[float]:
    low, high, d = block[:128], block[128:192], halves(block, 208)
    scales = np.frombuffer(block[192:208], np.int8)
    numbers = []
    for place in range(256):
        half, within = divmod(place, 128)
        four = low[half * 64 + within % 64] >> 4 * (within // 64) & 15
        two = high[half * 32 + within % 32] >> 2 * (within // 32) & 3
        numbers.append(d * int(scales[place // 16]) * ((four | two << 4) - 32))
    return numbers


KINDS: dict[str, tuple[Callable[[bytes], list[float]], tuple[int, ...]]] = {
    "Q2_K": (q2_k, (80, 82)),  # where a block's scales of half precision lie
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
}


def write(path: Path, kind: gguf.GGMLQuantizationType, blocks: np.ndarray) -> None:
    """A Llama of one block whose MLP's first matrix is these blocks; nothing else matters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (4, WIDTH), "output_norm": (WIDTH,)}
    block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
    block |= {f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", KINDS)
def test_blocks_by_hand(name: str, tmp_path: Path) -> None:
    by_hand, places = KINDS[name]
    kind = gguf.GGMLQuantizationType[name]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (MLP, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    for place in places:
        blocks[:, place : place + 2] = random.uniform(0.001, 0.1, (MLP, 1)).astype("<f2").view(np.uint8)
    write(tmp_path / "m.gguf", kind, blocks)
    found = load_gguf(tmp_path / "m.gguf").model.state_dict()["blocks.0.mlp.up.weight"].numpy()
    expected = np.array([by_hand(row.tobytes()) for row in blocks])
    assert expected.std() > 0.1
    assert len(np.unique(expected)) > 100
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 against float64
