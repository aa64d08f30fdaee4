"""Memory that the process no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

_MOST = 0.02
"""Of the time, at most: with a thousand devices in one process, a trim takes long and is asked for all the time."""
_next_at = 0.0


def trim_memory() -> None:
    """Give freed memory back, where the C library can; elsewhere, or if it was done just now, nothing happens.

    Loading a model parses it into many small blocks and frees them; glibc keeps the pages. Takes about a millisecond.

    Source:
        malloc_trim(3) of the GNU C library.
    """
    global _next_at  # noqa: PLW0603 - one process, one heap
    trim, began = _malloc_trim(), time.perf_counter()
    if trim is not None and began >= _next_at:
        trim(0)
        ended = time.perf_counter()
        _next_at = ended + (ended - began) / _MOST


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library, or none that can be asked
        return None
    return trim
