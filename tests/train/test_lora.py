"""Stages that train an adapter: little is trained, the directory is as whole as any, the reference is the
policy without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import chatwright as cw
from chatwright import checkpoint, tensor_files
from chatwright.config import UsageError, UserError, parse
from chatwright.discovery import stage_verb
from chatwright.language_model import load_parts
from chatwright.metrics import read_metrics
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.model.lora import LoRAConfig, adapter_names, lora_parameters, without_adapter
from chatwright.optim import OptimConfig
from chatwright.stages import ppo, reinforce, reward, sft
from chatwright.train import loop, stage_training
from chatwright.train.loop import Fit, FitConfig
from chatwright.train.planning import plan
from chatwright.train.planning.program import PlannedStage
from chatwright.train.rl import run as rl_run
from chatwright.train.rl.models import make_models, score_rollout
from chatwright.train.rl.rollout import completion_log_probs, sample_completions
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Workspace
from support.launching import cpu_environment, torchrun
from support.many_lora import lively_model

LORA = LoRAConfig(rank=4, alpha=8.0)


class AskedAtOnce(Stopper):
    """Asks to stop after the third step."""

    looks = 0

    @property
    def asked(self) -> bool:
        self.looks += 1
        return self.looks > 2

    @asked.setter
    def asked(self, value: bool) -> None:
        assert value is False


def stopped(
    bench: Any, module: Any, config: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> checkpoint.Checkpoint:
    """The checkpoint of a stage that was stopped in its third step."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Stopper", AskedAtOnce)
        patch.setattr(rl_run, "Stopper", AskedAtOnce)
        with pytest.raises(Interrupted):
            bench.run(module, config, directory)
    return checkpoint.checkpoints(directory / "checkpoints")[-1]


@pytest.fixture(scope="module")
def made(pretrain_bench: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An SFT stage that trained an adapter on the miniature base model."""
    directory = tmp_path_factory.mktemp("lora") / "sft"
    fit = FitConfig(steps=60, batch_size=8, compile=False, precision="fp32", log_every=5)
    optim = OptimConfig(learning_rate=1e-2, schedule="trapezoid", decay=0.6)
    return directory, pretrain_bench.run(
        sft, sft.Config(fit=fit, optim=optim, held_out=16, lora=LORA), directory
    )


@pytest.mark.learns
def test_an_adapter_learns_and_the_result_is_a_model_like_any(
    made: tuple[Path, Any], pretrain_bench: Any, tmp_path: Path, learnt: Any
) -> None:
    directory, report = made
    learnt("loss, as a share", report.measures[0].after / report.measures[0].before, below=0.75)
    saved = directory / report.model
    assert sorted(file.name for file in saved.iterdir()) == [
        "adapter.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    base = load_parts(pretrain_bench.inputs["pretrain"])
    tensors, own = (checkpoint.model_tensors(one) for one in (load_parts(saved).model, base.model))
    changed = {name for name in own if not torch.equal(own[name], tensors[name])}
    assert own.keys() == tensors.keys() and changed
    assert all(
        ".attention." in name or ".mlp." in name for name in changed
    )  # norms, tables and the head are the base's
    # the base model with the adapter in PEFT's format is the same model
    shutil.copytree(directory / "adapter", tmp_path / "adapter")
    ids = [[1, 2, 3, 4, 5]]
    for name in (
        f"{pretrain_bench.inputs['pretrain']}+{tmp_path / 'adapter'}",
        f"{pretrain_bench.inputs['pretrain']}+{directory}",
    ):
        torch.testing.assert_close(
            cw.load(name).logits(ids), cw.load(directory).logits(ids), atol=1e-5, rtol=0
        )
    assert report.facts["adapter"] == "adapter"
    trained = report.facts["trained_parameters"]
    assert trained == sum(one.numel() for one in checkpoint.Checkpoint(saved).tensors("adapter").values())
    assert trained < 0.2 * base.model.parameter_count()
    with pytest.raises(
        UserError, match="trained on another model of this shape"
    ):  # not on what it was merged into
        cw.load(f"{saved}+{directory}")


def test_only_the_adapter_has_optimiser_state(
    pretrain_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft.Config(fit=FitConfig(steps=6, batch_size=4, compile=False, precision="fp32"), held_out=4)
    sizes = {}
    for name, lora in (("all", LoRAConfig()), ("lora", LORA)):
        found = stopped(pretrain_bench, sft, replace(config, lora=lora), tmp_path / name, monkeypatch)
        state = {key: tensor for key, tensor in found.tensors("optimizer").items() if ".exp_avg" in key}
        sizes[name] = sum(tensor.numel() for tensor in state.values())
        assert ("adapter.safetensors" in [file.name for file in found.path.iterdir()]) == (name == "lora")
    adapter = sum(tensor.numel() for tensor in checkpoint.Checkpoint(found.path).tensors("adapter").values())
    assert sizes["lora"] == 2 * adapter
    assert (
        sizes["all"]
        == 2 * load_parts(pretrain_bench.inputs["pretrain"]).model.parameter_count()
        > 5 * sizes["lora"]
    )


def test_the_reward_model_trains_adapter_and_head(
    sft_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FitConfig(steps=6, batch_size=4, compile=False, precision="fp32")
    config = reward.Config(k=3, max_tokens=32, fit=fit, lora=LORA)
    found = stopped(sft_bench, reward, config, tmp_path / "reward", monkeypatch)
    kept = found.tensors("adapter")
    outside = {name: tensor for name, tensor in kept.items() if ".adapters." not in name}
    assert outside.keys() == {"scalar.weight", "scalar.bias", "offset", "scale"}
    state = sum(tensor.numel() for key, tensor in found.tensors("optimizer").items() if ".exp_avg" in key)
    assert state == 2 * sum(
        tensor.numel() for name, tensor in kept.items() if name not in ("offset", "scale")
    )
    report = sft_bench.run(reward, config, tmp_path / "reward")
    saved = checkpoint.Checkpoint(tmp_path / "reward" / report.model)
    whole = ScalarModel(GPTConfig.from_dict(saved.state()["model"]))
    checkpoint.load_model_tensors(
        whole, saved.tensors("model"), where="here"
    )  # merged: PPO reads it like any other
    base = load_parts(sft_bench.inputs["sft"]).model
    assert torch.equal(whole.body.embed.weight, base.embed.weight)
    first, other = whole.body.blocks[0].mlp.up.weight, base.blocks[0].mlp.up.weight  # type: ignore[union-attr]
    assert not torch.equal(first, other)  # type: ignore[arg-type]
    assert float(whole.scale) != 1.0 and not torch.equal(
        whole.scalar.weight, torch.zeros_like(whole.scalar.weight)
    )


MINI = ppo.Config(
    iterations=4,
    batch_size=8,
    minibatch_size=8,
    max_prompt_tokens=40,
    max_new_tokens=14,
    min_tokens=1,
    max_repeats=0.9,
    save_steps=2,
    min_correlation=-1.0,
    lora=LORA,
    optim=OptimConfig(learning_rate=3e-3, eps=1e-5, schedule="linear", warmup=0.0),
)


def test_ppo_starts_at_ratio_one_and_no_kl_and_leaves_the_reference_behind(
    reward_bench: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "ppo"
    report = reward_bench.run(ppo, MINI, directory)
    rows = read_metrics(directory / "metrics.jsonl")
    assert (
        rows[0]["kl"] == 0.0 and rows[0]["kl_k3"] == 0.0
    )  # not nearly: policy and reference are the same numbers
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert max(abs(row["kl"]) for row in rows[1:]) > 1e-3
    assert all(row["sampler_gap"] < 1e-4 for row in rows)  # the engine samples from the adapted policy
    saved = checkpoint.Checkpoint(directory / report.model)
    names = {file.name for file in saved.path.iterdir()}
    assert {
        "model.safetensors",
        "adapter.safetensors",
        "critic-adapter.safetensors",
    } <= names and "critic.safetensors" not in names
    base = cw.load(f"{reward_bench.inputs['sft']}+{directory}")
    torch.testing.assert_close(
        base.logits([[1, 2, 3]]), cw.load(directory).logits([[1, 2, 3]]), atol=1e-5, rtol=0
    )


def test_two_models_are_in_memory_instead_of_four(
    sft_parts: Callable[[], Any], lively_scalar: Callable[..., ScalarModel]
) -> None:
    base = sft_parts()
    judge = lively_scalar(5, vocab_size=base.model.config.vocab_size, layers=1)
    models = make_models(base, judge, "separate", LORA)
    assert models.reference is None and models.policy is base.model
    bodies = (models.policy, models.reward, models.critic)
    storages = {
        parameter.data_ptr(): parameter.numel() for model in bodies for parameter in model.parameters()
    }
    fresh = sft_parts().model.eval()
    fresh.use_attention(plain_attention)  # as the models do on a CPU
    own = sum(p.numel() for model in (models.policy, models.critic) for p in lora_parameters(model))
    head = sum(p.numel() for p in models.critic.scalar.parameters())
    assert (
        sum(storages.values())
        == fresh.parameter_count() + sum(p.numel() for p in judge.parameters()) + own + head
    )
    trained = [p for model in bodies for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == own + head
    assert adapter_names(models.reward) == [] and not any(p.requires_grad for p in models.reward.parameters())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = models.reward(ids)
        assert torch.equal(models.critic(ids), before)
        for parameter in trained:
            parameter.add_(0.1)
        assert torch.equal(models.reward(ids), before) and not torch.equal(models.critic(ids), before)

        # the reference stays the base model, whatever the policy learns
        end = base.tokenizer.control_ids[base.template.end]
        answers = sample_completions(
            fresh, [[5, 6, 7]] * 3, end=end, max_new_tokens=5, temperature=1.0, seed_parts=("x",)
        )
        wanted, _ = completion_log_probs(fresh, answers, temperature=1.0)
        assert torch.equal(score_rollout(models, answers, ppo.Config()).reference, wanted)
        policy, _ = completion_log_probs(models.policy, answers, temperature=1.0)
        assert not torch.allclose(policy, wanted)
        with without_adapter(models.policy):
            assert torch.equal(completion_log_probs(models.policy, answers, temperature=1.0)[0], wanted)


def test_the_settings_on_the_command_line() -> None:
    for module in (sft, reward, ppo, reinforce):
        config, _ = parse(
            module.Config,
            ["--lora.rank", "8", "--lora.targets", "[query,value]", "--lora.alpha", "32"],
            prog="x",
        )
        assert config.lora == LoRAConfig(rank=8, alpha=32.0, targets=("query", "value"))
        assert module.Config().lora.rank == 0  # off unless asked for
    with pytest.raises(UsageError, match="'embed' is none of"):
        parse(sft.Config, ["--lora.rank", "8", "--lora.targets", "[embed]"], prog="x")


@pytest.mark.parametrize("module", [ppo, reinforce])
def test_dropout_in_rounds_is_refused(module: Any) -> None:
    with pytest.raises(UsageError, match=r"lora\.dropout must be 0"):
        module.Config(lora=LoRAConfig(rank=2, dropout=0.1))


def test_a_resume_on_another_base_or_with_another_adapter_is_refused(
    pretrain_bench: Any, sft_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft.Config(
        fit=FitConfig(steps=6, batch_size=4, compile=False, precision="fp32"), held_out=4, lora=LORA
    )
    directory = tmp_path / "sft"
    stopped(pretrain_bench, sft, config, directory, monkeypatch)
    for bench, changed in (
        (sft_bench, replace(config, base="sft")),
        (pretrain_bench, replace(config, lora=replace(LORA, alpha=9.0))),
        (pretrain_bench, replace(config, lora=LoRAConfig())),
    ):
        with pytest.raises(UserError, match=r"was trained with another adapter .* or on another base model"):
            bench.run(sft, changed, directory)
    assert pretrain_bench.run(sft, config, directory).facts["steps"] == 6


def test_the_best_checkpoint_s_adapter_is_the_one_that_is_written(
    pretrain_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep_best`, and held-out losses that are best at the third step: the result is that step's."""
    losses = iter([9.0, 8.0, 7.0, 2.0, *[5.0] * 9])

    def planted(trainer: Trainer, config: FitConfig, data: Any, step: Any, evaluate: Any, **more: Any) -> Any:
        return Fit(trainer, config, data, step, lambda: {"held_out_loss": next(losses)}, **more)

    monkeypatch.setattr(stage_training, "Fit", planted)
    fit = FitConfig(steps=8, batch_size=4, compile=False, precision="fp32", evaluate_every=1, keep_best=True)
    config = sft.Config(
        fit=fit, optim=OptimConfig(learning_rate=0.03, schedule="constant"), held_out=4, lora=LORA
    )
    report = pretrain_bench.run(sft, config, tmp_path / "sft")
    assert report.model == "checkpoints/step-000003"
    ids = [[1, 2, 3, 4]]
    together = cw.load(f"{pretrain_bench.inputs['pretrain']}+{tmp_path / 'sft'}").logits(ids)
    torch.testing.assert_close(
        together, cw.load(tmp_path / "sft" / report.model).logits(ids), atol=1e-4, rtol=0
    )
    assert (
        together - cw.load(tmp_path / "sft" / "checkpoints" / "step-000008").logits(ids)
    ).abs().max() > 1e-2


@pytest.mark.slow  # test_plan.py plans with and without adapters too
def test_the_plan_knows_that_little_is_trained() -> None:
    shape = GPTConfig.preset("modern-tiny")
    fit = FitConfig(steps=10, batch_size=2, compile=False, precision="fp32")
    memory = {}
    for verb, config in (
        ("sft", sft.Config(fit=fit)),
        ("reward", reward.Config(fit=fit)),
        ("ppo", ppo.Config()),
    ):
        for lora in (LoRAConfig(), LORA):
            what = PlannedStage(verb, stage_verb(verb).load().STAGE.plan, shape, replace(config, lora=lora))  # type: ignore[type-var]
            memory[verb, lora.rank] = plan.predict(what, micro=1)[0].memory
        for part, share in (("optimiser", 0.05), ("gradients", 0.2)):
            assert memory[verb, 4].get(part, 0.0) < share * memory[verb, 0][part], (verb, part)
    assert memory["ppo", 4]["weights"] < 0.6 * memory["ppo", 0]["weights"]
    assert memory["sft", 4]["weights"] < 1.05 * memory["sft", 0]["weights"]


# ---- many processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps in one process and, by two plans, in two."""
    root = tmp_path_factory.mktemp("many")
    for command, plans in (
        ([sys.executable, "-m", "support.many_lora"], ["auto"]),
        (torchrun(2, "-m", "support.many_lora"), ["ddp", "fsdp"]),
    ):
        command = [*command, str(root), *plans]
        done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return root


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(launched: Path, how: str) -> None:
    """Losses, gradient norms and the trained tensors; fsdp went on from parts on the disk in the middle."""
    rows = {name: read_metrics(launched / name / "metrics.jsonl") for name in ("auto", how)}
    for key, tolerance in (("loss", 1e-5), ("gradient_norm", 5e-5)):
        one, two = ([row[key] for row in rows[name]] for name in ("auto", how))
        assert len(one) == 8 and two == pytest.approx(one, abs=tolerance)
        assert one[0] != pytest.approx(one[-1], abs=1e-2)
    alone, many = (tensor_files.load_tensors(launched / f"{name}.safetensors") for name in ("auto", how))
    assert alone.keys() == many.keys() and all(".adapters." in name for name in alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(many[name], tensor, atol=1e-4, rtol=0)
    one, two = (checkpoint.checkpoints(launched / name / "checkpoints")[-1] for name in ("auto", how))
    assert two.state()["final"] and not two.is_sharded
    for name, tensor in one.tensors("model").items():  # merged, put together by the first process
        torch.testing.assert_close(two.tensors("model")[name], tensor, atol=1e-4, rtol=0)


def test_a_plan_that_would_cut_adapters_is_refused(tmp_path: Path) -> None:
    from chatwright.train.parallel.context import MeshShape
    from chatwright.train.parallel.multi_process import MultiProcess

    together = MultiProcess.__new__(MultiProcess)
    together.mesh_shape = MeshShape(1, 1, 2)
    with pytest.raises(UsageError, match="tp does not cut adapters"):
        Trainer(
            {"model": lively_model()},
            OptimConfig(),
            Workspace(tmp_path),
            metadata={},
            texts={},
            parallel=together,
        )
