"""The settings that PPO and REINFORCE share (training.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from chatwright.config import UsageError
from chatwright.data.cuts import check_limit
from chatwright.model.lora import LoRAConfig
from chatwright.optim import OptimConfig
from chatwright.train.paper import DETAILS, INSTRUCT, Facts, Paper
from chatwright.train.parallel.context import ParallelConfig
from chatwright.train.rl.gold import SENTIMENT


@dataclass(frozen=True)
class RLConfig:
    """Settings that all methods share."""

    base: str = field(default="sft", metadata={"input": True})
    """The policy to start from, and the frozen reference."""
    reward: str = field(default="reward", metadata={"input": True})
    """The reward model; PPO's critic starts as a copy of it."""
    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with dialogues-train.jsonl: their user turns are the prompts."""
    iterations: int = 40
    """Iterations of sampling and updating."""
    batch_size: int = 64
    """Completions sampled per iteration."""
    minibatch_size: int = 32
    """Completions per optimiser step."""
    max_prompt_tokens: int = 0
    """Prompts longer than this are left out; 0: the length that holds 99 % of the data's prompts, as far as
    the model's context and memory allow."""
    max_new_tokens: int = 0
    """Length at which an answer is cut off, and then gets `unfinished_score`; 0: the length that holds 99 %
    of the answers in the data's conversations, as far as the model's context and memory allow."""
    temperature: float = 1.0
    """Sampling temperature; logits are divided by it in rollout and in training alike."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    beta: float = 0.15
    """First KL coefficient (score units per nat)."""
    beta_floor: float = 0.1
    """The adaptive coefficient never falls below this."""
    kl_target: float = 6.0
    """Nats per answer at which the coefficient stays as it is; 0 keeps it fixed for ever."""
    kl_horizon: float = 300.0
    """Completions over which the coefficient adapts; smaller is faster."""
    kl_budget: float = 10.0
    """Nats per answer beyond which training stops."""
    patience: int = 0
    """Stop when the mean score of this many iterations has fallen significantly below the highest such mean;
    0 never does."""
    gold: str = field(default="", metadata={"input": True, "words": ("", SENTIMENT)})
    """A measure of what is really wanted, that is not trained on: `sentiment` (a lexicon), or the stage of
    another reward model. It then chooses the checkpoint to keep, and the run stops when it turns down. Empty
    for none."""
    text: str = field(default="", metadata={"input": True, "words": ("",)})
    """The tokenizer stage with token shards of general text: the report then says what alignment costs there
    (perplexity). Empty for none."""
    ptx: float = 0.0
    """Weight of the loss on general text (nats per token) beside the policy's; InstructGPT's gamma. Needs
    `text`."""
    ptx_windows: int = 8
    """Windows of general text per answer (InstructGPT: 8 examples per episode)."""
    ptx_context: int = 0
    """Tokens of such a window; 0 takes the model's whole context."""
    ema: float = 0.0
    """Decay per optimiser step of an average of the policy's weights, which is then the result where it may
    be (InstructGPT: 0.992); 0 for none. With `lora` it is an average of the adapter's matrices."""
    unfinished_score: float = -2.0
    """Score of an answer that has no end token, is too short or repeats itself; scores have mean 0 and
    deviation 1."""
    min_tokens: int = 4
    """Completions shorter than this count as degenerate."""
    max_repeats: float = 0.3
    """Largest share of an answer's bigrams that may have occurred in it before."""
    min_correlation: float = 0.6
    """Refuse a reward model whose held-out correlation with the ratings is lower. At 0.36 answers collapsed
    to two tokens, at 0.617 and 0.668 PPO worked (docs/lab/results.md)."""
    min_distinct: float = 0.8
    """A checkpoint is kept as the best only if distinct-2 of its answers to the fixed prompts is at least
    this share of that of the model that training starts from."""
    evaluate_every: int = 5
    """Iterations between candidates for the result: the policy answers a fixed set of training prompts,
    always with the same seeds, and the candidate with the best answers is kept."""
    evaluate_prompts: int = 64
    """Prompts in this set; fewer are answered several times each, so that there are as many completions."""
    held_out_prompts: int = 128
    """Held-out prompts on which the result is measured beside the model that training starts from; fewer are
    answered several times each."""
    save_steps: int = 10
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints to keep, the newest ones; the best is kept besides."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train low-rank adapters on the policy and on a critic with a body of its own instead of all weights:
    `lora.rank` above 0. The reference is then the policy with its adapter off, and the critic's frozen
    weights are the reward model's: two models in memory, not four."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Products of reward model and critic; `auto` takes bf16 where the hardware has it."""
    policy_precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Products of policy and reference, and of sampling where the CPU's kernels do it (models of 2 M
    parameters and more). In bf16 an iteration is a third shorter, and the KL of an answer, a small difference
    of large numbers, has rounding in it."""
    compile: bool = False
    """Compile the blocks of all models, where there is a C++ compiler: iterations are about a quarter
    shorter, but the first of all on a machine waits a minute or two for it, later runs some seconds."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            name="adamw", learning_rate=1e-4, eps=1e-5, schedule="linear", warmup=0.05
        )
    )
    """Optimiser of everything that is trained; the learning rate falls linearly to 0."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the work."""

    def __post_init__(self) -> None:
        check_limit("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_limit("max_new_tokens", self.max_new_tokens, 1)
        if self.batch_size % self.minibatch_size:
            raise UsageError(
                f"batch_size {self.batch_size} must be a multiple of minibatch_size {self.minibatch_size}"
            )
        for name in ("evaluate_every", "evaluate_prompts", "held_out_prompts"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} must be at least 1")
        if self.temperature <= 0:
            raise UsageError("temperature must be above 0: there must be something to choose from")
        if self.ptx and not self.text:
            raise UsageError("ptx needs general text: set `text` to the tokenizer stage")
        if self.lora.dropout:
            raise UsageError(
                "there is no dropout here, neither in rollouts nor in updates: lora.dropout must be 0"
            )
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema {self.ema:g} must be at least 0 and below 1")


def _limit(name: str) -> Callable[[Any, Facts], int | None]:
    """A limit of a run: the one that came from the data, or the setting; None while it is not known."""
    return lambda config, facts: facts.get(name) or getattr(config, name) or None


PROMPT_LIMIT, ANSWER_LIMIT = _limit("max_prompt_tokens"), _limit("max_new_tokens")

SHARED_PAPER = (
    Paper(
        "answers in all (iterations x batch_size)",
        256_000,
        INSTRUCT,
        lambda config, facts: config.iterations * config.batch_size,
    ),
    Paper("batch_size", 512, INSTRUCT),
    Paper("max_prompt_tokens", 1_000, INSTRUCT, PROMPT_LIMIT),
    Paper("max_new_tokens", 1_000, INSTRUCT, ANSWER_LIMIT),
    Paper("beta", 0.02, INSTRUCT),
    Paper("kl_target", 0.0, f"{INSTRUCT}: beta is fixed; it adapts in Ziegler et al. 2019"),
    Paper("ptx", 27.8, f"{INSTRUCT}: of a sum over texts, here of a mean over tokens"),
    Paper("ptx_windows", 8, INSTRUCT),
    Paper("ema", 0.992, INSTRUCT),
    Paper("entropy_coefficient", 0.0, DETAILS),
    Paper("temperature", 1.0, INSTRUCT),
    Paper("optim.beta1", 0.9, INSTRUCT),
    Paper("optim.beta2", 0.95, INSTRUCT),
    Paper("optim.eps", 1e-5, DETAILS),
    Paper("optim.schedule", "constant", f"{INSTRUCT}: after a warm-up; linear in Ziegler et al. 2019"),
    Paper("optim.warmup", 0.02, f"{INSTRUCT}: 10 of 500 iterations, from a tenth of the rate"),
    Paper("lora.rank", 0, f"{INSTRUCT}: all weights are trained"),
)
"""InstructGPT's values of the settings that all methods share. The guards (kl_budget, min_correlation,
min_distinct, unfinished and degenerate completions) are our own: training.py says why."""

RENAMED = {"save_every": "save_steps", "average": "ema"}
"""Former names of settings (`save_every` means seconds everywhere else)."""
