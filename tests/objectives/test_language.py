"""Language-model losses against values worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from chatwright.objectives import language
from chatwright.objectives.language import (
    chunked_next_token_loss,
    next_token_loss,
    projected_log_probs,
)
from support.mutation import Mutant, mutants

# Logits that are log-probabilities, so that the softmax changes nothing.
LOGITS = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]).log()
TARGETS = torch.tensor([[0, 1, 0]])
MASK = torch.tensor([[True, True, False]])
# -ln 0.5 - ln 0.8 - ln 0.2 = -ln 0.08; without the last position -ln 0.4
WHOLE, MASKED = -math.log(0.08), -math.log(0.4)


def check_next_token_loss(module: ModuleType) -> None:
    assert float(module.next_token_loss(LOGITS, TARGETS)) == pytest.approx(WHOLE, abs=1e-6)
    assert float(module.next_token_loss(LOGITS, TARGETS, MASK)) == pytest.approx(MASKED, abs=1e-6)
    # logits need not be normalised
    assert float(module.next_token_loss(LOGITS + 7.0, TARGETS, MASK)) == pytest.approx(MASKED, abs=1e-5)


def test_next_token_loss_is_the_sum_over_the_positions_where_the_mask_is_true() -> None:
    check_next_token_loss(language)


_MASKED = "torch.where(mask, losses, 0.0).sum()"
WRONG_LOSSES = mutants(
    language.next_token_loss,
    {
        "mean over the mask": (_MASKED, "losses[mask].mean()"),
        "mask turned round": ("torch.where(mask,", "torch.where(~mask,"),
        "mask ignored": (_MASKED, "losses.sum()"),
        "mask off by one": ("torch.where(mask,", "torch.where(mask.roll(1, 1),"),
        "targets one place late": ("targets.flatten()", "targets.roll(1, 1).flatten()"),
        "bits instead of nats": (_MASKED, _MASKED + " / math.log(2)"),
        "sign lost": (_MASKED, "-" + _MASKED),
        "mean without a mask": ("losses.sum() if", "losses.mean() if"),
        "logits not normalised": ("F.cross_entropy(", "F.nll_loss("),
    },
)


@pytest.mark.parametrize("mutant", WRONG_LOSSES, ids=str)
def test_wrong_losses_show(mutant: Mutant) -> None:
    mutant.must_fail(check_next_token_loss)


def check_impossible_target(module: ModuleType) -> None:
    """A masked position counts nothing and gets no gradient even when its loss is infinite."""
    logits = LOGITS.clone()
    logits[0, 2, 0] = -math.inf  # the target of the masked position is impossible
    logits.requires_grad_()
    loss = module.next_token_loss(logits, TARGETS, MASK)
    assert float(loss.detach()) == pytest.approx(MASKED, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    # d(-log softmax) / d logits = p - onehot: (0.5 - 1, 0.25, 0.25) and (0.1, 0.8 - 1, 0.1)
    torch.testing.assert_close(
        logits.grad[0],
        torch.tensor([[-0.5, 0.25, 0.25], [0.1, -0.2, 0.1], [0.0, 0.0, 0.0]]),
        atol=1e-6,
        rtol=0,
    )


def test_a_masked_position_counts_nothing_even_when_its_loss_is_infinite() -> None:
    check_impossible_target(language)
    (times,) = mutants(language.next_token_loss, {"times the mask": (_MASKED, "(losses * mask).sum()")})
    times.must_fail(check_impossible_target)


def test_log_probs_of_targets() -> None:
    expected = torch.tensor([math.log(0.5), math.log(0.8), math.log(0.2)])
    torch.testing.assert_close(
        projected_log_probs(LOGITS[0], torch.eye(3), TARGETS[0]), expected, atol=1e-6, rtol=0
    )


def check_bits_per_byte(module: ModuleType) -> None:
    # 8 ln 2 nats are 8 bits; over 4 bytes 2 bits each
    assert module.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


def test_bits_per_byte() -> None:
    check_bits_per_byte(language)


WRONG_BITS = mutants(
    language.bits_per_byte,
    {
        "nats per byte": ("nats / math.log(2) / text_bytes", "nats / text_bytes"),
        "logarithm turned round": ("nats / math.log(2)", "nats * math.log(2)"),
        "bits in all": (" / text_bytes", ""),
        "bytes per bit": ("nats / math.log(2) / text_bytes", "text_bytes / (nats / math.log(2))"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_BITS, ids=str)
def test_wrong_bits_show(mutant: Mutant) -> None:
    mutant.must_fail(check_bits_per_byte)


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


def check_chunked_loss(module: ModuleType, chunk: int = 7, masked: bool = True) -> None:
    hidden, head, targets, mask = chunked_case()
    chosen = mask if masked else None
    plain = with_gradients(lambda x, w: next_token_loss(x @ w.mT, targets, chosen), hidden, head)
    found = with_gradients(
        lambda x, w: module.chunked_next_token_loss(x, w, targets, chosen, chunk=chunk), hidden, head
    )
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# 46 rows in all: many chunks, an uneven last one, exactly one, one
@pytest.mark.parametrize("chunk", [1, 7, 46, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_the_chunked_loss_equals_the_plain_one(chunk: int, masked: bool) -> None:
    check_chunked_loss(language, chunk, masked)


def check_capped_loss(module: ModuleType, chunk: int = 7) -> None:
    """The cap of 3 bends logits that are spread by 4."""
    hidden, head, targets, mask = chunked_case()

    def capped(x: Tensor, w: Tensor) -> Tensor:
        return next_token_loss(3 * torch.tanh(x @ w.mT / 3), targets, mask)

    def chunked(x: Tensor, w: Tensor) -> Tensor:
        found: Tensor = module.chunked_next_token_loss(x, w, targets, mask, softcap=3.0, chunk=chunk)
        return found

    plain = with_gradients(capped, hidden, head)
    for ours, theirs in zip(with_gradients(chunked, hidden, head), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_chunked_loss_of_capped_logits(chunk: int) -> None:
    check_capped_loss(language, chunk)


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


_ChunkedLoss = language._ChunkedLoss
WRONG_CHUNKS = mutants(
    _ChunkedLoss,
    {
        "softmax without one-hot": ("alpha=-1", "alpha=0"),
        "one-hot added": ("alpha=-1", "alpha=1"),
        "one-hot of the neighbour": ("== target,", "== target.roll(1, 0),"),
        "mask ignored in the loss": (
            "torch.where(counts, normaliser",
            "torch.where(counts | True, normaliser",
        ),
        "mask ignored in the gradient": ("slope.mul_(counts)", "slope"),
        "mask of the neighbour": ("slope.mul_(counts)", "slope.mul_(counts.roll(1, 0))"),
        "rest after the last whole chunk lost from the loss": (
            "loss = loss + torch",
            "loss = loss + (len(part) == chunk) * torch",
        ),
        "head's gradient of the last chunk alone": ("torch.addmm(head_gradient, slope", "torch.mm(slope"),
        "rows not scaled": ("row_gradient * scale", "row_gradient"),
        "head not scaled": ("head_gradient * scale if", "head_gradient if"),
    },
)
WRONG_CAPS = [
    *mutants(language.chunked_next_token_loss, {"not capped": ("softcap, chunk, head", "0.0, chunk, head")}),
    *mutants(
        _ChunkedLoss,
        {
            "cap's own slope forgotten": ("slope.mul_(1 - capped.square_())", "pass"),
            "cap not multiplied back": ("logits = softcap * capped", "logits = 1.0 * capped"),
        },
    ),
]


@pytest.mark.parametrize("mutant", WRONG_CHUNKS, ids=str)
def test_wrong_chunked_losses_and_gradients_show(mutant: Mutant) -> None:
    mutant.must_fail(check_chunked_loss)


@pytest.mark.parametrize("mutant", WRONG_CAPS, ids=str)
def test_wrong_caps_show(mutant: Mutant) -> None:
    mutant.must_fail(check_capped_loss)


# ---- log-probabilities that a loss weighs one by one: equal to log_softmax and gather, with their gradients


def weighed(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradients of their sum in which each has a weight of its own."""
    hidden, head, targets, _ = chunked_case(150)
    rows, matrix = hidden.flatten(0, 1).requires_grad_(), head.clone().requires_grad_()
    found = of(rows, matrix, targets.flatten())
    (found * torch.randn(300, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert rows.grad is not None and matrix.grad is not None
    return found.detach(), rows.grad, matrix.grad


def one_by_one(
    rows: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float = 0.0
) -> Tensor:
    logits = rows @ head.mT
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def check_projected(module: ModuleType, temperature: float = 0.7, softcap: float = 3.0) -> None:
    how = {"temperature": temperature, "softcap": softcap}
    found = weighed(lambda x, w, t: module.projected_log_probs(x, w, t, **how))
    for ours, theirs in zip(found, weighed(lambda x, w, t: one_by_one(x, w, t, **how)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2**23, 50])  # in one piece, and in the fewest rows at a time: 128, 128, 44
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_projected_log_probs(
    temperature: float, softcap: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "CHUNK_LOGITS", chunk)
    check_projected(language, temperature, softcap)


WRONG_PROJECTIONS = mutants(
    language._Projected,
    {
        "temperature not used": ("logits if temperature == 1.0 else logits.div_(temperature)", "logits"),
        "temperature multiplied": ("logits.div_(temperature)", "logits.mul_(temperature)"),
        "temperature not in the gradient": (" / ctx.temperature", ""),
        "cap's own slope forgotten": ("slope.mul_(1 - capped.square_())", "pass"),
        "cap not multiplied back": ("logits = softcap * capped", "logits = 1.0 * capped"),
        "one-hot forgotten": ("slope.scatter_add_(1, target, torch.ones_like(slope[:, :1]))", "pass"),
        "slope turned round": (".exp_().neg_()", ".exp_()"),
        "gradient of the rows not weighed": ("for_rows = weights * ", "for_rows = "),
        "gradient of the head not weighed": ("(weights * rows)", "rows"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_PROJECTIONS, ids=str)
def test_wrong_projections_show(mutant: Mutant) -> None:
    mutant.must_fail(check_projected)


def test_projected_log_probs_under_autocast_have_a_rounded_gradient_alone() -> None:
    exact = weighed(one_by_one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighed(projected_log_probs)
        rounded = weighed(one_by_one)
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
