"""The three ways in which kernel functions are compiled. None holds Python's lock while it runs, checks for
division by zero, or counts who holds an array (`_nrt`): counters that all threads write to cost more than the
work between them. So none may make an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}

inlined = njit(forceinline=True, error_model="numpy", _nrt=False)
"""Becomes part of whoever calls it."""


def _kept(function: Callable[..., Any], **options: Any) -> Any:
    """Compiled when first called, and kept on the disk where there is a folder to write to."""
    try:
        return njit(cache=True, **_OPTIONS, **options)(function)
    except RuntimeError:  # no folder: it is compiled in every process
        return njit(**_OPTIONS, **options)(function)


def inner(function: Callable[..., Any]) -> Any:
    """For what only compiled code calls: what Python would need to call it takes a tenth of the time to
    compile."""
    return _kept(function, no_cpython_wrapper=True)


def entry(function: Callable[..., Any]) -> Any:
    """For what Python calls."""
    return _kept(function)
