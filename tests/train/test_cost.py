"""Operations, energy and money: formulae worked by hand, meters from a made-up directory, nothing where
nothing is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import runtime
from chatwright.metrics import read_metrics
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig, add_lora
from chatwright.tokenizer import Tokenizer
from chatwright.trackers import Reporting
from chatwright.train import cost
from chatwright.train.cost import EnergyMeter, cost_row, forward_flop, iterations_spent, training_flop


def test_the_formula_by_hand() -> None:
    """One block of width 8, 2 heads of 4, MLP 32, vocabulary 16, no biases: 4 x 64 + 2 x 256 in the block,
    128 in the head."""
    shape = {
        "vocab_size": 16,
        "context": 10,
        "layers": 1,
        "width": 8,
        "heads": 2,
        "bias": False,
        "norm": "rms",
        "position": "rotary",
        "activation": "gelu",
    }
    norms = 3 * 8
    for tied in (True, False):
        model = GPT(GPTConfig(**{**shape, "tied": tied}))  # type: ignore[arg-type]
        products = 4 * 64 + 2 * 256 + 128 + norms
        assert training_flop(model, 10) == 10 * (6 * products + 12 * 1 * 2 * 4 * 10)
    learned = GPT(GPTConfig(**{**shape, "position": "learned"}))  # type: ignore[arg-type]
    assert training_flop(learned, 10) == 10 * (
        6 * products + 960
    )  # a table of positions is only looked up in


def test_the_formula_against_a_count_of_what_torch_does() -> None:
    """torch counts the products alone: norms and biases are the difference. Attention in its plain form, as
    torch does not count the fused one on CPUs; the causal half is counted whole by both."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(GPTConfig.preset("gpt2", layers=2, width=128, heads=4, context=64, vocab_size=512))
    model.use_attention(plain_attention)
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert training_flop(model, 64) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_frozen_parameters_cost_two_thirds() -> None:
    """The same count under an adapter. What is frozen below the lowest adapter needs no gradient at all,
    which is little."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(GPTConfig.preset("gpt2", layers=4, width=128, heads=4, context=64, vocab_size=512))
    model.use_attention(plain_attention)
    whole = training_flop(model, 64)
    add_lora(model, LoRAConfig(rank=8))
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(1))).sum().backward()
    assert training_flop(model, 64) == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert training_flop(model, 64) < 0.8 * whole


def meter(place: Path, name: str, joules: float) -> None:
    directory = place / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (directory / "max_energy_range_uj").write_text("1000000000\n")  # begins anew at 1,000 J


def test_meters_are_summed_over_packages_and_begin_anew_at_their_maximum(tmp_path: Path) -> None:
    for name, joules in (("intel-rapl:0", 100.0), ("intel-rapl:1", 990.0), ("intel-rapl:0:0", 50.0)):
        meter(tmp_path, name, joules)
    watch = EnergyMeter(tmp_path)
    assert watch.spent() == 0.0
    for name, joules in (("intel-rapl:0", 130.0), ("intel-rapl:1", 5.0), ("intel-rapl:0:0", 80.0)):
        meter(tmp_path, name, joules)
    assert watch.spent() == pytest.approx(30 + 15)  # 0:0 is a part of 0
    assert watch.spent() == 0.0
    assert EnergyMeter(tmp_path / "nowhere").spent() == 0.0


def test_what_is_not_known_is_absent() -> None:
    assert cost_row(Reporting(), flop=None, elapsed=10.0, joules=0.0, rate=5.0, peak=9.0) == {}
    assert cost_row(Reporting(), flop=7.0, elapsed=10.0, joules=0.0) == {"flop": 7.0}
    assert cost_row(Reporting(), flop=7.0, elapsed=10.0, joules=0.0, rate=5.0, peak=0.0) == {"flop": 7.0}


def test_energy_and_cost() -> None:
    row = cost_row(Reporting(watts=100.0, price=3.0), flop=None, elapsed=7200.0, joules=1.0)
    assert row == {"energy_kwh": pytest.approx(0.2), "cost": pytest.approx(6.0)}
    row = cost_row(Reporting(), flop=7.0, elapsed=7200.0, joules=1.8e6, rate=5.0, peak=20.0)
    assert row == {"flop": 7.0, "mfu": 0.25, "energy_kwh": pytest.approx(0.5)}


def test_the_peak_is_measured_once_and_leaves_the_random_stream_alone() -> None:
    runtime.matmul_peak.cache_clear()
    before = torch.get_rng_state()
    first = runtime.matmul_peak(torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert 1e8 < first < 1e16 and runtime.matmul_peak(torch.float32) == first
    assert cost.peak_of("fp32") == first * runtime.world_size()


def test_a_stage_tells_its_account(tokenizer_bench: Any, make_fit: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from chatwright.stages import pretrain
    from chatwright.train.workspace import Workspace

    config = pretrain.Config(preset="modern-nano", model={"context": 32}, fit=make_fit(steps=10))
    workspace = Workspace(
        tmp_path,
        3,
        tokenizer_bench.inputs,
        Reporting(watts=50.0, price=2.0),
        described=pretrain.STAGE.metrics,
    )
    report = pretrain.run(config, workspace)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    vocabulary = Tokenizer.load(tokenizer_bench.inputs["tokenizer"]).vocab_size
    model = GPT(GPTConfig.preset("modern-nano", context=32, vocab_size=vocabulary))
    assert [row["flop"] for row in rows] == [training_flop(model, 32) * 8 * step for step in (5, 10)]
    for row in rows:
        assert 0 < row["mfu"] < 1.5
        assert row["energy_kwh"] == pytest.approx(50 * row["elapsed"] / 3.6e6, abs=1e-7)
        assert row["cost"] == pytest.approx(2 * row["elapsed"] / 3600, abs=1e-6)
        assert row["matrix_learning_rate"] == pytest.approx(
            5 * row["learning_rate"], abs=1e-6
        )  # peaks 0.03 and 0.006
    assert (
        report.facts["flop"] == rows[-1]["flop"]
        and report.facts["cost"] > 0
        and report.facts["energy_kwh"] > 0
    )
    silent = pretrain.run(replace(config), Workspace(tmp_path / "silent", 3, tokenizer_bench.inputs))
    assert "cost" not in silent.facts and ("energy_kwh" in silent.facts) is bool(EnergyMeter().meters)


def test_reading_costs_a_third_and_a_reward_model_has_no_output_matrix() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = ScalarModel(GPTConfig.preset("gpt2", layers=2, width=128, heads=4, context=64, vocab_size=512))
    model.body.use_attention(plain_attention)
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert forward_flop(model.body, 64) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert training_flop(model.body, 64) == 3 * forward_flop(model.body, 64)


def test_rounds_by_hand() -> None:
    """Two rounds of 4 answers of 5 tokens behind 3 of a prompt, the second without an update."""
    policy, critic = (
        GPT(GPTConfig.preset("modern-nano", vocab_size=64, context=16, layers=layers)) for layers in (2, 1)
    )
    rows = [
        {"step": 0, "tokens": 20.0, "length": 5.0, "policy_loss": 0.1},
        {"step": 1, "tokens": 20.0, "length": 5.0},
    ]
    found = iterations_spent(
        rows, 3.0, read=[policy, policy, critic], trained=[policy, critic], epochs=2, text=7.0
    )
    each, other = forward_flop(policy, 8), forward_flop(critic, 8)
    learnt = 2 * 4 * (training_flop(policy, 8) + training_flop(critic, 8))
    assert found == {"tokens": 40.0, "flop": pytest.approx(2 * 4 * (3 * each + other) + learnt + 7.0)}
    broken: list[dict[str, Any]] = [{"step": 0}, {"step": 1, "tokens": None, "length": None}]
    assert iterations_spent(broken, 3.0, read=[policy], trained=[policy], epochs=1) == {
        "tokens": 0.0,
        "flop": 0.0,
    }
