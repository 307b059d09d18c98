"""Settings: dataclass <- YAML <- command line, and messages that name the fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from chatwright.config import (
    UsageError,
    UserError,
    build,
    check_keys,
    fail,
    near_match,
    parse,
    read_yaml,
    to_plain,
    to_yaml,
)


@dataclass(frozen=True)
class Inner:
    """Inner settings."""

    rate: float = 0.5
    """A rate."""
    mode: Literal["slow", "fast"] = "slow"
    """A mode."""


@dataclass(frozen=True)
class Outer:
    """Outer settings."""

    steps: int = 3
    """Number of steps."""
    name: str = "x"
    """A name."""
    flag: bool = False
    """A switch."""
    seed: int | None = None
    """A seed."""
    words: list[str] = field(default_factory=list)
    """Words."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    inner: Inner = field(default_factory=Inner)
    """Inner settings."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError("steps must not be negative")


def parsed(*argv: str, **options: Any) -> Outer:
    return parse(Outer, argv, prog="test", **options)[0]


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\nname: from the file\ninner: {rate: 0.25}\n")
    assert parsed() == Outer()
    assert parsed(defaults={"steps": 4}) == Outer(steps=4)
    both = parsed("--config", str(file), "--name", "from the line", defaults={"steps": 4, "flag": True})
    assert both == Outer(5, "from the line", True, inner=Inner(0.25))
    assert parsed("--config", str(file), "--inner.mode=fast").inner == Inner(0.25, "fast")


def test_types() -> None:
    made = parsed(
        "--flag", "true", "--seed", "7", "--words", '["a", "b c"]', "--shape", "{layers: 2}", "--name", "12"
    )
    assert made == Outer(flag=True, seed=7, words=["a", "b c"], shape={"layers": 2}, name="12")
    assert parsed("--seed", "null").seed is None
    assert isinstance(made.inner, Inner)


def test_a_switch_needs_no_value() -> None:
    assert (
        parsed("--flag").flag and parsed("--flag", "true").flag and parsed("--flag=true", "--steps", "1").flag
    )
    assert not parsed("--flag", "false").flag
    made, names = parse(Outer, ["--flag", "m"], prog="t", positionals={"model": "A model."})
    assert made.flag and names == {"model": "m"}
    assert parsed("--flag", "--steps", "1") == Outer(1, flag=True)


def test_positionals() -> None:
    positionals = {"model": "A model.", "other?": "Another."}
    assert parse(Outer, ["m"], prog="t", positionals=positionals) == (Outer(), {"model": "m", "other": None})
    assert parse(Outer, ["m", "o", "--steps", "1"], prog="t", positionals=positionals)[1]["other"] == "o"
    with pytest.raises(UsageError, match="model must be given"):
        parse(Outer, [], prog="t", positionals=positionals)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--step", "3"), "unknown option --step; did you mean --steps?"),
        (("--zzz", "3"), "unknown option --zzz; --help lists the options"),
        (("--inner.rat", "3"), "did you mean --inner.rate?"),
        (("--steps", "many"), "steps"),
        (("--steps", "1.5"), "steps"),
        (("--inner.mode", "warp"), "mode"),
        (("--flag=perhaps",), "flag"),
        (("--steps", "-1"), "steps must not be negative"),
        (("--steps",), "steps"),
        (("stray",), "stray"),
    ],
)
def test_mistakes_on_the_line(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as error:
        parsed(*argv)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["stepps: 3", "inner: {rat: 3}", "steps: many", "[1, 2]", "a: [", "inner: 3"]
)
def test_mistakes_in_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        parsed("--config", str(file))
    assert "\n" not in str(error.value)


def test_a_config_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.yaml"):
        parsed("--config", str(tmp_path / "gone.yaml"))


def test_help_shows_docstrings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--help", description="What it does.")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert (
        "What it does." in out and "Number of steps." in out and "default: 3" in out and "--inner.rate" in out
    )


def test_build_from_a_recipe() -> None:
    assert build(Outer, {"steps": 2, "inner": {"mode": "fast"}}, where="r: s") == Outer(
        2, inner=Inner(mode="fast")
    )
    for values, said in (
        ({"stepz": 1}, "r: s: unknown setting 'stepz'; did you mean 'steps'?"),
        ({"inner": {"rates": 1}}, "r: s.inner: unknown setting 'rates'; did you mean 'rate'?"),
        ({"inner": 3}, "r: s.inner: expected a mapping of settings, found 3"),
        ({"inner": None}, "r: s.inner: expected a mapping"),
        ({"steps": "x"}, "steps"),
        ({"steps": -1}, "steps must not be negative"),
    ):
        with pytest.raises(UsageError) as error:
            build(Outer, values, where="r: s")
        assert said in str(error.value)


def test_unknown_keys() -> None:
    check_keys(["a"], ["a", "b"], where="here")
    with pytest.raises(UsageError, match=r"^here: unknown setting 'alpa'; did you mean 'alpha'\?$"):
        check_keys(["alpha", "alpa"], ["alpha"], where="here")
    assert near_match("zzz", ["alpha", "beta"]) == "; known: alpha, beta"


def test_read_yaml(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("name: 東京\n", encoding="utf-8")
    assert read_yaml(file) == {"name": "東京"}
    for content in (b"a: [", b"\xff\xfe", b"3", b"", b"!!python/name:os.system ''"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"f\.yaml"):
            read_yaml(file)
    with pytest.raises(UsageError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UsageError):
        read_yaml(tmp_path)


def test_to_yaml_is_read_back(tmp_path: Path) -> None:
    made = Outer(
        5, "東京: #1", words=["a"], shape={"p": Path("x/y"), "t": (1, 2)}, inner=Inner(0.125, "fast")
    )
    (tmp_path / "c.yaml").write_text(to_yaml(made), encoding="utf-8")
    plain = read_yaml(tmp_path / "c.yaml")
    assert plain == to_plain(made)
    assert plain["shape"] == {"p": "x/y", "t": [1, 2]}
    assert build(Outer, {**plain, "shape": {}}, where="") == build(
        Outer, {**to_plain(made), "shape": {}}, where=""
    )


def test_fail_is_one_line_and_knows_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(UserError("first\n  second\n"), debug=False) == 1
    assert capsys.readouterr().err == "chatwright: first second\n"
    assert fail(UsageError("x"), debug=False) == 2
    with pytest.raises(UserError):
        fail(UserError("x"), debug=True)
