"""The verb `doctor` on recipes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatwright.model.config import GPTConfig
from support.tooling import Run, check, findings


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A recipe with these stages, in an empty folder with an empty cache."""
    monkeypatch.setenv("CHATWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(stages: str) -> Path:
        (tmp_path / "r.yaml").write_text(f"stages: {stages}\n")
        return tmp_path / "r.yaml"

    return write


def test_the_built_in_recipe(run: Run, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, err = run("doctor", "tiny")
    assert (code, err) == (0, "") and "0 problems" in out
    assert "data -> tokenizer -> pretrain -> sft -> reward -> ppo -> eval" in out
    assert "chitchat will be downloaded" in out
    assert list(tmp_path.iterdir()) == [], "it only looks"


@pytest.mark.parametrize(
    ("stages", "topic", "said"),
    [
        ("{pretrian: {}}", "recipe", "did you mean 'pretrain'?"),
        ("{sft: {base: nowhere, data: .}}", "sft", "its input 'nowhere' is neither a stage"),
        ("{data: {text: boolqq}}", "data.text", "did you mean 'boolq'?"),
        ("{data: {dialogues: boolq}}", "data.dialogues", "boolq holds text records, not dialogue"),
        ("{data: {path: empty}}", "data.text", "empty"),
        (
            "{data: {dialogues: ''}, sft: {base: smollm2, context: 64}}",
            "data",
            "`dialogues` is empty, but sft",
        ),
        ("{data: {ratings: ''}, reward: {base: smollm2}}", "data", "`ratings` is empty, but reward"),
        ("{data: {ratings: ''}, classifier: {base: smollm2}}", "data", "`ratings` is empty, but classifier"),
        (
            "{data: {}, reward: {base: smollm2, comparisons: data}}",
            "data",
            "`comparisons` is empty, but reward",
        ),
        ("{data: {comparisons: chitchat}}", "data.comparisons", "not comparison"),
        (
            "{data: {}, reward: {base: smollm2, comparisons: nowhere}}",
            "reward",
            "its input 'nowhere' is neither a stage",
        ),
        (
            "{pretrain: {tokenizer: ., fit: {batch_size: 8, micro_batch: 3}}}",
            "pretrain",
            "multiple of micro_batch",
        ),
        ("{pretrain: {tokenizer: ., fit: {seconds: 0}}}", "pretrain", "give steps or seconds"),
        ("{pretrain: {tokenizer: ., preset: modern-tyny}}", "pretrain", "did you mean modern-tiny?"),
        ("{pretrain: {tokenizer: ., model: {layerz: 3}}}", "pretrain", "layerz"),
        ("{data: {}, tokenizer: {vocab_size: 100}}", "recipe", "vocab_size 100 is too small"),
        (
            "{pretrain: {tokenizer: ., model: {context: 64}}, ppo: {base: pretrain, reward: ., data: ., "
            "max_prompt_tokens: 40, max_new_tokens: 32}}",
            "ppo",
            "do not fit into the model's context of 64",
        ),
    ],
)
def test_recipes_with_a_problem(
    run: Run, recipe: Callable[[str], Path], tmp_path: Path, stages: str, topic: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert said in check(run, recipe(stages), problem=topic)


def test_own_text_is_looked_at(run: Run, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Some text.")
    code, out, _ = run("doctor", recipe("{data: {path: mine.txt, dialogues: '', ratings: ''}}"))
    assert code == 0 and "mine.txt: its first record can be read" in out
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9 " * 9)
    assert "mine.txt" in check(run, tmp_path / "r.yaml", problem="data.text")


def test_a_source_in_the_cache(run: Run, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    from chatwright.data.archives import CHITCHAT

    (tmp_path / "cache" / "archives").mkdir(parents=True)
    (tmp_path / "cache" / "archives" / CHITCHAT.filename).write_bytes(b"")
    out = run("doctor", recipe("{data: {text: 'chitchat,shakespeare', ratings: ''}}"))[1]
    assert "chitchat is in the cache" in out and "shakespeare will be downloaded" in out


def test_recipes_that_are_too_large(
    run: Run, recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("{pretrain: {tokenizer: ., preset: gpt2}}")
    monkeypatch.setattr("chatwright.memory.memory_budget_bytes", lambda: 1e9)
    assert "needs " in check(run, path, problem="memory")  # GB, of one sample: gpt2 with AdamW
    monkeypatch.setattr("chatwright.memory.memory_budget_bytes", lambda: None)
    full = shutil.disk_usage(path.parent)._replace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    check(run, path, problem="disk")


def test_a_vocabulary_that_eats_the_model(run: Run, recipe: Callable[[str], Path]) -> None:
    code, out, _ = run("doctor", recipe("{data: {}, tokenizer: {vocab_size: 40000}, pretrain: {}}"))
    assert (
        code == 0
        and findings(out)["pretrain"] == "warning"
        and "% of the parameters are the token table" in out
    )


def test_names_that_lead_nowhere(run: Run, recipe: Callable[[str], Path]) -> None:
    for name in ("nowhere", "no/such/model"):
        code, _, err = run("doctor", name)
        assert code == 1 and "is no recipe" in err and "no model" in err
    assert run("doctor", "nowhere.yaml")[0] == 2


def test_the_estimate_of_parameters_is_the_count() -> None:
    from chatwright.commands.doctor.recipe import parameters

    assert parameters(GPTConfig.preset("gpt2")) == 124_439_808
