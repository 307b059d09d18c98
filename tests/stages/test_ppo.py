"""PPO as a stage: a planted reward rises, the best is kept, and every guard does what it says."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, files
from chatwright.config import UsageError, UserError
from chatwright.data.examples import Dialogue
from chatwright.data.records import read_records
from chatwright.language_model import load_parts
from chatwright.metrics import read_metrics
from chatwright.model.config import GPTConfig
from chatwright.stages import ppo
from chatwright.stages.ppo import Config, score_rollouts
from chatwright.tokenizer import Tokenizer
from chatwright.train.base import open_chat_base
from chatwright.train.rl import run as rl_run
from chatwright.train.rl import training
from chatwright.train.rl.fixed_prompts import FixedPrompts, prompt_sets
from chatwright.train.rl.models import RLModels, load_reward
from chatwright.train.rl.prompts import exchanges_from
from chatwright.train.rl.rollout import (
    Completions,
    completion_log_probs,
    sample_completions,
    texts_of,
)
from chatwright.train.stopping import Interrupted
from chatwright.train.workspace import Workspace
from support.planted import LEARNING, MINI, gain, plant_fixed


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return read_metrics(directory / "metrics.jsonl")


@pytest.mark.learns
def test_a_planted_reward_rises_while_kl_is_told(planted_bench: Any, tmp_path: Path, learnt: Any) -> None:
    directory = tmp_path / "ppo"
    report = planted_bench.run(ppo, LEARNING, directory)
    rows = rows_of(directory)
    assert [row["step"] for row in rows] == list(range(13))
    best = report.facts["best"]
    learnt("gain", gain(rows), above=0.5)
    learnt("KL", best["kl"], above=0.05)
    # and the report says so, from prompts that were neither trained on nor had a say in what is kept
    shown = report.facts["held_out"]["score"]
    learnt("lower end of the gain on held-out prompts", shown["interval"][0], above=0.2)
    assert (
        abs(rows[0]["kl"]) < 1e-4 and abs(rows[0]["kl_k3"]) < 1e-4
    )  # policy and reference are the same at first
    assert all(row["sampler_gap"] < 1e-4 for row in rows)
    (score, kl, *_) = report.measures
    assert (score.name, kl.name) == ("reward model's score, held-out prompts", "KL to the SFT model")
    assert score.before is not None and score.after is not None and "nothing was shown" not in score.note
    assert shown["difference"] == pytest.approx(score.after - score.before, abs=1e-6)
    assert shown["prompts"] == 60  # all that the miniature has
    assert kl.before == 0.0 and kl.after == pytest.approx(best["kl"], rel=0.5)
    for row in rows[:-1]:
        assert {"policy_loss", "value_loss", "clip_fraction", "entropy", "explained_variance", "beta"} <= set(
            row
        )
    # four rounds of warm-up, then the learning rate falls linearly to 0
    rates = [row["learning_rate"] for row in rows[:-1]]
    full = LEARNING.optim.learning_rate
    expected = [*(full * n / 4 for n in range(1, 5)), *(full * (1 - n / 8) for n in range(8))]
    assert rates == pytest.approx(expected, abs=1e-6)
    assert report.facts["stopped"] == "all iterations done"

    # what is kept is the best candidate on the fixed prompts, every second iteration and at the end
    chosen = {row["step"]: row["fixed_score"] for row in rows if "fixed_score" in row}
    assert sorted(chosen) == [0, 2, 4, 6, 8, 10, 12]
    assert chosen[best["step"]] == max(chosen.values()) == pytest.approx(best["score"], abs=1e-5)
    score_again, kl_again = measured_again(planted_bench, directory / str(report.model))
    assert score_again == pytest.approx(best["score"], abs=1e-4)
    assert kl_again == pytest.approx(best["kl"], abs=1e-3)


def test_a_policy_in_bf16_rounds_and_no_more(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with a run in float32 that learns from the same answers: its own would differ where rounding
    turns a token."""
    short = replace(MINI, iterations=4, optim=replace(MINI.optim, learning_rate=5e-5))  # no time to warm up
    sampled: list[Completions] = []
    real = training.sample_completions

    def remembered(*given: Any, **named: Any) -> Completions:
        sampled.append(real(*given, **named))
        return sampled[-1]

    def replayed(policy: Any, *given: Any, **named: Any) -> Completions:
        answers = sampled.pop(0)
        with torch.no_grad():
            return replace(answers, sampled=completion_log_probs(policy, answers, temperature=1.0)[0])

    monkeypatch.setattr(training, "sample_completions", remembered)
    planted_bench.run(ppo, replace(short, policy_precision="bf16"), tmp_path / "ppo")
    monkeypatch.setattr(training, "sample_completions", replayed)
    planted_bench.run(ppo, short, tmp_path / "exact")
    rows, exact = rows_of(tmp_path / "ppo"), rows_of(tmp_path / "exact")
    assert len(rows) == 5 and rows[0]["kl"] == 0.0  # reference and policy round alike
    assert all(1e-4 < row["sampler_error"] < 0.05 for row in rows)
    assert all(row["first_ratio_gap"] < 0.05 for row in rows[:-1])
    for mine, theirs in zip(rows[:2], exact[:2], strict=True):
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-6)
        assert mine["value_loss"] == pytest.approx(theirs["value_loss"], rel=0.02)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.1)


def measured_again(bench: Any, saved: Path) -> tuple[float, float]:
    """Score and KL of a saved policy on the first 32 training prompts, with the seeds of every candidate."""
    kept, base = load_parts(saved), load_parts(bench.inputs["sft"])
    tokenizer, template = kept.tokenizer, kept.template
    assert tokenizer is not None and template is not None
    dialogues = list(read_records(bench.inputs["data"] / "dialogues-train.jsonl", Dialogue))
    answers = sample_completions(
        kept.model,
        exchanges_from(dialogues, template, tokenizer, limit=40, most=32).prompts,
        end=tokenizer.control_ids["<|end|>"],
        max_new_tokens=18,
        temperature=1.0,
        seed_parts=(bench.seed, "ppo", "choosing"),
    )
    judge = rl_run.load_reward(Path(), base, 0.0)
    models = RLModels(kept.model, base.model, judge, judge)
    _, logged = score_rollouts(models, answers, 0.0, MINI)
    return logged["score"], logged["kl"]


def test_it_stops_beyond_the_kl_budget_and_keeps_the_best_within(planted_bench: Any, tmp_path: Path) -> None:
    config = replace(
        MINI,
        kl_budget=0.4,
        kl_target=0.0,
        beta=0.0,
        iterations=10,
        evaluate_every=1,
        optim=replace(MINI.optim, learning_rate=3e-3),
    )
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    rows = rows_of(tmp_path / "ppo")
    assert "beyond the budget of 0.4 nats" in report.facts["stopped"]
    assert report.facts["iterations"] == len(rows) - 1 < 10
    assert rows[-1]["kl"] > 0.4 and all(row["kl"] <= 0.4 for row in rows[:-1])
    assert report.facts["best"]["kl"] <= 0.4 and report.facts["best"]["step"] < rows[-1]["step"]
    assert (tmp_path / "ppo" / str(report.model) / "model.safetensors").is_file()
    assert [row["beta"] for row in rows] == [0.0] * len(rows)  # a target of 0 keeps beta as it is


ROUNDS = {
    # (score, KL, distinct-2) of each round -> the round that is kept; 80 % of the first distinct-2 are 0.64
    "the best score": ([(0.0, 0.0, 0.8), (2.0, 1.0, 0.8), (1.0, 2.0, 0.8), (1.5, 2.0, 0.8)], 1),
    "variety is lost": ([(0.0, 0.0, 0.8), (0.5, 1.0, 0.65), (1.0, 1.0, 0.63), (2.0, 1.0, 0.5)], 1),
    "beyond the KL budget": ([(0.0, 0.0, 0.8), (0.5, 3.9, 0.8), (1.0, 7.8, 0.8), (2.0, 8.1, 0.8)], 2),
    "nothing is better": ([(0.0, 0.0, 0.8), (-0.5, 1.0, 0.8), (-1.0, 1.0, 0.8), (0.0, 1.0, 0.8)], 0),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_what_is_kept(planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    told, kept = ROUNDS[name]
    seen = plant_fixed(monkeypatch, told)
    config = replace(MINI, iterations=3, batch_size=8, minibatch_size=8, evaluate_every=1)
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    assert len(rows_of(tmp_path / "ppo")) == 4
    best = report.facts["best"]
    assert best["step"] == kept and best["score"] == pytest.approx(told[kept][0])
    assert report.model == f"checkpoints/step-{kept:06}" and (tmp_path / "ppo" / report.model).is_dir()
    # the held-out prompts are answered by the model that training starts from and by the result, no candidate
    assert [one.name for one in seen] == ["held out", *["choosing"] * 4, "held out"]
    assert any("no later candidate was better" in note for note in report.notes) == (kept == 0)


def test_measuring_on_fixed_prompts_changes_no_weight(planted_bench: Any, tmp_path: Path) -> None:
    """Nor any number of the iterations: it has random streams of its own."""
    config = replace(MINI, iterations=4, batch_size=8, minibatch_size=8, save_steps=4)
    found = []
    for every, prompts in ((1, 16), (4, 3)):
        directory = tmp_path / str(every)
        changed = replace(config, evaluate_every=every, evaluate_prompts=prompts, held_out_prompts=prompts)
        planted_bench.run(ppo, changed, directory)
        rows = [
            {key: value for key, value in row.items() if not key.startswith("fixed_")}
            for row in rows_of(directory)
        ]
        saved = checkpoint.Checkpoint(directory / "checkpoints" / "step-000004").tensors("model")
        found.append((rows, saved))
    (rows, saved), (others, theirs) = found
    assert rows == others
    assert all(torch.equal(saved[name], theirs[name]) for name in saved)


@pytest.mark.parametrize("left", ["no file", "prompts that are too long"])
def test_without_held_out_conversations_some_prompts_are_left_out_of_training(
    left: str, planted_bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(planted_bench.inputs["data"] / "dialogues-train.jsonl", data)
    if left != "no file":
        long = Dialogue.of([{"role": "user", "content": "word " * 60}])
        files.write_text(data / "dialogues-validation.jsonl", long.to_json() + "\n")
    config = replace(MINI, iterations=1, batch_size=8, minibatch_size=8, held_out_prompts=20)
    report = planted_bench.with_(data=data).run(ppo, config, tmp_path / "ppo")
    told = " ".join(capsys.readouterr().out.split())
    said = "the result is measured on 20 training prompts that are left out of training"
    assert said in told and any(said in note for note in report.notes)
    assert report.facts["held_out"]["score"]["prompts"] == 20

    base = open_chat_base("sft", Workspace(tmp_path, inputs=planted_bench.inputs))
    dialogues = list(read_records(data / "dialogues-train.jsonl", Dialogue))
    prompts = exchanges_from(dialogues, base.template, base.tokenizer, limit=40, most=4_000).prompts
    sets = prompt_sets(prompts, data, base, config)
    assert sets.held_out is not None and list(sets.held_out.prompts) == prompts[4::5][:20]
    assert len(sets.training) == len(prompts) - 20
    assert list(sets.choosing.prompts) == list(sets.training[:32])


def test_few_prompts_are_answered_several_times() -> None:
    few = FixedPrompts("choosing", [[1], [2], [3]], 8)
    assert few.samples == 3 and few.rows == [[1], [2], [3]] * 3
    assert FixedPrompts("choosing", [[n] for n in range(8)], 8).samples == 1


def test_lucky_iterations_choose_nothing(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations whose scores jump up and down by chance, and a policy that does not change: neither the
    choice nor the headline follows the best of them."""
    scores = iter([-0.73, -0.79, -0.65, -1.00, -0.80, -0.70])
    real = ppo.score_rollouts

    def noisy(*arguments: Any) -> Any:
        rollout, logged = real(*arguments)
        return rollout, {**logged, "score": next(scores)}

    monkeypatch.setattr(ppo, "score_rollouts", noisy)
    still = replace(MINI.optim, learning_rate=1e-9, warmup=0.0)
    config = replace(MINI, iterations=5, batch_size=8, minibatch_size=8, evaluate_every=1, optim=still)
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    assert report.facts["best"]["step"] == 0
    (score,) = [one for one in report.measures if one.name == "reward model's score, held-out prompts"]
    assert score.before == score.after
    assert score.note.startswith("nothing was shown, the interval holds 0: +0.000")
    assert any("nothing was shown" in note for note in report.notes)


def test_beta_follows_the_kl(planted_bench: Any, tmp_path: Path) -> None:
    config = replace(
        MINI,
        iterations=3,
        batch_size=8,
        minibatch_size=8,
        beta=0.5,
        beta_floor=0.3,
        kl_target=3.0,
        kl_horizon=40.0,
        optim=replace(MINI.optim, learning_rate=1e-4),
    )
    planted_bench.run(ppo, config, tmp_path / "ppo")
    rows = rows_of(tmp_path / "ppo")
    assert all(row["kl"] < 2.0 for row in rows)
    # far below the target: 0.5 x (1 - 0.2 x 8 / 40) = 0.48 and so on
    assert [row["beta"] for row in rows] == pytest.approx([0.5, 0.48, 0.4608, 0.442368], abs=1e-6)


def test_a_sampler_that_disagrees_stops_the_run(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.sample_completions

    def hotter(*arguments: Any, **settings: Any) -> Completions:
        return real(*arguments, **{**settings, "temperature": 1.3})

    monkeypatch.setattr(training, "sample_completions", hotter)
    with pytest.raises(UserError, match="stopped in iteration 0: sampler and trainer disagree"):
        planted_bench.run(ppo, MINI, tmp_path / "ppo")


def stage_with_reward(reward_bench: Any, directory: Path, **facts: Any) -> Path:
    """A copy of the reward stage whose result says something else."""
    shutil.copytree(reward_bench.inputs["reward"], directory)
    result = files.read_json(directory / "result.json")
    result["facts"] = facts
    files.write_json(directory / "result.json", result)
    return directory


def test_a_weak_reward_model_is_refused_with_the_reason(reward_bench: Any, tmp_path: Path) -> None:
    weak = stage_with_reward(reward_bench, tmp_path / "weak", held_out_correlation=0.31)
    with pytest.raises(
        UserError, match=r"correlation with held-out ratings is 0\.310, PPO wants 0\.6.*exploited"
    ) as caught:
        reward_bench.with_(reward=weak).run(ppo, MINI, tmp_path / "ppo")
    assert "min_correlation" in str(caught.value)  # and how to go on all the same
    assert not (tmp_path / "ppo" / "checkpoints").exists()
    unknown = stage_with_reward(reward_bench, tmp_path / "unknown")
    with pytest.raises(UserError, match="is not known"):
        reward_bench.with_(reward=unknown).run(ppo, MINI, tmp_path / "ppo")


def test_a_good_reward_model_is_taken(reward_bench: Any, sft_parts: Callable[[], Any]) -> None:
    base = sft_parts()
    reward = load_reward(reward_bench.inputs["reward"], base, 0.6)
    result = files.read_json(reward_bench.inputs["reward"] / "result.json")
    saved = checkpoint.Checkpoint(reward_bench.inputs["reward"] / result["model"])
    assert torch.equal(reward.scale, saved.tensors("model")["scale"]) and float(reward.scale) != 1.0


def test_what_is_no_reward_model_or_speaks_other_tokens_is_refused(
    reward_bench: Any, sft_parts: Callable[[], Any], tmp_path: Path
) -> None:
    base = sft_parts()
    with pytest.raises(UserError, match="holds no reward model"):
        load_reward(reward_bench.inputs["sft"], base, 0.6)
    other = replace(base, tokenizer=Tokenizer.train(["a b c a b c"], 266))
    with pytest.raises(UserError, match="another tokenizer"):
        load_reward(reward_bench.inputs["reward"], other, 0.6)
    broken = stage_with_reward(reward_bench, tmp_path / "broken", held_out_correlation=0.9)
    file = next((broken / "checkpoints").glob("*/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_reward(broken, base, 0.6)


@pytest.mark.learns
def test_ppo_with_the_trained_reward_model_improves_the_mood(
    reward_bench: Any, tmp_path: Path, babble: Any, learnt: Any
) -> None:
    """The whole chain: ratings -> reward model -> policy; good words become more frequent, bad ones rarer."""
    config = replace(LEARNING, min_correlation=0.5, min_tokens=7, batch_size=64)
    report = reward_bench.run(ppo, config, tmp_path / "ppo")
    first, best = report.measures[0].before, report.measures[0].after
    assert first is not None and best is not None
    learnt("rise of the score", best - first, above=0.3)

    def mood(directory: Path) -> float:
        parts = load_parts(directory)
        assert parts.tokenizer is not None and parts.template is not None
        prompts = [
            parts.template.encode(
                [{"role": "user", "content": f"How is the {thing} number {n}?"}],
                parts.tokenizer,
                add_generation_prompt=True,
            ).ids
            for thing in babble.THINGS
            for n in range(8)
        ]
        end = parts.tokenizer.control_ids["<|end|>"]
        answers = sample_completions(
            parts.model, prompts, end=end, max_new_tokens=18, temperature=1.0, seed_parts=("mood",)
        )
        words = [
            word for text in texts_of(answers, parts.tokenizer) for word in text.replace(".", "").split()
        ]
        return (sum(word in babble.GOOD for word in words) - sum(word in babble.BAD for word in words)) / len(
            prompts
        )

    rise = mood(tmp_path / "ppo" / str(report.model)) - mood(reward_bench.inputs["sft"])
    learnt("more good words an answer", rise, above=0.2)


def test_a_signal_stops_before_the_next_minibatch(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle, and in the last round, which counts no step and has no minibatches: nothing is done
    twice."""
    config = replace(MINI, iterations=2, batch_size=8, minibatch_size=8)
    calls = []
    real = ppo.score_rollouts

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 3):
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(ppo, "score_rollouts", interrupted)
    for message in ("saved in iteration 0, after 0 of its minibatches", "saved at iteration 2"):
        with pytest.raises(Interrupted, match=message):
            planted_bench.run(ppo, config, tmp_path / "ppo")
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    assert len(calls) == 4 and report.facts["iterations"] == 2
    assert [row["step"] for row in rows_of(tmp_path / "ppo")] == [0, 1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 10, "minibatch_size": 4},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"evaluate_every": 0},
        {"held_out_prompts": 0},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Config(**settings)


def test_prompts_that_are_all_too_long_are_an_error(planted_bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raise max_prompt_tokens"):
        planted_bench.run(ppo, replace(MINI, max_prompt_tokens=4), tmp_path / "ppo")


def test_a_base_model_is_refused(pretrain_bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        pretrain_bench.run(ppo, replace(MINI, base="pretrain"), tmp_path / "ppo")


def test_the_defaults_are_sane() -> None:
    config = Config()
    assert config.kl_target < config.kl_budget and config.beta >= config.beta_floor > 0
    assert math.isclose(config.optim.eps, 1e-5)
    assert GPTConfig.preset("modern-tiny").context >= config.max_prompt_tokens + config.max_new_tokens
