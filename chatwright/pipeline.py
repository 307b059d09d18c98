"""Runs a recipe's stages one after the other: finished ones are skipped, interrupted ones are resumed.

recipe.py defines the stages and their order. A stage is finished if its directory has a `result.json` whose
fingerprint (of settings, seed, and the fingerprints of the inputs) equals the current one. A stage whose
settings have changed is run again; its earlier directory is renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from chatwright import __version__, discovery, memory, runtime
from chatwright.config import (
    UserError,
    check_keys,
    to_plain,
    to_yaml,
)
from chatwright.data.records import is_record_file
from chatwright.files import read_json, sha256, write_json, write_text
from chatwright.metrics import duration, say
from chatwright.recipe import Recipe, RecipeStage
from chatwright.reports import extras
from chatwright.reports import report as reports
from chatwright.trackers import Reporting
from chatwright.train.cost import EnergyMeter
from chatwright.train.stopping import terminable
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
    before |= {name: sha256(Path(name)) for name in stage.inputs if is_record_file(name)}
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
    directory, seed = workspace.directory, workspace.seed
    mark = fingerprint(stage, seed, workspace.inputs)
    finished = directory / "result.json"

    def begin() -> bool:
        _make_way(directory, mark)
        if finished.exists():
            seconds = read_json(finished)["seconds"]
            say(f"[{stage.name}] finished before, in {duration(seconds)}: skipped")
            return False
        say(f"[{stage.name}]")
        directory.mkdir(parents=True, exist_ok=True)
        _Clock(directory / "clock.json", mark)  # first: it marks the directory with the fingerprint
        write_text(directory / "config.yaml", to_yaml({"use": stage.verb, **to_plain(stage.config)}))
        return True

    if not (runtime.broadcast_from_rank0(begin) if hasattr(stage.config, "parallel") else begin()):
        return
    clock = _Clock(directory / "clock.json", mark)
    try:
        report: Report = stage.stage.run(stage.config, workspace)
    except Unhealthy as found:
        if runtime.is_rank_zero():
            reports.write_stage_report(directory, stage.name, _result(stage, workspace, found.report, clock))
            say(f"  {directory / 'report.md'}")
        raise
    finally:
        workspace.metrics.close()
        clock.stop()
    if not runtime.is_rank_zero():
        return
    result = _result(stage, workspace, report, clock)
    sample = report.facts.pop("sample", "") or extras.sample(directory, report, prompt, seed)
    before = {
        name: read_json(place / "result.json")
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
    write_json(finished, result)
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
        "notes": report.notes,
        "warnings": report.warnings,
        **closed,
    }


class _Clock:
    """Seconds and joules that a stage has taken, without interruptions; stored on disk between attempts."""

    def __init__(self, file: Path, mark: str) -> None:
        self.file, self.mark, self.started = file, mark, time.monotonic()
        earlier = read_json(file) if file.exists() else {}
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
        # On a full disk this fails too; the error that ended the stage is the one to report.
        with contextlib.suppress(UserError):
            self._write(self.seconds)

    def _write(self, seconds: float) -> None:
        if runtime.is_rank_zero():
            write_json(self.file, {"fingerprint": self.mark, "seconds": seconds, "joules": self.joules})


def _make_way(directory: Path, mark: str) -> None:
    """Rename a directory that was made, or begun, with other settings."""
    file = directory / "clock.json"
    if not directory.exists() or all(file.name.startswith(".") for file in directory.iterdir()):
        return
    if file.exists() and read_json(file).get("fingerprint") == mark:
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(aside)
    say(
        f"[{directory.name}] settings or inputs have changed: running again; the earlier result is now "
        f"{aside}"
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
