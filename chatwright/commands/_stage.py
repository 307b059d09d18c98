"""What all stages have in common as verbs: `chatwright sft`, `chatwright ppo` and the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from chatwright import discovery, runtime
from chatwright.config import UsageError, parse_all
from chatwright.metrics import say
from chatwright.pipeline import run_stage
from chatwright.recipe import PROMPT, RecipeStage
from chatwright.stage_folder import check_place
from chatwright.trackers import Reporting
from chatwright.train.parallel.start import process_group
from chatwright.train.stage import stage_of
from chatwright.train.stopping import Interrupted
from chatwright.train.workspace import Workspace


@dataclass(frozen=True)
class Options:
    """Where and how a stage runs."""

    out: str = ""
    """The stage's directory, default runs/my/VERB. Inputs that are names of stages are looked for beside it.
    """
    seed: int = 1337
    """Seed of everything random."""
    report: Reporting = field(default_factory=Reporting)
    """Where metrics go beside metrics.jsonl, and what energy and hours cost. Changes no result."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is not a whole number of at least 0")


@dataclass(frozen=True)
class Preview:
    """An option of stages that can show what would be learnt."""

    preview: int | None = None
    """Show this many samples as they are learnt, and train nothing."""

    def __post_init__(self) -> None:
        if self.preview is not None and self.preview < 1:
            raise UsageError(
                f"--preview {self.preview} is not a whole number above 0: how many samples to show"
            )


@process_group()
def main(name: str, argv: Sequence[str]) -> int:
    """Run one stage by itself. Its inputs are finished stages beside --out, or paths. Raises UserError."""
    verb = discovery.stage_verb(name)
    discovery.tell_new_name(name, where="chatwright")
    stage = stage_of(verb.load())
    if argv and argv[0] in stage.actions:
        return stage.actions[argv[0]](argv[1:])
    classes = (stage.config, Options, Preview) if stage.preview else (stage.config, Options)
    found, _ = parse_all(
        classes, argv, f"chatwright {verb.name}", verb.summary() + ".", renamed=stage.renamed
    )
    config, options = found[0], found[1]
    options.report.check()
    directory = Path(options.out or f"runs/my/{verb.name}")
    if not (stage.preview and found[2].preview):  # which writes nothing
        check = partial(check_place, directory, given=f"--out {directory}", example=f"runs/my/{verb.name}")
        runtime.broadcast_from_rank0(check)
    beside = {file.parent.name: file.parent for file in sorted(directory.parent.glob("*/result.json"))}
    beside.pop(directory.name, None)
    runtime.set_threads()
    if stage.preview and found[2].preview:
        stage.preview(config, Workspace(directory, options.seed, beside), found[2].preview)
        return 0
    entry = RecipeStage(directory.name, verb.name, config)
    try:
        run_stage(entry, directory, seed=options.seed, inputs=beside, prompt=PROMPT, reporting=options.report)
    except Interrupted as stop:
        say(str(stop))
        return 0
    say(f"  {directory / 'report.md'}")
    return 0
