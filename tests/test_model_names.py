"""Names of models: what is said of one that is not there, or not finished, or rounded."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from chatwright import files
from chatwright.commands import serve
from chatwright.data.archives import SMOLLM2_MEMBER
from chatwright.language_model import shape_of
from chatwright.model.config import GPTConfig
from chatwright.model_names import SMOLLM2_HUB, near_hub, unfinished, weights_note
from chatwright.serve.config import ServeConfig
from support.small_stages import Run, command_line, one_line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return command_line(capsys)


@pytest.mark.parametrize("verb", ["chat", "generate", "serve", "export", "import"])
def test_a_name_of_the_hub_without_its_mark(verb: str, run: Run) -> None:
    more = {
        "generate": ["hi"],
        "export": ["out", "--format", "hf"],
        "import": ["out"],
        "serve": ["--port", "0"],
    }
    code, _, err = run(verb, SMOLLM2_HUB, *more.get(verb, []))
    assert code == 1 and one_line(err).endswith(f"did you mean hf:{SMOLLM2_HUB}?")


def test_what_looks_like_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert near_hub("owner/name") == "; did you mean hf:owner/name?"
    assert near_hub("https://huggingface.co/owner/name") == "; did you mean hf:owner/name?"
    assert near_hub("smolm2") == near_hub("SmolLM2") == "; did you mean smollm2?"
    for name in ("runs/my", "models/mine", "./a/b", "a/b/c", "owner/file.gguf", "owner/mine.jsonl", "gpt2"):
        assert near_hub(name) == ""


def stage(run: Path, name: str, model: Path, *, step: int, done: bool) -> Path:
    """A stage of a run, begun or finished, with a checkpoint."""
    shutil.copytree(model, run / name / "checkpoints" / f"step-{step:06}")
    files.write_json(run / name / "clock.json", {"fingerprint": "x", "verb": name, "seconds": 1.0})
    if done:
        files.write_json(run / name / "result.json", {"model": f"checkpoints/step-{step:06}"})
    return run / name


@pytest.mark.parametrize("verb", ["generate", "chat", "export"])
def test_a_stage_that_is_not_finished_says_so(
    verb: str, run: Run, tmp_path: Path, chat_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    stage(tmp_path / "runs/my", "sft", chat_dir, step=30, done=False)
    more = {"generate": ["hi", "--max_new_tokens", "1"], "export": ["out", "--format", "hf"]}
    code, out, err = run(verb, "runs/my/sft", *more.get(verb, []))
    assert code == 0
    said = "runs/my/sft is not finished: this is its checkpoint of step 30; the command that began it goes on"
    assert said in (out if verb == "export" else err)


def test_a_run_whose_last_stage_is_not_finished_says_which_model_it_is(
    run: Run, tmp_path: Path, chat_dir: Path
) -> None:
    stage(tmp_path / "runs/my", "sft", chat_dir, step=30, done=True)
    code, _, err = run("generate", "runs/my", "hi", "--max_new_tokens", "1")
    assert (code, err) == (0, "")
    stage(tmp_path / "runs/my", "ppo", chat_dir, step=7, done=False)
    shutil.copytree(tmp_path / "runs/my/ppo", tmp_path / "runs/my/ppo.old-unfinished")
    code, _, err = run("generate", "runs/my", "hi", "--max_new_tokens", "1")
    assert code == 0 and err == (
        "runs/my is not finished: ppo has no result yet, so this is the model of the stage sft (step 30); "
        "the command that began it goes on from there\n"
    )


def test_a_run_without_any_finished_model_says_what_there_is(
    run: Run, tmp_path: Path, chat_dir: Path
) -> None:
    stage(tmp_path / "runs/my", "pretrain", chat_dir, step=30, done=False)
    code, _, err = run("chat", "runs/my")
    assert code == 1 and "runs/my has no finished model yet; the stage pretrain is under way" in one_line(err)
    assert "runs/my/pretrain means its newest checkpoint" in err


def test_models_elsewhere_are_finished(tmp_path: Path, chat_dir: Path) -> None:
    assert unfinished("smollm2", "x.gguf") == unfinished(str(chat_dir), str(chat_dir)) == ""
    assert unfinished(str(tmp_path), str(tmp_path)) == ""


def test_rounded_weights_are_named() -> None:
    assert "Q4_1" in SMOLLM2_MEMBER  # what the note says
    assert "4-bit weights (Q4_1" in weights_note("smollm2") and SMOLLM2_HUB in weights_note("smollm2")
    assert weights_note(f"hf:{SMOLLM2_HUB}") == weights_note("runs/my") == ""


def test_the_shape_of_a_model_without_its_weights(tmp_path: Path, chat_dir: Path) -> None:
    assert shape_of("smollm2") == GPTConfig.preset("smollm2-135m")
    known = shape_of(chat_dir)
    assert known == GPTConfig.preset("modern-nano", vocab_size=known.vocab_size)
    (stage(tmp_path / "runs/my", "sft", chat_dir, step=30, done=True) / "checkpoints/step-000030").joinpath(
        "model.safetensors"
    ).unlink()
    assert shape_of(tmp_path / "runs/my/sft") == known


def test_the_served_model_has_the_name_that_it_is_given(chat_dir: Path) -> None:
    from chatwright.language_model import load

    config = ServeConfig(name="helper")
    pool = serve.make_pool(load(chat_dir), str(chat_dir), config)
    try:
        assert pool.names == ["helper"]
        pool.check("helper")
        pool.check(str(chat_dir))  # by what it was loaded from, too
    finally:
        pool.close()
