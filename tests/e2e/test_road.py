"""The whole road in miniature, by its command line: own text, dialogues and ratings in; a model that chats
out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import chatwright
from chatwright import cli, files, stage_folder
from chatwright.metrics import read_metrics
from support.babble import Babble
from support.waiting import wait_until

STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "eval"]

RECIPE = """
name: mini
seed: {seed}
prompt: How is the cat number 5?
stages:
  data: {{text: {root}/text, dialogues: {root}/dialogues.jsonl, ratings: {root}/ratings.jsonl,
          validation: 0.2, ratings_validation: 0.2}}
  tokenizer: {{vocab_size: 400}}
  pretrain:
    preset: modern-nano
    model: {{context: 64}}
    fit: {{steps: 160, batch_size: 8, compile: false, precision: fp32}}
  sft: {{fit: {{steps: 160, batch_size: 8, precision: fp32}}, optim: {{learning_rate: 0.004}}}}
  reward: {{k: 4, max_tokens: 48, fit: {{steps: 80, batch_size: 4, precision: fp32}},
           optim: {{learning_rate: 0.002}}}}
  ppo: {{iterations: 4, batch_size: 16, minibatch_size: 8, max_prompt_tokens: 40, max_new_tokens: 18,
         min_tokens: 1, min_correlation: 0.3, optim: {{learning_rate: 0.0005}}}}
  eval: {{prompts: 24, samples: 1, max_prompt_tokens: 40, max_new_tokens: 18, gold: sentiment}}
"""


def write_data(root: Path) -> Path:
    """Raw files as a user has them, and the recipe."""
    shift = int(os.environ.get("CHATWRIGHT_TEST_SEED", "0"))  # as in tests/train/conftest.py
    draw = Babble(3 + shift)
    (root / "text").mkdir(parents=True)
    lines = [json.dumps({"text": draw.document()}) for _ in range(200)]
    (root / "text" / "documents.jsonl").write_text("\n".join(lines))
    (root / "text" / "book.txt").write_text("\n\n".join(draw.document(20) for _ in range(40)))
    lines = [json.dumps({"messages": draw.messages()}) for _ in range(240)]
    (root / "dialogues.jsonl").write_text("\n".join(lines))
    lines = [json.dumps(dict(zip(("text", "label"), draw.rated(), strict=True))) for _ in range(400)]
    (root / "ratings.jsonl").write_text("\n".join(lines))
    (root / "mini.yaml").write_text(RECIPE.format(root=root, seed=7 + shift))
    return root / "mini.yaml"


def run(recipe: Path, out: Path, *more: str) -> str:
    """`chatwright run`; what it printed, white space made one space."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = cli.main(["run", str(recipe), "--out", str(out), *more])
    assert code == 0, told.getvalue()
    return " ".join(told.getvalue().split())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A miniature gains nothing from threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe beside its data."""
    return write_data(tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def road(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The finished run, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    told = run(recipe, out)
    return out / "mini", told


def test_every_stage_finishes_and_reports(road: tuple[Path, str]) -> None:
    root, told = road
    report = (root / "report.md").read_text()
    for stage in STAGES:
        assert (root / stage / "result.json").is_file() and (root / stage / "report.md").is_file()
        assert (root / stage / "config.yaml").is_file()
        assert files.read_json(root / stage / "clock.json")["files"] == []  # all are in stage_folder.WRITTEN
        left = stage_folder.StageFolder(root / stage, stage)._unknown(root / stage, noted=False)
        assert not left, "what a stage of ours writes belongs into stage_folder.WRITTEN or INSIDE"
        assert f"| {stage} |" in report
        assert f"[{stage}]" in told
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert (root / stage / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert f"({stage}/curves.png)" in report
        assert read_metrics(root / stage / "metrics.jsonl")
    for stage in ("pretrain", "sft", "ppo"):
        assert f"- **{stage}**" in report  # the prompt, answered after each
    assert "How is the cat number 5?" in report and "How is the cat number 5?" in told
    assert "total" in told and "chatwright chat" in told and "chatwright serve" in told
    assert not [path for path in root.rglob("*") if "partial" in path.name]


@pytest.mark.learns
def test_the_reports_of_alignment_say_it_all(road: tuple[Path, str], learnt: Any) -> None:
    root, _ = road
    for stage in ("sft", "reward", "ppo", "eval"):
        text = (root / stage / "report.md").read_text()
        for title in ("Settings that differ from the paper's", "Before and after", "KL budget", "Cost"):
            assert f"\n## {title}\n" in text, (stage, title)
        assert len(files.read_json(root / stage / "pairs.json")) == 10 and "\n| 10 | " in text
        assert "no answers before and after" not in text
    leads = [
        (float(pair["before"]), float(pair["after"]))
        for pair in files.read_json(root / "reward" / "pairs.json")
    ]
    learnt("pairs with a clear lead after", sum(after > 0.5 for _, after in leads), above=7.5)
    learnt("leads before, in all", sum(abs(before) for before, _ in leads), below=10)
    results = {stage: files.read_json(root / stage / "result.json") for stage in STAGES}
    before, after = results["sft"]["answers"]["measures"]["share that ends"]
    learnt("share of answers that end, before", before, below=0.35)
    learnt("share of answers that end, after", after, above=0.75)
    assert results["ppo"]["answers"]["kl"] > -0.5 and results["ppo"]["kl_budget"]["allowed"] == 10.0
    assert (
        len({result["data"] for stage, result in results.items() if stage not in ("pretrain", "tokenizer")})
        == 1
    )
    for stage in ("pretrain", "sft", "reward", "ppo"):
        cost = results[stage]["cost"]
        assert cost["flop"] > 1e8 and cost["seconds"] > 0 and cost["memory_bytes"] > 1e7
    assert results["ppo"]["cost"]["tokens"] == sum(
        row["tokens"] for row in read_metrics(root / "ppo" / "metrics.jsonl")
    )
    report = (root / "report.md").read_text()
    assert (
        "\n## Alignment in short\n" in report and "[ppo](ppo/report.md): " in report and "| total |" in report
    )


@pytest.mark.learns
def test_the_numbers_went_the_right_way(road: tuple[Path, str], learnt: Any) -> None:
    root, _ = road

    def measure(stage: str, place: int = 0) -> tuple[float, float]:
        found = files.read_json(root / stage / "result.json")["measures"][place]
        return found["before"], found["after"]

    for stage, bound in (("pretrain", 0.6), ("sft", 0.7)):
        before, after = measure(stage)
        learnt(f"{stage}: loss, as a share", after / before, below=bound)
    learnt("reward: accuracy", measure("reward")[1], above=0.8)
    best = files.read_json(root / "ppo" / "result.json")["facts"]["best"]
    rows = [row for row in read_metrics(root / "ppo" / "metrics.jsonl") if "fixed_score" in row]
    top = max(row["fixed_score"] for row in rows)  # the first among them: the SFT model
    assert best["score"] == pytest.approx(top, abs=1e-5)
    names = [one["name"] for one in files.read_json(root / "eval" / "result.json")["measures"]]
    assert {"reward model's score, held-out prompts", "win rate by the reward model"} < set(names)
    assert "conclusion: " in road[1] and "score, held-out prompts (" in road[1]  # with the interval
    facts = files.read_json(root / "eval" / "result.json")["facts"]
    assert facts["interval"][0] <= facts["gain"] <= facts["interval"][1] and facts["kl"] > -0.5


def test_what_is_held_out_was_never_trained_on(road: tuple[Path, str]) -> None:
    records = road[0] / "data" / "records"
    for prefix in ("", "dialogues-", "ratings-"):
        sides = [
            {json.loads(line)["id"] for line in (records / f"{prefix}{side}.jsonl").read_text().splitlines()}
            for side in ("train", "validation")
        ]
        assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_the_run_directory_chats(road: tuple[Path, str]) -> None:
    model = chatwright.load(str(road[0]))
    messages = [{"role": "user", "content": "How is the river number 3?"}]
    answer = model.chat(messages, max_new_tokens=24, seed=1)
    assert answer and answer == model.chat(messages, max_new_tokens=24, seed=1)
    logits = chatwright.load(str(road[0] / "ppo")).logits([[1, 2, 3]])
    torch.testing.assert_close(
        logits, model.logits([[1, 2, 3]])
    )  # the run stands for its last language model
    base = chatwright.load(str(road[0] / "pretrain"))
    assert base.template is None and base.generate("The old cat", max_new_tokens=8, temperature=0.0)


def said(place: Path) -> str:
    """A short answer of the model in a directory, the same at each call."""
    talk = [{"role": "user", "content": "How is the river number 3?"}]
    return chatwright.load(str(place)).chat(talk, max_new_tokens=8, seed=1)


def test_a_checkpoint_stands_by_itself(road: tuple[Path, str], tmp_path: Path) -> None:
    name = files.read_json(road[0] / "ppo" / "result.json")["model"]
    shutil.copytree(road[0] / "ppo" / name, tmp_path / "alone")
    alone, whole = (said(place) for place in (tmp_path / "alone", road[0] / "ppo"))
    assert alone == whole != ""


def test_a_second_run_skips_everything(road: tuple[Path, str], recipe: Path) -> None:
    stamps = {stage: (road[0] / stage / "result.json").stat().st_mtime_ns for stage in STAGES}
    told = run(recipe, road[0].parent)
    assert told.count("skipped") == len(STAGES)
    assert stamps == {stage: (road[0] / stage / "result.json").stat().st_mtime_ns for stage in STAGES}


def test_a_changed_setting_of_ppo_runs_ppo_and_eval_again(
    road: tuple[Path, str], recipe: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "mini"
    shutil.copytree(road[0], copy)
    told = run(recipe, tmp_path, "--ppo.iterations", "2")
    for stage in STAGES[:5]:
        assert f"[{stage}] finished before" in told
        assert not (copy / f"{stage}.old-1").exists()
    for stage in ("ppo", "eval"):
        assert f"[{stage}] settings or inputs have changed" in told
        old, new = (files.read_json(copy / name / "result.json") for name in (f"{stage}.old-1", stage))
        assert old["fingerprint"] != new["fingerprint"]
    facts = files.read_json(copy / "ppo" / "result.json")["facts"]
    assert (facts["iterations"], facts["stopped"]) == (2, "all iterations done")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main(["compare", str(road[0]), str(copy), "--json"]) == 0
    found = {one["stage"]: one for one in json.loads(shown.getvalue())["stages"]}
    assert all(found[stage]["same"] for stage in STAGES[:5]) and not found["ppo"]["same"]
    assert (
        found["ppo"]["settings"] == [{"setting": "iterations", "values": [4, 2]}] and found["eval"]["paired"]
    )
    assert said(copy) == said(copy / "ppo") != ""


def test_ctrl_c_and_the_same_command_again(road: tuple[Path, str], recipe: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of pre-training; the second run ends with the model that an uninterrupted one
    makes."""
    argv = [
        sys.executable,
        "-m",
        "chatwright.cli",
        "run",
        str(recipe),
        "--out",
        str(tmp_path),
        "--until",
        "pretrain",
    ]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    metrics = tmp_path / "mini" / "pretrain" / "metrics.jsonl"
    wait_until(lambda: read_metrics(metrics), "the first row of metrics", process=process)
    process.send_signal(signal.SIGINT)
    told = " ".join(process.communicate(timeout=120)[0].split())
    assert process.returncode in (0, 130), told
    assert "stopping after this step" in told and "the same command goes on from there" in told
    assert not (tmp_path / "mini" / "pretrain" / "result.json").exists()
    again = run(recipe, tmp_path, "--until", "pretrain")
    assert "[data] finished before" in again and "[tokenizer] finished before" in again
    assert "going on from step" in again
    name = "checkpoints/step-000160/model.safetensors"
    assert (tmp_path / "mini" / "pretrain" / name).read_bytes() == (road[0] / "pretrain" / name).read_bytes()
