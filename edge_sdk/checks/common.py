"""What the contract suites share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.types import AnyArray


class CheckFailed(AssertionError):  # noqa: N818 - an `AssertionError`, so named like one
    """An implementation breaks its contract; the message says which rule."""


def require(condition: bool, message: str) -> None:  # noqa: FBT001 - an `assert` that -O leaves in
    """Raise `CheckFailed` with the rule unless it holds."""
    if not condition:
        raise CheckFailed(message)


def require_raises(error: type[Exception], call: Callable[[], object], message: str) -> None:
    """Raise `CheckFailed` with the rule unless the call raises this error."""
    try:
        call()
    except error:
        return
    raise CheckFailed(f"{message}: {error.__name__} expected, nothing was raised")


def same(first: dict[str, AnyArray], second: dict[str, AnyArray]) -> bool:
    """Whether two states hold equal arrays under the same names."""
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
