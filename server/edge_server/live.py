"""Server-sent events: a page is told which parts of the records changed, and fetches itself anew."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Collection

from starlette.responses import StreamingResponse

from edge_sdk.errors import EdgeError
from edge_server.registry import Registry

TOPICS = ("devices", "rollouts", "alerts", "audit")
"""What pages say they show, and streams say has changed."""
LOOK_S = 1.0
_QUIET_LOOKS = 15
"""So many looks without a change: a comment goes out, so that nobody in between takes the line for dead."""


def seen(registry: Registry, topics: Collection[str]) -> str:
    """Names what a page of these topics is about to show: what changes before its stream begins is told as well."""
    versions = registry.store.live.versions()
    return hashlib.sha256(repr([versions[topic] for topic in TOPICS if topic in topics]).encode()).hexdigest()[:16]


def stream(
    registry: Registry, allowed: Callable[[], bool], *, topics: Collection[str] = (), shown: str = ""
) -> StreamingResponse:
    """The stream of one browser; ends when it goes, or is not allowed any more.

    Args:
        registry: The fleet's records.
        allowed: Whether it may go on.
        topics: Of the page.
        shown: What the page shows, by `seen`; "": that is not known.
    """
    return StreamingResponse(events(registry, allowed, topics, shown), media_type="text/event-stream")


async def events(
    registry: Registry, allowed: Callable[[], bool], topics: Collection[str], shown: str, *, look_s: float = LOOK_S
) -> AsyncIterator[str]:
    """The lines of a stream; arguments as `stream`."""
    known, quiet = registry.store.live.versions(), 0
    yield "retry: 3000\n\n"
    if shown and shown != seen(registry, topics):
        yield f"event: change\ndata: {' '.join(topics)}\n\n"
    while True:
        await asyncio.sleep(look_s)
        try:
            if not allowed():
                return
            found = registry.store.live.versions()
        except EdgeError:  # the database is busy or gone: the next look says
            continue
        changed = [topic for topic in TOPICS if known[topic] != found[topic]]
        known, quiet = found, 0 if changed else quiet + 1
        if changed:
            yield f"event: change\ndata: {' '.join(changed)}\n\n"
        elif quiet == _QUIET_LOOKS:
            quiet = 0
            yield ": still here\n\n"
