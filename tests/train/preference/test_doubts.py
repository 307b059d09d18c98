"""What a reward model's report warns of: few pairs, chance, length."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from chatwright.data.examples import Comparison
from chatwright.stages.reward import Config
from chatwright.train.preference.counting import ScoredComparisons, counted
from chatwright.train.preference.doubts import by_length, doubts
from chatwright.train.preference.rankings import Split

CONFIG = Config()


def pair(number: int, chosen: str, rejected: str) -> Comparison:
    return Comparison.of([{"role": "user", "content": f"How {number}?"}], [chosen, rejected], [1.0, 0.0])


def pairs(count: int, *, longer: int) -> list[Comparison]:
    """`count` pairs, in `longer` of which the chosen answer is the longer one."""
    return [
        pair(n, "a long answer", "short") if n < longer else pair(n, "short", "a long answer")
        for n in range(count)
    ]


def scores_of(right: Sequence[bool]) -> ScoredComparisons:
    """A model's scores: the chosen answer first."""
    scores = torch.tensor([[1.0, 0.0] if one else [0.0, 1.0] for one in right])
    return ScoredComparisons(scores, torch.tensor([[1.0, 0.0]] * len(right)))


def warnings(right: int, held_out: list[Comparison], train: list[Comparison]) -> list[str]:
    scored = scores_of([n < right for n in range(len(held_out))])
    return doubts(scored, Split(train, held_out, []), CONFIG, seed=1)


def test_a_good_model_on_mixed_pairs_is_not_doubted() -> None:
    assert warnings(90, pairs(100, longer=50), pairs(400, longer=200)) == []


def test_five_of_five_pairs_say_little() -> None:
    (told,) = warnings(5, pairs(5, longer=3), pairs(40, longer=20))
    assert told.startswith(
        "only 5 held-out pairs: the accuracy of 1.000 may be anywhere in its 95 % interval "
    )
    assert "0.57 to 1.00" in told and "larger `validation`" in told
    assert warnings(30, pairs(30, longer=15), pairs(40, longer=20)) == []


def test_guessing_is_called_so() -> None:
    (told,) = warnings(52, pairs(100, longer=50), pairs(400, longer=200))
    assert told.startswith("nothing was shown: the accuracy on 100 held-out pairs is 0.520")
    assert "guessing has 0.5" in told


@pytest.mark.parametrize(("longer", "word"), [(400, "longer"), (0, "shorter")])
def test_length_that_decides_every_pair_is_warned_of(longer: int, word: str) -> None:
    (told,) = warnings(100, pairs(100, longer=longer // 4), pairs(400, longer=longer))
    assert told.startswith(
        f"the {word} answer always wins in your 500 pairs: the reward model may have learnt "
    )
    assert f"will write {word} answers" in told
    nearly = warnings(100, pairs(100, longer=97), pairs(400, longer=390))
    assert "the longer answer wins 97 % of the time" in nearly[0]


def test_a_model_no_better_than_length_is_warned_of() -> None:
    held_out, train = pairs(100, longer=80), pairs(400, longer=320)
    (told,) = warnings(82, held_out, train)
    assert told.startswith(
        "length alone (longer wins) orders 0.800 of the held-out pairs rightly, the reward "
    )
    assert "model 0.820; more than length was not shown" in told
    assert warnings(96, held_out, train) == []  # clearly better than length


def test_an_interval_of_pairs_that_belong_together() -> None:
    """Four answers a prompt: six pairs that are right or wrong together count as one, not as six."""
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0] if n < 30 else [0.0, 1.0, 2.0, 3.0] for n in range(40)])
    found = counted(ScoredComparisons(scores, torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 40)), CONFIG)
    assert (found.total, found.share) == (240, 0.75)
    low, high = found.interval(seed=1)
    assert low == pytest.approx(0.75 - 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)
    assert high == pytest.approx(0.75 + 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)


def test_scores_by_length() -> None:
    three = Comparison.of([{"role": "user", "content": "How?"}], ["aaaa", "bb", "c"], [1.0, 2.0, 3.0])
    found = by_length([three, pair(1, "long one", "x")], longer=False)
    assert found.scores.tolist() == [[-4.0, -2.0, -1.0], [-8.0, -1.0, 0.0]]
    assert found.labels.isnan().tolist() == [[False] * 3, [False, False, True]]
