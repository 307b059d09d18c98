"""Turn a model of another format into a model directory, complete in itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatwright.config import UserError, parse
from chatwright.interop.export import behaviour, check_target

if TYPE_CHECKING:
    from torch import Tensor

    from chatwright.interop.loaded import Loaded


@dataclass(frozen=True)
class ImportConfig:
    """How a model is taken over."""

    force: bool = False
    """Replace the model that DIR holds. Anything but a model is never replaced."""


def main(argv: Sequence[str]) -> int:
    """Write SRC to DIR and compare; returns the exit code. Raises UserError and then leaves DIR as it was."""
    config, positionals = parse(
        ImportConfig,
        argv,
        prog="chatwright import",
        description="Turn SRC into a model directory of ours: weights in float32, tokenizer, chat template, "
        "checksums. DIR can be moved and copied; `chatwright chat DIR` works.",
        positionals={
            "source": (
                "A Hugging Face directory, hf:owner/name, a .gguf file, smollm2, or a run or checkpoint of "
                "ours."
            ),
            "directory": "Where to write; must not exist, or be empty.",
        },
    )
    source, target = str(positionals["source"]), Path(str(positionals["directory"]))
    check_target(target, force=config.force)
    if Path(source).exists() and Path(source).resolve() == target.resolve():
        raise UserError(f"{source} and {target} are the same place")
    from chatwright.language_model import load_parts
    from chatwright.metrics import say
    from chatwright.model_names import unfinished, weights_note

    parts = load_parts(source)
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    template = "with a chat template" if parts.template else "without a chat template (a base model)"
    for told in (unfinished(source, parts.source), weights_note(source)):
        if told:
            say(told)
    say(f"{parts.source}: {parameters:,} parameters, {template}")
    write_model(parts, target, source=source)
    verb = "chat" if parts.template else "generate"
    say(
        f"Written to {target} and read back: the same tokens and the same logits. Next: chatwright {verb} "
        f"{target}"
    )
    return 0


def write_model(parts: Loaded, target: Path, *, source: str) -> None:
    """Write a self-contained model directory, read it back and compare. The directory appears only if it is
    complete and equal to the source.

    The weights of `parts` are freed before the directory is read back, so that memory for one copy is enough.
    Raises UserError if there is no tokenizer, the disk is full, or what was read back differs.
    """
    from chatwright import __version__, checkpoint, files, generation_config

    tokenizer, template = parts.tokenizer, parts.template
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer beside its weights: nobody could talk to it")
    state: dict[str, Any] = {
        "kind": "language",
        "model": parts.model.config.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": tokenizer.end_of_text,
        "texts": tokenizer.frame.to_state(),
        "source": source,
        "chatwright": __version__,
    }
    texts = {"tokenizer.json": tokenizer.to_json()}
    if template is not None:
        template.end_ids(tokenizer)  # refuses a given end that is unknown, before anything is written
        state |= {"template": template.fingerprint, "end_of_turn": template.end or None}
        texts |= template.files()
    if parts.generation is not None:
        texts[generation_config.FILE] = parts.generation.to_json()
    before = behaviour(parts)
    with files.whole_directory(target) as aside:
        checkpoint.save_checkpoint(
            aside, tensors={"model": checkpoint.model_tensors(parts.model)}, state=state, texts=texts
        )
        parts.model.to("meta")  # the weights are on the disk now: free them
        _compare(before, aside, where=str(target))


def _compare(before: tuple[list[int], list[int], Tensor], written: Path, *, where: str) -> None:
    import torch

    from chatwright.checkpoint import Checkpoint
    from chatwright.language_model import load_checkpoint

    after = behaviour(load_checkpoint(Checkpoint(written)))
    # Bit for bit: the same float32 numbers in the same code give the same results.
    for what, same in (
        ("tokens of a text", before[0] == after[0]),
        ("tokens of a conversation", before[1] == after[1]),
        ("logits", torch.equal(before[2], after[2])),
    ):
        if not same:
            raise UserError(f"{where}: what was written gives other {what} than its source; nothing is kept")
