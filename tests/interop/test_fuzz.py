"""A short campaign against the readers of model files, and whether the campaign would notice a fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from support.launching import child_environment


def fuzz(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz", *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2_000:]
    return done.stdout


def test_a_short_campaign() -> None:
    """Files of every kind; another few hundred than the seed of docs/lab/faults.md makes."""
    kinds = ("gguf", "safetensors", "tokenizer", "config", "index")
    out = fuzz("--count", "1000", "--seed", "1", *(word for kind in kinds for word in ("--kind", kind)))
    out += fuzz("--count", "100", "--seed", "1", "--kind", "template").replace("all  ", "both ")
    figures = {
        kind: [int(n) for n in numbers]
        for kind, *numbers in re.findall(r"(\w+) +(\d+) cases: (\d+) acc\w+, (\d+) ref", out)
    }
    assert set(figures) == {*kinds, "template", "all", "both"}
    for cases, accepted, refused in figures.values():
        assert cases == accepted + refused >= 100
        assert accepted > cases / 50  # damage that leaves a file whole goes on into the model
        assert refused > cases / 5


FAULTS = {
    "raise KeyError(7)": "KeyError: 7",
    "raise UserError('')": "not one printable line",
    "raise UserError(Path('a'))": "",
    "os.abort()": "signal 6",
    "os._exit(3)": "exit code 3",
    "[None for _ in iter(int, 1)]": "more than 1 seconds",
    "bytearray(8 << 30)": "MemoryError",
    "hidden()": "memory: too large",
    "None": "",
}


def test_faults_are_noticed() -> None:
    """Cases that go wrong in every way, among others that do not: each is judged alone."""
    program = f"""
import json, os
from support import fuzz
from pathlib import Path
from chatwright.config import UserError
def hidden():
    try: bytearray(8 << 30)
    except MemoryError: raise UserError('too large') from None
fuzz.SECONDS = 1.0
faults = {list(FAULTS)!r}
result = fuzz.run_all(list(range(len(faults))), lambda number: fuzz.judge(lambda: exec(faults[number])))
print(json.dumps([result.verdicts, result.failures]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True
    )
    verdicts, failures = json.loads(done.stdout)
    assert verdicts == {"accepted": 1, "refused": 1, "FAILED": len(FAULTS) - 2}
    expected = [(number, why) for number, why in enumerate(FAULTS.values()) if why]
    assert [number for number, _ in failures] == [number for number, _ in expected]
    for (_, found), (_, why) in zip(failures, expected, strict=True):
        assert found.startswith(why)


def test_cases_repeat(tmp_path: Path) -> None:
    """The same number makes the same file again; another one, another."""
    program = """
import sys
from support import specimens
from pathlib import Path
from random import Random
place = Path(sys.argv[1])
models = specimens.Specimens(place)
found = []
for kind in specimens.KINDS:
    for number in (3, 3, 4):
        specimens.empty(place / "work")
        path = models.damaged(kind, Random(f"0/{kind}/{number}"), place / "work")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found.append(hash(tuple(file.read_bytes() for file in files)))
    assert found[-3] == found[-2] != found[-1], kind
print("all")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=child_environment(), capture_output=True, text=True
    )
    assert done.stdout == "all\n", done.stderr
