"""What an RL stage logs, one row an iteration: PPO and REINFORCE list these in `metrics` of their STAGE."""

from __future__ import annotations

from chatwright.metrics import Metric, in_group
from chatwright.train.loop_metrics import OPTIMISER_METRICS

SCORE = (
    "Mean score of the completions, in the reward model's units: 0 is the mean of people's own answers (or "
    "of the training answers), 1 the standard deviation of the training answers; a classifier's are log "
    "odds. Penalised completions have `unfinished_score`."
)
"""What `score` means, in every stage that logs it."""

GOLD = "Mean of the gold measure over the completions: VADER, from -1 to 1, or another reward model's units."
"""What `gold` means, in every stage that logs it."""

SAMPLE_METRICS = in_group(
    "RL: the completions of an iteration, before they are learnt from",
    Metric(
        "score",
        "score",
        "rises",
        SCORE,
        unhealthy="rising while the gold measure of the evaluate stage falls: reward hacking, raise `beta` "
        "or stop earlier",
    ),
    Metric(
        "score_error",
        "score",
        "small beside the changes of `score`",
        "Standard error of `score` over the completions.",
        unhealthy="as large as these changes: what looks like a peak may be noise",
    ),
    Metric(
        "kl",
        "nats per completion",
        "starts at 0 within `kl_error`, grows to about `kl_target`",
        "KL of the policy from the frozen reference: the k1 estimate, summed over a completion, mean over "
        "completions.",
        unhealthy="clearly negative: sampler and trainer differ (template, temperature, padding), the run is "
        "broken off; beyond `kl_budget`: stopped (`chatwright/train/rl/health.py::diagnose`)",
    ),
    Metric(
        "kl_k3",
        "nats per completion",
        "close to `kl`",
        "The same by the k3 estimate, which is never negative and has less noise.",
        unhealthy="far from `kl`: few tokens dominate, the completions have left what the reference would "
        "write",
    ),
    Metric(
        "kl_error",
        "nats per completion",
        "small beside `kl`",
        "Standard error of `kl`.",
        unhealthy="as large as `kl`: too few completions to judge by",
    ),
    Metric(
        "entropy",
        "nats per token",
        "falls slowly",
        "Mean entropy of the next-token distribution at the completions' tokens.",
        unhealthy="under 0.1 for three iterations: collapse, stopped; lower the learning rate or raise "
        "`beta`",
    ),
    Metric(
        "length",
        "tokens per completion",
        "stays near its first value, or changes with the task",
        "Mean length, end token included.",
        unhealthy="growing with `score`: a length bias of the reward model; falling to a few tokens: "
        "collapse",
    ),
    Metric(
        "finished",
        "share, 0 to 1",
        "not below its first value",
        "Completions that came to their end token.",
        unhealthy="under 0.02 for three iterations: stopped; 0 from the start: the end token was outside "
        "SFT's loss, or `max_new_tokens` is too small",
    ),
    Metric(
        "degenerate",
        "share, 0 to 1",
        "falls",
        "Penalised completions: unfinished, too short or repetitive. They have `unfinished_score`.",
        unhealthy="rising: the policy is collapsing",
    ),
    Metric(
        "sampler_gap",
        "nats",
        "float32 rounding: under 1e-3",
        "Largest difference between the sampler's and the trainer's log-probability of a token.",
        unhealthy="above 1e-2, or 2 with a bf16 policy, the run is broken off: two pieces of code disagree "
        "about the policy (`chatwright/train/rl/health.py::Rounding`)",
    ),
    Metric(
        "sampler_error",
        "nats",
        "float32: 2e-5; bf16 policies: 0.02 to 0.08",
        "Root mean square of these differences.",
        unhealthy="above 2e-3, or 0.1 with a bf16 policy: likewise",
    ),
    Metric(
        "tokens",
        "tokens",
        "at most `batch_size` x `max_new_tokens`",
        "Tokens of all completions of the iteration.",
    ),
    Metric(
        "beta",
        "score per nat",
        "moves slowly, never under `beta_floor`",
        "KL coefficient of the iteration.",
        unhealthy="rising all the time: the learning rate is too high for the KL target",
    ),
    Metric(
        "distinct_2",
        "share, 0 to 1",
        "near its first value",
        "Different word pairs over all word pairs of the completions.",
        unhealthy="below: completions repeat one another; `fixed_distinct_2` decides what is kept",
    ),
    Metric(
        "gold",
        "units of the gold measure",
        "rises with `score`",
        GOLD,
        unhealthy="falling while `score` rises: the reward model is exploited, stopped "
        "(`chatwright/train/rl/health.py::diagnose`)",
        when="`gold` is set",
    ),
    Metric(
        "gold_error",
        "units of the gold measure",
        "small beside the changes of `gold`",
        "Standard error of `gold`.",
        when="`gold` is set",
    ),
)
"""Metrics that `chatwright/train/rl/models.py::iteration_facts` and `PolicyTraining.sampled` return."""

_OFTEN = "the iteration is a multiple of `evaluate_every`, or the last one"
FIXED_METRICS = in_group(
    "RL: the policy on the fixed prompts, which choose the checkpoint",
    Metric(
        "fixed_score",
        "score",
        "rises",
        "Mean score of the answers to the fixed set of training prompts, always with the same seeds: what "
        "`score` is, without the luck of other prompts. The candidate with the highest one is kept, unless "
        "`gold` is set.",
        unhealthy="steady while `score` jumps up and down: nothing is learnt, the jumps are noise",
        when=_OFTEN,
    ),
    Metric(
        "fixed_kl",
        "nats per completion",
        "as `kl`",
        "KL of the policy from the reference on these answers.",
        unhealthy="beyond `kl_budget`: such a candidate is never kept",
        when=_OFTEN,
    ),
    Metric(
        "fixed_distinct_2",
        "share, 0 to 1",
        "at least `min_distinct` (0.8) of its first value",
        "Different word pairs over all word pairs of these answers.",
        unhealthy="below: such a candidate is never kept",
        when=_OFTEN,
    ),
    Metric(
        "fixed_gold",
        "units of the gold measure",
        "rises with `fixed_score`",
        f"{GOLD} Here over these answers; the candidate with the highest one is kept.",
        unhealthy="falling while `fixed_score` rises: the reward model is exploited",
        when=f"`gold` is set, and {_OFTEN}",
    ),
)
"""Metrics that `chatwright/train/rl/training.py::PolicyTraining` logs of `fixed_prompts.Answers`."""

UPDATE_METRICS = in_group(
    "RL: the updates of an iteration (the last one has none)",
    Metric(
        "moved",
        "nats per token",
        "small and steady",
        "Half the mean squared change of log-probabilities since sampling: the k2 estimate of the KL between "
        "old and new policy. Mean over the updates.",
        unhealthy="jumping: one update went too far",
    ),
    Metric(
        "ratio",
        "ratio",
        "1 within a few hundredths",
        "Mean ratio of new to old probability over the completions' tokens. Mean over the updates.",
        unhealthy="far from 1: the updates are too large",
    ),
    Metric(
        "ratio_gap",
        "ratio",
        "grows from one minibatch to the next, under about 1",
        "Largest difference from 1 of a token's ratio. Mean over the minibatches.",
        unhealthy="far above: the updates are too large",
    ),
    Metric(
        "first_ratio_gap",
        "ratio",
        "float32 rounding: under 1e-5",
        "The same in the first minibatch, before its update.",
        unhealthy="above 1e-3, or 0.3 with a bf16 policy, the run is broken off: learning and scoring "
        "disagree (`chatwright/train/rl/health.py::diagnose_ratio`)",
    ),
)
"""Metrics that `chatwright/train/rl/models.py::step_facts` and `PolicyTraining.iteration` log."""

RL_METRICS = (*OPTIMISER_METRICS, *SAMPLE_METRICS, *FIXED_METRICS, *UPDATE_METRICS)
"""Metrics of both methods; each adds those of its own loss."""
