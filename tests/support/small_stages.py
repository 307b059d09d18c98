"""Two stages that take no time, run by the command line, and what the disk looks like before and after."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from chatwright import cli, discovery
from chatwright.config import UserError
from chatwright.train.stage import Stage
from chatwright.train.stopping import Interrupted
from chatwright.train.workspace import Measure, Report, Workspace

Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Make:
    """A stage without inputs."""

    size: int = 1
    """A number."""
    fail: str = ""
    """When to end with an error: `input` at once, `step` after a checkpoint, `stop` is an interruption."""


@dataclass(frozen=True)
class Use:
    """A stage that needs a model and records."""

    base: str = field(default="make", metadata={"input": True})
    """The stage to start from."""
    data: str = field(default="make", metadata={"input": True})
    """Records."""


def _save(workspace: Workspace, step: int) -> None:
    place = workspace.checkpoints / f"step-{step:06}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.safetensors").write_text("weights")


def _make(config: Make, workspace: Workspace) -> Report:
    if config.fail == "input":
        raise UserError("the input is no good")
    _save(workspace, config.size)
    (workspace.directory / "made.txt").write_text(str(config.size))
    if config.fail == "step":
        raise UserError("the disk is full")
    if config.fail == "stop":
        raise Interrupted(f"saved at step {config.size}")
    return Report(measures=[Measure("size", None, float(config.size))], facts={"sample": "a sample"})


def _use(config: Use, workspace: Workspace) -> Report:
    workspace.resolve(config.base)
    return Report(measures=[Measure("used", None, 1.0)], facts={"sample": "a sample"})


def add_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the verbs `make` and `use` for one test."""
    reads = {"make": lambda config: {}, "use": lambda config: {"dialogues": config.data}}
    for name, config, run in (("make", Make, _make), ("use", Use, _use)):
        module = ModuleType(f"stage_{name}", doc="A stage for tests.")
        module.STAGE = Stage(config=config, run=run, plan=None, reads=reads[name])  # type: ignore[attr-defined, arg-type]
        monkeypatch.setitem(sys.modules, f"stage_{name}", module)
        monkeypatch.setitem(discovery.stages(), name, discovery.Verb(name, f"stage_{name}"))


def command_line(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_line(err: str) -> str:
    """The message, when it is one line as promised."""
    assert err.startswith("chatwright: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("chatwright: ").rstrip("\n")


def disk(folder: Path) -> dict[str, str]:
    """Everything under a folder: names, links and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes().decode("latin-1")
    return found
