"""Which cases of a property run by default, where there are many and each takes long."""

from collections.abc import Collection, Iterable

import pytest


def by_default(few: Collection[str], every: Iterable[str]) -> list:
    """All of them as parameters; those that are not among the few are `slow`."""
    every = list(every)
    assert set(few) <= set(every)
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in every]
