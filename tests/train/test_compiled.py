"""Compiled blocks: the same numbers, whatever the lengths, and copies that compute with their own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatwright import compiler
from chatwright.chat import EncodedChat
from chatwright.data.packing import batch_rows, pack
from chatwright.generate.engine import Engine
from chatwright.generate.request import Request
from chatwright.generate.sampling import Sampling
from chatwright.metrics import read_metrics
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.stages import ppo, sft
from chatwright.train.compiled import compile_blocks
from support.planted import MINI

MISSING = compiler.compiler_missing()


def outcome(model: ScalarModel, ids: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Scores, and the gradients of a loss."""
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    scores = model.score(ids, mask)
    loss = (scores * torch.arange(1.0, len(scores) + 1)).sum()
    return scores.detach(), list(torch.autograd.grad(loss, list(model.body.blocks.parameters())))


@pytest.mark.skipif(MISSING is not None, reason=f"compiled blocks are NOT covered: {MISSING}")
def test_compiled_blocks_give_the_same_numbers_at_any_length(
    lively_scalar: Callable[..., ScalarModel],
) -> None:
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


@pytest.mark.skipif(MISSING is not None, reason=f"compiled blocks are NOT covered: {MISSING}")
def test_packed_rows_are_learnt_from_alike(lively_gpt: Callable[..., GPT]) -> None:
    chats = [
        EncodedChat(list(range(start, start + size)), [n > 1 for n in range(size)])
        for start, size in ((1, 9), (20, 5), (40, 13), (60, 3))
    ]
    batch = batch_rows(pack(chats, 16), 16)
    losses, slopes = [], []
    for compiled in (False, True):
        model = lively_gpt(2)
        if compiled:
            assert sft.compiled_for(model, 16).startswith("compile: on")
        loss = sft.step(model, batch).loss
        losses.append(loss.detach())
        slopes.append(torch.autograd.grad(loss, list(model.parameters())))
    assert float(losses[0]) > 10
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for mine, theirs in zip(slopes[1], slopes[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


def test_with_a_cache_blocks_run_as_they_are(
    lively_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(function: Any, **_: Any) -> Any:
        return lambda *arguments: calls.append(1) or function(*arguments)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(compiler, "compiler_missing", lambda: None)
    model = lively_gpt(3)
    compile_blocks(model)
    Engine(model).generate([Request((1, 2, 3), Sampling(4), frozenset())])
    assert not calls
    model(torch.arange(5)[None])
    assert len(calls) == len(model.blocks)


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"compiled blocks are NOT covered: {MISSING}")
def test_rounds_of_ppo_are_the_same_compiled(planted_bench: Any, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        directory = tmp_path / str(compiled)
        planted_bench.run(ppo, replace(MINI, iterations=2, compile=compiled), directory)
        found.append(read_metrics(directory / "metrics.jsonl"))
    for plain, other in zip(*found, strict=True):
        assert other["score"] == pytest.approx(plain["score"], abs=1e-4) and other["kl"] == pytest.approx(
            plain["kl"], abs=1e-3
        )
        assert other["sampler_gap"] < 1e-4


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(
    lively_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiler has no part in this
    monkeypatch.setattr(compiler, "compiler_missing", lambda: None)
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


def test_without_a_compiler_blocks_run_as_they_are(
    lively_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "compiler_missing", lambda: "no C++ compiler (g++) is installed")
    model = lively_gpt(3)
    assert "off (no C++ compiler (g++) is installed)" in compile_blocks(model)
    assert torch.equal(model(torch.arange(5)[None]), lively_gpt(3)(torch.arange(5)[None]))
