"""`chatwright compare` of models: the same prompts, each model's own settings, lengths, and who wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import cli
from chatwright.commands import import_
from chatwright.evaluate import model_comparison
from chatwright.evaluate.model_comparison import ModelAnswers, ModelComparison, TextReward, read_prompts
from chatwright.generation_config import GenerationConfig
from chatwright.language_model import load_parts

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`chatwright compare`: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    return call


@pytest.fixture
def other(sft_bench: Any, tmp_path: Path) -> Path:
    """A model directory with sampling settings of its own: the miniature's weights, a little moved."""
    parts = load_parts(sft_bench.inputs["sft"])
    with torch.no_grad():
        parts.model.head.weight.add_(0.02 * torch.randn(parts.model.head.weight.shape))
    own = replace(parts, generation=GenerationConfig(temperature=0.25, top_k=5))
    import_.write_model(own, tmp_path / "other", source="x")
    return tmp_path / "other"


def test_a_model_beside_a_stage(run: Call, sft_bench: Any, other: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("How is the cat number 5?\n\nHow is the river number 3?\n")
    sft = sft_bench.inputs["sft"]
    code, out, err = run(other, sft, "--prompts", "ask.txt", "--max_new_tokens", 12, "--out", "page.md")
    assert (code, err) == (0, "")
    assert f"A = {other}, sampled at temperature 0.25, top-k 5 (from generation_config.json), at most" in out
    assert f"B = {sft}, sampled at temperature 0.7 (from generation_config.json)" in out
    page = (tmp_path / "page.md").read_text()  # the terminal may break a cell of a table anywhere
    for word in ("How is the cat number 5?", "words per answer", "share that ends", "distinct-2", "B - A"):
        assert word in page
    assert "nothing was shown, 2 prompts are too few" in page and "win rate" not in page
    assert "distinct-2" in out
    assert "# Models side by side" in page and "How is the river number 3?" in page


def test_json_is_nothing_but_json(capsys: pytest.CaptureFixture[str], sft_bench: Any, other: Path) -> None:
    sft = sft_bench.inputs["sft"]
    arguments = ["compare", str(other), str(sft), "--json", "true", "--count", "3", "--max_new_tokens", "8"]
    assert cli.main([*arguments, "--temperature", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["sampling"] for one in found["models"]] == [
        "temperature 0, top-k 5 (as given; from generation_config.json)",
        "temperature 0 (as given)",
    ]
    assert [one["prompt"] for one in found["answers"]] == list(model_comparison.PROMPTS[:3])
    assert cli.main([*arguments, "--temperature", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.learns
def test_a_reward_model_says_who_wins(
    run: Call, reward_bench: Any, other: Path, tmp_path: Path, learnt: Any
) -> None:
    """With --reward two stages are asked too. The reward model reads texts: good words score higher."""
    reward, sft = reward_bench.inputs["reward"], reward_bench.inputs["sft"]
    code, out, err = run(sft, sft, "--reward", reward, "--count", 8, "--max_new_tokens", 8)
    assert (code, err) == (0, "")
    assert "reward model's score" in out and "win rate by the reward model" in out
    assert "0.500 nothing was shown: 95 % interval 0.50 to 0.50 against 0.5" in out.replace("│ ", "")
    judge = TextReward.load(reward)
    asked = [({"role": "user", "content": "How is the cat number 5?"},)] * 2
    good, bad = judge.scores(asked, ["The cat is happy and kind.", "The cat is awful and cruel."])  # type: ignore[arg-type]
    learnt("good words over bad ones", good - bad, above=0.2)


def test_who_wins_by_hand() -> None:
    prompts = [({"role": "user", "content": f"{n}?"},) for n in range(10)]
    one = ModelAnswers("a", "", ["x y"] * 10, [True] * 10, [0.0] * 10)
    two = ModelAnswers("b", "", ["x y z z"] * 10, [True] * 5 + [False] * 5, [1.0] * 9 + [0.0])
    found = ModelComparison(prompts, [one, two], most=8)  # type: ignore[arg-type]
    found.measure()
    rows = {row["measure"]: row for row in found.rows}
    assert rows["words per answer"]["values"] == [2.0, 4.0]
    assert rows["share that ends"]["values"] == [1.0, 0.5]
    assert rows["win rate by the reward model"]["values"] == [None, 0.95]
    assert rows["win rate by the reward model"]["differences"][0].startswith("shown: 95 % interval 0.8")
    assert rows["reward model's score"]["differences"][0].startswith("+0.900")


def test_conversations_are_asked_up_to_their_last_question(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye?"), ("assistant", "Bye")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    (asked,) = read_prompts(str(tmp_path / "mine.jsonl"), 5)
    assert [message["content"] for message in asked] == ["Hi", "Hello", "Bye?"]
    assert len(read_prompts("", 4)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OTHER", "no/such/model"], "no model 'no/such/model': it is no directory"),
        (["OTHER", "OTHER", "--prompts", "none.txt"], "--prompts none.txt: there is no such file"),
        (["OTHER", "OTHER", "--prompts", "empty.txt"], "--prompts empty.txt: there is no prompt in it"),
        (
            ["OTHER", "OTHER", "--reward", "OTHER"],
            "holds no reward model; name a stage such as runs/my/reward",
        ),
        (["OTHER", "OTHER", "--reward", "none"], "--reward none holds no reward model"),
        (["OTHER", "OTHER"], "other, prompt 7 (Write a short thank-you note to a neighb): "),
        (["OTHER"], "compare takes two to 8 runs, stages or models"),
        (["OTHER", "OTHER", "--count", "0"], "--count 0 must be at least 1"),
        (["OTHER", "PRETRAIN", "--count", "2"], "has no chat template: it is a base model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, run: Call, other: Path, tmp_path: Path, sft_bench: Any
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    places = {"OTHER": str(other), "PRETRAIN": str(sft_bench.inputs["pretrain"])}
    code, _, err = run(*(places.get(one, one) for one in arguments))
    assert code in (1, 2) and message in " ".join(err.split()) and "Traceback" not in err
