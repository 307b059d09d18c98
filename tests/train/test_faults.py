"""Each row of "how a run goes wrong": the fault is planted, and the run stops with the diagnosis, a report,
and its state kept."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, cli, files
from chatwright.data.examples import Comparison
from chatwright.metrics import read_metrics
from chatwright.stages import ppo, reward, sft
from chatwright.train.parallel import context
from chatwright.train.rl import run as rl_run
from chatwright.train.rl import training
from chatwright.train.rl.models import RLModels
from chatwright.train.rl.rollout import Completions, completion_log_probs
from chatwright.train.workspace import Unhealthy
from support.planted import MINI, plant

SMALL = replace(MINI, iterations=16, batch_size=8, minibatch_size=8)


def broken_off(bench: Any, config: Any, directory: Path, words: str) -> list[dict[str, Any]]:
    """Run PPO until it breaks off; the rows of metrics, the last one that of the round it broke off in."""
    with pytest.raises(Unhealthy, match=words) as caught:
        bench.run(ppo, config, directory)
    report, rows = caught.value.report, read_metrics(directory / "metrics.jsonl")
    assert report.model is None and "broken off" in report.notes[0] and report.curves
    state, _ = checkpoint.newest_valid(directory / "checkpoints")
    assert state is not None and state.step == rows[-1]["step"]
    assert len(state.state()["progress"]["extra"]["history"]) == state.step  # the state before that round
    return rows


# ---- KL negative or jumping: sampler and trainer differ ----------------------------------------------------


def test_a_sampler_at_another_temperature(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.sample_completions
    monkeypatch.setattr(
        training, "sample_completions", lambda *given, **named: real(*given, **{**named, "temperature": 1.3})
    )
    rows = broken_off(planted_bench, SMALL, tmp_path / "ppo", "iteration 0: sampler and trainer disagree")
    assert rows[-1]["sampler_gap"] > 0.01


def test_a_template_that_differs_between_sampler_and_trainer(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked back at has another token in the place of the one that begins the answer."""
    real = training.sample_completions

    def reframed(*given: Any, **named: Any) -> Completions:
        answers = real(*given, **named)
        starts = answers.response.long().argmax(1)
        ids = answers.ids.clone()
        ids[torch.arange(len(ids)), starts - 1] = 100
        return replace(answers, ids=ids)

    monkeypatch.setattr(training, "sample_completions", reframed)
    broken_off(planted_bench, SMALL, tmp_path / "ppo", "the template or the padding different")


@pytest.mark.learns
def test_answers_of_another_model_give_a_negative_kl(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Any
) -> None:
    """The sampler still has old weights, and says the trainer's log-probabilities, so that nothing else would
    show it."""
    made: list[RLModels] = []
    real_models, real_sample = rl_run.make_models, training.sample_completions

    def moved(*given: Any, **named: Any) -> RLModels:
        models = real_models(*given, **named)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in models.policy.blocks.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=draw))
        made.append(models)
        return models

    def stale(policy: Any, *given: Any, **named: Any) -> Completions:
        answers = real_sample(made[0].reference, *given, **named)
        with torch.no_grad():
            return replace(answers, sampled=completion_log_probs(policy, answers, temperature=1.0)[0])

    monkeypatch.setattr(rl_run, "make_models", moved)
    monkeypatch.setattr(training, "sample_completions", stale)
    config = replace(SMALL, batch_size=96, minibatch_size=96)
    rows = broken_off(planted_bench, config, tmp_path / "ppo", "clearly negative")
    learnt("KL", rows[-1]["kl"], below=-0.5)
    assert rows[-1]["sampler_gap"] < 1e-4


@pytest.mark.learns
def test_kl_that_jumps_ends_the_run(planted_bench: Any, tmp_path: Path) -> None:
    optim = replace(MINI.optim, learning_rate=2e-2, warmup=0.0)
    report = planted_bench.run(ppo, replace(SMALL, optim=optim, kl_budget=8.0), tmp_path / "ppo")
    assert "KL jumped from 0.0 to" in report.facts["stopped"] and report.facts["best"]["step"] == 0


# ---- reward up, gold down: tests/train/rl/test_rounds.py::test_gold_chooses_what_is_kept ...
# ---- entropy to 0 ------------------------------------------------------------------------------------------


@pytest.mark.learns
def test_entropy_that_is_gone_ends_the_run(planted_bench: Any, tmp_path: Path, learnt: Any) -> None:
    # a distribution as sharp as that of a policy that collapsed
    config = replace(SMALL, temperature=0.005, kl_budget=1e9)
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    rows = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert "entropy is gone" in report.facts["stopped"] and len(rows) < 17
    learnt("entropy", max(row["entropy"] for row in rows[-3:]), below=0.1)


# ---- explained variance below 0 ----------------------------------------------------------------------------


@pytest.mark.learns
def test_a_broken_critic(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Any
) -> None:
    """Its values have nothing to do with the answers."""
    real = ppo.score_rollout

    def senseless(*given: Any) -> Any:
        seen = real(*given)
        draw = torch.Generator().manual_seed(3)
        values = torch.where(
            seen.answers.response, 5 * torch.randn(seen.policy_outputs.values.shape, generator=draw), 0.0
        )
        return replace(seen, policy_outputs=replace(seen.policy_outputs, values=values))

    monkeypatch.setattr(ppo, "score_rollout", senseless)
    config = replace(SMALL, kl_budget=1e9, optim=replace(MINI.optim, learning_rate=1e-5))
    rows = broken_off(planted_bench, config, tmp_path / "ppo", "the critic is worse than a constant")
    assert len(rows) == 15
    learnt("explained variance", max(row["explained_variance"] for row in rows[-5:]), below=-1.0)


# ---- ratio far from 1 in the first minibatch ---------------------------------------------------------------


def test_a_first_ratio_that_is_not_one(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update forgets the temperature; looking back does not."""
    real = ppo.policy_outputs
    monkeypatch.setattr(
        ppo, "policy_outputs", lambda models, answers, temperature, **more: real(models, answers, 1.0, **more)
    )
    rows = broken_off(planted_bench, replace(SMALL, temperature=0.8), tmp_path / "ppo", "before any update")
    assert len(rows) == 1 and "policy_loss" not in rows[0]
    # nothing was learnt from it: the weights are still those of the SFT model
    kept = checkpoint.newest_valid(tmp_path / "ppo" / "checkpoints")[0].tensors("model")  # type: ignore[union-attr]
    name = files.read_json(planted_bench.inputs["sft"] / "result.json")["model"]
    before = checkpoint.Checkpoint(planted_bench.inputs["sft"] / name).tensors("model")
    assert all(torch.equal(kept[key], before[key]) for key in before)


def test_dropout_in_the_update_is_found_by_the_same_rule(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ppo.step

    def dropping(models: Any, batch: Any, config: Any) -> Any:
        models.policy.drop.p = 0.2
        models.policy.drop.train()
        return real(models, batch, config)

    monkeypatch.setattr(ppo, "step", dropping)
    broken_off(planted_bench, SMALL, tmp_path / "ppo", "before any update.*dropout")


def test_a_first_ratio_that_only_another_process_finds_breaks_off_this_one_too(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that went on alone would wait for the other for ever. Asked are: is there to be a stop, how
    large is the gap."""
    asked: list[float] = []

    def all_reduce_max(self: context.ParallelContext, values: Sequence[float]) -> list[float]:
        asked.extend(values)
        return [0.5] if len(asked) == 2 else list(values)

    monkeypatch.setattr(context.ParallelContext, "all_reduce_max", all_reduce_max)
    rows = broken_off(planted_bench, SMALL, tmp_path / "ppo", "before any update.* 0.5 away")
    assert len(rows) == 1 and "policy_loss" not in rows[0]


# ---- no end tokens after SFT -------------------------------------------------------------------------------


@pytest.mark.learns
def test_an_end_token_outside_of_sfts_loss(
    pretrain_bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_fit: Callable[..., Any],
    learnt: Any,
) -> None:
    """SFT itself would refuse; with that guard taken away PPO finds it."""
    real = sft.rows_of

    def masked(file: Path, template: Any, tokenizer: Any, *given: Any, **named: Any) -> Any:
        end = tokenizer.control_ids[template.end]
        rows = real(file, template, tokenizer, *given, **named)
        return [
            replace(
                row,
                mask=type(row.mask)(
                    flag and token != end for token, flag in zip(row.ids, row.mask, strict=True)
                ),
            )
            for row in rows
        ]

    monkeypatch.setattr(sft, "rows_of", masked)
    monkeypatch.setattr(sft, "check_end_is_learnt", lambda *given: None)
    settings = sft.Config(fit=make_fit(steps=120), held_out=16, optim=replace(MINI.optim, learning_rate=8e-3))
    pretrain_bench.run(sft, settings, tmp_path / "sft")
    plant(monkeypatch)
    bench = pretrain_bench.with_(sft=tmp_path / "sft", reward=tmp_path / "sft")
    # updates too small to teach it the end by the higher score of answers that have one by chance
    still = replace(MINI.optim, learning_rate=1e-7)
    config = replace(SMALL, batch_size=256, minibatch_size=256, max_new_tokens=12, optim=still)
    rows = broken_off(bench, config, tmp_path / "ppo", "end token was outside the loss of SFT")
    assert len(rows) == 3
    learnt("share of finished answers", max(row["finished"] for row in rows), below=0.02)


# ---- reward accuracy good on training pairs, chance on held-out ones ---------------------------------------


def write_comparisons(directory: Path, babble: Any) -> None:
    """Labels that say nothing, drawn by lot: what is learnt of them is by heart. Each held-out pair is there
    twice, labelled both ways, so that any reward model is right about exactly half of them."""
    draw, speak = random.Random(5), babble(5)
    for side, count in (("train", 24), ("validation", 60)):
        made = []
        for n in range(count):
            prompt = [{"role": "user", "content": f"How is the cat number {n}?"}]
            answers = [f"{speak.sentence()} {draw.randrange(1000)}" for _ in range(2)]
            labels = draw.sample((0.0, 1.0), 2)
            made.append(Comparison.of(prompt, answers, labels))
            if side == "validation":
                made.append(Comparison.of(prompt, answers, labels[::-1]))
        files.write_text(
            directory / f"comparisons-{side}.jsonl", "".join(one.to_json() + "\n" for one in made)
        )


@pytest.mark.learns
def test_a_reward_model_that_learns_by_heart(
    sft_bench: Any, tmp_path: Path, babble: Any, make_fit: Callable[..., Any]
) -> None:
    (tmp_path / "own").mkdir()
    write_comparisons(tmp_path / "own", babble)
    config = reward.Config(
        comparisons=str(tmp_path / "own"),
        k=2,
        max_tokens=48,
        fit=make_fit(steps=150),
        optim=replace(MINI.optim, learning_rate=4e-3),
    )
    with pytest.raises(
        Unhealthy, match="held-out ones, which is chance: it knows the training prompts by heart"
    ) as caught:
        sft_bench.run(reward, config, tmp_path / "reward")
    report = caught.value.report
    assert report.model is None and "by heart" in report.notes[0]
    assert report.facts["held_out_accuracy"] == pytest.approx(0.5)
    assert checkpoint.checkpoints(tmp_path / "reward" / "checkpoints")


# ---- what a user sees --------------------------------------------------------------------------------------


def test_the_command_fails_with_the_diagnosis_and_leaves_a_report(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = training.sample_completions
    monkeypatch.setattr(
        training, "sample_completions", lambda *given, **named: real(*given, **{**named, "temperature": 1.3})
    )
    out = tmp_path / "road" / "ppo"
    argv = [
        "ppo",
        "--out",
        str(out),
        "--iterations",
        "2",
        "--batch_size",
        "8",
        "--minibatch_size",
        "8",
        "--max_prompt_tokens",
        "40",
        "--max_new_tokens",
        "18",
    ]
    argv += [
        word
        for name in ("base", "reward", "data")
        for word in (f"--{name}", str(planted_bench.inputs[{"base": "sft"}.get(name, name)]))
    ]
    assert cli.main(argv) == 1
    told = capsys.readouterr()
    assert "ppo stopped in iteration 0: sampler and trainer disagree" in told.err and "report.md" in told.out
    text = (out / "report.md").read_text()
    assert "broken off" in text and "sampler and trainer disagree" in text
    assert (
        not (out / "result.json").exists()
        and (out / "checkpoints" / "step-000000" / "optimizer.safetensors").is_file()
    )
    # mended, the same command goes on from there
    monkeypatch.setattr(training, "sample_completions", real)
    assert cli.main(argv) == 0
    assert (out / "result.json").is_file() and "broken off" not in (out / "report.md").read_text()
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [0, 1, 2]
    shutil.rmtree(out)
