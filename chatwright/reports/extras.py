"""Report extras, added when a stage is done: the paper's settings, answers before and after, KL budget, cost.

Answers are sampled here, so that a stage need not do it: with the usual engine, on held-out prompts, with the
same seeds for the model before the stage and the model after it, and with the settings of `chatwright chat`:
a reader sees what a user will see, not what training samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from chatwright import checkpoint, runtime
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.data.records import own_file, read_records, records_of
from chatwright.evaluate.answers import mean_kl, side_by_side
from chatwright.files import read_json, sha256, write_json
from chatwright.generation_config import chat_options, told
from chatwright.interop.loaded import Loaded
from chatwright.language_model import WORTH_COMPILING, load
from chatwright.metrics import say
from chatwright.train import paper
from chatwright.train.base import open_base
from chatwright.train.cost import cost_row
from chatwright.train.rl.prompts import exchanges_from, own_answers
from chatwright.train.rl.rollout import sample_completions
from chatwright.train.stage import Stage
from chatwright.train.workspace import Answered, Report, Workspace

PROMPTS = 64
"""Held-out prompts for both models: enough to measure length and diversity within seconds."""
FEW = 16
"""The same for models of WORTH_COMPILING parameters and more on a CPU, where 64 would take minutes."""
LONGEST_ANSWER = 48
"""Longest answer, in tokens, for stages without such a setting: people's own answers may make it longer."""


def close(
    stage: Stage, config: Any, workspace: Workspace, report: Report, spent: Mapping[str, float]
) -> dict[str, Any]:
    """Entries for result.json; writes pairs.json and per_prompt.json. `spent`: seconds, joules and
    memory_bytes."""
    result: dict[str, Any] = {"cost": cost(report, workspace, spent), "data": content(config, workspace)}
    answers = report.answers = report.answers or _answers(stage, config, workspace, report)
    if not (stage.paper or stage.kl_budget or answers):
        return result
    result["paper"] = paper.beside(stage.paper, config, report.facts)
    result["kl_budget"] = stage.kl_budget(config, workspace, report) if stage.kl_budget else None
    result["answers"] = None
    if answers is not None:
        result["answers"] = {
            "before": answers.before,
            "after": answers.after,
            "prompts": len(answers.prompts),
            "measures": dict(answers.measures),
            "kl": answers.kl,
            "sampling": answers.sampling,
        }
        write_answers(workspace.directory, answers)
    return result


def write_answers(directory: Path, answers: Answered) -> None:
    """pairs.json, the first answers before and after, and per_prompt.json, the numbers of single prompts."""
    write_json(directory / "pairs.json", list(answers.pairs))
    values = {name: {"before": before, "after": after} for name, (before, after) in answers.values.items()}
    marks = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in answers.prompts]
    write_json(directory / "per_prompt.json", {"prompts": marks, "values": values})


def _answers(stage: Stage, config: Any, workspace: Workspace, report: Report) -> Answered | None:
    """Answers before and after a stage that turns one language model into another; None for other
    stages."""
    if report.model is None:
        return None
    try:
        if stage.answers is not None:
            return stage.answers(config, workspace, report)
        made = checkpoint.Checkpoint(workspace.directory / report.model)
        if hasattr(config, "base") and made.state().get("kind") == "language":
            return _asked(config, workspace, report)
    except UserError as error:  # the stage is done anyway; its report says what is missing, and why
        report.notes.append(f"no answers before and after: {error}")
    return None


def content(config: Any, workspace: Workspace) -> str | None:
    """Hash (sixteen hexadecimal digits) of the records that a stage wrote or learnt from; None if not known.

    It depends on the data alone, not on settings and seed.
    """
    if (workspace.directory / "records").is_dir():
        files = sorted(records_of(workspace.directory).glob("*.jsonl"))
        text = "".join(f"{file.name} {sha256(file)}\n" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if (own := own_file(getattr(config, "data", ""))) is not None:
        return sha256(own)[:16]
    place = workspace.inputs.get(getattr(config, "data", ""))
    known = read_json(place / "result.json").get("data") if place else None
    return str(known) if known else None


def cost(report: Report, workspace: Workspace, spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds, tokens, floating-point operations, energy, money and memory of a stage, as far as known."""
    found = {name: float(report.facts[name]) for name in ("tokens", "flop") if name in report.facts}
    meant = cost_row(workspace.reporting, flop=None, elapsed=spent["seconds"], joules=spent["joules"])
    return {"seconds": spent["seconds"], **found, **meant, "memory_bytes": spent["memory_bytes"]}


def _ready(base: Loaded) -> Loaded:
    """The same model on this process's device, in evaluation mode."""
    base.model.to(runtime.device()).eval()
    return base


def _asked(config: Any, workspace: Workspace, report: Report) -> Answered:
    """Answers of the model that a stage started from and of the one that it made, to the same held-out
    prompts. Raises UserError."""
    after = _ready(open_base(str(workspace.directory / str(report.model)), workspace))
    before = _ready(open_base(config.base, workspace))
    tokenizer, template = after.tokenizer, after.template
    if (
        tokenizer is None
        or template is None
        or before.tokenizer is None
        or before.tokenizer.fingerprint != tokenizer.fingerprint
    ):
        raise UserError(f"{config.base} and the result have not one tokenizer")
    context = after.model.config.context
    file = records_of(workspace.resolve(config.data)) / "dialogues-validation.jsonl"
    slow = runtime.device().type == "cpu" and after.model.parameter_count() >= WORTH_COMPILING
    dialogues = list(islice(read_records(file, Dialogue), 1_000))
    most = FEW if slow else PROMPTS
    own = own_answers(exchanges_from(dialogues, template, tokenizer, most=most).answers, tokenizer)
    room = min(_limit("max_new_tokens", config, report) or max(LONGEST_ANSWER, own), context // 2)
    longest = min(_limit("max_prompt_tokens", config, report) or context, context - room)
    found = exchanges_from(dialogues, template, tokenizer, limit=longest, most=most)
    prompts, texts = found.prompts, found.texts
    if not prompts:
        raise UserError(f"no prompt in {file} has at most {longest} tokens")
    say(f"  asking {config.base} and the result {len(prompts)} held-out prompts")
    ask = partial(
        sample_completions,
        prompts=prompts,
        end=template.end_id(tokenizer),
        max_new_tokens=room,
        seed_parts=(workspace.seed, "before and after"),
    )
    # As in a chat. KL is that of the policy as it is: without a temperature, and without filters.
    options = chat_options(after.generation)
    settings = {"temperature": options.pop("temperature"), "filters": options}
    sides = (ask(before.model, **settings), ask(after.model, **settings))
    kl = mean_kl(after.model, before.model, ask(after.model, temperature=1.0), 1.0)
    sampling = f"{told(after.generation)}, at most {room} tokens"
    names = (config.base, workspace.directory.name)
    return side_by_side(names, texts, sides, tokenizer, kl=kl, sampling=sampling)


def _limit(name: str, config: Any, report: Report) -> int:
    """The limit that a stage found in its data, or its setting; 0 where it has none."""
    known = report.facts.get(name)
    return int(known if known else getattr(config, name, 0))


def sample(directory: Path, report: Report, prompt: str, seed: int) -> str:
    """The completion of the stage's model for the recipe's prompt; "" if the stage made no language model.

    A base model continues the prompt's text.
    """
    if (
        report.model is None
        or checkpoint.Checkpoint(directory / report.model).state().get("kind") != "language"
    ):
        return ""
    model = load(str(directory / report.model))
    options = {**chat_options(model.generation), "max_new_tokens": 40, "seed": seed}
    if model.template is None:
        return model.generate(prompt, **options)
    return model.chat([{"role": "user", "content": prompt}], **options)
