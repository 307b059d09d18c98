"""Compiled blocks: the same numbers, whatever the lengths, and copies that compute with their own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chatwright import runtime
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.train.compiled import compile_blocks

MISSING = runtime.compiler_missing()


def outcome(model: ScalarModel, ids: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Scores, and the gradients of a loss."""
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    scores = model.score(ids, mask)
    loss = (scores * torch.arange(1.0, len(scores) + 1)).sum()
    return scores.detach(), list(torch.autograd.grad(loss, list(model.body.blocks.parameters())))


@pytest.mark.skipif(MISSING is not None, reason=f"compiled blocks are NOT covered: {MISSING}")
def test_compiled_blocks_give_the_same_numbers_at_any_length(lively_scalar: Callable[..., ScalarModel]) -> None:
    plain = lively_scalar(5)
    model = copy.deepcopy(plain)
    assert compile_blocks(model).startswith("compile: on")
    draw = torch.Generator().manual_seed(1)
    for rows, width in ((4, 9), (3, 14), (6, 21)):
        ids = torch.randint(64, (rows, width), generator=draw)
        lengths = torch.randint(2, width + 1, (rows,), generator=draw)
        (expected, slopes), (found, others) = outcome(plain, ids, lengths), outcome(model, ids, lengths)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for slope, other in zip(slopes, others, strict=True):
            torch.testing.assert_close(other, slope, atol=1e-5 * max(1.0, float(slope.abs().max())), rtol=0)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(
    lively_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiler has no part in this
    model = lively_gpt(3)
    compile_blocks(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.blocks:
            block.mlp.down.weight.zero_()
    ids = torch.arange(12)[None]
    plain = lively_gpt(3)
    assert torch.equal(model(ids), plain(ids))
    with torch.no_grad():
        for block in plain.blocks:
            block.mlp.down.weight.zero_()
    assert torch.equal(other(ids), plain(ids))


def test_without_a_compiler_blocks_run_as_they_are(lively_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compiler_missing", lambda: "no C++ compiler (g++) is installed")
    model = lively_gpt(3)
    assert "off (no C++ compiler (g++) is installed)" in compile_blocks(model)
    assert torch.equal(model(torch.arange(5)[None]), lively_gpt(3)(torch.arange(5)[None]))
