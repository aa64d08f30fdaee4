"""The second source of files and metadata: range requests to the coordinator or any static web server.

One request at a time, on a thread of its own that ends with it, so that a turn of the device never waits. What comes
is believed no more than what comes over MQTT.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException

import msgspec

from edge_sdk.clock import is_due
from edge_sdk.errors import ConfigError

logger = logging.getLogger(__name__)
_MAX_METADATA = 120_000
_MAX_ROOTS = 256
_TIMEOUT_S = 20.0
_STALL_S = 60.0
_RANGE_BLOCKS = 16

Block = tuple[str, int, bytes]


class _Version(msgspec.Struct):
    version: int


class _Meta(msgspec.Struct):
    version: int
    meta: dict[str, _Version] = {}


class _Envelope(msgspec.Struct):
    signed: _Meta


_READ = msgspec.json.Decoder(_Envelope)


class HttpSource:
    """Files from `{url}/blobs/{SHA-256}`, metadata from `{url}/tuf/{name}.json`.

    Args:
        url: Where the two folders are.
        retry_s: After a failure it is left alone for so long.
    """

    def __init__(self, url: str, *, retry_s: float) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"update.url must begin with http:// or https://, not {url!r}")
        self._url, self._retry_s = url.rstrip("/"), retry_s
        self._thread: threading.Thread | None = None
        self._blocks: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self._metadata: queue.SimpleQueue[dict[str, bytes]] = queue.SimpleQueue()
        self._progress_at = 0.0
        self._failed = ""
        self._failed_at: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._thread is not None and self._thread.is_alive()

    def usable(self, now: float) -> bool:
        """Whether it makes sense to ask: it did not just fail."""
        if self.busy and time.monotonic() - self._progress_at > _STALL_S:
            self._thread, self._failed = None, f"nothing came for {_STALL_S:g} s"  # the thread ends with its line
        if self._failed and not self.busy:
            logger.warning("%s: %s; MQTT goes on meanwhile", self._url, self._failed)
            self._failed, self._failed_at = "", now
        return self._failed_at is None or is_due(now, self._failed_at, self._retry_s)

    def ask(self, digest: str, size: int, block_bytes: int, missing: list[int]) -> None:
        """Begin to fetch the first run of missing blocks, unless a request is under way."""
        if missing and not self.busy:
            first, count = missing[0], 1
            while count < _RANGE_BLOCKS and count < len(missing) and missing[count] == first + count:
                count += 1
            self._start(lambda: self._get_blocks(digest, size, block_bytes, first, count))

    def ask_metadata(self, root: int) -> None:
        """Begin to fetch all metadata, with the roots above `root`, unless a request is under way."""
        if not self.busy:
            self._start(lambda: self._metadata.put(self._get_metadata(root)))

    def blocks(self) -> list[Block]:
        """Blocks that have come since the last call: SHA-256 of the file, number, bytes."""
        return _drain(self._blocks)

    def metadata(self) -> dict[str, bytes]:
        """The metadata that has come since the last call, by name; the whole set or nothing."""
        return {name: data for part in _drain(self._metadata) for name, data in part.items()}

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
                self._failed_at = None
            except (OSError, HTTPException, ValueError, msgspec.MsgspecError) as error:
                self._failed = str(error) or type(error).__name__

        self._progress_at = time.monotonic()
        self._thread = threading.Thread(target=run, name="edge-http", daemon=True)
        self._thread.start()

    def _get_blocks(self, digest: str, size: int, block_bytes: int, first: int, count: int) -> None:
        start, end = first * block_bytes, min(size, (first + count) * block_bytes)
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            f"{self._url}/blobs/{digest}", headers={"Range": f"bytes={start}-{end - 1}"}
        )
        with contextlib.closing(self._open(request)) as response:
            if response.status == 200:  # a server without ranges sends it all
                index, last = 0, size
            elif response.status == 206 and re.match(rf"bytes {start}-", response.headers.get("Content-Range", "")):
                index, last = first, end
            else:
                raise ValueError(f"status {response.status} to a range request")
            while (position := index * block_bytes) < last:
                data = response.read(min(block_bytes, last - position))
                if len(data) != min(block_bytes, last - position):
                    raise ValueError(f"{digest[:12]}… ended early")
                self._blocks.put((digest, index, data))
                self._progress_at = time.monotonic()
                index += 1

    def _get_metadata(self, root: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for number in range(root + 1, root + _MAX_ROOTS):
            data = self._get(f"{number}.root")
            if data is None:
                break
            found[f"{number}.root"] = data
        found["timestamp"] = self._must(self._get("timestamp"), "timestamp")
        for role, before in (("snapshot", "timestamp"), ("targets", "snapshot")):
            number = _READ.decode(found[before]).signed.meta[f"{role}.json"].version
            found[role] = self._must(self._get(f"{number}.{role}"), role)
        return found

    def _get(self, name: str) -> bytes | None:
        request = urllib.request.Request(f"{self._url}/tuf/{name}.json")  # noqa: S310 - the scheme was checked
        try:
            with contextlib.closing(self._open(request)) as response:
                data: bytes = response.read(_MAX_METADATA + 1)
        except urllib.error.HTTPError as error:
            if error.code in (403, 404):
                return None
            raise
        if len(data) > _MAX_METADATA:
            raise ValueError(f"{name}.json is larger than {_MAX_METADATA} bytes")
        return data

    def _must(self, data: bytes | None, name: str) -> bytes:
        if data is None:
            raise ValueError(f"{name} is not there")
        return data

    def _open(self, request: urllib.request.Request):  # type: ignore[no-untyped-def]  # noqa: ANN202
        context = ssl.create_default_context() if request.type == "https" else None
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context)  # noqa: S310


def _drain(source: queue.SimpleQueue) -> list:  # type: ignore[type-arg]
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(source.get_nowait())
    return found


def set_of(found: dict[str, bytes], root: int) -> dict[str, int]:
    """The versions of a set of metadata that came together, to be announced.

    Args:
        found: As `HttpSource.metadata` gives it.
        root: The newest root before it.
    """
    roots = [int(name.partition(".")[0]) for name in found if name.endswith(".root")]
    versions = {role: _READ.decode(found[role]).signed.version for role in ("timestamp", "snapshot", "targets")}
    return {"root": max(roots, default=root), **versions}
