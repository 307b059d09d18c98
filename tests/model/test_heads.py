"""The scalar model: reads the last real token, knows no padding, starts from a language model."""

from __future__ import annotations

import pytest
import torch

from chatwright import checkpoint
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel

SHAPE = GPTConfig.preset("modern-nano", vocab_size=64, context=32, tied=False)


def lively(model: torch.nn.Module, seed: int) -> None:
    """Random numbers everywhere: fresh models have zero output matrices, which would hide the attention."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)


@pytest.fixture
def model() -> ScalarModel:
    scalar = ScalarModel(SHAPE).eval()
    lively(scalar, 3)
    return scalar


IDS = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))


def test_one_number_per_position_from_the_hidden_state(model: ScalarModel) -> None:
    with torch.no_grad():
        values = model(IDS)
        hidden = model.body.hidden(IDS)
    assert values.shape == (3, 9) and values.dtype == torch.float32
    by_hand = hidden @ model.scalar.weight[0] + model.scalar.bias[0]
    torch.testing.assert_close(values, by_hand, atol=1e-5, rtol=0)
    assert float(values.std()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_score_is_the_last_real_tokens_whatever_the_padding(model: ScalarModel, side: str) -> None:
    lengths = [9, 5, 2]
    ids = torch.full((3, 9), 7)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, place] = IDS[row, :length]
        mask[row, place] = True
    scores = model.score(ids, mask)
    alone = torch.stack([model(IDS[row : row + 1, :length])[0, -1] for row, length in enumerate(lengths)])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    # a score read in the last column, or at the first token, would show
    if side == "right":
        assert float((model(ids, mask=mask)[:, -1] - alone).abs().max()) > 1e-2
    assert float((model(ids, mask=mask)[:, 0] - alone).abs().max()) > 1e-2


@torch.no_grad()
def test_offset_and_scale(model: ScalarModel) -> None:
    before = model(IDS)
    model.offset.fill_(0.5)
    model.scale.fill_(3.0)
    torch.testing.assert_close(model(IDS), 3.0 * (before - 0.5), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_it_starts_from_a_language_model_and_leaves_the_output_matrix_behind(tied: bool) -> None:
    shape = GPTConfig.preset("modern-nano", vocab_size=64, context=32, tied=tied)
    language, scalar = GPT(shape).eval(), ScalarModel(shape).eval()
    lively(language, 5)
    scalar.start_from(language)
    torch.testing.assert_close(scalar.body.hidden(IDS), language.hidden(IDS), atol=1e-6, rtol=0)
    language.embed.weight.zero_()  # a copy, not a view
    assert float(scalar.body.embed.weight.abs().max()) > 0.01


def test_the_constants_are_saved_and_not_trained(model: ScalarModel) -> None:
    model.offset.fill_(0.25)
    names = {name for name, _ in model.named_parameters()}
    tensors = checkpoint.model_tensors(model)
    assert {"offset", "scale"} <= set(tensors) and not {"offset", "scale"} & names
    assert not any("head" in name for name in tensors)  # no output matrix is kept
    other = ScalarModel(SHAPE)
    checkpoint.load_model_tensors(other, tensors, where="here")
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(IDS), model(IDS), atol=0, rtol=0)


def test_both_the_head_and_the_body_learn(model: ScalarModel) -> None:
    model.score(IDS, torch.ones_like(IDS, dtype=torch.bool)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name not in ("body.embed.weight",):
            assert float(parameter.grad.abs().max()) > 0, name
