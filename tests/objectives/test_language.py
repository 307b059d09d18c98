"""Language-model losses against values worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatwright.objectives.language import bits_per_byte, log_probs_of, next_token_loss

# Logits that are log-probabilities, so that the softmax changes nothing.
LOGITS = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]).log()
TARGETS = torch.tensor([[0, 1, 0]])
MASK = torch.tensor([[True, True, False]])
# -ln 0.5 - ln 0.8 - ln 0.2 = -ln 0.08; without the last position -ln 0.4
WHOLE, MASKED = -math.log(0.08), -math.log(0.4)


def test_next_token_loss_is_the_sum_over_positions() -> None:
    assert float(next_token_loss(LOGITS, TARGETS)) == pytest.approx(WHOLE, abs=1e-6)


def test_next_token_loss_counts_only_where_the_mask_is_true() -> None:
    assert float(next_token_loss(LOGITS, TARGETS, MASK)) == pytest.approx(MASKED, abs=1e-6)


def test_logits_need_not_be_normalised() -> None:
    assert float(next_token_loss(LOGITS + 7.0, TARGETS, MASK)) == pytest.approx(MASKED, abs=1e-5)


def _losses(targets: Tensor) -> Tensor:
    return F.cross_entropy(LOGITS[0], targets[0], reduction="none")


WRONG_LOSSES: dict[str, Callable[[], Tensor]] = {
    "mean over the mask": lambda: _losses(TARGETS)[MASK[0]].mean(),
    "mask turned round": lambda: _losses(TARGETS)[~MASK[0]].sum(),
    "mask ignored": lambda: _losses(TARGETS).sum(),
    "targets one place late": lambda: _losses(TARGETS.roll(1, 1))[MASK[0]].sum(),
    "bits instead of nats": lambda: _losses(TARGETS)[MASK[0]].sum() / math.log(2),
    "sign lost": lambda: -_losses(TARGETS)[MASK[0]].sum(),
}


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_the_hand_value_tells_a_wrong_loss_from_the_right_one(wrong: str) -> None:
    assert abs(float(WRONG_LOSSES[wrong]()) - MASKED) > 0.1


def test_a_masked_position_gets_no_gradient_even_when_its_loss_is_infinite() -> None:
    logits = LOGITS.clone()
    logits[0, 2, 0] = -math.inf  # the target of the masked position is impossible
    logits.requires_grad_()
    next_token_loss(logits, TARGETS, MASK).backward()
    assert logits.grad is not None
    # d(-log softmax) / d logits = p - onehot: (0.5 - 1, 0.25, 0.25) and (0.1, 0.8 - 1, 0.1)
    torch.testing.assert_close(
        logits.grad[0], torch.tensor([[-0.5, 0.25, 0.25], [0.1, -0.2, 0.1], [0.0, 0.0, 0.0]]), atol=1e-6, rtol=0
    )


def test_log_probs_of_targets() -> None:
    expected = torch.tensor([[math.log(0.5), math.log(0.8), math.log(0.2)]])
    torch.testing.assert_close(log_probs_of(LOGITS, TARGETS), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_probs_of(LOGITS.double(), TARGETS), expected, atol=1e-6, rtol=0)


def test_bits_per_byte() -> None:
    # 8 ln 2 nats are 8 bits; over 4 bytes 2 bits each
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    for wrong in (8 * math.log(2) / 4, 8 * math.log(2) * math.log(2) / 4, 8.0, 4 / 8):
        assert wrong != pytest.approx(2.0, abs=0.1)
