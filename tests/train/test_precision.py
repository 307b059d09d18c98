"""bf16 working copies: the gradients of autocast, added up in float32, and never a stale copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chatwright import checkpoint, compiler, optim
from chatwright.model.gpt import GPT
from chatwright.optim import OptimConfig
from chatwright.stages import pretrain
from chatwright.stages.pretrain import TokenBatch
from chatwright.train.fit_config import FitConfig
from chatwright.train.precision import WorkingCopy


def batch(seed: int = 0, rows: int = 4) -> TokenBatch:
    return TokenBatch(torch.randint(96, (rows, 33), generator=torch.Generator().manual_seed(seed)))


def loss_of(model: GPT, samples: TokenBatch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return pretrain.step(model, samples).loss / samples.weight


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_autocast(lively_gpt: Callable[..., Any], tied: bool) -> None:
    model = lively_gpt(1, tied=tied)
    loss = loss_of(model, batch())
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    copies = WorkingCopy(model)
    copies.refresh()
    found_loss = loss_of(copies.twin, batch())
    found_loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert float(found_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        # a bf16 rounding of each gradient, and of each product on the way to it
        assert relative(found[name], gradient) < 1e-2, name
    assert relative(found["embed.weight"], 2 * wanted["embed.weight"]) > 0.1


def test_micro_batches_add_up_in_float32(lively_gpt: Callable[..., Any]) -> None:
    """A small gradient on top of a large one: bf16 with its 8 bits would lose it."""
    model = lively_gpt(1)
    copies = WorkingCopy(model)
    low, master = copies.copies[0], copies.masters[0]
    for value in (1.0, 2.0**-12):
        (low * torch.full(low.shape, value, dtype=torch.bfloat16)).sum().backward()
    assert low.grad is None and master.grad is not None
    assert torch.equal(master.grad, torch.full(master.shape, 1.0 + 2.0**-12))
    assert float(torch.tensor(1.0, dtype=torch.bfloat16) + 2.0**-12) == 1.0  # what a sum in bf16 would give


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_copies_follow_every_change_of_the_masters(name: Any, lively_gpt: Callable[..., Any]) -> None:
    model = lively_gpt(1)
    copies = WorkingCopy(model)

    def fresh() -> bool:
        copies.refresh()
        pairs = zip(copies.copies, copies.masters, strict=True)
        return all(torch.equal(low, master.detach().bfloat16()) for low, master in pairs)

    optimisers = optim.build(model, OptimConfig(name=name, learning_rate=0.05, weight_decay=0.1))
    for _ in range(2):  # the second step takes other paths: the state exists
        before = [low.detach().clone() for low in copies.copies]
        loss_of(copies.twin, batch()).backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        assert fresh()
        assert all(not torch.equal(old, low) for old, low in zip(before, copies.copies, strict=True))
    other = lively_gpt(2)
    checkpoint.load_model_tensors(model, checkpoint.model_tensors(other), where="test")  # what a resume does
    assert fresh() and torch.equal(copies.twin.head.weight, other.head.weight.detach().bfloat16())
    model.eval()
    copies.refresh()
    assert not copies.twin.training and not copies.twin.blocks[0].training


def test_norms_and_tables_are_the_models_own(lively_gpt: Callable[..., Any]) -> None:
    model = lively_gpt(1)
    twin = WorkingCopy(model).twin
    own, copied = dict(twin.named_parameters(remove_duplicate=False)), {id(p) for p in model.parameters()}
    shared = {name for name, parameter in own.items() if id(parameter) in copied}
    assert "embed.weight" in shared and "head.weight" not in shared
    assert {name for name, parameter in own.items() if parameter.dtype == torch.float32} == shared
    assert all(
        not isinstance(module, nn.Linear)
        for name, module in twin.named_modules()
        if f"{name}.weight" in shared
    )


@pytest.mark.skipif(
    compiler.compiler_missing() is not None,
    reason=f"compiled training not covered: {compiler.compiler_missing()}",
)
@pytest.mark.parametrize("name", [pytest.param("muon", marks=pytest.mark.slow), "adamw"])
def test_the_fast_step_trains_like_the_plain_one(name: Any, lively_gpt: Callable[..., Any]) -> None:
    """Compiled, bf16, blocked attention, angles made once, chunked loss: three steps like plain float32's."""
    found = {}
    for precision, compile_ in (("fp32", False), ("bf16", True)):
        model = lively_gpt(1, layers=1)
        step, _, line = pretrain.fast_step(
            model, FitConfig(steps=1, precision=precision, compile=compile_), alone=True
        )
        optimisers = optim.build(model, OptimConfig(name=name, learning_rate=0.01))
        losses = []
        for seed in range(3):
            outcome = step(batch(seed))
            (outcome.loss / batch(seed).weight).backward()
            losses.append(float(outcome.loss.detach()) / batch(seed).weight)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        found[precision] = losses
        assert line.endswith("compile: on" if compile_ else "compile: off (asked for)")
    assert found["bf16"] == pytest.approx(
        found["fp32"], rel=1e-2
    )  # bf16 products; the first loss alone is nearer
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], rel=2e-3)
    assert found["fp32"][2] != pytest.approx(found["fp32"][0], rel=1e-2)  # it did train


def test_recomputed_activations_give_the_same_gradients_and_keep_less(lively_gpt: Callable[..., Any]) -> None:
    found, kept = {}, {}
    for recompute in (False, True):
        model = lively_gpt(1, layers=4)
        model.activation_checkpointing = recompute
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = pretrain.step(model, batch()).loss
        loss.backward()
        found[recompute], kept[recompute] = gradients(model), sum(sizes)
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, atol=1e-5, rtol=1e-5)
    assert kept[True] < kept[False] / 3
