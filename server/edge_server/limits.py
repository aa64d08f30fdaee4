"""How often somebody may ask: token buckets. Pure but for what they remember."""

from __future__ import annotations

from collections import OrderedDict

_MOST_KEYS = 10_000


class Limiter:
    """Lets each key act so many times a minute, all at once if it likes.

    Remembers at most 10,000 keys. Those that were not heard of for longest are forgotten first: by then most of them
    have all of their allowance again.

    Args:
        per_minute: Acts that are allowed, above 0.

    Example:
        >>> limiter = Limiter(2)
        >>> [limiter.wait_s("a", now) for now in (0.0, 0.0, 0.0, 30.0)]
        [0.0, 0.0, 30.0, 0.0]
    """

    def __init__(self, per_minute: int) -> None:
        self._most, self._per_s = float(per_minute), per_minute / 60.0
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, key: str, now: float) -> float:
        """Seconds that the key must wait for its next act; 0: it may now, and has."""
        left, since = self._left.get(key, (self._most, now))
        left = min(self._most, left + max(0.0, now - since) * self._per_s)
        allowed = left >= 1.0
        self._left[key] = (left - 1.0 if allowed else left, now)
        self._left.move_to_end(key)
        if len(self._left) > _MOST_KEYS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._per_s
