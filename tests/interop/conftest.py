"""Tiny random models of every family that can be exported, with everything drawn: norms and biases too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chatwright.chat import NATIVE, Message
from chatwright.commands.export import write_export
from chatwright.interop.loaded import Loaded
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.rotary_scaling import RotaryScaling
from chatwright.tokenizer import Tokenizer

TEXTS = (
    "Hello there, how are you today?",
    "I am fine, thank you. And you?",
    "naïve café — 東京 🙂",
    "don't 1234 stop!",
)
VOCAB = 331
"""An odd number, larger than the tokenizer's: the table has rows without a token, as published models have.
"""

LEARNED: dict[str, Any] = {"vocab_size": VOCAB, "context": 160, "layers": 2, "width": 64, "heads": 4}
GATED: dict[str, Any] = {
    **LEARNED,
    "mlp_width": 96,
    "position": "rotary",
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "swiglu",
    "bias": False,
}
SHAPES: dict[str, GPTConfig] = {
    "gpt1": GPTConfig(**LEARNED, pre_norm=False, dropout=0.1),
    "gpt1-untied": GPTConfig(**LEARNED, pre_norm=False, tied=False, norm_eps=1e-3),
    "gpt2": GPTConfig(**LEARNED),
    "gpt2-untied": GPTConfig(**LEARNED, tied=False, mlp_width=64, norm_eps=1e-3),
    "gpt2-erf": GPTConfig(**LEARNED, activation="gelu"),
    "llama": GPTConfig(**GATED, tied=False),
    "llama-grouped": GPTConfig(**{**GATED, "heads": 8, "kv_heads": 2, "rope_base": 500_000.0}),
    "llama-wide-heads": GPTConfig(**{**GATED, "kv_heads": 1, "head_dim": 32}),
    "qwen3": GPTConfig(**GATED, qk_norm=True),
    "qwen3-untied": GPTConfig(
        **{**GATED, "width": 48, "heads": 5, "kv_heads": 1, "head_dim": 24, "mlp_width": 100, "tied": False},
        qk_norm=True,
    ),
    "llama-linear": GPTConfig(**GATED, rope_scaling=RotaryScaling("linear", 4.0)),
    "qwen3-yarn": GPTConfig(
        **GATED,
        qk_norm=True,
        rope_scaling=RotaryScaling(
            "yarn", 4.0, 40, 1.0, 32.0, attention_factor=RotaryScaling.usual_attention_factor(4.0)
        ),
    ),
    "arcee": GPTConfig(**{**GATED, "activation": "relu2"}),
    "arcee-grouped": GPTConfig(**{**GATED, "activation": "relu2", "heads": 4, "kv_heads": 2, "tied": False}),
}


@torch.no_grad()
def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Every parameter drawn, at sizes that keep the logits of order one."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            drawn = 1.0 + 0.3 * drawn if name.endswith("weight") else 0.3 * drawn
        else:
            drawn *= 0.15
        parameter.copy_(drawn)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A few merges over the 256 bytes, as the tokenizer stage trains them."""
    return Tokenizer.train(TEXTS * 4, 320)


def parts_of(config: GPTConfig, tokenizer: Tokenizer, *, chat: bool = True) -> Loaded:
    """A random model of this shape, ready to be exported."""
    return Loaded(random_model(config), tokenizer, NATIVE if chat else None, "a random model")


def export_hf(parts: Loaded, target: Path, *, dtype: str = "fp32") -> Path:
    write_export(parts, target, form="hf", dtype=dtype, verify=True, source="x")
    return target


def their_model(directory: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def their_tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def their_ids(theirs: Any, messages: list[Message], *, prompt: bool = False) -> list[int]:
    return list(theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False))
