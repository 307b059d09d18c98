"""Reads finished stages from disk: settings, results, curves, answers. The files may come from elsewhere and
are checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatwright import files
from chatwright.config import UsageError, UserError, read_yaml

MOST_SETTINGS = 10_000
"""Most settings of one stage: a YAML file of a few lines can expand, by aliases, beyond any memory."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    directory: Path
    result: Mapping[str, Any]
    settings: Mapping[str, Any]
    """By path: `optim.learning_rate`."""
    rows: Sequence[Row]
    """Rows of metrics.jsonl: only finite numbers, `step` in each."""
    pairs: Sequence[Mapping[str, str]] = ()
    per_prompt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        """The verb that made the stage: `sft`, `ppo` ..."""
        return str(self.result["verb"])

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric."""
        return [(row["step"], row[key]) for row in self.rows if key in row]


@dataclass(frozen=True)
class Run:
    """A run's finished stages, or a single stage."""

    path: Path
    whole: bool
    """Whether it is a run; else a stage by itself."""
    stages: Mapping[str, Stage]
    unfinished: Sequence[str] = ()


def read_run(path: Path) -> Run:
    """Read the directory of a run or a stage. Raises UserError if it is neither, nothing in it is finished,
    or files are damaged."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give a run (runs/tiny) or a stage (runs/tiny/ppo)")
    if _is_stage(path):
        if not (path / "result.json").is_file():
            raise UserError(
                f"{path} is not finished: it has no result.json; the command that began it goes on with it"
            )
        return Run(path, False, {path.name: read_stage(path)})
    places = [place for place in sorted(path.iterdir()) if _is_stage(place) and ".old-" not in place.name]
    if not places:
        raise UserError(
            f"{path} is no run: no folder in it is a stage (with result.json); give a run or a stage's "
            "directory"
        )
    done = [place for place in places if (place / "result.json").is_file()]
    if not done:
        raise UserError(f"{path}: none of its stages is finished ({', '.join(one.name for one in places)})")
    done.sort(key=lambda place: (place / "result.json").stat().st_mtime)  # in the order they were run
    return Run(
        path,
        True,
        {place.name: read_stage(place) for place in done},
        [one.name for one in places if one not in done],
    )


def _is_stage(path: Path) -> bool:
    return any((path / name).is_file() for name in ("result.json", "clock.json"))


def read_stage(directory: Path) -> Stage:
    """Read a finished stage. Raises UserError naming the file that is damaged."""
    result = _checked(files.read_json(directory / "result.json"), directory / "result.json")
    return Stage(
        directory.name,
        directory,
        result,
        _settings(directory / "config.yaml"),
        read_rows(directory / "metrics.jsonl"),
        _pairs(directory / "pairs.json"),
        _per_prompt(directory / "per_prompt.json"),
    )


def finite(value: Any) -> float | None:
    """A number as a float; None for anything else, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _checked(result: Any, file: Path) -> Mapping[str, Any]:
    """The content of result.json. Raises UserError if values used here do not have the expected shape."""
    expected = {"verb": str, "measures": list, "curves": list, "facts": dict, "notes": list}
    optional = {"cost": dict, "kl_budget": dict, "answers": dict, "inputs": dict, "paper": list}
    fine = isinstance(result, dict) and all(
        isinstance(result.get(key), kind) for key, kind in expected.items()
    )
    fine = fine and all(
        result.get(key) is None or isinstance(result[key], kind) for key, kind in optional.items()
    )
    fine = fine and finite(result.get("seconds")) is not None and all(map(_is_measure, result["measures"]))
    fine = fine and all(map(_is_curve, result["curves"])) and _is_known(result)
    if not fine:
        raise UserError(f"{file} is damaged: it is not what a finished stage writes; run the stage again")
    return result  # type: ignore[no-any-return]


def _is_measure(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        return False
    interval = one.get("interval")
    pair = interval is None or (
        isinstance(interval, list) and len(interval) == 2 and None not in map(finite, interval)
    )
    return pair and all(
        one.get(side) is None or finite(one[side]) is not None for side in ("before", "after")
    )


def _is_curve(one: Any) -> bool:
    keys = one.get("keys") if isinstance(one, dict) else None
    return isinstance(keys, list) and all(
        isinstance(word, str) for word in (*keys, one.get("title"), one.get("unit", ""))
    )


def _is_known(result: Mapping[str, Any]) -> bool:
    """Whether the fields of newer results are valid: cost, KL budget, length and diversity."""
    measures = (result.get("answers") or {}).get("measures", {})
    fine = isinstance(measures, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and None not in map(finite, pair)
        for pair in measures.values()
    )
    fine = fine and all(finite(value) is not None for value in (result.get("cost") or {}).values())
    budget = result.get("kl_budget") or {}
    numbers = (budget.get(key) for key in ("spent", "allowed", "largest", "iteration", "round", "kept"))
    fine = fine and (not budget or {"spent", "allowed", "stopped"} <= set(budget))
    return fine and all(value is None or finite(value) is not None for value in numbers)


def _settings(file: Path) -> dict[str, Any]:
    """The settings of config.yaml by their paths; none where the file is missing."""
    if not file.is_file():
        return {}
    try:
        found = dict(_flat(read_yaml(file), "", iter(range(MOST_SETTINGS))))
    except UsageError as error:
        raise UserError(str(error)) from None
    except (StopIteration, RuntimeError):  # RuntimeError: a cycle of aliases recurses without end
        raise UserError(f"{file} is damaged: it holds more than {MOST_SETTINGS:,} settings") from None
    return found


def _flat(values: Mapping[Any, Any], before: str, left: Iterator[int]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        next(left)
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{key}.", left)
        else:
            found.append(
                (
                    f"{before}{key}",
                    value if isinstance(value, int | float | str | None) else str(value)[:1_000],
                )
            )
    return found


def read_rows(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a crash cut off. Raises UserError for any other
    damage."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            step = finite(row["step"])
            if step is None:
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            if number == len(lines):
                continue
            raise UserError(
                f"{file}, line {number}: not a row of metrics; take the line out, or the file away to "
                "compare without curves"
            ) from None
        rows.append({key: value for key, one in row.items() if (value := finite(one)) is not None})
    return rows


def _pairs(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    found = files.read_json(file)
    names = ("prompt", "before", "after")
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in names) for one in found
    ):
        raise UserError(f"{file} is damaged: it holds no pairs of answers")
    return [{key: one[key] for key in names} for one in found]


def _per_prompt(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = files.read_json(file)
    try:
        prompts, values = list(map(str, found["prompts"])), found["values"]
        for sides in values.values():
            for side in ("before", "after"):
                if len(sides[side]) != len(prompts) or None in map(finite, sides[side]):
                    raise ValueError("a number is missing")
    except (TypeError, KeyError, ValueError, AttributeError, IndexError):
        raise UserError(f"{file} is damaged: it does not hold a number for each prompt") from None
    return {"prompts": prompts, "values": values}
