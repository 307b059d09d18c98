"""Language-model losses against values worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from chatwright.objectives import language
from chatwright.objectives.language import (
    bits_per_byte,
    chunked_next_token_loss,
    next_token_loss,
    projected_log_probs,
)

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
        logits.grad[0],
        torch.tensor([[-0.5, 0.25, 0.25], [0.1, -0.2, 0.1], [0.0, 0.0, 0.0]]),
        atol=1e-6,
        rtol=0,
    )


def test_log_probs_of_targets() -> None:
    expected = torch.tensor([math.log(0.5), math.log(0.8), math.log(0.2)])
    torch.testing.assert_close(
        projected_log_probs(LOGITS[0], torch.eye(3), TARGETS[0]), expected, atol=1e-6, rtol=0
    )


def test_bits_per_byte() -> None:
    # 8 ln 2 nats are 8 bits; over 4 bytes 2 bits each
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    for wrong in (8 * math.log(2) / 4, 8 * math.log(2) * math.log(2) / 4, 8.0, 4 / 8):
        assert wrong != pytest.approx(2.0, abs=0.1)


# ---- chunked linear + cross entropy: equal to the plain one, with its gradients


def chunked_case(tokens: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(2, tokens, 16, generator=draw), torch.randn(50, 16, generator=draw)
    return (
        hidden,
        head,
        torch.randint(50, (2, tokens), generator=draw),
        torch.rand(2, tokens, generator=draw) < 0.6,
    )


def with_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = loss(hidden, head)
    (
        value * 0.37
    ).backward()  # a scale other than 1: whoever divides by the number of targets does so afterwards
    assert hidden.grad is not None and head.grad is not None
    return value.detach(), hidden.grad, head.grad


@pytest.mark.parametrize(
    "chunk", [1, 7, 46, 1000]
)  # 46 rows in all: many chunks, an uneven last one, exactly one, one
@pytest.mark.parametrize("masked", [False, True])
def test_the_chunked_loss_equals_the_plain_one(chunk: int, masked: bool) -> None:
    hidden, head, targets, mask = chunked_case()
    chosen = mask if masked else None
    plain = with_gradients(lambda x, w: next_token_loss(x @ w.mT, targets, chosen), hidden, head)
    found = with_gradients(
        lambda x, w: chunked_next_token_loss(x, w, targets, chosen, chunk=chunk), hidden, head
    )
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_chunked_loss_of_capped_logits(chunk: int) -> None:
    """The cap of 3 bends logits that are spread by 4."""
    hidden, head, targets, mask = chunked_case()

    def capped(x: Tensor, w: Tensor) -> Tensor:
        return next_token_loss(3 * torch.tanh(x @ w.mT / 3), targets, mask)

    plain = with_gradients(capped, hidden, head)
    found = with_gradients(
        lambda x, w: chunked_next_token_loss(x, w, targets, mask, softcap=3.0, chunk=chunk), hidden, head
    )
    without = with_gradients(
        lambda x, w: chunked_next_token_loss(x, w, targets, mask, chunk=chunk), hidden, head
    )
    for ours, theirs, other in zip(found, plain, without, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert float((ours - other).abs().max()) > 0.1


def test_a_frozen_head_has_no_gradient_and_changes_none() -> None:
    hidden, head, targets, mask = chunked_case()
    found, flops = [], []
    for learns in (True, False):
        rows, matrix = hidden.clone().requires_grad_(), head.clone().requires_grad_(learns)
        with FlopCounterMode(display=False) as counter:
            loss = chunked_next_token_loss(rows, matrix, targets, mask, chunk=7)
            loss.backward()
        flops.append(counter.get_total_flops())
        found.append((loss.detach(), rows.grad))
        assert (matrix.grad is not None) == learns
    assert flops[1] * 3 == flops[0] * 2 > 0  # of three products, the one for its gradient is spared
    assert found[0][0] == found[1][0]
    assert found[0][1] is not None and found[1][1] is not None and torch.equal(found[0][1], found[1][1])


def test_the_chunked_loss_in_bf16_is_as_near_as_bf16_allows() -> None:
    hidden, head, targets, mask = chunked_case(200)
    exact = with_gradients(
        lambda x, w: next_token_loss(x @ w.mT, targets, mask), hidden, head.bfloat16().float()
    )
    found = with_gradients(
        lambda x, w: chunked_next_token_loss(x, w, targets, mask, chunk=64), hidden, head.bfloat16()
    )
    assert found[2].dtype == torch.bfloat16
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 1e-2  # 8 bits: 0.4 % for each rounding


def test_a_masked_position_counts_nothing_in_the_chunked_loss_even_when_impossible() -> None:
    hidden, head, targets, mask = chunked_case()
    spoilt = hidden.clone()
    spoilt[~mask] = 1e30  # logits that overflow: infinite losses where nothing counts
    plain = with_gradients(lambda x, w: chunked_next_token_loss(x, w, targets, mask, chunk=9), hidden, head)
    found = with_gradients(lambda x, w: chunked_next_token_loss(x, w, targets, mask, chunk=9), spoilt, head)
    assert torch.equal(found[0], plain[0]) and bool(found[1].isfinite().all())
    assert float(found[1][~mask].abs().max()) == 0.0


WRONG_SLOPES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "softmax without one-hot": lambda x, w, t, m: (x @ w.mT).logsumexp(-1)[m].sum(),
    "mask ignored": lambda x, w, t, m: next_token_loss(x @ w.mT, t),
    "one-hot of the neighbour": lambda x, w, t, m: next_token_loss(x @ w.mT, t.roll(1, 1), m),
}


@pytest.mark.parametrize("wrong", WRONG_SLOPES)
def test_a_wrong_gradient_would_be_seen(wrong: str) -> None:
    hidden, head, targets, mask = chunked_case()
    mutant = with_gradients(lambda x, w: WRONG_SLOPES[wrong](x, w, targets, mask), hidden, head)
    found = with_gradients(lambda x, w: chunked_next_token_loss(x, w, targets, mask, chunk=9), hidden, head)
    assert float((mutant[1] - found[1]).abs().max()) > 0.1 and float((mutant[2] - found[2]).abs().max()) > 0.1


# ---- log-probabilities that a loss weighs one by one: equal to log_softmax and gather, with their gradients


def weighed(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradients of their sum in which each has a weight of its own."""
    hidden, head, targets, _ = chunked_case(150)
    rows, matrix = hidden.flatten(0, 1).requires_grad_(), head.clone().requires_grad_()
    found = of(rows, matrix, targets.flatten())
    (found * torch.randn(300, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert rows.grad is not None and matrix.grad is not None
    return found.detach(), rows.grad, matrix.grad


def written_out(
    rows: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float = 0.0
) -> Tensor:
    logits = rows @ head.mT
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [2**23, 50])  # in one piece, and in the fewest rows at a time: 128, 128, 44
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_projected_log_probs(
    temperature: float, softcap: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "CHUNK_LOGITS", chunk)
    how = {"temperature": temperature, "softcap": softcap}
    found = weighed(lambda x, w, t: projected_log_probs(x, w, t, **how))
    for ours, theirs in zip(found, weighed(lambda x, w, t: written_out(x, w, t, **how)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    for mutant in ({**how, "temperature": 1.2}, {**how, "softcap": 5.0}):
        for ours, other in zip(
            found, weighed(lambda x, w, t, m=mutant: written_out(x, w, t, **m)), strict=True
        ):  # type: ignore[misc]
            assert float((ours - other).abs().max()) > 0.1


def test_projected_log_probs_under_autocast_have_a_rounded_gradient_alone() -> None:
    exact = weighed(written_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighed(projected_log_probs)
        rounded = weighed(written_out)
    torch.testing.assert_close(found[0], exact[0], atol=1e-5, rtol=0)
    assert float((rounded[0] - exact[0]).abs().max()) > 1e-2
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert ours.dtype == torch.float32
        assert 1e-4 < float((ours - theirs).norm() / theirs.norm()) < 5e-3  # 8 bits: 0.4 % for each rounding


def test_projected_log_probs_give_a_frozen_head_no_gradient() -> None:
    hidden, head, targets, _ = chunked_case()
    rows = hidden.flatten(0, 1).requires_grad_()
    projected_log_probs(rows, head, targets.flatten()).sum().backward()
    assert rows.grad is not None and head.grad is None
