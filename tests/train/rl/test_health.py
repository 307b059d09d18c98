"""Each rule of the watch over a run: broken by a planted history, and silent on a healthy one."""

from __future__ import annotations

import pytest

from chatwright.train.rl.health import (
    BFLOAT16,
    WATCHED,
    Limits,
    diagnose,
    diagnose_ratio,
    diagnose_reward,
    past_peak,
)

HEALTHY = {
    "score": 0.2,
    "score_error": 0.05,
    "kl": 2.0,
    "kl_error": 0.3,
    "entropy": 2.5,
    "explained_variance": 0.2,
    "length": 14.0,
    "finished": 0.9,
    "sampler_gap": 1e-5,
    "sampler_error": 1e-6,
    "tokens": 900.0,
    "distinct_2": 0.7,
    "gold": 0.3,
    "gold_error": 0.05,
}
LIMITS = Limits(kl_budget=10.0)
PATIENT = Limits(kl_budget=10.0, patience=4)


def history(rounds: int, **changes: float) -> list[dict[str, float]]:
    """Healthy rounds; the last `rounds` of twenty changed."""
    return [HEALTHY] * (20 - rounds) + [{**HEALTHY, **changes}] * rounds


def test_a_healthy_run_goes_on_from_its_first_round() -> None:
    assert set(WATCHED) == set(HEALTHY)
    plain = {
        key: value
        for key, value in HEALTHY.items()
        if key not in ("gold", "gold_error", "explained_variance")
    }
    for length in range(1, 21):
        for row in (HEALTHY, plain):  # with and without gold and critic
            assert diagnose([row] * length, LIMITS) is None and diagnose([row] * length, PATIENT) is None


BROKEN = [
    # rounds it takes, what is wrong, words of the diagnosis, fatal, the same at the edge of what is allowed
    (1, {"sampler_gap": 0.02}, "sampler and trainer disagree", True, {"sampler_gap": 0.009}),
    (1, {"sampler_error": 0.003}, "sampler and trainer disagree", True, {"sampler_error": 0.0015}),
    (1, {"kl": -2.0, "kl_error": 0.1}, "clearly negative", True, {"kl": -2.0, "kl_error": 0.6}),
    (1, {"kl": -2.0, "kl_error": 0.1}, "clearly negative", True, {"kl": -0.4, "kl_error": 0.01}),
    (
        1,
        {"kl": -2.0, "kl_error": 0.1},
        "clearly negative",
        True,
        {"kl": -2.0, "kl_error": 0.1, "tokens": 400.0},
    ),
    (1, {"kl": 9.0}, "KL jumped from 2.0 to 9.0", False, {"kl": 6.9}),
    (1, {"kl": 9.0}, "KL jumped from 2.0 to 9.0", False, {"kl": 9.0, "kl_error": 2.0}),
    (1, {"kl": 10.1}, "beyond the budget of 10 nats", False, {"kl": 6.9}),
    (3, {"entropy": 0.05}, "collapse", False, {"entropy": 0.11}),
    (3, {"finished": 0.01}, "comes to its end any more", False, {"finished": 0.03}),
    (5, {"explained_variance": -1.5}, "critic", True, {"explained_variance": -0.9}),
]


@pytest.mark.parametrize(("rounds", "wrong", "words", "fatal", "edge"), BROKEN, ids=lambda value: str(value))
def test_each_rule(
    rounds: int, wrong: dict[str, float], words: str, fatal: bool, edge: dict[str, float]
) -> None:
    found = diagnose(history(rounds, **wrong), LIMITS)
    assert found is not None and words in found.text and found.fatal is fatal
    if rounds > 1:  # a shorter spell is let pass
        assert diagnose(history(rounds - 1, **wrong), LIMITS) is None
    assert diagnose(history(rounds, **edge), LIMITS) is None


def test_a_jump_beyond_the_budget_is_told_with_it() -> None:
    found = diagnose(history(1, kl=14.0), LIMITS)
    assert found is not None and "beyond the budget" in found.text and "jumped from 2.0 to 14.0" in found.text


def test_a_spell_that_is_over_does_not_count() -> None:
    for rounds, wrong in ((3, {"entropy": 0.05}), (3, {"finished": 0.0}), (5, {"explained_variance": -9.0})):
        assert diagnose([*history(rounds, **wrong), HEALTHY], LIMITS) is None


def test_a_young_critic_may_be_wrong() -> None:
    assert diagnose([{**HEALTHY, "explained_variance": -9.0}] * 14, LIMITS) is None
    assert diagnose([{**HEALTHY, "explained_variance": -9.0}] * 15, LIMITS) is not None


def test_a_model_that_never_learnt_to_end_is_broken_and_one_that_unlearnt_it_is_enough() -> None:
    found = diagnose([{**HEALTHY, "finished": 0.0}] * 3, LIMITS)
    assert found is not None and found.fatal and "outside the loss of SFT" in found.text
    assert diagnose([{**HEALTHY, "finished": 0.0}] * 2, LIMITS) is None
    later = diagnose([HEALTHY, *[{**HEALTHY, "finished": 0.0}] * 3], LIMITS)
    assert later is not None and not later.fatal


def test_answers_that_never_end_blame_the_limit_where_it_cuts_peoples_own() -> None:
    cause = "max_new_tokens 32 cuts 90 % of the conversations' own answers"
    limits = Limits(kl_budget=10.0, too_short=cause)
    found = diagnose([{**HEALTHY, "finished": 0.0}] * 3, limits)
    assert found is not None and found.fatal and cause in found.text and "outside the loss" not in found.text
    later = diagnose([HEALTHY, *[{**HEALTHY, "finished": 0.0}] * 3], limits)
    assert later is not None and cause in later.text


def test_a_reward_model_that_knows_by_heart_blames_the_cut_where_answers_were_cut() -> None:
    known = {"train": 0.95, "held_out": 0.51, "length": 0.5, "pairs": 1000}
    plain, cut = diagnose_reward(**known), diagnose_reward(**known, cut="30 of 80 answers were cut")
    assert plain is not None and "More comparisons" in plain.text
    assert cut is not None and "First of all keep the answers whole: 30 of 80 answers were cut" in cut.text
    assert "More comparisons" not in cut.text


def test_numbers_that_cannot_be_trusted_come_first() -> None:
    found = diagnose([{**HEALTHY, "kl": 99.0, "sampler_error": 1.0}], LIMITS)
    assert found is not None and found.fatal


def test_the_first_ratio() -> None:
    assert diagnose_ratio(1e-5) is None
    found = diagnose_ratio(0.01)
    assert found is not None and found.fatal and "before any update" in found.text


def test_bf16_rounds_more_and_a_wrong_temperature_is_still_seen() -> None:
    coarse = Limits(kl_budget=10.0, rounding=BFLOAT16)
    assert (
        diagnose([{**HEALTHY, "sampler_gap": 0.6, "sampler_error": 0.08}], coarse) is None
        and diagnose_ratio(0.1, BFLOAT16) is None
    )
    found = diagnose([{**HEALTHY, "sampler_gap": 1.0, "sampler_error": 0.13}], coarse)
    assert found is not None and found.fatal and "policy_precision" in found.text
    for found in (diagnose([{**HEALTHY, "sampler_gap": 3.0}], coarse), diagnose_ratio(0.5, BFLOAT16)):
        assert found is not None and found.fatal


# ---- peaks -------------------------------------------------------------------------------------------------


def curve(
    scores: list[float], gold: list[float] | None = None, error: float = 0.02
) -> list[dict[str, float]]:
    rows = []
    for number, score in enumerate(scores):
        row = {**HEALTHY, "score": score, "score_error": error, "length": 10.0 + number}
        if gold is None:
            row = {key: value for key, value in row.items() if not key.startswith("gold")}
        else:
            row |= {"gold": gold[number], "gold_error": error}
        rows.append(row)
    return rows


RISING = [0.1 * n for n in range(12)]
TURNING = [0.1 * min(n, 12 - n) for n in range(13)]


def test_the_peak_of_the_score() -> None:
    assert diagnose(curve(RISING), PATIENT) is None
    found = diagnose(curve(TURNING), PATIENT)
    assert found is not None and "past its peak" in found.text and not found.fatal
    assert diagnose(curve(TURNING), LIMITS) is None  # without patience nobody looks
    assert diagnose(curve(TURNING, error=0.5), PATIENT) is None  # noise could have done this


def test_where_the_peak_is() -> None:
    # means of four: rounds 4 ... 7 have 0.4, 0.5, 0.6, 0.5
    assert past_peak(curve(TURNING), "score", 4) in (4, 5)
    assert past_peak(curve(TURNING)[:7], "score", 4) is None  # two windows of four are not there yet


def test_reward_hacking_is_score_up_gold_down() -> None:
    found = diagnose(curve([0.1 * n for n in range(13)], TURNING), LIMITS)
    assert found is not None and not found.fatal
    assert "is exploited" in found.text and "length" in found.text
    together = diagnose(curve(TURNING, TURNING), LIMITS)
    assert together is not None and "with the score" in together.text
    assert diagnose(curve(RISING, RISING), LIMITS) is None
    assert diagnose(curve(RISING), LIMITS) is None  # without a gold measure nobody can tell


# ---- reward model ------------------------------------------------------------------------------------------


def test_a_reward_model_that_knows_its_prompts_by_heart() -> None:
    found = diagnose_reward(train=0.95, held_out=0.51, length=0.5, pairs=1000)
    assert found is not None and found.fatal and "by heart" in found.text and "lengths" not in found.text
    biased = diagnose_reward(train=0.95, held_out=0.51, length=0.7, pairs=1000)
    assert biased is not None and "or their lengths" in biased.text
    assert diagnose_reward(train=0.95, held_out=0.6, length=0.5, pairs=1000) is None
    assert diagnose_reward(train=1.0, held_out=1.0, length=0.5, pairs=1) is None  # a small file holds out few
    assert diagnose_reward(train=1.0, held_out=0.75, length=0.5, pairs=4) is not None
    assert (
        diagnose_reward(train=0.95, held_out=0.6, length=0.5, pairs=20) is not None
    )  # 0.6 of 20 pairs is chance
    assert (
        diagnose_reward(train=0.6, held_out=0.5, length=0.5, pairs=1000) is None
    )  # it has not learnt at all yet
