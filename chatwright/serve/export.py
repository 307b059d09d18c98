"""The verb `export`: a model for other programs, in the format of transformers or in GGUF, read back and compared.

What is written is read again by our own readers before it gets its name. In float32 it must be the same model bit for
bit; in fewer bits it must be exactly the model with rounded weights, and how far that is from the source is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chatwright.config import UsageError, UserError, parse
from chatwright.serve.tools import behaviour, check_target

if TYPE_CHECKING:
    from torch import Tensor

    from chatwright.interop.loaded import Loaded

    Behaviour = tuple[list[int], list[int], Tensor]

Format = Literal["hf", "gguf"]

_NAMES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
    r"|chat_template\.jinja|model(-\d{5}-of-\d{5})?\.safetensors"
)
"""The files of a directory in transformers' format: nothing else is ever replaced."""


@dataclass(frozen=True)
class ExportConfig:
    """How a model is written for others."""

    format: Format
    """hf: a directory for transformers, vLLM, SGLang and others. gguf: one file for llama.cpp, Ollama, LM Studio."""
    dtype: Literal["fp32", "f32", "bf16", "q8_0"] = "fp32"
    """Precision of the weights: fp32 (f32 means the same) or bf16; in GGUF also q8_0, eight bits a number and a scale
    for every 32 of them."""
    verify: bool = True
    """Read what was written, compare tokens and logits with the source, and keep nothing that differs."""
    force: bool = False
    """Replace the model that DIR holds. Anything but a model is never replaced."""


def main_export(argv: Sequence[str]) -> int:
    """Write MODEL to DIR in another format; returns the exit code. Raises UserError, and then DIR is as it was."""
    config, positionals = parse(
        ExportConfig,
        _negated(argv),
        prog="chatwright export",
        description="Write MODEL in a format that other programs run: weights, shape, tokenizer, chat template and "
        "end tokens. What the format cannot say exactly is refused. docs/export.md has the launch lines of vLLM and "
        "Ollama.",
        positionals={
            "model": "A run, a model directory, a Hugging Face directory, smollm2, hf:owner/name or a .gguf file.",
            "directory": "Where to write: a directory, or with --format gguf a file whose name ends with .gguf.",
        },
    )
    source, target = str(positionals["model"]), Path(str(positionals["directory"]))
    dtype = _dtype(config)
    _check(source, target, config)
    from chatwright.language_model import load_parts
    from chatwright.metrics import say

    parts = load_parts(source)
    if parts.tokenizer is None:
        raise UserError(f"{source} has no tokenizer beside its weights: nobody could talk to it")
    say(f"{parts.source}: {sum(parameter.numel() for parameter in parts.model.parameters()):,} parameters")
    family, notes = write_export(
        parts, target, form=config.format, dtype=dtype, verify=config.verify, source=source
    )
    for note in notes:
        say(note)
    say(f"Written to {target} as {family}, {dtype}. docs/export.md tells how others run it.")
    return 0


def _negated(argv: Sequence[str]) -> list[str]:
    """`--no-verify` means `--verify=false`."""
    return ["--verify=false" if one == "--no-verify" else one for one in argv]


def _dtype(config: ExportConfig) -> str:
    """The precision by the name that the format has for it."""
    if config.format == "hf":
        if config.dtype == "q8_0":
            raise UsageError("--dtype q8_0 is for --format gguf; transformers' format takes fp32 or bf16")
        return "bf16" if config.dtype == "bf16" else "fp32"
    return config.dtype if config.dtype in ("bf16", "q8_0") else "f32"


def _check(source: str, target: Path, config: ExportConfig) -> None:
    """Raise UserError unless the target can be written without a loss that nobody asked for."""
    if Path(source).exists() and Path(source).resolve() == target.resolve():
        raise UserError(f"{source} and {target} are the same place")
    if config.format == "hf":
        check_target(target, force=config.force, known=lambda name: bool(_NAMES.fullmatch(name)))
        return
    if target.suffix != ".gguf":
        raise UserError(f"{target}: a GGUF model is one file; give it a name that ends with .gguf")
    if target.is_dir():
        raise UserError(f"{target} is a directory; name a file")
    if target.exists():
        with target.open("rb") as file:
            model = file.read(4) == b"GGUF"
        if not model:
            raise UserError(f"{target} is not a GGUF model; choose another name")
        if not config.force:
            raise UserError(f"{target} exists already; choose another name, or replace it with --force")


def write_export(
    parts: Loaded, target: Path, *, form: Format, dtype: str, verify: bool, source: str
) -> tuple[str, list[str]]:
    """Write a model as `form` in precision `dtype`; it appears whole and (with `verify`) right, or not at all.

    Returns the family that it was written as and what there is to say. `parts` is used up on the way. Raises
    UserError: the format cannot carry it, disk full, or what was read back differs.
    """
    from chatwright import checkpoint
    from chatwright.interop.gguf_export import GGUFExport, plan_gguf
    from chatwright.interop.hf_export import HFExport, plan_hf

    plan: HFExport | GGUFExport
    try:
        plan = plan_hf(parts, dtype=dtype) if form == "hf" else plan_gguf(parts, dtype=dtype)
    except UserError as error:
        raise UserError(f"{source} cannot be written as {form}: {error}") from None
    family, notes = plan.family, plan.notes
    before = behaviour(parts) if verify else None
    with (checkpoint.whole_directory if form == "hf" else checkpoint.whole_file)(target) as aside:
        plan.write(aside)
        del plan  # it holds on to the weights
        if before is not None:
            notes.append(_compare(before, parts, aside, form=form, dtype=dtype, where=str(target)))
    return family, notes


def _compare(before: Behaviour, parts: Loaded, written: Path, *, form: Format, dtype: str, where: str) -> str:
    """Read what was written and compare it with the source's tokens and the rounded source's logits, bit for bit.

    `parts` is rounded and then emptied, so that one copy of the weights is enough memory. Returns what to say.
    """
    import torch

    from chatwright.interop.gguf import load_gguf
    from chatwright.interop.gguf_export import round_gguf
    from chatwright.interop.hf import load_hf
    from chatwright.interop.hf_export import round_hf

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
        f"Read back: the same tokens; logits differ from the source's by up to {distance:.2g} (the rounding of the weights, "
        f"and nothing else); the likeliest token is the same at {agree:.0%} of the positions."
    )
