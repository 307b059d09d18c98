"""A model written for other programs: nothing that exists is lost, and what is written is read back and
compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from chatwright import files, runtime
from chatwright.chat import Message
from chatwright.config import UserError
from chatwright.interop.gguf import load_gguf
from chatwright.interop.gguf_export import GGUFExport, plan_gguf, round_gguf
from chatwright.interop.hf import load_hf
from chatwright.interop.hf_export import HFExport, plan_hf, round_hf
from chatwright.interop.loaded import Loaded
from chatwright.stage_folder import check_place

Behaviour = tuple[list[int], list[int], Tensor]

Format = Literal["hf", "gguf"]

OURS = frozenset(
    {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates",
    }
)
"""The files of a model directory: nothing else is ever replaced."""

SAMPLE = "The same text, read twice: naïve café, 12 ÷ 7 — こんにちは.\n\tEnd"
"""What is encoded and run through the model before and after writing."""


def check_target(target: Path, *, force: bool, known: Callable[[str], bool] = OURS.__contains__) -> None:
    """Raise UserError unless `target` is a place for a directory of its own (`stage_folder.check_place`), and
    can be written without a loss that nobody asked for.

    `known` says which files belong to a model and may be replaced.
    """
    check_place(target, given=str(target), example="my-model")
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    others = sorted(name for name in names if not known(name))
    if others:
        raise UserError(
            f"{target} holds other things than a model ({', '.join(others[:3])}); choose another directory"
        )
    if names and not force:
        raise UserError(
            f"{target} holds a model already; choose another directory, or replace it with --force"
        )


def behaviour(parts: Loaded) -> tuple[list[int], list[int], Tensor]:
    """What must stay the same: ids of a text, ids of a conversation, and the logits of both."""

    assert parts.tokenizer is not None
    text = parts.tokenizer.encode_text(SAMPLE)
    talk: list[int] = []
    if parts.template is not None:
        messages = [Message(role="user", content=SAMPLE), Message(role="assistant", content="Yes.")]
        talk = parts.template.encode(messages, parts.tokenizer).ids
    ids = (text + talk)[: min(64, parts.model.config.context)]
    with runtime.evaluating(parts.model):
        return text, talk, parts.model(torch.tensor([ids]))


def write_export(
    parts: Loaded, target: Path, *, form: Format, dtype: str, verify: bool, source: str
) -> tuple[str, list[str]]:
    """Write a model as `form` in precision `dtype`; it appears whole and (with `verify`) right, or not at
    all.

    Returns the family that it was written as and what there is to say. `parts` is used up on the way. Raises
    UserError: the format cannot carry it, disk full, or what was read back differs.
    """

    plan: HFExport | GGUFExport
    try:
        plan = plan_hf(parts, dtype=dtype) if form == "hf" else plan_gguf(parts, dtype=dtype)
    except UserError as error:
        raise UserError(f"{source} cannot be written as {form}: {error}") from None
    family, notes = plan.family, plan.notes
    before = behaviour(parts) if verify else None
    with (files.whole_directory if form == "hf" else files.whole_file)(target) as aside:
        plan.write(aside)
        del plan  # it holds on to the weights
        if before is not None:
            notes.append(_compare(before, parts, aside, form=form, dtype=dtype, where=str(target)))
    return family, notes


def _compare(before: Behaviour, parts: Loaded, written: Path, *, form: Format, dtype: str, where: str) -> str:
    """Read what was written and compare it with the source's tokens and the rounded source's logits, bit for
    bit.

    `parts` is rounded and then emptied, so that one copy of the weights is enough memory. Returns what to
    say.
    """

    (round_hf if form == "hf" else round_gguf)(parts, dtype)
    wanted = behaviour(parts)
    parts.model.to("meta")
    again = load_hf(written) if form == "hf" else load_gguf(written)
    if again.tokenizer is None:
        raise UserError(f"{where}: what was written has lost its tokenizer; nothing is kept")
    after = behaviour(again)
    for what, same in (
        ("tokens of a text", before[0] == after[0]),
        ("tokens of a conversation", before[1] == after[1]),
        ("logits", torch.equal(wanted[2], after[2])),
    ):
        if not same:
            raise UserError(f"{where}: what was written gives other {what} than its source; nothing is kept")
    distance = float((before[2] - after[2]).abs().max())
    if distance == 0:
        return "Read back: the same tokens and the same logits."
    agree = float((before[2].argmax(-1) == after[2].argmax(-1)).float().mean())
    return (
        f"Read back: the same tokens; logits differ from the source's by up to {distance:.2g} (the rounding "
        f"of the weights, and nothing else); the likeliest token is the same at {agree:.0%} of the positions."
    )
