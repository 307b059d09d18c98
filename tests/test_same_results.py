"""scripts/same_results.py finds what differs, says where, and passes over times alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import same_results
import torch
from safetensors.torch import save_file

STAGE = "runs/mini/ppo"
WEIGHTS = f"{STAGE}/checkpoints/step-000001/model.safetensors"


@pytest.fixture
def same() -> Any:
    """The script as a module."""
    return same_results


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal folders, as two codes would leave them."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / WEIGHTS).parent.mkdir(parents=True)
    save_file({"head": torch.zeros(2, 3), "body": torch.ones(4)}, old / WEIGHTS)
    rows = [{"step": 1, "score": 0.5, "elapsed": 1.0}, {"step": 2, "score": 0.75, "elapsed": 2.0}]
    write(old / STAGE / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    measure = {"name": "score", "before": 0.1, "after": 0.2, "note": "as it was"}
    write_json(old / STAGE / "result.json", {"measures": [measure], "facts": {"rounds": 2}, "seconds": 3.0})
    write_json(old / STAGE / "pairs.json", [{"prompt": "Hi", "before": "Yes.", "after": "No."}])
    write(old / "uses" / "model.gguf", "GGUF and more")
    write(old / "uses" / "chat.txt", "The cat is old.\n")
    shutil.copytree(old, new)
    return old, new


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    write(file, json.dumps(value))


def replace(file: Path, before: str, after: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")


def differences(same: Any, sides: tuple[Path, Path]) -> list[str]:
    return list(same.compare(*sides, ("runs", "uses")))


def test_equal_sides_do_not_differ(
    same: Any, sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert differences(same, sides) == []
    told = capsys.readouterr().out
    for kind in ("weights", "metrics", "results of stages", "answers before and after", "exported"):
        assert any(line.split("  ")[1].startswith(kind) and "the same" in line for line in told.splitlines())


def test_two_empty_sides_are_no_proof(same: Any, tmp_path: Path) -> None:
    assert "nothing to compare" in differences(same, (tmp_path / "a", tmp_path / "b"))[0]


@pytest.mark.parametrize("value", [1e-45, -0.0, float("nan")])
def test_one_changed_weight_is_found(same: Any, sides: tuple[Path, Path], value: float) -> None:
    head = torch.zeros(2, 3)
    head[1, 1] = value
    save_file({"head": head, "body": torch.ones(4)}, sides[1] / WEIGHTS)
    (found,) = differences(same, sides)
    assert found.startswith(f"{WEIGHTS}: head[4]: 0.0 -> ")


def test_another_type_shape_or_name_of_a_weight_is_found(same: Any, sides: tuple[Path, Path]) -> None:
    for head, told in (
        ({"head": torch.zeros(3, 2)}, "head: torch.float32 (2, 3) -> torch.float32 (3, 2)"),
        ({"head": torch.zeros(2, 3).bfloat16()}, "head: torch.float32 (2, 3) -> torch.bfloat16 (2, 3)"),
        ({}, "head: only in OLD"),
        ({"head": torch.zeros(2, 3), "tail": torch.zeros(1)}, "tail: only in NEW"),
    ):
        save_file({**head, "body": torch.ones(4)}, sides[1] / WEIGHTS)
        assert differences(same, sides) == [f"{WEIGHTS}: {told}"]


def test_metadata_of_weights_count_and_their_order_does_not(same: Any, sides: tuple[Path, Path]) -> None:
    """The library writes several metadata in an order that it draws by chance."""
    weights = {"head": torch.zeros(2, 3), "body": torch.ones(4)}
    for side in sides:
        save_file(weights, side / WEIGHTS, {"a": "1", "b": "2"})
    ordered, turned = b'{"a":"1","b":"2"}', b'{"b":"2","a":"1"}'
    content = (sides[1] / WEIGHTS).read_bytes()
    assert (ordered in content) != (turned in content)
    for side, order in zip(sides, (ordered, turned), strict=True):
        (side / WEIGHTS).write_bytes(content.replace(ordered, order).replace(turned, order))
    assert (sides[0] / WEIGHTS).read_bytes() != (sides[1] / WEIGHTS).read_bytes()
    assert differences(same, sides) == []
    save_file(weights, sides[1] / WEIGHTS, {"a": "1", "b": "3"})
    assert differences(same, sides) == [f"{WEIGHTS}: __metadata__.b: '2' -> '3'"]


@pytest.mark.parametrize(
    ("file", "before", "after", "told"),
    [
        ("metrics.jsonl", "0.75", "0.7500001", "row 2, score: 0.75 -> 0.7500001"),
        ("metrics.jsonl", '"score": 0.5', '"reward": 0.5', "row 1, score: only in OLD"),
        ("result.json", '"after": 0.2', '"after": 0.3', "measures.0.after: 0.2 -> 0.3"),
        ("result.json", '"rounds": 2', '"rounds": 2.0', "facts.iterations: 2 -> 2.0"),
        ("pairs.json", "No.", "No!", "0.after: 'No.' -> 'No!'"),
    ],
)
def test_a_changed_entry_is_found(
    same: Any, sides: tuple[Path, Path], file: str, before: str, after: str, told: str
) -> None:
    replace(sides[1] / STAGE / file, before, after)
    assert differences(same, sides) == [f"{STAGE}/{file}: {told}"]


def test_a_changed_byte_of_an_exported_file_or_an_answer_is_found(
    same: Any, sides: tuple[Path, Path]
) -> None:
    replace(sides[1] / "uses" / "model.gguf", "and", "end")
    replace(sides[1] / "uses" / "chat.txt", "old", "new")
    found = differences(same, sides)
    assert [line.partition(": b'")[0] for line in found] == [
        "uses/chat.txt: byte 11 of 16",
        "uses/model.gguf: byte 5 of 13",
    ]


def test_missing_and_added_files_are_found(same: Any, sides: tuple[Path, Path]) -> None:
    (sides[1] / STAGE / "pairs.json").unlink()
    write(sides[1] / STAGE / "more.txt", "more")
    assert differences(same, sides) == [f"{STAGE}/more.txt: only in NEW", f"{STAGE}/pairs.json: only in OLD"]


def test_times_and_prose_may_differ(same: Any, sides: tuple[Path, Path]) -> None:
    replace(sides[1] / STAGE / "metrics.jsonl", '"elapsed": 2.0', '"elapsed": 9.0')
    replace(sides[1] / STAGE / "result.json", '"seconds": 3.0', '"seconds": 4.0')
    replace(sides[1] / STAGE / "result.json", "as it was", "in other words")
    write(sides[1] / STAGE / "report.md", "# ppo")
    assert differences(same, sides) == []


def test_a_rename_counts_as_the_same_when_it_is_recorded(
    same: Any, sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(sides[1] / STAGE / "result.json", '"rounds"', '"iterations"')
    replace(sides[1] / STAGE / "result.json", '"name": "score"', '"name": "mean score"')
    assert len(differences(same, sides)) == 1
    monkeypatch.setattr(same, "RENAMED", {"rounds": "iterations", "score": "mean score"})
    assert differences(same, sides) == []
    replace(sides[1] / STAGE / "result.json", '"iterations": 2', '"iterations": 3')
    assert differences(same, sides) == [f"{STAGE}/result.json: facts.iterations: 2 -> 3"]
