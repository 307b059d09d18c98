"""Adapters in PEFT's format: the same logits there and here, both ways, and files that are not what they say
are refused."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import chatwright as cw
from chatwright import cli
from chatwright.config import UserError
from chatwright.interop import peft as ours
from chatwright.interop.peft import SETTINGS, WEIGHTS, layers_of, load_peft, write_peft
from chatwright.language_model import load_parts
from chatwright.model.gpt import GPT
from chatwright.model.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    adapters_of,
    add_lora,
    lora_parameters,
    merge,
    use_adapter,
)
from chatwright.serve.pool import ModelPool, parse_specs
from chatwright.tokenizer import Tokenizer

from .conftest import SHAPES, VOCAB, export_hf, parts_of, random_model, their_model

IDS = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))
KINDS = ("gpt1", "gpt2", "gpt2-untied", "llama", "llama-grouped", "qwen3", "arcee")


@pytest.fixture(scope="module")
def peft() -> Any:
    """PEFT itself; importing it warns of what it deprecates elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="parity with PEFT is NOT tested: pip install peft")


@contextmanager
def old_names() -> Iterator[None]:
    """PEFT asks transformers for what has new names there. All other warnings, of missing and unexpected
    keys, stay errors."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=kind)
        yield


@torch.no_grad()
def stir(model: torch.nn.Module, seed: int = 3, name: str | None = None) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, name):
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)  # type: ignore[no-any-return]


def adapted(kind: str, config: LoRAConfig | None = None) -> GPT:
    model = random_model(SHAPES[kind])
    add_lora(model, config or LoRAConfig(rank=3, alpha=7.0))
    stir(model)
    return model


def reloaded(directory: Path, kind: str) -> GPT:
    model = random_model(SHAPES[kind])
    load_peft(directory, model)
    return model


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, alpha=7.0),
        LoRAConfig(rank=4, alpha=8.0, targets=("query", "value", "down"), rank_stabilised=True),
        LoRAConfig(rank=2, targets=("output",)),
    ],
    ids=["all", "some, stabilised", "one"],
)
def test_what_we_write_peft_computes(
    peft: Any, kind: str, config: LoRAConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """GPT-2's query and value are one layer there: the pair of blocks must be what the two adapters were."""
    theirs = their_model(export_hf(parts_of(SHAPES[kind], tokenizer), tmp_path / "base"))
    bare = logits(theirs)
    model = adapted(kind, config)
    write_peft(model, tmp_path / "adapter", base="someone/base")
    with old_names():
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    found = logits(wrapped)
    assert float((found - bare).abs().max()) > 0.1
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=0)
    assert wrapped.peft_config["default"].base_model_name_or_path == "someone/base"


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama-grouped",
        {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": ["q_proj", "up_proj"],
            "lora_dropout": 0.1,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "stabilised": ("qwen3", {"r": 4, "use_rslora": True, "target_modules": "all-linear"}),
    "some layers": ("qwen3", {"r": 2, "target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]}),
    "expression": ("arcee", {"r": 2, "target_modules": r".*\.(q|v)_proj"}),
    "fused": (
        "gpt2",
        {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "gpt1": ("gpt1", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_writes_we_compute(peft: Any, name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    kind, settings = THEIRS[name]
    theirs = their_model(export_hf(parts_of(SHAPES[kind], tokenizer), tmp_path / "base"))
    torch.manual_seed(0)
    with old_names():
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    with old_names():
        wrapped.save_pretrained(tmp_path / "adapter")
    model = random_model(SHAPES[kind])
    bare = logits(model)
    load_peft(tmp_path / "adapter", model)
    assert float((logits(model) - bare).abs().max()) > 0.1
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-4, rtol=0)
    if name == "patterns":
        ranks = {path: adapter.config.rank for path, adapter in adapters_of(model).items()}
        assert ranks["blocks.0.attention.query"] == 4 and ranks["blocks.1.attention.query"] == 2
        assert adapters_of(model)["blocks.0.mlp.up"].config.scale == 3 / 4


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [(), ("query", "key", "value"), ("key",), ("value", "up")], ids=",".join)
def test_there_and_back_is_the_same_adapter(kind: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model = adapted(kind, LoRAConfig(rank=3, alpha=7.0, targets=targets))
    write_peft(model, tmp_path / "adapter")
    again = reloaded(tmp_path / "adapter", kind)
    before, after = adapters_of(model), adapters_of(again)
    assert before.keys() == after.keys()
    for path, adapter in before.items():
        assert torch.equal(adapter.a, after[path].a) and torch.equal(adapter.b, after[path].b)
        assert after[path].config.scale == pytest.approx(adapter.config.scale, rel=1e-12)
    assert torch.equal(logits(model), logits(again))
    trained = [parameter for parameter in again.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(after)  # it can be trained on


def test_one_a_for_the_three_stays_one(tmp_path: Path) -> None:
    """An adapter of a fused layer, read and written: the rank does not grow while the copies of A are
    equal."""
    model = adapted("gpt2", LoRAConfig(rank=2))
    with torch.no_grad():
        for block in model.blocks:
            layers = [getattr(block.attention, part) for part in ("query", "key", "value")]
            for layer in layers[1:]:
                layer.adapters["default"].a.copy_(layers[0].adapters["default"].a)
    write_peft(model, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / WEIGHTS)[
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    ].shape == (2, 64)
    assert torch.equal(logits(reloaded(tmp_path / "adapter", "gpt2")), logits(model))


def test_names_and_settings_are_peft_s(tmp_path: Path) -> None:
    write_peft(adapted("llama"), tmp_path / "llama", base="hf:owner/name")
    tensors = load_file(tmp_path / "llama" / WEIGHTS)
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (3, 64)
    assert len(tensors) == 2 * 2 * 7
    values = json.loads((tmp_path / "llama" / SETTINGS).read_text())
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (3, 7, "owner/name")
    assert values["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert values["rank_pattern"] == {} and not values["fan_in_fan_out"]
    write_peft(adapted("gpt2"), tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / WEIGHTS)
    assert tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"].shape == (192, 9)
    values = json.loads((tmp_path / "gpt2" / SETTINGS).read_text())
    assert values["fan_in_fan_out"] and values["rank_pattern"] == {
        f"transformer.h.{n}.attn.c_attn": 9 for n in (0, 1)
    }
    write_peft(adapted("gpt2", LoRAConfig(rank=1, targets=("down",))), tmp_path / "down")
    assert json.loads((tmp_path / "down" / SETTINGS).read_text())["target_modules"] == ["mlp.c_proj"]
    assert set(layers_of(SHAPES["gpt2"])) == {
        f"transformer.h.{n}.{end}"
        for n in (0, 1)
        for end in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_several_are_read_into_one_model_and_switched(tmp_path: Path) -> None:
    wanted = {}
    model = random_model(SHAPES["qwen3"])
    for seed, name in enumerate(("kind", "curt")):
        one = adapted("qwen3")
        stir(one, seed)
        write_peft(one, tmp_path / name)
        wanted[name] = logits(one)
        load_peft(tmp_path / name, model, name)
    for name in ("kind", "curt"):
        use_adapter(model, name)
        assert torch.equal(logits(model), wanted[name])


# ---- what is refused ---------------------------------------------------------------------------------------


def with_settings(directory: Path, **changes: Any) -> None:
    file = directory / SETTINGS
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any], *, notes: bool = True) -> None:
    file = directory / WEIGHTS
    with safe_open(str(file), framework="pt") as opened:
        kept = opened.metadata() if notes else {"format": "pt"}
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, kept)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SETTINGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, r'peft_type = "IA3" is not supported'),
    "dora": ({"use_dora": True}, "'use_dora' = true is not supported"),
    "biases": ({"bias": "all"}, 'bias = "all" is not supported'),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
    "a base that was changed": (
        {"init_lora_weights": "pissa"},
        'init_lora_weights = "pissa" is not supported',
    ),
    "the unknown": ({"use_magic": {"a": 1}}, "'use_magic'"),
    "a rank in words": ({"r": "8"}, "r must be a positive whole number"),
    "a rank that is no rank": ({"r": True}, "r must be a positive whole number"),
    "another rank": (
        {"r": 4},
        r"lora_A of model.layers.0\S* is 3 x \d+, not 4 x \d+: it is for another model",
    ),
    "alpha in words": ({"lora_alpha": "7"}, "lora_alpha must be a number"),
    "alpha of nothing": ({"lora_alpha": 0}, "alpha 0.0 must be above 0"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout must be a number from 0 to 1"),
    "an expression": ({"rank_pattern": {"(a+)+b": 2}}, "only names of layers are supported"),
    "a pattern in words": ({"rank_pattern": {"q_proj": "x"}}, "r must be a positive whole number"),
    "patterns in a list": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object"),
    "more targets": ({"target_modules": ["q_proj"]}, "tensors for layers that are no target: model.layers.0"),
    "a million targets": ({"target_modules": ["q_proj"] * 5000}, "more than 4096 names"),
    "a million patterns": ({"rank_pattern": {f"a{n}": 2 for n in range(5000)}}, "more than 4096 names"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules must be names"),
    "stabilised by words": ({"use_rslora": "yes"}, "use_rslora must be true or false"),
}


@pytest.mark.parametrize("name", SETTINGS_REFUSED)
def test_settings_that_would_compute_something_else_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = SETTINGS_REFUSED[name]
    write_peft(adapted("llama"), tmp_path / "a")
    with_settings(tmp_path / "a", **changes)
    refused(tmp_path / "a", message)


def refused(directory: Path, message: str, kind: str = "llama") -> None:
    """With a message in one line, and a model that is as it was."""
    model = random_model(SHAPES[kind])
    with pytest.raises(UserError, match=message) as caught:
        load_peft(directory, model)
    assert str(directory) in str(caught.value)
    assert adapter_names(model) == [] and not any(
        isinstance(module, LoRALinear) for module in model.modules()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


TENSORS_REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "another layer": (
        lambda t: t.update({Q.replace("q_proj", "x_proj"): t.pop(Q)}),
        r"does not have or carry: model\.layers\.0\.self_attn\.x_proj",
    ),
    "a layer too many": (
        lambda t: t.update({Q.replace("layers.0", "layers.9"): t[Q].clone()}),
        r"layers\.9\.self_attn",
    ),
    "the output matrix": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[Q].clone()}),
        "carry: lm_head",
    ),
    "no pair": (lambda t: t.pop(Q), "only one of lora_A and lora_B for model.layers.0.self_attn.q_proj"),
    "a layer too few": (
        lambda t: [t.pop(Q), t.pop(Q.replace("_A", "_B"))],
        "no tensors for model.layers.0.self_attn.q_proj",
    ),
    "a magnitude": (
        lambda t: t.update({Q.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}),
        "no part of a LoRA: base_model",
    ),
    "nothing": (lambda t: t.clear(), "it is empty"),
    "another width": (
        lambda t: t.update({Q: torch.zeros(3, 63)}),
        "is 3 x 63, not 3 x 64: it is for another model",
    ),
    "three dimensions": (lambda t: t.update({Q: torch.zeros(3, 64, 1)}), "is 3 x 64 x 1"),
    "whole numbers": (
        lambda t: t.update({Q: torch.zeros(3, 64, dtype=torch.int32)}),
        "has numbers of type I32",
    ),
}


@pytest.mark.parametrize("name", TENSORS_REFUSED)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    change, message = TENSORS_REFUSED[name]
    write_peft(adapted("llama"), tmp_path / "a")
    with_tensors(tmp_path / "a", change, notes=False)
    refused(tmp_path / "a", message)


def test_files_that_are_missing_cut_or_pickles_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    write_peft(adapted("llama"), directory)
    file = directory / WEIGHTS
    whole = file.read_bytes()
    for size in (0, 7, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(directory, "damaged or cut short")
    file.unlink()
    refused(directory, f"no {WEIGHTS} in it")
    (directory / "adapter_model.bin").write_bytes(b"\x80\x02.")
    refused(directory, "pickle, which could run any program")
    (directory / SETTINGS).write_text("[1]")
    refused(directory, "expected an object")
    (directory / SETTINGS).write_text("{")
    refused(directory, "cannot be read")
    (directory / SETTINGS).unlink()
    refused(directory, f"holds no adapter: there is no {SETTINGS}")
    refused(tmp_path / "nowhere", "holds no adapter")


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    write_peft(adapted("llama"), tmp_path / "a")
    refused(tmp_path / "a", "for another model|no tensors|does not have", kind="llama-grouped")
    refused(tmp_path / "a", "does not have or carry", kind="gpt2")
    other = random_model(SHAPES["llama"])
    with torch.no_grad():
        other.blocks[1].mlp.up.weight[0, 0] += 1e-3  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="was trained on another model of this shape"):
        load_peft(tmp_path / "a", other)
    with_tensors(
        tmp_path / "a", lambda tensors: None, notes=False
    )  # whoever does not say on what it was trained is believed
    load_peft(tmp_path / "a", other)


@pytest.mark.parametrize(
    "note",
    [
        "{",
        "[]",
        '{"x": {}}',
        '{"transformer.h.0.attn.c_attn": 3}',
        '{"transformer.h.0.attn.c_attn": {"query": 9}}',
        '{"transformer.h.0.attn.c_attn": {"blocks.0.attention.query": 8}}',
        '{"transformer.h.0.attn.c_attn": {"blocks.0.attention.query": 9}}',
        (
            '{"transformer.h.0.attn.c_attn": {"blocks.0.attention.query": 3, "blocks.0.attention.key": 2, '
            '"blocks.0.attention.value": 4}}'
        ),
        '{"transformer.h.0.attn.c_attn": {"blocks.0.attention.query": -1, "blocks.0.attention.key": 10}}',
    ],
)
def test_a_note_about_blocks_is_not_believed_blindly(note: str, tmp_path: Path) -> None:
    write_peft(adapted("gpt2"), tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    save_file(load_file(file), file, {"format": "pt", "chatwright.parts": note})
    refused(tmp_path / "a", "note chatwright.parts in its header is damaged", kind="gpt2")
    save_file(
        load_file(file), file, {"format": "pt"}
    )  # without it: the wide adapter for each of the three, the same numbers
    torch.testing.assert_close(
        logits(reloaded(tmp_path / "a", "gpt2")), logits(adapted("gpt2")), atol=1e-5, rtol=0
    )


def test_an_adapter_of_the_bare_model_is_read(tmp_path: Path) -> None:
    """Trained on AutoModel instead of AutoModelForCausalLM: names lack the family's prefix."""
    write_peft(adapted("llama"), tmp_path / "a")

    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("base_model.model.model.", "base_model.model.")] = tensors.pop(name)

    with_tensors(tmp_path / "a", shorten)
    assert torch.equal(logits(reloaded(tmp_path / "a", "llama")), logits(adapted("llama")))


# ---- by name -----------------------------------------------------------------------------------------------


@pytest.fixture
def base(chat_dir: Path) -> str:
    return str(chat_dir)


def adapter_for(directory: str, target: Path, seed: int = 3) -> GPT:
    model = load_parts(directory).model
    add_lora(model, LoRAConfig(rank=4))
    stir(model, seed)
    write_peft(model, target)
    return model.eval()


def test_a_model_and_its_adapter_are_loaded_by_name(base: str, tmp_path: Path) -> None:
    wanted = adapter_for(base, tmp_path / "with+plus" / "adapter")
    ids = [[1, 2, 3, 4]]
    with torch.no_grad():
        expected = wanted(torch.tensor(ids))
    for name in (
        f"{base}+{tmp_path}/with+plus/adapter",
        f"{base}+{tmp_path}/with+plus",
    ):  # or the stage that made it
        found = cw.load(name)
        assert (
            found.name == name and adapter_names(found.model) == []
        )  # merged: whatever reads weights sees it
        torch.testing.assert_close(found.logits(ids), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        cw.load(base, adapter=tmp_path / "with+plus" / "adapter").logits(ids), expected, atol=1e-5, rtol=0
    )
    for name, message in (
        (f"{base}+nowhere", "nowhere holds no adapter"),
        (f"nowhere+{tmp_path}", "no model 'nowhere'"),
        ("++", "no model"),
        (f"{base}+", "no model"),
    ):
        with pytest.raises(UserError, match=message):
            cw.load(name)


def test_one_base_answers_with_several_adapters(base: str, tmp_path: Path) -> None:
    model = cw.load(base)
    before = model.logits([[1, 2, 3]])
    for seed in (1, 2):
        wanted = adapter_for(base, tmp_path / str(seed), seed)
        beside = model.with_adapter(tmp_path / str(seed))
        with torch.no_grad():
            torch.testing.assert_close(
                beside.logits([[1, 2, 3]]), wanted(torch.tensor([[1, 2, 3]])), atol=1e-5, rtol=0
            )
        assert beside.model.embed.weight.data_ptr() == model.model.embed.weight.data_ptr()
        assert (
            beside.tokenizer is model.tokenizer
            and beside.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3, seed=1) is not None
        )
    assert torch.equal(model.logits([[1, 2, 3]]), before) and adapter_names(model.model) == []


def test_a_server_s_models_may_be_one_base_with_several_adapters(base: str, tmp_path: Path) -> None:
    wanted = {"plain": load_parts(base).model.eval()}
    for seed, name in enumerate(("kind", "curt"), 1):
        wanted[name] = adapter_for(base, tmp_path / name, seed)
    pool = ModelPool(
        parse_specs(
            [f"plain={base}", *(f"{name}={base}+{tmp_path / name}" for name in ("kind", "curt"))], "fp32"
        )
    )

    async def logits_of(name: str) -> Tensor:
        async with pool.use(name) as service:
            return service.model.logits([[1, 2, 3]])

    try:
        for name, model in wanted.items():
            with torch.no_grad():
                expected = model(torch.tensor([[1, 2, 3]]))
            torch.testing.assert_close(asyncio.run(logits_of(name)), expected, atol=1e-5, rtol=0)
    finally:
        pool.close()


def test_an_exported_model_has_the_adapter_in_it(base: str, tmp_path: Path) -> None:
    wanted = adapter_for(base, tmp_path / "a")
    assert cli.main(["export", f"{base}+{tmp_path / 'a'}", str(tmp_path / "out"), "--format", "hf"]) == 0
    with torch.no_grad():
        expected = wanted(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(cw.load(tmp_path / "out").logits([[1, 2, 3]]), expected, atol=1e-5, rtol=0)


def test_a_model_with_an_adapter_beside_it_is_not_written_as_one_without(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    parts = parts_of(SHAPES["llama"], tokenizer)
    add_lora(parts.model, LoRAConfig(rank=2))
    with pytest.raises(UserError, match="no place for"):
        export_hf(parts, tmp_path / "out")
    merge(parts.model)
    export_hf(parts, tmp_path / "out")


def test_writing_draws_nothing_from_training_s_stream(tmp_path: Path) -> None:
    model = adapted("gpt2")
    before = torch.get_rng_state()
    write_peft(model, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    other = random_model(SHAPES["gpt2"])
    before = torch.get_rng_state()
    load_peft(tmp_path / "a", other)
    assert torch.equal(torch.get_rng_state(), before)
    assert ours.is_adapter(tmp_path / "a") and not ours.is_adapter(tmp_path)
