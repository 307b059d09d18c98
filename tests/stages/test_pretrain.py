"""Pre-training on a made-up English: it learns, its measure is what it says, its windows do not depend on
portions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatwright import checkpoint, files
from chatwright.config import UserError
from chatwright.data.loader import SampleOrder
from chatwright.data.shards import TokenShards
from chatwright.language_model import load_parts
from chatwright.metrics import read_metrics
from chatwright.objectives.language import bits_per_byte, next_token_loss
from chatwright.stages import pretrain
from chatwright.stages.pretrain import TokenBatch, Windows
from chatwright.train.held_out import held_out_bits_per_byte


def shards_of(*lengths: int, text_bytes: int = 100) -> TokenShards:
    arrays = [np.arange(100 * n, 100 * n + length, dtype="<u2") % 96 for n, length in enumerate(lengths)]
    return TokenShards(tuple(arrays), sum(lengths), text_bytes, 1, "x")


@pytest.mark.learns
def test_it_learns_far_more_than_the_frequencies_of_bytes(pretrain_bench: Any, learnt: Any) -> None:
    """The bound is what a byte costs under the order-0 frequencies of the held-out text itself."""
    result = files.read_json(pretrain_bench.inputs["pretrain"] / "result.json")
    lines = (pretrain_bench.inputs["data"] / "validation.jsonl").read_text().splitlines()
    counts = Counter(b"".join(json.loads(line)["text"].encode() for line in lines))
    total = sum(counts.values())
    order_0 = -sum(count / total * math.log2(count / total) for count in counts.values())
    assert order_0 > 3.5
    state = checkpoint.Checkpoint(pretrain_bench.inputs["pretrain"] / result["model"]).state()
    before = state["progress"]["extra"]["before"]["bits_per_byte"]
    after = state["progress"]["extra"]["after"]["bits_per_byte"]
    vocabulary = math.log2(400)  # a fresh model gives each of the 400 tokens about the same chance
    assert before == pytest.approx(vocabulary * held_out_tokens_per_byte(pretrain_bench), rel=0.05)
    learnt("bits per byte, as a share of those before", after / before, below=0.6)
    learnt("bits per byte, as a share of order 0", after / order_0, below=0.5)


def held_out_tokens_per_byte(bench: Any) -> float:
    shards = TokenShards.open(bench.inputs["tokenizer"] / "validation")
    return (shards.tokens - len(shards.arrays)) / shards.text_bytes


def test_the_saved_model_is_the_one_that_was_measured(pretrain_bench: Any) -> None:
    directory = pretrain_bench.inputs["pretrain"]
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(5, 121, 5))
    assert rows[-1]["step"] == 120 and "bits_per_byte" in rows[-1]
    parts = load_parts(directory)
    held_out = TokenShards.open(pretrain_bench.inputs["tokenizer"] / "validation", parts.tokenizer)
    with torch.no_grad():
        again = held_out_bits_per_byte(parts.model.eval(), held_out, context=64, dtype=torch.float32)
    assert again == pytest.approx(rows[-1]["bits_per_byte"], abs=1e-5)
    assert parts.template is None  # a base model has none


def test_the_report_compares_with_compressors(pretrain_bench: Any) -> None:
    directory = pretrain_bench.inputs["pretrain"]
    report = pretrain_bench.run(
        pretrain, pretrain.Config(**{**vars_of(), "preset": "modern-nano"}), directory
    )
    names = [measure.name for measure in report.measures]
    assert names == ["bits per byte, held out", "gzip -9, the same text", "xz -9, the same text"]
    assert all(0 < measure.after < 8 for measure in report.measures)
    assert report.facts["steps"] == 120 and report.facts["tokens"] == 120 * 8 * 64


def vars_of() -> dict[str, Any]:
    from chatwright.train.fit_config import FitConfig

    return {
        "model": {"context": 64},
        "fit": FitConfig(steps=120, batch_size=8, compile=False, precision="fp32"),
    }


def test_the_step_of_a_model_with_a_soft_cap_is_that_of_its_logits(lively_gpt: Callable[..., Any]) -> None:
    plain = lively_gpt()
    model = pretrain.GPT(replace(plain.config, logit_softcap=1.5))
    model.load_state_dict(plain.state_dict())
    tokens = torch.arange(18).view(2, 9)
    expected = float(next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).detach())
    batch = pretrain.TokenBatch(tokens)
    assert float(pretrain.step(model, batch).loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert abs(float(pretrain.step(plain, batch).loss.detach()) - expected) > 0.1


@torch.no_grad()
def test_bits_per_byte_of_a_model_that_knows_nothing(lively_gpt: Callable[..., Any]) -> None:
    model = lively_gpt()
    model.head.weight.zero_()  # every token has chance 1 / 96
    # 50 + 34 + 7 tokens are 49 + 33 + 6 targets of log2(96) bits each, over 200 bytes
    found = held_out_bits_per_byte(
        model, shards_of(50, 34, 7, text_bytes=200), context=8, dtype=torch.float32
    )
    assert found == pytest.approx(88 * math.log2(96) / 200, rel=1e-5)


@torch.no_grad()
def test_bits_per_byte_sums_over_stretches_of_any_length(lively_gpt: Callable[..., Any]) -> None:
    model, shards = lively_gpt(3), shards_of(300, 23, 2)
    nats = 0.0
    for stretch in shards.stretches(8):
        log_p = model(stretch[None, :-1])[0].log_softmax(-1)
        nats -= float(log_p.gather(1, stretch[1:, None]).sum())
    found = held_out_bits_per_byte(model, shards, context=8, dtype=torch.float32)
    assert found == pytest.approx(bits_per_byte(nats, 100), rel=1e-5)


def test_windows_do_not_depend_on_the_portions() -> None:
    shards = shards_of(90, 70)
    windows = Windows(shards, 8, SampleOrder(shards.windows(8), 5))
    whole = windows.take(3, 40).tokens
    assert whole.shape == (40, 9)
    assert torch.equal(torch.cat([windows.take(3 + n, 4).tokens for n in range(0, 40, 4)]), whole)


def test_the_weight_is_the_number_of_targets_and_targets_follow_their_inputs(
    lively_gpt: Callable[..., Any],
) -> None:
    batch = TokenBatch(torch.randint(96, (3, 9), generator=torch.Generator().manual_seed(2)))
    assert batch.weight == 24.0
    model = lively_gpt(4)
    with torch.no_grad():
        log_p = model(batch.tokens).log_softmax(-1)
        right = -log_p[:, :-1].gather(2, batch.tokens[:, 1:, None]).sum()
        shifted = (
            -log_p[:, :-1].gather(2, batch.tokens[:, :-1, None]).sum()
        )  # the mutation: predict the input itself
        found = pretrain.step(model, batch).loss
    torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-6)  # a sum of 24 terms of about 10
    assert abs(float(found - shifted)) > 1.0


def test_too_little_text_for_one_window_says_so(tokenizer_bench: Any, tmp_path: Path) -> None:
    config = pretrain.Config(preset="modern-nano", model={"context": 10_000_000}, fit=vars_of()["fit"])
    with pytest.raises(
        UserError, match=r"less than one window of 10000000: add text, or set model.context to"
    ):
        tokenizer_bench.run(pretrain, config, tmp_path / "pretrain")


def test_text_that_fills_no_window_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    shards = shards_of(101, 45)  # one window of 64 of the first shard, none of the second
    assert pretrain.windows_of(shards, 64) == 1
    assert "82 of 146 training tokens fill no window of 64 and are left out" in capsys.readouterr().out
    assert pretrain.windows_of(shards_of(6_401), 64) == 100
    assert capsys.readouterr().out == ""  # one token


def test_text_shorter_than_a_window_names_the_setting() -> None:
    with pytest.raises(
        UserError, match=r"has 60 tokens, less than one window of 64: add text, or set model\."
    ):
        pretrain.windows_of(shards_of(60), 64)
