"""Metrics that every training stage logs. A stage lists them in `metrics` of its STAGE, beside its own."""

from __future__ import annotations

from chatwright.metrics import Metric, in_group

LOSS_TROUBLE = (
    "flat from the start: the learning rate is too low, or the labels say nothing; a jump that stays: the "
    "learning rate is too high; `null`: the run has diverged"
)
"""What an unhealthy loss means, in every stage."""

OPTIMISER_METRICS = in_group(
    "Every stage that trains",
    Metric(
        "gradient_norm",
        "L2 norm",
        "falls in the first steps, then steady",
        "Norm of the whole gradient of the last step, before it is clipped to `optim.clip`.",
        unhealthy="rising without end: about to diverge; always far above `optim.clip`: the clip sets the "
        "length of the steps, lower the learning rate",
    ),
    Metric(
        "learning_rate",
        "none",
        "rises during warm-up, then stays or falls as `optim.schedule` says",
        "AdamW's learning rate in the last step.",
    ),
    Metric(
        "skipped",
        "steps",
        "absent",
        "Steps so far whose gradient was not finite. They changed nothing.",
        unhealthy="a few: look at the samples; 20 in a row end the run "
        "(`chatwright/train/trainer.py::Trainer._skip`)",
        when="there has been such a step",
    ),
)
"""Metrics that chatwright/train/trainer.py logs."""

LOOP_METRICS = (
    *OPTIMISER_METRICS,
    *in_group(
        "Stages that train in the plain loop",
        Metric(
            "matrix_learning_rate",
            "none",
            "in step with `learning_rate`",
            "Muon's learning rate in the last step.",
            when="`optim.name` is muon",
        ),
        Metric(
            "spike_loss",
            "as `loss`",
            "absent",
            "Loss of a step whose update was left out.",
            unhealthy="a few: broken samples; many: the learning rate is too high "
            "(`chatwright/train/spikes.py::accept`)",
            when="the loss of this step jumped",
        ),
        Metric(
            "spike_limit",
            "as `loss`",
            "absent",
            "The limit that this loss was above (`chatwright/train/spikes.py::limit`).",
            when="the loss of this step jumped",
        ),
        Metric(
            "rolled_back_from",
            "steps",
            "absent",
            "The step from which the run went back to the step of this row "
            "(`chatwright/train/trainer.py::Trainer.roll_back`).",
            unhealthy="more than once: the learning rate is too high",
            when="`fit.spikes.action` is rollback and the loss jumped several times in a row",
        ),
        Metric(
            "elapsed",
            "seconds",
            "counts up",
            "Training time so far. The first two steps of each process, which compile, are left out.",
        ),
        Metric(
            "memory_mb",
            "MB (10^6 bytes)",
            "levels off in the first steps",
            "Largest resident size of the process so far. 0 on Windows, which does not tell it.",
            unhealthy="growing: a leak",
        ),
        Metric(
            "energy_kwh",
            "kWh",
            "counts up",
            "Energy of training so far: `report.watts` times `elapsed`, else what the processors' own meters "
            "say (RAPL, the processors alone).",
            when="`report.watts` is set, or the machine lets the meters be read",
        ),
        Metric(
            "cost",
            "currency of `report.price`",
            "counts up",
            "`report.price` times the hours of `elapsed`.",
            when="`report.price` is set",
        ),
    ),
)
"""What chatwright/train/loop.py logs in every stage, beside the loss, the speed and the held-out measures."""

FLOP_METRICS = in_group(
    "Stages that train in the plain loop",
    Metric(
        "flop",
        "operations",
        "grows evenly",
        "Floating-point operations so far, forward and backward, 6 N + 12 L H Q T a token "
        "(`chatwright/train/cost.py::training_flop`). Padding counts, but for the reward model, whose rows "
        "count with their mean length. The last block counts for all tokens, though a loss on few of them "
        "computes its MLP for these alone (reward model: up to a fifth too much).",
    ),
    Metric(
        "mfu",
        "share, 0 to 1",
        "steady; on a CPU 0.3 to 0.8",
        "Operations per second of the last step over what the machine's matrix products reach in the same "
        "precision. That peak is measured for 0.2 s when the first row is written "
        "(`chatwright/runtime.py::matmul_peak`).",
        unhealthy="small: the model or the batch is too small, or another program is running; above 1: "
        "something disturbed the measurement",
    ),
)
"""Also logged by a stage that gives `Fit` its operations per sample (`flop_per_sample`)."""

SLOWER = "falling: another program is running, the machine is hot, or memory is swapped"

TOKENS_PER_SECOND = Metric(
    "tokens_per_second",
    "tokens per second",
    "steady",
    "Speed of the last step. Padding does not count; where rows are packed, their mean number of tokens "
    "does.",
    unhealthy=SLOWER,
    group="Stages that train in the plain loop",
)
"""Speed of a stage whose `throughput` counts tokens."""

ANSWERS_PER_SECOND = Metric(
    "answers_per_second",
    "answers per second",
    "steady",
    "Answers, or texts, that the last step learnt from, per second.",
    unhealthy=SLOWER,
    group="Stages that train in the plain loop",
)
"""Speed of a stage whose `throughput` counts answers."""
