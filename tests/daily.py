"""Which cases of a dear test run every day: one of each kind; `make test-all` runs them all."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def daily(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The cases as parameters, those that are not kept marked slow. Each that is kept must be one of them."""
    cases = list(cases)
    unknown = [k for k in kept if k not in cases]
    assert not unknown, f"no case: {unknown}"
    return [case if case in kept else later(case) for case in cases]


def later(case: Any) -> Any:
    """One case, or the values of one, for `make test-all` alone."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
