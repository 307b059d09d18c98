"""The decoder's parts against torch or values worked by hand, and what must not change its answers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chatwright.config import UserError
from chatwright.model.attention import blocked_attention, fused_attention, plain_attention
from chatwright.model.cache import KVCache
from chatwright.model.compile_friendly import gelu_sigmoid, make_compile_friendly
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT, MLP
from chatwright.model.inputs import token_positions
from chatwright.model.norms import LayerNorm, RMSNorm
from chatwright.model.rotary import rotary_angles, rotate, sinusoids

TOLERANCE = 1e-5  # float32, logits of order one, the same model on the same numbers in another arrangement

CONFIGS: dict[str, GPTConfig] = {
    "post-norm, learned": GPTConfig(vocab_size=31, context=24, layers=2, width=16, heads=2, pre_norm=False),
    "pre-norm, sinusoidal": GPTConfig(
        vocab_size=31,
        context=24,
        layers=2,
        width=16,
        heads=2,
        position="sinusoidal",
        activation="relu2",
        tied=False,
    ),
    "rotary, grouped, QK-norm": GPTConfig.preset(
        "modern-nano", vocab_size=31, context=24, width=16, heads=4, head_dim=6, mlp_width=20
    ),
    "windows, norms on both sides, scales and caps": GPTConfig.preset(
        "modern-nano",
        vocab_size=31,
        context=24,
        width=16,
        heads=4,
        head_dim=6,
        mlp_width=20,
        layers=3,
        windows=(3, 0, 4),
        window_rope_base=100.0,
        branch_norm="both",
        activation="geglu",
        attention_softcap=2.0,
        attention_scale=0.3,
        logit_softcap=4.0,
        embed_scale=2.0,
    ),
    "norms behind, whole QK-norm, partly rotated": GPTConfig.preset(
        "modern-nano",
        vocab_size=31,
        context=24,
        width=16,
        heads=4,
        head_dim=6,
        mlp_width=20,
        branch_norm="after",
        qk_norm_whole=True,
        rotary_dim=2,
        rotary_layers=(True, False),
        qkv_bias=True,
        residual_scale=0.5,
        logit_scale=2.0,
    ),
    "parallel": GPTConfig(
        vocab_size=31,
        context=24,
        layers=2,
        width=16,
        heads=2,
        position="rotary",
        rotary_dim=4,
        parallel=True,
        tied=False,
    ),
}


def make(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every parameter is random: norms and biases that are not 1 and 0, no block that is the
    identity."""
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * drawn if "norm.weight" in name else 0.3 * drawn)
            else:
                parameter.copy_(0.35 * drawn)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    return make(CONFIGS[request.param])


MODELS = {name: make(config) for name, config in CONFIGS.items()}


def some_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= TOLERANCE)


# --- parts ---


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_against_torch(eps: float) -> None:
    ours, theirs = RMSNorm(12, eps), nn.RMSNorm(12, eps=eps)
    weight, x = torch.randn(12), 0.1 * torch.randn(3, 5, 12)
    ours.weight.data, theirs.weight.data = weight, weight
    assert close(ours(x), theirs(x))
    assert not close(ours(x), RMSNorm(12, 10 * eps + 1e-2)(x))


def test_rms_norm_by_hand() -> None:
    out = RMSNorm(2, 0.0)(torch.tensor([[3.0, 4.0]]))  # rms = sqrt((9 + 16) / 2)
    assert close(out, torch.tensor([[3.0, 4.0]]) / math.sqrt(12.5))


def test_norms_in_half_precision_count_in_float32() -> None:
    x = 300 * torch.randn(4, 64).bfloat16()  # squares of it would overflow or coarsen
    for norm in (RMSNorm(64, 1e-6).bfloat16(), LayerNorm(64).bfloat16()):
        out = norm(x)
        assert out.dtype == torch.bfloat16
        exact = norm.float()(x.float())
        # Rounding of the answer only: bfloat16 has 8 bits, so half of 2^-7 of values below 4.
        assert (out.float() - exact).abs().max() <= 4 * 2**-8


def test_layer_norm_against_torch() -> None:
    ours, theirs = LayerNorm(12, eps=1e-3), nn.LayerNorm(12, eps=1e-3)
    weight, bias, x = torch.randn(12), torch.randn(12), torch.randn(3, 12)
    for one in (ours, theirs):
        one.weight.data, one.bias.data = weight.clone(), bias.clone()
    assert close(ours(x), theirs(x))


def mlp(activation: Any, x: Tensor) -> Tensor:
    """An MLP of width one and identity matrices; the gate, if there is one, passes 2 x."""
    module = MLP(
        GPTConfig(vocab_size=2, context=2, layers=1, width=1, heads=1, mlp_width=1, activation=activation)
    )
    for layer, weight in ((module.up, 1.0), (module.down, 1.0), (module.gate, 2.0)):
        if layer is not None:
            nn.init.constant_(layer.weight, weight)
            nn.init.zeros_(layer.bias)
    out: Tensor = module(x[:, None])[:, 0].detach()
    return out


def test_activations_by_hand() -> None:
    x = torch.linspace(-4, 4, 41)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    expected = {
        "gelu": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(inner)),
        "relu2": torch.where(x > 0, x * x, 0),
        "swiglu": (2 * x) / (1 + torch.exp(-2 * x)) * x,
    }
    for name, value in expected.items():
        assert close(mlp(name, x), value), name
    assert not close(expected["gelu"], expected["gelu_tanh"])  # they differ by up to 5e-4: the test can tell


def test_sinusoids_by_hand() -> None:
    table = sinusoids(torch.tensor([[0, 1, 7]]), 4)[0]
    assert close(table[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    for row, position in ((1, 1), (2, 7)):
        fast, slow = position, position / 100  # 10000 ** (2 / 4)
        assert close(
            table[row], torch.tensor([math.sin(fast), math.sin(slow), math.cos(fast), math.cos(slow)])
        )


def test_rotation_by_hand() -> None:
    cos, sin = rotary_angles(torch.tensor([[0, 3]]), torch.tensor([1.0, 0.1]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    out = rotate(x, cos, sin)[0, 0]
    assert close(out[0], x[0, 0, 0])  # position 0 is not turned
    a, b = 3.0, 0.3  # pairs (x_0, x_2) and (x_1, x_3); 100 ** (2 / 4) = 10
    turned = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    assert close(out[1], torch.tensor(turned))


def test_rotation_sees_distances_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    rates = torch.tensor([1.0, 0.1, 0.01, 0.001])

    def score(i: int, j: int) -> Tensor:
        turned = [rotate(x, *rotary_angles(torch.tensor([[p]]), rates)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    assert close(score(9, 4), score(105, 100))
    assert not close(score(9, 4), score(9, 5))


def test_token_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]]).bool()
    ids = torch.zeros(3, 4, dtype=torch.long)
    assert token_positions(ids, mask, None).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 2]]
    assert token_positions(ids, None, torch.tensor([5, 0, 2]))[:, 0].tolist() == [5, 0, 2]


# --- the whole ---


@torch.no_grad()
def test_causal(model: GPT) -> None:
    """A token changes nothing before it, and something after it."""
    ids = some_ids(2, 12)
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 31
    a, b = model(ids), model(other)
    assert close(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-3


@torch.no_grad()
def test_order_matters(model: GPT) -> None:
    ids = some_ids(1, 6)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    assert not close(model(ids)[:, -1], model(swapped)[:, -1])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_equals_unpadded(model: GPT, side: str) -> None:
    ids, lengths = some_ids(4, 11), [11, 1, 6, 10]
    places = torch.arange(11)
    starts = torch.tensor([0 if side == "right" else 11 - length for length in lengths])[:, None]
    mask = (places >= starts) & (places < starts + torch.tensor(lengths)[:, None])
    logits = model(ids, mask=mask)
    assert torch.isfinite(logits).all()
    for row in range(4):
        assert close(logits[row, mask[row]], model(ids[row, mask[row]][None])[0])
    other = torch.where(mask, ids, (ids + 5) % 31)
    assert close(model(other, mask=mask)[mask], logits[mask])  # what stands in the padding is of no account


@torch.no_grad()
def test_a_wholly_padded_row_is_finite(model: GPT) -> None:
    mask = torch.tensor([[True] * 4, [False] * 4])
    assert torch.isfinite(model(some_ids(2, 4), mask=mask)).all()


@torch.no_grad()
def test_packed_equals_separate(model: GPT) -> None:
    ids, sizes = some_ids(1, 14), [5, 1, 8]
    documents = torch.repeat_interleave(torch.tensor([3, 0, 7]), torch.tensor(sizes))[None]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    packed = model(ids, documents=documents, positions=positions)
    separate = torch.cat([model(part) for part in torch.split(ids, sizes, dim=1)], dim=1)
    assert close(packed, separate)
    assert not close(model(ids, positions=positions), separate)  # without the wall between documents
    # Rotary positions are relative: documents may as well be counted through.
    assert close(model(ids, documents=documents), separate) == (model.config.position == "rotary")


@torch.no_grad()
def test_packed_and_padded(model: GPT) -> None:
    ids = some_ids(1, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[True] * 7 + [False] * 2])
    logits = model(ids, mask=mask, documents=documents, positions=positions)
    assert close(logits[:, 3:7], model(ids[:, 3:7]))


@given(
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8).filter(lambda cuts: sum(cuts) <= 24),
    name=st.sampled_from(sorted(CONFIGS)),
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_cached_equals_uncached(cuts: list[int], name: str) -> None:
    model, ids = MODELS[name], some_ids(2, sum(cuts))
    cache = KVCache(model.config, 2, sum(cuts))
    parts = [model(part, cache=cache) for part in torch.split(ids, cuts, dim=1)]
    assert close(torch.cat(parts, 1), model(ids))
    assert cache.lengths.tolist() == [sum(cuts)] * 2


@given(
    calls=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    name=st.sampled_from(sorted(CONFIGS)),
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_rows_of_different_length_in_one_cache(calls: list[list[int]], name: str) -> None:
    """Each call adds some tokens to each row, none to some; every row answers as if it were alone."""
    model = MODELS[name]
    cache = KVCache(model.config, 3, 24)
    seen: list[list[int]] = [[], [], []]
    found: list[list[Tensor]] = [[], [], []]
    for number, lengths in enumerate(calls):
        width = max(lengths)
        ids = some_ids(3, width, seed=number)
        logits = model(ids, mask=torch.arange(width) < torch.tensor(lengths)[:, None], cache=cache)
        assert torch.isfinite(logits).all()
        for row, length in enumerate(lengths):
            seen[row] += ids[row, :length].tolist()
            found[row] += list(logits[row, :length])
    assert cache.lengths.tolist() == [len(row) for row in seen]
    for row in range(3):
        if seen[row]:
            assert close(torch.stack(found[row]), model(torch.tensor([seen[row]]))[0])


@torch.no_grad()
def test_norm_placement_and_positions_make_a_difference() -> None:
    """Each option changes the answer of the same weights: none is dead."""
    base = CONFIGS["post-norm, learned"]
    weights, ids = make(base).state_dict(), some_ids(1, 8)
    expected = make(base)(ids)
    changes: list[dict[str, Any]] = [
        {"pre_norm": True},
        {"activation": "gelu"},
        {"activation": "relu2"},
        {"position": "sinusoidal"},
        {"position": "rotary"},
        {"norm_eps": 1e-1},
        {"norm": "rms"},
        {"qk_norm": True},
        {"heads": 4, "kv_heads": 4, "head_dim": 4},
        {"windows": (3, 0)},
        {"attention_softcap": 1.0},
        {"attention_scale": 0.1},
        {"embed_scale": 2.0},
    ]
    for change in changes:
        other = make(replace(base, **change))
        other.load_state_dict(weights, strict=False)
        assert not close(other(ids), expected), change


@torch.no_grad()
def test_each_option_of_rotary_and_pre_norm_models_makes_a_difference() -> None:
    base = replace(CONFIGS["rotary, grouped, QK-norm"], windows=(3, 0))
    weights, ids = make(base).state_dict(), some_ids(1, 8)
    expected = make(base)(ids)
    changes: list[dict[str, Any]] = [
        {"windows": (4, 0)},
        {"windows": (0, 3)},
        {"window_rope_base": 10.0},
        {"rotary_dim": 2},
        {"rotary_layers": (False, True)},
        {"branch_norm": "both"},
        {"branch_norm": "after"},
        {"parallel": True},
        {"qk_norm": False},
        {"qk_norm_whole": True},
        {"qkv_bias": True},
        {"activation": "geglu"},
        {"residual_scale": 0.5},
        {"logit_scale": 0.5},
    ]
    for change in changes:
        other = make(replace(base, **change))
        fitting = {
            name: tensor
            for name, tensor in weights.items()
            if other.state_dict().get(name, tensor).shape == tensor.shape
        }
        other.load_state_dict(fitting, strict=False)
        assert not close(other(ids), expected), change


@torch.no_grad()
@pytest.mark.parametrize("kernel", [fused_attention, blocked_attention, plain_attention])
def test_a_window_sees_the_last_tokens_and_no_more(kernel: Any) -> None:
    """With windows of 3 in two layers, token 9 hears of tokens 5 to 9: twice two back, and itself."""
    model = make(replace(CONFIGS["rotary, grouped, QK-norm"], windows=(3, 3)))
    model.use_attention(kernel)
    ids = some_ids(1, 10)
    last = model(ids)[0, 9]
    for place in range(10):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 31
        assert bool((model(other)[0, 9] - last).abs().max() > 1e-6) == (place >= 5), place


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_none() -> None:
    base = CONFIGS["rotary, grouped, QK-norm"]
    model, other = make(base), make(replace(base, windows=(8, 9)))
    assert torch.equal(model(some_ids(2, 8)), other(some_ids(2, 8)))


@torch.no_grad()
def test_soft_capped_scores_by_hand() -> None:
    """One head of size 4 without a mask: softmax(c tanh(q k / (c sqrt(4)))) v, row by row."""
    q, k, v = torch.randn(3, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0)) * 2
    rows = []
    for row in range(5):
        scores = (k[0, 0, : row + 1] @ q[0, 0, row]) / 2
        rows.append((1.5 * (scores / 1.5).tanh()).softmax(0) @ v[0, 0, : row + 1])
    for kernel in (fused_attention, blocked_attention, plain_attention):
        assert close(kernel(q, k, v, softcap=1.5)[0, 0], torch.stack(rows))  # type: ignore[operator]
        assert not close(kernel(q, k, v)[0, 0], torch.stack(rows))  # type: ignore[operator]


def test_blocks_with_a_norm_behind_do_not_start_at_zero() -> None:
    """Where the norm's slope is a thousand: RMS norm of zeros has the slope 1 / sqrt(eps)."""
    base = CONFIGS["rotary, grouped, QK-norm"]
    for branch_norm, starts_at_zero in (("before", True), ("after", False), ("both", False)):
        model = GPT(replace(base, branch_norm=branch_norm))  # type: ignore[arg-type]
        assert bool((model.blocks[0].mlp.down.weight == 0).all()) == starts_at_zero


@torch.no_grad()
def test_rotary_base_makes_a_difference() -> None:
    base = CONFIGS["rotary, grouped, QK-norm"]
    other = make(replace(base, rope_base=100.0))
    assert not close(other(some_ids(1, 9)), make(base)(some_ids(1, 9)))


@torch.no_grad()
def test_soft_cap_bends_the_logits() -> None:
    plain = make(CONFIGS["post-norm, learned"])
    with torch.no_grad():
        plain.head.weight.mul_(20)
    model = make(replace(plain.config, logit_softcap=2.0))
    model.load_state_dict(plain.state_dict())
    logits = plain(some_ids(1, 9))
    assert float(logits.abs().max()) > 4
    torch.testing.assert_close(model(some_ids(1, 9)), 2 * (logits / 2).tanh(), atol=1e-6, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    plain = make(CONFIGS["post-norm, learned"])
    model = make(replace(plain.config, dropout=0.5))
    ids = some_ids(1, 9)
    assert close(model(ids), plain(ids))
    model.train()
    assert not close(model(ids), model(ids))


def test_tied_and_untied() -> None:
    tied, untied = GPT(CONFIGS["post-norm, learned"]), GPT(CONFIGS["pre-norm, sinusoidal"])
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    same = replace(tied.config, tied=False)
    assert GPT(same).parameter_count() - tied.parameter_count() == 31 * 16


def test_parameter_count_by_hand() -> None:
    config = GPTConfig(vocab_size=7, context=5, layers=2, width=4, heads=2)
    block = 4 * (4 * 4 + 4) + (4 * 16 + 16) + (16 * 4 + 4) + 2 * 8
    model = GPT(config)
    assert model.parameter_count() == 7 * 4 + 5 * 4 + 2 * block + 8
    assert model.parameter_count(embeddings=False) == 2 * block + 8


def test_initial_weights() -> None:
    torch.manual_seed(0)
    weights = GPT(
        GPTConfig.preset("gpt2", vocab_size=500, width=192, heads=4, layers=8, context=64)
    ).state_dict()
    assert float(weights["embed.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(weights["blocks.3.mlp.up.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(weights["blocks.3.mlp.down.weight"].std()) == pytest.approx(
        0.02 / 4, rel=0.05
    )  # sqrt(2 x 8 layers)
    assert not weights["blocks.3.mlp.up.bias"].any()
    assert (weights["blocks.3.mlp_norm.weight"] == 1).all()
    modern = GPT(CONFIGS["rotary, grouped, QK-norm"]).state_dict()
    assert not modern["blocks.0.attention.output.weight"].any()  # every block starts as the identity
    assert modern["blocks.0.attention.query.weight"].any()


@torch.no_grad()
def test_half_precision_model() -> None:
    """A model in bfloat16 gives float32 logits near the exact ones: 8 bits of mantissa, two blocks."""
    model = make(CONFIGS["rotary, grouped, QK-norm"])
    exact = model(some_ids(2, 9))
    rough = make(model.config).bfloat16()(some_ids(2, 9))
    assert rough.dtype == torch.float32
    error = float((rough - exact).square().mean().sqrt() / exact.std())
    assert 0 < error < 0.05


def test_too_long() -> None:
    model = make(CONFIGS["post-norm, learned"])
    with pytest.raises(UserError, match="25 tokens do not fit into the model's context of 24"):
        model(some_ids(1, 25))
    cache = KVCache(model.config, 1, 32)
    model(some_ids(1, 20), cache=cache)
    with pytest.raises(UserError, match="25 tokens do not fit"):
        model(some_ids(1, 5), cache=cache)


def test_gelu_by_sigmoid_is_gelu() -> None:
    x = torch.linspace(-12, 12, 4_001, requires_grad=True)
    found, wanted = gelu_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    slopes = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (found, wanted)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=2e-6, rtol=1e-6)
    assert (
        float((found - torch.nn.functional.gelu(x)).detach().abs().max()) > 1e-4
    )  # the exact form is another function


@pytest.mark.parametrize("preset", ["gpt2", "modern-nano"])
def test_compile_friendly_forms_give_the_same_logits(preset: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, layers=2, width=64, heads=2, vocab_size=96, context=48)).eval()
    ids = torch.randint(96, (2, 48))
    slopes, logits = [], []
    for friendly in (False, True):
        if friendly:
            make_compile_friendly(model)
            looked_up = model.embed(ids).grad_fn
            assert looked_up is not None and looked_up.name() == "_LookUpBackward"
            assert all(block.attention.kernel is blocked_attention for block in model.blocks)
        model.zero_grad()
        logits.append(model(ids))
        (logits[-1] * torch.linspace(-1, 1, 96)).sum().backward()
        slopes.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    for name, slope in slopes[0].items():  # those of the tables too, whose rows occur more than once
        torch.testing.assert_close(slopes[1][name], slope, atol=1e-4, rtol=1e-4)


def test_a_copy_of_a_compile_friendly_model_looks_up_its_own_tables() -> None:
    model = make(CONFIGS["post-norm, learned"])
    make_compile_friendly(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embed.weight.zero_()
    ids = some_ids(1, 5)
    assert not other.embed(ids).any() and bool(model.embed(ids).any())
