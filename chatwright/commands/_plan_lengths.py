"""How long rows will be, for a plan: estimated from the files that the settings name, where they are there.

A stage whose `context` or `max_tokens` is 0 takes the length of its rows from its data. The plan reads a
sample of them, in bytes; the exact number of tokens is known when the stage begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from chatwright.config import UserError
from chatwright.data.catalogue import find
from chatwright.data.cuts import length_of_data
from chatwright.data.examples import Comparison, Dialogue, LabelledText
from chatwright.data.records import READERS, own_file
from chatwright.data.sources import split_specs
from chatwright.messages import Message, described
from chatwright.recipe import Recipe
from chatwright.train.planning.program import PlannedStage

SAMPLE = 1_000
"""Records that are read."""
BYTES = 3.5
"""Bytes of a token of English, with a vocabulary of 30,000 to 150,000; fewer where it is smaller."""
AROUND = 6
"""Tokens of a chat template around a message."""
STEP = 64
"""Lengths are rounded up to a multiple of this."""
LONG = 1024
"""Tokens up to which a single long conversation counts (`context` of SFT)."""
WHOLE, PARTS = ("context", "max_tokens"), ("max_prompt_tokens", "max_new_tokens")
"""Settings of the length of a row, and of its two parts in RL."""


def with_lengths(planned: PlannedStage, recipe: Recipe) -> tuple[PlannedStage, str]:
    """The stage with lengths in place of settings that are 0, and a line on where they come from; "" when no
    setting is. Raises UserError for files that cannot be read."""
    open_ = [name for name in (*WHOLE, *PARTS) if getattr(planned.config, name, None) == 0]
    if not open_:
        return planned, ""
    entry = recipe.stages[planned.stage]
    found = next(iter(entry.stage.reads(planned.config).items()), None)
    spec = _file(*found, recipe) if found else ""
    lengths = _lengths(found[0], spec) if found and spec else []
    setting = f"{planned.stage}.{open_[0]}" if len(recipe.stages) > 1 else open_[0]
    if not lengths:
        rows = planned.rows[1]
        return planned, (
            f"{planned.stage}: rows of {rows:,} tokens are assumed, for their length comes from data that no "
            f"setting names or that are not there yet; --{setting} sets it"
        )
    context = planned.shape.context
    whole = [before + answer for before, answer in lengths]
    values: dict[str, int] = {}
    for name in open_:
        side = {
            "max_prompt_tokens": [one for one, _ in lengths],
            "max_new_tokens": [one for _, one in lengths],
        }
        tokens = length_of_data(side.get(name, whole), step=STEP, floor=LONG)
        values[name] = min(tokens, context if name in WHOLE else context // 2)
    planned = replace(planned, config=replace(planned.config, **values))
    return planned, (
        f"{planned.stage}: rows of {planned.rows[1]:,} tokens, estimated from {len(lengths):,} records of "
        f"{spec} ({BYTES:g} bytes a token)"
    )


def _file(kind: str, named: str, recipe: Recipe) -> str:
    """The files of records of a kind, where `named` is a stage of the recipe, a directory or a file; "" where
    they are not there."""
    stage = recipe.stages.get(named)
    if stage is not None:
        specs = str(getattr(stage.config, kind, ""))
        there = [one for one in (split_specs(specs) if specs.strip() else []) if _is_there(one)]
        return ",".join(there)
    file = Path(named) / "records" / f"{kind}-train.jsonl"
    if file.is_file():
        return str(file)
    return named if own_file(named) is not None else ""


def _is_there(spec: str) -> bool:
    """Whether a source is a file or a folder, and no named data set or one of the hub."""
    return (
        not spec.startswith("hf:") and find(spec) is None and Path(spec.rpartition("#")[0] or spec).exists()
    )


def _lengths(kind: str, spec: str) -> list[tuple[int, int]]:
    """Tokens of prompt and of answer, estimated for each record of a sample. Raises UserError."""
    try:
        return [pair for one in islice(READERS[kind](spec), SAMPLE) for pair in _parts(one)]
    except UserError as error:
        raise UserError(f"{error} (to plan without data, set the length of a row)") from None


def _parts(record: Any) -> Iterable[tuple[int, int]]:
    """Tokens of the prompt and of each answer of a record."""
    if isinstance(record, Dialogue):
        answers = [number for number, one in enumerate(record.messages) if one["role"] == "assistant"]
        last = answers[-1] if answers else len(record.messages)
        return [(_tokens(record.messages[:last]), _tokens(record.messages[last : last + 1]))]
    if isinstance(record, Comparison):
        return [(_tokens(record.prompt), _of(answer)) for answer in record.responses]
    return [(0, _of(record.text))] if isinstance(record, LabelledText) else []


def _tokens(messages: Sequence[Message]) -> int:
    return sum(_of(described(message["content"])) for message in messages)


def _of(text: str) -> int:
    return AROUND + round(len(text.encode("utf-8")) / BYTES)
