"""Write docs/reference/recipes.md from the recipes; with --check, fail when it is out of date.

Of each recipe: its name, what its header says, and its stages with the settings that it changes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from chatwright.recipe import Recipe, read_recipe

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "reference" / "recipes.md"
INTRODUCTION = """# Recipes

Written by `make docs` from recipes/; do not edit.

A recipe is a YAML file: a name, a seed, a prompt, and stages with the settings that differ from the defaults
([cli.md](cli.md) has these). `chatwright run NAME` runs the ones that come with the program,
`chatwright run FILE` your own. An entry is a stage of its own name, or the one behind `use`. Stages name
their inputs, and that decides the order. A stage with `when: data.comparisons` is part of the run only where
that setting of another stage is given. Copy a recipe, change it, and let `chatwright doctor FILE` look at it.
"""


def header(text: str) -> list[str]:
    """The comment at the top of a recipe, without its signs."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


def written(settings: dict[str, Any]) -> str:
    """Settings as the command line has them, without `use`."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, dict):
            parts += [f"{key}.{inner}" for inner in written(value).split(", ")]
        elif key != "use":
            parts.append(f"{key} {value!r}" if value in ("", None) else f"{key} {value}")
    return ", ".join(parts)


def whole_recipe(file: Path) -> Recipe:
    """A recipe with all its stages: settings on which one depends (`when`) are given."""
    given: dict[str, dict[str, Any]] = {}
    for setting in read_recipe(file, {}).left_out.values():
        stage, _, key = setting.partition(".")
        given.setdefault(stage, {})[key] = "FILE"
    return read_recipe(file, given)


def section(file: Path) -> list[str]:
    """A recipe's part of the page."""
    text = file.read_text(encoding="utf-8")
    recipe = whole_recipe(file)
    given = yaml.safe_load(text)["stages"]
    name = file.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    lines = [f"## {name}", "", "```", *header(text), "```", "", f"Seed {recipe.seed}."]
    lines += ["", "| stage | is | settings that it changes |", "|---|---|---|"]
    for entry in recipe.stages.values():
        settings = dict(given[entry.name] or {})
        condition = settings.pop("when", None)
        verb = entry.verb if condition is None else f"{entry.verb}, with {condition} only"
        lines.append(f"| {entry.name} | {verb} | {written(settings) or '-'} |")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    files = sorted((ROOT / "recipes").rglob("*.yaml"), key=lambda file: (len(file.parts), file.name))
    parts = [INTRODUCTION, *("\n".join(section(file)) for file in files)]
    return "\n".join(parts).rstrip() + "\n"


def main() -> int:
    """Write or check."""
    wanted = page()
    if "--check" in sys.argv:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != wanted:
            print(f"{FILE.relative_to(ROOT)} is out of date: run `make docs` and commit it", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
