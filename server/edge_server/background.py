"""Answers that take long to read together: one thread with its own connection, and what it found a moment ago."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from edge_server.registry import Registry

T = TypeVar("T")
_KEEP_S = 60.0
_MOST = 64


async def apart(registry: Registry, job: Callable[[Registry], T]) -> T:
    """What `job` gives, on a thread with a connection of its own: the event loop goes on meanwhile."""
    return await run_in_threadpool(_job, registry, job)


def _job(registry: Registry, job: Callable[[Registry], T]) -> T:
    own = registry.reopen()
    try:
        return job(own)
    finally:
        own.close()


class Background:
    """Runs slow look-ups one after the other beside the event loop.

    Args:
        registry: The fleet's records; the thread opens them anew for itself, and closes them after each look-up.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edge-lookup")
        self._running: dict[str, asyncio.Future[object]] = {}
        self._found: OrderedDict[str, tuple[float, object]] = OrderedDict()

    async def run(self, key: str, job: Callable[[Registry], T], *, keep_s: float = _KEEP_S) -> T:
        """What `job` gives, or gave under that key within `keep_s`; who asks meanwhile waits for the same answer."""
        now = self._registry.clock.timer()
        if (known := self._found.get(key)) is not None and now - known[0] < keep_s:
            return known[1]  # type: ignore[return-value]  # by the key
        if (running := self._running.get(key)) is None:
            running = asyncio.get_running_loop().run_in_executor(self._thread, _job, self._registry, job)
            self._running[key] = running
            running.add_done_callback(lambda _: self._running.pop(key, None))
        found = await asyncio.shield(running)
        self._found[key] = (self._registry.clock.timer(), found)
        self._found.move_to_end(key)
        if len(self._found) > _MOST:
            self._found.popitem(last=False)
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Wait for no further look-up."""
        self._thread.shutdown(wait=False, cancel_futures=True)
