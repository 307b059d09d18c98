"""`chatwright plan` of fine-tunes: a stage by itself, and recipes that start from a given model."""

from __future__ import annotations

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
