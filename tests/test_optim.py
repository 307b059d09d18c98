"""Schedules at their corners, Muon against its definition and torch's own, AdamW against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from chatwright import optim
from chatwright.config import UsageError
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.optim import POLYNOMIALS, Muon, OptimConfig, Shape, build, learning_rate, orthogonalise

# 10 steps, 2 of warm-up: progress is (step - 2) / 8, so 0 in step 2, 1/2 in step 6, 3/4 in step 8, 7/8 in
# step 9.
CORNERS: list[tuple[Shape, float, list[float]]] = [
    # schedule, final, shares in steps 0, 1, 2, 6, 8, 9, 10
    ("constant", 0.0, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear", 0.0, [0.5, 1.0, 1.0, 0.5, 0.25, 0.125, 0.0]),
    ("linear", 0.2, [0.5, 1.0, 1.0, 0.6, 0.4, 0.3, 0.2]),  # 0.2 + 0.8 x the line above
    ("cosine", 0.0, [0.5, 1.0, 1.0, 0.5, (1 - math.sqrt(0.5)) / 2, (1 + math.cos(7 * math.pi / 8)) / 2, 0.0]),
    (
        "trapezoid",
        0.0,
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.25, 0.0],
    ),  # falls over the last half: (1 - progress) / 0.5
    ("trapezoid", 0.1, [0.5, 1.0, 1.0, 1.0, 0.55, 0.325, 0.1]),
]


@pytest.mark.parametrize(("schedule", "final", "shares"), CORNERS, ids=str)
def test_learning_rate(schedule: Shape, final: float, shares: list[float]) -> None:
    config = OptimConfig(schedule=schedule, warmup=0.2, decay=0.5, final=final)
    found = [learning_rate(step, 10, config) for step in (0, 1, 2, 6, 8, 9, 10)]
    assert found == pytest.approx(shares, abs=1e-9)


def test_the_first_step_is_not_lost_without_warmup() -> None:
    assert learning_rate(0, 10, OptimConfig(warmup=0.0)) == 1.0


def test_a_run_of_one_step_has_a_learning_rate() -> None:
    for schedule in ("constant", "linear", "cosine", "trapezoid"):
        assert learning_rate(0, 1, OptimConfig(schedule=schedule)) == 1.0  # type: ignore[arg-type]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match="zigzag"):
        learning_rate(5, 10, OptimConfig(schedule="zigzag"))  # type: ignore[arg-type]


def matrices(count: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 64), (128, 64)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_orthogonalised_singular_values_are_near_one(shape: tuple[int, int], scale: float) -> None:
    gradients = matrices(3, *shape) * scale
    result = orthogonalise(gradients)
    assert result.shape == gradients.shape and result.dtype == gradients.dtype
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.8 and float(values.max()) < 1.3  # 0.91 to 1.09, and what bf16's 8 bits add
    before = torch.linalg.svdvals(gradients / gradients.norm(dim=(1, 2), keepdim=True))
    assert float(before.min()) < 0.3  # dividing by the norm alone would not do


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_orthogonalised_matrices_point_where_u_vt_points(shape: tuple[int, int]) -> None:
    gradients = matrices(3, *shape, seed=1)
    u, _, vt = torch.linalg.svd(gradients, full_matrices=False)
    polar = u @ vt
    result = orthogonalise(gradients)
    cosine = (result * polar).sum((1, 2)) / (result.norm(dim=(1, 2)) * polar.norm(dim=(1, 2)))
    assert float(cosine.min()) > 0.97
    # each direction keeps its sign: u_i^T X v_i is the new singular value, above 0
    along = torch.einsum("nri,nrc,nic->ni", u, result, vt)
    assert float(along.min()) > 0.8 and float(along.max()) < 1.3


def test_products_in_float32_are_closer_to_the_polynomials() -> None:
    """`matrix_precision: fp32`: what is left is the polynomials' own error, 9 %."""
    model = torch.nn.ModuleDict(
        {"blocks": torch.nn.Linear(64, 48, bias=False), "head": torch.nn.Linear(2, 2)}
    )
    chosen = {
        name: build(model, OptimConfig(name="muon", matrix_precision=name))[0].dtype
        for name in ("fp32", "bf16")
    }  # type: ignore[arg-type, attr-defined]
    assert chosen == {"fp32": torch.float32, "bf16": torch.bfloat16}
    values = torch.linalg.svdvals(orthogonalise(matrices(3, 64, 48), torch.float32))
    assert float(values.min()) > 0.9 and float(values.max()) < 1.1
    low = torch.linalg.svdvals(orthogonalise(matrices(3, 64, 48)))
    assert float((low - values).abs().max()) > 1e-3  # bf16 is something else


def test_a_zero_gradient_stays_zero() -> None:
    assert float(orthogonalise(torch.zeros(1, 8, 16)).abs().max()) == 0.0


def test_the_scalar_map_of_the_polynomials() -> None:
    """What orthogonalise does to a singular value: all that were above 0.005 of the norm end within 9 %
    of 1."""
    s = torch.logspace(math.log10(0.005), 0, 2000, dtype=torch.float64)
    for number, (a, b, c) in enumerate(POLYNOMIALS):
        s = a * s + b * s**3 + c * s**5
        if number < len(POLYNOMIALS) - 1:  # each is the best on the interval that the one before leaves:
            low, high = (
                1 - float(s.min()),
                float(s.max()) - 1,
            )  # ... its largest errors on both sides are equal
            assert low == pytest.approx(high, abs=3e-3)
    assert float(s.min()) > 0.91 and float(s.max()) < 1.09
    jordan = torch.logspace(math.log10(0.005), 0, 2000, dtype=torch.float64)
    for _ in range(5):
        jordan = 3.4445 * jordan - 4.7750 * jordan**3 + 2.0315 * jordan**5
    assert float((jordan - 1).abs().max()) > 0.3  # the original five steps, for comparison


def pair_of(shape: tuple[int, int]) -> tuple[nn.Parameter, nn.Parameter]:
    start = matrices(1, *shape, seed=7)[0]
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 33)])
def test_muon_does_what_torchs_does(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's polynomial, five times and without a margin: everything but the polynomials is
    compared."""
    monkeypatch.setattr(optim, "POLYNOMIALS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(optim, "MARGIN", 1.0)
    own, other = pair_of(shape)
    ours = Muon([own], lr=0.02, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon([other], lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)
    start = own.detach().clone()
    for seed in range(4):
        own.grad = matrices(1, *shape, seed=seed)[0]
        other.grad = own.grad.clone()
        ours.step()
        theirs.step()
    # Both work in bf16 (8 bits), in another order of products: an update of an element, about 0.004, may
    # differ by 1 %.
    assert float((own - other).detach().abs().max()) < 1e-3
    moved = float((own - start).detach().abs().mean())
    assert moved > 5e-3


def test_muon_with_another_momentum_or_decay_or_sign_would_differ() -> None:
    start, (own, _) = pair_of((24, 48))[0].detach(), pair_of((24, 48))
    results = []
    for momentum, decay in ((0.9, 0.1), (0.5, 0.1), (0.9, 0.0)):
        own = nn.Parameter(start.clone())
        optimiser = Muon([own], lr=0.02, momentum=momentum, weight_decay=decay)
        for seed in range(4):
            own.grad = matrices(1, 24, 48, seed=seed)[0]
            optimiser.step()
        results.append(own.detach())
    assert float((results[0] - results[1]).abs().max()) > 2e-3
    assert float((results[0] - results[2]).abs().max()) > 2e-3


def test_muon_updates_many_matrices_as_it_does_each_alone() -> None:
    def some() -> list[nn.Parameter]:  # two shapes, one the other turned: they are computed together
        made = []
        for n, shape in enumerate([(16, 24), (24, 16), (16, 24)]):
            made.append(nn.Parameter(matrices(1, *shape, seed=n)[0]))
            made[-1].grad = matrices(1, *shape, seed=n + 9)[0] * 10**n
        return made

    many, alone = some(), some()
    Muon(many, lr=0.1, momentum=0.9, weight_decay=0.0).step()
    for parameter in alone:
        Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.0).step()
    for a, b, start in zip(many, alone, some(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        assert float((a - start).detach().abs().mean()) > 0.01


def test_tall_matrices_take_larger_steps() -> None:
    # an orthogonal 64 x 16 update times sqrt(64 / 16) = 2: singular values about 2 lr
    parameter = nn.Parameter(torch.zeros(64, 16))
    parameter.grad = matrices(1, 64, 16)[0]
    Muon([parameter], lr=0.1, momentum=0.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(parameter.detach())
    assert float(values.min()) > 0.12 and float(values.max()) < 0.26


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig.preset("modern-nano", vocab_size=64, context=16, tied=False))


def names_of(gpt: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in gpt.named_parameters() if id(parameter) in wanted}


def test_adamw_decays_matrices_of_blocks_alone() -> None:
    gpt = model()
    (adamw,) = build(gpt, OptimConfig(weight_decay=0.1, learning_rate=0.01))
    decayed = [p for group in adamw.param_groups if group["weight_decay"] for p in group["params"]]
    free = [p for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]]
    assert names_of(gpt, decayed) == {
        n for n, p in gpt.named_parameters() if n.startswith("blocks.") and p.ndim == 2
    }
    assert {"embed.weight", "head.weight", "final_norm.weight"} <= names_of(gpt, free)
    assert len(decayed) + len(free) == len(list(gpt.parameters()))


def test_muon_gets_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    gpt = model()
    muon, adamw = build(nn.ModuleDict({"model": gpt}), OptimConfig(name="muon", weight_decay=0.1))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    own = [p for group in muon.param_groups for p in group["params"]]
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert all(p.ndim == 2 for p in own)
    assert names_of(gpt, own) == {
        n for n, p in gpt.named_parameters() if n.startswith("blocks.") and p.ndim == 2
    }
    assert not names_of(gpt, own) & names_of(gpt, rest)
    assert names_of(gpt, own) | names_of(gpt, rest) == {n for n, _ in gpt.named_parameters()}


def test_frozen_parameters_are_left_out_and_a_scalar_head_is_not_decayed() -> None:
    scalar = ScalarModel(model().config)
    scalar.body.embed.weight.requires_grad_(False)
    (adamw,) = build(scalar, OptimConfig(weight_decay=0.1))
    free = names_of(scalar, [p for g in adamw.param_groups if not g["weight_decay"] for p in g["params"]])
    everything = names_of(scalar, [p for g in adamw.param_groups for p in g["params"]])
    assert "scalar.weight" in free and "body.embed.weight" not in everything


def test_set_learning_rate_scales_each_groups_peak() -> None:
    optimisers = build(model(), OptimConfig(name="muon", learning_rate=0.01, matrix_learning_rate=0.5))
    for share in (0.3, 0.1):  # of the peak, not of the last value
        optim.set_learning_rate(optimisers, share)
        rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
        assert rates == pytest.approx([0.5 * share, 0.01 * share])


def test_adamw_against_the_formula_and_torchs_own() -> None:
    gpt, twin = model(), model()
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    (ours,) = build(gpt, config)
    decayed = [p for n, p in twin.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    others = [p for n, p in twin.named_parameters() if not (n.startswith("blocks.") and p.ndim == 2)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    before = gpt.blocks[0].mlp.up.weight.detach().clone()  # type: ignore[union-attr, operator]
    for turn in range(3):
        for parameter, other in zip(gpt.parameters(), twin.parameters(), strict=True):
            draw = torch.Generator().manual_seed(turn * 1000 + parameter.numel())
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        if turn == 0:
            # first step: mhat = g and vhat = g^2, so p <- p (1 - lr wd) - lr g / (|g| + eps)
            weight = gpt.blocks[0].mlp.up.weight  # type: ignore[union-attr]
            expected = before * (1 - 0.01 * 0.1) - 0.01 * weight.grad / (weight.grad.abs() + 1e-6)
            torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=0)
    for parameter, other in zip(gpt.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=0)
