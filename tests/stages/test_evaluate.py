"""The comparison of two models on held-out prompts: its numbers, its interval, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatwright import checkpoint, files
from chatwright.chat import NATIVE
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.language_model import load_parts
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.reports.extras import sample
from chatwright.stages import evaluate
from chatwright.stages.evaluate import Config
from chatwright.tokenizer import Tokenizer
from chatwright.train.rl.gold import sentiment
from chatwright.train.rl.rollout import (
    completion_log_probs,
    distinct,
    prompts_from,
    sample_completions,
    texts_of,
)
from chatwright.train.statistics import bootstrap_interval
from chatwright.train.workspace import Report, Workspace

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
    )


def test_a_model_compared_with_itself_has_changed_nothing(save: Save, data: Path, tmp_path: Path) -> None:
    one = save("one", 1)
    report = evaluate.run(config_of(one, one, data), Workspace(tmp_path / "eval", 5))
    assert report.facts["gain"] == 0.0 and report.facts["interval"] == [0.0, 0.0]
    assert report.facts["kl"] == pytest.approx(0.0, abs=1e-6)
    for measure in report.measures:
        if measure.name != "KL on held-out prompts":
            assert measure.before == measure.after


def test_the_measures_are_those_of_the_answers(save: Save, data: Path, tmp_path: Path) -> None:
    config = config_of(save("two", 2, word=" love"), save("one", 1), data)
    report = evaluate.run(config, Workspace(tmp_path / "eval", 5))
    policy, reference = load_parts(config.policy), load_parts(config.reference)
    dialogues = [
        Dialogue.from_json(line) for line in (data / "dialogues-validation.jsonl").read_text().splitlines()
    ]
    prompts = prompts_from(dialogues, NATIVE, TOKENIZER, max_tokens=40, most=10)
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
    assert [pair["after"] for pair in report.answers.pairs] == texts["after"][:10]
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
    with pytest.raises(UserError, match="no held-out prompts"):
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
