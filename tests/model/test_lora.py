"""Adapters: nothing at first, merged = beside, off = the base bit for bit, and only they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chatwright import checkpoint
from chatwright.config import UsageError, UserError, build
from chatwright.generate.engine import Engine
from chatwright.generate.request import Request
from chatwright.generate.sampling import Sampling
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import (
    LAYERS,
    Adapter,
    LoRAConfig,
    LoRALinear,
    active_adapter,
    adapter_names,
    adapters_of,
    add_lora,
    lora_parameters,
    merge,
    merged_tensors,
    plain,
    sharing_copy,
    trained_tensors,
    use_adapter,
    without_adapter,
)

GATED: dict[str, Any] = {
    "position": "rotary",
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "swiglu",
    "bias": False,
}
SIZE: dict[str, Any] = {"vocab_size": 96, "context": 48, "layers": 2, "width": 64, "heads": 4}
SHAPES = {
    "gpt2": GPTConfig(**SIZE),  # biases, tied
    "gpt1": GPTConfig(**SIZE, pre_norm=False, tied=False),
    "llama": GPTConfig(**SIZE, **GATED, mlp_width=96, kv_heads=2),
    "qwen3": GPTConfig(**SIZE, **GATED, mlp_width=96, kv_heads=1, head_dim=24, qk_norm=True, tied=False),
}
IDS = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    model = GPT(config)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = 0.15 * torch.randn(parameter.shape, generator=draw)
        parameter.copy_(1 + drawn if parameter.ndim == 1 else drawn)
    return model.eval()


@torch.no_grad()
def stir(model: nn.Module, name: str | None = None, seed: int = 3) -> None:
    """As after training: B is no longer zero."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, name):
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    return random_model(SHAPES[request.param])


def test_a_new_adapter_changes_nothing_and_a_trained_one_is_what_the_formula_says(model: GPT) -> None:
    before = logits(model)
    weights = {
        path: layer.weight.clone() for path, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    add_lora(model, LoRAConfig(rank=3, alpha=6.0))
    assert torch.equal(logits(model), before)
    stir(model)
    after = logits(model)
    assert float((after - before).abs().max()) > 0.1
    by_hand = random_model(model.config)
    with torch.no_grad():
        for path, adapter in adapters_of(model).items():
            by_hand.get_submodule(path).weight.copy_(weights[path] + 6.0 / 3 * adapter.b @ adapter.a)  # type: ignore[operator]
    torch.testing.assert_close(logits(by_hand), after, atol=1e-5, rtol=0)


def test_every_linear_layer_of_the_blocks_has_one_and_nothing_else_is_trained(model: GPT) -> None:
    add_lora(model, LoRAConfig(rank=2))
    gates = 1 if model.config.activation == "swiglu" else 0
    assert len(adapters_of(model)) == model.config.layers * (6 + gates)
    assert not isinstance(model.head, LoRALinear)
    own = {id(parameter) for parameter in lora_parameters(model)}
    assert all(parameter.requires_grad == (id(parameter) in own) for parameter in model.parameters())
    stir(model)
    model(IDS).square().mean().backward()
    assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in model.parameters())
    assert all(
        float(parameter.grad.abs().max()) > 0
        for parameter in lora_parameters(model)
        if parameter.grad is not None
    )


def test_targets_are_those_that_are_named() -> None:
    model = random_model(SHAPES["llama"])
    add_lora(model, LoRAConfig(rank=2, targets=("query", "down")))
    assert sorted(adapters_of(model)) == [
        f"blocks.{n}.{path}" for n in (0, 1) for path in ("attention.query", "mlp.down")
    ]
    assert len(LAYERS) == 7


def test_merged_is_beside(model: GPT) -> None:
    bare = set(model.state_dict())
    add_lora(model, LoRAConfig(rank=4))
    stir(model)
    beside = logits(model)
    tensors = merged_tensors(model)
    copied = plain(model)
    torch.testing.assert_close(logits(copied), beside, atol=1e-5, rtol=0)
    assert not any(isinstance(module, LoRALinear) for module in copied.modules())
    # what has no adapter is not there twice, and a tied matrix is still one
    assert copied.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert (copied.head.weight is copied.embed.weight) == model.config.tied
    assert torch.equal(logits(model), beside) and adapter_names(model) == ["default"]
    merge(model)
    torch.testing.assert_close(logits(model), beside, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == bare and adapter_names(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = checkpoint.model_tensors(model)
    assert own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in own)
    assert plain(model) is model


def test_off_is_the_base_bit_for_bit(model: GPT) -> None:
    before = logits(model)
    add_lora(model, LoRAConfig(rank=2))
    stir(model)
    after = logits(model)
    with without_adapter(model):
        assert torch.equal(logits(model), before)
        assert active_adapter(model) is None
        tensors = merged_tensors(model)
    assert all(
        torch.equal(tensor, random_model(model.config).state_dict()[name]) for name, tensor in tensors.items()
    )
    assert torch.equal(logits(model), after)
    with pytest.raises(ZeroDivisionError), without_adapter(model):  # and on again when something fails inside
        raise ZeroDivisionError
    assert torch.equal(logits(model), after)
    use_adapter(model, None)
    merge(model)  # of nothing
    assert torch.equal(logits(model), before)


def test_several_adapters_on_one_base_are_switched_by_name() -> None:
    model = random_model(SHAPES["gpt2"])
    before = logits(model)
    seen = {}
    for number, (name, targets) in enumerate({"polite": (), "rude": ("query",)}.items()):
        add_lora(model, LoRAConfig(rank=2 + number, targets=targets), name)
        stir(model, name, seed=number)
        seen[name] = logits(model)
        # only the newest is trained
        assert all(p.requires_grad for p in lora_parameters(model, name))
        assert all(
            not p.requires_grad for other in seen if other != name for p in lora_parameters(model, other)
        )
    assert adapter_names(model) == ["polite", "rude"] and active_adapter(model) == "rude"
    assert float((seen["polite"] - seen["rude"]).abs().max()) > 0.1
    for name in ("polite", "rude", None, "polite"):
        use_adapter(model, name)
        assert torch.equal(logits(model), before if name is None else seen[name])
    with pytest.raises(UserError, match="no adapter is called 'kind'; this model has 'polite', 'rude'"):
        use_adapter(model, "kind")
    assert torch.equal(logits(model), seen["polite"])


def test_the_engine_sees_the_adapter_and_forgets_what_another_one_has_read() -> None:
    """The engine keeps keys and values of earlier prompts: those of one adapter must not answer for
    another."""
    model = random_model(SHAPES["llama"])
    for seed, name in enumerate(("one", "two")):
        add_lora(model, LoRAConfig(rank=4), name)
        stir(model, name, seed=seed)
    engine = Engine(model, None)
    request = Request(
        prompt=tuple(range(1, 33)), sampling=Sampling(max_new_tokens=6, temperature=0.0), end_ids=frozenset()
    )
    found = {}
    for name in ("one", "two", None, "one"):
        use_adapter(model, name)
        done = engine.generate([request])[0]
        alone = Engine(plain(model) if name else random_model(model.config), None).generate([request])[0]
        assert done.ids == alone.ids
        assert done.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        found[name] = tuple(done.logprobs)
    assert len(set(found.values())) == 3


def test_packed_kernels_get_merged_matrices() -> None:
    from chatwright.generate.kernels.packing import pack

    model = random_model(SHAPES["llama"])
    bare = pack(model, "fp32").arena.copy()
    add_lora(model, LoRAConfig(rank=4))
    stir(model)
    packed = pack(model, "fp32").arena.copy()
    merge(model)
    assert (packed == pack(model, "fp32").arena).all() and (packed != bare).any()


def test_dropout_is_for_training_alone() -> None:
    model = random_model(SHAPES["llama"])
    add_lora(model, LoRAConfig(rank=4, dropout=0.5))
    stir(model)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert not torch.allclose(first, still) and not torch.allclose(first, logits(model))


def test_bf16_autocast_and_compilation_go_on_working() -> None:
    model = random_model(SHAPES["gpt2"])
    bare = logits(model)
    add_lora(model, LoRAConfig(rank=4))
    stir(model)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model)
        model(IDS).mean().backward()
    assert float((rough - exact).abs().max()) < 0.05 * float(exact.std())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(model))
    compiled = torch.compile(
        model, backend="eager"
    )  # the tracing is what adapters could break; code is written elsewhere
    torch.testing.assert_close(logits(compiled), exact)
    with without_adapter(model):
        torch.testing.assert_close(logits(compiled), bare)
    torch.testing.assert_close(logits(compiled), exact)


def test_a_scalar_model_keeps_its_head_trainable() -> None:
    model = ScalarModel(SHAPES["llama"])
    add_lora(model, LoRAConfig(rank=2))
    names = set(trained_tensors(model))
    outside = {name for name in names if ".adapters." not in name}
    assert outside == {"scalar.weight", "scalar.bias", "offset", "scale"}
    assert len(names) == len(outside) + 2 * 2 * 7
    assert all(not p.requires_grad for name, p in model.body.named_parameters() if ".adapters." not in name)


def test_a_sharing_copy_has_the_memory_but_not_the_flags() -> None:
    model = random_model(SHAPES["gpt2"])
    twin = sharing_copy(model)
    add_lora(twin, LoRAConfig(rank=2))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert adapter_names(model) == [] and twin.head.weight is twin.embed.weight
    for name, parameter in model.named_parameters():
        assert twin.get_parameter(name).data_ptr() == parameter.data_ptr()


def test_the_start_and_the_scale() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 40)
    adapter = Adapter(layer, LoRAConfig(rank=64, alpha=16.0))
    assert adapter.a.shape == (64, 100) and adapter.b.shape == (40, 64)
    a, b = adapter.a.detach(), adapter.b.detach()
    assert not b.any()
    # Kaiming's uniform with a = sqrt(5): bound sqrt(6 / (1 + 5) / inputs) = 0.1, deviation 0.1 / sqrt(3)
    assert float(a.abs().max()) <= 0.1
    assert float(a.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert LoRAConfig(rank=64, alpha=16.0).scale == 0.25
    assert LoRAConfig(rank=64, alpha=16.0, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank -1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha"),
        ({"rank": 2, "alpha": float("inf")}, "lora.alpha"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout"),
        ({"rank": 2, "targets": ["query", "embed"]}, "'embed' is none of query"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(LoRAConfig, settings, where="lora")


def test_what_cannot_be_added_leaves_the_model_as_it_was() -> None:
    model = random_model(SHAPES["gpt2"])
    for config, message in (
        (LoRAConfig(), "rank of at least 1"),
        (LoRAConfig(rank=1, targets=("gate",)), "has no gate"),
    ):
        with pytest.raises(UsageError, match=message):
            add_lora(model, config)
    for name in ("", "a.b", "../x", "keys", "forward", "x" * 65):
        with pytest.raises(UserError, match="cannot be called"):
            add_lora(model, LoRAConfig(rank=1), name)
    assert adapter_names(model) == [] and all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, LoRAConfig(rank=1))
    with pytest.raises(UserError, match="called 'default' already"):
        add_lora(model, LoRAConfig(rank=1))
    with pytest.raises(UserError, match="no adapter is called 'other'"):
        adapters_of(model, "other")
