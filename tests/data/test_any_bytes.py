"""Whatever stands in a file, and whatever columns are named: records, or an error of one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatwright import broken_yaml
from chatwright.config import UserError
from chatwright.data.reading import Faults
from chatwright.data.sources import comparisons, dialogues, documents, labelled_texts

RIGHT = (
    json.dumps(
        {"prompt": "é", "completion": "c", "label": 1, "messages": [{"role": "user", "content": "x"}]}
    ),
    '{"prompt": "p", "chosen": "a b c", "rejected": "a b d"}',
    '[{"text": "a"},\n{"text": 3}]',
    'question,answer\n"a, b",c\n',
    "text;label\nx;3\n",
    "\ufeffprompt\tcompletion\na\tb\n",
    "name: x\nstages:\n  data: {text: notes}\n",
)
SCRAPS = st.sampled_from(
    [*"{}[]\"',:;=#\n\r\t\0\\|é", "\ufeff", "\x85", "\u2028", "null", "None", "1e999", "\\ud800", "&a", "*a"]
)
CHANGES = st.lists(st.tuples(st.integers(0, 90), SCRAPS, st.sampled_from([0, 1, 3])), max_size=6)
COLUMNS = st.sampled_from(["", "#text", "#prompt=text,completion=label", "#chosen=prompt,rejected=answer"])


@given(
    st.sampled_from(RIGHT),
    CHANGES,
    st.sampled_from(["utf-8", "utf-16", "latin-1"]),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]),
    COLUMNS,
    st.booleans(),
)
def test_no_file_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    changes: list[tuple[int, str, int]],
    encoding: str,
    suffix: str,
    columns: str,
    skip: bool,
) -> None:
    for at, scrap, lost in changes:
        text = text[:at] + scrap + text[at + lost :]
    file = Path(tmp_path_factory.mktemp("any")) / f"a{suffix}"
    file.write_bytes(text.encode(encoding, "replace"))
    for read in (documents, dialogues, labelled_texts, comparisons):
        said = ""
        try:
            list(read(f"{file}{columns}", faults=Faults(skip=skip)))
        except UserError as error:
            said = str(error)
        assert "\n" not in said
    with contextlib.suppress(broken_yaml.BrokenYaml):
        broken_yaml.load(text)
