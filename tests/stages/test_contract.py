"""What every stage must have, asked of all of them: whoever adds one reads here what is missing."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from chatwright import cli, discovery
from chatwright.config import UsageError, build, rename_settings
from chatwright.model.config import GPTConfig
from chatwright.recipe import input_names, read_recipe
from chatwright.train.planning.plan import predict
from chatwright.train.planning.program import PlannedStage
from chatwright.train.stage import Stage, stage_of

ROOT = Path(__file__).parents[2]
STAGES = list(discovery.stages())
KINDS = {"text", "dialogues", "ratings", "comparisons"}
TINY = GPTConfig.preset("modern-nano", vocab_size=512, layers=2)


def load(name: str) -> Stage:
    """The STAGE of a stage's file."""
    return stage_of(discovery.stages()[name].load())


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The docstring below each field of a dataclass, inherited ones included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(inspect.getsource(owner)).body
        assert isinstance(body, ast.ClassDef)
        for line, below in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                found[line.target.id] = str(below.value.value) if told else ""  # type: ignore[union-attr]
    return found


def setting(config: Any, path: str) -> Any:
    """A field by its dotted path. Raises AttributeError."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.fixture(params=[*STAGES, "mini_dpo"])
def name(request: pytest.FixtureRequest) -> str:
    """Each stage in turn; the last one is brought by the package in tests/extension."""
    if request.param not in STAGES:
        request.getfixturevalue("extension")
    return str(request.param)


def test_the_file_ends_with_its_stage(name: str) -> None:
    module = discovery.stages()[name].load()
    assert stage_of(module).config is module.Config and stage_of(module).run is module.run
    last = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.Assign) and ast.unparse(last.targets[0]) == "STAGE"
    assert module.Config.__module__ == module.__name__


def test_the_file_reads_in_the_order_of_the_contract(name: str) -> None:
    """Config, step, run, STAGE; `run` fits on a page."""
    file = Path(str(discovery.stages()[name].load().__file__))
    tree, text = ast.parse(file.read_text(encoding="utf-8")), file.read_text(encoding="utf-8")
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    order = [part for part in ("Config", "step", "run") if part in defined]
    assert order == sorted(order, key=lambda part: defined[part].lineno)
    run = defined["run"]
    assert (run.end_lineno or 0) - run.lineno < 35, "run says what happens; helpers say how"
    assert text.count("\n") < 400


def test_settings_are_frozen_and_explained(name: str) -> None:
    config = load(name).config
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    docs = field_docs(config)
    missing = [field.name for field in dataclasses.fields(config) if not docs.get(field.name)]
    assert not missing, f"{name}: no help for {', '.join(missing)}"


def test_inputs_are_declared_and_texts(name: str) -> None:
    config = load(name).config
    inputs = [field for field in dataclasses.fields(config) if field.metadata.get("input")]
    hints = typing.get_type_hints(config)
    assert all(hints[field.name] is str for field in inputs)
    words = {word for field in inputs for word in field.metadata.get("words", ())}
    named = input_names(config())
    assert not words & {*named}
    assert name == "data" or inputs, f"{name} needs no other stage"
    for field in dataclasses.fields(config):
        takes_a_stage = hints[field.name] is str and field.default in STAGES
        assert not takes_a_stage or field.metadata.get("input"), f"{name}.{field.name} names a stage"


def test_a_stage_with_an_optimiser_can_be_planned(name: str) -> None:
    """Its step is built and run on fake tensors, so that a plan that cannot be is found here."""
    stage = load(name)
    config = stage.config()
    assert (stage.plan is None) == (not hasattr(config, "optim"))
    if stage.plan is None:
        return
    planned = PlannedStage(name, stage.plan, TINY, config)
    plan, operations = predict(planned, micro=1)
    assert plan.parameters > 0 and plan.flop > 0 and operations
    assert min(plan.memory.get(part, 0.0) for part in ("weights", "optimiser")) > 0
    rows, length = planned.rows
    assert rows >= 1 and length >= 1


def test_settings_of_papers_exist(name: str) -> None:
    stage = load(name)
    for paper in stage.paper:
        assert paper.source, paper.setting
        assert paper.ours is not None or setting(stage.config(), paper.setting) is not None


def test_former_settings_are_read(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In a recipe and on the command line, with one line that names the new one."""
    stage = load(name)
    plain = stage.config()
    for old, new in stage.renamed.items():
        value = setting(plain, new)
        assert not hasattr(plain, old), f"{name}.{old} is a setting still"
        given = {old: value}
        assert build(stage.config, rename_settings(given, stage.renamed, where=name), where=name) == plain
        told = f"{old} is called {new} now; the former name is read until version 0.3\n"
        assert capsys.readouterr().err == f"{name}: {told}"
        file = tmp_path / "old.yaml"
        file.write_text(f"stages:\n  it: {{use: {name}, {old}: {json.dumps(value)}}}\n", encoding="utf-8")
        assert setting(read_recipe(file, {}).stages["it"].config, new) == value
        assert capsys.readouterr().err == f"{file}: it: {told}"
        read_recipe(file.with_name("old.yaml"), {"it": {}})
        assert capsys.readouterr().err.count(told) == 1
        with pytest.raises(UsageError, match=f"{old} is the former name of {new}; give {new} alone"):
            rename_settings({old: value, new: value}, stage.renamed, where=name)


def test_what_it_reads_has_known_kinds_and_comes_from_an_input(name: str) -> None:
    stage = load(name)
    config = stage.config()
    inputs = [
        getattr(config, field.name) for field in dataclasses.fields(config) if field.metadata.get("input")
    ]
    for kind, source in stage.reads(config).items():
        assert kind in KINDS and source in inputs


def test_a_preview_of_nothing_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main([name, "--preview", "0"])
    err = capsys.readouterr().err
    assert code == 2 and list(tmp_path.iterdir()) == []
    if load(name).preview is None:
        assert "unknown option --preview" in err
    else:
        assert "--preview 0 is not a whole number above 0" in err


def test_the_first_line_is_its_help(name: str) -> None:
    module = discovery.stages()[name]
    line = discovery.first_line(Path(str(importlib.import_module(module.module).__file__)))
    assert len(f'"""{line}') <= 110 and line.endswith((".", "?"))
    bare = re.sub("[^a-z]", "", line.lower())
    assert bare.startswith(name.replace("_", "")), f"{name}: the first line begins with the stage's name"


def test_the_help_of_all_verbs_fits_a_hundred_columns() -> None:
    assert max(map(len, cli.usage().splitlines())) <= 100


@pytest.mark.parametrize("name", STAGES)
def test_the_documents_have_it(name: str) -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert re.search(f"^#+ {name}$", text, re.MULTILINE), "make docs"


def test_former_names_of_stages_tell_the_new_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for old, new in discovery.RENAMED.items():
        assert old not in discovery.stages() and new in discovery.stages()
        told = f"{old} is called {new} now; the former name is read until version 0.3\n"
        with pytest.raises(SystemExit) as stop:
            cli.main([old, "--help"])
        shown = capsys.readouterr()
        assert (stop.value.code, shown.err) == (0, f"chatwright: {told}") and f"chatwright {new}" in shown.out
        file = tmp_path / "old.yaml"
        file.write_text(f"stages:\n  {old}: {{}}\n  other: {{use: {old}}}\n", encoding="utf-8")
        assert {stage.verb for stage in read_recipe(file, {}).stages.values()} == {new}
        assert capsys.readouterr().err == f"{file}: {old}: {told}{file}: other: {told}"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("best-of-n", None),
        ("pretrian", "no verb is called 'pretrian'; did you mean 'pretrain'?"),
        ("best-off-n", "no verb is called 'best-off-n'; did you mean 'best_of_n'?"),
    ],
)
def test_names_with_hyphens_and_near_matches(
    word: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if said is not None:
        assert cli.main([word]) == 2
        assert capsys.readouterr().err == f"chatwright: {said}\n"
        with pytest.raises(UsageError, match="did you mean"):
            discovery.stage_verb(word)
        return
    with pytest.raises(SystemExit) as stop:
        cli.main([word, "--help"])
    assert (stop.value.code, capsys.readouterr().err) == (0, "")
