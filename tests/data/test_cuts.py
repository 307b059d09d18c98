"""Limits that come from the data, and the line that says what was cut."""

from __future__ import annotations

import pytest

from chatwright.config import UsageError
from chatwright.data.cuts import Cuts, Room, cause_of, check_limit, length_of_data


def test_a_limit_holds_the_longest_and_is_a_multiple() -> None:
    assert length_of_data([5, 17, 9], step=8) == 24
    assert length_of_data([16], step=8) == 16
    assert length_of_data([], step=8) == 0


def test_a_share_leaves_the_longest_hundredth_out() -> None:
    lengths = list(range(1, 201))
    assert length_of_data(lengths, step=1, share=0.99) == 198
    assert length_of_data(lengths[:50], step=1, share=0.99) == 50  # of fewer than a hundred all are held


def test_a_huge_sample_among_short_ones_does_not_count() -> None:
    lengths = [50] * 30 + [8_000]
    assert length_of_data(lengths, step=64) == 256  # four times the usual length, rounded up
    assert length_of_data(lengths, step=64, floor=1_024) == 1_024
    assert length_of_data([50] * 30 + [190], step=64) == 192  # long, and no outlier
    assert length_of_data([300, 1_000], step=64, floor=1_024) == 1_024


def cuts(**settings: object) -> Cuts:
    found = Cuts("conversations", "context", 64, **settings)  # type: ignore[arg-type]
    for length in (10, 70, 100):
        found.saw(length)
    return found


def test_nothing_cut_is_a_short_line_and_no_note() -> None:
    found = Cuts("conversations", "context", 128)
    found.saw(100)
    assert str(found) == "nothing was cut: 1 conversations, the longest of 100 tokens (context 128)"
    assert found.notes == [] and found.advice == "" and cause_of(found.facts) == ""


def test_the_line_says_how_many_why_and_what_to_set() -> None:
    found = cuts()
    found.add("cut between exchanges")
    found.add("left out, for nobody answers", length=False)
    assert str(found) == (
        "of 3 conversations: 1 cut between exchanges; 1 left out, for nobody answers (context 64; the "
        "longest has 100 tokens: context 104 keeps all of them whole)"
    )
    assert found.notes == [str(found)]
    assert cause_of(found.facts) == (
        "1 of 3 conversations were cut at context 64 (the longest has 100 tokens: context 104 keeps all of "
        "them whole)"
    )


def test_a_limit_that_cannot_rise_names_what_limits_it() -> None:
    found = cuts(room=Room(64, "the model's context"))
    found.add("cut between exchanges", 2)
    assert found.advice == "the longest has 100 tokens, the model's context allows 64"
    close = cuts(room=Room(101, "memory"))
    close.add("cut between exchanges")
    assert "context 101 keeps all of them whole" in close.advice  # not 104, which memory does not hold


def test_a_few_cut_samples_are_not_the_cause_of_a_weak_model() -> None:
    found = Cuts("answers", "max_tokens", 64)
    for _ in range(100):
        found.saw(70)
    found.add("that lost their end", 4)
    assert cause_of(found.facts) == ""
    found.add("that lost their end", 1)
    assert cause_of(found.facts).startswith("5 of 100 answers were cut at max_tokens 64 (")
    assert cause_of(None) == cause_of({}) == ""


def test_a_limit_is_0_or_large_enough() -> None:
    check_limit("max_tokens", 0, 4)
    check_limit("max_tokens", 4, 4)
    for wrong in (-1, 3):
        with pytest.raises(UsageError, match=f"max_tokens {wrong} must be at least 4, or 0"):
            check_limit("max_tokens", wrong, 4)
