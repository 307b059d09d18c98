"""What is added to a stage's report when it is done: the paper's settings, answers before and after, KL budget, cost.

A stage that trains a model does not ask it anything; that is done here, once, with the engine that answers everywhere else, on
held-out prompts and with the same seeds for the model before and the model after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

from chatwright import checkpoint, runtime
from chatwright.config import UserError
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.evaluate.answers import SHOWN, side_by_side
from chatwright.evaluate.replies import mean_kl
from chatwright.interop.loaded import Loaded
from chatwright.language_model import WORTH_COMPILING, load_parts
from chatwright.messages import described
from chatwright.metrics import read_metrics, say
from chatwright.model.config import GPTConfig
from chatwright.model.heads import ScalarModel
from chatwright.train import paper, reward
from chatwright.train.account import account_row
from chatwright.train.rankings import Rankings
from chatwright.train.reward_measures import judge
from chatwright.train.rollout import prompts_from, sample_answers
from chatwright.train.sft import read_records
from chatwright.train.tokenizer import records_of
from chatwright.train.workspace import Answered, Report, Workspace

ALIGNMENT = ("sft", "reward", "ppo", "reinforce", "bestofn", "eval")
"""Verbs whose reports have all sections."""
PROMPTS = 64
"""Held-out prompts that both models are asked: enough for length and diversity, and a matter of seconds."""
FEW = 16
"""The same for models of WORTH_COMPILING parameters and more on a CPU, for which 64 would take minutes."""
LONGEST_ANSWER = 48
"""Tokens at which an answer is cut off in stages that have no such setting."""


def close(
    verb: str, module: Any, config: Any, workspace: Workspace, report: Report, spent: Mapping[str, float]
) -> dict[str, Any]:
    """Entries for result.json; writes pairs.json and per_prompt.json. `spent`: seconds, joules and memory_bytes of the stage."""
    result: dict[str, Any] = {
        "cost": cost(report, workspace, spent),
        "data": content(verb, config, workspace),
    }
    if verb not in ALIGNMENT:
        return result
    result["paper"] = paper.beside(getattr(module, "PAPER", ()), config, report.facts)
    result["kl_budget"] = kl_budget(verb, config, workspace, report)
    answers = report.answers
    if answers is None and report.model is not None:
        try:
            answers = (
                _compared(config, workspace, report)
                if verb == "reward"
                else _asked(config, workspace, report)
            )
        except UserError as error:  # the stage is done all the same; the report says what it lacks, and why
            report.notes.append(f"no answers before and after: {error}")
    result["answers"] = None
    if answers is not None:
        result["answers"] = {
            "before": answers.before,
            "after": answers.after,
            "prompts": len(answers.prompts),
            "measures": dict(answers.measures),
            "kl": answers.kl,
        }
        checkpoint.write_json(workspace.directory / "pairs.json", list(answers.pairs))
        values = {
            name: {"before": before, "after": after} for name, (before, after) in answers.values.items()
        }
        marks = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in answers.prompts]
        checkpoint.write_json(workspace.directory / "per_prompt.json", {"prompts": marks, "values": values})
    return result


def content(verb: str, config: Any, workspace: Workspace) -> str | None:
    """Sixteen hexadecimal digits of the records that a stage wrote, or learnt from: the same data give the same, whatever the
    settings and the seed. None where it is not known."""
    if verb == "data":
        files = sorted(records_of(workspace.directory).glob("*.jsonl"))
        text = "".join(f"{file.name} {checkpoint.sha256(file)}\n" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    place = workspace.inputs.get(getattr(config, "data", ""))
    known = checkpoint.read_json(place / "result.json").get("data") if place else None
    return str(known) if known else None


def cost(report: Report, workspace: Workspace, spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds, tokens, operations, energy, money and memory of a stage, as far as they are known."""
    found = {name: float(report.facts[name]) for name in ("tokens", "flop") if name in report.facts}
    meant = account_row(workspace.reporting, flop=None, elapsed=spent["seconds"], joules=spent["joules"])
    return {"seconds": spent["seconds"], **found, **meant, "memory_bytes": spent["memory_bytes"]}


def kl_budget(verb: str, config: Any, workspace: Workspace, report: Report) -> dict[str, Any] | None:
    """{spent, allowed, largest, round, kept, stopped}: nats per answer between the reference and what came of it; None where
    there is no reference. `allowed` is None where nothing was limited."""
    spent = {measure.name: measure.after for measure in report.measures}
    if verb in ("ppo", "reinforce"):
        rows = [
            row for row in read_metrics(workspace.directory / "metrics.jsonl") if row.get("kl") is not None
        ]
        best = report.facts.get("best") or {}
        return {
            "spent": spent.get("KL to the SFT model"),
            "allowed": config.kl_budget,
            "largest": max((row["kl"] for row in rows), default=None),
            "round": rows[-1]["step"] if rows else None,
            "kept": best.get("step"),
            "stopped": report.facts.get("stopped", ""),
        }
    if verb == "bestofn":
        return {
            "spent": spent["KL of best of n"],
            "allowed": None,
            "stopped": "nothing is trained; log n - (n - 1) / n is an upper bound",
        }
    if verb == "eval":
        trained = workspace.inputs.get(config.policy)
        known = checkpoint.read_json(trained / "result.json").get("kl_budget") if trained else None
        return {
            "spent": spent["KL on held-out prompts"],
            "allowed": (known or {}).get("allowed"),
            "stopped": f"measured on held-out prompts; the budget is that of {config.policy}",
        }
    return None


def _ready(name: str, workspace: Workspace) -> Loaded:
    """The model that a setting names, on this process's device."""
    found = load_parts(workspace.resolve(name) if name in workspace.inputs else name)
    found.model.to(runtime.device()).eval()
    return found


def _asked(config: Any, workspace: Workspace, report: Report) -> Answered:
    """The model a stage started from and the one it made, asked the same held-out prompts. Raises UserError."""
    after = _ready(str(workspace.directory / str(report.model)), workspace)
    before = _ready(config.base, workspace)
    tokenizer, template = after.tokenizer, after.template
    if (
        tokenizer is None
        or template is None
        or before.tokenizer is None
        or before.tokenizer.fingerprint != tokenizer.fingerprint
    ):
        raise UserError(f"{config.base} and the result have not one tokenizer")
    context = after.model.config.context
    room = min(getattr(config, "max_new_tokens", LONGEST_ANSWER), context // 2)
    longest = min(getattr(config, "max_prompt_tokens", context), context - room)
    file = records_of(workspace.resolve(config.data)) / "dialogues-validation.jsonl"
    slow = runtime.device().type == "cpu" and after.model.parameter_count() >= WORTH_COMPILING
    dialogues = list(islice(read_records(file, Dialogue), 1_000))
    prompts = prompts_from(dialogues, template, tokenizer, max_tokens=longest, most=FEW if slow else PROMPTS)
    if not prompts:
        raise UserError(f"no prompt in {file} has at most {longest} tokens")
    say(f"  asking {config.base} and the result {len(prompts)} held-out prompts")
    temperature = getattr(config, "temperature", 1.0)
    sides = [
        sample_answers(
            model,
            prompts,
            end=tokenizer.control_ids[template.end],
            max_new_tokens=room,
            temperature=temperature,
            seed_parts=(workspace.seed, "before and after"),
        )
        for model in (before.model, after.model)
    ]
    kl = mean_kl(after.model, before.model, sides[1], temperature)
    return side_by_side(
        (config.base, workspace.directory.name), prompts, (sides[0], sides[1]), tokenizer, kl=kl
    )


def _compared(config: Any, workspace: Workspace, report: Report) -> Answered:
    """What a reward model thinks of ten held-out pairs of answers, before training and after: by how much the score of the one
    that was rated higher leads."""
    held_out = reward.load_split(config, workspace).held_out
    chosen = [pair for pair in map(_extremes, held_out) if pair.scores[0] - pair.scores[1] > config.margin][
        :SHOWN
    ]
    base = _ready(config.base, workspace)
    if base.tokenizer is None or base.template is None or not chosen:
        raise UserError("there is no held-out pair that is no tie")
    found = checkpoint.Checkpoint(workspace.directory / str(report.model))
    after = ScalarModel(GPTConfig.from_dict(found.state()["model"]))
    checkpoint.load_model_tensors(after, found.tensors("model"), where=str(found.path))
    with torch.random.fork_rng(devices=[]):  # the head that training began with
        torch.manual_seed(runtime.seed_for(workspace.seed, "reward"))
        before = ScalarModel(base.model.config)
    before.start_from(base.model)
    rankings = Rankings(
        chosen, base.template, base.tokenizer, config, SampleOrder(len(chosen), workspace.seed)
    )
    leads = []
    for model in (before, after):
        with runtime.evaluating(model.to(runtime.device())):
            scores, _ = judge(model, rankings, chosen)
        leads.append((scores[:, 0] - scores[:, 1]).tolist())
    prompts = [
        f"{' / '.join(described(one['content']) for one in pair.prompt)} - higher: {pair.responses[0]} "
        f"- lower: {pair.responses[1]}"
        for pair in chosen
    ]
    pairs = [
        {"prompt": prompt, "before": f"{first:+.2f}", "after": f"{second:+.2f}"}
        for prompt, first, second in zip(prompts, *leads, strict=True)
    ]
    return Answered("lead of the higher rated answer, untrained", "trained", prompts, pairs)


def _extremes(one: Comparison) -> Comparison:
    """The answers rated highest and lowest, in this order."""
    rated = sorted(zip(one.scores, one.responses, strict=True), key=lambda pair: pair[0])
    low, high = rated[0], rated[-1]
    return Comparison(one.id, one.prompt, (high[1], low[1]), (high[0], low[0]))
