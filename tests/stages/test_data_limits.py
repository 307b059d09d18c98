"""What a person sees of limits: nothing is cut in silence, and limits that are 0 come from the data.

Every stage runs through the command line, on an untrained model with a context of 128 tokens, most of which
are bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatwright.cli import main
from chatwright.data.examples import Comparison, Dialogue, Document, LabelledText
from chatwright.files import read_json
from chatwright.tokenizer import Tokenizer
from chatwright.train.rl import training

Talk = Sequence[tuple[str, str]]
FIT = ["--fit.seconds", "0", "--fit.steps", "2", "--fit.batch_size", "2", "--fit.compile", "false"]
ONE = ["--iterations", "1", "--batch_size", "4", "--minibatch_size", "2", "--min_correlation", "-1"]
SAME = "the same beginning of every answer, "


def write_talks(directory: Path, train: Sequence[Talk], held_out: Sequence[Talk] = ()) -> Path:
    for side, talks in (("train", train), ("validation", held_out or train[:2])):
        made = [Dialogue.of([{"role": role, "content": content} for role, content in talk]) for talk in talks]
        text = "".join(one.to_json() + "\n" for one in made)
        directory.mkdir(exist_ok=True)
        (directory / f"dialogues-{side}.jsonl").write_text(text)
    return directory


def write_comparisons(directory: Path, train: Sequence[Comparison]) -> Path:
    directory.mkdir(exist_ok=True)
    for side in ("train", "validation"):
        (directory / f"comparisons-{side}.jsonl").write_text("".join(one.to_json() + "\n" for one in train))
    return directory


def compared(number: int, *answers: str) -> Comparison:
    asked = [{"role": "user", "content": f"say {number}"}]
    return Comparison.of(asked, answers, [float(-n) for n in range(len(answers))])


def short(number: int) -> Talk:
    return [("user", f"say {number}"), ("assistant", f"it is {number}.")]


@pytest.fixture
def stage(chat_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a stage into tmp_path / NAME; returns exit code, standard output and error."""

    def run(verb: str, *options: object, name: str = "") -> tuple[int, str, str]:
        base = "--policy" if verb in ("best_of_n", "evaluate") else "--base"
        code = main([verb, base, str(chat_dir), "--out", str(tmp_path / (name or verb)), *map(str, options)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def facts(directory: Path) -> dict[str, Any]:
    return dict(read_json(directory / "result.json")["facts"])


# ---- SFT ---------------------------------------------------------------------------------------------------


def test_rows_are_as_long_as_the_conversations(stage: Any, tmp_path: Path) -> None:
    data = write_talks(tmp_path / "data", [short(n) for n in range(20)])
    code, out, _ = stage("sft", "--data", data, *FIT)
    assert code == 0 and "rows of 64 tokens" in out
    assert "nothing was cut: 20 conversations, the longest of " in out and "(context 64)" in out
    assert facts(tmp_path / "sft")["context"] == 64
    code, out, _ = stage("sft", "--data", data, "--context", "96", *FIT, name="explicit")
    assert code == 0 and "rows of 96 tokens" in out


def test_what_sft_cuts_stands_on_the_console_and_in_the_report(stage: Any, tmp_path: Path) -> None:
    huge = [*short(1), *short(2)] * 9
    never_ends = [("user", "go on"), ("assistant", "and then " * 40)]
    unanswered = [("user", "hello?")]
    data = write_talks(tmp_path / "data", [*map(short, range(20)), huge, never_ends, unanswered])
    code, out, _ = stage("sft", "--data", data, *FIT)
    line = (
        "of 23 conversations: 1 cut between exchanges; 1 with an answer that lost its end; 1 left out, for "
        "nobody answers (context 128; the longest has "
    )
    assert code == 0 and line in out and "the model's context allows 128)" in out
    assert line in (tmp_path / "sft" / "report.md").read_text().replace("\\", "")
    assert facts(tmp_path / "sft")["cut"]["cut between exchanges"] == 1


def test_answers_that_all_lose_their_end_name_the_setting(stage: Any, tmp_path: Path) -> None:
    data = write_talks(tmp_path / "data", [[("user", "go on"), ("assistant", "and then " * 9)]] * 4)
    code, _, err = stage("sft", "--data", data, "--context", "32", *FIT)
    assert code == 1 and err.count("\n") == 1
    assert (
        "would never stop talking; of 4 conversations: 4 with an answer that lost its end (context 32" in err
    )
    assert "keeps all of them whole" in err
    assert stage("sft", "--data", data, "--context", "-1", *FIT)[0] == 2


def test_fewer_rows_than_a_batch_are_told(stage: Any, tmp_path: Path) -> None:
    data = write_talks(tmp_path / "data", [short(n) for n in range(3)])
    code, out, _ = stage("sft", "--data", data, *FIT, "--packing", "false", "--fit.batch_size", "8")
    line = "3 samples are fewer than a batch of 8: every step sees each of them 2.7 times; fit.batch_size 3"
    assert code == 0 and line in out
    assert line in (tmp_path / "sft" / "report.md").read_text().replace("\\", "")
    assert "fewer than a batch" not in stage("sft", "--data", data, *FIT, "--packing", "false", name="two")[1]


def test_a_budget_that_holds_no_step_ends_after_the_first(stage: Any, tmp_path: Path) -> None:
    data = write_talks(tmp_path / "data", [short(n) for n in range(20)])
    code, _, err = stage("sft", "--data", data, "--fit.seconds", "1e-6", "--fit.compile", "false")
    assert code == 1 and err.count("\n") == 1
    assert "so that fit.seconds 1e-06 holds not one, and nothing would be learnt. Set fit.seconds to " in err
    assert "make steps shorter: context below 64; fit.batch_size below 8; lora.rank 8" in err
    assert not list((tmp_path / "sft").glob("checkpoints/*"))


# ---- reward model ------------------------------------------------------------------------------------------


def test_pairs_that_a_limit_makes_equal_are_refused_with_the_value(stage: Any, tmp_path: Path) -> None:
    pairs = [compared(n, f"{SAME}{n} good", f"{SAME}{n} bad") for n in range(8)]
    data = write_comparisons(tmp_path / "pairs", pairs)
    code, _, err = stage("reward", "--comparisons", data, "--max_tokens", "20", *FIT)
    assert code == 1 and err.count("\n") == 1
    assert "max_tokens 20 makes the answers of all 8 training comparisons the same" in err
    wanted = int(err.split("Set max_tokens to ")[1].split(",")[0])
    code, out, _ = stage("reward", "--comparisons", data, "--max_tokens", wanted, *FIT, name="enough")
    assert code == 0 and "nothing was cut: 32 answers in comparisons" in out
    code, out, _ = stage("reward", "--comparisons", data, *FIT, name="from-data")
    assert code == 0 and "nothing was cut" in out
    assert facts(tmp_path / "from-data")["max_tokens"] == wanted
    assert facts(tmp_path / "from-data")["k"] == 2


def test_pairs_that_are_left_out_are_told_and_ppo_names_the_cut(stage: Any, tmp_path: Path) -> None:
    equal = [compared(n, f"{SAME}{n} good", f"{SAME}{n} bad") for n in range(6)]
    data = write_comparisons(tmp_path / "pairs", [*equal, *(compared(n, "yes", "no") for n in range(6, 30))])
    code, out, _ = stage("reward", "--comparisons", data, "--max_tokens", "20", *FIT)
    line = (
        "12 of 60 comparisons are left out: cut at max_tokens 20, their answers are the same; telling them "
    )
    assert code == 0 and line in out and "24 comparisons of 2 answers, 24 held out" in out
    assert "24 that cannot be told from another one of their prompt, left out" in out
    assert line in (tmp_path / "reward" / "report.md").read_text().replace("\\", "")
    assert facts(tmp_path / "reward")["comparisons left out"] == 12
    result = read_json(tmp_path / "reward" / "result.json")
    result["facts"]["held_out_correlation"] = 0.1
    (tmp_path / "reward" / "result.json").write_text(json.dumps(result))
    talks = write_talks(tmp_path / "data", [short(n) for n in range(8)])
    code, _, err = stage("ppo", "--reward", tmp_path / "reward", "--data", talks, "--iterations", "1")
    assert code == 1 and "First of all keep its answers whole: " in err
    assert " answers in comparisons were cut at max_tokens 20 (the longest has " in err


def test_a_ranking_counts_with_its_own_number_of_answers(stage: Any, tmp_path: Path) -> None:
    data = write_comparisons(tmp_path / "ranked", [compared(n, "a", "b", f"c {n}", "d") for n in range(4)])
    code, out, _ = stage("reward", "--comparisons", data, *FIT)
    assert code == 0 and "4 comparisons of 4 answers" in out
    assert facts(tmp_path / "reward")["k"] == 4
    assert "| k | 4 |" not in (tmp_path / "reward" / "report.md").read_text()  # as in the paper
    assert stage("reward", "--comparisons", data, "--k", "1", *FIT)[0] == 2


def test_few_ratings_make_smaller_comparisons(stage: Any, tmp_path: Path) -> None:
    data = write_talks(tmp_path / "data", [short(n) for n in range(4)])
    for side, count in (("train", 24), ("validation", 6)):
        rated = [LabelledText.of(f"text number {n} {side}", float(n)) for n in range(count)]
        (data / f"ratings-{side}.jsonl").write_text("".join(one.to_json() + "\n" for one in rated))
    code, out, _ = stage("reward", "--data", data, *FIT)
    assert code == 0 and "comparisons of 6 answers" in out and facts(tmp_path / "reward")["k"] == 6


def test_the_classifier_says_what_it_cuts(stage: Any, tmp_path: Path) -> None:
    data = write_talks(tmp_path / "data", [short(n) for n in range(4)])
    for side, count in (("train", 60), ("validation", 12)):
        rated = [LabelledText.of(f"{n % 2} text {SAME}{n} {side}", 2.0 * (n % 2) - 1) for n in range(count)]
        (data / f"ratings-{side}.jsonl").write_text("".join(one.to_json() + "\n" for one in rated))
    options = ["--data", data, "--calibration", "0.3", *FIT]
    _, out, _ = stage("classifier", *options)
    assert "nothing was cut: 72 texts behind the longest prompt, the longest of " in out
    _, out, _ = stage("classifier", *options, "--max_tokens", "24", name="cut")
    assert (
        "of 72 texts behind the longest prompt: 72 that lost their end (max_tokens 24; the longest has" in out
    )


# ---- sampling ----------------------------------------------------------------------------------------------


@pytest.fixture
def rewarded(stage: Any, tmp_path: Path) -> list[str]:
    """Options of the stages that sample: a reward model, and conversations whose answers have 30 tokens and
    more."""
    pairs = write_comparisons(tmp_path / "pairs", [compared(n, "yes", "no") for n in range(24)])
    code, _, err = stage("reward", "--comparisons", pairs, *FIT)
    assert code == 0, err
    talks = [[("user", f"say {n}"), ("assistant", f"well {n}, " + "it is so " * 4)] for n in range(12)]
    return ["--reward", str(tmp_path / "reward"), "--data", str(write_talks(tmp_path / "data", talks, talks))]


def longest_answer(chat_dir: Path, data: Path) -> int:
    tokenizer = Tokenizer.load(chat_dir)
    lines = (data / "dialogues-train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["messages"][1]["content"] for line in lines]
    return max(len(tokenizer.encode(answer)) for answer in answers) + 1


@pytest.mark.parametrize("verb", ["ppo", "reinforce", "best_of_n", "evaluate"])
def test_answers_may_be_as_long_as_those_of_the_data(
    verb: str, stage: Any, rewarded: list[str], tmp_path: Path, chat_dir: Path
) -> None:
    longest = longest_answer(chat_dir, tmp_path / "data")
    more = {
        "ppo": ONE,
        "reinforce": ONE,
        "best_of_n": ["--n", "2", "--prompts", "12", "--min_correlation", "-1", "--gold", ""],
        "evaluate": ["--prompts", "12", "--samples", "1", "--reference", str(chat_dir)],
    }[verb]
    options = rewarded if verb != "evaluate" else rewarded[2:]
    code, out, _ = stage(verb, *options, *more)
    limit = -(-longest // 8) * 8
    assert code == 0 and f"answers of at most {limit} tokens; 0 % of the conversations' own" in out
    assert "nothing was cut: " in out and " prompts, the longest of " in out
    assert facts(tmp_path / verb)["max_new_tokens"] == limit
    code, out, _ = stage(verb, *options, *more, "--max_new_tokens", "8", name="cut")
    line = (
        f"max_new_tokens 8 cuts 100 % of the conversations' own answers (longest {longest} tokens): each "
        f"unfinished answer gets unfinished_score -2; set it to {limit}, or to 0 for the data's length"
    )
    assert code == 0 and line in out
    assert line in (tmp_path / "cut" / "report.md").read_text().replace("\\", "")
    code, _, err = stage(verb, *options, *more, "--max_new_tokens", "500", name="none")
    assert code == 1 and "leaves no room for a prompt in the model's context of 128: set it to 64" in err


def test_fewer_prompts_than_completions_are_told(stage: Any, rewarded: list[str]) -> None:
    code, out, _ = stage("ppo", *rewarded, *ONE, "--batch_size", "24", "--minibatch_size", "12")
    assert code == 0 and "fewer prompts than the 24 of an iteration: each is asked 2.0 times in it" in out


def test_a_run_whose_answers_never_end_blames_the_limit(
    stage: Any, rewarded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.sample_completions

    def unfinished(*given: Any, **named: Any) -> Any:
        """An untrained model hardly ever ends an answer of two tokens; here never."""
        found = real(*given, **named)
        return replace(found, finished=found.finished & False)

    monkeypatch.setattr(training, "sample_completions", unfinished)
    options = [*ONE, "--iterations", "4", "--max_new_tokens", "2", "--kl_budget", "1000"]
    code, _, err = stage("ppo", *rewarded, *options)
    assert code == 1, _
    assert "no answer has come to its end since the start" in err
    assert "max_new_tokens 2 cuts 100 % of the conversations' own answers" in err
    assert "outside the loss" not in err
    report = (tmp_path / "ppo" / "report.md").read_text().replace("\\", "")
    assert "each unfinished answer gets unfinished_score -2" in report


# ---- tokenizer ---------------------------------------------------------------------------------------------


def test_the_tokenizer_says_when_it_learns_from_a_part_of_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("train", "validation"):
        made = [Document.of(f"text number {n} of {side}") for n in range(50)]
        (tmp_path / f"{side}.jsonl").write_text("".join(one.to_json() + "\n" for one in made))
    options = ["tokenizer", "--data", str(tmp_path), "--vocab_size", "300", "--out"]
    assert main([*options, str(tmp_path / "part"), "--train_bytes", "100"]) == 0
    total = sum(len(f"text number {n} of train") for n in range(50))
    line = f"merges were learnt on the first 100 of {total:,} bytes of the training documents (train_bytes)"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "part" / "report.md").read_text().replace("\\", "")
    assert main([*options, str(tmp_path / "whole")]) == 0
    assert "merges were learnt" not in capsys.readouterr().out
