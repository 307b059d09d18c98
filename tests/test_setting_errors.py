"""Wrong settings, as the person reads about them: the setting, the value, what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from chatwright import cli
from chatwright.setting_errors import near_option, wanted
from support.small_stages import command_line, one_line

FOREIGN = (
    "Parser key",
    "<class",
    "typing.",
    "Traceback",
    "NoneType",
    "__init__",
    "Expected a",
    "codec",
    "Errno",
)
"""Words of libraries, which no message has."""

MISTAKES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("sft", "--fit.steps", "many"), "--fit.steps is 'many'; it must be a whole number"),
    (("sft", "--fit.steps", "1.5"), "--fit.steps is '1.5'; it must be a whole number"),
    (("sft", "--fit.steps", "true"), "--fit.steps is true; it must be a whole number"),
    (("sft", "--fit.steps", "null"), "--fit.steps is null; it must be a whole number"),
    (("sft", "--fit.steps="), "--fit.steps is empty; it must be a whole number"),
    (("sft", "--fit.steps"), "--fit.steps has no value; it must be a whole number"),
    (("sft", "--fit.steps", "--out", "x"), "--fit.steps has no value; it must be a whole number"),
    (("sft", "--fit.steps", "3", "--fit.steps", "x"), "--fit.steps is 'x'; it must be a whole number"),
    (("sft", "--optim.learning_rate", "fast"), "--optim.learning_rate is 'fast'; it must be a number"),
    (("sft", "--optim.schedule", "zigzag"), "it must be one of constant, linear, cosine, trapezoid"),
    (("sft", "--packing", "perhaps"), "--packing is 'perhaps'; it must be true or false"),
    (("sft", "--packing=perhaps"), "--packing is 'perhaps'; it must be true or false"),
    (("sft", "--fit", "3"), "--fit is a group of settings, which are given one by one, for example --fit."),
    (("sft", "--fit", "{steps: many}"), "--fit.steps is 'many'; it must be a whole number"),
    (("sft", "--fit", "{stepz: 3}"), "unknown option --fit.stepz; did you mean --fit.steps?"),
    (("sft", "--fit.stepz", "3"), "unknown option --fit.stepz; did you mean --fit.steps?"),
    (("sft", "--fitt.steps", "3"), "unknown option --fitt.steps; did you mean --fit.steps?"),
    (("sft", "--Fit.Steps", "3"), "did you mean --fit.steps?"),
    (("sft", "--rank", "8"), "unknown option --rank; did you mean --lora.rank?"),
    (("sft", "--learning-rate", "1"), "unknown option --learning-rate; did you mean --optim.learning_rate?"),
    (("sft", "--zzz", "1"), "unknown option --zzz; --help lists the options"),
    (("sft", "stray", "words"), "unexpected 'stray': settings are given as --NAME VALUE"),
    (("sft", "-x"), "unknown option -x; options begin with two dashes"),
    (("sft", "--base"), "--base has no value; it must be a text"),
    (("sft", "--config"), "--config has no value; it must be a YAML file"),
    (("sft", "--config", "none.yaml"), "none.yaml does not exist"),
    (("sft", "--report.to", "paper"), "--report.to is 'paper'; it must be one of none, tensorboard"),
    (("data", "--broken", "maybe"), "--broken is 'maybe'; it must be one of refuse, skip"),
    (("pretrain", "--model", "3"), "--model is '3'; it must be a mapping such as '{key: value}'"),
    (("pretrain", "--model", "{layers: 2"), "it must be a mapping such as '{key: value}'"),
    (("generate", "m", "--stop", "3"), """--stop is '3'; it must be a list such as '["one", "two"]'"""),
    (("generate", "m", "--seed", "x"), "--seed is 'x'; it must be a whole number or null for none"),
    (
        ("generate", "m", "one", "two"),
        "unexpected 'two': settings are given as --NAME VALUE; a value with spaces",
    ),
    (("generate",), "model must be given; chatwright generate --help"),
    (("export", "m"), "directory and --format must be given"),
    (("export", "m", "d", "--format", "onnx"), "--format is 'onnx'; it must be one of hf, gguf"),
    (("serve", "m", "--port", "http"), "--port is 'http'; it must be a whole number"),
    (("run", "tiny", "--ppo.iterations", "many"), "--ppo.iterations is 'many'; it must be a whole number"),
    (("run", "tiny", "--pp.iterations", "3"), "did you mean --ppo.iterations?"),
    (("run", "tiny", "--ppo.fit.steps", "3"), "unknown option --ppo.fit.steps; --help lists the options"),
    (("run", "tiny", "--ppo", "3"), "--ppo is a group of settings"),
    (("plan", "tiny", "--sft.fit.steps", "x"), "--sft.fit.steps is 'x'; it must be a whole number"),
    (("plan", "sft", "--lora.rank", "x"), "--lora.rank is 'x'; it must be a whole number"),
)


@pytest.mark.parametrize(("argv", "said"), MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_wrong_option(
    argv: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command_line(capsys)(*argv)
    told = one_line(err)
    assert code == 2 and said in told
    assert not any(word in told for word in FOREIGN)
    assert not list(tmp_path.iterdir())


FILES: tuple[tuple[bytes, str], ...] = (
    (b"fit: {steps: many}", "c.yaml: fit.steps is 'many'; it must be a whole number"),
    (b"fitt: {steps: 3}", "c.yaml: unknown setting 'fitt'; did you mean 'fit'?"),
    (b"fit: {stepz: 3}", "c.yaml: unknown setting 'stepz'; did you mean 'steps'?"),
    (b"fit: 3", "c.yaml: fit: expected a mapping of settings, found 3"),
    (b"use: reward", "c.yaml has the settings of the stage reward, not of sft"),
    (b"- 3", "c.yaml: expected a mapping of settings"),
    (b"", "c.yaml: expected a mapping of settings"),
    (b"base: caf\xe9", "c.yaml:1: not UTF-8"),
    (b"fit: {steps: 3", "c.yaml:1: not valid YAML"),
)


@pytest.mark.parametrize(("content", "said"), FILES)
def test_a_wrong_file_of_settings(
    content: bytes,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(content)
    for given in (("--config", "c.yaml"), ("--config=c.yaml",)):
        code, _, err = command_line(capsys)("sft", *given)
        told = one_line(err)
        assert code == 2 and said in told
        assert not any(word in told for word in FOREIGN)


def test_a_stage_takes_its_own_config_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("use: sft\nbase: gone\nfit: {steps: 3}\n")
    out = tmp_path / "sft"
    code, _, err = command_line(capsys)(
        "sft", "--config", tmp_path / "config.yaml", "--out", out, "--data", tmp_path
    )
    assert code == 1 and "its setting base is 'gone'" in one_line(err)


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (int | None, "a whole number or null for none"),
        (Literal["a", "b"], "one of a, b"),
        (tuple[float, float], "a list of 2 such as '[0.5, 1.0]'"),
        (tuple[str, ...], """a list such as '["one", "two"]'"""),
        (list[int], "a list such as '[1, 2]'"),
        (dict[str, Any], "a mapping such as '{key: value}'"),
        (bool, "true or false"),
    ],
)
def test_types_in_words(hint: Any, said: str) -> None:
    assert wanted(hint) == said


def test_the_nearest_option_is_in_the_same_stage() -> None:
    options = ["sft.fit.steps", "ppo.optim.eps", "ppo.iterations", "pretrain.fit.steps"]
    assert near_option("pretrain.fit.step", options) == "pretrain.fit.steps"
    assert near_option("steps", options) == "sft.fit.steps"
    assert near_option("ppo.iteration", options) == "ppo.iterations"
    assert near_option("ppo.fit.steps", options) is None


def test_every_verb_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb with an option that there is none of: one line, and its own words."""
    for verb in cli.verbs():
        code, _, err = command_line(capsys)(verb, "--no_such_option", "1")
        told = one_line(err)
        assert code == 2 and not any(word in told for word in FOREIGN), told
