"""Which cases of a test are in the fast lane."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """All cases for `parametrize`; those that are not `fast` are in the slow lane. A case is one value, or a tuple of
    several."""
    known = list(cases)
    assert set(fast) <= set(known), f"no cases: {set(fast) - set(known)}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in fast else pytest.mark.slow)
        for case in known
    ]
