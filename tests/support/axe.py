"""axe-core, the checker of accessibility: fetched from npm once, never from anywhere else, and kept in the
cache.

Its script is not ours to keep in the repository. A machine without npm or without a network skips the tests
that need it, and says so; another file under the same version is an error.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from chatwright.data.archives import cache_dir

VERSION = "4.14.1"
INTEGRITY = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
"""SHA-512 of the package, as the registry publishes it."""
RUN = """async () => {
    const { violations } = await axe.run(document, { resultTypes: ["violations"] });
    return violations.filter(({ impact }) => ["serious", "critical"].includes(impact))
        .map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html.slice(0, 160)).join(" | ")}`);
}"""


def source() -> str:
    """axe's script. Skips the test where it cannot be had."""
    package = cache_dir() / "tests" / f"axe-core-{VERSION}.tgz"
    if not package.is_file():
        _fetch(package)
    found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    assert found == INTEGRITY, f"{package} is not the package that was published; delete it"
    with tarfile.open(package) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def _fetch(package: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("NO AXE: accessibility goes unchecked; install npm")
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        command = [npm, "pack", f"axe-core@{VERSION}", "--silent"]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("NO AXE: accessibility goes unchecked; npm did not answer")
        made = Path(scratch) / package.name
        if done.returncode or not made.is_file():
            pytest.skip(f"NO AXE: accessibility goes unchecked; npm says: {done.stderr.strip()[-200:]}")
        os.replace(made, package)


def findings(page: Any, script: str) -> list[str]:
    """What is seriously wrong with the page as it stands. Scripts of a debugger are outside of the page's
    policy."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(script)
    return list(page.evaluate(RUN))
