"""No circles: no two files of the package need one another, not even through an import inside of a
function. And no folder is left out of what is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def test_no_file_needs_itself_through_others() -> None:
    graph = grimp.build_graph("chatwright", exclude_type_checking_imports=False)
    circles = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            chain = graph.find_shortest_chain(importer=imported, imported=module)
            if chain is not None:
                circles.add(" -> ".join((module, *chain)))
    assert not circles, "\n".join(sorted(circles))


def test_every_folder_of_the_package_is_installed() -> None:
    """An editable installation, as in development, does not need the list; a wheel lacks what it leaves
    out."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "chatwright").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert names - set(listed["packages"]) == set()
