"""torch.compile, where this machine has what it needs; else the plain function, and a line that says why."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from typing import Any

import torch

from chatwright import runtime


def compiler_missing() -> str | None:
    """Why torch.compile cannot be used here, or None when it can."""
    if runtime.device().type == "cuda":
        return None
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "g++")
    if not any(shutil.which(name) for name in (compiler, "clang++", "c++")):
        return f"no C++ compiler ({compiler}) is installed"
    return None


def compile_function(function: Any, *, enabled: bool = True, sizes_change: bool = False) -> tuple[Any, str]:
    """`torch.compile(function)` where that works, else the function itself; and a line that says which and
    why. Compiled code is specialised for its shapes, unless `sizes_change`."""
    if not enabled:
        return function, "compile: off (asked for)"
    missing = compiler_missing()
    if missing:
        return function, f"compile: off ({missing}); training runs, about 1.4 times slower"
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setuptools warns when distutils was imported before it
        import setuptools  # noqa: F401  (the compiler's threads import it; two at once break each other's import)
    return _OrPlain(function, torch.compile(function, dynamic=sizes_change)), "compile: on"


class _OrPlain:
    """A compiled function that falls back to the plain one, with a printed line, when the compiler fails: at
    the first call or when it recompiles."""

    def __init__(self, plain: Any, compiled: Any) -> None:
        self.plain, self.chosen = plain, compiled

    def __call__(self, *arguments: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.chosen(*arguments)
        except TorchDynamoException as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"  compile: off, the compiler failed ({reason}); training runs, slower")
            self.chosen = self.plain
            return self.plain(*arguments)
