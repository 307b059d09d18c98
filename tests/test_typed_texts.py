"""A value is what was typed, for every option of every verb and stage; YAML keeps its own meaning, and says
so."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from chatwright import cli, config, discovery, setting_errors, typed_texts
from chatwright.commands._stage import Options, Preview
from chatwright.config import UsageError, build, parse, parse_all, parse_given
from chatwright.recipe import parse_with_recipe, read_recipe
from chatwright.train.stage import stage_of
from support.small_stages import command_line, one_line

TEXTS = (
    *(
        "null",
        "~",
        "1e5",
        "007",
        "true",
        "yes",
        "on",
        "[1, 2]",
        "{}",
        "{a: b}",
        "a: b",
        "2024-11-30",
        " ",
        "",
    ),
    *(
        "'quoted'",
        '"',
        "- item",
        "-5 degrees",
        "-5",
        "-x",
        "# one",
        "a #1",
        "@file",
        "0x10",
        "!!x",
        "%",
        "1_0",
    ),
    *("&a", "*a", "|", ">", "a\nb", "null\n", "--help me", "--", "-", "=", "a=b", "é\t", "text0n0_"),
)


@dataclass(frozen=True)
class Inner:
    """Inner settings."""

    name: str = "x"
    """A name."""


@dataclass(frozen=True)
class Kinds:
    """One setting of each type."""

    text: str = "x"
    """A text."""
    perhaps: str | None = None
    """A text or nothing."""
    path: Path = Path("x")
    """A path."""
    perhaps_path: Path | None = None
    """A path or nothing."""
    listed: list[str] = field(default_factory=list)
    """Texts."""
    pair: tuple[str, ...] = ()
    """Texts."""
    whole: int = 1
    """A number."""
    number: float = 0.5
    """A number."""
    perhaps_number: float | None = None
    """A number or nothing."""
    switch: bool = False
    """A switch."""
    one_of: Literal["a", "null"] = "a"
    """A word."""
    anything: dict[str, Any] = field(default_factory=dict)
    """Settings."""
    inner: Inner = field(default_factory=Inner)
    """More."""


def kinds(*argv: str, **options: Any) -> Kinds:
    return parse(Kinds, argv, prog="chatwright kinds", **options)[0]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["text", "perhaps", "inner.name", "path", "perhaps_path"])
def test_a_text_is_what_was_typed(name: str, text: str) -> None:
    ways = [[f"--{name}={text}"]] + ([] if typed_texts.OPTION.match(text) else [[f"--{name}", text]])
    for argv in ways:
        made = kinds(*argv, "--number", "1e-4")
        found = made.inner.name if name == "inner.name" else getattr(made, name)
        assert found == (Path(text) if "path" in name else text)
        assert made.number == 1e-4


def test_what_is_no_text_is_read_as_before() -> None:
    made = kinds(
        "--whole", "7", "--number", "1e-4", "--perhaps_number", "null", "--switch", "--one_of", "null"
    )
    assert (made.whole, made.number, made.perhaps_number, made.switch, made.one_of) == (
        7,
        1e-4,
        None,
        True,
        "null",
    )
    assert kinds("--anything", "{layers: 2, name: null}").anything == {"layers": 2, "name": None}
    assert kinds("--anything.layers", "2").anything == {"layers": 2}
    assert kinds("--inner", "{name: 'null'}").inner.name == "null"
    assert kinds().perhaps is None


@pytest.mark.parametrize("name", ["listed", "pair"])
def test_texts_of_a_list_are_what_stands_in_it(name: str) -> None:
    for typed, wanted in (
        (
            "[null, 007, 1e5, 'a b', \"# c\", 2024-11-30, on]",
            ["null", "007", "1e5", "a b", "# c", "2024-11-30", "on"],
        ),
        ('["\\n\\n", "THE END"]', ["\n\n", "THE END"]),
        ("[]", []),
    ):
        assert list(getattr(kinds(f"--{name}", typed), name)) == wanted
    for typed in ("null", "3", "abc", "[a", "{a: b}"):
        with pytest.raises(UsageError, match=f"--{name} is .* it must be a list"):
            kinds(f"--{name}", typed)


@pytest.mark.parametrize("text", [one for one in TEXTS if one != "--"])
def test_a_positional_argument_is_what_was_typed(text: str) -> None:
    positionals = {"model": "A model.", "said?": "A text."}
    for argv in (
        ["m", "--text", "null", "--", text],
        *([] if text == "-x" else [["m", text], ["--text", "n", "m", text]]),
    ):
        made, found = parse(Kinds, argv, prog="chatwright kinds", positionals=positionals)
        assert found == {"model": "m", "said": text}
        assert made.text in ("null", "n", "x")


def test_messages_have_the_value_that_was_typed() -> None:
    with pytest.raises(UsageError, match="--whole is '# one'; it must be a whole number"):
        kinds("--text", "null", "--whole", "# one")
    with pytest.raises(UsageError, match=r"^inner\.name is true; it must be a text"):
        kinds("--inner", "{name: on}")
    with pytest.raises(UsageError, match="unexpected 'null': settings are given as --NAME VALUE"):
        kinds("null")
    with pytest.raises(UsageError, match="--text has no value; it must be a text"):
        kinds("--text", "--whole", "3")


# ---- every verb --------------------------------------------------------------------------------------------


class _Seen(Exception):
    """What a command asks of `parse`."""


def modules() -> Iterator[tuple[str, ModuleType]]:
    for name, verb in discovery.commands().items():
        yield name, importlib.import_module(verb.module)


def settings_of(name: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """The settings and positional arguments of a command, as it gives them to `parse`."""
    seen: list[Any] = []

    def record(cls: Any, argv: Sequence[str], **options: Any) -> Any:
        seen.append((cls, options.get("positionals") or {}))
        raise _Seen

    monkeypatch.setattr(module, "parse", record)
    with pytest.raises(_Seen):
        module.main(["x"])
    return seen[0]


COMMANDS = [name for name, module in modules() if hasattr(module, "parse")]
STAGES = list(discovery.stages())
BESIDE = {"held_out_annotators": ("--comparisons", "x")}
"""Settings that need another one -> that."""
SOME = ("null", "# one", "1e5", "2024-11-30", "[1, 2]", "on", "007", "-5 degrees", "")


def parsed_or_refused(classes: Sequence[Any], argv: list[str], prog: str) -> tuple[list[Any], str]:
    """The settings, or what is said against them."""
    try:
        return parse_all(classes, argv, prog, "")[0], ""
    except UsageError as error:
        return [], str(error)


def check_texts(classes: Sequence[Any], prog: str) -> int:
    """Give each text setting of the classes each text, and look at what arrives. A class may refuse a text,
    if its message has it as it was typed. Returns how many settings there are."""
    parser = config.make_parser(prog, "")
    for cls in classes:
        parser.add_class_arguments(cls, nested_key=None, fail_untyped=False)
    names = [name for name, hint in setting_errors.hints(parser).items() if typed_texts.is_text(hint)]
    for name in names:
        for text in SOME:
            made, refused = parsed_or_refused(classes, [f"--{name}", text, *BESIDE.get(name, ())], prog)
            if refused:
                assert repr(text) in refused or f" {text}" in refused, (name, text, refused)
                continue
            found: Any = next(one for one in made if hasattr(one, name.partition(".")[0]))
            for part in name.split("."):
                found = getattr(found, part)
            assert str(found) == text, (name, text)
    return len(names)


def test_the_options_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"chat", "generate", "serve", "export", "import", "compare", "key", "doctor"} <= set(COMMANDS)
    counted = 0
    for name, module in modules():
        if name in COMMANDS:
            cls, positionals = settings_of(name, module, monkeypatch)
            counted += check_texts([cls], f"chatwright {name}")
            first = [f"{n}" for n, one in enumerate(positionals) if not one.endswith("?")]
            for text in SOME if positionals else ():
                given = [*first[:-1], text] if first else [text]
                with_texts = _defaults(cls)
                _, found = parse(cls, [*given, *with_texts], prog=name, positionals=positionals)
                values = [
                    one for value in found.values() for one in (value if isinstance(value, list) else [value])
                ]
                assert text in values
    assert counted > 10


def _defaults(cls: Any) -> list[str]:
    """Values of the settings of a command that have no default."""
    return ["--format", "hf"] if cls.__name__ == "ExportConfig" else []


@pytest.mark.parametrize("name", STAGES)
def test_the_options_of_every_stage(name: str) -> None:
    stage = stage_of(discovery.stages()[name].load())
    classes = [stage.config, Options, *([Preview] if stage.preview else [])]
    assert check_texts(classes, f"chatwright {name}") >= 2  # --out, and something of its own


def test_the_options_of_a_recipe_s_stages() -> None:
    for text in SOME:
        argv = ["tiny", "--data.path", text, "--sft.base", text, "--out", text or "runs"]
        settings, _, recipe = parse_with_recipe(_run_config(), argv, prog="chatwright run", description="")
        assert recipe.stages["data"].config.path == text and recipe.stages["sft"].config.base == text
        assert settings.out == (text or "runs")


def _run_config() -> Any:
    from chatwright.commands.run import RunConfig

    return RunConfig


def test_only_what_is_given_is_given() -> None:
    parser = config.make_parser("t", "")
    parser.add_class_arguments(Kinds, nested_key="some", fail_untyped=False)
    assert parse_given(parser, ["--some.text", "null", "--some.number", "1e-4"]) == {
        "some": {"text": "null", "number": 1e-4}
    }


# ---- YAML --------------------------------------------------------------------------------------------------

QUOTED = (
    'text: "null"\nperhaps: "~"\nlisted: ["null", "007"]\npath: "on"\ninner: {name: "# one"}\nnumber: 1e-4\n'
)


def test_what_is_quoted_in_yaml_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(QUOTED)
    made = kinds("--config", str(file))
    assert made == kinds(f"--config={file}") == build(Kinds, config.read_yaml(file), where="r")
    assert (made.text, made.perhaps, made.listed, made.path) == ("null", "~", ["null", "007"], Path("on"))
    assert made.inner.name == "# one" and made.number == 1e-4
    file.write_text("perhaps: null\nperhaps_path:\n")
    assert kinds("--config", str(file)) == Kinds()
    assert kinds("--config", str(file), "--perhaps", "null").perhaps == "null"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "text: on",
            "text is true; it must be a text: without quotes, YAML reads this as true or false (and so",
        ),
        ("text: no", "text: 'false'"),
        (
            "text: 007",
            "text is 7; it must be a text: without quotes, YAML reads this as a number; write it as you",
        ),
        (
            "text: 2024-11-30",
            "text is 2024-11-30; it must be a text: without quotes, YAML reads this as a date",
        ),
        ("text:", "text is null; it must be a text: an empty one is written ''"),
        ("text: [a]", "text is ['a']; it must be a text: put it in quotes"),
        ("path: off", "path is false; it must be a text"),
        ("perhaps: 3", "perhaps is 3; it must be a text"),
        ("listed: [a, 1]", "listed is 1; it must be a text"),
        ("inner: {name: yes}", "inner.name is true; it must be a text: without quotes"),
    ],
)
def test_what_yaml_reads_as_something_else_is_an_error(tmp_path: Path, written: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(written)
    for call in (
        lambda: kinds("--config", str(file)),
        lambda: build(Kinds, config.read_yaml(file), where="r: s"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert said in str(error.value) and str(error.value).startswith((str(file), "r: s"))


def test_recipes_say_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    for text, said in (
        ("stages: {data: {path: on}}", "r.yaml: data: path is true; it must be a text"),
        ("name: 007\nstages: {data: {}}", "r.yaml: name is 7; it must be a text"),
        ("prompt: null\nstages: {data: {}}", "r.yaml: prompt is null; it must be a text"),
    ):
        file.write_text(text)
        code, _, err = command_line(capsys)("run", file)
        assert code == 2 and said in one_line(err)
    file.write_text("prompt: 'null'\nstages: {data: {path: 'on'}}")
    recipe = read_recipe(file, {})
    assert recipe.prompt == "null" and recipe.stages["data"].config.path == "on"


def test_a_folder_called_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("on", "007", "a #1", "null"):
        (tmp_path / name).mkdir()
        for n in range(30):
            (tmp_path / name / f"{n}.txt").write_text(f"text {n}")
        assert cli.main(["data", "--path", name, "--validation", "0.3", "--out", f"{name}.out"]) == 0
        assert (tmp_path / f"{name}.out" / "records" / "train.jsonl").is_file()
    capsys.readouterr()
