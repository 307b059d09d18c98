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
from chatwright.data.records import (
    FEWEST_HELD_OUT,
    HELD_OUT,
    MOST_SHARE,
    READERS,
    VERDICT,
    has_records,
    is_record_file,
    read_records,
    records_of,
    share_of,
)
from chatwright.data.splitting import position_of, split_of
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
    share = VERDICT if kind == "comparisons" else data.Config.validation
    report = data.run(data.Config(validation=share, **settings), Workspace(tmp_path / "data"))
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


def test_of_one_record_nothing_is_held_out(own: dict[str, Path], tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [{"instruction": "a", "output": "b"}])
    for side in ("train", "validation"):
        with pytest.raises(UserError, match="it holds one conversation only; one must be held out"):
            list(read_records(few / f"dialogues-{side}.jsonl", Dialogue))
    write(few, [{"instruction": "a", "output": "b"}] * 3)
    with pytest.raises(UserError, match="its 3 conversations are one and the same"):
        list(read_records(few / "dialogues-train.jsonl", Dialogue))
    write(few, [{"prompt": "p", "chosen": f"{n}", "rejected": "b"} for n in range(3)])
    with pytest.raises(UserError, match="its 3 comparisons have one prompt between them"):
        list(read_records(few / "comparisons-train.jsonl", Comparison))
    write(few, [{"prompt": f"p{n}", "chosen": "b", "rejected": "b"} for n in range(3)])
    with pytest.raises(UserError, match="the answers of each comparison in it are the same text"):
        list(read_records(few / "comparisons-train.jsonl", Comparison))


@pytest.mark.parametrize("kind", list(KINDS))
def test_of_a_small_file_the_record_with_the_smallest_hash_is_held_out(
    own: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """The same one whatever the order, the one that a larger share would hold out first; and the data stage
    agrees."""
    rows = [json.loads(line) for line in own[kind].read_text().splitlines()]
    made = READERS[kind]([str(own[kind])])
    share = MOST_SHARE if kind == "comparisons" else HELD_OUT[kind]
    few = [row for row, one in zip(rows, made, strict=True) if split_of(one.id, share) == "train"][:8]
    held = set()
    for number, listed in enumerate((few, few[::-1])):
        file = write(tmp_path / f"few{number}.jsonl", listed)
        sides = {
            side: list(read_records(file / f"{kind}-{side}.jsonl", KINDS[kind]))
            for side in ("train", "validation")
        }
        assert [len(sides[side]) for side in ("train", "validation")] == [len(few) - 1, 1]
        everything = [one for found in sides.values() for one in found]
        assert min(everything, key=lambda one: position_of(one.id)) == sides["validation"][0]
        held.add(sides["validation"][0].id)
        settings = {"text": "", "dialogues": "", "ratings": "", kind: str(file)}
        data.run(data.Config(validation=share, **settings), Workspace(tmp_path / f"data{number}"))
        records = records_of(tmp_path / f"data{number}")
        for side, found in sides.items():
            assert list(read_records(records / f"{kind}-{side}.jsonl", KINDS[kind])) == found
    assert len(held) == 1


@pytest.mark.parametrize(("prompts", "share"), [(300, 0.1), (100, 0.1), (40, 0.25), (20, 0.5), (6, 0.5)])
def test_of_a_file_of_comparisons_enough_is_held_out_for_a_verdict(
    prompts: int, share: float, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f"a{m}", "rejected": "b"} for n in range(prompts) for m in range(2)]
    file = write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "tie", "chosen": "b", "rejected": "b"}])
    assert share_of(str(file), "comparisons") == share
    train, held_out = own_comparisons(file)
    assert len(train) + len(held_out) == 2 * prompts
    assert not {one.id for one in train} & {one.id for one in held_out}
    if prompts >= 40:
        assert len({one.id for one in held_out}) >= FEWEST_HELD_OUT / 2
    assert share_of(str(file), "dialogues") == HELD_OUT["dialogues"]


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


def test_what_is_held_out_of_a_small_file_has_an_answer(own: dict[str, Path], tmp_path: Path) -> None:
    """Whatever the hashes of the conversations without one; where all have none, one of these is taken."""
    talks = [json.loads(line) for line in own["dialogues"].read_text().splitlines()]
    bare = [{"prompt": f"p{n}"} for n in range(300)]
    records = {side: [] for side in ("train", "validation")}
    for row, one in zip(bare, READERS["dialogues"]([str(write(tmp_path / "b.jsonl", bare))]), strict=True):
        records[split_of(one.id)].append(row)
    for mixed in ([*talks[:6], *records["train"][:5]], [*talks[:6], *records["validation"][:2]]):
        file = write(tmp_path / "mixed.jsonl", mixed)
        for side in ("train", "validation"):
            found = list(read_records(file / f"dialogues-{side}.jsonl", Dialogue))
            assert any(one.messages[-1]["role"] == "assistant" for one in found)
    file = write(tmp_path / "prompts.jsonl", records["train"][:5])
    assert len(list(read_records(file / "dialogues-validation.jsonl", Dialogue))) == 1


# ---- what a stage may be given directly --------------------------------------------------------------------


def test_a_stage_takes_a_csv_file_with_columns_of_other_names(
    chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f'"Frage {n}?","Antwort {n}, ja"' for n in range(12)]
    Path("faq.csv").write_text("\n".join(["Frage,Antwort", *lines, lines[0]]) + "\n")
    spec = "faq.csv#prompt=Frage,completion=Antwort"
    argv = ["sft", "--base", str(chat_dir), "--data", spec, "--fit.steps", "1", "--fit.batch_size", "2"]
    assert cli.main(argv) == 0
    assert "faq.csv#prompt=Frage,completion=Antwort: 1 that repeat another word" in capsys.readouterr().out
    result = read_json(tmp_path / "runs/my/sft/result.json")
    assert len(result["data"]) == 16
    assert "Frage" in (tmp_path / "runs/my/sft/report.md").read_text()


def test_reward_takes_csv_files_for_comparisons_and_for_demonstrations(
    chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text("q,good,bad\n" + "".join(f"q{n},yes {n},no\n" for n in range(300)))
    Path("faq.csv").write_text("q,a\n" + "".join(f"q{n},a{n}\n" for n in range(12)))
    argv = ["reward", "--base", str(chat_dir), "--comparisons", "pairs.csv#prompt=q,chosen=good,rejected=bad"]
    argv += ["--data", "faq.csv#prompt=q,completion=a", "--fit.steps", "1", "--fit.batch_size", "2"]
    assert cli.main(argv) == 0
    facts = read_json(tmp_path / "runs/my/reward/result.json")["facts"]
    assert facts["comparisons"] > 250 and facts["scores 0 on average"] == "11 demonstrations"


def test_the_tokenizer_takes_a_text_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("faq.txt").write_text("".join(f"Question {n}? The answer is {n}.\n" for n in range(200)))
    assert cli.main(["tokenizer", "--data", "faq.txt", "--vocab_size", "300"]) == 0
    facts = read_json(tmp_path / "runs/my/tokenizer/result.json")["facts"]
    assert 0 < facts["validation_tokens"] < facts["train_tokens"] / 4


def test_a_file_of_another_kind_says_which_setting_reads_it(
    own: dict[str, Path], chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for verb, option, kind, said in (
        (
            "sft",
            "--data",
            "comparisons",
            "these look like preference pairs (columns prompt, chosen, rejected), "
            "which the setting `comparisons` reads",
        ),
        ("sft", "--data", "ratings", "reads; wanted here is a file of conversations. Where a stage needs"),
        ("reward", "--comparisons", "dialogues", "which the setting `dialogues` reads"),
        ("tokenizer", "--data", "ratings", ""),
        ("tokenizer", "--data", "comparisons", "which the setting `comparisons` reads"),
    ):
        argv = [verb, option, str(own[kind]), "--out", out]
        code = cli.main(argv if verb == "tokenizer" else [*argv, "--base", str(chat_dir)])
        err = capsys.readouterr().err
        assert (code == 1 and said in err and ":1: no column" in err) if said else code == 0, (
            verb,
            kind,
            err,
        )
