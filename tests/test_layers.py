"""No circles: no two files of the package need one another, not even through an import inside of a
function."""

from __future__ import annotations

import grimp


def test_no_file_needs_itself_through_others() -> None:
    graph = grimp.build_graph("chatwright", exclude_type_checking_imports=False)
    circles = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            chain = graph.find_shortest_chain(importer=imported, imported=module)
            if chain is not None:
                circles.add(" -> ".join((module, *chain)))
    assert not circles, "\n".join(sorted(circles))
