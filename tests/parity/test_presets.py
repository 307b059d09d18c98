"""The named shapes have exactly the number of parameters of the models they are named after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from chatwright.interop.families import config_from_hf
from chatwright.model.config import PRESETS, GPTConfig
from chatwright.model.gpt import GPT

COUNTS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "smollm2-135m": 134_515_008,
}

# Table 2.1 of arXiv:2005.14165: parameters in millions, as printed.
GPT3_MILLIONS = {
    "125m": 125,
    "350m": 350,
    "760m": 760,
    "1.3b": 1_300,
    "2.7b": 2_700,
    "6.7b": 6_700,
    "13b": 13_000,
}


def count(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).parameter_count()


def gpt2(layers: int, width: int, heads: int, context: int = 1_024) -> dict[str, Any]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context}


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1": ("OpenAIGPT", {}),
    "gpt2": ("GPT2", gpt2(12, 768, 12)),
    "gpt2-medium": ("GPT2", gpt2(24, 1_024, 16)),
    "gpt2-large": ("GPT2", gpt2(36, 1_280, 20)),
    "gpt2-xl": ("GPT2", gpt2(48, 1_600, 25)),
    "gpt3-175b": ("GPT2", gpt2(96, 12_288, 96, 2_048)),
    "smollm2-135m": (
        "Llama",
        {
            "vocab_size": 49_152,
            "max_position_embeddings": 8_192,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1_536,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "tie_word_embeddings": True,
        },
    ),
    "modern-large": (
        "Qwen3",
        {
            "vocab_size": 49_152,
            "max_position_embeddings": 4_096,
            "hidden_size": 1_536,
            "num_hidden_layers": 24,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "intermediate_size": 4_096,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_count(name: str) -> None:
    assert count(GPTConfig.preset(name)) == COUNTS[name]


@pytest.mark.parametrize("name", THEIRS)
def test_equals_transformers(name: str) -> None:
    """The same shape, and as many parameters, as transformers' model of that configuration."""
    family, settings = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "GPT2": "GPT2LMHeadModel"}.get(
        family, f"{family}ForCausalLM"
    )
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    ours = GPTConfig.preset(name)
    assert config_from_hf(config.to_dict()) == GPTConfig.preset(name, dropout=0.1 if "gpt" in name else 0.0)
    assert count(ours) == model.num_parameters()


@pytest.mark.parametrize("size", GPT3_MILLIONS)
def test_gpt3_table(size: str) -> None:
    """Within 3 % of the printed, rounded figures."""
    assert count(GPTConfig.preset(f"gpt3-{size}")) == pytest.approx(GPT3_MILLIONS[size] * 1e6, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name: str) -> None:
    config = GPTConfig.preset(name)
    with torch.device("meta"):
        model = GPT(config)
    assert len(model.blocks) == config.layers
    assert model.parameter_count(embeddings=False) < model.parameter_count()
