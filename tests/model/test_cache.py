"""The key-value cache: rows come, go, move and are cut, and every one keeps its own memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chatwright.config import UserError
from chatwright.model.cache import KVCache
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT

CONFIG = GPTConfig.preset("modern-nano", vocab_size=31, context=32)
TOLERANCE = 1e-5  # float32, logits of order one


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


IDS = torch.randint(0, 31, (3, 16), generator=torch.Generator().manual_seed(1))
LENGTHS = [7, 3, 5]


def filled(model: GPT, capacity: int = 16) -> KVCache:
    """Three rows with 7, 3 and 5 tokens."""
    cache = KVCache(CONFIG, 3, capacity)
    model.hidden(IDS[:, :7], mask=torch.arange(7) < torch.tensor(LENGTHS)[:, None], cache=cache)
    return cache


def check(model: GPT, cache: KVCache, histories: list[Tensor]) -> None:
    """The next token of every row gets the logits that its whole history gives without a cache."""
    assert cache.batch == len(histories)
    assert cache.lengths.tolist() == [len(history) for history in histories]
    assert cache.longest == max(len(history) for history in histories)
    new = torch.tensor([[number + 2] for number in range(len(histories))])
    logits = model(new, cache=cache)
    for row, history in enumerate(histories):
        alone = model(torch.cat((history, new[row]))[None])[:, -1]
        assert (logits[row] - alone).abs().max() <= TOLERANCE


def history(row: int, length: int | None = None) -> Tensor:
    return IDS[row, : LENGTHS[row] if length is None else length]


@torch.no_grad()
def test_filled(model: GPT) -> None:
    cache = filled(model)
    assert (cache.batch, cache.capacity) == (3, 16)
    check(model, cache, [history(0), history(1), history(2)])


@pytest.mark.parametrize("rows", [[0], [1], [2, 1], [1, 1, 0, 2, 1], [2, 0, 1]])
@torch.no_grad()
def test_select(model: GPT, rows: list[int]) -> None:
    """Finished rows leave, beams are reordered, a prompt is shared by several rows."""
    cache = filled(model)
    cache.select(torch.tensor(rows))
    check(model, cache, [history(row) for row in rows])


@torch.no_grad()
def test_selected_copies_go_their_own_ways(model: GPT) -> None:
    cache = filled(model)
    cache.select(torch.tensor([1, 1]))
    model(torch.tensor([[4], [5]]), cache=cache)
    check(model, cache, [torch.cat((history(1), torch.tensor([last]))) for last in (4, 5)])


def test_select_none(model: GPT) -> None:
    cache = filled(model)
    cache.select(torch.tensor([], dtype=torch.long))
    assert (cache.batch, cache.longest) == (0, 0)


@pytest.mark.parametrize("capacities", [(16, 16), (16, 9), (9, 16)])
@torch.no_grad()
def test_append(model: GPT, capacities: tuple[int, int]) -> None:
    """A row that has just arrived joins the ones that are running."""
    cache, other = filled(model, capacities[0]), KVCache(CONFIG, 1, capacities[1])
    model.hidden(IDS[2:3, :9], cache=other)
    cache.append(other)
    assert cache.capacity == 16
    check(model, cache, [history(0), history(1), history(2), history(2, 9)])


@torch.no_grad()
def test_append_to_empty(model: GPT) -> None:
    cache = KVCache(CONFIG, 0, 4)
    cache.append(filled(model))
    check(model, cache, [history(0), history(1), history(2)])


@torch.no_grad()
def test_grow(model: GPT) -> None:
    cache = filled(model, 7)
    cache.grow(5)  # there is more already
    assert cache.capacity == 7
    cache.grow(12)
    assert cache.capacity == 12
    check(model, cache, [history(0), history(1), history(2)])


@torch.no_grad()
def test_crop(model: GPT) -> None:
    """Forgetting the last tokens of a row, and never gaining any."""
    cache = filled(model)
    cache.crop(torch.tensor([2, 99, 0]))
    assert cache.lengths.tolist() == [2, 3, 0]
    check(model, cache, [history(0, 2), history(1), history(2, 0)])


@torch.no_grad()
def test_full(model: GPT) -> None:
    cache = filled(model, 8)
    model(torch.ones(3, 1, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match="the key-value cache is full: 9 tokens, room for 8"):
        model(torch.ones(3, 1, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_a_full_cache_still_answers_after_cropping(model: GPT) -> None:
    cache = filled(model, 7)
    with pytest.raises(UserError):
        model(torch.ones(3, 1, dtype=torch.long), cache=cache)
    cache.crop(torch.tensor([6, 6, 6]))
    check(model, cache, [history(0, 6), history(1), history(2)])


@torch.no_grad()
def test_padding_is_forgotten(model: GPT) -> None:
    """What stood in the padding of the first call is written over, never attended to."""
    caches = []
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    for filler in (0, 30):
        cache = KVCache(CONFIG, 3, 16)
        model.hidden(torch.where(mask, IDS[:, :7], filler), mask=mask, cache=cache)
        caches.append(cache)
    logits = [model(IDS[:, 7:9], cache=cache) for cache in caches]
    assert torch.equal(logits[0], logits[1])


@torch.no_grad()
def test_half_precision(model: GPT) -> None:
    """Half the memory; keys and values are rounded to 8 bits and the answers move by little."""
    cache = KVCache(CONFIG, 3, 16, dtype=torch.bfloat16)
    exact = KVCache(CONFIG, 3, 16)
    assert cache.keys.element_size() * 2 == exact.keys.element_size()
    logits = []
    for one in (cache, exact):
        model(IDS[:, :7], cache=one)
        logits.append(model(IDS[:, 7:8], cache=one))
    error = (logits[0] - logits[1]).square().mean().sqrt() / logits[1].std()
    assert 0 < error < 0.02
