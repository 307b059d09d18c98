"""Stretched rotary positions: our logits against transformers', within the original context and beyond it.

Tiny random Llama and Qwen3 models in float32, logits of order one. The largest difference may be 1e-5; found:
4e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from chatwright.config import UserError
from chatwright.interop.families import config_from_hf
from chatwright.interop.gguf import load_gguf
from chatwright.interop.hf import load_hf, state_dict_from_hf
from chatwright.interop.loaded import build
from chatwright.model.cache import KVCache
from chatwright.model.gpt import GPT

TOLERANCE = 1e-5
ORIGINAL, CONTEXT, VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 16, 64, 61, 32, 4, 2, 16, 40, 2
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": ORIGINAL},
    "llama3, original context not given": LLAMA3,
    "yarn": YARN,
    "yarn, other limits": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn, exact limits": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    "yarn, attention factor": {**YARN, "attention_factor": 1.7},
    "yarn, mscale": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
}


def theirs_of(family: str, rope: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=MLP,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 100.0, **rope},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(
                torch.randn_like(parameter) * (0.4 if "embed" in name else 0.15) + ("norm" in name)
            )
    return model


def ours_of(theirs: Any) -> GPT:
    values = theirs.config.to_dict()
    return build(config_from_hf(values), state_dict_from_hf(values, theirs.state_dict()))


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@torch.no_grad()
def test_same_logits(family: str, kind: str) -> None:
    theirs = theirs_of(family, KINDS[kind])
    ours = ours_of(theirs)
    plain = ours_of(theirs_of(family, {"rope_type": "default"}))
    for tokens in (ORIGINAL, CONTEXT, 2 * CONTEXT):
        ids = ids_of(tokens)
        expected = theirs(ids).logits
        assert expected.std() > 0.3
        assert (ours(ids) - expected).abs().max() <= TOLERANCE
        assert (plain(ids) - expected).abs().max() > 100 * TOLERANCE  # the scaling does something
    cache = KVCache(ours.config, 2, CONTEXT)
    ids = ids_of(CONTEXT)
    parts = [ours(chunk, cache=cache) for chunk in torch.split(ids, [40, 1, 23], dim=1)]
    assert (torch.cat(parts, 1) - theirs(ids).logits).abs().max() <= TOLERANCE


@torch.no_grad()
def test_directory(tmp_path: Path) -> None:
    """As save_pretrained writes it, and as older versions did: under `rope_scaling`, with `type`."""
    theirs = theirs_of("Qwen3", YARN)
    theirs.save_pretrained(tmp_path)
    model = load_hf(tmp_path).model
    assert model.config == ours_of(theirs).config
    values = theirs.config.to_dict()
    rope = dict(values.pop("rope_parameters"))
    rope["type"] = rope.pop("rope_type")
    values["rope_theta"] = rope.pop("rope_theta")
    assert config_from_hf({**values, "rope_scaling": rope}) == model.config


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_other_kinds_are_refused_by_name(kind: str) -> None:
    values = {
        **theirs_of("Llama", KINDS["linear"]).config.to_dict(),
        "rope_parameters": {"rope_type": kind, "factor": 2.0},
    }
    with pytest.raises(UserError, match=f"rotary scaling of type '{kind}' is not supported"):
        config_from_hf(values)


# --- GGUF ---


def side_by_side(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + K / 2 of every head become neighbours, as convert_hf_to_gguf.py does it for Llama."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q"}
NAMES |= {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
NAMES |= {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
NAMES |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(path: Path, theirs: Any, metadata: dict[str, Any], divisors: list[float] | None = None) -> Path:
    """A transformers model as GGUF, with rotary metadata of our choice."""
    architecture = theirs.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(theirs.config.rms_norm_eps)
    writer.add_rope_freq_base(100.0)
    writer.add_key_length(HEAD_DIM)
    for key, value in metadata.items():
        name = f"{architecture}.rope.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    for name, tensor in theirs.state_dict().items():
        stem = name.removesuffix(".weight")
        numbers = tensor.numpy()
        if stem not in ENDS:
            _, _, layer, part = stem.split(".", 3)
            if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                numbers = side_by_side(numbers, HEADS if "q_proj" in part else KV_HEADS)
            stem = f"blk.{layer}.{NAMES[part]}"
        writer.add_tensor(f"{ENDS.get(stem, stem)}.weight", np.ascontiguousarray(numbers))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors() -> list[float]:
    """What Llama 3.1's scaling divides the rates by, pair by pair, as its own program says it."""
    divisors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 100.0 ** (2 * pair / HEAD_DIM)
        if wavelength < ORIGINAL / 4.0:
            divisors.append(1.0)
        elif wavelength > ORIGINAL / 1.0:
            divisors.append(4.0)
        else:
            smooth = (ORIGINAL / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 4.0 + smooth))
    assert len(set(divisors)) > 2
    return divisors


YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": ORIGINAL}
GGUF_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "linear": ("Llama", KINDS["linear"], {"scaling.type": "linear", "scaling.factor": 4.0}, False),
    "linear, type not given": ("Qwen3", KINDS["linear"], {"scaling.factor": 4.0}, False),
    "linear, old key": ("Llama", KINDS["linear"], {"scale_linear": 4.0}, False),
    "none": ("Llama", {"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": 4.0}, False),
    "llama3": ("Llama", KINDS["llama3"], {}, True),
    "yarn": ("Qwen3", YARN, {**YARN_KEYS, "scaling.finetuned": 1, "scaling.yarn_ext_factor": 1.0}, False),
    "yarn, original context not given": (
        "Llama",
        {**YARN, "original_max_position_embeddings": CONTEXT},
        {"scaling.type": "yarn", "scaling.factor": 4.0},
        False,
    ),
    "yarn, other limits and factor": (
        "Llama",
        {**KINDS["yarn, other limits"], "attention_factor": 0.5 * (1 + 0.1 * float(np.log(4.0)))},
        {
            **YARN_KEYS,
            "scaling.yarn_beta_fast": 4.0,
            "scaling.yarn_beta_slow": 0.5,
            "scaling.attn_factor": 0.5,
        },
        False,
    ),
}


@pytest.mark.parametrize("case", GGUF_CASES)
@torch.no_grad()
def test_gguf(case: str, tmp_path: Path) -> None:
    family, rope, metadata, divided = GGUF_CASES[case]
    theirs = theirs_of(family, rope)
    ours = load_gguf(
        write(tmp_path / "m.gguf", theirs, metadata, llama3_divisors() if divided else None)
    ).model
    for tokens in (ORIGINAL, 2 * CONTEXT):
        ids = ids_of(tokens)
        assert (ours(ids) - theirs(ids).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"scaling.type": "longrope"}, "rotary scaling of type 'longrope' is not supported"),
        ({**YARN_KEYS, "scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor = 1.5 is not supported"),
        ({**YARN_KEYS, "scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5 is not supported"),
        ({**YARN_KEYS, "scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier = 0.5 is not supported"),
        ({"scaling.alpha": 2.0}, "rope.scaling.alpha = 2.0 is not supported"),
        ({"scaling.factor": -2.0}, "the numbers of rope_scaling must be positive"),
    ],
)
def test_gguf_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_gguf(write(tmp_path / "m.gguf", theirs_of("Llama", {"rope_type": "default"}), metadata))
    assert message in str(caught.value)


def test_gguf_divisors_refused(tmp_path: Path) -> None:
    for family, divisors, message in (
        ("Llama", [1.0] * 3, "3 divisors of rotary rates for 8 pairs"),
        ("Llama", [0.0] * 8, "must be positive"),
        ("Qwen3", [1.0] * 8, "no place for: rope_freqs.weight"),  # llama.cpp does not look at it there
    ):
        path = write(tmp_path / f"{family}.gguf", theirs_of(family, {"rope_type": "default"}), {}, divisors)
        with pytest.raises(UserError, match=message):
            load_gguf(path)
