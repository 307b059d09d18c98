"""The papers' settings: tables that name fields that exist, and a comparison that is worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chatwright.optim import OptimConfig
from chatwright.stages import ppo, reinforce, reward, sft
from chatwright.train.paper import Paper, beside, shown

FACTS = {"epochs": 2.4, "k": 16, "max_prompt_tokens": 96, "max_new_tokens": 32}
"""What runs know at their end, limits that came from the data among them."""


@pytest.mark.parametrize("module", [sft, reward, ppo, reinforce], ids=lambda module: module.__name__)
def test_every_setting_of_a_table_is_one_of_the_stage(module: Any) -> None:
    rows = beside(module.PAPER, module.Config(), FACTS)
    assert [row["setting"] for row in rows] == [one.setting for one in module.PAPER]
    assert len({row["setting"] for row in rows}) == len(rows) and all(row["source"] for row in rows)
    assert any(row["same"] for row in rows) and not all(row["same"] for row in rows)


def test_a_setting_that_is_made_equal_is_no_longer_a_difference() -> None:
    before = {row["setting"]: row for row in beside(ppo.PAPER, ppo.Config(), {})}
    assert not before["beta"]["same"] and before["beta"]["ours"] == 0.15 and before["beta"]["paper"] == "0.02"
    after = {
        row["setting"]: row for row in beside(ppo.PAPER, replace(ppo.Config(), beta=0.02, kl_target=0.0), {})
    }
    assert after["beta"]["same"] and after["kl_target"]["same"]
    assert {key for key in after if after[key]["same"] != before[key]["same"]} == {"beta", "kl_target"}


def test_what_is_worked_out_and_what_lies_in_a_setting_of_settings() -> None:
    config = ppo.Config(iterations=500, batch_size=512, minibatch_size=64)
    rows = {row["setting"]: row for row in beside(ppo.PAPER, config, {})}
    assert rows["answers in all (iterations x batch_size)"]["same"]
    assert rows["batch_size"]["same"] and rows["minibatch_size"]["same"]
    slow = replace(reward.Config(), optim=OptimConfig(learning_rate=9e-6, schedule="cosine", final=0.1))
    judged = {row["setting"]: row["same"] for row in beside(reward.PAPER, slow, {"epochs": 1.0, "k": 16})}
    assert judged["optim.learning_rate"] and judged["optim.final"] and judged["passes over the comparisons"]
    assert not judged["k"]  # 16, and the paper has 4 to 9


def test_limits_from_the_data_are_those_of_the_run() -> None:
    def ours(config: ppo.Config, **facts: int) -> dict[str, Any]:
        return {row["setting"]: row["ours"] for row in beside(ppo.PAPER, config, facts)}

    known = ours(ppo.Config(), max_prompt_tokens=88, max_new_tokens=136)
    assert (known["max_prompt_tokens"], known["max_new_tokens"]) == (88, 136)
    assert "max_new_tokens" not in ours(ppo.Config())
    assert ours(ppo.Config(max_new_tokens=32))["max_new_tokens"] == 32
    assert next(row["ours"] for row in beside(reward.PAPER, reward.Config(), {"k": 2})) == 2


def test_what_is_not_known_of_a_run_is_left_out() -> None:
    assert "passes over the conversations" not in [
        row["setting"] for row in beside(sft.PAPER, sft.Config(), {})
    ]


def test_agreement() -> None:
    ranged = Paper("k", (4, 9), "")
    assert ranged.agrees(4) and ranged.agrees(9) and not ranged.agrees(3) and not ranged.agrees(10)
    rate = Paper("x", 9e-6, "")
    assert rate.agrees(9.05e-6) and not rate.agrees(9.2e-6)
    assert Paper("x", 0.0, "").agrees(0.0) and not Paper("x", 0.0, "").agrees(1e-9)
    assert Paper("x", "cosine", "").agrees("cosine") and not Paper("x", "cosine", "").agrees("linear")
    assert (shown((4, 9)), shown(9e-6), shown(0.02), shown("cosine"), shown(256_000)) == (
        "4 to 9",
        "9e-06",
        "0.02",
        "cosine",
        "256000",
    )
