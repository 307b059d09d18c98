"""Runs a recipe's stages one after the other: finished ones are skipped, interrupted ones are resumed.

recipe.py defines the stages and their order. A stage is finished if its directory has a `result.json` whose
fingerprint (of settings, seed, and the fingerprints of the inputs) equals the current one. A stage whose
settings have changed is run again; stage_folder.py says what becomes of its earlier directory. Inputs are
checked first: a stage that cannot begin leaves the disk as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from chatwright import __version__, discovery, memory, runtime
from chatwright.config import (
    UserError,
    check_keys,
    to_plain,
    to_yaml,
)
from chatwright.data.records import own_file
from chatwright.files import read_json, sha256, write_json, write_text
from chatwright.metrics import duration, say
from chatwright.model_names import is_known, near_hub, weights_note
from chatwright.recipe import Recipe, RecipeStage, input_fields
from chatwright.reports import extras
from chatwright.reports import report as reports
from chatwright.stage_folder import CLOCK, StageFolder, check_root
from chatwright.trackers import Reporting
from chatwright.train.cost import EnergyMeter
from chatwright.train.stopping import Interrupted, terminable
from chatwright.train.workspace import Report, Unhealthy, Workspace


def fingerprint(stage: RecipeStage, seed: int, inputs: Mapping[str, Path]) -> str:
    """Hash (sixteen hexadecimal digits) of all that a stage's result depends on. `parallel` is left out: how
    processes share the work does not matter.

    Renamed stages and settings enter the hash under their former names, so that a rename alone does not run a
    stage again.
    """
    settings = to_plain(stage.config)
    settings.pop("parallel", None)
    for old, new in stage.stage.renamed.items():
        settings[old] = settings.pop(new)
    verb = next((old for old, new in discovery.RENAMED.items() if new == stage.verb), stage.verb)
    before = {
        name: read_json(inputs[name] / "result.json")["fingerprint"]
        for name in stage.inputs
        if name in inputs
    }
    before |= {name: sha256(file) for name in stage.inputs if (file := own_file(name)) is not None}
    text = json.dumps([verb, settings, seed, before, __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_stage(
    stage: RecipeStage,
    directory: Path,
    *,
    seed: int,
    inputs: Mapping[str, Path],
    prompt: str,
    reporting: Reporting | None = None,
) -> dict[str, Any]:
    """Run one stage in its directory, or read its finished result; returns the content of result.json.

    Under torchrun every process calls this. A stage that cannot run in parallel runs on rank 0 alone.
    """
    if hasattr(stage.config, "parallel") or runtime.is_rank_zero():
        workspace = Workspace(
            directory, seed, inputs, reporting or Reporting(), described=stage.stage.metrics
        )
        with terminable(stage.name):
            _run_stage(stage, workspace, prompt=prompt)
    runtime.barrier()
    return cast("dict[str, Any]", read_json(directory / "result.json"))


def _run_stage(stage: RecipeStage, workspace: Workspace, *, prompt: str) -> None:
    folder = StageFolder(workspace.directory, stage.verb)
    with folder.attempt(kept=Interrupted, tell=say):
        begin = partial(_begin, stage, workspace, folder)
        mark = runtime.broadcast_from_rank0(begin) if hasattr(stage.config, "parallel") else begin()
        if mark is None:
            return
        clock = _Clock(folder, mark)
        report = _run_and_report(stage, workspace, clock)
        if runtime.is_rank_zero():
            _conclude(stage, workspace, report, clock, prompt=prompt)


def _begin(stage: RecipeStage, workspace: Workspace, folder: StageFolder) -> str | None:
    """Check the folder and the inputs, then make the folder ready; returns the stage's fingerprint, or None
    when it is finished. Raises UserError, and nothing is changed."""
    directory, seed = workspace.directory, workspace.seed
    folder.check()
    if folder.can_take_back() and not folder.is_begun(fingerprint(stage, seed, workspace.inputs)):
        say(folder.take_back())
    if folder.has_result and folder.is_begun(fingerprint(stage, seed, workspace.inputs)):
        seconds = read_json(directory / "result.json")["seconds"]
        say(f"[{stage.name}] finished before, in {duration(seconds)}: skipped")
        return None
    check_inputs(stage, workspace.inputs)
    mark = fingerprint(stage, seed, workspace.inputs)
    say(folder.begin(mark) or f"[{stage.name}]")
    for note in _notes_on_weights(stage):
        say(f"  {note}")
    _Clock(folder, mark)  # first: it marks the directory with the fingerprint
    write_text(directory / "config.yaml", to_yaml({"use": stage.verb, **to_plain(stage.config)}))
    return mark


def _run_and_report(stage: RecipeStage, workspace: Workspace, clock: _Clock) -> Report:
    """Run the stage; its clock is stopped at the end, however it ends."""
    try:
        return stage.stage.run(stage.config, workspace)
    except Unhealthy as found:
        if runtime.is_rank_zero():
            result = _result(stage, workspace, found.report, clock)
            reports.write_stage_report(workspace.directory, stage.name, result)
            say(f"  {workspace.directory / 'report.md'}")
        raise
    finally:
        workspace.metrics.close()
        clock.stop()


def _conclude(
    stage: RecipeStage, workspace: Workspace, report: Report, clock: _Clock, *, prompt: str
) -> None:
    """Write a finished stage's report and its result.json, which is the last."""
    directory, seed = workspace.directory, workspace.seed
    result = _result(stage, workspace, report, clock)
    sample = report.facts.pop("sample", "") or extras.sample(directory, report, prompt, seed)
    before = {
        name: read_json(place / "result.json")
        for name, place in workspace.inputs.items()
        if name in stage.inputs
    }
    result = {
        "fingerprint": clock.mark,
        "verb": stage.verb,
        **result,
        "sample": sample,
        "seed": seed,
        "version": __version__,
        "inputs": {name: one["fingerprint"] for name, one in before.items()},
    }
    reports.write_stage_report(directory, stage.name, result)
    write_json(directory / "result.json", result)
    for row in reports.table_rows(stage.name, result) if result["measures"] else []:
        say(f"  {row[1]}: {row[2]} -> {row[3]}" if row[2] != "-" else f"  {row[1]}: {row[3]}")
    for warning in report.warnings:
        say(f"  WARNING: {warning}")


def _result(stage: RecipeStage, workspace: Workspace, report: Report, clock: _Clock) -> dict[str, Any]:
    """A stage's report in the form of result.json."""
    spent = {"seconds": clock.seconds, "joules": clock.joules, "memory_bytes": memory.peak_memory_bytes()}
    closed = extras.close(stage.stage, stage.config, workspace, report, spent)
    return {
        "model": report.model,
        "seconds": spent["seconds"],
        "memory_bytes": spent["memory_bytes"],
        "measures": [dataclasses.asdict(measure) for measure in report.measures],
        "curves": [dataclasses.asdict(curve) for curve in report.curves],
        "tables": [dataclasses.asdict(table) for table in report.tables],
        "pictures": report.pictures,
        "facts": report.facts,
        "notes": [*report.notes, *_notes_on_weights(stage)],
        "warnings": report.warnings,
        **closed,
    }


def _notes_on_weights(stage: RecipeStage) -> list[str]:
    """What is to be said of the weights of models that the stage takes from outside of the run."""
    return [note for name in dict.fromkeys(stage.inputs) if (note := weights_note(name))]


class _Clock:
    """Seconds and joules that a stage has taken, without interruptions; stored on disk between attempts."""

    def __init__(self, folder: StageFolder, mark: str) -> None:
        self.folder, self.file = folder, folder.path / CLOCK
        self.mark, self.started = mark, time.monotonic()
        earlier = read_json(self.file) if self.file.exists() else {}
        same = earlier.get("fingerprint") == mark
        self.before = float(earlier["seconds"]) if same else 0.0
        self.burnt, self.meter = float(earlier.get("joules", 0.0)) if same else 0.0, EnergyMeter()
        self.aside = folder.aside or (str(earlier.get("aside") or "") if same else "")
        self._write(self.before)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def joules(self) -> float:
        self.burnt += self.meter.spent()
        return self.burnt

    def stop(self) -> None:
        # On a full disk this fails too; the error that ended the stage is the one to report.
        with contextlib.suppress(UserError):
            self._write(self.seconds)

    def _write(self, seconds: float) -> None:
        if not runtime.is_rank_zero():
            return
        known: dict[str, Any] = {"verb": self.folder.verb, "files": self.folder.noted()}
        if self.aside:
            known["aside"] = self.aside
        spent = {"seconds": seconds, "joules": self.joules}
        write_json(self.file, {"fingerprint": self.mark, **known, **spent})


def check_inputs(stage: RecipeStage, inputs: Collection[str]) -> None:
    """Raise UserError when an input that the stage needs, or that somebody has set, is not there. Nothing of
    it is read: that it can be used is seen by the stage.

    `inputs` are the stages of this run. A default that names a stage which is not there may be one that is
    not needed: the stage itself says so.
    """
    records = set(stage.stage.reads(stage.config).values())
    for one in input_fields(stage.config):
        name = getattr(stage.config, one.name)
        if name in inputs or (name == one.default and name not in records):
            continue
        if name not in records and is_known(name):
            continue
        if not Path(name).exists() and own_file(name) is None:
            known = f"a finished stage of this run ({', '.join(inputs) or 'there is none'})"
            hint = "" if name in records else near_hub(name)
            raise UserError(
                f"{stage.name}: its setting {one.name} is {name!r}, which is neither {known} nor an existing "
                f"path{hint}"
            )


def run_recipe(
    recipe: Recipe, root: Path, *, until: str = "", reporting: Reporting | None = None
) -> dict[str, dict[str, Any]]:
    """Run all stages of a recipe under `root`; writes the run's report and returns the results by stage."""
    if until:
        check_keys([until], list(recipe.stages), where="until")
    runtime.set_threads()
    for name, setting in recipe.left_out.items():
        say(f"[{name}] no part of this run: there is no {setting} (give --{setting} FILE)")
    runtime.broadcast_from_rank0(partial(_check_all, recipe, root, until))
    results: dict[str, dict[str, Any]] = {}
    inputs: dict[str, Path] = {}
    for stage in recipe.stages.values():
        directory = root / stage.name
        results[stage.name] = run_stage(
            stage, directory, seed=recipe.seed, inputs=inputs, prompt=recipe.prompt, reporting=reporting
        )
        inputs[stage.name] = directory
        if runtime.is_rank_zero():
            reports.write_run_report(root, recipe.name, results, recipe.prompt)
        if stage.name == until:
            break
    return results


def _check_all(recipe: Recipe, root: Path, until: str) -> None:
    """Look at the run's folder, at those of its stages and at the inputs of all that are not finished, so
    that a mistake in the last stage does not show after hours. Raises UserError."""
    check_root(root, given=f"the run's folder {root}")
    for stage in recipe.stages.values():
        folder = StageFolder(root / stage.name, stage.verb)
        folder.check()
        if not folder.has_result:
            check_inputs(stage, list(recipe.stages))
        if stage.name == until:
            return
