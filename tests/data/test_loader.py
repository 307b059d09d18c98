"""The order of samples: a function of seed and index, whatever the batch size or number of processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatwright.config import UserError
from chatwright.data.loader import SampleOrder, pad

Sizes = st.integers(1, 40)


@given(
    size=Sizes,
    seed=st.integers(0, 5),
    start=st.integers(0, 100),
    cuts=st.lists(st.integers(1, 9), max_size=8),
)
def test_the_order_does_not_depend_on_the_batch_size(
    size: int, seed: int, start: int, cuts: list[int]
) -> None:
    order = SampleOrder(size, seed)
    whole = order.take(start, sum(cuts))
    found, place = [], start
    for count in cuts:
        found += SampleOrder(size, seed).take(place, count)
        place += count
    assert found == whole


@given(size=Sizes, seed=st.integers(0, 5), epoch=st.integers(0, 4))
def test_each_pass_visits_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(SampleOrder(size, seed).take(epoch * size, size)) == list(range(size))


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    order = SampleOrder(50, 1)
    first, second, other = order.take(0, 50), order.take(50, 50), SampleOrder(50, 2).take(0, 50)
    assert first != list(range(50)) and first != second and first != other


def test_the_order_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    SampleOrder(1_000, 99).take(0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_samples_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match="no training samples"):
        SampleOrder(0, 1)


def test_pad() -> None:
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad([[1], [2]], 0, multiple=3).tolist() == [[1, 0, 0], [2, 0, 0]]
    assert pad([[1, 2, 3], [4]], 0, multiple=3).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad([[1, 2, 3, 4]], 0, multiple=3).shape == (1, 6)
