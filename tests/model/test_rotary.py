"""Stretched rotary positions: rates worked by hand, and settings that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from chatwright.config import UserError
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.rotary import rotary_rates
from chatwright.model.rotary_scaling import RotaryScaling

BASE = GPTConfig.preset(
    "modern-nano", vocab_size=31, width=16, heads=2, head_dim=8, mlp_width=20, rope_base=1e4
)
PLAIN = [1.0, 0.1, 0.01, 0.001]  # 10000 ** (-2 i / 8)


def rates(scaling: RotaryScaling | None) -> list[float]:
    found, factor = rotary_rates(replace(BASE, rope_scaling=scaling))
    assert factor == (1.0 if scaling is None else scaling.attention_factor)
    return found.tolist()


def test_linear() -> None:
    assert rates(None) == pytest.approx(PLAIN)
    assert rates(RotaryScaling("linear", 4.0)) == pytest.approx([rate / 4 for rate in PLAIN])


def test_llama3() -> None:
    """Original context 1000: the pairs make 159, 15.9, 1.59 and 0.159 turns; limits are 1 and 4."""
    found = rates(RotaryScaling("llama3", 8.0, 1_000, 1.0, 4.0))
    kept = (1_000 * 0.01 / (2 * math.pi) - 1) / 3
    assert found == pytest.approx([1.0, 0.1, 0.01 * kept + 0.01 / 8 * (1 - kept), 0.001 / 8])


def test_yarn() -> None:
    """1.59 turns for pair 2, 159 for pair 0: between the limits 40 and 2 lies the pair number's ramp."""
    low, high = (8 * math.log(1_000 / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (40, 2))
    assert 0 < low < 1 < high < 2
    scaling = RotaryScaling("yarn", 4.0, 1_000, 2.0, 40.0, attention_factor=1.5)
    # To whole pairs: from 0 to 2.
    assert rates(scaling) == pytest.approx([1.0, 0.1 * (1 + 1 / 4) / 2, 0.01 / 4, 0.001 / 4])
    blend = (1 - low) / (high - low)
    exact = [1.0, 0.1 * (1 - blend) + 0.1 / 4 * blend, 0.01 / 4, 0.001 / 4]
    assert rates(replace(scaling, whole_pairs=False)) == pytest.approx(exact)


def test_divisors_come_first() -> None:
    assert rates(RotaryScaling("linear", 2.0, divisors=(1, 2, 4, 8))) == pytest.approx(
        [0.5, 0.025, 0.00125, 0.0000625]
    )


def test_the_factor_is_on_cosine_and_sine() -> None:
    model = GPT(replace(BASE, rope_scaling=RotaryScaling("linear", 2.0, attention_factor=1.25)))
    angles = model.angles(torch.tensor([[0, 6]]))
    assert angles is not None
    cos, sin = angles
    assert cos[0, 0, 0].tolist() == [1.25] * 4
    assert cos[0, 0, 1].tolist() == pytest.approx([1.25 * math.cos(3 * rate) for rate in PLAIN])
    assert sin[0, 0, 1].tolist() == pytest.approx([1.25 * math.sin(3 * rate) for rate in PLAIN])


def test_usual_attention_factor() -> None:
    assert RotaryScaling.usual_attention_factor(math.e) == pytest.approx(1.1)
    assert RotaryScaling.usual_attention_factor(math.e, 2.0) == pytest.approx(1.2)
    assert RotaryScaling.usual_attention_factor(0.5) == 1.0


@pytest.mark.parametrize(
    "scaling",
    [
        RotaryScaling("linear", 2.0, divisors=(1.0, 2.5, 4.0, 8.0)),
        RotaryScaling("llama3", 8.0, 64),
        RotaryScaling("yarn", 4.0, 64, 1.0, 32.0, False, 1.1),
    ],
)
def test_survives_json(scaling: RotaryScaling) -> None:
    config = replace(BASE, rope_scaling=scaling)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_checkpoints_of_earlier_versions() -> None:
    values = BASE.to_dict()
    del values["rope_scaling"]
    assert GPTConfig.from_dict(values) == BASE


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "dynamic"}, "rope_scaling.kind is 'dynamic'; it can be linear, llama3, yarn"),
        ({"kind": "linear", "fctor": 2.0}, "unknown fields fctor"),
        ({"factor": 2.0}, "missing 1 required positional argument: 'kind'"),
        ({"kind": "linear", "factor": "2"}, "rope_scaling.factor is '2', not of type float"),
        ({"kind": "linear", "factor": 0.0}, "must be positive"),
        ({"kind": "linear", "factor": float("nan")}, "rope_scaling.factor is nan"),
        ({"kind": "linear", "divisors": [1.0, 2.0]}, "2 divisors of rotary rates for 4 pairs"),
        ({"kind": "linear", "divisors": [1.0, 2.0, 0.0, 1.0]}, "must be positive"),
        ({"kind": "linear", "divisors": 7}, "not iterable"),
        ({"kind": "yarn", "factor": 2.0}, "yarn scaling needs an original_context, not 0"),
        ({"kind": "llama3", "original_context": 8, "low_turns": 4.0}, "4.0 is no limit below 4.0 turns"),
        ([], "rope_scaling is [], not an object"),
    ],
)
def test_refused(scaling: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        GPTConfig.from_dict({**BASE.to_dict(), "rope_scaling": scaling})
    assert message in str(caught.value)


def test_refused_with_other_positions() -> None:
    with pytest.raises(UserError, match="rope_scaling is for rotary positions"):
        GPTConfig.preset("gpt2", rope_scaling=RotaryScaling("linear", 2.0))
    with pytest.raises(UserError, match=r"rope_base 1\.0 is too small"):
        replace(BASE, rope_base=1.0, rope_scaling=RotaryScaling("yarn", 4.0, 64, 1.0, 32.0))
