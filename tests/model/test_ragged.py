"""Rows without their padding: the same hidden states and gradients as rows that are computed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chatwright.config import UserError
from chatwright.model import ragged
from chatwright.model.attention import CausalAttention, blocked_attention, fused_attention, plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.ragged import Ragged

IDS = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = [5, 9, 1, 7]
FEW = 8
WEIGHTS = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(2))
"""What a loss counts each number of each place."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """22 real tokens are then filled up to 24, of 36 places."""
    monkeypatch.setattr(ragged, "SMALLEST_BUCKET", FEW)


def shaped(preset: str, **values: Any) -> GPT:
    """A small model of a family; random numbers everywhere, for fresh models have zero output matrices."""
    small = {
        "layers": 2,
        "width": 64,
        "heads": 4,
        "mlp_width": 96,
        "vocab_size": 64,
        "context": 32,
        "dropout": 0.0,
    }
    model = GPT(GPTConfig.preset(preset, **{**small, **values})).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
    return model


@contextmanager
def counted(model: GPT) -> Iterator[list[int]]:
    """How many tokens the first block's MLP was given, call by call."""
    calls: list[int] = []
    handle = model.blocks[0].mlp.register_forward_hook(
        lambda _, given, __: calls.append(given[0].shape[:-1].numel())
    )
    yield calls
    handle.remove()


def one_by_one(model: GPT) -> list[Tensor]:
    return [model.hidden(IDS[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS)]


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: one for name, one in zip(names, found, strict=True) if one is not None}


@pytest.mark.parametrize("kernel", [fused_attention, plain_attention])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("preset", ["gpt1", "gpt2", "modern-tiny"])
def test_hidden_states_and_gradients_are_those_of_each_row_alone(
    preset: str, recompute: bool, kernel: CausalAttention
) -> None:
    model = shaped(preset)
    model.use_attention(kernel)
    model.activation_checkpointing = recompute
    alone = one_by_one(model)
    expected = gradients(model, sum((h * WEIGHTS[row, : len(h)]).sum() for row, h in enumerate(alone)))  # type: ignore[arg-type]
    with counted(model) as calls:
        found = model.hidden(IDS, lengths=torch.tensor(LENGTHS))
        together = gradients(model, (found * WEIGHTS).sum())
    assert sum(LENGTHS) == 22 and set(calls) == {
        24
    }  # of the padding two places were computed, and nobody saw them
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :length], alone[row], atol=1e-5, rtol=0)
        assert not found[row, length:].any()
    assert together.keys() == expected.keys() and len(together) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(
            together[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), rtol=0
        )


LEFT = torch.arange(9) >= 9 - torch.tensor(LENGTHS)[:, None]
PACKED = {
    "documents": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 3]] * 4),
    "positions": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]] * 4),
}
ROWS: dict[str, dict[str, Tensor]] = {
    "whole": {},
    "packed": PACKED,
    "padded on the left": {"mask": LEFT},
    "without padding": {"lengths": torch.tensor(LENGTHS)},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("preset", ["gpt1", "gpt2", "modern-tiny"])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("kernel", [fused_attention, plain_attention, blocked_attention])
@pytest.mark.parametrize("least", [8, 64])
def test_hidden_states_and_gradients_at_some_places_are_those_of_all(
    least: int,
    kernel: CausalAttention,
    kind: str,
    preset: str,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ragged, "SMALLEST_BUCKET", least)  # 6 places and fillers beside them
    model = shaped(preset)
    model.activation_checkpointing = recompute
    places = torch.tensor(
        [2, 4, 9 + 8, 18 + 8, 27 + 6] if kind == "padded on the left" else [0, 4, 9 + 3, 9 + 8, 18, 27 + 6]
    )
    whole = model.hidden(IDS, **ROWS[kind]).flatten(0, 1)  # type: ignore[arg-type]
    weights = WEIGHTS.flatten(0, 1)[places]
    expected = gradients(model, (whole[places] * weights).sum())
    model.use_attention(kernel)
    computed: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, given, __: computed.append(given[0].shape[:-1].numel()))
    found = model.hidden_at(IDS, places, **ROWS[kind])  # type: ignore[arg-type]
    assert computed == [24 if kind == "without padding" and least == 8 else 36, least]
    torch.testing.assert_close(found, whole[places], atol=1e-5, rtol=0)
    some = gradients(model, (found * weights).sum())
    assert some.keys() == expected.keys() and len(some) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(
            some[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), rtol=0
        )


@torch.no_grad()
def test_places_of_ever_new_numbers_are_computed_in_few_sizes() -> None:
    model, sizes = shaped("modern-tiny"), set()
    model.blocks[1].mlp.register_forward_hook(lambda _, given, __: sizes.add(given[0].shape[1]))
    for count in range(37):
        assert len(model.hidden_at(IDS, torch.arange(count))) == count
    assert sizes == {0, 8, 16, 24, 32, 40}


def test_fillers_are_an_eighth_at_most_and_sizes_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    numbers = {count: len(ragged.pad_to_bucket(torch.arange(count), 0)) for count in range(512, 1025)}
    assert set(numbers.values()) == set(range(512, 1025, 64))
    assert all(count <= size < 1.125 * count for count, size in numbers.items())
    assert [len(ragged.pad_to_bucket(torch.arange(count), 0)) for count in (1, 16, 17, 300, 5_000)] == [
        16,
        16,
        32,
        320,
        5_120,
    ]


def test_some_places_refuse_what_all_of_them_refuse() -> None:
    with pytest.raises(UserError, match="33 tokens do not fit"):
        shaped("gpt2").hidden_at(torch.zeros(2, 33, dtype=torch.long), torch.tensor([3]))
    for name in ("mask", "positions", "documents"):
        with pytest.raises(ValueError, match="lengths goes with none of"):
            shaped("gpt2").hidden_at(
                IDS, torch.tensor([3]), lengths=torch.tensor(LENGTHS), **{name: torch.ones_like(IDS)}
            )  # type: ignore[arg-type]


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = shaped("modern-tiny")
    lengths = torch.tensor(LENGTHS)
    other = torch.where(torch.arange(9) < lengths[:, None], IDS, 63 - IDS)
    assert torch.equal(model.hidden(IDS, lengths=lengths), model.hidden(other, lengths=lengths))


def test_attention_weights_are_dropped_in_training() -> None:
    model = shaped("gpt2", dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # only the attention's is left
    lengths = torch.tensor(LENGTHS)
    rest = model.hidden(IDS, lengths=lengths)
    model.train()
    torch.manual_seed(1)
    first, second = model.hidden(IDS, lengths=lengths), model.hidden(IDS, lengths=lengths)
    assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(first, rest, atol=1e-3)


def test_rows_longer_than_the_context_are_refused() -> None:
    model = shaped("gpt2")
    with pytest.raises(UserError, match="33 tokens do not fit"):
        model.hidden(torch.zeros(2, 33, dtype=torch.long), lengths=torch.tensor([33, 2]))


@pytest.mark.parametrize("other", ["mask", "positions", "documents"])
def test_lengths_and_what_says_otherwise_are_refused(other: str) -> None:
    with pytest.raises(ValueError, match="lengths goes with none of"):
        shaped("gpt2").hidden(IDS, lengths=torch.tensor(LENGTHS), **{other: torch.ones_like(IDS)})  # type: ignore[arg-type]


def test_places() -> None:
    found = Ragged.from_lengths(torch.tensor([2, 0, 3]), 4)
    assert found.indices.tolist() == [0, 1, 8, 9, 10, 12, 12, 12]
    assert found.positions[0, :5].tolist() == [0, 1, 0, 1, 2]
    ids = torch.arange(12).view(3, 4)
    assert found.unpad(ids)[0, :5].tolist() == [0, 1, 8, 9, 10]
    back = found.pad(found.unpad(ids)[..., None].float() + 1)[..., 0]
    assert back.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [9, 10, 11, 0]]


def test_it_never_computes_more_than_padded_rows_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "SMALLEST_BUCKET", 128)
    assert len(Ragged.from_lengths(torch.tensor([2, 0, 3]), 4).indices) == 12
    assert len(Ragged.from_lengths(torch.tensor([40, 70]), 72).indices) == 128
