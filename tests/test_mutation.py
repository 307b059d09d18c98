"""The mutations of tests/support: what is no mutation, or none that a test tells, is an error."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from support.mutation import Mutant


def half(value: float) -> float:
    return value / 2


def quarter(value: float) -> float:
    return half(half(value))


@jaxtyped(typechecker=beartype)
def total(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return values.sum()


class Box:
    def half(self, value: float) -> float:
        return value / 2


def check_quarter(module: object) -> None:
    assert module.quarter(8.0) == 2.0  # type: ignore[attr-defined]


def check_total(module: object) -> None:
    assert float(module.total(torch.ones(3))) == 3.0  # type: ignore[attr-defined]


def check_box(module: object) -> None:
    assert module.Box().half(8.0) == 4.0  # type: ignore[attr-defined]


def test_the_mutant_is_called_by_the_functions_of_its_module_and_by_no_other() -> None:
    mutant = Mutant("not halved", half, "value / 2", "value")
    mutant.must_fail(check_quarter)
    assert mutant.module().quarter(8.0) == 8.0
    assert quarter(8.0) == 2.0


def test_decorated_functions_and_methods() -> None:
    mutant = Mutant("mean", total, ".sum()", ".mean()")
    mutant.must_fail(check_total)
    with pytest.raises(TypeCheckError):
        mutant.module().total(torch.ones(3, 3))
    Mutant("not halved", Box.half, "value / 2", "value").must_fail(check_box)


def test_a_mutation_that_no_longer_matches_is_an_error() -> None:
    for old, new in (("value / 3", "value"), ("value", "other"), ("value / 2", "value / 2")):
        with pytest.raises(LookupError, match="adapt the mutation"):
            Mutant("stale", half, old, new).must_fail(check_quarter)


def test_a_mutation_that_is_not_noticed_fails_and_so_does_one_that_breaks_down() -> None:
    with pytest.raises(pytest.fail.Exception, match="does not notice the mutation 'as good'"):
        Mutant("as good", half, "value / 2", "value * 0.5").must_fail(check_quarter)
    with pytest.raises(NameError):
        Mutant("broken", half, "value / 2", "valeu / 2").must_fail(check_quarter)


def test_the_check_must_pass_for_the_code_as_it_is() -> None:
    def check(module: object) -> None:
        assert module.half(8.0) == 8.0  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="4"):
        Mutant("not halved", half, "value / 2", "value").must_fail(check)
