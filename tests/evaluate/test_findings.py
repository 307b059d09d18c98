"""The conclusion of an evaluation: better, worse, or nothing was shown."""

from __future__ import annotations

import pytest
import torch

from chatwright.evaluate.findings import Findings
from chatwright.stages.evaluate import ACCURACY, LIKELIER, REWARD, WINS, of_reward
from chatwright.train.preference.counting import Counted


def findings(*, reward: float, likelier: float) -> Findings:
    """Twenty prompts, by how much the second model is better on each, give or take."""
    noise = [0.1 * (-1) ** n for n in range(20)]
    found = Findings(seed=1)
    for name, gain in ((REWARD, reward), (LIKELIER, likelier)):
        found.add(name, [0.0] * 20, [gain + one for one in noise])
    return found


def conclusion(found: Findings, capsys: pytest.CaptureFixture[str]) -> str:
    found.conclude()
    told = " ".join(capsys.readouterr().out.split())
    assert told == found.report.notes[0]
    return told.removeprefix("conclusion: ")


def test_better_worse_and_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert conclusion(findings(reward=1.0, likelier=0.5), capsys) == f"better by {REWARD}, {LIKELIER}"
    assert (
        conclusion(findings(reward=1.0, likelier=-0.5), capsys) == f"better by {REWARD}; worse by {LIKELIER}"
    )
    nothing = conclusion(findings(reward=0.0, likelier=0.0), capsys)
    assert nothing == "nothing was shown: no measure has an interval that leaves out 0"
    assert conclusion(Findings(seed=1), capsys).startswith(
        "nothing was shown: no reward model that is better than"
    )


def scored(right: int) -> Counted:
    """Right on so many of a hundred pairs."""
    return Counted(torch.tensor([1.0] * right + [0.0] * (100 - right)).double(), torch.ones(100).double())


@pytest.mark.parametrize(("right", "trusted"), [(90, True), (55, False), (50, False), (20, False)])
def test_the_score_of_a_guessing_reward_model_counts_for_nothing(
    right: int, trusted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings(reward=1.0, likelier=0.0)
    of_reward(scored(right), found)
    assert found.report.measures[-1].name == ACCURACY and found.report.measures[-1].after == right / 100
    assert found.untrusted == (set() if trusted else {REWARD, WINS})
    assert len(found.report.warnings) == (not trusted)
    expected = f"better by {REWARD}" if trusted else "nothing was shown: no measure has an interval that"
    assert conclusion(found, capsys).startswith(expected)


def test_what_is_left_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = Findings(seed=1)
    found.left_out("own comparisons are", "there are none")
    assert "own comparisons are left out: there are none" in capsys.readouterr().out
    assert found.report.notes == ["own comparisons are left out: there are none"]
