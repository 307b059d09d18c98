"""The comparison of two models on held-out prompts: its numbers, its interval, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, files
from chatwright.chat import NATIVE
from chatwright.config import UsageError, UserError
from chatwright.data.examples import Comparison, Dialogue
from chatwright.evaluate.preferences import ranked_by_policy
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.reports.extras import sample
from chatwright.stages import evaluate, ppo, reward
from chatwright.stages.evaluate import Config
from chatwright.tokenizer import Tokenizer
from chatwright.train.rl.gold import sentiment
from chatwright.train.rl.prompts import exchanges_from
from chatwright.train.rl.rollout import (
    completion_log_probs,
    distinct,
    sample_completions,
    texts_of,
)
from chatwright.train.statistics import bootstrap_interval
from chatwright.train.workspace import Report, Workspace
from support.planted import LEARNING
from support.road import REWARD

TOKENIZER = Tokenizer.train(["love hate good bad the cat is " * 3], 300)
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a random chat model; `bias` makes a word likelier."""

    def make(
        name: str, seed: int, *, tokenizer: Tokenizer = TOKENIZER, word: str = "", template: bool = True
    ) -> Path:
        config = GPTConfig.preset("modern-nano", vocab_size=tokenizer.vocab_size, context=64, tied=False)
        draw = torch.Generator().manual_seed(seed)
        model = GPT(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" not in parameter_name:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
                    )
            if word:
                for token in tokenizer.encode(word):
                    model.head.weight[token] *= 6.0
        card = {"kind": "language", "model": config.to_dict(), "tokenizer": tokenizer.fingerprint}
        texts = {"tokenizer.json": tokenizer.to_json()}
        if template:
            texts["chat_template.jinja"] = NATIVE.source
        tensors = {"model": checkpoint.model_tensors(model)}
        checkpoint.save_checkpoint(tmp_path / name, tensors=tensors, state=card, texts=texts)
        return tmp_path / name

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Held-out dialogues."""
    made = [Dialogue.of([{"role": "user", "content": f"is the cat {n}?"}]) for n in range(12)]
    files.write_text(
        tmp_path / "data" / "dialogues-validation.jsonl", "".join(one.to_json() + "\n" for one in made)
    )
    return tmp_path / "data"


def config_of(policy: Path, reference: Path, data: Path) -> Config:
    return Config(
        policy=str(policy),
        reference=str(reference),
        data=str(data),
        prompts=10,
        samples=3,
        max_new_tokens=8,
        max_prompt_tokens=40,
        gold="sentiment",
    )


def test_a_model_compared_with_itself_has_changed_nothing(save: Save, data: Path, tmp_path: Path) -> None:
    one = save("one", 1)
    report = evaluate.run(config_of(one, one, data), Workspace(tmp_path / "eval", 5))
    assert report.facts["gain"] == 0.0 and report.facts["interval"] == [0.0, 0.0]
    assert report.facts["kl"] == pytest.approx(0.0, abs=1e-6)
    for measure in report.measures:
        if measure.name != "KL on held-out prompts":
            assert measure.before == measure.after
    (gold,) = [measure for measure in report.measures if measure.name == evaluate.GOLD]
    assert gold.note.startswith("nothing was shown, the interval holds 0: +0.000")
    assert report.notes[0] == "conclusion: nothing was shown: no measure has an interval that leaves out 0"
    # what is not there is left out with a line
    assert "the reward model is left out: the run has no stage reward" in report.notes
    assert "own comparisons are left out" in " ".join(report.notes)


def test_the_measures_are_those_of_the_answers(save: Save, data: Path, tmp_path: Path) -> None:
    config = config_of(save("two", 2, word=" love"), save("one", 1), data)
    report = evaluate.run(config, Workspace(tmp_path / "eval", 5))
    policy, reference = load_parts(config.policy), load_parts(config.reference)
    dialogues = [
        Dialogue.from_json(line) for line in (data / "dialogues-validation.jsonl").read_text().splitlines()
    ]
    prompts = exchanges_from(dialogues, NATIVE, TOKENIZER, limit=40, most=10).prompts
    assert len(prompts) == report.facts["prompts"] == 10
    end = TOKENIZER.control_ids["<|end|>"]
    texts, golds = {}, {}
    for side, parts in (("before", reference), ("after", policy)):
        answers = sample_completions(
            parts.model, prompts * 3, end=end, max_new_tokens=8, temperature=1.0, seed_parts=(5, "eval")
        )
        texts[side] = texts_of(answers, TOKENIZER)
        golds[side] = sentiment(texts[side])
    with torch.no_grad():
        own, base = (
            completion_log_probs(parts.model, answers, temperature=1.0)[0] for parts in (policy, reference)
        )
    measures = {measure.name: (measure.before, measure.after) for measure in report.measures}
    means = tuple(sum(golds[side]) / 30 for side in ("before", "after"))
    assert measures["gold sentiment, held-out prompts"] == pytest.approx(means, abs=1e-6)
    assert report.facts["gain"] == pytest.approx(means[1] - means[0], abs=1e-6) and report.facts["gain"] > 0
    low, high = report.facts["interval"]
    assert low <= report.facts["gain"] <= high
    # KL per answer, in the answers of the policy, from the reference
    assert measures["KL on held-out prompts"][1] == pytest.approx(float((own - base).sum()) / 30, abs=1e-3)
    assert report.facts["kl"] > 0.5
    expected = (distinct(texts["before"]), distinct(texts["after"]))
    assert measures["distinct-2, held-out prompts"] == pytest.approx(expected)
    assert report.answers is not None
    # the answers that are shown are those of a chat: temperature 0.7
    chat = sample_completions(
        policy.model, prompts, end=end, max_new_tokens=8, temperature=0.7, seed_parts=(5, "as in chat")
    )
    assert [pair["after"] for pair in report.answers.pairs] == texts_of(chat, TOKENIZER)
    assert [pair["prompt"] for pair in report.answers.pairs] == [f"is the cat {n}?" for n in range(10)]
    assert report.answers.sampling.startswith("temperature 0.7 (the default") and (
        "(what is measured: temperature 1)" in report.answers.sampling
    )
    assert evaluate.run(config, Workspace(tmp_path / "again", 5)).measures == report.measures


def test_models_that_cannot_be_compared_are_refused(save: Save, data: Path, tmp_path: Path) -> None:
    one = save("one", 1)
    other = save("other", 1, tokenizer=Tokenizer.train(["quite another text"], 290))
    base = save("base", 1, template=False)
    for pair, said in (
        ((one, other), "not chat models with one tokenizer"),
        ((base, one), "no chat template"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.run(config_of(*pair, data), Workspace(tmp_path / "eval", 5))
    short = replace(config_of(one, one, data), max_prompt_tokens=2)
    with pytest.raises(UserError, match="raise max_prompt_tokens to 16 or more"):
        evaluate.run(short, Workspace(tmp_path / "eval", 5))


def test_the_bootstrap_interval() -> None:
    assert bootstrap_interval(torch.full((20,), 0.25), seed=1) == (0.25, 0.25)
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 2 + 1
    low, high = bootstrap_interval(values, seed=1)
    mean, error = float(values.mean()), float(values.std()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(values, seed=1) == (low, high) != bootstrap_interval(values, seed=2)


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(100):
        values = torch.rand(60, generator=torch.Generator().manual_seed(seed))
        low, high = bootstrap_interval(values, seed=seed, draws=400)
        held += low <= 0.5 <= high
    # 95 expected; fewer than 86 would be four standard deviations, 1.96 errors taken for one would give 68
    assert 86 <= held <= 100


def test_sentiment_knows_good_from_bad() -> None:
    good, plain, bad = sentiment(
        ["I love this, it is great!", "The table has four legs.", "This is awful, I hate it."]
    )
    assert good > 0.5 and plain == 0.0 and bad < -0.5
    assert all(math.isfinite(value) for value in sentiment(["", "☃", "x" * 1000]))


def test_a_sample_of_a_stage_s_model(save: Save) -> None:
    chat, base = save("chat", 1), save("base", 1, template=False)
    made = Report(model=".")
    assert sample(chat, made, "is the cat good?", 1) == sample(chat, made, "is the cat good?", 1) != ""
    assert sample(chat, made, "is the cat good?", 1) != sample(chat, made, "is the cat good?", 2)
    assert sample(base, made, "is the cat good?", 1) != ""
    assert sample(chat, Report(), "is the cat good?", 1) == ""


# ---- own comparisons, and a reward model -------------------------------------------------------------------


Pairs = Sequence[tuple[int, str, str]]


def comparisons(directory: Path, held_out: Pairs, train: Pairs | None = None) -> Path:
    """A folder of comparisons: (number in the prompt, preferred answer, rejected answer)."""
    for side, pairs in (("train", train or held_out), ("validation", held_out)):
        rows = [
            Comparison.of([{"role": "user", "content": f"How is the cat number {n}?"}], pair, [1.0, 0.0])
            for n, *pair in pairs
        ]
        text = "".join(row.to_json() + "\n" for row in rows)
        files.write_text(directory / f"comparisons-{side}.jsonl", text)
    return directory


def test_likelihoods_rank_as_by_hand(save: Save, tmp_path: Path) -> None:
    """The mean log-probability per token of the answer and its end, given the prompt."""
    parts = load_parts(save("one", 1))
    assert parts.tokenizer is not None and parts.template is not None
    rows = [
        Comparison.of([{"role": "user", "content": "is the cat"}], ["good", "bad bad bad"], [1.0, 0.0]),
        Comparison.of([{"role": "user", "content": "the"}], ["love", "hate", "the cat"], [0.0, 1.0, 2.0]),
    ]
    found = ranked_by_policy(parts.model, rows, parts.template, parts.tokenizer)
    assert found.labels.isnan().tolist() == [[False, False, True], [False] * 3]
    end = parts.tokenizer.control_ids["<|end|>"]
    for n, row in enumerate(rows):
        asked = parts.template.encode(list(row.prompt), parts.tokenizer, add_generation_prompt=True).ids
        for k, answer in enumerate(row.responses):
            ids = [*parts.tokenizer.encode(answer), end]
            with torch.no_grad():
                log_p = parts.model(torch.tensor([[*asked, *ids]]))[0].float().log_softmax(-1)
            each = [float(log_p[len(asked) + t - 1, token]) for t, token in enumerate(ids)]
            assert float(found.scores[n, k]) == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_a_policy_that_prefers_what_people_do_is_better(save: Save, data: Path, tmp_path: Path) -> None:
    own = comparisons(tmp_path / "own", [(n, " love the cat", " hate the cat") for n in range(20)])
    config = replace(config_of(save("two", 2, word=" love"), save("one", 1), data), comparisons=str(own))
    report = evaluate.run(config, Workspace(tmp_path / "eval", 5))
    (likelier,) = [one for one in report.measures if one.name == evaluate.LIKELIER]
    assert (likelier.before, likelier.after) == (0.0, 1.0) or likelier.after == 1.0
    other = comparisons(tmp_path / "other", [(n, " hate the cat", " love the cat") for n in range(20)])
    worse = evaluate.run(replace(config, comparisons=str(other)), Workspace(tmp_path / "again", 5))
    (unlikelier,) = [one for one in worse.measures if one.name == evaluate.LIKELIER]
    assert unlikelier.after == 1 - likelier.after  # the same numbers, the other way round
    ties = replace(config, tie_tolerance=2.0)
    notes = evaluate.run(ties, Workspace(tmp_path / "ties", 5)).notes
    assert "own comparisons are left out: all that are held out are ties" in notes


def test_a_name_that_is_wrong_is_no_missing_input(save: Save, data: Path, tmp_path: Path) -> None:
    one = save("one", 1)
    for name in ("reward", "comparisons"):
        config = replace(config_of(one, one, data), **{name: "rewrad"})
        with pytest.raises(UserError, match="'rewrad' is neither a finished stage"):
            evaluate.run(config, Workspace(tmp_path / "eval", 5))
    with pytest.raises(UsageError, match="gold 'happy' is none of auto, sentiment"):
        Config(gold="happy")


def settings_of(stage: Path, text: str) -> Path:
    files.write_text(stage / "config.yaml", text)
    return stage


@pytest.mark.parametrize(
    ("ratings", "reward", "expected"),
    [
        ("vader-movies,vader-tweets", "comparisons: ''", True),
        ("vader-movies,vader-tweets", "comparisons: data", False),
        ("mine.jsonl", "comparisons: ''", False),
        ("''", "comparisons: ''", False),
    ],
)
def test_the_lexicon_where_it_fits(ratings: str, reward: str, expected: bool, tmp_path: Path) -> None:
    inputs = {
        "data": settings_of(tmp_path / "data", f"use: data\nratings: {ratings}\n"),
        "reward": settings_of(tmp_path / "reward", f"use: reward\n{reward}\n"),
    }
    workspace = Workspace(tmp_path / "eval", 5, inputs)
    assert evaluate.wants_sentiment(Config(), workspace) is expected
    assert evaluate.wants_sentiment(Config(gold="sentiment"), workspace)
    assert not evaluate.wants_sentiment(Config(gold=""), workspace)


EVALUATED = {"prompts": 60, "samples": 4, "max_prompt_tokens": 40, "max_new_tokens": 18}


@pytest.mark.learns
def test_planted_preferences_are_found_and_shuffled_ones_are_not(
    sft_bench: Any, tmp_path: Path, babble: Any, learnt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same road twice, from the same comparisons: as people gave them, and with each pair both ways."""
    draw = torch.Generator().manual_seed(3)

    def answer(words: Sequence[str]) -> str:
        word, plain = (
            side[int(torch.randint(len(side), (1,), generator=draw))] for side in (words, babble.PLAIN)
        )
        return f"The cat is {word} and {plain}."

    pairs = [(n, answer(babble.GOOD), answer(babble.BAD)) for n in range(120)]
    both = [pair for n, good, bad in pairs[::2] for pair in ((n, good, bad), (n, bad, good))]
    facts, warned = {}, {}
    for name, chosen in (("planted", pairs), ("shuffled", both)):
        own = comparisons(tmp_path / name / "own", chosen[:40], chosen[40:])
        bench = sft_bench.with_(own=own)
        trained = replace(REWARD, comparisons="own", k=2)
        bench.run(reward, trained, tmp_path / name / "reward", held_out_correlation=1.0)
        bench = bench.with_(reward=tmp_path / name / "reward")
        policy = bench.run(ppo, LEARNING, tmp_path / name / "ppo")
        bench = bench.with_(ppo=tmp_path / name / "ppo")
        capsys.readouterr()
        report = bench.run(evaluate, Config(comparisons="own", **EVALUATED), tmp_path / name / "eval")
        facts[name], warned[name] = report.facts, policy.warnings
        assert report.notes[0] in " ".join(capsys.readouterr().out.split())
    better, nothing = (facts[name]["conclusion"] for name in ("planted", "shuffled"))
    assert better == {"better": [evaluate.REWARD, evaluate.WINS, evaluate.LIKELIER], "worse": []}
    assert nothing == {"better": [], "worse": []}
    assert facts["shuffled"]["reward_accuracy"]["share"] == 0.5
    assert any("guessing has 0.5" in one for one in warned["shuffled"])
    assert not any("guessing" in one for one in warned["planted"])
