"""A recipe's stages, one after the other; what is finished is skipped, what was interrupted goes on.

Which stages there are, and in which order they come: recipe.py. A stage is finished when its directory has a `result.json`
whose fingerprint - settings, seed, and the fingerprints of its inputs - is the one that would be made now. A stage whose
settings have changed is run again; what it made before is moved aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chatwright import __version__, checkpoint, runtime
from chatwright.config import (
    UsageError,
    UserError,
    build,
    check_keys,
    parse,
    to_plain,
    to_yaml,
)
from chatwright.evaluate import closing
from chatwright.evaluate import report as reports
from chatwright.metrics import console, duration, say
from chatwright.recipe import PROMPT, Recipe, Stage, find_recipe, module_of, parse_overrides, read_recipe
from chatwright.trackers import Reporting
from chatwright.train import parallel
from chatwright.train.account import EnergyMeter
from chatwright.train.stopping import Interrupted, terminable
from chatwright.train.workspace import Report, Unhealthy, Workspace


@dataclass(frozen=True)
class RunConfig:
    """Settings of `chatwright run`. Any setting of a stage can follow as --STAGE.KEY VALUE."""

    out: str = "runs"
    """Directory in which the run's own directory is made."""
    name: str = ""
    """Name of the run; empty takes the recipe's."""
    seed: int = -1
    """Seed of everything random; -1 takes the recipe's."""
    until: str = ""
    """Stop after this stage."""
    report: Reporting = dataclasses.field(default_factory=Reporting)
    """Where metrics go beside metrics.jsonl, and what energy and hours cost. Changes no result."""


def fingerprint(stage: Stage, seed: int, inputs: Mapping[str, Path]) -> str:
    """Sixteen hexadecimal digits of what a stage's result depends on: not on how processes shared the work."""
    settings = to_plain(stage.config)
    settings.pop("parallel", None)
    before = {
        name: checkpoint.read_json(inputs[name] / "result.json")["fingerprint"]
        for name in stage.inputs
        if name in inputs
    }
    text = json.dumps([stage.verb, settings, seed, before, __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_stage(
    stage: Stage,
    directory: Path,
    *,
    seed: int,
    inputs: Mapping[str, Path],
    prompt: str,
    reporting: Reporting | None = None,
) -> dict[str, Any]:
    """Run one stage in its directory, or take its finished result; returns the content of result.json.

    Under torchrun every process calls this. Stages that cannot share their work are left to the first one.
    """
    if hasattr(stage.config, "parallel") or runtime.is_first():
        workspace = Workspace(directory, seed, inputs, reporting or Reporting())
        with terminable(stage.name):
            _run_stage(stage, workspace, prompt=prompt)
    runtime.barrier()
    return cast("dict[str, Any]", checkpoint.read_json(directory / "result.json"))


def _run_stage(stage: Stage, workspace: Workspace, *, prompt: str) -> None:
    directory, seed = workspace.directory, workspace.seed
    mark = fingerprint(stage, seed, workspace.inputs)
    finished = directory / "result.json"

    def begin() -> bool:
        _make_way(directory, mark)
        if finished.exists():
            seconds = checkpoint.read_json(finished)["seconds"]
            say(f"[{stage.name}] finished before, in {duration(seconds)}: skipped")
            return False
        say(f"[{stage.name}]")
        directory.mkdir(parents=True, exist_ok=True)
        _Clock(directory / "clock.json", mark)  # first: it says whose directory this is
        checkpoint.write_text(
            directory / "config.yaml", to_yaml({"use": stage.verb, **to_plain(stage.config)})
        )
        return True

    if not (runtime.told_by_first(begin) if hasattr(stage.config, "parallel") else begin()):
        return
    clock = _Clock(directory / "clock.json", mark)
    try:
        report: Report = module_of(stage.verb).run(stage.config, workspace)
    except Unhealthy as found:
        if runtime.is_first():
            reports.write_stage_report(directory, stage.name, _result(stage, workspace, found.report, clock))
            say(f"  {directory / 'report.md'}")
        raise
    finally:
        workspace.metrics.close()
        clock.stop()
    if not runtime.is_first():
        return
    result = _result(stage, workspace, report, clock)
    sample = report.facts.pop("sample", "") or _sample(directory, report, prompt, seed)
    before = {
        name: checkpoint.read_json(place / "result.json")
        for name, place in workspace.inputs.items()
        if name in stage.inputs
    }
    result = {
        "fingerprint": mark,
        "verb": stage.verb,
        **result,
        "sample": sample,
        "seed": seed,
        "version": __version__,
        "inputs": {name: one["fingerprint"] for name, one in before.items()},
    }
    reports.write_stage_report(directory, stage.name, result)
    checkpoint.write_json(finished, result)
    for row in reports.table_rows(stage.name, result):
        say(f"  {row[1]}: {row[2]} -> {row[3]}" if row[2] != "-" else f"  {row[1]}: {row[3]}")


def _result(stage: Stage, workspace: Workspace, report: Report, clock: _Clock) -> dict[str, Any]:
    """What a stage reports, as it stands in result.json."""
    spent = {"seconds": clock.seconds, "joules": clock.joules, "memory_bytes": runtime.peak_memory_bytes()}
    closed = closing.close(stage.verb, module_of(stage.verb), stage.config, workspace, report, spent)
    return {
        "model": report.model,
        "seconds": spent["seconds"],
        "memory_bytes": spent["memory_bytes"],
        "measures": [dataclasses.asdict(measure) for measure in report.measures],
        "curves": [dataclasses.asdict(curve) for curve in report.curves],
        "tables": [dataclasses.asdict(table) for table in report.tables],
        "pictures": report.pictures,
        "facts": report.facts,
        "notes": report.notes,
        **closed,
    }


class _Clock:
    """Seconds and joules a stage has taken, interruptions left out; kept on disk between attempts."""

    def __init__(self, file: Path, mark: str) -> None:
        self.file, self.mark, self.started = file, mark, time.monotonic()
        earlier = checkpoint.read_json(file) if file.exists() else {}
        same = earlier.get("fingerprint") == mark
        self.before = float(earlier["seconds"]) if same else 0.0
        self.burnt, self.meter = float(earlier.get("joules", 0.0)) if same else 0.0, EnergyMeter()
        self._write(self.before)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def joules(self) -> float:
        self.burnt += self.meter.spent()
        return self.burnt

    def stop(self) -> None:
        with contextlib.suppress(
            UserError
        ):  # a full disk: what ended the stage is the error to tell, not this
            self._write(self.seconds)

    def _write(self, seconds: float) -> None:
        if runtime.is_first():
            checkpoint.write_json(
                self.file, {"fingerprint": self.mark, "seconds": seconds, "joules": self.joules}
            )


def _make_way(directory: Path, mark: str) -> None:
    """Move a directory aside that was made, or begun, with other settings."""
    file = directory / "clock.json"
    if not directory.exists() or all(file.name.startswith(".") for file in directory.iterdir()):
        return
    if file.exists() and checkpoint.read_json(file).get("fingerprint") == mark:
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(aside)
    say(
        f"[{directory.name}] settings or inputs have changed: running again; the earlier result is now {aside}"
    )


def _sample(directory: Path, report: Report, prompt: str, seed: int) -> str:
    """The stage's model answers the recipe's prompt; empty when the stage made no language model."""
    from chatwright.evaluate.replies import one_answer

    if (
        report.model is None
        or checkpoint.Checkpoint(directory / report.model).state().get("kind") != "language"
    ):
        return ""
    return one_answer(str(directory / report.model), [{"role": "user", "content": prompt}], seed=seed)


def run_recipe(
    recipe: Recipe, root: Path, *, until: str = "", reporting: Reporting | None = None
) -> dict[str, dict[str, Any]]:
    """All stages of a recipe under `root`; writes the run's report and returns the results by stage."""
    if until:
        check_keys([until], list(recipe.stages), where="until")
    runtime.set_threads()
    results: dict[str, dict[str, Any]] = {}
    inputs: dict[str, Path] = {}
    for stage in recipe.stages.values():
        directory = root / stage.name
        results[stage.name] = run_stage(
            stage, directory, seed=recipe.seed, inputs=inputs, prompt=recipe.prompt, reporting=reporting
        )
        inputs[stage.name] = directory
        if runtime.is_first():
            reports.write_run_report(root, recipe.name, results, recipe.prompt)
        if stage.name == until:
            break
    return results


def print_results(root: Path, recipe: Recipe, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The closing table, one prompt after each stage, and what to type next."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Run {recipe.name}", title_justify="left")
    for column, side in (
        ("stage", "left"),
        ("measured on held-out data", "left"),
        ("before", "right"),
        ("after", "right"),
        ("time", "right"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for stage, result in results.items():
        for row in reports.table_rows(stage, result):
            table.add_row(*map(Text, row))
    total = sum(result["seconds"] for result in results.values())
    memory = max(result["memory_bytes"] for result in results.values())
    table.add_section()
    table.add_row("total", f"largest resident size {memory / 1e9:.1f} GB", "", "", duration(total))
    console.print(table)
    say(f"\nOne prompt, {recipe.prompt!r}, after each stage:")
    for stage, result in results.items():
        if result.get("sample"):
            say(
                f"  {stage:9} {result['sample']!r}"
                if stage not in ("reward", "classifier")
                else f"  {stage:9} {result['sample']}"
            )
    say(f"\nThe report with pictures: {root / 'report.md'}")
    say(
        f"Next:  chatwright chat {root}      (or: make chat)\n       chatwright serve {root}     (or: make serve)"
    )


@parallel.processes()
def main_run(argv: Sequence[str]) -> int:
    """`chatwright run RECIPE`."""
    own = {f.name for f in dataclasses.fields(RunConfig)} | {"config", "debug", "help"}
    plain, overrides = split_arguments(argv, own)
    config, positionals = parse(
        RunConfig,
        plain,
        prog="chatwright run",
        description="Run every stage of a recipe; finished stages are skipped. Any setting of a stage can be given "
        "as --STAGE.KEY VALUE, for example --pretrain.fit.seconds 60.",
        positionals={"recipe": "A YAML file, or the name of a built-in recipe (tiny)."},
    )
    recipe = read_recipe(find_recipe(str(positionals["recipe"])), parse_overrides(overrides))
    if config.seed >= 0:
        recipe = dataclasses.replace(recipe, seed=config.seed)
    if config.name:
        recipe = dataclasses.replace(recipe, name=config.name)
    root = Path(config.out) / recipe.name
    config.report.check()
    try:
        results = run_recipe(recipe, root, until=config.until, reporting=config.report)
    except Interrupted as stop:
        say(str(stop))
        return 0
    print_results(root, recipe, results)
    return 0


def split_arguments(argv: Sequence[str], own: set[str]) -> tuple[list[str], list[str]]:
    """Arguments of `chatwright run` itself, and those of stages (--STAGE.KEY VALUE)."""
    plain: list[str] = []
    rest: list[str] = []
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        is_stage = argument.startswith("--") and "." in argument.partition("=")[0]
        target = (
            rest if is_stage and argument[2:].partition(".")[0] not in own else plain
        )  # --report.to is its own
        target.append(argument)
        if is_stage and "=" not in argument and pending:
            target.append(pending.pop(0))
        elif argument in {f"--{name}" for name in own - {"debug", "help"}} and pending:
            plain.append(pending.pop(0))
    return plain, rest


@parallel.processes()
def main_stage(verb: str, argv: Sequence[str]) -> int:
    """`chatwright VERB`: one stage by itself. Its inputs are the finished stages beside --out, or paths."""
    module = module_of(verb)
    plain, out, seed, reporting = _take_options(argv)
    plain, shown = _take_preview(plain) if hasattr(module, "preview") else (plain, 0)
    preview = (
        " --preview N shows N samples as they are learnt, and trains nothing."
        if hasattr(module, "preview")
        else ""
    )
    config, _ = parse(
        module.Config,
        plain,
        prog=f"chatwright {verb}",
        description=f"{(module.__doc__ or '').splitlines()[0]} Also: --out DIR (default runs/my/{verb}; inputs that are "
        f"stage names are looked for beside it), --seed N, and --report.to, .watts, .price as in `chatwright run`.{preview}",
    )
    reporting.check()
    directory = Path(out or f"runs/my/{verb}")
    beside = {file.parent.name: file.parent for file in sorted(directory.parent.glob("*/result.json"))}
    beside.pop(directory.name, None)
    runtime.set_threads()
    if shown:
        module.preview(config, Workspace(directory, seed, beside), shown)
        return 0
    try:
        run_stage(
            Stage(directory.name, verb, config),
            directory,
            seed=seed,
            inputs=beside,
            prompt=PROMPT,
            reporting=reporting,
        )
    except Interrupted as stop:
        say(str(stop))
        return 0
    say(f"  {directory / 'report.md'}")
    return 0


def _take_preview(argv: Sequence[str]) -> tuple[list[str], int]:
    """The arguments without `--preview N`, and N; 0 without it. Raises UsageError."""
    plain, count = [], 0
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        key, equals, value = argument.partition("=")
        if key != "--preview":
            plain.append(argument)
            continue
        value = value if equals else pending.pop(0) if pending else ""
        if not value.isdecimal() or int(value) == 0:
            raise UsageError(f"--preview {value!r} is not a whole number above 0: how many samples to show")
        count = int(value)
    return plain, count


def main_data(argv: Sequence[str]) -> int:
    """`chatwright data list`, or the data stage by itself."""
    if list(argv[:1]) != ["list"]:
        return main_stage("data", argv)
    from rich.table import Table

    from chatwright.data import sources

    table = Table(
        "name", "kind", "licence", "what", title="Data that installs by itself", title_justify="left"
    )
    for source in sources.catalogue():
        table.add_row(
            source.name, ", ".join(source.kinds), source.licence, f"{source.title}\n{source.homepage}"
        )
    console.print(table)
    say(
        "Also: a .txt, .jsonl or .parquet file, a directory of them, or hf:owner/name[:config[:split]][#column]"
    )
    return 0


def _take_options(argv: Sequence[str]) -> tuple[list[str], str, int, Reporting]:
    plain, out, seed = [], "", 1337
    report: list[str] = []
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        key, equals, value = argument.partition("=")
        if key not in ("--out", "--seed") and not key.startswith("--report."):
            plain.append(argument)
            continue
        if not equals:
            if not pending:
                raise UsageError(f"{key} needs a value")
            value = pending.pop(0)
        if key.startswith("--report."):
            report += [key, value]
        elif key == "--out":
            out = value
        elif value.isdigit():
            seed = int(value)
        else:
            raise UsageError(f"--seed {value!r} is not a whole number")
    settings = parse_overrides(report).get("report", {})
    return plain, out, seed, build(Reporting, settings, where="report")
