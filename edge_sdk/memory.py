"""Memory that the process no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def trim_memory() -> None:
    """Give freed memory back, where the C library can; elsewhere nothing happens.

    Loading a model parses it into many small blocks and frees them; glibc keeps the pages. Takes about a millisecond.

    Source:
        malloc_trim(3) of the GNU C library.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library, or none that can be asked
        return None
    return trim
