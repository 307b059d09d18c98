"""`chatwright doctor`: what stands in front of a text, what ends an answer, how tokens are chosen where
nobody says, and a plain text side by side with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatwright.commands.doctor.finding import Finding
from chatwright.config import UserError
from chatwright.generation_config import told
from chatwright.language_model import find_checkpoint
from chatwright.tokenizer import Tokenizer

if TYPE_CHECKING:
    from chatwright.interop.loaded import Loaded

SAMPLE = "The capital of France is"


def check_text(parts: Loaded, name: str) -> Iterator[Finding]:
    """Findings about the beginning and the end of texts. The model must have a tokenizer."""
    tokenizer = parts.tokenizer
    assert tokenizer is not None
    yield _around(tokenizer)
    yield _ends(parts, tokenizer)
    yield Finding("ok", "sampling", f"where nobody says otherwise: {told(parts.generation)}")
    beside = _beside(tokenizer, name)
    if beside is not None:
        yield beside


def _named(tokenizer: Tokenizer, number: int) -> str:
    return f"{tokenizer.name(number)} ({number})"


def _around(tokenizer: Tokenizer) -> Finding:
    """What stands in front of a text and behind it."""
    frame = tokenizer.frame
    front = " ".join(_named(tokenizer, one) for one in frame.begin) or "nothing"
    behind = " ".join(_named(tokenizer, one) for one in frame.close)
    text = f"in front of a text stands {front}" + (f", behind it {behind}" if behind else "")
    return Finding("ok", "text", f"{text} ({frame.source})")


def _ends(parts: Loaded, tokenizer: Tokenizer) -> Finding:
    """What ends an answer, each end with the places that name it."""
    places = {tokenizer.end_of_text_id: ["the end of text"]}
    for number, place in tokenizer.frame.ends:
        if number in tokenizer.end_ids:
            places.setdefault(number, []).append(place)
    with suppress(UserError):  # a template whose end is unknown has a finding of its own
        ends = parts.template.end_ids(tokenizer) if parts.template is not None else frozenset[int]()
        for number in ends - {tokenizer.end_of_text_id}:
            places.setdefault(number, []).append("the chat template")
    listed = [f"{_named(tokenizer, number)}: {', '.join(found)}" for number, found in places.items()]
    lost = [str(number) for number, _ in tokenizer.frame.ends if number not in tokenizer.end_ids]
    more = f"; not {', '.join(lost)}, for no token has that number" if lost else ""
    return Finding("ok", "ends", f"an answer ends at {'; '.join(listed)}{more}")


def _beside(tokenizer: Tokenizer, name: str) -> Finding | None:
    """A plain text as transformers reads it, where the model is a directory in its format; None elsewhere."""
    path = Path(name)
    if not (path / "tokenizer.json").is_file() or find_checkpoint(path) is not None:
        return None
    if find_spec("transformers") is None:
        return Finding("ok", "plain text", "not compared: transformers is not installed")
    import transformers

    auto: Any = transformers  # its type annotations are incomplete
    try:
        theirs = list(auto.AutoTokenizer.from_pretrained(path, local_files_only=True)(SAMPLE)["input_ids"])
    except Exception as error:  # the possible errors have no narrower common class
        reason = " ".join(str(error).split())[:200]
        return Finding(
            "warning",
            "plain text",
            f"transformers {auto.__version__} cannot read the tokenizer: {reason}",
            "only chatwright was asked what a text becomes",
        )
    ours = tokenizer.encode_text(SAMPLE)
    if ours != theirs:
        return Finding(
            "warning",
            "plain text",
            f"{SAMPLE!r} is {_spelled(tokenizer, ours)} here and {_spelled(tokenizer, theirs)} in "
            f"transformers {auto.__version__}",
            "transformers 5 leaves add_bos_token aside; anything else, please report with this model's name",
        )
    return Finding("ok", "plain text", f"{_spelled(tokenizer, ours)}, as in transformers {auto.__version__}")


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(tokenizer.name(one) for one in ids)
