"""Fast generation on CPUs: compiled by Numba when first used, so that no compiler is needed to install or to
run.

    simd.py      vectors of sixteen numbers for Numba
    dots.py      products of small integers and of bfloat16, per kind of processor
    compiling.py how functions are compiled
    barrier.py   how threads wait for each other
    paths.py     which kind this processor is
    packing.py   a model's weights as fp32, bf16, int8 or int4, in the order in which they are read
    products.py  matrix products
    layout.py    where the step finds what it is told
    attention.py attention over pages of keys and values
    step.py      the whole model for a few tokens, run by all threads together
    runner.py    what the engine talks to
    reference.py the same numbers by plain torch, for tests

The compiled code is kept in the cache folder, under a name that changes with any of these files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _is_ours(folder: Path) -> bool:
    """Whether the folder can be had and nobody else may write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    return os.name == "nt" or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


@contextmanager
def _compiled_code_kept() -> Iterator[None]:
    """Inside, Numba's functions get our place for their compiled code. (Its own rule looks at one file's age
    only, but what is compiled here is made of several files; and the package's folder may be read-only.)"""
    from numba.core import config

    from chatwright.data.archives import cache_dir

    # Numba trusts what lies there as it trusts its own code: a folder that others can write to is not used.
    kernels = cache_dir() / "kernels"
    if not _is_ours(kernels):
        yield
        return
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    before = config.CACHE_DIR
    config.CACHE_DIR = str(kernels / digest.hexdigest()[:16])
    try:
        yield
    finally:
        config.CACHE_DIR = before


with _compiled_code_kept():
    from chatwright.generate.kernels.runner import KernelRunner

__all__ = ["KernelRunner"]
