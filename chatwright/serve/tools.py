"""The verb `import`: any model that can be loaded becomes a model directory of ours, complete in itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatwright.config import UserError, parse

if TYPE_CHECKING:
    from torch import Tensor

    from chatwright.interop.loaded import Loaded

OURS = frozenset(
    {"model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "chat_template.jinja"}
)
"""The files of a model directory: nothing else is ever replaced."""

SAMPLE = "The same text, read twice: naïve café, 12 ÷ 7 — こんにちは.\n\tEnd"
"""What is encoded and run through the model before and after writing."""


@dataclass(frozen=True)
class ImportConfig:
    """How a model is taken over."""

    force: bool = False
    """Replace the model that DIR holds. Anything but a model is never replaced."""


def main_import(argv: Sequence[str]) -> int:
    """Write SRC to DIR and compare; returns the exit code. Raises UserError, and then DIR is as it was."""
    config, positionals = parse(
        ImportConfig,
        argv,
        prog="chatwright import",
        description="Turn SRC into a model directory of ours: weights in float32, tokenizer, chat template, checksums. "
        "DIR can be moved and copied; `chatwright chat DIR` works.",
        positionals={
            "source": "A Hugging Face directory, hf:owner/name, a .gguf file, smollm2, or a run or checkpoint of ours.",
            "directory": "Where to write; must not exist, or be empty.",
        },
    )
    source, target = str(positionals["source"]), Path(str(positionals["directory"]))
    check_target(target, force=config.force)
    if Path(source).exists() and Path(source).resolve() == target.resolve():
        raise UserError(f"{source} and {target} are the same place")
    from chatwright.language_model import load_parts
    from chatwright.metrics import say

    parts = load_parts(source)
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    template = "with a chat template" if parts.template else "without a chat template (a base model)"
    say(f"{parts.source}: {parameters:,} parameters, {template}")
    write_model(parts, target, source=source)
    verb = "chat" if parts.template else "generate"
    say(
        f"Written to {target} and read back: the same tokens and the same logits. Next: chatwright {verb} {target}"
    )
    return 0


def check_target(target: Path, *, force: bool, known: Callable[[str], bool] = OURS.__contains__) -> None:
    """Raise UserError unless `target` can be written without a loss that nobody asked for.

    `known` says which files belong to a model and may be replaced.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a directory")
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


def write_model(parts: Loaded, target: Path, *, source: str) -> None:
    """Write a self-contained model directory, read it back and compare; it appears whole and right, or not at all.

    `parts` is emptied on the way, so that one copy of the weights is enough memory. Raises UserError: no tokenizer,
    disk full, or what was read back differs.
    """
    from chatwright import __version__, checkpoint

    tokenizer, template = parts.tokenizer, parts.template
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer beside its weights: nobody could talk to it")
    state: dict[str, Any] = {
        "kind": "language",
        "model": parts.model.config.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": tokenizer.end_of_text,
        "source": source,
        "chatwright": __version__,
    }
    texts = {"tokenizer.json": tokenizer.to_json()}
    if template is not None:
        template.end_ids(tokenizer)  # a template whose end nobody knows is refused now
        state |= {"template": template.fingerprint, "end_of_turn": template.end}
        texts["chat_template.jinja"] = template.source
    before = behaviour(parts)
    with checkpoint.whole_directory(target) as aside:
        checkpoint.save_checkpoint(
            aside, tensors={"model": checkpoint.model_tensors(parts.model)}, state=state, texts=texts
        )
        parts.model.to("meta")  # its weights lie on the disk now: one copy in memory is enough
        _compare(before, aside, where=str(target))


def behaviour(parts: Loaded) -> tuple[list[int], list[int], Tensor]:
    """What must stay the same: ids of a text, ids of a conversation, and the logits of both."""
    import torch

    from chatwright import runtime
    from chatwright.chat import Message

    assert parts.tokenizer is not None
    text = parts.tokenizer.encode(SAMPLE)
    talk: list[int] = []
    if parts.template is not None:
        messages = [Message(role="user", content=SAMPLE), Message(role="assistant", content="Yes.")]
        talk = parts.template.encode(messages, parts.tokenizer).ids
    ids = (text + talk)[: min(64, parts.model.config.context)]
    with runtime.evaluating(parts.model):
        return text, talk, parts.model(torch.tensor([ids]))


def _compare(before: tuple[list[int], list[int], Tensor], written: Path, *, where: str) -> None:
    import torch

    from chatwright.checkpoint import Checkpoint
    from chatwright.language_model import load_checkpoint

    after = behaviour(load_checkpoint(Checkpoint(written)))
    # Bit for bit: the same float32 numbers take the same way through the same code.
    for what, same in (
        ("tokens of a text", before[0] == after[0]),
        ("tokens of a conversation", before[1] == after[1]),
        ("logits", torch.equal(before[2], after[2])),
    ):
        if not same:
            raise UserError(f"{where}: what was written gives other {what} than its source; nothing is kept")
