"""Tiny random models of the families of transformers, made by transformers itself, with everything drawn:
norms and biases too. Windows are shorter than the texts, so that they matter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from chatwright.chat import NATIVE
from chatwright.interop.families import config_from_hf
from chatwright.interop.hf import state_dict_from_hf
from chatwright.interop.loaded import build
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

VOCAB = 331
"""Odd, and larger than the tokenizer's: the table has rows without a token, as published models have."""
CONTEXT, WINDOW = 160, 6
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _like_llama(**more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 72,
    }
    return {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, **sizes, **more}


def _like_neox(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return {**_like_llama(rope_parameters=rope, hidden_size=64), **more}


_WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_TWO_BASES = {
    _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 40}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", _like_llama()),
    "qwen2-window": ("Qwen2", _like_llama(tie_word_embeddings=True, **_WINDOWED)),
    "qwen3-window": ("Qwen3", _like_llama(head_dim=16, **_WINDOWED)),
    "mistral": ("Mistral", _like_llama(sliding_window=WINDOW, rope_parameters={"rope_theta": 1e6})),
    "ministral": (
        "Ministral",
        _like_llama(head_dim=16, sliding_window=WINDOW, layer_types=[_SLIDING, _FULL, _SLIDING]),
    ),
    "smollm3": ("SmolLM3", _like_llama(no_rope_layer_interval=2, pad_token_id=0)),
    "smollm3-window": (
        "SmolLM3",
        _like_llama(no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=WINDOW, pad_token_id=0),
    ),
    "olmo2": ("Olmo2", _like_llama()),
    "olmo3": (
        "Olmo3",
        _like_llama(
            num_hidden_layers=4,
            sliding_window=WINDOW,
            rope_parameters={_FULL: _YARN, _SLIDING: {"rope_type": "default", "rope_theta": 1e5}},
        ),
    ),
    "phi3": ("Phi3", _like_llama(sliding_window=WINDOW, pad_token_id=0)),
    "phi3-partial": (
        "Phi3",
        _like_llama(
            num_key_value_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            pad_token_id=0,
        ),
    ),
    "granite": (
        "Granite",
        _like_llama(
            embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.22, logits_scaling=0.35
        ),
    ),
    "gemma2": (
        "Gemma2",
        _like_llama(
            head_dim=16,
            query_pre_attn_scalar=10,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3_text": (
        "Gemma3Text",
        _like_llama(
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=[_SLIDING, _SLIDING, _FULL],
            rope_parameters=_TWO_BASES,
        ),
    ),
    "gpt_neox": ("GPTNeoX", _like_neox()),
    "gpt_neox-sequential": (
        "GPTNeoX",
        _like_neox(use_parallel_residual=False, hidden_act="gelu_new", tie_word_embeddings=True),
    ),
}
ONE_OF_EACH = [name for name in CASES if "-" not in name]


@torch.no_grad()
def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, at sizes that keep the logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            usual = 0.0 if "Gemma" in type(model).__name__ or name.endswith("bias") else 1.0
            drawn = usual + 0.3 * drawn
        else:
            drawn *= 0.15
        parameter.copy_(drawn)
    return model.eval()


def their_config(name: str, **changes: Any) -> Any:
    """The configuration of a case. `eager` attention is the one that has soft caps."""
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    config._attn_implementation = "eager"
    return config


@cache
def theirs(name: str) -> Any:
    """The model of a case. It is shared: do not change it."""
    kind = CASES[name][0].removesuffix("Text")
    return randomised(getattr(transformers, f"{kind}ForCausalLM")(their_config(name)))


def ours(name: str, dtype: torch.dtype = torch.float32) -> GPT:
    """Our model with the same weights, read from names in memory."""
    values = theirs(name).config.to_dict()
    return build(config_from_hf(values), state_dict_from_hf(values, theirs(name).state_dict(), dtype=dtype))


def write_model(name: str, directory: Path, tokenizer: Tokenizer) -> Path:
    """The model of a case as a directory of transformers, with a byte-level tokenizer and a chat template."""
    theirs(name).save_pretrained(directory)
    tokenizer.save(directory)
    (directory / "chat_template.jinja").write_text(NATIVE.source, encoding="utf-8")
    return directory
