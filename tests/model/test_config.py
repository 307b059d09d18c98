"""GPTConfig: defaults, names, and errors that say what to do."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatwright.config import UserError
from chatwright.model.config import PRESETS, GPTConfig

SMALL: dict[str, Any] = {"vocab_size": 11, "context": 8, "layers": 1, "width": 12, "heads": 3}
TWO: dict[str, Any] = {**SMALL, "layers": 2}
ROTARY: dict[str, Any] = {"position": "rotary"}


def test_derived_sizes() -> None:
    config = GPTConfig(**SMALL)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (3, 4, 48)
    config = GPTConfig(**SMALL, kv_heads=1, head_dim=6, mlp_width=20)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (1, 6, 20)


@pytest.mark.parametrize("name", PRESETS)
def test_dictionary_round_trip(name: str) -> None:
    config = GPTConfig.preset(name)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_preset_with_changes() -> None:
    config = GPTConfig.preset("gpt2", context=64, dropout=0.2)
    assert (config.context, config.dropout, config.width) == (64, 0.2, 768)
    assert GPTConfig.preset("gpt2").context == 1_024


def test_derived_sizes_follow_the_changes() -> None:
    config = GPTConfig.preset("gpt2", width=192, heads=4)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (4, 48, 768)
    config = GPTConfig.preset("gpt2", heads=6, kv_heads=2, mlp_width=100)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (2, 128, 100)
    config = GPTConfig.preset("smollm2-135m", layers=2, width=288)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (3, 32, 1_536)  # its own choices stay


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("gtp2", "gpt2"), ("gpt2-XL", "gpt2-xl"), ("modern_tiny", "modern-tiny"), ("smollm2", None)],
)
def test_unknown_preset_names_the_nearest(asked: str, meant: str | None) -> None:
    with pytest.raises(UserError) as caught:
        GPTConfig.preset(asked)
    expected = f"did you mean {meant or 'smollm2-135m'}?"
    assert str(caught.value) == f"no model shape is called {asked!r}; {expected}"


def test_hopeless_preset_lists_all() -> None:
    with pytest.raises(UserError, match="known: gpt1, gpt2"):
        GPTConfig.preset("zzzzzzzz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"heads": 0}, "at least 1"),
        ({"width": -12}, "at least 1"),
        ({"heads": 5}, "width 12 is not a multiple of heads 5; set head_dim"),
        ({"kv_heads": 2}, "heads 3 is not a multiple of kv_heads 2"),
        ({"position": "rotary", "head_dim": 5}, "even head_dim, not 5"),
        ({"position": "sinusoidal", "width": 9}, "even width, not 9"),
        ({"position": "relative"}, "position is 'relative'; it can be learned, sinusoidal, rotary"),
        ({"norm": "batch"}, "norm is 'batch'; it can be layer, rms"),
        ({"activation": "relu"}, "activation is 'relu'; it can be gelu,"),
        ({"logit_softcap": -1.0}, "logit_softcap -1.0 is neither"),
        ({"attention_softcap": -1.0}, "attention_softcap -1.0 is neither"),
        ({"attention_scale": -1.0}, "attention_scale -1.0 is neither"),
        ({"embed_scale": 0.0}, "embed_scale 0.0 is not a positive number"),
        ({"residual_scale": -1.0}, "residual_scale -1.0 is not a positive number"),
        ({"logit_scale": 0.0}, "logit_scale 0.0 is not a positive number"),
        ({"windows": (4, 0, 0)}, "3 windows for 2 layers; give one a layer"),
        ({"windows": (4, -1)}, "windows are (4, -1); each can be 0 to"),
        ({"windows": (4, 1.5)}, "windows is (4, 1.5), not a list of int values"),
        ({"windows": 4}, "windows is 4, not a list of int values"),
        ({**ROTARY, "rotary_layers": (1, 0)}, "rotary_layers is (1, 0), not a list of bool values"),
        ({"rotary_layers": (True, False)}, "rotary_layers and rotary_dim are for rotary positions"),
        ({"rotary_dim": 2}, "rotary_layers and rotary_dim are for rotary positions"),
        ({**ROTARY, "rotary_dim": 3}, "rotary_dim 3 is not even and up to 4"),
        ({**ROTARY, "rotary_dim": 6}, "rotary_dim 6 is not even and up to 4"),
        (
            {**ROTARY, "window_rope_base": 1e6},
            "window_rope_base is for rotary positions in layers with windows",
        ),
        ({**ROTARY, "windows": (4, 0), "window_rope_base": -1.0}, "window_rope_base -1.0 is negative"),
        ({"qkv_bias": 1}, "qkv_bias is 1, not true, false or null"),
        ({"qk_norm_whole": True}, "qk_norm_whole needs qk_norm"),
        ({"branch_norm": "behind"}, "branch_norm is 'behind'; it can be before, after, both"),
        ({"branch_norm": "after", "pre_norm": False}, "branch_norm and parallel are for pre_norm"),
        ({"parallel": True, "pre_norm": False}, "branch_norm and parallel are for pre_norm"),
        ({"parallel": True, "branch_norm": "both"}, "parallel goes with branch_norm before, not both"),
        ({"family": 3}, "family is 3, not a name"),
        ({"dropout": 1.0}, "dropout 1.0 is not in"),
        ({"dropout": -0.1}, "dropout -0.1 is not in"),
    ],
)
def test_impossible_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        GPTConfig(**{**TWO, **changes})
    assert message in str(caught.value)


def test_unknown_and_missing_fields() -> None:
    with pytest.raises(UserError, match="unknown fields colour, wdith"):
        GPTConfig.from_dict({**SMALL, "wdith": 3, "colour": "red"})
    with pytest.raises(UserError, match="vocab_size"):
        GPTConfig.from_dict({key: value for key, value in SMALL.items() if key != "vocab_size"})


def test_each_shape_has_one_spelling() -> None:
    """What says nothing is as if it were not given, so that equal shapes are equal."""
    plain = GPTConfig(**TWO, **ROTARY)
    said = {"windows": [0, 0], "rotary_layers": [True, True], "rotary_dim": 4, "qkv_bias": True}
    assert GPTConfig(**TWO, **ROTARY, **said, attention_scale=0.5) == plain
    windowed = GPTConfig(**TWO, **ROTARY, windows=(3, 0), window_rope_base=1e4)
    assert windowed.windows == (3, 0) and windowed.window_rope_base == 0.0  # the other layers' base
    assert replace(plain, family="llama") == plain  # a name computes nothing


def test_another_number_of_layers_repeats_what_is_said_of_each() -> None:
    config = GPTConfig(
        **{**TWO, **ROTARY, "layers": 3},
        windows=(5, 5, 0),
        rotary_layers=(False, True, True),
        window_rope_base=9.0,
    )
    assert config.with_layers(5).windows == (5, 5, 0, 5, 5)
    assert config.with_layers(4).rotary_layers == (False, True, True, False)
    assert replace(config, windows=(0, 5, 5)).with_layers(1).window_rope_base == 0.0


@given(
    heads=st.integers(1, 6),
    groups=st.integers(1, 4),
    head_dim=st.integers(1, 8).map(lambda half: 2 * half),
    position=st.sampled_from(["learned", "sinusoidal", "rotary"]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu", "geglu", "relu2"]),
)
def test_every_possible_shape_survives_json(
    heads: int, groups: int, head_dim: int, position: Any, activation: Any
) -> None:
    config = GPTConfig(
        vocab_size=5,
        context=4,
        layers=1,
        width=heads * groups * head_dim,
        heads=heads * groups,
        kv_heads=heads,
        position=position,
        activation=activation,
    )
    assert config.head_dim == head_dim
    assert set(config.to_dict()) == {field.name for field in fields(GPTConfig)}
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
