"""The CPU kernels against plain torch, for what families of open models have beside Llama's shape: windows,
partial rotation, norms behind, parallel branches, scales, soft caps."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from chatwright.generate.engine import Engine, Request
from chatwright.generate.kernels import KernelRunner, dots, paths, simd
from chatwright.generate.kernels.reference import reference, reference_logits
from chatwright.generate.runner import Feed
from chatwright.generate.sampling import Sampling
from chatwright.generate.shapes import unsupported
from chatwright.model.gpt import GPT
from support import families
from support.family_shapes import FAMILIES, drawn

DTYPES = ("fp32", "bf16", "int8", "int4")
BOUND = {"fp32": 1e-4, "bf16": 2e-2, "int8": 0.4, "int4": 0.4}
STRICT = {"fp32": 1e-4, "bf16": 5e-5, "int8": 4e-3, "int4": 5e-5}
"""As in test_kernels.py, which says why: the first for any logit, the second for most positions of a model of
one layer."""
ROUNDED = 0.1
"""BOUND for bf16 where activations become bfloat16 as well."""


def runner(model: GPT, dtype: str, *, threads: int = 2) -> KernelRunner:
    made = KernelRunner(model, dtype, threads=threads)
    made.allocate(16, 16)
    return made


def bound_of(dtype: str) -> float:
    rounds = dtype == "bf16" and dots.ROUNDS_BF16[paths.NAMES.index(paths.choose())]
    return ROUNDED if rounds else BOUND[dtype]


def some_ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 331, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_plain_torch(name: str, dtype: str, layers: int) -> None:
    """A prompt in two pieces, then token by token, over pages in any order; every position's logits."""
    model = drawn(FAMILIES[name].with_layers(layers))
    ids = some_ids(60)
    run = runner(model, dtype)
    pages = [5, 0, 9, 2]
    parts = [(0, 21), (21, 45), *((at, at + 1) for at in range(45, 60))]
    found = torch.cat([run.forward([Feed(ids[a:b].tolist(), a, pages, b - a)]) for a, b in parts])
    distance = (found - reference_logits(reference(model, run.packed, run.path), ids, dtype)).abs()
    scale = max(1.0, model.config.logit_scale)
    assert distance.max() < bound_of(dtype) * scale
    if layers == 1:
        assert distance.amax(1).median() < STRICT[dtype] * scale
    if dtype == "fp32":
        with torch.no_grad():
            assert (found - model(ids[None])[0]).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("name", families.CASES)
@torch.no_grad()
def test_logits_equal_transformers(name: str) -> None:
    """Models that transformers made, read by us, in float32: a prompt, then token by token."""
    ids, run = some_ids(40), runner(families.ours(name), "fp32")
    parts = [(0, 33), *((at, at + 1) for at in range(33, 40))]
    found = torch.cat([run.forward([Feed(ids[a:b].tolist(), a, [5, 0, 9], b - a)]) for a, b in parts])
    assert (found - families.theirs(name)(ids[None]).logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_company_and_threads_change_nothing(name: str, dtype: str) -> None:
    """Sequences of many lengths in one call, each wanting other logits, against each alone; 1, 2 and 3
    threads."""
    model = drawn(FAMILIES[name])
    lengths, wanted = (1, 5, 17, 33, 2, 16), (1, 0, 3, 1, 2, 16)
    runs = [runner(model, dtype, threads=threads) for threads in (1, 2, 3)]
    first = iter(range(16))
    feeds = []
    for number, (length, want) in enumerate(zip(lengths, wanted, strict=True)):
        own = [next(first) for _ in range(-(-length // 16))]
        feeds.append(Feed(some_ids(length, number).tolist(), 0, own, want))
    together = [run.forward(feeds) for run in runs]
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], together[2])
    alone = torch.cat([runs[0].forward([feed]) for feed in feeds if feed.wanted])
    if dtype == "int8":
        assert torch.equal(together[0], alone)
    else:
        assert (together[0] - alone).abs().max() < BOUND[dtype] * max(1.0, model.config.logit_scale)


@pytest.mark.parametrize("window", [1, 5, 16, 19])
def test_a_window_ends_where_it_says(window: int) -> None:
    """The last token inside changes what is computed, the one before it nothing at all."""
    model = drawn(replace(FAMILIES["mistral"].with_layers(1), windows=(window,)))
    run, ids = runner(model, "fp32"), some_ids(40).tolist()

    def last(changed: int | None) -> Tensor:
        given = [(token + 1) % 331 if at == changed else token for at, token in enumerate(ids)]
        run.forward([Feed(given[:30], 0, [0, 1, 2], 0)])
        return run.forward([Feed(given[30:], 30, [0, 1, 2], 1)])[0]

    usual = last(None)
    assert torch.equal(last(39 - window), usual)
    assert (last(40 - window) - usual).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "olmo2"])
def test_prefix_cache_and_guesses(name: str) -> None:
    """An engine with the kernels says what one with torch says: prompts that begin alike share pages, and
    guessed tokens are checked many at a time."""
    model = drawn(FAMILIES[name])
    rng = random.Random(3)
    words = [[rng.randrange(331) for _ in range(4)] for _ in range(3)]
    common = [token for _ in range(12) for token in rng.choice(words)]
    requests = [Request((*common, *rng.choice(words)), Sampling(20, temperature=0.0)) for _ in range(3)]
    wanted = [one.ids for one in Engine(model).generate(requests)]
    engine = Engine(model, runner=KernelRunner(model, "fp32", threads=2), lookup=8)
    for request, ids in zip(requests, wanted, strict=True):
        assert engine.generate([request])[0].ids == ids
    assert engine.stats.cached_tokens >= 2 * 32 and engine.stats.proposed > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernels_are_chosen(name: str) -> None:
    assert unsupported(FAMILIES[name]) is None


@njit
def _curves(x, gelu, capped):  # type: ignore[no-untyped-def]
    for i in range(0, len(x), 16):
        simd.store(gelu, i, simd.gelu(simd.load(x, i)))
        simd.store(capped, i, simd.capped(simd.load(x, i), np.float32(30.0)))


def test_exact_gelu_and_soft_cap() -> None:
    x = torch.linspace(-200.0, 200.0, 32_000)
    gelu, capped = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    _curves(x.numpy(), gelu, capped)
    assert (torch.from_numpy(gelu) - F.gelu(x.double())).abs().div(x.abs() + 1.0).max() < 5e-7
    assert (torch.from_numpy(capped) - 30.0 * torch.tanh(x.double() / 30.0)).abs().max() < 3e-5
