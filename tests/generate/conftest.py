"""Small models whose every weight matters, and a tokenizer of single bytes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

MakeModel = Callable[..., GPT]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A preset with random weights everywhere (fresh models have zero output matrices: attention would not
    show)."""

    def make(preset: str = "modern-nano", seed: int = 0, **changes: Any) -> GPT:
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = GPT(GPTConfig.preset(preset, **{"tied": False, **changes})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0.0, 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
            model.head.weight.normal_(0.0, 3.0 * model.config.width**-0.5)  # logits spread by about 3
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """256 single bytes and the control tokens."""
    return Tokenizer.train(["a"], 264)


@pytest.fixture(scope="session")
def make_chain(tokenizer: Tokenizer) -> Callable[[str], GPT]:
    """A model that says a given text: after each byte (all must differ) the next one, after the last the
    end."""

    def make(text: str) -> GPT:
        ids = [*tokenizer.encode(text), tokenizer.end_of_text_id]
        assert len(set(ids)) == len(ids)
        size = tokenizer.vocab_size
        config = GPTConfig.preset(
            "modern-nano",
            vocab_size=size,
            width=size,
            heads=2,
            kv_heads=1,
            head_dim=8,
            tied=False,
            context=64,
        )
        model = GPT(config).eval()  # fresh blocks change nothing, so the last token alone decides
        with torch.no_grad():
            model.embed.weight.copy_(torch.eye(size))
            model.head.weight.zero_()
            for before, after in pairwise(ids):
                model.head.weight[after, before] = 10.0
        return model

    return make
