"""What a finished stage's report gets beside its measures: answers before and after, KL budget, cost, the
paper's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, files
from chatwright.chat import NATIVE
from chatwright.data.examples import Dialogue
from chatwright.evaluate.answers import LENGTH
from chatwright.language_model import load_parts
from chatwright.metrics import MetricsLog
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.reports import extras
from chatwright.stages import ppo, pretrain, sft
from chatwright.tokenizer import Tokenizer
from chatwright.trackers import Reporting
from chatwright.train.rl.outcome import kl_budget
from chatwright.train.rl.prompts import exchanges_from
from chatwright.train.rl.rollout import sample_completions, texts_of
from chatwright.train.workspace import Measure, Report, Workspace

TOKENIZER = Tokenizer.train(["love hate good bad the cat is " * 3], 300)
SPENT = {"seconds": 7_200.0, "joules": 1.8e6, "memory_bytes": 5e8}


def save(place: Path, seed: int) -> None:
    """A random chat model as a checkpoint."""
    model = GPT(GPTConfig.preset("modern-nano", vocab_size=TOKENIZER.vocab_size, context=64, tied=False))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
    card = {"kind": "language", "model": model.config.to_dict(), "tokenizer": TOKENIZER.fingerprint}
    texts = {"tokenizer.json": TOKENIZER.to_json(), "chat_template.jinja": NATIVE.source}
    checkpoint.save_checkpoint(
        place, tensors={"model": checkpoint.model_tensors(model)}, state=card, texts=texts
    )


@pytest.fixture
def stage(tmp_path: Path) -> Workspace:
    """A PPO stage that has just ended, beside the model that it started from and the data."""
    save(tmp_path / "sft" / "checkpoints" / "step-000009", 1)
    files.write_json(
        tmp_path / "sft" / "result.json", {"model": "checkpoints/step-000009", "fingerprint": "s"}
    )
    save(tmp_path / "ppo" / "checkpoints" / "step-000003", 2)
    made = [Dialogue.of([{"role": "user", "content": f"is the cat {n}?"}]) for n in range(14)]
    text = "".join(one.to_json() + "\n" for one in made)
    files.write_text(tmp_path / "data" / "records" / "dialogues-validation.jsonl", text)
    files.write_json(tmp_path / "data" / "result.json", {"data": "d" * 16, "fingerprint": "d"})
    return Workspace(
        tmp_path / "ppo", 5, {"sft": tmp_path / "sft", "data": tmp_path / "data"}, Reporting(price=3.0)
    )


def ended(**facts: Any) -> Report:
    return Report(
        [Measure("KL to the SFT model", 0.0, 2.5)],
        model="checkpoints/step-000003",
        facts={"best": {"step": 3}, "stopped": "all iterations done", **facts},
    )


CONFIG = ppo.Config(max_new_tokens=8, max_prompt_tokens=40)


def test_base_and_result_answer_the_same_prompts_with_the_same_seeds(stage: Workspace) -> None:
    found = extras.close(ppo.STAGE, CONFIG, stage, ended(), SPENT)
    pairs = files.read_json(stage.directory / "pairs.json")
    file = stage.inputs["data"] / "records" / "dialogues-validation.jsonl"
    dialogues = [Dialogue.from_json(line) for line in file.read_text().splitlines()]
    prompts = exchanges_from(dialogues, NATIVE, TOKENIZER, limit=40, most=64).prompts
    assert [pair["prompt"] for pair in pairs] == [f"is the cat {n}?" for n in range(10)]
    places = {"before": stage.inputs["sft"], "after": stage.directory / "checkpoints" / "step-000003"}
    for number, (side, place) in enumerate(places.items()):
        answers = sample_completions(
            load_parts(place).model,
            prompts,
            end=TOKENIZER.control_ids["<|end|>"],
            max_new_tokens=8,
            temperature=0.7,  # as in `chatwright chat`
            seed_parts=(5, "before and after"),
        )
        assert [pair[side] for pair in pairs] == texts_of(answers, TOKENIZER)[:10]
        lengths = answers.response.sum(1).float()
        assert found["answers"]["measures"][LENGTH][number] == pytest.approx(float(lengths.mean()))
        known = files.read_json(stage.directory / "per_prompt.json")
        assert known["values"][LENGTH][side] == lengths.tolist() and len(set(known["prompts"])) == 14
    assert [pair["before"] for pair in pairs] != [pair["after"] for pair in pairs]
    assert found["answers"]["kl"] > 0.1 and found["answers"]["prompts"] == 14
    assert (found["answers"]["before"], found["answers"]["after"], found["data"]) == ("sft", "ppo", "d" * 16)
    assert {
        "setting": "beta",
        "ours": 0.15,
        "paper": "0.02",
        "source": found["paper"][4]["source"],
        "same": False,
    } in found["paper"]


def test_the_kl_budget(stage: Workspace) -> None:
    log = MetricsLog(stage.directory / "metrics.jsonl")
    for step, kl in enumerate((0.0, 4.0, 2.5, 11.0)):
        log.write(step, {"kl": kl})
    assert kl_budget(CONFIG, stage, ended()) == {
        "spent": 2.5,
        "allowed": 10.0,
        "largest": 11.0,
        "iteration": 3,
        "kept": 3,
        "stopped": "all iterations done",
    }
    assert sft.STAGE.kl_budget is None
    nothing = kl_budget(CONFIG, stage, Report(facts={"best": None, "stopped": "broken"}))
    assert nothing is not None and nothing["spent"] is None and nothing["kept"] is None


def test_cost_is_what_is_known(stage: Workspace) -> None:
    assert extras.cost(ended(tokens=7, flop=8e9), stage, SPENT) == {
        "seconds": 7_200.0,
        "tokens": 7.0,
        "flop": 8e9,
        "energy_kwh": 0.5,
        "cost": 6.0,
        "memory_bytes": 5e8,
    }
    silent = Workspace(stage.directory, 5, {})
    assert extras.cost(Report(), silent, {**SPENT, "joules": 0.0}) == {
        "seconds": 7_200.0,
        "memory_bytes": 5e8,
    }


def test_what_cannot_be_asked_is_said_and_loses_nothing(stage: Workspace) -> None:
    (stage.inputs["data"] / "records" / "dialogues-validation.jsonl").unlink()
    report = ended()
    found = extras.close(ppo.STAGE, CONFIG, stage, report, SPENT)
    assert found["answers"] is None and not (stage.directory / "pairs.json").exists()
    assert (
        report.notes[0].startswith("no answers before and after: ")
        and "dialogues-validation.jsonl" in report.notes[0]
    )
    assert found["kl_budget"]["spent"] == 2.5


def test_a_large_model_on_a_cpu_is_asked_less(stage: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "WORTH_COMPILING", 1)
    monkeypatch.setattr(extras, "FEW", 11)
    assert extras.close(ppo.STAGE, CONFIG, stage, ended(), SPENT)["answers"]["prompts"] == 11


def test_a_stage_without_a_result_and_one_that_aligns_nothing(stage: Workspace) -> None:
    assert extras.close(ppo.STAGE, CONFIG, stage, Report(facts={"stopped": "x"}), SPENT)["answers"] is None
    assert set(extras.close(pretrain.STAGE, object(), stage, Report(), SPENT)) == {"cost", "data"}


def test_the_same_records_have_one_mark(tmp_path: Path) -> None:
    def mark(name: str, *texts: str) -> str | None:
        for number, text in enumerate(texts):
            files.write_text(tmp_path / name / "records" / f"{number}.jsonl", text)
        return extras.content(object(), Workspace(tmp_path / name))

    assert mark("a", "x", "y") == mark("b", "x", "y") != mark("c", "x", "z") and mark("d", "y", "x") != mark(
        "a", "x", "y"
    )
