"""Proof that a restructuring changes nothing that is computed: `python scripts/same_results.py OLD NEW`.

OLD and NEW are checkouts. The miniature road (miniature.py), exports, an import and one served conversation
run with the code of each, from one seed, on this machine. Then all that they wrote is compared bit for bit:
weights, states of optimisers, metrics, answers, tokens, exported files. At last NEW reads the run that OLD
made. Exit code 0: all the same; 1: something differs, or a command failed.

Not compared: what a clock or a meter says, and prose (`LEFT_OUT`, `FILES_LEFT_OUT`). Of exported files every
byte counts, but for the order of metadata in a safetensors header: that library draws it by chance.

Not run, as it would take minutes: torch.compile, several processes, models so large that PPO samples by the
compiled kernels. Not run, as it never repeats exactly: a stage with a budget in seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import miniature
import safetensors.torch
import torch
from miniature import READ, Failed, Side

RENAMED: dict[str, str] = {
    "bestofn": "best_of_n",
    "eval": "evaluate",
    "rounds": "iterations",
    "round": "iteration",
    "all rounds done": "all iterations done",
    "rival": "baseline_policy",
    "lead of the higher rated answer, untrained": "margin of the higher rated answer, untrained",
}
"""Deliberate renames, OLD's word -> NEW's: this table is where they are recorded. A word is a key in
metrics.jsonl, result.json, state.json, per_prompt.json and in what `compare --json` prints, or a whole text
there that stands for a fact: the name of a measure, the verb of a stage, the reason of a stop. No word stands
on both sides.
"""

LEFT_OUT = {
    "metrics.jsonl": ("elapsed", "*_per_second", "memory_mb", "mfu", "energy_kwh"),
    "result.json": (
        *(
            "seconds",
            "memory_bytes",
            "cost.seconds",
            "cost.memory_bytes",
            "cost.energy_kwh",
            "facts.training_seconds",
        ),
        *(
            "fingerprint",
            "version",
            "inputs.*",
        ),  # depend on the names of settings; the part `read` proves what matters
        *(
            "notes.*",
            "measures.*.note",
            "curves.*",
            "pictures.*",
            "paper.*",
        ),  # prose and layout of the report
    ),
    "state.json": (
        *("progress.elapsed", "progress.joules", "chatwright", "runtime.*"),
        "files.*",  # checksums of files that are compared themselves, and of this one, which has times in it
    ),
    "compare.json": (
        *("stages.*.cost.*", "stages.*.settings.*"),
        *("remarks.*", "stages.*.kl_budget.*", "stages.*.curves.*.title"),
    ),
    "served.json": ("first turn.id", "second turn.id", "completion.id", "*.created"),
}
"""Entries of JSON files that are not compared, as patterns of their dotted path."""

FILES_LEFT_OUT = ("*.md", "*.png", "clock.json", "config.yaml")
"""Prose, pictures, times, and the settings under their names. What settings do is compared."""

AS_JSON = (*LEFT_OUT, "pairs.json", "per_prompt.json")
"""Files that are compared entry by entry, all others byte by byte."""

KINDS = (
    ("exported and imported files", "uses/*.gguf"),
    ("exported and imported files", "uses/*/*"),
    ("answers of commands and server", "uses/*"),
    ("weights and optimiser states", "*.safetensors"),
    ("metrics", "*metrics.jsonl"),
    ("results of stages", "*result.json"),
    ("answers before and after", "*pairs.json"),
    ("answers before and after", "*per_prompt.json"),
    ("states of checkpoints", "*state.json"),
    ("records, tokens, templates", "*"),
)
"""How the table groups files; the first pattern that fits counts."""

PARTS = ("road", "uses", "read")


def entries(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value with their dotted paths, in the words of NEW."""
    if isinstance(value, (dict, list)) and value:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            name = RENAMED.get(str(key), str(key))
            yield from entries(one, f"{path}.{name}" if path else name)
    else:
        yield path, RENAMED.get(value, value) if isinstance(value, str) else value


def read_entries(file: Path) -> dict[str, Any]:
    """What of a JSON file is compared. The rows of a .jsonl file begin with their number."""
    left_out = LEFT_OUT.get(file.name, ())
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    found = {}
    for number, row in enumerate(rows, 1):
        for path, value in entries(row):
            if not any(fnmatch(path, pattern) for pattern in left_out):
                found[f"row {number}, {path}" if file.suffix == ".jsonl" else path] = value
    return found


def first_different(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first entry that differs; empty when none does."""
    for path in [*before, *(path for path in after if path not in before)]:
        if path not in after or path not in before:
            return f"{path}: only in {'OLD' if path in before else 'NEW'}"
        if repr(before[path]) != repr(after[path]):  # repr: NaN equals itself, 1 is not 1.0
            return f"{path}: {before[path]!r} -> {after[path]!r}"
    return ""


def different_tensor(old: Path, new: Path) -> str:
    """Where two safetensors files first differ, in a tensor or in the header; empty when they do not."""
    before, after = safetensors.torch.load_file(old), safetensors.torch.load_file(new)
    for name in sorted({*before, *after}):
        if name not in after or name not in before:
            return f"{name}: only in {'OLD' if name in before else 'NEW'}"
        one, two = before[name], after[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return f"{name}: {one.dtype} {tuple(one.shape)} -> {two.dtype} {tuple(two.shape)}"
        # As bytes: -0.0 is not 0.0, and NaN equals itself.
        apart = one.flatten().view(torch.uint8) != two.flatten().view(torch.uint8)
        if apart.any():
            place = int(apart.nonzero()[0]) // one.element_size()
            values = f"{one.flatten()[place].item()!r} -> {two.flatten()[place].item()!r}"
            return f"{name}[{place}]: {values}"
    return first_different(header_of(old), header_of(new))


def header_of(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: metadata, and type, shape and place of each tensor."""
    with file.open("rb") as content:
        return dict(entries(json.loads(content.read(int.from_bytes(content.read(8), "little")))))


def difference(old: Path, new: Path) -> str:
    """Where two files first differ; empty when they are the same."""
    before, after = old.read_bytes(), new.read_bytes()
    if before == after:
        return ""
    if old.name in AS_JSON:
        return first_different(read_entries(old), read_entries(new))
    if old.suffix == ".safetensors":
        return different_tensor(old, new)
    length = min(len(before), len(after))
    place = next((n for n in range(length) if before[n] != after[n]), length)
    return f"byte {place} of {len(before)}: {before[place : place + 24]!r} -> {after[place : place + 24]!r}"


def kind_of(path: str) -> str:
    """The row of the table that a file belongs to."""
    return next(kind for kind, pattern in KINDS if fnmatch(path, pattern))


def compare(old: Path, new: Path, places: Sequence[str]) -> list[str]:
    """Compare files and folders of two sides: prints a row for each kind of file, returns the differences."""
    found: set[str] = set()
    for side in (old, new):
        for place in places:
            files = [file for file in (side / place, *(side / place).rglob("*")) if file.is_file()]
            found |= {file.relative_to(side).as_posix() for file in files}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    differences = []
    for path in sorted(found):
        if any(fnmatch(Path(path).name, pattern) for pattern in FILES_LEFT_OUT):
            continue
        here, there, kind = old / path, new / path, kind_of(path)
        if here.exists() and there.exists():
            told = difference(here, there)
        else:
            told = f"only in {'OLD' if here.exists() else 'NEW'}"
        counts[kind] += 1
        sizes[kind] += (here if here.exists() else there).stat().st_size
        if told:
            bad[kind] += 1
            differences.append(f"{path}: {told}")
    for kind, count in counts.items():
        outcome = f"{bad[kind]} DIFFER" if bad[kind] else "the same"
        print(f"  {kind:32} {count:4} files  {sizes[kind] / 1e6:6.2f} MB   {outcome}")
    if not counts:
        differences.append(f"{old} and {new}: there is nothing to compare")
    return differences


def made(side: Side, what: str, make: Callable[[], object], *, reuse: bool = False) -> None:
    """Make a folder of a side, `runs` or `uses`; or take it, if the same recipe and commands made it."""
    mark, recipe = side.folder / f"{what}.made_by", miniature.in_short()
    if reuse and mark.exists():
        if mark.read_text(encoding="utf-8") != recipe:
            raise Failed(f"{side.folder} was made with another recipe; run once without --reuse-old")
        print(f"{what} of {side.code}: as they are in {side.folder}")
        return
    side.check()
    shutil.rmtree(side.folder / what, ignore_errors=True)
    mark.unlink(missing_ok=True)
    started = time.monotonic()
    make()
    mark.write_text(recipe, encoding="utf-8")
    print(f"{what} of {side.code}: {time.monotonic() - started:.0f} s", flush=True)


def read_old_run(old: Side, code: Path) -> list[str]:
    """A copy of OLD's run in NEW's hands: stages are skipped, nothing changes, uses give the same."""
    side = Side(code, old.folder.parent / "read")
    shutil.rmtree(side.folder, ignore_errors=True)
    shutil.copytree(old.folder / "runs", side.folder / "runs")
    side.check()
    skipped = side.walk_the_road().count("skipped")
    made(side, "uses", lambda: side.use(READ))
    print("OLD's run, read by NEW:")
    print(f"  {'finished stages skipped':32} {skipped:4} of {miniature.STAGES}")
    used = sorted(f"uses/{file.name}" for file in (side.folder / "uses").iterdir())
    differences = compare(old.folder, side.folder, ("runs", *used))
    if skipped != miniature.STAGES:
        logs = side.folder / "logs"
        differences.append(f"of {miniature.STAGES} finished stages {skipped} were skipped; see {logs}")
    return differences


def run(options: argparse.Namespace, work: Path) -> list[str]:
    """Run what is asked for, and return what differs."""
    old, new = Side(options.old.resolve(), work / "old"), Side(options.new.resolve(), work / "new")
    reuse = options.reuse_old
    if not reuse:
        shutil.rmtree(work / "inputs", ignore_errors=True)
    miniature.write_inputs(work / "inputs")
    if both := {*RENAMED} & {*RENAMED.values()}:
        raise Failed(f"RENAMED: {', '.join(both)} on both sides")
    differences = []
    made(old, "runs", old.walk_the_road, reuse=reuse)
    if {"uses", "read"} & set(options.only):
        made(old, "uses", old.use, reuse=reuse)
    if {"road", "uses"} & set(options.only):
        made(new, "runs", new.walk_the_road)
        if "road" in options.only:
            print("The road, OLD and NEW:")
            differences += compare(old.folder, new.folder, ("runs",))
    if "uses" in options.only:
        made(new, "uses", new.use)
        print("Exports, an import, commands and a server, OLD and NEW:")
        differences += compare(old.folder, new.folder, ("uses",))
    if "read" in options.only:
        differences += read_old_run(old, new.code)
    return differences


def main() -> int:
    """Run, compare, and say so; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", type=Path, help="checkout of the code that is known to be right")
    parser.add_argument("new", type=Path, help="checkout of the code that must compute the same")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep a temporary folder, and say where it is")
    parser.add_argument(
        "--reuse-old", action="store_true", help="take OLD's results that are in --work already"
    )
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=PARTS, help="parts: %(choices)s (default: all)"
    )
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="same_results-"))).resolve()
    try:
        differences = run(options, work)
    except Failed as error:
        print(f"same_results: {error}", file=sys.stderr)
        return 1
    finally:
        if options.keep or options.work:
            print(f"Everything is in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    for line in differences:
        print(f"DIFFERENT  {line}")
    print(f"{len(differences)} differences" if differences else "Nothing differs.")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
