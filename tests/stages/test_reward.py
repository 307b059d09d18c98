"""The reward model: a planted preference is learnt, a planted length bias is shown, batches are what they
say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, cli, files
from chatwright.chat import NATIVE
from chatwright.config import UserError
from chatwright.data.examples import Comparison, LabelledText
from chatwright.data.loader import SampleOrder
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.objectives.preference import bradley_terry_loss
from chatwright.optim import OptimConfig
from chatwright.stages import reward
from chatwright.stages.reward import Config, step
from chatwright.tokenizer import Tokenizer
from chatwright.train.fit_config import FitConfig
from chatwright.train.parallel.context import SINGLE_PROCESS
from chatwright.train.preference.measures import correlation, length_baseline, normalise, score_comparisons
from chatwright.train.preference.rankings import Rankings, encode_answer, from_ratings

ASK = ({"role": "user", "content": "How is the cat?"},)


def comparison(*pairs: tuple[str, float]) -> Comparison:
    return Comparison.of(ASK, [text for text, _ in pairs], [score for _, score in pairs])


def rankings_of(comparisons: list[Comparison], tokenizer: Tokenizer, **settings: Any) -> Rankings:
    config = Config(**{"max_tokens": 40, "tie_tolerance": 0.5, **settings})
    return Rankings(comparisons, NATIVE, tokenizer, config, SampleOrder(len(comparisons), 1))


@pytest.mark.learns
def test_a_planted_preference_is_learnt(reward_bench: Any, learnt: Any) -> None:
    result = files.read_json(reward_bench.inputs["reward"] / "result.json")
    state = checkpoint.Checkpoint(reward_bench.inputs["reward"] / result["model"]).state()
    before, after = (state["progress"]["extra"][when] for when in ("before", "after"))
    assert before["held_out_accuracy"] < after["held_out_accuracy"]  # a fresh head's may be anything near 1/2
    learnt("accuracy", after["held_out_accuracy"], above=0.9)
    learnt("correlation", after["held_out_correlation"], above=0.8)
    assert result["facts"]["held_out_correlation"] == after["held_out_correlation"]


def reward_of(bench: Any) -> ScalarModel:
    found = checkpoint.Checkpoint(
        bench.inputs["reward"] / files.read_json(bench.inputs["reward"] / "result.json")["model"]
    )
    model = ScalarModel(GPTConfig.from_dict(found.state()["model"]))
    checkpoint.load_model_tensors(model, found.tensors("model"), where="here")
    return model.eval()


@pytest.mark.learns
@torch.no_grad()
def test_scores_are_normalised_and_follow_the_mood(
    reward_bench: Any, sft_parts: Callable[[], Any], babble: Any, learnt: Any
) -> None:
    model, parts, draw = reward_of(reward_bench), sft_parts(), babble(77)
    texts = [
        comparison(*((f"{draw.sentence(mood)} {n}", 2 * mood) for mood in (1, 0, -1))) for n in range(40)
    ]
    scores, _ = score_comparisons(model, rankings_of(texts, parts.tokenizer, max_tokens=48), texts)
    good, plain, bad = scores.mean(0).tolist()
    learnt("good above plain", good - plain, above=0.5)
    learnt("plain above bad", plain - bad, above=0.5)
    learnt("distance of the mean from 0", abs(float(scores.mean())), below=0.5)
    learnt("distance of the deviation from 1", abs(float(scores.std()) - 1), below=0.4)


def test_normalisation_is_as_its_formula_says(
    tmp_path: Path, chat_tokenizer: Tokenizer, lively_scalar: Callable[..., ScalarModel]
) -> None:
    """Also with prompts of unequal numbers of answers: the fillers do not count."""
    model = lively_scalar(4, vocab_size=chat_tokenizer.vocab_size)
    chosen = [
        comparison(("one", 1), ("two", 2)),
        comparison(("three", 1), ("four", 2), ("five", 0), ("six", 3)),
    ]
    rankings = rankings_of(chosen, chat_tokenizer)
    with torch.no_grad():
        model.offset.fill_(0.3)
        model.scale.fill_(2.0)
        before, labels = score_comparisons(model, rankings, chosen)

    class Saver:
        parallel = SINGLE_PROCESS

        def save(self, *, final: bool) -> checkpoint.Checkpoint:
            return checkpoint.Checkpoint(tmp_path / f"step-{final:06}")

    assert normalise(Saver(), model, rankings, chosen, torch.float32) == "checkpoints/step-000001"  # type: ignore[arg-type]
    with torch.no_grad():
        after, _ = score_comparisons(model, rankings, chosen)
    known = ~labels.isnan()
    assert known.tolist() == [[True, True, False, False], [True] * 4]
    expected = (before - before[known].mean()) / before[known].std()
    torch.testing.assert_close(after[known], expected[known], atol=1e-5, rtol=0)


def test_the_length_baseline_by_hand() -> None:
    longer = [comparison(("aaaa", 2.0), ("bb", 0.0)), comparison(("cccccc", 3.0), ("d", 1.0))]
    shorter = [comparison(("aaaa", 0.0), ("bb", 2.0)), comparison(("cccccc", 1.0), ("d", 3.0))]
    assert length_baseline(longer, longer, 0.5) == 1.0
    assert length_baseline(shorter, shorter, 0.5) == 1.0  # "the shorter wins" is as good a rule
    assert length_baseline(longer, shorter, 0.5) == 0.0  # the rule is chosen on the training pairs
    assert length_baseline(shorter, longer, 0.5) == 0.0
    # three pairs: 4 > 2 letters with 2 > 0 right; 4 = 4 letters half; 2 < 4 with 0 < 1 right; 2.5 of 3
    mixed = [comparison(("aaaa", 2.0), ("bb", 0.0), ("cccc", 1.0))]
    assert length_baseline(longer, mixed, 0.5) == pytest.approx(2.5 / 3)
    # ratings within the margin are no pair
    assert length_baseline(longer, [comparison(("aaaa", 0.0), ("bb", 0.4), ("c", -3.0))], 0.5) == 1.0


def test_a_length_bias_shows_in_the_report(
    sft_bench: Any, tmp_path: Path, babble: Any, make_fit: Callable[..., FitConfig]
) -> None:
    draw = babble(5)
    for side, count in (("train", 40), ("validation", 12)):
        rows = [comparison((draw.document(3), 1.0), (draw.sentence(), 0.0)) for _ in range(count)]
        (tmp_path / f"comparisons-{side}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    config = Config(
        comparisons=str(tmp_path),
        max_tokens=64,
        fit=make_fit(steps=6, batch_size=4),
        optim=OptimConfig(learning_rate=1e-3),
    )
    report = sft_bench.run(reward, config, tmp_path / "reward")
    measures = {measure.name: measure for measure in report.measures}
    assert measures["accuracy of length alone"].after == 1.0
    assert measures["accuracy of length alone"].better == "context"


def test_own_comparisons_may_have_any_number_of_answers(
    sft_bench: Any, tmp_path: Path, babble: Any, make_fit: Callable[..., FitConfig]
) -> None:
    draw = babble(6)
    for side in ("train", "validation"):
        rows = [
            comparison(*((draw.sentence(n % 3 - 1), float(n)) for n in range(k)))
            for k in (2, 4, 3, 2)
            for _ in range(9)
        ]
        (tmp_path / f"comparisons-{side}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    config = Config(comparisons=str(tmp_path), max_tokens=48, fit=make_fit(steps=3, batch_size=4))
    report = sft_bench.run(reward, config, tmp_path / "reward")
    # 9 prompts of three and of four answers, 18 of two; their labels are all different
    (table,) = (table for table in report.tables if "number of answers" in table.title)
    assert [row[:3] for row in table.rows] == [["2", "18", "18"], ["3", "9", "27"], ["4", "9", "54"]]


def test_an_encoded_answer_always_ends_with_the_end_token(chat_tokenizer: Tokenizer) -> None:
    end, assistant = (chat_tokenizer.control_ids[name] for name in ("<|end|>", "<|assistant|>"))
    answer = "The cat is old and the river is green."
    whole = encode_answer(ASK, answer, NATIVE, chat_tokenizer, 200)
    before = NATIVE.encode(list(ASK), chat_tokenizer, add_generation_prompt=True).ids
    content = chat_tokenizer.encode(answer)
    assert whole == [*before, *content, end]
    # too little room: the prompt loses its beginning, and keeps where the answer begins
    cut = encode_answer(ASK, answer, NATIVE, chat_tokenizer, len(content) + 4)
    assert cut == [*before[-3:], *content, end] and cut[2] == assistant
    # an answer that fills everything loses its end, never the end token
    tight = encode_answer(ASK, answer, NATIVE, chat_tokenizer, 8)
    assert tight == [assistant, *content[:6], end]


def test_a_batch_forwards_every_answer_once_and_marks_padding(chat_tokenizer: Tokenizer) -> None:
    chosen = [comparison(("yes", 2.0), ("no, never", 0.0)), comparison(("a", 0.0), ("b", 0.2), ("c", 3.0))]
    batch = rankings_of(chosen, chat_tokenizer).batch(chosen)
    assert batch.ids.shape[0] == 6 and batch.labels.shape == (2, 3)
    assert batch.labels.isnan().tolist() == [[False, False, True], [False] * 3]
    rows = [
        encode_answer(ASK, text, NATIVE, chat_tokenizer, 40)
        for text in ("yes", "no, never", "", "a", "b", "c")
    ]
    assert [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)] == rows
    assert batch.weight == 2.0
    tied = rankings_of(chosen, chat_tokenizer, tie_tolerance=5.0).batch(chosen)
    assert tied.weight == 0.0


def test_step_is_the_loss_of_the_scores_and_their_accuracy(
    chat_tokenizer: Tokenizer, lively_scalar: Callable[..., ScalarModel]
) -> None:
    chosen = [comparison(("yes", 2.0), ("no, never", 0.0)), comparison(("a", 0.0), ("b", 1.0), ("c", 3.0))]
    model = lively_scalar(8, vocab_size=chat_tokenizer.vocab_size)
    batch = rankings_of(chosen, chat_tokenizer).batch(chosen)
    with torch.no_grad():
        alone = torch.stack(
            [model(row[mask][None])[0, -1] for row, mask in zip(batch.ids, batch.mask, strict=True)]
        )
        outcome = step(model, batch)
    expected = bradley_terry_loss(alone.view(2, 3), batch.labels, 0.5)
    torch.testing.assert_close(outcome.loss, expected, atol=1e-5, rtol=0)
    table = alone.view(2, 3)
    right = [
        table[0, 0] > table[0, 1],
        table[1, 1] > table[1, 0],
        table[1, 2] > table[1, 0],
        table[1, 2] > table[1, 1],
    ]
    assert float(outcome.logged["accuracy"]) == pytest.approx(2.0 * sum(map(int, right)) / 4)


def test_a_lead_is_asked_for_in_proportion_to_the_ratings(
    chat_tokenizer: Tokenizer, lively_scalar: Callable[..., ScalarModel]
) -> None:
    model = lively_scalar(1, vocab_size=chat_tokenizer.vocab_size)
    made = [comparison(("good", 2.0), ("plain", 0.5), ("bad", -1.0))]
    with torch.no_grad():
        plain, led = (
            step(model, rankings_of(made, chat_tokenizer, rating_margin=margin).batch(made)).loss
            for margin in (0.0, 0.3)
        )
        batch = rankings_of(made, chat_tokenizer).batch(made)
        scores = model.score(batch.ids, batch.mask).tolist()
    # the differences of the ratings are 1.5, 3 and 1.5
    gaps = [
        scores[0] - scores[1] - 0.3 * 1.5,
        scores[0] - scores[2] - 0.3 * 3.0,
        scores[1] - scores[2] - 0.3 * 1.5,
    ]
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 3
    assert float(led) == pytest.approx(expected, rel=1e-4) and float(led) > float(plain)


def test_comparisons_from_ratings_use_each_text_once_per_pass() -> None:
    texts = [LabelledText.of(f"text {n}", float(n)) for n in range(10)]
    prompts = [({"role": "user", "content": word},) for word in ("a", "b")]
    made = from_ratings(texts, prompts, 3, seed=1, passes=2)  # type: ignore[arg-type]
    assert len(made) == 6
    for turn in (made[:3], made[3:]):
        used = [response for one in turn for response in one.responses]
        assert len(set(used)) == 9
    assert all(
        float(text.split()[1]) == score
        for one in made
        for text, score in zip(one.responses, one.scores, strict=True)
    )
    assert [one.responses for one in made[:3]] != [one.responses for one in made[3:]]
    assert made == from_ratings(texts, prompts, 3, seed=1, passes=2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="too few"):
        from_ratings(texts, prompts, 11, seed=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no conversations to take prompts from"):
        from_ratings(texts, [], 3, seed=1)


def test_correlation_by_hand() -> None:
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6) = 0.866025
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 3.0, 3.0])) == pytest.approx(
        0.866025, abs=1e-6
    )
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 1.0])) == pytest.approx(-1.0)
    assert correlation(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == 0.0


def test_a_base_model_without_a_template_is_refused(pretrain_bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        pretrain_bench.run(reward, Config(base="pretrain"), tmp_path / "reward")


def test_length_that_decides_all_is_said_loudly(
    sft_bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the console and at the top of the report, as a person sees it; and that five pairs are few."""
    own = tmp_path / "own"
    own.mkdir()
    for side, count in (("train", 40), ("validation", 5)):
        rows = [
            Comparison.of(
                [{"role": "user", "content": f"How is the cat number {n}?"}],
                ["The cat is old and the house is new.", "The cat is old."],
                [1.0, 0.0],
            )
            for n in range(count)
        ]
        text = "".join(row.to_json() + "\n" for row in rows)
        files.write_text(own / f"comparisons-{side}.jsonl", text)
    given = {
        "base": sft_bench.inputs["sft"],
        "comparisons": own,
        "center_on": "answers",
        "max_tokens": 48,
        "fit.steps": 40,
        "fit.batch_size": 4,
        "fit.precision": "fp32",
        "optim.learning_rate": 0.004,
        "out": tmp_path / "run" / "reward",
    }
    arguments = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert cli.main(["reward", *arguments]) == 0
    told = " ".join(capsys.readouterr().out.split())
    report = (tmp_path / "run" / "reward" / "report.md").read_text()
    for text in (
        "the longer answer always wins in your 45 pairs: the reward model may have learnt length alone",
        "only 5 held-out pairs: the accuracy of 1.000 may be anywhere in its 95 % interval 0.57 to 1.00",
    ):
        assert f"WARNING: {text}" in told and f"**Warning:** {text}" in report
    assert "accuracy on held-out pairs (95 % interval 0.566 to 1.000, 5 pairs)" in told
    facts = files.read_json(tmp_path / "run" / "reward" / "result.json")["facts"]
    assert facts["held_out_pairs"] == 5
    assert facts["held_out_accuracy_interval"] == [pytest.approx(0.5655, abs=1e-4), 1.0]
