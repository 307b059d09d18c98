"""torch.compile is optional."""

from __future__ import annotations

import pytest

from chatwright import compiler


def test_compiling_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_DEVICE", "cpu")

    def double(x: int) -> int:
        return 2 * x

    function, line = compiler.compile_function(double, enabled=False)
    assert function is double and "asked for" in line
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    function, line = compiler.compile_function(double)
    assert function is double and "no C++ compiler" in line
