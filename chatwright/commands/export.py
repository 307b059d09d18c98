"""Write a model for transformers, vLLM, llama.cpp or Ollama; it is read back and checked.

Our own readers read the files back before they get their final name. In float32 the result must equal the
source bit for bit. In fewer bits it must equal the model with rounded weights exactly; the distance to the
source is printed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chatwright.config import UsageError, UserError, parse
from chatwright.interop.export import check_target, write_export
from chatwright.stage_folder import check_file_place

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
    r"|chat_template\.jinja|additional_chat_templates|model(-\d{5}-of-\d{5})?\.safetensors"
)
"""The files of a directory in transformers' format; no other file is ever replaced."""
_ADAPTERS = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md|base|\d+-[\w.-]+")
"""The same for adapters in PEFT's format."""
CLOSE = 1e-3
"""Most that logits of merged adapters may differ, as a share of the largest: sums are made in another order.
"""


@dataclass(frozen=True)
class ExportConfig:
    """How a model is written for others."""

    format: Literal["hf", "gguf", "peft"]
    """hf: a directory for transformers, vLLM, SGLang and others. gguf: one file for llama.cpp, Ollama, LM
    Studio. peft: the adapter of a stage that trained one (`lora.rank`), with those that it was trained over.
    """
    dtype: Literal["fp32", "f32", "bf16", "q8_0"] = "fp32"
    """Precision of the weights: fp32 (f32 means the same) or bf16; in GGUF also q8_0, eight bits a number and
    a scale for every 32 of them."""
    verify: bool = True
    """Read what was written, compare tokens and logits with the source, and keep nothing that differs."""
    adapters: Literal["merged", "stacked"] = "merged"
    """With --format peft, where adapters were trained over one another (PPO's over that of SFT): merged into
    one of the summed rank, or stacked, one directory each, to be used together."""
    with_base: bool = False
    """With --format peft, also write the base model, in transformers' format, to DIR/base. A base that PEFT
    cannot load by a name is written always."""
    force: bool = False
    """Replace the model that DIR holds. Anything but a model is never replaced."""


def main(argv: Sequence[str]) -> int:
    """Write MODEL to DIR in another format; returns the exit code. Raises UserError and then leaves DIR as it
    was."""
    config, positionals = parse(
        ExportConfig,
        _negated(argv),
        prog="chatwright export",
        description="Write MODEL in a format that other programs run: weights, shape, tokenizer, "
        "chat template and end tokens. What the format cannot say exactly is refused. docs/guide/export.md "
        "has the launch lines of vLLM and Ollama.",
        positionals={
            "model": (
                "A run, a model directory, a Hugging Face directory, smollm2, hf:owner/name or a .gguf file."
            ),
            "directory": (
                "Where to write: a directory, or with --format gguf a file whose name ends with .gguf."
            ),
        },
    )
    source, target = str(positionals["model"]), Path(str(positionals["directory"]))
    if config.format == "peft":
        return export_adapters(source, target, config)
    if config.with_base or config.adapters != "merged":
        raise UsageError("--adapters and --with_base belong to --format peft")
    dtype = _dtype(config)
    _check(source, target, config)
    from chatwright.language_model import load_parts
    from chatwright.metrics import say
    from chatwright.model_names import unfinished, weights_note

    parts = load_parts(source)
    if parts.tokenizer is None:
        raise UserError(f"{source} has no tokenizer beside its weights: nobody could talk to it")
    for told in (unfinished(source, parts.source), weights_note(source)):
        if told:
            say(told)
    say(f"{parts.source}: {sum(parameter.numel() for parameter in parts.model.parameters()):,} parameters")
    form: Literal["hf", "gguf"] = "hf" if config.format == "hf" else "gguf"
    family, notes = write_export(parts, target, form=form, dtype=dtype, verify=config.verify, source=source)
    for note in notes:
        say(note)
    say(f"Written to {target} as {family}, {dtype}. docs/guide/export.md tells how others run it.")
    return 0


def export_adapters(source: str, target: Path, config: ExportConfig) -> int:
    """Write the adapter of the stage `source` for PEFT, with those that it was trained over, and, where it is
    asked for or needed, the base model. Raises UserError, and DIR is as it was."""
    from chatwright import files
    from chatwright.interop.adapter_export import chain_of, write_adapters
    from chatwright.interop.adapter_origin import is_adapter, sentences
    from chatwright.language_model import adapter_directory, load_parts
    from chatwright.metrics import say

    check_target(target, force=config.force, known=lambda name: bool(_ADAPTERS.fullmatch(name)))
    place = adapter_directory(Path(source))
    if not is_adapter(place):
        raise UserError(
            f"{source} has no adapter: --format peft is for a finished sft, ppo or reinforce stage with "
            "lora.rank above 0, such as runs/my/sft"
        )
    bottom, chain = chain_of(place)
    with_base = config.with_base or not bottom.hub
    named = replace(bottom, hub=str((target / "base").resolve()), weights="") if with_base else bottom
    with files.whole_directory(target) as aside:
        written = write_adapters(chain, aside, config.adapters, named)
        if config.verify:
            say(f"Read back: logits differ by up to {_distance(bottom.name, chain, written):.2g}.")
        if with_base:
            parts = load_parts(bottom.name)
            write_export(
                parts, aside / "base", form="hf", dtype="fp32", verify=config.verify, source=bottom.name
            )
    for text in sentences(named, target):
        say(text)
    names = [str(target / one.relative_to(aside)) for one in written]
    say(f"Written: {', '.join(names)}. PEFT loads the base model from {named.hub}.")
    return 0


def _distance(base: str, before: Sequence[Path], after: Sequence[Path]) -> float:
    """Largest difference of the logits with the adapters as they were, and as they were written. Raises
    UserError above CLOSE."""
    from chatwright.interop.export import behaviour
    from chatwright.interop.peft import load_peft
    from chatwright.language_model import load_parts
    from chatwright.model.lora import merge

    def logits(adapters: Sequence[Path]) -> Tensor:
        parts = load_parts(base)
        for one in adapters:
            load_peft(one, parts.model)
            merge(parts.model)
        return behaviour(parts)[2]

    first, second = logits(before), logits(after)
    distance = float((first - second).abs().max())
    if distance > CLOSE * float(first.abs().max()):
        raise UserError(f"what was written differs: logits by up to {distance:.3g}; nothing is kept")
    return distance


def _negated(argv: Sequence[str]) -> list[str]:
    """`--no-verify` means `--verify=false`."""
    return ["--verify=false" if one == "--no-verify" else one for one in argv]


def _dtype(config: ExportConfig) -> str:
    """The format's name for the precision."""
    if config.format == "hf":
        if config.dtype == "q8_0":
            raise UsageError("--dtype q8_0 is for --format gguf; transformers' format takes fp32 or bf16")
        return "bf16" if config.dtype == "bf16" else "fp32"
    return config.dtype if config.dtype in ("bf16", "q8_0") else "f32"


def _check(source: str, target: Path, config: ExportConfig) -> None:
    """Raise UserError if writing the target would replace something that must not be replaced."""
    if Path(source).exists() and Path(source).resolve() == target.resolve():
        raise UserError(f"{source} and {target} are the same place")
    if config.format == "hf":
        check_target(target, force=config.force, known=lambda name: bool(_NAMES.fullmatch(name)))
        return
    if target.suffix != ".gguf":
        raise UserError(f"{target}: a GGUF model is one file; give it a name that ends with .gguf")
    check_file_place(target, given=str(target))
    if target.exists():
        with target.open("rb") as file:
            model = file.read(4) == b"GGUF"
        if not model:
            raise UserError(f"{target} is not a GGUF model; choose another name")
        if not config.force:
            raise UserError(f"{target} exists already; choose another name, or replace it with --force")
