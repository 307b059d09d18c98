"""SFT, reward modelling and PPO next to TRL and a textbook loop on transformers: the same shape, data and
batch, in turns.

    python benchmarks/align.py                      modern-tiny: 4.2 M parameters, vocabulary 4,096, context
                                                    256
    python benchmarks/align.py --shape 135m         SmolLM2's shape: 30 x 576, vocabulary 49,152
    python benchmarks/align.py --tasks sft reward2  some of the tasks
    python benchmarks/align.py --only trl_padded    next to some of the others only: all stay in memory
                                                    together, which --shape 135m has not

Every contender starts from random weights (but for ppo_sft) and reads the tiny recipe's conversations and
ratings, already as token ids: only training is timed. All take AdamW (fused), clipping at 1.0, and bf16
products where the processor has them. A round is:

sft       an epoch over the same conversations in the same number of optimiser steps; the loss is that of the
answers' tokens.
          TRL: padded, padded with conversations of like length together, and packed (its `bfd`), all without
          gradient
          checkpointing, which it has on by default and which would cost a third.
reward2   the same comparisons of 2 answers. reward4: of 4 answers, all pairs of which are learnt; TRL knows
          pairs only, so that
          it forwards an answer once for each of its pairs.
compiled  The names that end so: ours with `compile` on (off by default, for the first steps wait a minute for
          it), TRL, padded, with its
          `torch_compile`. What compiling takes is not counted, on either side. The textbook's loop is not
          compiled.
ppo       64 prompts, one sampled answer of up to 32 tokens each, scores, and an update in minibatches of 16
(one pass), with
          policy, reference, reward model and critic of the same size. Textbook: transformers' generate
          (key-value cache, padding
          on the left), then forward passes over whole padded rows, as published implementations do it. TRL
          has no PPO any more.
          Completions of random weights never end: each has 32 tokens. That is the worst case for whoever
          computes no padding.
ppo_sft   the same from the tiny recipe's SFT model, whose answers end by themselves, as in a real run; at a
          rate of 1e-6, so
          that they stay as long as they are.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import side_by_side
import torch
from torch import Tensor, nn

from chatwright import memory, runtime
from chatwright.chat import NATIVE, EncodedChat
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.data.packing import batch_rows, cut_dialogue, pack
from chatwright.data.records import read_records, records_of
from chatwright.interop.hf_export import config_to_hf, plan_hf
from chatwright.interop.loaded import Loaded
from chatwright.language_model import load_parts
from chatwright.model.attention import plain_attention
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.optim import OptimConfig
from chatwright.stages import ppo, reward, sft
from chatwright.tokenizer import Tokenizer
from chatwright.train.compiled import compile_blocks
from chatwright.train.preference import rankings
from chatwright.train.rl.fixed_prompts import FixedPrompts, PromptSets
from chatwright.train.rl.models import make_models
from chatwright.train.rl.prompts import exchanges_from
from chatwright.train.rl.run import trainer_of
from chatwright.train.trainer import Trainer
from chatwright.train.workspace import Workspace

RUN = Path("runs/tiny")
RATE, SMALL_RATE = 1e-4, 1e-6


@dataclass(frozen=True)
class Shape:
    """What is trained, and how much of it a round is."""

    model: dict[str, Any]
    conversations: int
    comparisons: int
    steps: int
    """Optimiser steps of a round of sft and reward."""

    @property
    def config(self) -> GPTConfig:
        """The model."""
        return GPTConfig.preset("modern-tiny", **self.model)


SHAPES = {
    "4m": Shape({"vocab_size": 4_096}, conversations=64, comparisons=48, steps=2),
    "135m": Shape(
        {
            "layers": 30,
            "width": 576,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
            "mlp_width": 1_536,
            "vocab_size": 49_152,
            "context": 256,
            "qk_norm": False,
        },
        conversations=8,
        comparisons=8,
        steps=2,
    ),
}
PPO = {"batch": 64, "minibatch": 16, "prompt": 64, "answer": 32}


# ---- what everybody reads ----------------------------------------------------------------------------------


@cache
def tokenizer() -> Tokenizer:
    """The tiny recipe's."""
    return Tokenizer.load(RUN / "tokenizer" / "tokenizer.json")


def dialogues() -> list[Dialogue]:
    """The tiny recipe's conversations."""
    return list(read_records(records_of(RUN / "data") / "dialogues-train.jsonl", Dialogue))


def pieces(shape: Shape) -> list[EncodedChat]:
    """Conversations as token ids with the mask of what is learnt; drawn at random, so that their lengths are
    the data's."""
    chosen = torch.randperm(len(found := dialogues()), generator=torch.Generator().manual_seed(3)).tolist()
    made = (
        piece
        for n in chosen
        for piece in cut_dialogue(found[n].messages, NATIVE, tokenizer(), shape.config.context)
    )
    return [
        piece
        for piece, _ in zip((one for one in made if any(one.mask)), range(shape.conversations), strict=False)
    ]


def comparisons(shape: Shape, k: int) -> list[Comparison]:
    """Comparisons of k answers without ties, so that everybody learns from the same pairs."""
    made, _ = rankings.rated_comparisons(records_of(RUN / "data"), k, 3)
    chosen = torch.randperm(len(made), generator=torch.Generator().manual_seed(3)).tolist()
    clear = [made[n] for n in chosen if len(set(made[n].scores)) == k]
    return clear[: shape.comparisons]


def rated(k: int) -> reward.Config:
    """Settings of the reward model's batches: every unequal pair counts."""
    return reward.Config(k=k, tie_tolerance=0.0, max_tokens=80)


def encoded(one: Comparison, config: reward.Config) -> list[list[int]]:
    """The answers of a comparison as rows, the best first."""
    order = sorted(range(len(one.responses)), key=lambda n: -one.scores[n])
    return [
        rankings.encode_answer(one.prompt, one.responses[n], NATIVE, tokenizer(), config.max_tokens)
        for n in order
    ]


def untrained(shape: Shape) -> float:
    """The loss of a model whose blocks are still the identity: with tied tables it expects each token to be
    repeated, whose logit is the length of a row of the table, sqrt(width) x 0.02, times that of the normed
    state, sqrt(width)."""
    return math.log(shape.config.vocab_size - 1 + math.exp(0.02 * shape.config.width))


def near(found: float, expected: float, what: str) -> None:
    """Everybody must start from the loss of an untrained model."""
    if not abs(found - expected) < 0.1 * expected:
        raise SystemExit(
            f"{what}: the first loss is {found:.3f}, that of an untrained model is about {expected:.3f}"
        )


# ---- ours --------------------------------------------------------------------------------------------------


def trainer(modules: dict[str, nn.Module]) -> Trainer:
    """The stages' own."""
    memory.tune_allocator()
    workspace = Workspace(Path(tempfile.mkdtemp(prefix="bench-align-")), 3)
    return Trainer(modules, OptimConfig(name="adamw", learning_rate=RATE), workspace, metadata={}, texts={})


def warmed(one_round: Callable[[], float]) -> Callable[[], float]:
    """After two rounds, in which a compiler has seen all that is to come."""
    for _ in range(2):
        one_round()
    return one_round


def timed(steps: Sequence[Callable[[], object]]) -> float:
    """Seconds of some steps."""
    started = time.perf_counter()
    for step in steps:
        step()
    return time.perf_counter() - started


def ours_sft(shape: Shape, *, compiled: bool = False) -> Callable[[], float]:
    """The stage's batches and step."""
    torch.manual_seed(0)
    model, length = GPT(shape.config), shape.config.context
    if compiled:
        print(sft.compiled_for(model, length))
    training, dtype = trainer({"model": model}), runtime.compute_dtype()
    rows = pack(pieces(shape), length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    portions = [[rows[n] for n in order[start :: shape.steps]] for start in range(shape.steps)]

    def step(batch: Any) -> Any:
        with runtime.autocast(dtype):
            return sft.step(model, batch)

    def update(portion: Any) -> float:
        return training.update([batch_rows(portion, length)], step, 1.0)

    near(update(portions[0]), untrained(shape), "ours, sft")
    return warmed(lambda: timed([lambda portion=portion: update(portion) for portion in portions]))  # type: ignore[misc]


def ours_reward(shape: Shape, k: int, *, compiled: bool = False) -> Callable[[], float]:
    """The stage's batches and step."""
    torch.manual_seed(0)
    model = ScalarModel(shape.config)
    if runtime.device().type == "cpu":
        model.body.use_attention(plain_attention)
    if compiled:
        print(compile_blocks(model))
    training, dtype, chosen = trainer({"model": model}), runtime.compute_dtype(), comparisons(shape, k)
    ranked = rankings.Rankings(chosen, NATIVE, tokenizer(), rated(k), SampleOrder(len(chosen), 3))
    portions = [chosen[start :: shape.steps] for start in range(shape.steps)]

    def step(batch: Any) -> Any:
        with runtime.autocast(dtype):
            return reward.step(model, batch)

    def update(portion: Any) -> float:
        return training.update([ranked.batch(portion)], step, 1.0)

    near(update(portions[0]), math.log(2), f"ours, comparisons of {k}")
    return warmed(lambda: timed([lambda portion=portion: update(portion) for portion in portions]))  # type: ignore[misc]


def questions(shape: Shape) -> list[list[int]]:
    """Prompts as ids."""
    longest = min(PPO["prompt"], shape.config.context - PPO["answer"])
    return exchanges_from(dialogues(), NATIVE, tokenizer(), limit=longest, most=1_000).prompts


def start(shape: Shape, trained: bool) -> Loaded:
    """The model that PPO begins with."""
    torch.manual_seed(0)
    return (
        load_parts(RUN / "sft")
        if trained
        else Loaded(GPT(shape.config), tokenizer(), NATIVE, "random weights")
    )


def ours_ppo(shape: Shape, *, trained: bool = False, compiled: bool = False) -> Callable[[], float]:
    """The stage's rounds, without the choice of what to keep on disk."""
    base = start(shape, trained)
    config = ppo.Config(
        batch_size=PPO["batch"],
        minibatch_size=PPO["minibatch"],
        max_new_tokens=PPO["answer"],
        policy_precision="auto",
        optim=OptimConfig(name="adamw", learning_rate=SMALL_RATE if trained else RATE),
    )
    models = make_models(
        base,
        ScalarModel(base.model.config),
        config.critic,
        precision=config.precision,
        policy_precision=config.policy_precision,
    )
    if compiled:
        print(compile_blocks(*models.computing))
    workspace = Workspace(Path(tempfile.mkdtemp(prefix="bench-align-")), 3)
    memory.tune_allocator()
    trainer = trainer_of(models, config, workspace, base, {})
    trainer.progress.extra = {"beta": config.beta, "best": None, "history": []}
    prompts = questions(shape)
    sets = PromptSets(prompts, FixedPrompts("choosing", prompts, len(prompts)), None)
    run = ppo._Run(config, workspace, trainer, models, base, sets)

    def one_round() -> float:
        started = time.perf_counter()
        rollout, _ = run.sampled()
        run._update(rollout)
        trainer.take_logged()
        trainer.progress.step += 1
        trainer.progress.consumed += config.batch_size
        return time.perf_counter() - started

    return warmed(one_round)


# ---- TRL ---------------------------------------------------------------------------------------------------


def trl_settings(**more: Any) -> dict[str, Any]:
    """What both trainers are told: no work beside training."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-align-"),
        "use_cpu": True,
        "bf16": runtime.compute_dtype() == torch.bfloat16,
        "learning_rate": RATE,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "dataloader_pin_memory": False,
        "dataloader_drop_last": False,
        **more,
    }


def fast_tokenizer() -> Any:
    """Which the trainers want to have, though everything is token ids already."""
    from transformers import PreTrainedTokenizerFast

    file = Path(tempfile.mkdtemp(prefix="bench-align-")) / "tokenizer.json"
    file.write_text(tokenizer().to_json(), encoding="utf-8")
    end = tokenizer().end_of_text
    return PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=end, eos_token=end)


def hf_model(shape: Shape, kind: str) -> Any:
    """The same shape in transformers, from random weights."""
    import transformers

    torch.manual_seed(0)
    values = config_to_hf(shape.config) | {
        "pad_token_id": tokenizer().end_of_text_id,
        "attn_implementation": "sdpa",
    }
    values |= {"bos_token_id": tokenizer().end_of_text_id, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, num_labels=1)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config)


def trl_rounds(made: Any, expected: float, what: str) -> Callable[[], float]:
    """PolicyTraining of `trainer.train()`: from the beginning of the first step to the end of the last."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """From the moment that training begins to its end: without what `train` prepares before."""

        begun = ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    made.add_callback(clock)

    def one_round() -> float:
        made.train()
        return clock.ended - clock.begun

    first = made.train().training_loss  # the mean of the epoch: at this rate still that of an untrained model
    near(first, expected, what)
    return warmed(one_round)


def trl_sft(
    shape: Shape, *, packed: bool = False, grouped: bool = False, compiled: bool = False
) -> Callable[[], float]:
    """TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    found = pieces(shape)
    records = {
        "input_ids": [one.ids for one in found],
        "assistant_masks": [[int(flag) for flag in one.mask] for one in found],
    }
    rows = len(pack(found, shape.config.context)) if packed else len(found)
    more = {"train_sampling_strategy": "group_by_length" if grouped else "random", "torch_compile": compiled}
    settings = SFTConfig(
        **trl_settings(
            per_device_train_batch_size=-(-rows // shape.steps),
            max_length=shape.config.context,
            packing=packed,
            **more,
        )
    )
    model = hf_model(shape, "CausalLM")
    made = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict(records),
        processing_class=fast_tokenizer(),
    )
    return trl_rounds(
        made, math.log(shape.config.vocab_size), "TRL, sft"
    )  # its blocks are no identity at first


def trl_reward(shape: Shape, k: int, *, compiled: bool = False) -> Callable[[], float]:
    """TRL's RewardTrainer on all pairs."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    config = rated(k)
    found = [encoded(one, config) for one in comparisons(shape, k)]
    pairs = [(rows[a], rows[b]) for rows in found for a in range(k) for b in range(a + 1, k)]
    records = {"chosen_ids": [a for a, _ in pairs], "rejected_ids": [b for _, b in pairs]}
    batch = -(-len(pairs) // shape.steps)
    settings = RewardConfig(
        **trl_settings(per_device_train_batch_size=batch, max_length=None, torch_compile=compiled)
    )
    model = hf_model(shape, "SequenceClassification")
    made = RewardTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict(records),
        processing_class=fast_tokenizer(),
    )
    return trl_rounds(made, math.log(2), f"TRL, comparisons of {k}")


# ---- the textbook's PPO ------------------------------------------------------------------------------------


def exported(base: Loaded) -> Any:
    """A model of ours in transformers."""
    import transformers

    with tempfile.TemporaryDirectory(prefix="bench-align-") as directory:
        plan_hf(base).write(Path(directory))
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def textbook_ppo(shape: Shape, *, trained: bool = False) -> Callable[[], float]:
    """PPO as it is written down in most places: generate, five forward passes over padded rows, minibatches;
    answers are masked behind their end."""
    policy, reference = (
        exported(start(shape, True)) if trained else hf_model(shape, "CausalLM") for _ in range(2)
    )
    judge, critic = (hf_model(shape, kind) for kind in ("SequenceClassification", "TokenClassification"))
    for model in (policy, reference, judge, critic):
        model.eval()
    parameters = [*policy.parameters(), *critic.parameters()]
    rate = SMALL_RATE if trained else RATE
    optimiser = torch.optim.AdamW(parameters, lr=rate, eps=1e-5, weight_decay=0.0, fused=True)
    prompts, padding, answer = questions(shape), tokenizer().end_of_text_id, PPO["answer"]
    end = tokenizer().control_ids[NATIVE.end]
    order, taken = SampleOrder(len(prompts), 3), 0
    dtype = runtime.compute_dtype()

    def log_probs(model: Any, ids: Tensor, mask: Tensor, start: int) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
            :, start - 1 : -1
        ]
        chosen = ids[:, start:, None]
        return logits.float().log_softmax(-1).gather(2, chosen).squeeze(2)

    def values(ids: Tensor, mask: Tensor, start: int) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = critic(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        return found.squeeze(2)[:, start - 1 : -1].float()

    def advantages(rewards: Tensor, seen: Tensor, lam: float = 0.95) -> Tensor:
        after, last = torch.zeros_like(seen[:, 0]), []
        for t in reversed(range(seen.shape[1])):
            following = seen[:, t + 1] if t + 1 < seen.shape[1] else 0.0
            after = rewards[:, t] + following - seen[:, t] + lam * after
            last.append(after)
        return torch.stack(last[::-1], 1)

    def one_round() -> float:
        nonlocal taken
        started = time.perf_counter()
        chosen = [prompts[n] for n in order.take(taken, PPO["batch"])]
        taken += PPO["batch"]
        start = max(map(len, chosen))
        ids = torch.tensor([[padding] * (start - len(one)) + one for one in chosen])
        mask = torch.tensor([[0] * (start - len(one)) + [1] * len(one) for one in chosen])
        with torch.no_grad(), runtime.autocast(dtype):
            ids = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=answer,
                eos_token_id=end,
                pad_token_id=padding,
            )
            ended = (ids[:, start:] == end).long()
            real = (ended.cumsum(1) - ended) == 0  # the answer with its end
            mask = torch.cat((mask, real.to(mask.dtype)), 1)
            before, theirs = log_probs(policy, ids, mask, start), log_probs(reference, ids, mask, start)
            seen = values(ids, mask, start)
            scores = judge(input_ids=ids, attention_mask=mask).logits.squeeze(1).float()
            seen = seen * real
            rewards = -0.15 * (before - theirs) * real
            rewards[torch.arange(len(ids)), real.sum(1) - 1] += scores
            gained = advantages(rewards, seen) * real
            returns = gained + seen
            gained = (gained - gained[real].mean()) / (gained[real].std() + 1e-8)
        for part in torch.randperm(len(ids)).split(PPO["minibatch"]):
            with runtime.autocast(dtype):
                now, policy_outputs = (
                    log_probs(policy, ids[part], mask[part], start),
                    values(ids[part], mask[part], start),
                )
            ratio = (now - before[part]).exp()
            actor = torch.max(-gained[part] * ratio, -gained[part] * ratio.clamp(0.8, 1.2))[real[part]].mean()
            near_ = seen[part] + (policy_outputs - seen[part]).clamp(-0.2, 0.2)
            value = (
                0.5
                * torch.max((policy_outputs - returns[part]) ** 2, (near_ - returns[part]) ** 2)[
                    real[part]
                ].mean()
            )
            (actor + 0.1 * value).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return warmed(one_round)


# ---- the table ---------------------------------------------------------------------------------------------


def contenders(shape: Shape) -> dict[str, dict[str, side_by_side.Contender]]:
    """By task and name; ours comes first."""
    return {
        "sft": {
            "ours": lambda: ours_sft(shape),
            "ours_compiled": lambda: ours_sft(shape, compiled=True),
            "trl_compiled": lambda: trl_sft(shape, compiled=True),
            "trl_padded": lambda: trl_sft(shape),
            "trl_grouped": lambda: trl_sft(shape, grouped=True),
            "trl_packed": lambda: trl_sft(shape, packed=True),
        },
        "reward2": {
            "ours": lambda: ours_reward(shape, 2),
            "ours_compiled": lambda: ours_reward(shape, 2, compiled=True),
            "trl": lambda: trl_reward(shape, 2),
            "trl_compiled": lambda: trl_reward(shape, 2, compiled=True),
        },
        "reward4": {"ours": lambda: ours_reward(shape, 4), "trl": lambda: trl_reward(shape, 4)},
        "ppo": {
            "ours": lambda: ours_ppo(shape),
            "ours_compiled": lambda: ours_ppo(shape, compiled=True),
            "textbook": lambda: textbook_ppo(shape),
        },
        "ppo_sft": {
            "ours": lambda: ours_ppo(shape, trained=True),
            "ours_compiled": lambda: ours_ppo(shape, trained=True, compiled=True),
            "textbook": lambda: textbook_ppo(shape, trained=True),
        },
    }


def table(name: str, task: str, samples: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print what came out; the ratios. A sample is a conversation, a comparison, an answer."""
    shape = SHAPES[name]
    count = {"sft": shape.conversations, "ppo": PPO["batch"], "ppo_sft": PPO["batch"]}.get(
        task, shape.comparisons
    )
    ratios: dict[str, float] = {}
    ours = [who for who in samples if who.startswith("ours")]
    print(
        f"\n{name}, {task}: {count} samples a round\n{'':14} samples/s   peak memory   "
        f"{'   '.join(f'{who} is faster by' for who in ours)}"
    )
    for who, row in samples.items():
        faster = {mine: side_by_side.median_ratio(samples[mine]["seconds"], row["seconds"]) for mine in ours}
        print(
            f"{who:14} {count / statistics.median(row['seconds']):9.2f}   {row['peak_mb']:8,.0f} MB   "
            + "   ".join(f"{faster[mine]:{len(mine) + 13}.2f}" for mine in ours)
        )
        if who not in ours:
            for mine in ours:
                key = f"{name}/{task}/{who}" + ("" if mine == "ours" else f"/{mine}")
                ratios[key] = faster[mine]
                ratios[f"{key}/memory"] = samples[mine]["peak_mb"] / row["peak_mb"]
    return ratios


def main() -> int:
    """Run the tasks of a shape one after the other, print their tables, write results/align.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="4m")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(contenders(SHAPES["4m"])), help="default: all that the shape has"
    )
    parser.add_argument("--only", nargs="+", help="names of others: default all (ours are always there)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runtime.set_threads()
    if options.contender:
        name, task, who = options.contender.split(":")
        return side_by_side.serve_rounds(contenders(SHAPES[name])[task][who])
    tasks = options.tasks or [
        task for task in contenders(SHAPES["4m"]) if task != "ppo_sft" or options.shape == "4m"
    ]
    for stage in ("tokenizer", *(["sft"] if "ppo_sft" in tasks else [])):
        if not (RUN / stage / "result.json").is_file():
            raise SystemExit(
                f"{RUN} has no {stage}: run `chatwright run tiny --until {stage}` first (make bench-align "
                "does)"
            )
    ratios, kept = {}, {}
    with tempfile.TemporaryDirectory(prefix="bench-align-") as directory:
        os.environ["TMPDIR"] = directory  # contenders are ended by force and clean nothing up
        for task in tasks:
            here = contenders(SHAPES[options.shape])[task]
            chosen = [
                who for who in here if not options.only or who.startswith("ours") or who in options.only
            ]
            names = [f"{options.shape}:{task}:{who}" for who in chosen]
            found = side_by_side.run_iterations(__file__, names, options.rounds)
            samples = {key.rpartition(":")[2]: row for key, row in found.items()}
            ratios |= table(options.shape, task, samples)
            kept[f"{options.shape}/{task}"] = samples
    command = " ".join(["python benchmarks/align.py", *sys.argv[1:]])
    print(side_by_side.write_results("align", ratios, command, ["transformers", "trl"], kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
