"""Length, ends, repeats and distinct words of answers, by hand; answers side by side."""

from __future__ import annotations

import pytest
import torch

from chatwright.evaluate.answers import ENDED, LENGTH, REPEATS, per_prompt, repeats, side_by_side
from chatwright.tokenizer import Tokenizer
from chatwright.train.rl.rollout import Completions

TOKENIZER = Tokenizer.train(["a b c d " * 20], 300)
END = TOKENIZER.control_ids["<|end|>"]


def answers(*texts: str, ended: tuple[bool, ...] = ()) -> Completions:
    """Completions to prompts of one token."""
    rows = [[5, *TOKENIZER.encode(text), END] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[n < len(row) for n in range(width)] for row in rows])
    response = real & (torch.arange(width) > 0)
    return Completions(
        ids, real, response, torch.tensor(ended or [True] * len(texts)), torch.zeros(ids.shape)
    )


def test_repeats() -> None:
    assert repeats([1, 2, 3]) == 0.0 and repeats([1]) == 0.0 and repeats([]) == 0.0
    assert repeats([1, 2, 1, 2]) == pytest.approx(1 / 3)  # 12, 21, 12
    assert repeats([7] * 5) == pytest.approx(3 / 4)


def test_the_mean_over_the_answers_to_a_prompt() -> None:
    assert per_prompt([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2) == [3.0, 4.0]  # 1, 3, 5 and 2, 4, 6


def test_two_answers_to_each_of_two_prompts() -> None:
    prompts = ["a b", "c"]
    first, second = ("a b", "c d", "a b", "c"), ("a a a a", "b", "c d", "d")
    sides = answers(*first), answers(*second, ended=(True, False, True, True))
    found = side_by_side(
        ("old", "new"), prompts, sides, TOKENIZER, values={"gold": ([0.0, 1.0], [1.0, 2.0])}, kl=0.5
    )
    assert (found.before, found.after, found.kl) == ("old", "new", 0.5)
    assert [(pair["before"].strip(), pair["after"].strip()) for pair in found.pairs] == [
        ("a b", "a a a a"),
        ("c d", "b"),
    ]
    assert found.prompts == prompts and [pair["prompt"] for pair in found.pairs] == prompts
    sizes = [[len(TOKENIZER.encode(text)) + 1 for text in side] for side in (first, second)]
    assert found.measures[LENGTH] == pytest.approx([sum(side) / 4 for side in sizes])
    assert found.values[LENGTH][1] == pytest.approx(
        [(sizes[1][0] + sizes[1][2]) / 2, (sizes[1][1] + sizes[1][3]) / 2]
    )
    assert found.measures[ENDED] == (1.0, 0.75) and found.values[ENDED][1] == pytest.approx([1.0, 0.5])
    assert found.measures["distinct-1"] == pytest.approx((4 / 7, 4 / 8))  # a b c d of 7 words; a b c d of 8
    assert found.measures["distinct-2"] == pytest.approx((2 / 3, 2 / 4))  # ab cd ab; aa aa aa cd
    assert found.measures[REPEATS][1] > found.measures[REPEATS][0] == 0.0
    assert found.values["gold"] == ([0.0, 1.0], [1.0, 2.0])
