"""Ask TRL for its losses on given tensors: writes tests/parity/trl_golden.json, or prints the answers with
--print.

Runs in an environment of its own, which has TRL and not chatwright (the last TRL whose PPO can be called
piece by piece):

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 rich
    /tmp/trl/bin/python scripts/trl_parity.py

Inputs are made here from a seed and stored beside the answers, so that tests/parity/test_trl.py needs neither
TRL nor the seed; with CHATWRIGHT_TRL_PYTHON=/tmp/trl/bin/python it asks TRL again. Only TRL's public methods
are called, with stand-ins for what they read of their trainers.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

FILE = Path(__file__).parent.parent / "tests" / "parity" / "trl_golden.json"
COMMAND = "/tmp/trl/bin/python scripts/trl_parity.py"


def inputs(seed: int) -> dict[str, Any]:
    """Five answers of 1 to 9 tokens, behind a prompt of two columns, as a round of PPO meets them; and scores
    of a reward model."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    lengths = torch.tensor([9, 1, 4, 6, 9])
    place = torch.arange(11)
    mask = (place >= 2) & (place < 2 + lengths[:, None])
    old = -normal(5, 11).abs() * 2
    old_values = normal(5, 11)
    made = {
        "mask": mask,
        "scores": normal(5),
        "old_log_probs": old,
        "reference": old + 0.3 * normal(5, 11),
        "log_probs": old + 0.25 * normal(5, 11),  # ratios on both sides of the clip
        "old_values": old_values,
        "values": old_values + 0.3 * normal(5, 11),
        "logits": 2 * normal(5, 11, 7),
        "chosen": normal(6),
        "rejected": normal(6),
        "margin": normal(6).abs(),
    }
    return {name: tensor.tolist() for name, tensor in made.items()}


FULL = [0, 4]
"""Rows that have no padding at their end."""

SETTINGS = {
    "beta": 0.13,
    "discount": 0.98,
    "lam": 0.9,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coefficient": 0.1,
    "kl_target": 6.0,
    "kl_horizon": 300.0,
}


def answers(given: dict[str, Any]) -> dict[str, Any]:
    """What TRL makes of the inputs."""
    from trl.core import entropy_from_logits, masked_whiten
    from trl.trainer.ppo_trainer import PPOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.utils import AdaptiveKLController

    tensors = {name: torch.tensor(value) for name, value in given.items()}
    mask, result = tensors["mask"].long(), {}
    config = SimpleNamespace(
        kl_penalty="kl",
        gamma=SETTINGS["discount"],
        lam=SETTINGS["lam"],
        cliprange=SETTINGS["clip"],
        cliprange_value=SETTINGS["value_clip"],
        vf_coef=SETTINGS["value_coefficient"],
        ratio_threshold=1e9,
        whiten_rewards=False,
    )
    trainer = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=SETTINGS["beta"]))
    trainer._kl_penalty = lambda *pair: PPOTrainer._kl_penalty(trainer, *pair)
    rewards, _, _ = PPOTrainer.compute_rewards(
        trainer, tensors["scores"], tensors["old_log_probs"], tensors["reference"], mask
    )
    result["rewards"] = rewards
    # Whitened rewards are compared where no padding follows: TRL leaves a reward on padding then, which
    # reaches the answer's end.
    for name, whiten, rows in (("", False, list(range(5))), ("_whitened_rewards", True, FULL)):
        config.whiten_rewards = whiten
        _, advantages, returns = PPOTrainer.compute_advantages(
            trainer, tensors["old_values"][rows], rewards[rows].clone(), mask[rows].float()
        )
        result[f"advantages{name}"], result[f"returns{name}"] = advantages, returns
    result["whitened"] = masked_whiten(tensors["values"], mask)
    result["whitened_mean_kept"] = masked_whiten(tensors["values"], mask, shift_mean=False)
    policy, value, stats = PPOTrainer.loss(
        trainer,
        tensors["old_log_probs"],
        tensors["old_values"],
        tensors["logits"],
        tensors["values"],
        tensors["log_probs"],
        mask,
        result["advantages"],
        result["returns"],
    )
    result |= {
        "policy_loss": policy,
        "value_loss_weighted": value,
        "clip_fraction": stats["policy/clipfrac"],
        "value_clip_fraction": stats["val/clipfrac"],
        "approximate_kl": stats["policy/approxkl"],
        "entropy": entropy_from_logits(tensors["logits"]),
    }
    judge = SimpleNamespace(
        use_reward_data_collator=True, args=SimpleNamespace(center_rewards_coefficient=None)
    )

    def model(input_ids: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"logits": tensors[input_ids]}

    batch: dict[str, Any] = {
        "input_ids_chosen": "chosen",
        "input_ids_rejected": "rejected",
        "attention_mask_chosen": None,
        "attention_mask_rejected": None,
    }
    result["reward_loss"] = RewardTrainer.compute_loss(judge, model, batch)
    result["reward_loss_margin"] = RewardTrainer.compute_loss(
        judge, model, {**batch, "margin": tensors["margin"]}
    )
    control = AdaptiveKLController(SETTINGS["beta"], SETTINGS["kl_target"], SETTINGS["kl_horizon"])
    betas = []
    for kl in (9.0, 6.5, 2.0):
        control.update(kl, 64)
        betas.append(float(control.value))
    return {name: tensor.tolist() for name, tensor in result.items()} | {"betas": betas}


def main() -> int:
    """Write the file, or print."""
    import transformers
    import trl

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given = inputs(20)
    content = {
        "command": COMMAND,
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": SETTINGS,
        "full": FULL,
        "inputs": given,
        "answers": answers(given),
    }
    if "--print" in sys.argv:
        print(json.dumps(content))
    else:
        FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
