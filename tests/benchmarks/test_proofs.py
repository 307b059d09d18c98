"""The programs of the proofs (benchmarks/frontier.py, hacking.py): their arithmetic, their judges, and
recipes that they can run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import frontier
import hacking
import measures
import pytest
import torch

from chatwright.data.examples import LabelledText
from chatwright.metrics import read_metrics
from chatwright.recipe import read_recipe
from chatwright.stages import ppo
from chatwright.train.rl import health
from chatwright.train.workspace import Workspace
from support.launching import ROOT
from support.planted import LEARNING, plant


def test_the_interval_over_seeds_is_students() -> None:
    mean, half = measures.over_seeds([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5, abs=2e-3)
    assert measures.over_seeds([1.5]) == (1.5, None)


def test_win_rates_count_every_pair_and_half_of_the_ties() -> None:
    mine, theirs = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 0.5], [2.0, 2.0]])
    assert measures.win_rates(mine, theirs).tolist() == [0.625, 0.5]  # won, won, tie, lost
    torch.testing.assert_close(
        measures.win_rates(mine, theirs) + measures.win_rates(theirs, mine), torch.ones(2).double()
    )


def test_a_bag_of_words_learns_ratings_and_nothing_from_rare_words(babble: Any) -> None:
    draw = babble(3)
    texts = [LabelledText.of(*draw.rated()) for _ in range(300)]
    judge = measures.WordBag(texts[:200])
    assert judge.agreement(texts[200:]) > 0.9
    good, plain, bad = judge(["A happy, lovely day!", "The round house.", "A sad and AWFUL day."])
    assert good > 1 > plain > -1 > bad
    assert judge(["zzz qqq"]) == [pytest.approx(judge.mean)]
    with pytest.raises(ValueError):
        measures.WordBag([])


ROW = {
    "score_error": 0.05,
    "kl_error": 0.3,
    "entropy": 2.5,
    "length": 9.0,
    "finished": 0.9,
    "sampler_gap": 0.0,
    "sampler_error": 0.0,
    "tokens": 900.0,
    "distinct_2": 0.7,
    "gold_error": 0.02,
}


def test_a_replay_keeps_the_best_until_the_gold_turns() -> None:
    gold = [0.2, 0.3, 0.5, 0.6, 0.55, 0.4, 0.3, 0.2, 0.9]
    rows = [
        {**ROW, "gold": value, "fixed_gold": value, "score": 0.1 * n, "kl": 0.5 * n, "fixed_kl": 0.5 * n}
        for n, value in enumerate(gold)
    ]
    stop, kept, why = measures.replay(rows, health.Limits(kl_budget=100.0, patience=2))
    assert (stop, kept) == (5, 3) and "exploited" in why  # 0.55 in rounds 2 and 3, 0.475 in rounds 4 and 5
    assert measures.replay(rows, health.Limits(kl_budget=100.0, patience=9)) == (8, 8, "all iterations done")
    assert measures.replay(rows, health.Limits(kl_budget=0.9, patience=9))[:2] == (2, 1)
    every = [row if n % 2 else {**row, "fixed_gold": 0.0} for n, row in enumerate(rows)]
    del every[3]["fixed_gold"]  # the best round is no candidate
    assert measures.replay(every, health.Limits(kl_budget=100.0, patience=9))[:2] == (8, 5)
    with pytest.raises(ValueError):
        measures.replay([{**rows[0], "kl": 5.0}], health.Limits(kl_budget=1.0))


@pytest.mark.slow
@pytest.mark.learns
def test_a_replay_is_the_run_that_stops(
    sft_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage with patience against one that never stops: the same rounds, and the same round is kept."""
    plant(monkeypatch, "sad awful bad cruel bitter dull")
    bench = sft_bench.with_(reward=sft_bench.inputs["sft"])
    on = replace(LEARNING, gold="sentiment", patience=1000)
    bench.run(ppo, on, tmp_path / "on")
    stopped = bench.run(ppo, replace(on, patience=3), tmp_path / "stopped").facts
    rows = read_metrics(tmp_path / "on" / "metrics.jsonl")
    stop, kept, why = measures.replay(rows, health.Limits(1e9, 3))
    assert (
        len(rows) == 13
        and stop < 12
        and (stop, kept, why) == (stopped["rounds"], stopped["best"]["step"], stopped["stopped"])
    )


@pytest.mark.learns
def test_a_policy_is_measured_beside_the_one_it_came_from(
    reward_bench: Any, tmp_path: Path, learnt: Any
) -> None:
    config = replace(LEARNING, iterations=4, min_correlation=-1.0)
    reward_bench.run(ppo, config, tmp_path / "policy")
    inputs = reward_bench.inputs
    table = frontier.table_of(
        config,
        Workspace(tmp_path, 5, inputs),
        {"long": lambda texts: [float(len(text)) for text in texts]},
        str(inputs["sft"]),
    )
    before = table.measure(table.base)
    own = table.measure(table.base, before).row()
    assert own["kl"] == pytest.approx(0.0, abs=1e-6) and own["wins_gold"] == own["wins_long"] == 0.5
    assert own["prompts"] * own["samples"] == before.by_prompt["gold"].numel() == 4 * len(own["raw"]["kl"])
    assert (
        own["fluency_low"] <= own["fluency"] <= own["fluency_high"] < 0
    )  # which is the base's own likelihood here
    row = table.measure(frontier.ready(str(tmp_path / "policy")), before).row()
    learnt("KL", row["kl"], above=0.0)
    assert row["kl_low"] <= row["kl"] <= row["kl_high"] and row["score"] != own["score"]


CURVE = {"1": {"kl": 0.0, "gold": 0.2, "score": -1.0}, "4": {"kl": 1.0, "gold": 0.4, "score": 0.0}}


def test_at_equal_kl() -> None:
    assert frontier.at_equal_kl({"kl": 0.5, "gold": 0.35}, CURVE, "gold") == pytest.approx(0.05)
    assert frontier.at_equal_kl({"kl": 2.0, "gold": 0.35}, CURVE, "gold") is None
    assert frontier.at_equal_kl({"kl": 0.5, "gold": 0.35}, None, "gold") is None


def test_the_table_shows_means_and_failures(tmp_path: Path) -> None:
    policy = {
        "kl": 0.5,
        "score": 0.1,
        "distinct_2": 0.7,
        "length": 9.0,
        "finished": 1.0,
        "wins_gold": 0.6,
        "wins_gold_low": 0.5,
        "wins_gold_high": 0.7,
        "tax": [20.0, 25.0],
    }
    band = {
        f"{key}_{side}": value for key, value in (("score", 0.1), ("gold", 0.35)) for side in ("low", "high")
    }
    curve = {n: {**point, **band} for n, point in CURVE.items()}
    samples = {
        "other/seed-1": {"ppo": {"failed": "not asked"}},
        "mine/seed-1": {
            "bestofn": {"curve": curve},
            "ppo": {**policy, **band, "gold": 0.3},
            "reinforce": {"failed": "too weak"},
        },
        "mine/seed-2": {"bestofn": {"curve": curve}, "ppo": {**policy, **band, "gold": 0.4}},
    }
    stages = frontier.gathered(samples, "mine")
    text = "\n".join(frontier.table(stages))
    assert "| ppo | 2 | 0.50 ± 0.00 | 0.10 ± 0.00 | 0.350 ± 0.6" in text and "| 0.050 ± 0.6" in text
    assert (
        "| reinforce | seed-1 | failed: too weak |" in text
        and "| best of 4 | 2 | 1.00 |" in text
        and "not asked" not in text
    )
    assert (
        frontier.extras(stages)[0]
        == "ppo, seed-1: wins_gold 0.600 (0.500 to 0.700); perplexity of general text 20.00 -> 25.00"
    )
    frontier.draw(stages, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5_000


def test_the_verdict_on_early_stopping(tmp_path: Path) -> None:
    def point(kl: float, gold: float, score: float) -> dict[str, float]:
        return {
            "kl": kl,
            "gold": gold,
            "score": score,
            **{
                f"{key}_{side}": value
                for key, value in (("gold", gold), ("score", score))
                for side in ("low", "high")
            },
        }

    points = {"0": point(0, 0.2, -1), "4": point(3, 0.6, 0), "8": point(5, 0.7, 1), "12": point(30, 0.1, 3)}
    found = {"checkpoints": points, "kept": 4, "stop": 9, "proxy": {"held_out_correlation": 0.3}}
    told = hacking.verdict(found)
    assert (
        told["peak_round"] == 8
        and told["share"] == pytest.approx(6 / 7)
        and told["share_of_gain"] == pytest.approx(0.8)
    )
    assert told["end"] == 0.1 and told["proxy_at_end"] == 3
    samples = {"seed-1": found, "seed-2": {"failed": "collapsed"}}
    assert hacking.table(samples)[2].startswith(
        "| seed-1 | 0.300 | 0.200 | 8, 5.0, 0.700 | 9 | 4, 3.0, 0.600 | 0.86 | 0.80 |"
    )
    assert "failed: collapsed" in hacking.table(samples)[3]
    hacking.draw(samples, tmp_path / "hacking.png")
    assert (tmp_path / "hacking.png").stat().st_size > 5_000


BASE_STAGES = ("data", "tokenizer", "pretrain", "sft", "reward")
"""Of recipes/sentiment.yaml, once for all seeds."""


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_can_be_read_and_its_inputs_exist(file: Path) -> None:
    """Settings are known to their stages, and what a stage needs is a stage before it, a named model, or made
    by another recipe."""
    recipe = read_recipe(file, {})
    assert recipe.name == file.stem and recipe.stages
    before: set[str] = set()
    base = BASE_STAGES if file.stem == "hacking" else ()
    for stage in recipe.stages.values():
        for name in stage.inputs:
            assert name in before or name == "smollm2" or name.removeprefix("runs/sentiment/base/") in base
        before.add(stage.name)
    header = file.read_text(encoding="utf-8").partition("\nname:")[0]
    assert all(word in header for word in ("# Data ", "# Hardware ", "# Run ", "# Measured ")), (
        "say what it takes and what came of it"
    )
