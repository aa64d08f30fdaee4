"""Server-sent events: a page is told which parts of the records changed, and fetches itself anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse

from edge_sdk.errors import EdgeError
from edge_server.registry import Registry

LOOK_S = 1.0
_QUIET_LOOKS = 15
"""So many looks without a change: a comment goes out, so that nobody in between takes the line for dead."""


def stream(registry: Registry, allowed: Callable[[], bool], *, look_s: float = LOOK_S) -> StreamingResponse:
    """The stream of one browser; ends when it goes, or is not allowed any more."""
    return StreamingResponse(_events(registry, allowed, look_s), media_type="text/event-stream")


async def _events(registry: Registry, allowed: Callable[[], bool], look_s: float) -> AsyncIterator[str]:
    known, quiet = _versions(registry), 0
    yield "retry: 3000\n\n"
    while True:
        await asyncio.sleep(look_s)
        try:
            if not allowed():
                return
            found = _versions(registry)
        except EdgeError:  # the database is busy or gone: the next look says
            continue
        changed = [topic for topic, version in found.items() if known[topic] != version]
        known, quiet = found, 0 if changed else quiet + 1
        if changed:
            yield f"event: change\ndata: {' '.join(changed)}\n\n"
        elif quiet == _QUIET_LOOKS:
            quiet = 0
            yield ": still here\n\n"


def _versions(registry: Registry) -> dict[str, object]:
    return registry.store.live.versions()
