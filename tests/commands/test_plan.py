"""`chatwright plan` of fine-tunes: a stage by itself, and recipes that start from a given model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.small_stages import Run, command_line, one_line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return command_line(capsys)


def row(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if f" {name} " in line)


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo"])
def test_a_stage_is_planned_by_its_own_options(verb: str, run: Run, chat_dir: Path) -> None:
    code, out, err = run("plan", verb, "--base", chat_dir, "--lora.rank", "2", "--time", "false")
    assert (code, err) == (0, "") and verb in out
    with_adapter = row(out, "parameters")
    code, out, _ = run("plan", verb, "--base", chat_dir, "--time", "false")
    assert code == 0 and row(out, "parameters") != with_adapter  # fewer are trained


def test_a_recipe_that_starts_from_a_model_is_planned(run: Run, chat_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"stages:\n  sft: {{base: {chat_dir}, data: .}}\n  ppo: {{base: sft, reward: sft, data: .}}\n"
    )
    code, out, err = run("plan", "mine.yaml", "--time", "false", "--sft.lora.rank", "2")
    assert (code, err) == (0, "") and "sft" in out and "ppo" in out


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_lengths_come_from_the_data_where_they_are_there(run: Run, chat_dir: Path, tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "b" * 140}  # 40 tokens and 6 around them
    talks = write(
        tmp_path / "t.jsonl", *([{"messages": [{"role": "user", "content": f"{n}"}, said]} for n in range(9)])
    )
    pairs = write(
        tmp_path / "p.jsonl", *({"prompt": f"{n}", "chosen": "a" * 35, "rejected": "b"} for n in range(9))
    )
    code, out, _ = run("plan", "sft", "--base", chat_dir, "--data", talks, "--time", "false")
    assert (
        code == 0
        and f"sft: rows of 64 tokens, estimated from 9 records of {talks} (3.5 bytes a token)" in out
    )
    assert "64 tokens" in row(out, "batch")
    code, out, _ = run("plan", "reward", "--base", chat_dir, "--comparisons", pairs, "--time", "false")
    assert code == 0 and f"reward: rows of 64 tokens, estimated from 18 records of {pairs}" in out
    code, out, _ = run("plan", "sft", "--base", chat_dir, "--time", "false")
    assert code == 0 and "tokens are assumed, for their length comes from data that no setting names" in out
    assert "--context sets it" in out
    code, out, _ = run("plan", "sft", "--base", chat_dir, "--context", "32", "--time", "false")
    assert code == 0 and "tokens, estimated" not in out and "assumed" not in out
    (tmp_path / "mine.yaml").write_text(
        f"stages:\n  data: {{dialogues: ''}}\n  sft: {{base: {chat_dir}}}\n"
        "  ppo: {base: sft, reward: sft}\n"
    )
    code, out, _ = run("plan", "mine.yaml", "--time", "false", "--data.dialogues", talks)
    assert code == 0 and f"sft: rows of 64 tokens, estimated from 9 records of {talks}" in out
    assert "ppo: rows of 128 tokens, estimated" in out  # 64 for the prompt, 64 for the completion
    assert run("plan", "sft", "--base", chat_dir, "--data", write(talks, 3), "--time", "false")[0] == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("sft",),
            "sft starts from 'pretrain', which is no model that is there yet; name one",
        ),
        (("sft",), "for example --base smollm2"),
        (("sft", "--base", "owner/name"), "did you mean hf:owner/name?"),
        (("data",), "the stage data trains nothing that could be planned"),
        (("sft", "--rank", "2"), "did you mean --lora.rank?"),
    ],
)
def test_what_cannot_be_planned(run: Run, argv: tuple[str, ...], said: str) -> None:
    code, _, err = run("plan", *argv, "--time", "false")
    assert code in (1, 2) and said in one_line(err)
