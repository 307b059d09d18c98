"""Same weights, same logits: our decoder against transformers' OpenAIGPT, GPT2, Llama, Qwen3 and Arcee.

Every parameter is random, norms and biases too, so that no part is trivially one or zero. Everything is
float32, and the largest difference between two logits may be 1e-4 (they are of order one): both libraries add
the same numbers in another order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from chatwright.interop.families import config_from_hf
from chatwright.interop.hf import load_hf, state_dict_from_hf
from chatwright.interop.loaded import build
from chatwright.model.cache import KVCache
from chatwright.model.gpt import GPT

TOLERANCE = 1e-4
BATCH, TOKENS = 3, 19


def _conv(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"vocab_size": 97, "n_positions": 40, "n_embd": width, "n_layer": layers, "n_head": heads, **more}


def _gated(width: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 97,
        "max_position_embeddings": 40,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        **more,
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1": ("OpenAIGPT", _conv(48, 3, 4)),
    "gpt1-odd-heads": ("OpenAIGPT", _conv(36, 2, 3, layer_norm_epsilon=1e-3)),
    "gpt1-untied": ("OpenAIGPT", _conv(32, 1, 1, tie_word_embeddings=False)),
    "gpt2": ("GPT2", _conv(48, 3, 4)),
    "gpt2-erf": ("GPT2", _conv(40, 2, 5, activation_function="gelu", layer_norm_epsilon=1e-3)),
    "gpt2-narrow-mlp-untied": ("GPT2", _conv(32, 2, 2, n_inner=56, tie_word_embeddings=False)),
    "llama": ("Llama", _gated(48, 3, 4, 4, 100)),
    "llama-grouped-tied": ("Llama", _gated(48, 2, 6, 2, 64, tie_word_embeddings=True)),
    "llama-one-kv-head": (
        "Llama",
        _gated(
            48,
            2,
            4,
            1,
            64,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        ),
    ),
    "llama-wide-heads": ("Llama", _gated(32, 2, 4, 2, 64, head_dim=16)),
    "qwen3": ("Qwen3", _gated(40, 3, 4, 2, 72, head_dim=24)),
    "qwen3-tied": (
        "Qwen3",
        _gated(64, 2, 4, 4, 80, head_dim=8, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6}),
    ),
    "arcee": ("Arcee", _gated(48, 3, 4, 2, 100)),
    "arcee-tied": (
        "Arcee",
        _gated(
            64,
            2,
            4,
            4,
            80,
            head_dim=24,
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_theta": 1e6},
        ),
    ),
}
CACHED = [name for name, (family, _) in CASES.items() if family != "OpenAIGPT"]  # theirs has no cache


@torch.no_grad()
def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, at sizes that keep the logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            drawn = 1.0 + 0.3 * drawn if name.endswith("weight") else 0.3 * drawn
        else:
            drawn *= 0.4 if "embed" in name or name.endswith(("wte.weight", "wpe.weight")) else 0.2
        parameter.copy_(drawn)
    return model.eval()


def theirs_and_ours(name: str, **changes: Any) -> tuple[Any, GPT]:
    """The transformers model of a case and our model with its weights, through names in memory."""
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    kind = "OpenAIGPTLMHeadModel" if family == "OpenAIGPT" else None
    kind = kind or ("GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    theirs = randomised(getattr(transformers, kind)(config))
    values = config.to_dict()
    return theirs, build(config_from_hf(values), state_dict_from_hf(values, theirs.state_dict()))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, GPT]:
    return theirs_and_ours(request.param)


@pytest.fixture(scope="module", params=CACHED)
def cached_pair(request: pytest.FixtureRequest) -> tuple[Any, GPT]:
    return theirs_and_ours(request.param)


def some_ids(batch: int = BATCH, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def counted(mask: Tensor) -> Tensor:
    """The positions that transformers' generate() gives to a padded batch."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; the logits must say something, or equality would mean nothing."""
    assert a.shape == b.shape
    assert b.std() > 0.3
    return float((a - b).abs().max())


@torch.no_grad()
def test_logits(pair: tuple[Any, GPT]) -> None:
    theirs, ours = pair
    ids = some_ids()
    assert difference(ours(ids), theirs(ids).logits) <= TOLERANCE


@torch.no_grad()
def test_full_context_and_single_token(pair: tuple[Any, GPT]) -> None:
    theirs, ours = pair
    for ids in (some_ids(1, 40), some_ids(2, 1)):
        assert difference(ours(ids), theirs(ids).logits) <= TOLERANCE


def test_parameter_count(pair: tuple[Any, GPT]) -> None:
    theirs, ours = pair
    assert ours.parameter_count() == theirs.num_parameters()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded(pair: tuple[Any, GPT], side: str) -> None:
    theirs, ours = pair
    lengths = torch.tensor([TOKENS, 5, 12])
    places = torch.arange(TOKENS)
    mask = places < lengths[:, None] if side == "right" else places >= TOKENS - lengths[:, None]
    ids = some_ids()
    expected = theirs(ids, attention_mask=mask.long(), position_ids=counted(mask)).logits
    assert difference(ours(ids, mask=mask)[mask], expected[mask]) <= TOLERANCE


@pytest.mark.parametrize("chunks", [[8, 11], [1, 12, 6], [1] * TOKENS], ids=["two", "three", "each token"])
@torch.no_grad()
def test_cached(cached_pair: tuple[Any, GPT], chunks: list[int]) -> None:
    theirs, ours = cached_pair
    ids = some_ids()
    past = transformers.DynamicCache(config=theirs.config)
    cache = KVCache(ours.config, BATCH, TOKENS)
    parts, their_parts = [], []
    for chunk in torch.split(ids, chunks, dim=1):
        parts.append(ours(chunk, cache=cache))
        their_parts.append(theirs(chunk, past_key_values=past, use_cache=True).logits)
    logits, uncached = torch.cat(parts, 1), theirs(ids).logits
    assert difference(logits, ours(ids)) <= TOLERANCE
    assert difference(logits, torch.cat(their_parts, 1)) <= TOLERANCE
    assert difference(logits, uncached) <= TOLERANCE


@torch.no_grad()
def test_unequal_rows_in_one_cache(cached_pair: tuple[Any, GPT]) -> None:
    """Rows of 4, 9 and 6 tokens go on for five tokens each, with no gaps, as transformers sees each row
    alone."""
    theirs, ours = cached_pair
    lengths, more, ids = [4, 9, 6], 5, some_ids()
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    cache = KVCache(ours.config, BATCH, 9 + more)
    first = ours(ids[:, :9], mask=mask, cache=cache)
    new = [
        torch.stack([ids[row, length + step] for row, length in enumerate(lengths)]) for step in range(more)
    ]
    steps = torch.cat([ours(column[:, None], cache=cache) for column in new], 1)
    for row, length in enumerate(lengths):
        alone = theirs(ids[row : row + 1, : length + more]).logits[0]
        assert difference(first[row, :length], alone[:length]) <= TOLERANCE
        assert difference(steps[row], alone[length:]) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt1", {"pre_norm": True}),
        ("gpt1", {"activation": "gelu"}),
        ("gpt2", {"norm_eps": 1e-2}),
        ("gpt2-erf", {"activation": "gelu_tanh"}),
        ("llama", {"rope_base": 20_000.0}),
        ("qwen3", {"norm_eps": 1e-2}),
        ("qwen3", {"qk_norm": False}),
        ("arcee", {"activation": "gelu_tanh"}),
    ],
)
@torch.no_grad()
def test_the_comparison_is_sharp(name: str, changes: dict[str, Any]) -> None:
    """A model that is slightly another one fails the comparison: the tolerance hides nothing."""
    theirs, ours = theirs_and_ours(name)
    other = GPT(replace(ours.config, **changes)).eval()
    other.load_state_dict(ours.state_dict(), strict=False)
    ids = some_ids()
    assert difference(other(ids), theirs(ids).logits) > TOLERANCE


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "llama-grouped-tied", "qwen3"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@torch.no_grad()
def test_directory(name: str, shard: str, tmp_path: Path) -> None:
    """What save_pretrained writes, in one file and in several."""
    theirs, ours = theirs_and_ours(name)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = load_hf(tmp_path)
    assert (loaded.tokenizer, loaded.template, loaded.source) == (None, None, str(tmp_path))
    assert loaded.model.config == ours.config
    assert torch.equal(loaded.model(some_ids()), ours(some_ids()))


@torch.no_grad()
def test_bare_model_has_no_prefix(tmp_path: Path) -> None:
    """Old checkpoints, the published GPT-2 among them, were saved from the model without its head."""
    theirs, ours = theirs_and_ours("gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    assert torch.equal(load_hf(tmp_path).model(some_ids()), ours(some_ids()))


def test_half_precision(tmp_path: Path) -> None:
    theirs, _ = theirs_and_ours("llama")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_hf(tmp_path).model.parameters()} == {torch.float32}
    model = load_hf(tmp_path, dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.embed.weight, theirs.model.embed_tokens.weight)
