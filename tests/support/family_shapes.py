"""Small shapes of the families of open models, as llama.cpp's architectures allow them, with every part in
use."""

from __future__ import annotations

from typing import Any

import torch

from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.rotary_scaling import RotaryScaling

_BASE: dict[str, Any] = {
    "vocab_size": 331,
    "context": 160,
    "layers": 2,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 96,
    "position": "rotary",
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "swiglu",
    "bias": False,
    "tied": False,
}
_GEMMA: dict[str, Any] = {
    **_BASE,
    "head_dim": 24,
    "activation": "geglu",
    "branch_norm": "both",
    "embed_scale": 8.0,
    "tied": True,
}
_NEOX: dict[str, Any] = {
    **_BASE,
    "kv_heads": 4,
    "norm": "layer",
    "norm_eps": 1e-5,
    "bias": True,
    "activation": "gelu",
    "rotary_dim": 4,
}
FAMILIES: dict[str, GPTConfig] = {
    "qwen2": GPTConfig(**{**_BASE, "qkv_bias": True, "tied": True}),
    "mistral": GPTConfig(**{**_BASE, "head_dim": 24, "windows": (7, 7)}),
    "ministral": GPTConfig(**_BASE, windows=(0, 16)),
    "smollm3": GPTConfig(**_BASE, rotary_layers=(False, True)),
    "olmo2": GPTConfig(**_BASE, branch_norm="after", qk_norm=True, qk_norm_whole=True),
    "phi3": GPTConfig(**_BASE, rotary_dim=12),
    "granite": GPTConfig(
        **_BASE, embed_scale=12.0, residual_scale=0.22, logit_scale=1 / 0.3, attention_scale=0.125
    ),
    "gemma2": GPTConfig(**_GEMMA, windows=(9, 0), attention_softcap=2.0, logit_softcap=5.0),
    "gemma3": GPTConfig(
        **_GEMMA,
        qk_norm=True,
        windows=(9, 0),
        rope_base=1e6,
        rope_scaling=RotaryScaling("linear", 8.0),
        window_rope_base=10_000.0,
    ),
    "gpt_neox": GPTConfig(**_NEOX, parallel=True),
    "gpt_neox-in-turn": GPTConfig(**_NEOX),
    # All that residual_scale can meet: biases, and norms behind.
    "scaled-biases": GPTConfig(**{**_NEOX, "activation": "geglu"}, residual_scale=0.4),
    "scaled-norms": GPTConfig(**_BASE, branch_norm="after", residual_scale=0.4, attention_softcap=1.5),
}


@torch.no_grad()
def drawn(config: GPTConfig, seed: int = 0) -> GPT:
    """A model of this shape, every parameter drawn; logits spread by about 1 to 3."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1.0 + 0.3 * values
        elif parameter.ndim == 1:
            values *= 0.3
        else:
            values *= parameter.shape[1] ** -0.5
        parameter.copy_(values)
    if not config.tied:  # a large table would make every token its own successor
        model.head.weight.mul_(3.0)
    return model.eval()
