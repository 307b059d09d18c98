"""The classifier: it learns a planted mood, its score is a calibrated log odds, and PPO follows it as it
follows a reward model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint
from chatwright.chat import NATIVE
from chatwright.config import UsageError, UserError
from chatwright.data.examples import LabelledText
from chatwright.data.loader import SampleOrder
from chatwright.model.heads import ScalarModel
from chatwright.objectives.preference import logistic_loss
from chatwright.optim import OptimConfig
from chatwright.recipe import read_recipe
from chatwright.stages import best_of_n, classifier, ppo
from chatwright.stages.classifier import Config, Texts, load_texts, scores_of, step
from chatwright.tokenizer import Tokenizer
from chatwright.train.fit_config import FitConfig
from chatwright.train.rl.models import load_reward
from chatwright.train.workspace import Report, Unhealthy

PROMPTS = [({"role": "user", "content": word},) for word in ("Hi", "And?", "Why so?")]


def texts_of(ratings: list[tuple[str, float]], tokenizer: Tokenizer, **settings: Any) -> Texts:
    made = [LabelledText.of(text, label) for text, label in ratings]
    return Texts(
        made, PROMPTS, NATIVE, tokenizer, Config(max_tokens=32, **settings), SampleOrder(len(made), 3)
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def settings(make_fit: Callable[..., FitConfig]) -> Config:
    return Config(
        max_tokens=48,
        fit=make_fit(steps=160, batch_size=16),
        optim=OptimConfig(learning_rate=4e-3, schedule="trapezoid"),
    )


@pytest.fixture(scope="module")
def trained(
    sft_bench: Any, tmp_path_factory: pytest.TempPathFactory, settings: Config
) -> tuple[Path, Report]:
    directory = tmp_path_factory.mktemp("judge") / "classifier"
    return directory, sft_bench.run(classifier, settings, directory)


@pytest.fixture(scope="module")
def graded(sft_bench: Any, tmp_path_factory: pytest.TempPathFactory, settings: Config) -> tuple[Path, Config]:
    """One that has seen plain texts as well: where another puts what it never saw (`neutral`) depends on the
    seed."""
    directory, settings = tmp_path_factory.mktemp("graded") / "classifier", replace(settings, neutral=0.0)
    sft_bench.run(classifier, settings, directory)
    return directory, settings


@pytest.mark.learns
def test_a_planted_mood_is_learnt(trained: tuple[Path, Report], learnt: Any) -> None:
    directory, report = trained
    measures = {measure.name: measure for measure in report.measures}
    accuracy = measures["accuracy on held-out texts"]
    commoner, loss = (
        measures[f"{what}"].after for what in ("accuracy of the commoner class", "loss on held-out texts")
    )
    assert accuracy.before is not None and accuracy.after is not None and loss is not None
    assert accuracy.before < accuracy.after  # a fresh head's may be anything near 1/2
    assert commoner is not None and 0.5 <= commoner < 0.75  # of some 50 texts, good and bad by lot
    learnt("accuracy", accuracy.after, above=0.9)
    learnt("loss", loss, below=0.4)
    # with the neutral texts, which it never saw
    learnt("correlation", report.facts["held_out_correlation"], above=0.75)
    assert report.pictures == ["calibration.png"] and (directory / "calibration.png").is_file()


@pytest.mark.parametrize(("accuracy", "warned"), [(0.9, False), (0.65, True), (0.5, True)])
def test_an_accuracy_that_may_be_that_of_the_commoner_class_is_warned_of(
    accuracy: float, warned: bool
) -> None:
    report, good = Report(), torch.tensor([True] * 60 + [False] * 40)
    found = {"held_out_accuracy": accuracy, "held_out_loss": 0.5, "held_out_correlation": 0.5}
    classifier.measure(report, found, found, good)
    (low, high) = report.facts["held_out_accuracy_interval"]
    assert low < accuracy < high and report.measures[0].interval == (low, high)
    assert report.measures[0].note == f"95 % interval {low:.3f} to {high:.3f}, 100 texts"
    assert len(report.warnings) == warned
    assert all(one.startswith("nothing was shown: the accuracy is") for one in report.warnings)


@pytest.mark.learns
@torch.no_grad()
def test_its_score_is_the_calibrated_log_odds(
    graded: tuple[Path, Config], sft_bench: Any, sft_parts: Callable[[], Any], babble: Any, learnt: Any
) -> None:
    directory, settings = graded
    parts, draw = sft_parts(), babble(99)
    judge = load_reward(directory, parts, min_correlation=0.6).eval()
    assert float(judge.scale) != 1.0 and float(judge.offset) != 0.0
    texts = texts_of([("x", 1.0)], parts.tokenizer)
    good, plain, bad = ([LabelledText.of(draw.sentence(mood), 0.0) for _ in range(30)] for mood in (1, 0, -1))
    means = [float(scores_of(judge, texts, part).mean()) for part in (good, plain, bad)]
    learnt("log odds of good texts", means[0], above=1.0)
    learnt("log odds of bad texts", means[2], below=-1.0)
    learnt("good above plain", means[0] - means[1], above=0.0)
    learnt("plain above bad", means[1] - means[2], above=0.0)
    # the fit is Platt's on texts that were not trained on: fitted once more to the same ones it changes
    # nothing
    records = load_texts(settings, sft_bench.inputs["data"])
    assert not {one.id for one in records.train} & {one.id for one in records.calibration}
    from chatwright.chat import Message
    from chatwright.train.preference import calibration
    from chatwright.train.preference.rankings import first_prompts

    prompts: list[tuple[Message, ...]] = first_prompts(sft_bench.inputs["data"] / "dialogues-train.jsonl")
    own = Texts(records.train, prompts, parts.template, parts.tokenizer, settings, SampleOrder(1, 1))
    scores = scores_of(judge, own, records.calibration)
    positive = torch.tensor([one.label > 0 for one in records.calibration])
    assert calibration.platt(scores, positive) == pytest.approx((1.0, 0.0), abs=1e-3)


def test_ppo_and_best_of_n_follow_it_unchanged(
    trained: tuple[Path, Report], sft_bench: Any, tmp_path: Path
) -> None:
    bench = sft_bench.with_(classifier=trained[0])
    config = ppo.Config(
        reward="classifier",
        iterations=2,
        batch_size=8,
        minibatch_size=8,
        max_prompt_tokens=40,
        max_new_tokens=12,
        min_tokens=1,
        max_repeats=0.9,
        save_steps=2,
    )
    report = bench.run(ppo, config, tmp_path / "ppo")
    assert report.facts["iterations"] == 2 and report.measures
    chosen = best_of_n.Config(
        reward="classifier",
        prompts=4,
        n=4,
        max_prompt_tokens=40,
        max_new_tokens=12,
        gold="",
        min_tokens=1,
        max_repeats=0.9,
    )
    score = bench.run(best_of_n, chosen, tmp_path / "bestofn").measures[0]
    assert score.before is not None and score.after is not None and score.after > score.before


def test_a_recipe_may_name_it_as_the_reward(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\nstages:\n  ppo: {reward: classifier}\n  data: {}\n  classifier: {threshold: 0.5, neutral: "
        "0}\n"
        "  tokenizer: {}\n  pretrain: {}\n  sft: {}\n"
    )
    recipe = read_recipe(tmp_path / "r.yaml", {})
    order = list(recipe.stages)
    assert order.index("classifier") < order.index("ppo") and order.index("sft") < order.index("classifier")
    assert recipe.stages["classifier"].config.threshold == 0.5


def test_step_is_the_loss_of_the_scores(
    chat_tokenizer: Tokenizer, lively_scalar: Callable[..., ScalarModel]
) -> None:
    model = lively_scalar(2, vocab_size=chat_tokenizer.vocab_size)
    texts = texts_of([("good", 2.0), ("bad and long", -1.0), ("so so", 0.1)], chat_tokenizer)
    batch = texts.take(0, 3)
    assert batch.weight == 3.0
    with torch.no_grad():
        alone = torch.stack(
            [model(row[mask][None])[0, -1] for row, mask in zip(batch.ids, batch.mask, strict=True)]
        )
        outcome = step(model, batch)
    torch.testing.assert_close(outcome.loss, logistic_loss(alone, batch.positive), atol=1e-5, rtol=0)
    assert float(outcome.logged["accuracy"]) == float(((alone > 0) == batch.positive).sum())


def test_batches_do_not_depend_on_the_portions(chat_tokenizer: Tokenizer) -> None:
    texts = texts_of([(f"text number {n}", float(n % 3 - 1)) for n in range(10)], chat_tokenizer)
    whole = texts.take(3, 6)
    rows = [
        ids[mask].tolist()
        for start in (3, 5, 7)
        for part in [texts.take(start, 2)]
        for ids, mask in zip(part.ids, part.mask, strict=True)
    ]
    assert rows == [ids[mask].tolist() for ids, mask in zip(whole.ids, whole.mask, strict=True)]
    end = chat_tokenizer.control_ids["<|end|>"]
    assert (
        all(row[-1] == end for row in rows) and len({tuple(row[:4]) for row in rows}) > 1
    )  # several prompts


def write(directory: Path, labels: list[float]) -> Path:
    for side in ("train", "validation"):
        rows = [LabelledText.of(f"{side} {n}", label) for n, label in enumerate(labels)]
        (directory / f"ratings-{side}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    return directory


def test_threshold_and_neutral_decide_what_is_good_and_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [-2.0, -0.3, 0.4, 1.0] * 30)
    parts = load_texts(Config(calibration=0.3), tmp_path)
    assert {one.label for one in [*parts.train, *parts.calibration, *parts.held_out]} == {-2.0, 1.0}
    assert (
        len(parts.train) + len(parts.calibration) == 60 == len(parts.held_out)
        and len(parts.all_held_out) == 120
    )
    assert 8 <= len(parts.calibration) <= 28
    write(tmp_path, [0.0, 1.0] * 60)
    binary = load_texts(Config(threshold=0.5, neutral=0.0, calibration=0.3), tmp_path)
    assert len(binary.held_out) == 120
    with pytest.raises(
        UserError,
        match=r"of 60 texts for .* 60 are good: both kinds are needed; set `threshold`|"
        r"of \d+ texts for train \d+ are good",
    ):
        load_texts(Config(threshold=0.0, neutral=0.5), tmp_path)


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in ({"calibration": 0.0}, {"calibration": 1.0}, {"neutral": -1.0}):
        with pytest.raises(UsageError):
            Config(**settings)  # type: ignore[arg-type]


def test_scores_that_tell_nothing_break_it_off(lively_scalar: Callable[..., ScalarModel]) -> None:
    report, model = Report(), lively_scalar(1)
    with pytest.raises(Unhealthy, match="do not rise with the class"):
        classifier.calibrate(
            report, model, torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([False, False, True, True])
        )
    assert report.model is None and float(model.scale) == 1.0


@pytest.mark.learns
def test_it_can_train_an_adapter(
    sft_bench: Any, tmp_path: Path, make_fit: Callable[..., FitConfig], learnt: Any
) -> None:
    from chatwright.model.lora import LoRAConfig

    config = Config(
        max_tokens=48,
        fit=make_fit(steps=160, batch_size=16),
        lora=LoRAConfig(rank=8),
        optim=OptimConfig(learning_rate=4e-3),
    )
    report = sft_bench.run(classifier, config, tmp_path / "classifier")
    saved = checkpoint.Checkpoint(tmp_path / "classifier" / str(report.model))
    assert (saved.path / "adapter.safetensors").is_file()
    learnt("accuracy", report.facts["held_out_accuracy"], above=0.7)
