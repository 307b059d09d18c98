"""Write docs/reference/cli.md from the program's own help; with --check, fail when it is out of date."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

os.environ["COLUMNS"] = "110"
os.environ["NO_COLOR"] = "1"
FILE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"


def help_of(arguments: list[str]) -> str:
    """What the program prints for these arguments."""
    from chatwright.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(arguments)
    return re.sub(r"[ \t]+\n", "\n", printed.getvalue()).strip()


def section(verb: str) -> list[str]:
    """The lines about a verb, ours or one that a package brings."""
    return [f"### {verb}", "", "```", help_of([verb, "--help"]), "```", ""]


def text() -> str:
    """The whole page. Verbs of other packages are left out: they are not there for every reader."""
    from chatwright import discovery
    from chatwright.model.config import PRESETS

    parts = [
        "# The command line",
        "",
        "Written by `make docs` from the program's own help; do not edit.",
        "",
        "```",
        help_of(["--help"]),
        "```",
        "",
    ]
    own = {name: verb for name, verb in discovery.stages().items() if not verb.package}
    for title, group in {"Commands": discovery.commands(), "Stages": own}.items():
        parts += [f"## {title}", "", ", ".join(f"[{verb}](#{verb})" for verb in group), ""]
        for verb in group:
            parts += section(verb)
    parts += [
        "## Model shapes",
        "",
        "| preset | layers | width | heads | context | vocabulary |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in PRESETS.items():
        parts.append(
            f"| {name} | {shape.layers} | {shape.width} | {shape.heads} | {shape.context} | "
            f"{shape.vocab_size:,} |"
        )
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write or check."""
    wanted = text()
    if "--check" in sys.argv:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != wanted:
            print("docs/reference/cli.md is out of date: run `make docs` and commit it", file=sys.stderr)
            return 1
        return 0
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
