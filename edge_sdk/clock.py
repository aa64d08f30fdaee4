"""Time as an argument: the system's, or one that tests and simulations advance by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the device asks for the time."""

    def now(self) -> float:
        """Seconds since the epoch (UTC)."""
        ...

    def timer(self) -> float:
        """Seconds since any instant, to measure how long something takes."""
        ...


def is_due(now: float, since: float, seconds: float) -> bool:
    """Whether `seconds` have passed since `since`. A clock that was set back makes all due, rather than nothing."""
    return now < since or now - since >= seconds


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Seconds since the epoch (UTC)."""
        return time.time()

    timer = staticmethod(time.perf_counter)


class ManualClock:
    """A clock that stands still until it is advanced. Shared by every part of a simulation.

    Example:
        >>> clock = ManualClock(100.0)
        >>> clock.advance(5)
        >>> clock.now()
        105.0
    """

    def __init__(self, start: float = 1_767_225_600.0) -> None:
        self._now = float(start)

    def now(self) -> float:
        """Seconds since the epoch (UTC), as last set."""
        return self._now

    def timer(self) -> float:
        """The same: while the clock stands still nothing takes time, and a simulation depends on its seed alone."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (>= 0).

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a clock advances by zero or more seconds, got {seconds}")
        self._now += seconds
