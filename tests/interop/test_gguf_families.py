"""GGUF of the families of open models: written, read back bit for bit, and run by llama.cpp itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from chatwright.chat import NATIVE
from chatwright.commands.export import write_export
from chatwright.config import UserError
from chatwright.interop.gguf import gguf_shape, load_gguf
from chatwright.interop.gguf_export import metadata_of, plan_gguf
from chatwright.interop.gguf_shapes import OWN_ACTIVATION
from chatwright.interop.loaded import Loaded
from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling
from chatwright.tokenizer import Tokenizer
from support import families
from support.family_shapes import FAMILIES, drawn

FOUR = {"layers": 4, "rotary_layers": (True, True, True, False)}
YARN = RotaryScaling("yarn", 4.0, 40, 1.0, 32.0, attention_factor=RotaryScaling.usual_attention_factor(4.0))
CARRIED: dict[str, tuple[str, GPTConfig]] = {
    "qwen2": ("qwen2", FAMILIES["qwen2"]),
    "mistral-without-window": ("llama", replace(FAMILIES["mistral"], windows=())),
    "smollm3": ("smollm3", replace(FAMILIES["smollm3"], **FOUR)),
    "olmo2": ("olmo2", FAMILIES["olmo2"]),
    "olmo3": (
        "olmo2",
        replace(
            FAMILIES["olmo2"],
            layers=4,
            windows=(9, 9, 9, 0),
            rope_base=500_000.0,
            rope_scaling=YARN,
            window_rope_base=500_000.0,
        ),
    ),
    "phi3": ("phi3", FAMILIES["phi3"]),
    "phi3-whole-heads": ("phi3", replace(FAMILIES["phi3"], rotary_dim=0, family="phi3")),
    "granite": ("granite", FAMILIES["granite"]),
    "gemma2": ("gemma2", FAMILIES["gemma2"]),
    "gemma3": ("gemma3", FAMILIES["gemma3"]),
    "gemma3-untied": ("gemma3", replace(FAMILIES["gemma3"], tied=False, windows=(9, 9))),
    "gpt_neox": ("gptneox", FAMILIES["gpt_neox"]),
    "gpt_neox-in-turn": ("gptneox", replace(FAMILIES["gpt_neox-in-turn"], activation="gelu_tanh")),
}
"""llama.cpp's name for it, and the shape."""
THEIR_NAMES = {
    "mistral-without-window": "llama",
    "phi3-whole-heads": "phi3",
    "gemma3": "gemma3_text",
    "gemma3-untied": "gemma3_text",
    "gpt_neox-in-turn": "gpt_neox",
}
"""What transformers calls the family of a file."""
GELU_TABLE = 2e-2
"""How far logits may be apart where llama.cpp looks GELU up in a table of 16-bit numbers. It has one table,
with the tanh form: the exact GELU is nearer to that than the table is to itself."""
SCALE = {"granite": 4.0}
"""How many times larger the logits are."""


def parts_of(config: GPTConfig, tokenizer: Tokenizer | None) -> Loaded:
    return Loaded(drawn(config), tokenizer, NATIVE if tokenizer else None, "a random model")


def export(config: GPTConfig, tokenizer: Tokenizer, target: Path, *, dtype: str = "f32") -> Path:
    write_export(parts_of(config, tokenizer), target, form="gguf", dtype=dtype, verify=True, source="x")
    return target


def some_ids() -> Tensor:
    return torch.randint(0, 331, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_read_back(name: str, tokenizer: Tokenizer, file: Path) -> None:
    """Bit for bit the same model, under llama.cpp's name."""
    architecture, config = CARRIED[name]
    export(config, tokenizer, file)
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == architecture
    again = load_gguf(file)
    assert again.model.config == gguf_shape(file) == config
    assert torch.equal(again.model(some_ids()), drawn(config)(some_ids()))
    assert again.model.config.family == THEIR_NAMES.get(name, name)


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_llama_cpp_says_the_same(name: str, tokenizer: Tokenizer, file: Path) -> None:
    """Three prompts, 64 steps each, float32: every token, and the logits of all of them."""
    from . import test_llama_cpp as peer  # skips where llama.cpp is not installed, and says so

    architecture, config = CARRIED[name]
    ours = drawn(config)
    near = GELU_TABLE if architecture in ("gemma2", "gemma3", "gptneox") else 1e-4 * SCALE.get(name, 1.0)
    with peer.running(export(config, tokenizer, file), config.context) as theirs:

        def distance(ids: list[int]) -> float:
            mine = ours(torch.tensor([ids]))[0].numpy()
            return float(np.abs(peer.their_logits(theirs, ids) - mine).max())

        assert distance(some_ids()[0].tolist()) <= near  # 40 tokens at random: far beyond the windows
        for text in ("How are you today?", "naïve café, 12 ÷ 7", "And you? And you? And you?"):
            prompt = tokenizer.encode(text)
            found = peer.our_greedy(ours, prompt)
            assert peer.their_greedy(theirs, prompt) == found
            assert distance([*prompt, *found]) <= near


@pytest.mark.parametrize(
    "name", ["qwen2", "olmo2", "olmo3", "phi3-partial", "granite", "gemma3_text", "gpt_neox"]
)
@torch.no_grad()
def test_from_transformers_to_llama_cpp(name: str, tokenizer: Tokenizer, file: Path) -> None:
    """A model that transformers made, read and written by us: llama.cpp computes what transformers does."""
    from . import test_llama_cpp as peer

    plan_gguf(Loaded(families.ours(name), tokenizer, None, "x")).write(file)
    near = GELU_TABLE if name in ("gemma3_text", "gpt_neox") else 1e-4
    with peer.running(file, families.CONTEXT) as running:
        found = peer.their_logits(running, some_ids()[0].tolist())
    assert np.abs(found - families.theirs(name)(some_ids()[:1]).logits[0].numpy()).max() <= near


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma3", "gpt_neox"])
def test_in_fewer_bits(name: str, tokenizer: Tokenizer, file: Path) -> None:
    """Fused tensors and vectors too: write_export itself compares with the rounded weights, bit for bit."""
    for dtype in ("bf16", "q8_0"):
        export(CARRIED[name][1], tokenizer, file, dtype=dtype)
        assert load_gguf(file).model.config == CARRIED[name][1]
        file.unlink()


KEYS: dict[str, dict[str, Any]] = {
    "qwen2": {"attention.head_count_kv": 2, "attention.sliding_window": None},
    "olmo2": {"attention.sliding_window": None},
    "olmo3": {"attention.sliding_window": 9, "attention.sliding_window_pattern": None},
    "phi3": {"rope.dimension_count": 12, "attention.sliding_window": None},
    "granite": {
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 0.3,
        "attention.scale": 0.125,
    },
    "gemma2": {
        "attention.sliding_window": 9,
        "attention.sliding_window_pattern": None,  # every second layer, as llama.cpp takes for granted
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "attention.key_length": 24,
    },
    "gemma3": {
        "attention.sliding_window": 9,
        "attention.sliding_window_pattern": [True, False],
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 10_000.0,
        "rope.scaling.factor": 8.0,
    },
    "gpt_neox": {
        "use_parallel_residual": True,
        "rope.dimension_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    },
    "gpt_neox-in-turn": {"use_parallel_residual": False},
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str) -> None:
    """What llama.cpp's converter writes for the family."""
    architecture, config = CARRIED[name]
    values = metadata_of(config)
    for key, value in KEYS[name].items():
        found = values.get(f"{architecture}.{key}")
        assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_weights_lie_as_llama_cpp_has_them(tokenizer: Tokenizer, file: Path) -> None:
    """Neighbours are rotated in granite and smollm3, halves elsewhere; fused matrices; norms as they are."""
    for name, paired in (("granite", True), ("smollm3", True), ("qwen2", False), ("gemma3", False)):
        config = CARRIED[name][1]
        export(config, tokenizer, file)
        stored = {one.name: one.data for one in gguf.GGUFReader(file).tensors}
        own = {key: value.detach().numpy() for key, value in drawn(config).named_parameters()}
        half = config.head_dim // 2
        order = [0, half, 1, half + 1] if paired else [0, 1, 2, 3]
        assert np.array_equal(stored["blk.1.attn_k.weight"][:4], own["blocks.1.attention.key.weight"][order])
        file.unlink()
    assert np.array_equal(stored["blk.0.post_ffw_norm.weight"], own["blocks.0.mlp_out_norm.weight"])
    export(CARRIED["phi3"][1], tokenizer, file)
    stored = {one.name: one.data for one in gguf.GGUFReader(file).tensors}
    own = {key: value.detach().numpy() for key, value in drawn(CARRIED["phi3"][1]).named_parameters()}
    gate_first = np.concatenate([own["blocks.0.mlp.gate.weight"], own["blocks.0.mlp.up.weight"]])
    assert np.array_equal(stored["blk.0.ffn_up.weight"], gate_first)
    assert stored["blk.0.attn_qkv.weight"].shape == (64 + 2 * 32, 64)


REFUSED: list[tuple[GPTConfig, str]] = [
    (FAMILIES["mistral"], "sliding windows of 7 tokens, and llama.cpp's llama, the nearest family"),
    (replace(FAMILIES["qwen2"], windows=(8, 0)), "sliding windows of 8 tokens, and llama.cpp's qwen2"),
    (replace(FAMILIES["phi3"], windows=(8, 8)), "sliding windows of 8 tokens, and llama.cpp's phi3"),
    (replace(FAMILIES["qwen2"], head_dim=24), "4 heads of 24 features are not its width of 64"),
    (
        replace(FAMILIES["olmo2"], tied=True),
        "tied True, and llama.cpp's olmo2 reads only files with an output",
    ),
    (replace(FAMILIES["gemma2"], tied=False), "tied False, and llama.cpp's gemma2 reads only files without"),
    (FAMILIES["smollm3"], "the model has rotary_layers (False, True), and llama.cpp's smollm3"),
    (replace(FAMILIES["granite"], qk_norm=True), "the model has qk_norm True, and llama.cpp's granite"),
    (replace(FAMILIES["gemma2"], attention_softcap=0.0), "the model has attention_softcap 0.0"),
    (replace(FAMILIES["gemma2"], embed_scale=3.0), "the model has embed_scale 3.0, and llama.cpp's gemma2"),
    (replace(FAMILIES["gemma2"], windows=(9, 8)), "the model has windows (9, 8), and llama.cpp's gemma2"),
    (replace(FAMILIES["gemma3"], attention_scale=0.1), "the model has attention_scale 0.1"),
    (replace(FAMILIES["gemma3"], window_rope_base=0.0), "the model has window_rope_base 0.0"),
    (replace(FAMILIES["gemma3"], attention_softcap=9.0), "the model has attention_softcap 9.0"),
    (replace(FAMILIES["gemma3"], rope_scaling=YARN), "gemma3 with windows and yarn is not supported"),
    (replace(FAMILIES["olmo2"], qk_norm_whole=False), "the model has qk_norm_whole False"),
    (FAMILIES["scaled-biases"], "the model has activation 'geglu', and llama.cpp's gptneox"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_llama_cpp_lacks(config: GPTConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        metadata_of(config)
    assert "\n" not in str(caught.value)


def test_windows_that_are_never_full() -> None:
    """A window of the whole context is none: what Ministral of 8 B has."""
    wide, none = replace(FAMILIES["mistral"], windows=(0, 160)), replace(FAMILIES["mistral"], windows=())
    assert metadata_of(wide) == metadata_of(none)
    with pytest.raises(UserError, match="sliding windows of 160 tokens"):
        metadata_of(replace(FAMILIES["mistral"], windows=(159, 160)))


def test_the_same_angles_said_twice() -> None:
    """A second base that equals the first says nothing more."""
    config = replace(FAMILIES["gemma2"], window_rope_base=FAMILIES["gemma2"].rope_base)
    assert metadata_of(config) == metadata_of(FAMILIES["gemma2"])
    usual = replace(FAMILIES["gemma2"], attention_scale=24**-0.5)
    assert metadata_of(usual) == metadata_of(FAMILIES["gemma2"])


# ---- files of others ---------------------------------------------------------------------------------------


def test_the_largest_gemmas_have_a_scale_of_their_own() -> None:
    """Known by their number of layers: Gemma 2 of 27 B has 46, and 32 heads of 128 for a width of 4608."""
    shape = {**FAMILIES["gemma2"].to_dict(), "layers": 46, "windows": (9, 0) * 23, "head_dim": 24}
    large = GPTConfig.from_dict({**shape, "attention_scale": 16**-0.5})
    assert metadata_of(large)["gemma2.attention.key_length"] == 24
    with pytest.raises(UserError, match=r"attention_scale 0\.0, and llama\.cpp's gemma2"):
        metadata_of(replace(large, attention_scale=0.0))


@pytest.fixture
def changed(tokenizer: Tokenizer, file: Path) -> Callable[..., Path]:
    """A family's file with other metadata; None leaves a key out."""

    def make(name: str, **changes: Any) -> Path:
        plan = plan_gguf(parts_of(CARRIED[name][1], None))
        values = {**plan.values, **{f"{plan.architecture}.{key}": one for key, one in changes.items()}}
        replace(plan, values={key: one for key, one in values.items() if one is not None}).write(file)
        return file

    return make


def test_what_goes_without_saying(changed: Callable[..., Path]) -> None:
    """Files of llama.cpp's own converter leave keys out."""
    usual = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    found = gguf_shape(changed("gemma2", **dict.fromkeys(usual)))
    assert (found.attention_softcap, found.logit_softcap, found.windows) == (50.0, 30.0, (4096, 0))
    found = gguf_shape(
        changed("gemma3", **{"rope.freq_base_swa": None, "attention.sliding_window_pattern": 1})
    )
    assert found.windows == () and found.window_rope_base == 0.0
    found = gguf_shape(changed("gemma3", **{"attention.sliding_window_pattern": [0, 1]}))
    assert found.windows == (0, 9) and found.window_rope_base == 10_000.0
    found = gguf_shape(changed("granite", **{"attention.scale": None, "residual_scale": 0.0}))
    assert (found.attention_scale, found.residual_scale) == (0.0, 1.0)
    # llama.cpp leaves Phi-3's window out; the model was trained with it.
    assert gguf_shape(changed("phi3", **{"attention.sliding_window": 20})).windows == (20, 20)
    assert gguf_shape(changed("phi3", **{"attention.sliding_window": 0})).windows == ()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "must say yes or no for each of 2 layers"),
        ("gemma3", {"attention.sliding_window_pattern": "often"}, "must be a whole number, not 'often'"),
        ("gemma3", {"attention.sliding_window": 2.5}, "must be a whole number, not 2.5"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be positive, not 0.0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("granite", {"logit_scale": None}, "granite.logit_scale must be a number, not None"),
        ("granite", {"rope.scaling.finetuned": False}, "granite without rotary positions is not supported"),
        (
            "gpt_neox",
            {"use_parallel_residual": None},
            "use_parallel_residual must be true or false, not None",
        ),
        ("olmo3", {"rope.freq_base_swa": 10_000.0}, "olmo2 with a second rotary base is not supported"),
        ("qwen2", {"attention.sliding_window": 8}, "qwen2.attention.sliding_window = 8 is not supported"),
        ("qwen2", {"rope.dimension_count": 8}, "rope.dimension_count differs from the head size 16"),
        ("phi3", {"rope.dimension_count": 7}, "rotary_dim 7 is not even"),
        ("smollm3", {"block_count": 1 << 30}, "1073741824 blocks in it"),
        ("gemma2", {"block_count": 46, "attention.head_count": 99}, "46 blocks in it"),
        ("granite", {"logit_scale": float("inf")}, "logit_scale 0.0 is not a positive number"),
        ("granite", {"embedding_scale": float("nan")}, "embed_scale is nan, which no computer can use"),
        ("gemma3", {"attention.sliding_window": (1 << 31) - 1}, "windows are (2147483647, 0)"),
    ],
)
def test_damaged_or_strange(
    name: str, changes: dict[str, Any], message: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_gguf(changed(name, **changes))
    assert str(caught.value).count("\n") == 0


def test_the_activation_of_a_gptneox_file(file: Path) -> None:
    """A key of ours says which GELU; without it the exact one is meant."""
    plan = plan_gguf(parts_of(CARRIED["gpt_neox-in-turn"][1], None))
    plan.write(file)
    assert gguf_shape(file).activation == "gelu_tanh"
    replace(plan, values={key: one for key, one in plan.values.items() if key != OWN_ACTIVATION}).write(file)
    assert gguf_shape(file).activation == "gelu"
    replace(plan, values={**plan.values, OWN_ACTIVATION: "sine"}).write(file)
    with pytest.raises(UserError, match=r"chatwright\.activation is 'sine', not gelu or gelu_tanh"):
        load_gguf(file)
