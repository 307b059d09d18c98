"""Text to tokens: our batch encoding and our token shards beside the `tokenizers` library's own batch
encoding.

    chatwright run tiny --until tokenizer       # the text and the tokenizer: runs/tiny
    python benchmarks/encode.py                 # under a minute

In turns, the same documents and the same tokenizer.json, all cores. `shards` is the whole way to disk:
encoding, counting bytes, checksums, files that appear whole. The peer's figure ends with its `Encoding`
objects: nothing is taken out of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import side_by_side
from tokenizers import Tokenizer as Library

from chatwright.data.examples import Document
from chatwright.data.records import read_records
from chatwright.data.shards import write_shards
from chatwright.tokenizer import Tokenizer


def main() -> int:
    """PolicyTraining in turns, the table, results/encode.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/tiny", help="a run with its data and tokenizer stages")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    directory = Path(options.run)
    texts = [record.text for record in read_records(directory / "data" / "records" / "train.jsonl", Document)]
    ours = Tokenizer.load(directory / "tokenizer")
    library = Library.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    size = sum(len(text.encode()) for text in texts) / 1e6

    def shards() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            write_shards(Path(scratch) / "train", texts, ours)

    contenders: dict[str, Callable[[], object]] = {
        "encode_batch": lambda: ours.encode_batch(texts),
        "shards": shards,
        "tokenizers": lambda: library.encode_batch(texts, add_special_tokens=False),
    }
    assert [
        item.ids for item in library.encode_batch(texts[:50], add_special_tokens=False)
    ] == ours.encode_batch(texts[:50])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            work()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = {}
    for name, spent in seconds.items():
        faster = side_by_side.median_ratio(spent, seconds["tokenizers"])
        print(
            f"{name:14} {size / side_by_side.statistics.median(spent):6.1f} MB/s   {faster:.2f} of the "
            "library's"
        )
        if name != "tokenizers":
            ratios[f"{name}/tokenizers"] = faster
    print(
        side_by_side.write_results(
            "encode",
            ratios,
            "python benchmarks/encode.py",
            ["tokenizers"],
            {"megabytes": size, "seconds": seconds},
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
