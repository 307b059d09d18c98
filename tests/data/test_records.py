"""Records straight from a file of the user's: the records, and sides, that the data stage gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chatwright import cli
from chatwright.config import UserError
from chatwright.data.examples import Comparison, Dialogue, Document, LabelledText
from chatwright.data.records import has_records, is_record_file, read_records, records_of
from chatwright.files import read_json
from chatwright.stages import data
from chatwright.train.preference.rankings import own_comparisons
from chatwright.train.workspace import Workspace

KINDS = {"dialogues": Dialogue, "comparisons": Comparison, "ratings": LabelledText}


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    """A file of each kind, in formats of others."""
    talks = [
        {"conversations": [{"from": "human", "value": f"Say {n}"}, {"from": "gpt", "value": f"{n}!"}]}
        for n in range(300)
    ]
    pairs = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(300)]
    rated = [{"text": f"text {n}", "label": n % 5} for n in range(300)]
    return {
        "dialogues": write(tmp_path / "talks.jsonl", talks),
        "comparisons": write(tmp_path / "pairs.jsonl", pairs),
        "ratings": write(tmp_path / "rated.jsonl", rated),
    }


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_file_gives_what_the_data_stage_makes_of_it(
    own: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    settings = {"text": "", "dialogues": "", "ratings": "", kind: str(own[kind])}
    report = data.run(data.Config(**settings), Workspace(tmp_path / "data"))
    assert report.measures == [] and report.facts[f"{_named(kind)} train"] > 200
    for side in ("train", "validation"):
        name = f"{kind}-{side}.jsonl"
        stage = list(read_records(records_of(tmp_path / "data") / name, KINDS[kind]))
        file = list(read_records(records_of(own[kind]) / name, KINDS[kind]))
        assert file == stage != []
        assert has_records(own[kind] / name)


def _named(kind: str) -> str:
    return "rated texts" if kind == "ratings" else kind


def test_a_data_stage_needs_one_kind_of_records(tmp_path: Path) -> None:
    nothing = data.Config(text="", dialogues="", ratings="")
    with pytest.raises(UserError, match="are all empty: name a source"):
        data.run(nothing, Workspace(tmp_path / "data"))


def test_too_small_a_file_says_which_share_to_choose(own: dict[str, Path], tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match=r"of its 1 dialogues none is held out .*--validation 0\.2"):
        list(read_records(few / "dialogues-validation.jsonl", Dialogue))
    with pytest.raises(UserError, match="documents come from the data stage"):
        list(read_records(few / "train.jsonl", Document))


def test_a_stage_without_its_records_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="where its setting `comparisons` names a source"):
        own_comparisons(tmp_path)
    with pytest.raises(UserError, match="where its setting `text` names a source"):
        list(read_records(tmp_path / "train.jsonl", Document))


def test_only_files_of_records_are_taken_for_such(own: dict[str, Path], tmp_path: Path) -> None:
    assert is_record_file(str(own["dialogues"]))
    assert not is_record_file(str(tmp_path)) and not is_record_file("gone.jsonl")
    assert not is_record_file(str(tmp_path / "model.gguf"))


def test_sft_learns_from_a_file_alone(
    own: dict[str, Path], chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["sft", "--base", str(chat_dir), "--data", "talks.jsonl", "--fit.steps", "2"]
    assert cli.main([*argv, "--fit.batch_size", "2"]) == 0
    result = read_json(tmp_path / "runs/my/sft/result.json")
    assert result["facts"]["steps"] == 2 and len(result["data"]) == 16
    assert "no answers before and after" not in (tmp_path / "runs/my/sft/report.md").read_text()


def test_conversations_alone_are_enough_for_data_and_then_sft(
    own: dict[str, Path], chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["data", "--text", "", "--ratings", "", "--dialogues", "talks.jsonl"]
    assert cli.main(argv) == 0
    argv = ["sft", "--base", str(chat_dir), "--data", "data", "--fit.steps", "1", "--fit.batch_size", "2"]
    assert cli.main(argv) == 0
    assert (tmp_path / "runs/my/sft/report.md").is_file()


def test_reward_learns_from_a_file_of_comparisons_alone(
    own: dict[str, Path], chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["reward", "--base", str(chat_dir), "--comparisons", "pairs.jsonl", "--data", "talks.jsonl"]
    assert cli.main([*argv, "--fit.steps", "2", "--fit.batch_size", "2", "--max_tokens", "32"]) == 0
    facts = read_json(tmp_path / "runs/my/reward/result.json")["facts"]
    assert facts["comparisons"] > 200 and facts["scores 0 on average"] == "256 demonstrations"
