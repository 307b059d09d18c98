"""The machine: seeds, threads, precision, modes."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from chatwright import openmp, runtime
from chatwright.config import UserError


def test_seeds_are_the_same_everywhere() -> None:
    """Worked out once with hashlib alone: sha256("1337/ppo/3"), first 8 bytes little-endian, halved."""
    import hashlib

    expected = int.from_bytes(hashlib.sha256(b"1337/ppo/3").digest()[:8], "little") // 2
    assert runtime.seed_for(1337, "ppo", 3) == expected
    assert len({runtime.seed_for("a", n) for n in range(1_000)}) == 1_000
    assert runtime.seed_for("a", "b") != runtime.seed_for("b", "a")


def test_generators_are_streams_of_their_own() -> None:
    before = torch.get_rng_state()
    one, two = runtime.generator("x", 1), runtime.generator("x", 1)
    assert torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=two))
    assert not torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=runtime.generator("x", 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_stream_is_saved_and_restored() -> None:
    state = runtime.rng_state()
    first = torch.rand(4)
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_DEVICE", "cpu")
    assert runtime.device() == torch.device("cpu")
    monkeypatch.setenv("CHATWRIGHT_DEVICE", "warp drive")
    with pytest.raises(UserError, match="CHATWRIGHT_DEVICE=warp drive"):
        runtime.device()


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (runtime.rank(), runtime.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (runtime.rank(), runtime.world_size()) == (2, 4)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert runtime.set_threads(1) == torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert runtime.set_threads() == torch.get_num_threads() == 2
        for nonsense in ("", "0", "many"):
            monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            assert runtime.set_threads() == cores
    finally:
        torch.set_num_threads(before)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.compute_dtype("bf16") == torch.bfloat16
    assert runtime.compute_dtype("fp32") == torch.float32
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime, "has_bf16", lambda has=has: has)
        assert runtime.compute_dtype("auto") == dtype
    monkeypatch.undo()
    monkeypatch.setenv("CHATWRIGHT_BF16", "0")
    assert not runtime.has_bf16()
    with pytest.raises(UserError, match="precision 'fp8' is none of auto, bf16, fp32"):
        runtime.compute_dtype("fp8")


def test_autocast_changes_products_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_DEVICE", "cpu")
    a = torch.ones(2, 2)
    with runtime.autocast(torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with runtime.autocast(torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("held_back", [False, True])
def test_a_product_is_the_same_by_either_library(held_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_mkl_holds_back", lambda: held_back)
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 5, 24, generator=draw), torch.randn(7, 24, generator=draw)
    expected = x.double() @ weight.double().mT
    for given, matrix in (
        (x, weight),
        (x, nn.Parameter(weight)),
        (x.mT.contiguous().mT, weight.mT.contiguous().mT),
    ):
        found = runtime.product(given, matrix)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    half = runtime.product(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16 and 1e-4 < float((half - expected).abs().max()) < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert runtime.product(x, weight).dtype == torch.bfloat16
    assert runtime.product(x[:, :0], weight).shape == (2, 0, 7)


def test_evaluating_restores_each_mode_even_after_an_error() -> None:
    training, resting = nn.Dropout(0.9), nn.Dropout(0.9).eval()
    x = torch.ones(100, requires_grad=True)
    with runtime.evaluating(training, resting):
        assert torch.equal(training(x), x) and not (2 * x).requires_grad
    assert training.training and not resting.training
    with pytest.raises(ValueError), runtime.evaluating(training):
        raise ValueError
    assert training.training and torch.is_grad_enabled()


def test_what_the_machine_says_of_itself() -> None:
    told = runtime.describe()
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()


def test_one_thread_for_a_while_and_for_nobody_else() -> None:
    if openmp.library() is None:
        pytest.skip("OpenMP cannot be asked here: that torch's threads do not get in the way is NOT covered")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(ValueError), runtime.one_thread():
            assert torch.get_num_threads() == 1
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 2
            raise ValueError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
