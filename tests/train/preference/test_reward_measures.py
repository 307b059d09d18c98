"""Annotators, numbers of answers, demonstrations: who is held out, what is counted, where scores begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint
from chatwright.chat import NATIVE
from chatwright.config import UsageError, UserError
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.optim import OptimConfig
from chatwright.stages import reward
from chatwright.stages.reward import Config
from chatwright.tokenizer import Tokenizer
from chatwright.train.fit_config import FitConfig
from chatwright.train.preference.calibration import pair_reliability
from chatwright.train.preference.counting import ScoredComparisons
from chatwright.train.preference.measures import (
    accuracy_of,
    by_annotator,
    by_candidates,
    correlation,
    held_out_measures,
    length_baseline,
    score_comparisons,
)
from chatwright.train.preference.rankings import Rankings, demonstrations, own_comparisons, without_annotators

NAN = float("nan")
SLOW = OptimConfig(learning_rate=1e-5)  # nothing is learnt by heart


def by(annotator: str, prompt: str = "How?", *pairs: tuple[str, float]) -> Comparison:
    given = pairs or (("good", 1.0), ("bad", 0.0))
    return Comparison.of(
        [{"role": "user", "content": prompt}],
        [text for text, _ in given],
        [score for _, score in given],
        annotator,
    )


def write(directory: Path, train: list[Comparison], held_out: list[Comparison]) -> Path:
    directory.mkdir(exist_ok=True)
    for side, rows in (("train", train), ("validation", held_out)):
        (directory / f"comparisons-{side}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    return directory


# ---- annotators --------------------------------------------------------------------------------------------


def test_held_out_annotators_are_on_no_side_of_training() -> None:
    train = [by("ann", "1"), by("bob", "2"), by("cy", "3"), by("", "4")]
    held_out = [by("ann", "5"), by("bob", "6"), by("cy", "7"), by("", "8")]
    split = without_annotators(train, held_out, "bob, cy")
    assert split.train == [train[0], train[3]]
    assert split.held_out == [held_out[0], held_out[3]]
    assert split.held_out_annotators == held_out[1:3]
    whole = without_annotators(train, held_out, "")
    assert (whole.train, whole.held_out, whole.held_out_annotators) == (train, held_out, [])


@pytest.mark.parametrize(
    ("train", "held_out", "names", "message"),
    [
        ("-", "-", "ann", "no comparison says who made it"),
        ("ab", "ab", "dan", "nobody is called dan; annotators: a, b"),
        ("ab", "b", "a", "no comparisons of theirs on held-out prompts"),
        ("a", "ab", "a", "no training comparisons by others"),
        ("ab", "a", "a", "no held-out comparisons by others"),
    ],
)
def test_annotators_that_leave_nothing_are_refused(
    train: str, held_out: str, names: str, message: str
) -> None:
    sides = [[by(name.strip("-")) for name in side] for side in (train, held_out)]
    with pytest.raises(UserError, match=message):
        without_annotators(sides[0], sides[1], names)


def test_annotators_of_ratings_are_not_known() -> None:
    with pytest.raises(UsageError, match="comparisons of your own"):
        Config(held_out_annotators="ann")


@pytest.mark.learns
def test_the_stage_measures_annotators_that_it_did_not_learn_from(
    sft_bench: Any, tmp_path: Path, babble: Any, make_fit: Callable[..., FitConfig], learnt: Any
) -> None:
    """Bob prefers the opposite on the same held-out prompts: what is right of ann's pairs is wrong of his."""
    draw = babble(8)

    def rows(name: str, count: int, start: int, *, turned: bool = False) -> list[Comparison]:
        result = []
        for n in range(start, start + count):
            texts = [(f"{draw.sentence(1)}", 1.0), (f"{draw.sentence(-1)}", 0.0), (draw.sentence(0), 0.5)][
                : 2 + n % 2
            ]
            result.append(
                by(name, f"What is {n}?", *((text, -score if turned else score) for text, score in texts))
            )
        return result

    seen = rows("ann", 14, 100)
    turned = [
        Comparison.of(one.prompt, one.responses, [-score for score in one.scores], "bob") for one in seen
    ]
    write(tmp_path / "set", [*rows("ann", 24, 0), *rows("bob", 8, 50, turned=True)], [*seen, *turned])
    config = Config(
        comparisons=str(tmp_path / "set"),
        tie_tolerance=0.0,
        max_tokens=40,
        fit=make_fit(steps=60, batch_size=4),
        held_out_annotators="bob",
        optim=OptimConfig(learning_rate=4e-3),
    )
    report = sft_bench.run(reward, config, tmp_path / "reward")
    measures = {measure.name: measure for measure in report.measures}
    inside, outside = (
        measures[f"accuracy on held-out pairs{rest}"].after for rest in ("", ", annotators held out")
    )
    assert report.facts["comparisons"] == 24
    assert outside == pytest.approx(1 - inside, abs=1e-6)
    learnt("accuracy on the annotator who was learnt from", inside, above=0.7)
    assert report.facts["held_out_annotators_accuracy"] == outside
    annotators = next(table for table in report.tables if "annotator" in table.title)
    assert [row[:4] for row in annotators.rows] == [
        ["in training", "ann", "14", "28"],
        ["held out", "bob", "14", "28"],
    ]
    sizes = next(table for table in report.tables if "number of answers" in table.title)
    assert [row[:3] for row in sizes.rows] == [["2", "7", "7"], ["3", "7", "21"]]
    # calibration, as the report shows it
    assert report.pictures == ["calibration.png"] and (tmp_path / "reward" / "calibration.png").is_file()
    assert measures["calibration error on held-out pairs"].after == report.facts["calibration_error"]
    model, rankings = saved_model(tmp_path / "reward", report.model), rankings_of(sft_bench, seen, config)
    with torch.no_grad():
        scores, labels = score_comparisons(model, rankings, seen)
    assert (
        abs(float(model.scale) - 1) > 0.05
    )  # normalised by now; the probabilities are those of the scale that was learnt
    expected = pair_reliability(scores / model.scale, labels).error
    assert report.facts["calibration_error"] == pytest.approx(expected, abs=1e-5)
    # people's own answers are there: they score 0
    assert "demonstrations" in report.facts["scores 0 on average"]
    assert abs(mean_of_demonstrations(sft_bench, tmp_path / "reward", report)) < 1e-4


# ---- tables ------------------------------------------------------------------------------------------------

SCORED = ScoredComparisons(
    torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    torch.tensor([[3.0, 2.0, 1.0], [1.0, 0.0, NAN], [1.0, 0.0, NAN]]),
)


def test_accuracy_by_number_of_answers_by_hand() -> None:
    # three answers: 3 of 3 pairs; two answers: one prompt right, one wrong, deviation sqrt(1/2), over sqrt(2)
    # prompts = 0.5
    table = by_candidates(SCORED, Config(tie_tolerance=0.0))
    assert table.rows == [["2", "2", "2", "0.500 ± 0.500"], ["3", "1", "3", "1.000"]]
    assert by_candidates(SCORED, Config(tie_tolerance=1.0)).rows == [
        ["2", "2", "0", "-"],
        ["3", "1", "1", "1.000"],
    ]


def test_accuracy_by_annotator_by_hand() -> None:
    asked = [by("ann"), by("bob"), by("ann")]
    table = by_annotator(SCORED, asked, None, [], Config(tie_tolerance=0.0))
    assert table is not None
    assert table.rows == [
        ["in training", "ann", "2", "4", "1.000 ± 0.000"],
        ["in training", "bob", "1", "1", "0.000"],
    ]
    assert by_annotator(SCORED, [by(""), by(""), by("")], None, [], Config()) is None


# ---- where scores begin ------------------------------------------------------------------------------------


def saved_model(directory: Path, name: str) -> ScalarModel:
    found = checkpoint.Checkpoint(directory / name)
    model = ScalarModel(GPTConfig.from_dict(found.state()["model"]))
    checkpoint.load_model_tensors(model, found.tensors("model"), where="here")
    return model.eval()


def rankings_of(bench: Any, comparisons: list[Comparison], config: Config) -> Rankings:
    return Rankings(
        comparisons,
        NATIVE,
        Tokenizer.load(bench.inputs["tokenizer"]),
        config,
        SampleOrder(len(comparisons), 1),
    )


@torch.no_grad()
def mean_of_demonstrations(bench: Any, directory: Path, report: Any) -> float:
    model = saved_model(directory, report.model)
    shown = demonstrations(bench.inputs["data"] / "dialogues-train.jsonl", reward.DEMONSTRATIONS)
    return float(
        score_comparisons(model, rankings_of(bench, shown, Config(max_tokens=40)), shown).scores[:, 0].mean()
    )


def test_demonstrations_are_the_first_answers_of_people(tmp_path: Path) -> None:
    talks = [
        [
            ("system", "Be kind."),
            ("user", "Hi"),
            ("assistant", "Ho"),
            ("user", "Bye"),
            ("assistant", "Later"),
        ],
        [("user", "alone")],
        [("assistant", "unasked"), ("user", "x")],
        [("user", "a"), ("assistant", "b")],
    ]
    file = tmp_path / "d.jsonl"
    made = [Dialogue.of([{"role": role, "content": text} for role, text in talk]) for talk in talks]  # type: ignore[typeddict-item]
    file.write_text("".join(one.to_json() + "\n" for one in made))
    found = demonstrations(file, 9)
    assert [one.responses[0] for one in found] == ["Ho", "b"]
    assert [message["content"] for message in found[0].prompt] == ["Be kind.", "Hi"]
    assert len(demonstrations(file, 1)) == 1


def test_scores_may_be_centred_on_the_training_answers_instead(
    sft_bench: Any, tmp_path: Path, babble: Any, make_fit: Callable[..., FitConfig]
) -> None:
    draw = babble(9)
    rows = [
        by("", f"{n}?", (draw.sentence(0), 1.0), (draw.sentence(0), 0.0)) for n in range(40)
    ]  # nothing to learn
    write(tmp_path / "set", rows, rows[:8])
    config = Config(
        comparisons=str(tmp_path / "set"),
        max_tokens=40,
        fit=make_fit(steps=2, batch_size=4),
        optim=SLOW,
        center_on="answers",
    )
    report = sft_bench.run(reward, config, tmp_path / "reward")
    assert report.facts["scores 0 on average"] == "training answers"
    assert abs(mean_of_demonstrations(sft_bench, tmp_path / "reward", report)) > 1e-3


def test_demonstrations_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    from chatwright.train.workspace import Workspace

    space = Workspace(tmp_path / "reward")
    for center in ("auto", "answers"):
        assert reward.find_demonstrations(Config(data=str(tmp_path), center_on=center), space) == []  # type: ignore[arg-type]
        assert reward.find_demonstrations(Config(data="nowhere", center_on=center), space) == []  # type: ignore[arg-type]
    for data in (str(tmp_path), "nowhere"):
        with pytest.raises(UserError, match="set center_on to answers"):
            reward.find_demonstrations(Config(data=data, center_on="demonstrations"), space)


def test_empty_files_of_comparisons_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"comparisons-validation\.jsonl is empty"):
        own_comparisons(write(tmp_path, [by("")], []))


# ---- ties, and a single value ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, 0.7, 1e3 / 3])
def test_what_is_all_the_same_is_correlated_with_nothing(value: float) -> None:
    same, other = torch.full((7,), value), torch.linspace(0, 1e6, 7)
    assert correlation(same, other) == correlation(other, same) == correlation(same, same) == 0.0
    assert correlation(torch.tensor([value]), torch.tensor([1.0])) == 0.0
    assert correlation(torch.tensor([]), torch.tensor([])) == 0.0
    assert correlation(other, 2 * other + 1) == pytest.approx(1.0)


def test_ties_alone_show_nothing() -> None:
    ties = ScoredComparisons(torch.tensor([[0.3, 0.1], [0.2, 0.2]]), torch.full((2, 2), 0.5))
    found = held_out_measures(ties, Config())
    assert found == {"held_out_accuracy": 0.5, "held_out_correlation": 0.0}
    assert accuracy_of(ties, Config(ties="half")) == 0.5
    tied = [by("", "1", ("short", 1.0), ("a longer one", 1.0))]
    assert length_baseline(tied, tied, 0.0) == 0.5
    assert by_candidates(ties, Config()).rows == [["2", "2", "0", "-"]]
