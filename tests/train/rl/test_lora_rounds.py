"""PPO and REINFORCE over adapters: what both share beyond the plain round works with two models in memory as
with four."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import chatwright as cw
from chatwright.checkpoint import Checkpoint
from chatwright.metrics import read_metrics
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel, ValueHead
from chatwright.model.lora import LoRAConfig, adapter_names, lora_parameters, trained_tensors
from chatwright.optim import OptimConfig
from chatwright.stages import ppo, reinforce
from chatwright.stages.ppo import score_rollouts, step
from chatwright.train.rl import run as rl_run
from chatwright.train.rl import training
from chatwright.train.rl.models import make_models, policy_outputs
from chatwright.train.rl.ptx import GeneralText
from chatwright.train.rl.rollout import sample_completions
from support.planted import LEARNING, MINI, gain, plant_kl

LORA, LORA_8, LORA_16 = (LoRAConfig(rank=rank, alpha=2.0 * rank) for rank in (4, 8, 16))
SMALL = replace(
    MINI,
    iterations=3,
    batch_size=8,
    minibatch_size=8,
    epochs=1,
    kl_budget=100.0,
    min_distinct=0.0,
    lora=LORA,
    optim=OptimConfig(learning_rate=1e-2, eps=1e-5, schedule="linear", warmup=0.0),
)
OWN = ("epochs", "clip", "value_clip", "value_coefficient", "discount", "lam", "whiten_rewards", "critic")


def as_reinforce(config: ppo.Config, **changes: Any) -> reinforce.Config:
    shared = {key: value for key, value in vars(config).items() if key not in OWN}
    return reinforce.Config(**{**shared, "minibatch_size": config.batch_size, **changes})


def result(directory: Path, report: Any) -> Checkpoint:
    return Checkpoint(directory / str(report.model))


@pytest.mark.parametrize("module", [ppo, reinforce], ids=["ppo", "reinforce"])
def test_everything_at_once(
    module: Any, planted_bench: Any, tmp_path: Path, sft_parts: Callable[[], Any]
) -> None:
    """A shared trunk (reinforce: no critic), ptx with its tax, an average, a gold measure."""
    whole = replace(
        SMALL,
        critic="shared",
        ema=0.5,
        text="tokenizer",
        ptx=0.5,
        ptx_windows=1,
        ptx_context=32,
        gold="sentiment",
    )
    directory = tmp_path / "run"
    report = planted_bench.run(module, whole if module is ppo else as_reinforce(whole), directory)
    rows = read_metrics(directory / "metrics.jsonl")
    assert rows[0]["kl"] == 0.0 == rows[0]["kl_k3"]  # the reference is the same numbers
    assert rows[0]["first_ratio_gap"] < 1e-4 and max(abs(row["kl"]) for row in rows[1:]) > 1e-3
    assert all(row["sampler_gap"] < 1e-4 for row in rows)
    saved = result(directory, report)
    critic = {"critic.safetensors"} if module is ppo else set()
    assert {file.name for file in saved.path.glob("*.safetensors")} == {
        "model.safetensors",
        "adapter.safetensors",
        "average.safetensors",
        *critic,
    }

    # the tax is that of the model without its adapter, and of the result
    (tax,) = [one for one in report.measures if one.name == "perplexity of general text"]
    base = sft_parts()
    text = GeneralText.open(planted_bench.inputs["tokenizer"], base.tokenizer, 32, seed=1)
    assert tax.before == pytest.approx(text.perplexity(base.model), rel=1e-5)
    assert tax.after == pytest.approx(text.perplexity(cw.load(directory).model), rel=1e-4)
    assert abs(tax.after / tax.before - 1) > 1e-4
    # the adapter that is written is the result's
    together = cw.load(f"{planted_bench.inputs['sft']}+{directory}")
    torch.testing.assert_close(
        together.logits([[1, 2, 3]]), cw.load(directory).logits([[1, 2, 3]]), atol=1e-5, rtol=0
    )
    assert report.facts["adapter"] == "adapter"


@pytest.mark.learns
@pytest.mark.parametrize("critic", [pytest.param("separate", marks=pytest.mark.slow), "shared", "none"])
def test_a_planted_reward_rises_over_adapters(
    critic: str, planted_bench: Any, tmp_path: Path, learnt: Any
) -> None:
    """PPO with both kinds of critic, REINFORCE without one: slower than with all weights, and as surely."""
    optim = replace(LEARNING.optim, learning_rate=1e-2, eps=1e-3)
    module: Any = ppo
    config: Any = replace(LEARNING, iterations=16, minibatch_size=8, lora=LORA_8, optim=optim)
    if critic == "none":
        module = reinforce
        config = replace(config, beta=0.1, beta_floor=0.1, batch_size=64, iterations=20, lora=LORA_16)
        config = as_reinforce(config)
    else:
        config = replace(config, critic=critic)
    report = planted_bench.run(module, config, tmp_path / "run")
    learnt("gain", gain(read_metrics(tmp_path / "run" / "metrics.jsonl")), above=0.25)
    learnt("KL", report.facts["best"]["kl"], above=0.05)
    names = {file.stem for file in result(tmp_path / "run", report).path.glob("critic*.safetensors")}
    assert names == {"separate": {"critic-adapter"}, "shared": {"critic"}, "none": set()}[critic]


def test_a_head_on_an_adapted_policy_trains_adapter_and_head(
    sft_parts: Callable[[], Any], lively_scalar: Callable[..., ScalarModel]
) -> None:
    base = sft_parts()
    judge = lively_scalar(5, vocab_size=base.model.config.vocab_size, layers=1)
    models = make_models(base, judge, "shared", LORA)
    assert models.reference is None and isinstance(models.critic, ValueHead)
    answers = sample_completions(
        models.policy, [[5, 6, 7], [8, 9]] * 4, end=5, max_new_tokens=6, temperature=1.0, seed_parts=("x",)
    )
    with torch.no_grad():
        for parameter in lora_parameters(models.policy):
            parameter.add_(0.05)
        models.critic.scalar.weight.add_(0.1)
        values = policy_outputs(models, answers, 1.0).values
        with models.as_reference() as reference:  # the head goes on reading the adapted policy
            assert reference is models.policy
        assert torch.equal(policy_outputs(models, answers, 1.0).values, values)
    config = ppo.Config(
        batch_size=8, minibatch_size=8, min_tokens=0, max_repeats=1.0, critic="shared", lora=LORA
    )
    rollout, logged = score_rollouts(models, answers, 0.1, config)
    assert abs(logged["kl"]) > 1e-4
    step(models, rollout, config).loss.backward()  # type: ignore[no-untyped-call]
    moved = [
        one for one in (*models.policy.parameters(), *models.critic.parameters()) if one.grad is not None
    ]
    assert {id(one) for one in moved} == {
        id(one) for one in (*lora_parameters(models.policy), *models.critic.parameters())
    }
    assert all(bool(one.grad.any()) for one in moved)  # type: ignore[union-attr]
    assert not any(one.grad is not None for one in models.reward.parameters())


def test_without_a_critic_nothing_of_the_judge_is_trained(
    sft_parts: Callable[[], Any], lively_scalar: Callable[..., ScalarModel]
) -> None:
    base = sft_parts()
    models = make_models(
        base, lively_scalar(5, vocab_size=base.model.config.vocab_size, layers=1), "none", LORA
    )
    assert models.critic is None and models.reference is None and adapter_names(models.reward) == []
    assert not any(parameter.requires_grad for parameter in models.reward.parameters())
    trained = {id(one) for one in models.policy.parameters() if one.requires_grad}
    assert trained == {id(one) for one in lora_parameters(models.policy)}


def test_the_average_is_one_of_the_adapter_s_matrices(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update a round: the average is 0.5 of what it was and 0.5 of the adapter, three times."""
    met: list[dict[str, torch.Tensor]] = []
    real_start, real_follow = rl_run.ema_of, training.update_ema

    def remember(policy: Any) -> None:
        met.append({key: value.detach().clone() for key, value in trained_tensors(policy).items()})

    def start(policy: GPT) -> torch.nn.Module:
        remember(policy)
        return real_start(policy)

    def watched(average: Any, policy: Any, decay: float) -> None:
        real_follow(average, policy, decay)
        remember(policy)

    monkeypatch.setattr(rl_run, "ema_of", start)
    monkeypatch.setattr(training, "update_ema", watched)
    directory = tmp_path / "ppo"
    report = planted_bench.run(ppo, replace(SMALL, ema=0.5), directory)
    assert len(met) == 4 and report.model == "checkpoints/step-000004"
    saved = result(directory, report).tensors("adapter")
    assert saved.keys() == met[0].keys() and not torch.equal(*(one[list(saved)[-1]] for one in met[:2]))
    for key, value in saved.items():
        expected = 0.125 * met[0][key] + 0.125 * met[1][key] + 0.25 * met[2][key] + 0.5 * met[3][key]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    assert report.measures[0].name == "reward model's score, held-out prompts"


def test_an_average_beyond_the_limits_leaves_the_best_round_s_adapter(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_kl(monkeypatch)  # the first update is beyond this budget
    directory = tmp_path / "ppo"
    config = replace(SMALL, ema=0.5, kl_budget=0.5, kl_target=0.0)
    report = planted_bench.run(ppo, config, directory)
    assert report.facts["average"]["allowed"] is False and report.model == "checkpoints/step-000000"
    together = cw.load(
        f"{planted_bench.inputs['sft']}+{directory}"
    )  # whose adapter is as it began: it adds nothing
    assert torch.equal(together.logits([[1, 2, 3]]), cw.load(planted_bench.inputs["sft"]).logits([[1, 2, 3]]))
