"""The export check of `chatwright doctor`: writes the model into a temporary folder in each format, reads it
back and compares it.

Our own reader reads both formats; transformers' Auto classes also read hf, if transformers is installed.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tokenizers
import torch
from torch import Tensor

from chatwright import memory, runtime
from chatwright.chat import Message
from chatwright.commands.doctor.finding import Finding
from chatwright.commands.doctor.machine import gigabytes
from chatwright.config import UserError
from chatwright.interop.export import behaviour
from chatwright.interop.gguf import load_gguf
from chatwright.interop.gguf_export import GGUFExport, plan_gguf
from chatwright.interop.hf import load_hf
from chatwright.interop.hf_export import HFExport, plan_hf
from chatwright.messages import text_of

if TYPE_CHECKING:
    from chatwright.interop.loaded import Loaded

LARGEST = 300_000_000
"""Most parameters of a model that is tried. A larger one would take minutes; the command is named instead."""
TOLERANCE = 1e-4
"""Largest difference of logits from transformers', relative to the largest logit where that is above 1.
transformers adds in another order."""
SPARE = 50_000_000
"""Bytes besides the weights: tokenizer, settings, the file system's own data."""
TALK = (
    Message(role="user", content="Hi! What is 2 + 2?"),
    Message(role="assistant", content="It is 4."),
    Message(role="user", content="naïve café — 東京"),
)

Format = Literal["hf", "gguf"]
Behaviour = tuple[list[int], list[int], Tensor]
"""What `behaviour` returns: ids of a text and of a conversation, logits."""


class _Differs(Exception):
    """What was read back differs from what was written."""


def check_export(parts: Loaded, name: str) -> list[Finding]:
    """Findings about both formats. The model must have a tokenizer."""
    return [_check(parts, name, form) for form in ("hf", "gguf")]


def _check(parts: Loaded, name: str, form: Format) -> Finding:
    topic = f"export {form}"
    try:
        plan = plan_hf(parts) if form == "hf" else plan_gguf(parts)
    except UserError as error:
        return Finding(
            "warning", topic, f"impossible: {error}", "docs/guide/export.md says what each format carries"
        )
    command = f"chatwright export {name} {'DIR' if form == 'hf' else 'FILE.gguf'} --format {form}"
    reason = _too_much(parts.model.parameter_count())
    if reason:
        return Finding(
            "warning",
            topic,
            f"{plan.family} carries it, but it was not tried: {reason}",
            f"`{command}` writes it, reads it back and compares",
        )
    try:
        before = behaviour(parts)
        if not bool(torch.isfinite(before[2]).all()):  # NaN differs from itself
            return Finding(
                "warning", topic, "not tried: the model's own logits are not finite", "see the findings above"
            )
        text = _tried(parts, plan, before)
    except _Differs as error:
        return Finding(
            "problem",
            topic,
            f"as {plan.family}: {error}",
            "this is a fault of the program: please report it with this model's name; do not use its exports",
        )
    except (OSError, UserError) as error:
        return Finding("problem", topic, f"as {plan.family}: {error}", f"see what `{command} --debug` says")
    return Finding("ok", topic, f"{plan.family}: {text}")


def _too_much(count: int) -> str:
    """Why a trial would take too much time, disk or memory, else ""."""
    size, place = 4 * count + SPARE, tempfile.gettempdir()
    if count > LARGEST:
        return f"{count / 1e6:,.0f} M parameters are above the {LARGEST / 1e6:.0f} M of a quick check"
    free = shutil.disk_usage(place).free
    if size > free:
        return (
            f"it takes {gigabytes(size)}, and {gigabytes(free)} are free in {place} (TMPDIR names another "
            "place)"
        )
    have = memory.total_memory_bytes()
    if have is not None and 8 * count > have:
        return f"two copies take {gigabytes(8 * count)} of memory, and there is {gigabytes(have)}"
    return ""


def _tried(parts: Loaded, plan: HFExport | GGUFExport, before: Behaviour) -> str:
    """Write, read back and compare. Returns the text of the finding. Raises _Differs, OSError, and UserError
    when it cannot be read."""
    with tempfile.TemporaryDirectory(prefix="chatwright-doctor-") as folder:
        if isinstance(plan, GGUFExport):
            written = Path(folder) / "model.gguf"
            plan.write(written)
            _read_by_us(before, load_gguf(written))
            return "read back by chatwright: the same ids and the same logits"
        written = Path(folder)
        plan.write(written)
        _read_by_us(before, load_hf(written))
        if find_spec("transformers") is None:
            return "read back by chatwright: the same ids and the same logits; transformers is not installed"
        with _quiet():
            return _read_by_transformers(parts, written)


def _read_by_us(before: Behaviour, again: Loaded) -> None:
    if again.tokenizer is None:
        raise _Differs("the tokenizer is lost")
    after = behaviour(again)
    for what, same in (
        ("ids of a text", before[0] == after[0]),
        ("ids of a conversation", before[1] == after[1]),
        ("logits", torch.equal(before[2], after[2])),  # bit for bit: the same numbers in the same code
    ):
        if not same:
            raise _Differs(f"chatwright reads back other {what}")


def _read_by_transformers(parts: Loaded, written: Path) -> str:
    """Compare logits and ids with transformers'. Raises _Differs."""
    import transformers

    auto: Any = transformers  # its type annotations are incomplete
    version = str(auto.__version__)
    assert parts.tokenizer is not None
    try:
        theirs = auto.AutoModelForCausalLM.from_pretrained(
            written, dtype=torch.float32, local_files_only=True
        ).eval()
        tokenizer = auto.AutoTokenizer.from_pretrained(written, local_files_only=True)
    except Exception as error:  # the possible errors have no narrower common class
        raise _Differs(f"transformers {version} refuses it: {' '.join(str(error).split())[:200]}") from None
    sample = text_of(TALK[-1]["content"])
    text = parts.tokenizer.encode_text(sample)
    if tokenizer.encode(sample) != text:
        raise _Differs(f"transformers {version} gets other ids of a text")
    talk: Sequence[int] = []
    if parts.template is not None:
        talk = _talk_ids(parts, tokenizer, version)
    room = min(64, parts.model.config.context)
    ids = torch.tensor([[*text, *talk][:room]])
    with runtime.evaluating(parts.model):
        own = parts.model(ids)
        found = theirs(ids).logits
    apart, largest = float((own - found).abs().max()), max(1.0, float(own.abs().max()))
    if not apart <= TOLERANCE * largest:  # NaN fails as well
        raise _Differs(
            f"transformers {version} computes logits that are {apart:.2g} apart, the largest being "
            f"{largest:.2g}"
        )
    same = "the same ids of a text and of a conversation" if talk else "the same ids of a text"
    return (
        f"read back by chatwright (equal) and transformers {version}: {same}, logits at most {apart:.1g} "
        "apart"
    )


def _talk_ids(parts: Loaded, tokenizer: Any, version: str) -> list[int]:
    """A conversation's ids from transformers' template; [] if the template refuses it. Raises _Differs
    when they are not the ids of our rendered text.

    The check `elsewhere` compares them with the ids of our own encoding.
    """
    assert parts.template is not None and parts.tokenizer is not None
    for messages in (TALK, TALK[:1]):  # some templates need an answer at the end, some refuse one
        with contextlib.suppress(UserError):
            text = parts.template.render(messages)
            break
    else:
        return []
    try:
        found = tokenizer.apply_chat_template(
            [dict(one) for one in messages], tokenize=True, return_dict=False
        )
    except Exception as error:  # the template's own, jinja's, or the library's
        raise _Differs(
            f"transformers {version} cannot use the template: {' '.join(str(error).split())[:200]}"
        ) from None
    whole = tokenizers.Tokenizer.from_str(parts.tokenizer.to_json())
    if list(found) != whole.encode(text, add_special_tokens=False).ids:
        raise _Differs(f"transformers {version} gets other ids of a conversation")
    return list(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Run transformers without progress bars and warnings, and keep the state of the random numbers."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
