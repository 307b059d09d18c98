"""What PPO and REINFORCE share beyond the plain round: shared trunk, average of weights, ptx and its tax,
gold, peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright.checkpoint import Checkpoint
from chatwright.config import UsageError, UserError
from chatwright.metrics import read_metrics
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel, ValueHead
from chatwright.objectives.language import next_token_loss
from chatwright.optim import OptimConfig
from chatwright.stages import ppo
from chatwright.stages.ppo import Config, score_rollouts, step
from chatwright.train.rl import training
from chatwright.train.rl.gold import gold_of, sentiment
from chatwright.train.rl.models import RLModels, make_models, policy_outputs
from chatwright.train.rl.ptx import GeneralText, TextBatch, text_step
from chatwright.train.rl.rollout import completion_log_probs, sample_completions
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Workspace
from support.planted import LEARNING, MINI, gain, plant, plant_kl

PROMPTS = [[7, 8, 9], [11], [20, 21, 22, 23, 24, 25, 26, 27, 28], [40, 41]] * 2
SMALL = replace(MINI, iterations=3, batch_size=8, minibatch_size=8)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return read_metrics(directory / "metrics.jsonl")


# ---- shared trunk ------------------------------------------------------------------------------------------


def test_a_shared_trunk_is_read_once_and_starts_at_zero(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = lively_gpt(1)
    models = RLModels(policy, lively_gpt(2), lively_scalar(3), ValueHead(policy.config.width))
    answers = sample_completions(policy, PROMPTS, end=5, max_new_tokens=10, temperature=0.7, seed_parts=(1,))
    reads: list[int] = []
    real = policy.hidden_at
    monkeypatch.setattr(
        policy, "hidden_at", lambda ids, places, **more: reads.append(1) or real(ids, places, **more)
    )
    seen = policy_outputs(models, answers, 0.7)
    assert len(reads) == 1 and not bool(seen.values.any())
    expected, parallel = completion_log_probs(policy, answers, temperature=0.7, entropy="known")
    torch.testing.assert_close(seen.log_probs, expected)
    torch.testing.assert_close(seen.entropy, parallel)
    # with a head that is not zero: its output at the position before the token
    assert isinstance(models.critic, ValueHead)
    torch.nn.init.normal_(models.critic.scalar.weight)
    torch.nn.init.constant_(models.critic.scalar.bias, 0.3)
    with torch.no_grad():
        values, outputs = (
            policy_outputs(models, answers, 0.7).values,
            models.critic(policy.hidden(answers.ids)),
        )
    for row, t in answers.response.nonzero().tolist():
        assert float(values[row, t]) == pytest.approx(float(outputs[row, t - 1]), abs=1e-5)


def test_the_value_loss_reaches_the_shared_trunk_once_the_head_has_moved(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    policy = lively_gpt(1)
    models = RLModels(policy, lively_gpt(2), lively_scalar(3), ValueHead(policy.config.width))
    config = Config(
        batch_size=8, minibatch_size=8, max_new_tokens=10, min_tokens=0, max_repeats=1.0, critic="shared"
    )
    answers = sample_completions(policy, PROMPTS, end=5, max_new_tokens=10, temperature=1.0, seed_parts=(1,))
    rollout, _ = score_rollouts(models, answers, 0.1, config)

    def gradients(coefficient: float) -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        models.critic.zero_grad()  # type: ignore[union-attr]
        step(models, rollout, replace(config, value_coefficient=coefficient)).loss.backward()
        head = models.critic.scalar.weight.grad  # type: ignore[union-attr]
        return _first(policy), head

    trunk, head = gradients(1.0)
    without, _ = gradients(0.0)
    torch.testing.assert_close(trunk, without)
    assert float(head.abs().max()) > 0
    with torch.no_grad():
        models.critic.scalar.weight.add_(0.1)  # type: ignore[union-attr]
    assert float((gradients(1.0)[0] - without).abs().max()) > 1e-4


def _first(policy: GPT) -> torch.Tensor:
    """The gradient of the first block's first matrix."""
    gradient = next(p for p in policy.blocks.parameters() if p.ndim == 2).grad
    assert gradient is not None
    return gradient.clone()


@pytest.mark.learns
def test_a_planted_reward_rises_with_a_shared_trunk(planted_bench: Any, tmp_path: Path, learnt: Any) -> None:
    report = planted_bench.run(ppo, replace(LEARNING, critic="shared"), tmp_path / "ppo")
    rows = rows_of(tmp_path / "ppo")
    learnt("gain", gain(rows), above=0.5)
    assert rows[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # zeros explain nothing
    critic = Checkpoint(tmp_path / "ppo" / str(report.model)).tensors("critic")
    assert set(critic) == {"scalar.weight", "scalar.bias"}


def test_make_models_knows_three_kinds_of_critic(
    sft_parts: Callable[[], Any], lively_scalar: Callable[..., ScalarModel]
) -> None:
    for kind, expected in (("separate", ScalarModel), ("shared", ValueHead), ("none", type(None))):
        base = sft_parts()
        reward = lively_scalar(5, vocab_size=base.model.config.vocab_size, layers=1)
        assert type(make_models(base, reward, kind).critic) is expected


# ---- average of the weights --------------------------------------------------------------------------------


def test_the_average_follows_the_weights() -> None:
    average, policy = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(average.weight, 1.0)
    for value, expected in ((2.0, 0.9 * 1.0 + 0.1 * 2.0), (5.0, 0.9 * 1.1 + 0.1 * 5.0)):
        torch.nn.init.constant_(policy.weight, value)
        training.update_ema(average, policy, 0.9)
        assert average.weight.item() == pytest.approx(expected)


def test_the_average_is_the_result(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update a round: the average is 0.5 of what it was and 0.5 of the policy, three times."""
    met: list[dict[str, torch.Tensor]] = []
    real = training.update_ema

    def watched(average: Any, policy: Any, decay: float) -> None:
        if not met:
            met.append({key: value.clone() for key, value in average.state_dict().items()})
        real(average, policy, decay)
        met.append({key: value.clone() for key, value in policy.state_dict().items()})

    monkeypatch.setattr(training, "update_ema", watched)
    config = replace(SMALL, epochs=1, ema=0.5, kl_budget=100.0, min_distinct=0.0)
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    assert len(met) == 4
    saved = Checkpoint(tmp_path / "ppo" / str(report.model)).tensors("model")
    for key, value in saved.items():
        expected = 0.125 * met[0][key] + 0.125 * met[1][key] + 0.25 * met[2][key] + 0.5 * met[3][key]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    assert report.model == "checkpoints/step-000004" and report.facts["iterations"] == 3
    assert report.measures[0].name == "reward model's score, held-out prompts"
    assert any("the average of the weights" in note for note in report.notes)


def test_an_average_beyond_the_limits_is_not_taken(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_kl(monkeypatch)  # the first update is beyond this budget
    config = replace(SMALL, ema=0.5, kl_budget=0.5, kl_target=0.0)
    report = planted_bench.run(ppo, config, tmp_path / "ppo")
    assert report.facts["average"]["allowed"] is False
    assert report.model == "checkpoints/step-000000"
    assert any("beyond the limits" in note for note in report.notes)


# ---- ptx ---------------------------------------------------------------------------------------------------


def test_text_step_is_gamma_times_the_mean_loss(lively_gpt: Callable[..., GPT]) -> None:
    model = lively_gpt(3)
    ids = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:]
    expected = (
        next_token_loss(model(ids[:, :-1]), targets, torch.ones_like(targets, dtype=torch.bool))
        / targets.numel()
    )
    for gamma in (1.0, 2.5):
        torch.testing.assert_close(text_step(model, TextBatch(ids, gamma)).loss, gamma * expected)


def test_an_update_with_text_has_the_gradient_of_eq_2(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel], tmp_path: Path
) -> None:
    """Through PolicyTraining and Trainer: the sum of PPO's loss per answer token and gamma x loss per token
    of text."""
    policy = lively_gpt(1)
    models = RLModels(policy, lively_gpt(2), lively_scalar(3), lively_scalar(4))
    config = Config(
        batch_size=8,
        minibatch_size=8,
        max_new_tokens=10,
        min_tokens=0,
        max_repeats=1.0,
        text="x",
        ptx=0.7,
        ptx_windows=2,
        optim=OptimConfig(clip=0.0),
    )
    answers = sample_completions(policy, PROMPTS, end=5, max_new_tokens=10, temperature=1.0, seed_parts=(1,))
    rollout, _ = score_rollouts(models, answers, 0.1, config)
    windows = torch.randint(0, 96, (16, 17), generator=torch.Generator().manual_seed(2))
    loss = step(models, rollout, config).loss / rollout.weight
    loss = loss + 0.7 * text_step(policy, TextBatch(windows, 1.0)).loss
    expected = torch.autograd.grad(loss, list(policy.parameters()))

    run = object.__new__(ppo._Run)
    run.config, run.models = config, models
    run.trainer = Trainer(
        {"model": policy, "critic": models.critic}, config.optim, Workspace(tmp_path), metadata={}, texts={}
    )

    class Text:
        def take(self, start: int, count: int) -> torch.Tensor:
            return windows[start : start + count]

    run.text, run.first_gap = Text(), None
    found: list[torch.Tensor] = []
    for optimiser in run.trainer.optimisers:  # look at the gradients, move nothing
        optimiser.step = lambda: (
            found.extend(p.grad.clone() for p in policy.parameters()) if not found else None
        )
    run.trainer.update([rollout, *run._texts(rollout.weight, 0, 0)], run._loss, 1.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_windows_of_text_are_never_met_twice_before_all_were(sft_bench: Any, chat_tokenizer: Any) -> None:
    text = GeneralText.open(sft_bench.inputs["tokenizer"], chat_tokenizer, 32, seed=1)
    size = text.train.windows(32)
    taken = [text.take(start, 8) for start in range(0, size // 8 * 8, 8)]
    rows = {tuple(row.tolist()) for batch in taken for row in batch}
    assert len(rows) > 0.95 * (size // 8 * 8)  # the odd window of babble may occur twice
    run = object.__new__(ppo._Run)
    run.config = replace(MINI, text="x", ptx=1.0, ptx_windows=2)
    starts: list[int] = []

    class Order:
        def take(self, start: int, count: int) -> torch.Tensor:
            starts.extend(range(start, start + count))
            return torch.zeros(count, 3, dtype=torch.long)

    run.text = Order()
    for number in range(3):
        run.trainer = type("T", (), {"progress": type("P", (), {"step": number})})
        for epoch in range(2):
            for minibatch in range(2):
                run._texts(5.0, epoch, minibatch)
    assert starts == list(range(3 * 2 * 2 * 16 * 2))


@pytest.mark.learns
def test_ptx_lowers_the_alignment_tax(planted_bench: Any, tmp_path: Path, learnt: Any) -> None:
    """The same run with and without: afterwards the perplexity of held-out general text is lower with it. Its
    weight is small because a step here is as long as the gradient, and that of text is the larger by far."""
    config = replace(LEARNING, text="tokenizer", ptx_context=32, ptx_windows=1)
    tax = {}
    for gamma in (0.0, 0.1):
        report = planted_bench.run(ppo, replace(config, ptx=gamma), tmp_path / f"ppo-{gamma}")
        (measure,) = [one for one in report.measures if one.name == "perplexity of general text"]
        assert measure.before is not None and measure.after is not None
        tax[gamma] = measure.after / measure.before
        learnt(f"gain with ptx {gamma:g}", gain(rows_of(tmp_path / f"ppo-{gamma}")), above=0.5)
    learnt("tax with text, as a share", tax[0.1] / tax[0.0], below=0.5)


def test_perplexity_is_that_of_the_tokens(
    sft_bench: Any, chat_tokenizer: Any, sft_parts: Callable[[], Any]
) -> None:
    text = GeneralText.open(sft_bench.inputs["tokenizer"], chat_tokenizer, 32, seed=1)
    model = sft_parts().model
    nats = tokens = 0.0
    with torch.no_grad():
        for stretch in text.held_out.stretches(32):
            log_p = model(stretch[None, :-1]).log_softmax(-1)
            nats -= float(log_p.gather(2, stretch[None, 1:, None]).sum())
            tokens += len(stretch) - 1
    # every token is a target once but the first of each shard
    assert text.perplexity(model) == pytest.approx(
        float(torch.tensor(nats / text.held_out.tokens).exp()), rel=1e-4
    )
    assert tokens == pytest.approx(text.held_out.tokens, abs=2)


# ---- gold and peaks ----------------------------------------------------------------------------------------


@pytest.mark.learns
def test_gold_chooses_what_is_kept_and_stops_the_run_when_it_turns(
    sft_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Any
) -> None:
    """The planted reward model likes bad words, the lexicon good ones: what is kept is from before that."""
    plant(monkeypatch, "sad awful bad cruel bitter dull")
    bench = sft_bench.with_(reward=sft_bench.inputs["sft"])
    config = replace(LEARNING, gold="sentiment", patience=3, evaluate_every=1)
    report = bench.run(ppo, config, tmp_path / "ppo")
    rows = rows_of(tmp_path / "ppo")
    assert "the reward model is exploited" in report.facts["stopped"] and len(rows) < 13
    learnt("gain", gain(rows), above=0.2)
    learnt(
        "fall of the gold",
        sum(row["gold"] for row in [*rows[-3:]]) / 3 - report.facts["best"]["gold"],
        below=-0.1,
    )
    chosen = [row["fixed_gold"] for row in rows if "fixed_gold" in row]
    assert len(chosen) == len(rows) - 1  # an iteration that ends the run is no candidate
    assert report.facts["best"]["gold"] == pytest.approx(max(chosen), abs=1e-6)
    assert [one.name for one in report.measures][1] == "gold measure, held-out prompts"
    without = bench.run(ppo, replace(config, gold="", patience=0), tmp_path / "without")
    assert without.facts["best"]["step"] > report.facts["best"]["step"]


def test_a_run_stops_when_its_score_is_past_its_peak(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.0, 0.5, 1.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0])
    real = ppo.score_rollouts

    def planted(*arguments: Any) -> Any:
        rollout, logged = real(*arguments)
        return rollout, {**logged, "score": next(scores), "score_error": 0.05}

    monkeypatch.setattr(ppo, "score_rollouts", planted)
    report = planted_bench.run(
        ppo,
        replace(SMALL, iterations=8, patience=2, min_distinct=0.0, kl_budget=1e9, evaluate_every=1),
        tmp_path / "ppo",
    )
    assert "past its peak" in report.facts["stopped"]
    assert ["fixed_score" in row for row in rows_of(tmp_path / "ppo")] == [*[True] * 5, False]
    assert (
        report.facts["iterations"] == 5
    )  # mean of 1.5 and 1.0 in the rounds 3 and 4; of rounds 5 and 6 it would be 0.25


def test_gold_by_a_reward_model_and_by_nothing(reward_bench: Any, sft_parts: Callable[[], Any]) -> None:
    base = sft_parts()
    assert gold_of("", Path, base) is None
    gold = gold_of("reward", lambda name: reward_bench.inputs[name], base)
    assert gold is not None
    prompt = base.template.encode(
        [{"role": "user", "content": "How is the cat?"}], base.tokenizer, add_generation_prompt=True
    ).ids
    answers = sample_completions(
        base.model,
        [prompt] * 4,
        end=base.tokenizer.control_ids["<|end|>"],
        max_new_tokens=18,
        temperature=1.0,
        seed_parts=(1,),
    )
    assert gold(answers).shape == (4,)
    with pytest.raises(UserError, match="holds no reward model"):
        gold_of("sft", lambda name: reward_bench.inputs[name], base)
    assert sentiment(["I love it.", "I hate it."])[0] > 0 > sentiment(["I love it.", "I hate it."])[1]


@pytest.mark.parametrize(
    "settings", [{"ptx": 1.0}, {"ema": 1.0}, {"ema": -0.1}, {"critic": "none"}, {"epochs": 0}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Config(**settings)
