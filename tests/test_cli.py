"""The command line as people meet it: help, mistakes, damaged files. One clear line each, and the right exit
code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import chatwright
from chatwright import cli
from chatwright.config import UsageError, UserError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_line(err: str) -> str:
    """The message, when it is one line as promised."""
    assert err.startswith("chatwright: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )  # type: ignore[call-overload,no-any-return]


# What it says of itself


@pytest.mark.parametrize("verb", cli.verbs())
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert f"chatwright {verb}" in out and "--config" in out and "default" in out


def test_usage_lists_each_verb(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {verb} " in out for verb in cli.verbs())
    assert run() == (2, out, "")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"chatwright {chatwright.__version__}\n", "")


def test_python_m_chatwright() -> None:
    done = python("-m", "chatwright", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"chatwright {chatwright.__version__}\n", "")


def test_what_needs_no_torch_does_not_import_it() -> None:
    """Two seconds that nobody should wait for: the package, its version, its usage."""
    program = """
import contextlib, io, sys
import chatwright
from chatwright import cli
heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow", "tokenizers", "rich", "fastapi", "jinja2"}
heavy |= {"yaml"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["--help"]); cli.main(["--version"])
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


# Wrong arguments: exit code 2, nothing started


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "known: chat"),
        (["pretrian"], "did you mean 'pretrain'?"),
        (["chat"], "model"),
        (["chat", "m", "--temprature", "1"], "did you mean --temperature?"),
        (["chat", "m", "--temperature", "hot"], "temperature"),
        (["chat", "m", "extra"], "extra"),
        (["chat", "m", "--config", "no/such.yaml"], "no/such.yaml"),
        (["serve", "m", "--port", "99999"], "ports are 0 to 65535"),
        (["generate", "m", "--prompt", "x", "--top_p", "7"], "top_p"),
        (["generate", "m", "--prompt", "x", "--prompt_file", "y"], "not both"),
        (["import", "source"], "directory"),
        (["import", "a", "b", "--forse"], "did you mean --force?"),
        (["doctor"], "recipe_or_model"),
        (["doctor", "tiny", "--dialogue", "x.jsonl"], "with a model"),
        (["run"], "recipe"),
        (["run", "no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["run", "tinny"], "did you mean 'tiny'?"),
        (["run", "no/such.yaml"], "no/such.yaml"),
        (["run", "tiny", "--ppo.iteration", "3"], "did you mean --ppo.iterations?"),
        (["run", "tiny", "--pppo.iterations", "3"], "did you mean --ppo.iterations?"),
        (["run", "tiny", "--ppo.iterations", "many"], "iterations"),
        (["run", "tiny", "--ppo.iterations"], "has no value"),
        (["run", "tiny", "--pretrain.fit.second", "3"], "did you mean --pretrain.fit.seconds?"),
        (["run", "tiny", "--until", "nowhere"], "nowhere"),
        (["run", "tiny", "--sead", "3"], "did you mean --seed?"),
        (["run", "tiny", "stray"], "stray"),
        (["pretrain", "--seed", "x"], "seed"),
        (["pretrain", "--out"], "--out has no value"),
        (["pretrain", "--preset"], "preset"),
        (["sft", "--fit.batch_size", "none"], "batch_size"),
        (["data", "--validaton", "0.1"], "did you mean --validation?"),
    ],
)
def test_wrong_arguments(
    run: Run, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in one_line(err)
    assert list(tmp_path.iterdir()) == [], "nothing may have been started"


# Missing and wrong files: exit code 1


@pytest.mark.parametrize("verb", ["chat", "serve", "generate", "doctor", "import"])
def test_a_model_that_is_not_there(run: Run, verb: str, tmp_path: Path) -> None:
    rest: dict[str, tuple[object, ...]] = {
        "generate": ("--prompt", "x"),
        "serve": ("--port", "0"),
        "import": (tmp_path / "made",),
    }
    code, out, err = run(verb, "no/such/model", *rest.get(verb, ()))
    assert (code, out) == (1, "")
    assert "no/such/model" in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [[], ["notes.txt", "README.md"]])
def test_a_directory_without_a_model(run: Run, files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("nothing")
    code, _, err = run("chat", tmp_path)
    assert code == 1
    assert f"{tmp_path} holds no model" in one_line(err)


def test_a_file_that_is_no_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model at all, only some bytes")
    (tmp_path / "model.bin").write_bytes(b"pickle?")
    for name in ("model.gguf", "model.bin"):
        code, _, err = run("chat", tmp_path / name)
        assert code == 1 and name in one_line(err)


def test_inputs_of_a_stage_that_are_not_there(run: Run, tmp_path: Path) -> None:
    for verb, option in (
        ("tokenizer", "--data"),
        ("pretrain", "--tokenizer"),
        ("sft", "--base"),
        ("reward", "--base"),
    ):
        code, _, err = run(verb, option, "no/such", "--out", tmp_path / verb)
        assert code == 1 and "no/such" in one_line(err), verb


# Damaged checkpoints


@pytest.fixture
def damaged(chat_dir: Path, tmp_path: Path) -> Path:
    """A copy of a good model, to be damaged."""
    return Path(shutil.copytree(chat_dir, tmp_path / "model"))


def cut(file: Path, share: float = 0.5) -> None:
    """Cut a file off, as a full disk or a broken copy does."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def test_a_good_model_speaks(run: Run, chat_dir: Path) -> None:
    code, out, err = run("generate", chat_dir, "--prompt", "Hello", "--max_new_tokens", "4")
    assert (code, err) == (0, "") and out.endswith("\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "model.safetensors is damaged"),
        ("tokenizer.json", "tokenizer.json is damaged"),
        ("chat_template.jinja", "chat_template.jinja is damaged"),
        ("state.json", "state.json cannot be read"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint(run: Run, damaged: Path, name: str, said: str, share: float) -> None:
    cut(damaged / name, share)
    code, out, err = run("chat", damaged)
    assert (code, out) == (1, "")
    assert said in one_line(err) and str(damaged) in err


def test_a_missing_file_of_a_checkpoint(run: Run, damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    code, _, err = run("chat", damaged)
    assert code == 1 and "model.safetensors is missing" in one_line(err)


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "{}",
        '{"kind": "language"}',
        '{"kind": "language", "model": {}}',
        '{"kind": "language", "model": {"x": 1}}',
        '{"kind": "reward", "model": {}}',
        '{"kind": "language", "model": 3, "files": {}}',
        "\x00",
        '"text"',
        '{"kind": "language", "model": {"vocab_size": 9, "context": 8, "layers": 1, "width": 8, "heads": 2}}',
        '{"kind": "language", "files": []}',
    ],
)
def test_a_state_that_describes_no_model(run: Run, damaged: Path, state: str) -> None:
    (damaged / "state.json").write_text(state)
    code, _, err = run("chat", damaged)
    assert code == 1 and str(damaged) in one_line(err)


def test_truncated_weights_without_checksums(run: Run, damaged: Path) -> None:
    """A state written by hand has no checksums; the file's own header still tells."""
    import json

    state = json.loads((damaged / "state.json").read_text())
    del state["files"]
    (damaged / "state.json").write_text(json.dumps(state))
    cut(damaged / "model.safetensors")
    code, _, err = run("chat", damaged)
    assert code == 1 and "damaged or not a safetensors file" in one_line(err)


# Data


def stage_data(run: Run, out: Path, *options: object) -> tuple[int, str, str]:
    return run("data", "--dialogues", "", "--ratings", "", "--out", out, *options)


@pytest.mark.parametrize("content", ["", "\n\n", "   \n"])
def test_an_empty_corpus(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    code, _, err = stage_data(run, tmp_path / "out", "--path", tmp_path / "empty.txt")
    assert code == 1 and "empty.txt" in one_line(err)
    assert not (tmp_path / "out" / "records").exists(), "half-written records"


def test_an_empty_directory_as_corpus(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = stage_data(run, tmp_path / "out", "--path", tmp_path / "empty")
    assert code == 1 and "it is empty" in one_line(err)


def test_text_that_is_not_utf8(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Grüße aus Köln.\n".encode("latin-1") * 100)
    code, _, err = stage_data(run, tmp_path / "out", "--path", file)
    assert code == 1 and "latin.txt" in one_line(err) and "UTF-8" in err
    assert not (tmp_path / "out" / "records").exists(), "half-written records"


def test_a_prompt_that_is_not_utf8(run: Run, chat_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"ok \xff")
    code, _, err = run("generate", chat_dir, "--prompt_file", tmp_path / "p.txt")
    assert code == 1 and "not UTF-8 text (byte 0xff at 3)" in one_line(err)


def test_records_that_are_damaged(run: Run, tmp_path: Path) -> None:
    """What a data stage wrote, changed by hand."""
    (tmp_path / "train.jsonl").write_text('{"id": "1", "text": "fine"}\n{"id": "2", "te')
    (tmp_path / "validation.jsonl").write_text('{"id": "1", "text": "fine"}\n')
    code, _, err = run("tokenizer", "--data", tmp_path, "--vocab_size", "300", "--out", tmp_path / "out")
    assert code == 1 and "train.jsonl" in one_line(err)


# Recipes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {data: {}, pretrian: {}}", "did you mean 'pretrain'?"),
        ("stages: {first: {use: pretrian}}", "did you mean 'pretrain'?"),
        ("stages: {data: {txt: x}}", "did you mean 'text'?"),
        ("stages: {pretrain: {fit: {secs: 3}}}", "pretrain.fit: unknown setting 'secs'"),
        ("stages: {pretrain: {fit: {seconds: soon}}}", "seconds"),
        ("stages: {pretrain: {fit: 3}}", "fit"),
        ("stages: {pretrain: 3}", "settings of stage pretrain must be a mapping"),
        ("stages: {sft: {base: reward}, reward: {base: sft}}", "sft, reward wait for each other"),
        ("stages: {sft: {base: sft}}", "wait for each other"),
        ("stages: []", "must be a mapping"),
        ("stages: {}", "at least one stage"),
        ("name: x", "at least one stage"),
        ("stagse: {data: {}}", "did you mean 'stages'?"),
        ("seed: many\nstages: {data: {}}", "seed"),
        ("- a\n- b", "expected a mapping"),
        ("stages: {data: {}", "line"),
        ("", "expected a mapping"),
        ("a: !!python/object/apply:os.system ['true']", "python/object"),
    ],
)
def test_wrong_recipes(
    run: Run, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    code, out, err = run("run", "mine.yaml")
    assert (code, out) == (2, "")
    assert said in one_line(err) and "mine.yaml" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_recipe_that_is_not_utf8(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: caf\xe9\n")
    code, _, err = run("run", tmp_path / "r.yaml")
    assert code == 2 and "r.yaml" in one_line(err)


# How errors end


def test_debug_shows_the_traceback() -> None:
    done = python("-m", "chatwright", "generate", "no/such", "--prompt", "x", "--debug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "load_parts" in done.stderr
    assert "UserError: no model 'no/such'" in done.stderr


def test_debug_works_in_front_and_behind() -> None:
    with pytest.raises(UserError):
        cli.main(["chat", "no/such", "--debug"])
    with pytest.raises(UsageError):
        cli.main(["frobnicate", "--debug"])
    with pytest.raises(UsageError):
        cli.main(["run", "no-such-recipe", "--debug"])


def test_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("chatwright.commands.generate.main", interrupted)
    assert run("generate", "m") == (130, "", "chatwright: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_closed_pipe_is_no_accident(chat_dir: Path) -> None:
    """`chatwright ... | head -1`: the reader has left, nobody wants a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "chatwright",
            "generate",
            str(chat_dir),
            "--prompt",
            "x",
            "--max_new_tokens",
            "9",
        ],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
