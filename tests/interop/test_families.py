"""The families of transformers: same weights, same logits, in every way in which a model is computed; the
same gradients; written and read back; what is not carried is refused by name."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from starlette.testclient import TestClient
from torch import Tensor
from torch.nn import functional as F

from chatwright import cli, load
from chatwright.commands.serve import ServeConfig, build_app, make_pool
from chatwright.config import UserError
from chatwright.generate.engine import Engine, Request
from chatwright.generate.sampling import Sampling
from chatwright.generate.torch_runner import TorchRunner
from chatwright.interop.families import FAMILIES, config_from_hf
from chatwright.interop.hf import load_hf, state_dict_from_hf
from chatwright.interop.hf_export import config_to_hf, plan_hf
from chatwright.interop.leaving import family_name
from chatwright.interop.loaded import Loaded, build
from chatwright.interop.peft import load_peft, write_peft
from chatwright.model.attention import blocked_attention, fused_attention, plain_attention
from chatwright.model.cache import KVCache
from chatwright.model.compile_friendly import make_compile_friendly
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.lora import LoRAConfig, add_lora, lora_parameters
from chatwright.tokenizer import Tokenizer
from support.families import (
    CASES,
    CONTEXT,
    ONE_OF_EACH,
    VOCAB,
    WINDOW,
    ours,
    their_config,
    theirs,
    write_model,
)

TOLERANCE = 1e-4  # float32, logits of order one: both libraries add the same numbers in another order
TOKENS = 19


def some_ids(batch: int = 3, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; the logits must say something, or equality would mean nothing."""
    assert a.shape == b.shape
    assert b.std() > 0.2
    return float((a - b).abs().max())


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, GPT]:
    """A model of transformers and ours with its weights."""
    return theirs(request.param), ours(request.param)


# ---- logits ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_padding(pair: tuple[Any, GPT]) -> None:
    """Rows as they are, and padded on either side."""
    other, model = pair
    ids, lengths, places = some_ids(), torch.tensor([TOKENS, 8, 13]), torch.arange(TOKENS)
    assert difference(model(ids), other(ids).logits) <= TOLERANCE
    for mask in (places < lengths[:, None], places >= TOKENS - lengths[:, None]):
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        expected = other(ids, attention_mask=mask.long(), position_ids=positions).logits
        assert difference(model(ids, mask=mask)[mask], expected[mask]) <= TOLERANCE


@torch.no_grad()
def test_cached(pair: tuple[Any, GPT]) -> None:
    other, model = pair
    ids, past = some_ids(), transformers.DynamicCache(config=pair[0].config)
    cache = KVCache(model.config, 3, TOKENS)
    found, expected = [], []
    for chunk in torch.split(ids, [8, 1, 1, 9], dim=1):
        found.append(model(chunk, cache=cache))
        expected.append(other(chunk, past_key_values=past, use_cache=True).logits)
    assert difference(torch.cat(found, 1), other(ids).logits) <= TOLERANCE
    assert difference(torch.cat(found, 1), torch.cat(expected, 1)) <= TOLERANCE


@torch.no_grad()
def test_rows_of_unequal_lengths_in_one_cache(pair: tuple[Any, GPT]) -> None:
    _, model = pair
    ids, lengths = some_ids(), [9, 14, 10]
    cache = KVCache(model.config, 3, TOKENS)
    model(ids[:, :14], mask=torch.arange(14) < torch.tensor(lengths)[:, None], cache=cache)
    for step in range(5):
        new = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
        found = model(new, cache=cache)
    for row, length in enumerate(lengths):
        assert difference(found[row, 0], model(ids[row : row + 1, : length + 5])[0, -1]) <= TOLERANCE


@torch.no_grad()
def test_packed_documents_and_rows_without_padding(pair: tuple[Any, GPT]) -> None:
    """Documents in one row are computed as if they stood apart, and rows without their padding like rows."""
    _, model = pair
    ids = some_ids(1)
    documents = torch.tensor([[1] * 8 + [2] * 11])
    positions = torch.tensor([[*range(8), *range(11)]])
    apart = torch.cat((model(ids[:, :8]), model(ids[:, 8:])), 1)
    assert difference(model(ids, documents=documents, positions=positions), apart) <= TOLERANCE
    rows, lengths = some_ids(), torch.tensor([TOKENS, 8, 13])
    ragged, whole = model.hidden(rows, lengths=lengths), model.hidden(rows)
    real = torch.arange(TOKENS) < lengths[:, None]
    assert difference(model.head(ragged[real]), model.head(whole[real])) <= TOLERANCE
    indices = torch.tensor([3, 18, 19 + 7, 38 + 12])
    for given in ({}, {"lengths": lengths}):
        at = model.hidden_at(rows, indices, **given)  # type: ignore[arg-type]
        assert difference(model.head(at), model.head(whole.flatten(0, 1)[indices])) <= TOLERANCE


@torch.no_grad()
def test_every_kernel_gives_the_same(pair: tuple[Any, GPT]) -> None:
    """The forms for processors and for the compiler keep windows, soft caps and scales."""
    other, model = pair
    ids = some_ids()
    expected = other(ids).logits
    try:
        for kernel in (plain_attention, blocked_attention):
            model.use_attention(kernel)
            assert difference(model(ids), expected) <= TOLERANCE
            lengths = torch.tensor([TOKENS, 8, 13])
            real = torch.arange(TOKENS) < lengths[:, None]
            assert (
                difference(model.head(model.hidden(ids, lengths=lengths)[real]), expected[real]) <= TOLERANCE
            )
    finally:
        model.use_attention(fused_attention)
    friendly = build(model.config, model.state_dict())
    make_compile_friendly(friendly)
    positions = torch.arange(CONTEXT)[None]
    given = tuple(part[:, :, :TOKENS] for part in friendly.angles(positions) or ())  # as pre-training does
    assert difference(friendly.head(friendly.hidden(ids, angles=given or None)), expected) <= TOLERANCE


@torch.no_grad()
def test_the_engine_answers_as_transformers_generates(pair: tuple[Any, GPT]) -> None:
    """Greedy answers longer than a window, of prompts of different lengths at once, with keys in pages."""
    other, model = pair
    prompts = [some_ids(1, length, seed=length)[0].tolist() for length in (3, 25, 11)]
    engine = Engine(model, runner=TorchRunner(model))
    found = engine.generate([Request(tuple(prompt), Sampling(20, 0.0)) for prompt in prompts])
    for prompt, completion in zip(prompts, found, strict=True):
        whole = other(torch.tensor([[*prompt, *completion.ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = whole.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert float((whole.amax(-1) - chosen).max()) <= TOLERANCE  # the likeliest, or as likely


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2-window", {"windows": ()}),
        ("mistral", {"windows": (WINDOW + 1,) * 3}),
        ("ministral", {"windows": (WINDOW,) * 3}),
        ("smollm3", {"rotary_layers": ()}),
        ("olmo2", {"qk_norm": False, "qk_norm_whole": False}),
        ("olmo3", {"window_rope_base": 0.0}),
        ("phi3-partial", {"rotary_dim": 0}),
        ("granite", {"embed_scale": 1.0}),
        ("granite", {"residual_scale": 1.0}),
        ("granite", {"attention_scale": 0.0}),
        ("granite", {"logit_scale": 1.0}),
        ("gemma2", {"attention_softcap": 0.0}),
        ("gemma2", {"logit_softcap": 0.0}),
        ("gemma2", {"attention_scale": 0.0}),
        ("gemma2", {"activation": "swiglu"}),
        ("gemma3_text", {"window_rope_base": 1e5}),
        ("gemma3_text", {"embed_scale": 1.0}),
        ("gpt_neox", {"parallel": False}),
        ("gpt_neox", {"rotary_dim": 0}),
    ],
)
@torch.no_grad()
def test_the_comparison_is_sharp(name: str, changes: dict[str, Any]) -> None:
    """A model that is slightly another one fails the comparison: no field is dead, the tolerance hides
    nothing."""
    model = ours(name)
    changed = GPT(replace(model.config, **changes)).eval()
    changed.load_state_dict(model.state_dict(), strict=False)
    assert difference(changed(some_ids()), theirs(name)(some_ids()).logits) > 10 * TOLERANCE


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_transformers(name: str) -> None:
    """Of the loss of the next token, for every weight; with activation checkpointing they are the same."""
    other, model, ids = theirs(name), ours(name), some_ids()
    targets = ids[:, 1:].flatten()
    names = dict(other.named_parameters())
    loss = F.cross_entropy(other(ids).logits[:, :-1].flatten(0, 1), targets)
    expected = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    for model.activation_checkpointing in (False, True):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), targets)
        own = dict(
            zip(
                dict(model.named_parameters()),
                torch.autograd.grad(loss, list(model.parameters())),
                strict=True,
            )
        )
        for rule in FAMILIES[model.config.family].rules:
            for layer in range(model.config.layers) if "{}" in rule.theirs else (0,):
                called, parts = rule.names(layer)
                if parts[0] in own:
                    found = replace(rule, plus=0.0).invert([own.pop(part) for part in parts], model.config)
                    wanted = expected[called.replace("embed_out", "lm_head")]
                    scale = max(1.0, float(wanted.abs().max()))
                    torch.testing.assert_close(found, wanted, atol=1e-4 * scale, rtol=0)
        assert not own  # every weight of ours has been looked at


# ---- out and in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_written_and_read_by_transformers(name: str, tmp_path: Path) -> None:
    """What they wrote we read; what we write they read: the same logits, the same kind of model."""
    theirs(name).save_pretrained(tmp_path / "theirs")
    loaded = load_hf(tmp_path / "theirs").model
    model = ours(name)
    assert torch.equal(loaded(some_ids()), model(some_ids())) and loaded.config == model.config
    (tmp_path / "ours").mkdir()
    plan_hf(Loaded(model, None, None, "x")).write(tmp_path / "ours")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(again) is type(theirs(name))
    assert difference(model(some_ids()), again(some_ids()).logits) <= TOLERANCE
    read = load_hf(tmp_path / "ours").model
    assert read.config == model.config and read.config.family == model.config.family
    for key, tensor in model.state_dict().items():
        # Gemma's norms lose some last bits where they are below 1/2.
        near = "norm" in key and "gemma" in name
        torch.testing.assert_close(read.state_dict()[key], tensor, atol=6e-8 if near else 0.0, rtol=0)


def test_weights_of_one_and_more_are_kept_bit_for_bit_by_gemma(tmp_path: Path) -> None:
    model = ours("gemma2")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 3.0)
    plan_hf(Loaded(model, None, None, "x")).write(tmp_path)
    found = load_hf(tmp_path).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neox", "phi3"])
def test_half_precision_is_checked_bit_for_bit(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """`write_export` rounds the source as the file does, and compares the logits with what it reads."""
    from chatwright.interop.export import write_export

    parts = load_hf(write_model(name, tmp_path / "theirs", tokenizer))
    family, notes = write_export(parts, tmp_path / "out", form="hf", dtype="bf16", verify=True, source="x")
    assert family == f"transformers' {name}" and "the same tokens" in notes[-1]


OLD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("qwen2-window", {"rope_theta": 1e4}, ["rope_parameters", "layer_types"]),
    ("mistral", {"rope_theta": 1e6}, ["rope_parameters"]),
    ("ministral", {"rope_theta": 1e4}, ["rope_parameters"]),
    ("smollm3", {"rope_theta": 2e6}, ["rope_parameters", "no_rope_layers", "layer_types"]),
    ("olmo2", {"rope_theta": 1e4, "rope_scaling": None}, ["rope_parameters"]),
    (
        "olmo3",
        {"rope_theta": 1e5, "rope_scaling": CASES["olmo3"][1]["rope_parameters"]["full_attention"]},
        ["rope_parameters", "layer_types"],
    ),
    ("phi3", {"rope_theta": 1e4, "rope_scaling": None}, ["rope_parameters"]),
    ("phi3-partial", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, ["rope_parameters"]),
    ("granite", {"rope_theta": 1e4}, ["rope_parameters"]),
    ("gemma2", {"rope_theta": 1e4, "hidden_act": "gelu_pytorch_tanh"}, ["rope_parameters", "layer_types"]),
    (
        "gemma3_text",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"factor": 4.0, "rope_type": "linear"},
            "sliding_window_pattern": 3,
        },
        ["rope_parameters", "layer_types", "_sliding_window_pattern"],
    ),
    ("gpt_neox", {"rotary_emb_base": 1e4, "rotary_pct": 0.5}, ["rope_parameters"]),
]


@pytest.mark.parametrize(("name", "given", "absent"), OLD, ids=[name for name, _, _ in OLD])
def test_settings_of_earlier_versions_say_the_same(
    name: str, given: dict[str, Any], absent: list[str]
) -> None:
    values = their_config(name).to_dict()
    config = config_from_hf(values)
    for key in absent:
        values.pop(key, None)
    assert config_from_hf({**values, **given}) == config


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A file that leaves a setting out means what transformers takes then: every such setting, one by one."""
    values = their_config(name).to_dict()
    kind = type(their_config(name))
    needed = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    needed |= {
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
        "head_dim",
        "layer_types",
    }
    for key in sorted(set(values) - needed):
        rest = {one: value for one, value in values.items() if one != key}
        if key in ("sliding_window", "use_sliding_window"):
            rest.pop("layer_types", None)  # which say that there are windows
        full = kind(**rest).to_dict()
        assert config_from_hf({**rest, "model_type": values["model_type"]}) == config_from_hf(full), key


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported, only "silu"'),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaling of type 'dynamic'"),
    ("qwen2", {"rope_parameters": {"rope_type": ["a"]}}, 'scaling of type ["a"] is not supported'),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "but use_sliding_window is not true"),
    ("qwen2-window", {"layer_types": ["chunked_attention"] * 3}, 'layer_types = ["chunked_attention"'),
    ("qwen2-window", {"layer_types": ["full_attention"]}, "1 layer_types for 3 layers"),
    (
        "qwen2-window",
        {"num_hidden_layers": 10**9, "layer_types": None},
        "num_hidden_layers 1000000000 is more",
    ),
    ("mistral", {"layer_types": ["full_attention"] * 3}, 'layer_types = ["full_attention"'),
    ("mistral", {"sliding_window": 0}, "sliding_window must be a positive whole number, not 0"),
    ("ministral", {"sliding_window": "x"}, 'sliding_window must be a positive whole number, not "x"'),
    ("smollm3", {"attention_bias": True}, "attention_bias = true"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias = true"),
    ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers = [1, 2, 0] is not 0 or 1 for each layer"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers = [1] is not"),
    ("olmo2", {"attention_bias": True}, "attention_bias = true"),
    (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {},
                "sliding_attention": {"rope_type": "linear", "factor": 2},
            }
        },
        "rotary scaling in layers with a window is not supported",
    ),
    ("olmo3", {"rope_parameters": {"full_attention": {}, "chunked": {}}}, "rope_parameters = "),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rotary scaling of type 'longrope' is not supported",
    ),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scaling of type 'yarn'"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "more than a whole head"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "an even number of features, not 3"),
    ("granite", {"logits_scaling": 0.0}, "logits_scaling must be above 0"),
    ("granite", {"attention_multiplier": -1.0}, "attention_multiplier must be a number, not -1.0"),
    ("granite", {"residual_multiplier": 0.0}, "residual_scale 0.0 is not a positive number"),
    ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation = "gelu" is not supported'),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
    ("gemma2", {"attention_bias": True}, "attention_bias = true"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
    ("gemma3_text", {"model_type": "gemma3", "vision_config": {"a": 1}}, "the model reads pictures"),
    ("gpt_neox", {"hidden_act": "relu"}, 'hidden_act = "relu" is not supported'),
    ("gpt_neox", {"attention_bias": False}, "attention_bias = false is not supported, only true"),
    ("gpt_neox", {"head_dim": 99}, "head_dim = 99 is not supported"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_we_do_not_carry_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_hf({**their_config(name).to_dict(), **change}, where="x/config.json")
    assert message in str(caught.value) and str(caught.value).startswith("x/config.json: ")
    assert "\n" not in str(caught.value)


def test_a_text_part_of_gemma_3_is_read() -> None:
    """The class for pictures, without them: settings inside of `text_config`, names with its prefix."""
    values = their_config("gemma3_text").to_dict()
    whole = {"model_type": "gemma3", "text_config": values, "vision_config": None}
    config = config_from_hf(whole)
    assert config == ours("gemma3_text").config and config.family == "gemma3_text"
    tensors = theirs("gemma3_text").state_dict()
    for prefix in ("language_model.", "model.language_model."):
        renamed = {
            prefix + (name if prefix == "language_model." else name.removeprefix("model.")): tensor
            for name, tensor in tensors.items()
            if name.startswith("model.")
        }
        state, expected = state_dict_from_hf(whole, renamed), ours("gemma3_text").state_dict()
        assert len(state) == len(expected) - 1  # the output matrix is tied
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_constants_of_old_files_are_left_out() -> None:
    """Pythia's files have masks and rotary frequencies among the weights, and another name of the head."""
    values, tensors = their_config("gpt_neox").to_dict(), dict(theirs("gpt_neox").state_dict())
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
        tensors[f"gpt_neox.layers.1.{name}"] = torch.ones(1)
    assert (
        state_dict_from_hf(values, tensors).keys()
        == state_dict_from_hf(values, theirs("gpt_neox").state_dict()).keys()
    )


@pytest.mark.parametrize("name", CASES)
def test_settings_are_written_as_they_are_read(name: str) -> None:
    config = ours(name).config
    values = config_to_hf(config)
    assert json.loads(json.dumps(values)) == values
    assert config_from_hf(values) == config and values["model_type"] == name.partition("-")[0]


@pytest.mark.parametrize("name", ["phi3", "mistral", "qwen2", "gpt_neox"])
def test_a_checkpoint_remembers_its_family(name: str) -> None:
    """Without it, a Phi-3 of this shape would be written as a Mistral, whose layers have other names."""
    config = GPTConfig.from_dict(json.loads(json.dumps(ours(name).config.to_dict())))
    assert family_name(config) == name
    old = {key: value for key, value in config.to_dict().items() if key != "family"}
    assert family_name(GPTConfig.from_dict(old)) == ("mistral" if name == "phi3" else name)
    changed = replace(config, norm_eps=0.5, logit_softcap=3.0)
    with pytest.raises(UserError, match=r"the model has logit_softcap 3\.0"):
        config_to_hf(changed)


# ---- adapters ----------------------------------------------------------------------------------------------


@contextmanager
def old_names() -> Iterator[Any]:
    """PEFT asks transformers for what has new names there."""
    import warnings

    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=kind)
        yield pytest.importorskip("peft", reason="parity with PEFT is NOT tested: pip install peft")


def fresh(name: str) -> Any:
    """A copy of a model of transformers, which PEFT may change."""
    other = type(theirs(name))(theirs(name).config)
    other.load_state_dict(theirs(name).state_dict())
    return other.eval()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_adapters_go_to_peft_and_come_back(name: str, tmp_path: Path) -> None:
    model = ours(name)
    add_lora(model, LoRAConfig(rank=3, alpha=7.0))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
        write_peft(model, tmp_path / "adapter", base="someone/base")
        with old_names() as peft:
            wrapped = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "adapter").eval()
            found = wrapped(some_ids()).logits
        assert difference(model(some_ids()), theirs(name)(some_ids()).logits) > 0.05
        assert difference(model(some_ids()), found) <= TOLERANCE
        again = ours(name)
        load_peft(tmp_path / "adapter", again)
        assert difference(again(some_ids()), model(some_ids())) <= 1e-6


TARGETS = {
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
}


@pytest.mark.parametrize("name", ["qwen2", "olmo2", "phi3", "granite", "gemma2", "gemma3_text", "gpt_neox"])
def test_adapters_of_peft_and_their_gradients(name: str, tmp_path: Path) -> None:
    """An adapter made by PEFT is read, also one of fused matrices; a step would learn the same."""
    ids, draw = some_ids(), torch.Generator().manual_seed(4)
    targets = TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    with old_names() as peft:
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(fresh(name), config).eval()
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
        wrapped.save_pretrained(tmp_path / "adapter")
        logits = wrapped(ids).logits
    model = ours(name)
    load_peft(tmp_path / "adapter", model)
    assert difference(model(ids).detach(), logits.detach()) <= TOLERANCE
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    own = math.fsum(float(p.grad.square().sum()) for p in lora_parameters(model) if p.grad is not None)
    if name not in TARGETS:  # each of fused ones has an A of its own here
        found = [float(p.grad.square().sum()) for p in wrapped.parameters() if p.grad is not None]
        assert own == pytest.approx(math.fsum(found), rel=1e-3)
    assert own > 1e-6


# ---- the program -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model directory of each family as transformers writes it, and a file of conversations."""
    place = tmp_path_factory.mktemp("families")
    for name in ONE_OF_EACH:
        write_model(name, place / name, tokenizer)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Hello {n}"},
                {"role": "assistant", "content": "I am fine."},
            ]
        }
        for n in range(40)
    ]
    (place / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


QUICK = ("gemma3_text", "gpt_neox", "phi3")
"""The families whose parts differ most; the others make the slow form."""


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in ONE_OF_EACH]
)
def test_the_verbs(
    name: str,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """generate, chat, plan, sft with LoRA, export: each ends well, and what is written is read again."""
    monkeypatch.chdir(tmp_path)
    source = str(folders / name)

    def run(*arguments: str) -> str:
        code = cli.main(list(arguments))
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out + shown.err

    run("generate", source, "--prompt", "Hello", "--max_new_tokens", "12")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\n"))
    run("chat", source, "--max_new_tokens", "5")
    options = ["--base", source, "--lora.rank", "2", "--context", "64"]
    assert "memory" in run("plan", "sft", *options, "--time", "false")
    steps = ["--fit.seconds", "0", "--fit.steps", "1", "--fit.batch_size", "2", "--fit.compile", "false"]
    talks = ["--data", str(folders / "talks.jsonl"), "--held_out", "2"]
    run("sft", *options, *steps, *talks, "--out", "run")
    run("export", "run", "out", "--format", "hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == name


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_server_answers_as_the_model_does(name: str, folders: Path) -> None:
    """The text of a greedy answer, and the log-probabilities that a conversation's next token has."""
    model = load(str(folders / name), dtype="fp32")
    talk = [{"role": "user", "content": "Hello"}]
    config = ServeConfig(store="none")
    body = {
        "model": "m",
        "messages": talk,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 3,
    }
    app = build_app(make_pool(model, "m", config), config)
    with TestClient(app, base_url="http://localhost") as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == model.chat(talk, temperature=0.0, max_new_tokens=6)
    ids = model.require_template().encode(talk, model.tokenizer, add_generation_prompt=True).ids
    logprobs = model.logits([ids])[0, -1].log_softmax(-1)
    likeliest = (logprobs if model.known is None else logprobs[model.known]).topk(3).values
    found = [one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]]
    assert found == pytest.approx(likeliest.tolist(), abs=1e-4)
