"""Recipes and their stages: order, overrides, what is skipped, what is run again, what is moved aside."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chatwright import discovery, pipeline
from chatwright.commands import _stage
from chatwright.commands.run import RunConfig, what_next
from chatwright.commands.run import main as main_run
from chatwright.config import UsageError, UserError
from chatwright.files import read_json, write_json
from chatwright.pipeline import fingerprint, run_recipe
from chatwright.recipe import RecipeStage, find_recipe, find_stage, parse_with_recipe, read_recipe
from chatwright.train.stage import Stage
from chatwright.train.stopping import Interrupted
from chatwright.train.workspace import Measure, Report, Workspace

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class First:
    """A stage without inputs."""

    size: int = 1
    """A number."""
    label: str = ""
    """A word."""


@dataclass(frozen=True)
class Second:
    """A stage that needs another."""

    source: str = field(default="one", metadata={"input": True})
    """The stage to start from."""
    fail: str = ""
    """How to end: error, interrupt, or well."""
    extra: str = field(default="", metadata={"input": True, "words": ("",)})
    """A stage that it can do without."""


@dataclass
class Ran:
    """Which stages ran, in order."""

    stages: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Two small verbs, `first` and `second`, that note when they run."""
    log = Ran()

    def run_first(config: First, workspace: Workspace) -> Report:
        log.stages.append(workspace.directory.name)
        log.seeds.append(workspace.seed)
        (workspace.directory / "made.txt").write_text(str(config.size))
        return Report(
            measures=[Measure("size", None, float(config.size))],
            facts={"sample": "a sample", "size": config.size},
        )

    def run_second(config: Second, workspace: Workspace) -> Report:
        log.stages.append(workspace.directory.name)
        if config.fail == "error":
            raise UserError("it failed")
        if config.fail == "interrupt":
            raise Interrupted("saved at step 3")
        made = (workspace.resolve(config.source) / "made.txt").read_text()
        return Report(measures=[Measure("made", None, float(made), note="of the other")])

    for name, config, run in (("first", First, run_first), ("second", Second, run_second)):
        module = ModuleType(f"stage_{name}", doc="A stage for tests.")
        module.STAGE = Stage(config=config, run=run, plan=None)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"stage_{name}", module)
        monkeypatch.setitem(discovery.stages(), name, discovery.Verb(name, f"stage_{name}"))
    return log


Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, ran: Ran) -> Write:
    """Writes a recipe."""

    def write_recipe(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return file

    return write_recipe


TWO = "name: two\nseed: 9\nprompt: Hello?\nstages:\n  other: {use: second}\n  one: {use: first, size: 4}\n"


def test_stages_come_after_those_they_need(write: Write, ran: Ran, tmp_path: Path) -> None:
    recipe = read_recipe(write(TWO), {})
    assert (recipe.name, recipe.seed, recipe.prompt) == ("two", 9, "Hello?")
    assert list(recipe.stages) == ["one", "other"]  # written the other way round
    results = run_recipe(recipe, tmp_path / "run")
    assert ran.stages == ["one", "other"] and ran.seeds == [9]
    assert results["other"]["measures"][0]["after"] == 4.0
    assert results["one"]["sample"] == "a sample" and results["one"]["facts"] == {"size": 4}
    assert [results[name]["seed"] for name in ("one", "other")] == [9, 9]
    assert (
        results["other"]["inputs"] == {"one": results["one"]["fingerprint"]}
        and results["one"]["inputs"] == {}
    )
    assert results["one"]["cost"]["seconds"] == results["one"]["seconds"] and "paper" not in results["one"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| one | size | - | 4.000 |" in report and "| other | made (of the other) | - | 4.000 |" in report
    assert "- **one**: a sample" in report
    assert "size: 4" in (tmp_path / "run" / "one" / "config.yaml").read_text()


def test_what_is_finished_is_skipped_with_a_line(
    write: Write, ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(write(TWO), {})
    first = run_recipe(recipe, tmp_path / "run")
    capsys.readouterr()
    assert run_recipe(recipe, tmp_path / "run") == first
    assert ran.stages == ["one", "other"]
    told = capsys.readouterr().out
    assert (
        "[one] finished before" in told and "[other] finished before" in told and told.count("skipped") == 2
    )


def test_a_changed_setting_runs_the_stage_and_those_behind_it_again(
    write: Write, ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = write(TWO), tmp_path / "run"
    run_recipe(read_recipe(file, {}), root)
    results = run_recipe(read_recipe(file, {"one": {"size": 7}}), root)
    assert ran.stages == ["one", "other"] * 2
    assert results["other"]["measures"][0]["after"] == 7.0
    # what was there is kept beside it
    assert (root / "one.old-1" / "made.txt").read_text() == "4" and (
        root / "other.old-1" / "result.json"
    ).is_file()
    assert "settings or inputs have changed" in capsys.readouterr().out
    # and back again: the older results are not found again, they are old
    run_recipe(read_recipe(file, {}), root)
    assert (root / "one.old-2" / "made.txt").read_text() == "7"
    assert (root / "one" / "made.txt").read_text() == "4"


def test_a_change_at_the_end_leaves_the_beginning_alone(write: Write, ran: Ran, tmp_path: Path) -> None:
    file = write(TWO)
    run_recipe(read_recipe(file, {}), tmp_path / "run")
    run_recipe(read_recipe(file, {"other": {"fail": "well"}}), tmp_path / "run")
    assert ran.stages == ["one", "other", "other"]
    assert not (tmp_path / "run" / "one.old-1").exists()


def test_another_seed_is_another_run(write: Write, ran: Ran, tmp_path: Path) -> None:
    recipe = read_recipe(write(TWO), {})
    run_recipe(recipe, tmp_path / "run")
    run_recipe(replace(recipe, seed=10), tmp_path / "run")
    assert ran.seeds == [9, 10]


def test_a_failed_stage_is_tried_again_and_no_result_is_left(write: Write, ran: Ran, tmp_path: Path) -> None:
    file, root = write(TWO), tmp_path / "run"
    recipe = read_recipe(file, {"other": {"fail": "error"}})
    for _ in range(2):
        with pytest.raises(UserError, match="it failed"):
            run_recipe(recipe, root)
    assert ran.stages == ["one", "other", "other"]
    assert not (root / "other" / "result.json").exists()
    assert not (root / "other.old-1").exists()  # begun with the same settings: it goes on in place
    assert "other" not in (root / "report.md").read_text()


def test_the_time_of_interrupted_attempts_is_counted(
    write: Write, ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, root = read_recipe(write(TWO), {"other": {"fail": "interrupt"}}), tmp_path / "run"
    now = [1000.0]
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: now[0])
    second = sys.modules["stage_second"]
    run = second.STAGE.run

    def slow(config: Second, workspace: Workspace) -> Report:
        now[0] += 5.0
        return run(config, workspace)  # type: ignore[no-any-return]

    monkeypatch.setattr(second, "STAGE", replace(second.STAGE, run=slow))
    for _ in range(2):
        with pytest.raises(Interrupted):
            run_recipe(recipe, root)
        now[0] += 100.0  # between the attempts
    assert read_json(root / "other" / "clock.json")["seconds"] == pytest.approx(10.0)


def test_until(write: Write, ran: Ran, tmp_path: Path) -> None:
    recipe = read_recipe(write(TWO), {})
    assert list(run_recipe(recipe, tmp_path / "run", until="one")) == ["one"]
    with pytest.raises(UsageError, match="did you mean 'other'"):
        run_recipe(recipe, tmp_path / "run", until="othr")


def test_the_fingerprint_depends_on_everything_that_matters(ran: Ran, tmp_path: Path) -> None:
    def mark(config: Any = Second(), verb: str = "second", seed: int = 1, before: str = "a") -> str:
        write_json(tmp_path / "one" / "result.json", {"fingerprint": before})
        return fingerprint(RecipeStage("s", verb, config), seed, {"one": tmp_path / "one"})

    marks = [mark(), mark(Second(fail="x")), mark(verb="first"), mark(seed=2), mark(before="b")]
    assert len(set(marks)) == 5 and mark() == marks[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {one: {use: first, sise: 2}}", "sise.*did you mean 'size'"),
        ("stages: {one: {use: first, size: many}}", "one"),
        ("stages: {one: {use: frist}}", "no stage is called 'frist'.*'first'"),
        ("stages: {one: 3}", "must be a mapping"),
        ("stages: {}", "at least one stage"),
        ("name: x", "at least one stage"),
        ("stage: {one: {use: first}}", "unknown setting 'stage'.*'stages'"),
        ("stages: {a: {use: second, source: b}, b: {use: second, source: a}}", "a, b wait for each other"),
        ("stages: {one: {use: first}}\nseed: many", "seed"),
        ("stages: {one: {use: first}}\nseed: -4", "seed"),
        ("[1, 2]", "expected a mapping"),
        ("stages: {one: [", "recipe.yaml"),
    ],
)
def test_mistakes_in_a_recipe_are_named(write: Write, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_recipe(write(text), {})


WHEN = """
stages:
  one: {use: first, label: ""}
  other: {use: second, extra: third}
  third: {use: second, when: one.label}
"""


def test_a_stage_with_a_condition_is_left_out_until_its_setting_is_given(
    write: Write, ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(WHEN)
    recipe = read_recipe(file, {})
    assert list(recipe.stages) == ["one", "other"] and recipe.stages["other"].config.extra == ""
    run_recipe(recipe, tmp_path / "run")
    assert ran.stages == ["one", "other"]
    told = capsys.readouterr().out
    assert "[third] no part of this run: there is no one.label (give --one.label FILE)" in told
    whole = read_recipe(file, {"one": {"label": "x"}})
    assert list(whole.stages) == ["one", "third", "other"] and not whole.left_out
    assert whole.stages["other"].config.extra == "third"


def test_conditions_that_make_no_sense_are_named(write: Write) -> None:
    file = write(WHEN)
    with pytest.raises(UsageError, match=r"third has settings, but is no part .* give --one\.label"):
        read_recipe(file, {"third": {"fail": "x"}})
    file = write(WHEN.replace("extra: third", "source: third"))
    with pytest.raises(UsageError, match=r"other needs the stage third, which is left out .*one\.label"):
        read_recipe(file, {})
    for wrong in ("one.labels", "none.label", "label"):
        file = write(WHEN.replace("when: one.label", f"when: {wrong}"))
        with pytest.raises(UsageError, match=f"`when: {wrong}` names no setting"):
            read_recipe(file, {})


def test_overrides_of_stages_that_are_not_there(write: Write) -> None:
    with pytest.raises(UsageError, match=r"no such stage.*'othr'.*did you mean 'other'"):
        read_recipe(write(TWO), {"othr": {"fail": "x"}})
    with pytest.raises(UsageError, match="unknown setting 'sixe'"):
        read_recipe(write(TWO), {"one": {"sixe": 3}})


def given(recipe: Path, *options: str) -> Any:
    """The stages' settings as `chatwright run RECIPE OPTIONS` would take them."""
    config, _, found = parse_with_recipe(RunConfig, [str(recipe), *options], prog="run", description="")
    return config, {name: stage.config for name, stage in found.stages.items()}


def test_settings_of_stages_are_options_of_run() -> None:
    config, stages = given(
        RECIPES / "tiny.yaml",
        "--ppo.iterations",
        "3",
        "--pretrain.fit.steps=5",
        "--out",
        "a.b",
        "--pretrain.fit.compile",
        "false",
        "--pretrain.model",
        "{layers: 6}",
        "--data.text=a,b",
        "--report.watts",
        "40",
    )
    assert (config.out, config.seed, config.report.watts) == ("a.b", -1, 40.0)
    assert stages["ppo"].iterations == 3 and stages["data"].text == "a,b"
    assert stages["pretrain"].fit.steps == 5 and stages["pretrain"].fit.compile is False
    assert stages["pretrain"].model["layers"] == 6 and stages["pretrain"].fit.batch_size == 8
    for wrong, said in (
        (["--ppo.iterations"], "has no value"),
        (["extra"], "extra"),
        (["--ppo.iteration", "3"], "did you mean --ppo.iterations"),
        (["--ppo.iterations", "many"], "iterations"),
    ):
        with pytest.raises(UsageError, match=said):
            given(RECIPES / "tiny.yaml", *wrong)


def test_overrides_go_into_nested_settings(write: Write) -> None:
    recipe = read_recipe(RECIPES / "tiny.yaml", {"pretrain": {"fit": {"seconds": 5.0}}})
    assert recipe.stages["pretrain"].config.fit.seconds == 5.0
    assert recipe.stages["pretrain"].config.fit.batch_size == 8  # the recipe's own stays
    assert recipe.stages["sft"].config.fit.seconds > 0


def test_the_recipe_of_the_quickstart_is_whole() -> None:
    recipe = read_recipe(find_recipe("tiny"), {})
    assert list(recipe.stages) == ["data", "tokenizer", "pretrain", "sft", "reward", "ppo", "eval"]
    for stage in recipe.stages.values():
        assert set(stage.inputs) <= set(recipe.stages)
    for stage in ("pretrain", "sft", "reward"):
        config = recipe.stages[stage].config
        config.fit.check(config.optim.schedule)


def test_every_recipe_builds() -> None:
    files = sorted(RECIPES.glob("*.yaml"))
    assert files
    for file in files:
        assert read_recipe(file, {}).stages


def test_an_unknown_recipe_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe 'tinny'.*tiny"):
        find_recipe("tinny")


def test_run_by_its_command_line(
    write: Write, ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(write(TWO)), "--out", str(tmp_path), "--name", "mine", "--seed", "3", "--one.size", "6"]
    assert main_run(argv) == 0
    assert (tmp_path / "mine" / "report.md").is_file() and ran.seeds == [3]
    told = capsys.readouterr().out
    assert "a sample" in told and "6.000" in told and "total" in told
    assert "no stage has made a language model yet" in told  # the stages of this recipe make none


def test_a_base_model_is_not_proposed_for_a_chat(base_dir: Path, chat_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(base_dir, tmp_path / "pretrain" / "checkpoints" / "step-000001")
    write_json(tmp_path / "pretrain" / "result.json", {"model": "checkpoints/step-000001"})
    told = what_next(tmp_path)
    assert "chatwright generate" in told and "chatwright chat" not in told
    shutil.copytree(chat_dir, tmp_path / "sft" / "checkpoints" / "step-000001")
    write_json(tmp_path / "sft" / "result.json", {"model": "checkpoints/step-000001"})
    told = what_next(tmp_path)
    assert f"chatwright chat {tmp_path}" in told and "chatwright serve" in told


def test_a_file_of_records_counts_by_its_content(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"messages": []}\n')
    stage = RecipeStage("sft", "sft", find_stage("sft").config(data=str(file)))
    first = fingerprint(stage, 1, {})
    assert fingerprint(stage, 1, {}) == first
    file.write_text('{"messages": [1]}\n')
    assert fingerprint(stage, 1, {}) != first


def test_an_interrupted_run_says_where_it_stopped(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main_run([str(write(TWO)), "--out", str(tmp_path), "--other.fail", "interrupt"])
    told = capsys.readouterr().out
    assert "saved at step 3" in told and "chatwright chat" not in told
    assert code in (0, 130)


def test_one_stage_by_itself_finds_its_inputs_beside_it(ran: Ran, tmp_path: Path) -> None:
    assert _stage.main("first", ["--out", str(tmp_path / "one"), "--size", "3"]) == 0
    assert _stage.main("second", [f"--out={tmp_path / 'other'}", "--seed=4"]) == 0
    assert read_json(tmp_path / "other" / "result.json")["measures"][0]["after"] == 3.0
    with pytest.raises(UsageError, match="seed"):
        _stage.main("first", ["--seed", "x"])
    with pytest.raises(UsageError, match="has no value"):
        _stage.main("first", ["--out"])
    with pytest.raises(UserError, match="neither a finished stage"):
        _stage.main("second", ["--out", str(tmp_path / "lonely" / "other"), "--source", "nothing"])
