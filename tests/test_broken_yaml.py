"""A mistake in a recipe or a --config file: file, line, and what is probably wrong, as the person sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatwright import broken_yaml, cli
from chatwright.config import UsageError, read_yaml

MISTAKES = [
    ("name: x\nstages:\n\tdata: {}\n", 3, "a tab stands here; YAML is indented with spaces"),
    (
        "stages:\n  sft:\n    base:smollm2\n    data: x\n",
        3,
        "a space belongs behind the colon: `base: smollm2`",
    ),
    ("stages:\n  sft:\n    base:smollm2\n", 0, "a space belongs behind the colon: `base: smollm2`"),
    ("stages:\n  sft:\n    fit:{steps: 3}\n", 0, "a space belongs behind the colon: `fit: {steps`"),
    ("stages:\n  data: {}\n   sft: {}\n", 3, "indentation fits none of the lines above"),
    ("name: x\n  seed: 3\n", 2, "indented deeper than the one above"),
    ("stages:\n    data: {}\n  sft: {}\n", 3, "indentation fits none of the lines above"),
    ("stages: {data: {}\nseed: 3\n", 2, "the bracket { that opens in line 1, column 9 is not closed"),
    ("stages: [data, sft\nseed: 3\n", 2, "the bracket [ that opens in line 1, column 9 is not closed"),
    ("prompt: 'Hi\nstages: {}\n", 3, "the quote that opens in line 1, column 9 is not closed"),
    ("prompt: 'it's fine'\n", 1, "a quote inside single quotes is written twice"),
    ("prompt: Answer: yes\n", 1, "a text that holds a colon and a space stands in quotes"),
    ("name: x\nstages\nseed: 3\n", 2, "'stages' has no colon"),
    ("name: x\nseed: 3\nname: y\n", 3, "the key 'name' stands here for the second time (first in line 1)"),
    ("stages:\n  sft: {fit: {steps: 1}, fit: {steps: 2}}\n", 2, "the key 'fit' stands here for the second"),
    ("stages:\n  ppo: *base\n", 2, "undefined alias 'base'"),
    ("prompt: @home\n", 1, "put the text in quotes"),
    ('prompt: "C:\\data"\n', 1, "single quotes take it as it is"),
    ("name: x\n---\nname: y\n", 2, "a second document begins here"),
    ("name: x}\nstages: ]\n", 2, "found ']'"),
]


@pytest.mark.parametrize(("text", "line", "said"), MISTAKES)
def test_a_recipe_with_a_mistake(
    text: str, line: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert cli.main(["run", str(file)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    if line:
        assert f"mine.yaml:{line}: not valid YAML at column" in err


@pytest.mark.parametrize("given", ["--config FILE", "--config=FILE"])
def test_a_config_file_with_a_mistake(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: smollm2\nfit:\n\tsteps: 3\n")
    assert cli.main(["sft", *given.replace("FILE", str(file)).split()]) == 2
    err = capsys.readouterr().err
    assert "mine.yaml:3: not valid YAML at column 1: a tab stands here" in err and err.count("\n") == 1
    file.write_text("base:smollm2\n")
    assert cli.main(["sft", *given.replace("FILE", str(file)).split()]) == 2
    assert "mine.yaml: expected a mapping of settings, found 'base:smollm2'; a space belongs" in (
        capsys.readouterr().err
    )


def test_encodings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("name: x\nprompt: café\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"mine\.yaml:2: not UTF-8: byte 0xe9 at offset 19; save"):
        read_yaml(file)
    file.write_bytes("name: x\n".encode("utf-16"))
    with pytest.raises(UsageError, match=r"mine\.yaml:1: not UTF-8: byte 0xff at offset 0"):
        read_yaml(file)
    file.write_bytes("name: x\n".encode("utf-16-le"))
    with pytest.raises(UsageError, match=r"mine\.yaml:1: .*U\+0000 cannot stand in YAML: is the file UTF-16"):
        read_yaml(file)
    file.write_bytes("\ufeffname: x\n".encode())
    assert read_yaml(file) == {"name": "x"}


def test_what_is_right_is_read_as_before() -> None:
    text = "a: &one {b: 1, c: [2, 3]}\nd: {<<: *one, b: 4}\ne: {<<: *one, c: 5}\n"
    assert broken_yaml.load(text)["d"] == {"b": 4, "c": [2, 3]}
    assert broken_yaml.load("base: hf:owner/name\n") == {"base": "hf:owner/name"}
    assert broken_yaml.load("") is None
    assert broken_yaml.glued_colon("https://x") == broken_yaml.glued_colon("a: b") == ""
