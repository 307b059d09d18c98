"""The verb `import`."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright import checkpoint, tensor_files
from chatwright.chat import NATIVE, ChatTemplate
from chatwright.commands import import_
from chatwright.config import UserError
from chatwright.interop import export
from chatwright.language_model import load, load_parts
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from support.tooling import Run, save


def test_import_of_a_hugging_face_directory(run: Run, hf_dir: Path, tmp_path: Path) -> None:
    """Written, moved elsewhere, and then the same ids and the same logits as what was imported."""
    code, out, err = run("import", hf_dir, tmp_path / "made")
    assert (code, err) == (0, "") and "the same tokens and the same logits" in out
    moved = Path(shutil.move(tmp_path / "made", tmp_path / "moved"))
    assert {path.name for path in moved.iterdir()} <= export.OURS
    ours, theirs = load(moved), load(hf_dir)
    assert (
        ours.template == theirs.template
        and ours.template is not None
        and ours.template.end == "<|endoftext|>"
    )
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    ids = [ours.tokenizer.encode("Hello there, 東京")]
    assert torch.equal(ours.logits(ids), theirs.logits(ids))
    checkpoint.Checkpoint(moved).verify()
    state = checkpoint.Checkpoint(moved).state()
    assert (state["kind"], state["source"]) == ("language", str(hf_dir))


def test_an_imported_model_chats(
    run: Run, hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import", hf_dir, tmp_path / "made")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    code, out, err = run("chat", tmp_path / "made", "--max_new_tokens", "3", "--seed", "1")
    assert (code, err) == (0, "") and out.endswith("\n")


def test_import_of_our_own_leaves_the_optimiser_behind(run: Run, good: Path, tmp_path: Path) -> None:
    tensors = {
        "model": tensor_files.load_tensors(good / "model.safetensors"),
        "optimizer": {"m": torch.ones(9)},
    }
    texts = {name: (good / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    run_dir = tmp_path / "run" / "sft" / "checkpoints" / "step-000009"
    checkpoint.save_checkpoint(
        run_dir, tensors=tensors, state=checkpoint.Checkpoint(good).state(), texts=texts
    )
    assert run("import", tmp_path / "run" / "sft", tmp_path / "made")[0] == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "chat_template.jinja",
        "model.safetensors",
        "state.json",
        "tokenizer.json",
    ]


def test_ends_that_cannot_be_guessed_are_kept(taught: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    """Which tokens end a text and a turn comes from the source, not from a guess at what was written."""
    model, tokenizer = taught
    unusual = Tokenizer(tokenizer.backend, end_of_text="<|reserved_0|>")
    template = ChatTemplate(NATIVE.source.replace("'<|end|>'", "'<|image|><|end|>'"), "<|end|>")
    parts = load_parts(save(tmp_path / "source", model, tokenizer))
    import_.write_model(type(parts)(parts.model, unusual, template, "x"), tmp_path / "made", source="x")
    again = load(tmp_path / "made")
    assert again.tokenizer.end_of_text == "<|reserved_0|>"
    assert again.template == template != ChatTemplate.from_source(template.source)


def test_a_base_model_is_imported_as_one(run: Run, base_dir: Path, tmp_path: Path) -> None:
    code, out, _ = run("import", base_dir, tmp_path / "made")
    assert code == 0 and "a base model" in out and "chatwright generate" in out
    assert load(tmp_path / "made").template is None


def test_nothing_is_overwritten_unasked(run: Run, good: Path, base_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    assert run("import", good, target)[0] == 0
    before = (target / "state.json").read_bytes()
    code, _, err = run("import", base_dir, target)
    assert code == 1 and "--force" in err and (target / "state.json").read_bytes() == before
    assert run("import", base_dir, target, "--force")[0] == 0
    assert load(target).template is None
    (target / "thesis.txt").write_text("years of work")
    code, _, err = run("import", good, target, "--force")
    assert code == 1 and "thesis.txt" in err and (target / "thesis.txt").read_text() == "years of work"


def test_targets_that_cannot_be(run: Run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = run("import", good, tmp_path / "file")
    assert code == 2 and "is a file" in err
    code, _, err = run("import", good, good, "--force")
    assert code == 1 and "same place" in err
    checkpoint.Checkpoint(good).verify()
    (tmp_path / "empty").mkdir()
    assert run("import", good, tmp_path / "empty")[0] == 0


@pytest.mark.parametrize("what", ["tokens of a text", "tokens of a conversation", "logits"])
def test_what_reads_back_otherwise_is_not_kept(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    behaviour, calls = export.behaviour, []

    def spoilt(parts: Any) -> Any:
        text, talk, logits = behaviour(parts)
        calls.append(1)
        if len(calls) == 2:
            text = [*text, 1] if what == "tokens of a text" else text
            talk = [*talk, 1] if what == "tokens of a conversation" else talk
            logits = logits.nextafter(logits + 1) if what == "logits" else logits
        return text, talk, logits

    monkeypatch.setattr(import_, "behaviour", spoilt)
    code, _, err = run("import", good, tmp_path / "deep" / "made")
    assert code == 1 and f"gives other {what} than its source" in err
    assert not (tmp_path / "deep").exists()


def test_a_source_without_a_tokenizer(run: Run, hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    code, _, err = run("import", tmp_path / "bare", tmp_path / "made")
    assert code == 1 and "has no tokenizer" in err and not (tmp_path / "made").exists()


def test_check_target_needs_no_torch(tmp_path: Path) -> None:
    import_.check_target(tmp_path / "new", force=False)
    with pytest.raises(UserError, match="is a file"):
        import_.check_target(Path(__file__), force=True)
