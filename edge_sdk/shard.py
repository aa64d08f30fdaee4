"""A part of a simulated fleet: real devices that live by their plans, in this process or in one of their own.

Whatever crosses between a shard and the fleet is a struct, so that a shard behind a pipe is driven as one in place. All
shards take each round of messages together, so that it makes no difference how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
import numpy as np

from edge_sdk.clock import ManualClock
from edge_sdk.errors import EdgeError, TransportError
from edge_sdk.files import without_flushing
from edge_sdk.fleet_report import Cost, DeviceSummary, FleetEvent
from edge_sdk.fleet_tally import Lived
from edge_sdk.plan import Prepared, prepare_scenario
from edge_sdk.runtime import ModelRuntime, WholeModel
from edge_sdk.scenario import Scenario
from edge_sdk.simulated import STARTED, Judge, SimulatedDevice
from edge_sdk.transport import MemoryBroker, MemoryTransport, Transport
from edge_sdk.types import FloatArray, LatentArray

logger = logging.getLogger(__name__)
_POOL_ROWS, _POOLS = 100, 16
"""From so many rows on, the latents of a batch are remembered, and of how many batches."""
_SQLITE_BYTES = 32_000_000
"""What the databases of all devices of a process may hold in memory, beyond which they read again."""


class Turned(msgspec.Struct, frozen=True, array_like=True):
    """What a shard did in a round."""

    up: list[tuple[str, bytes]]
    """What its devices sent: topics and payloads."""
    waiting: int
    """Devices with mail that will not wait for the next tick."""
    lived: list[Lived] = []
    """By device, after a tick."""


class Order(msgspec.Struct, frozen=True, array_like=True):
    """What a shard is to do: "open", "tick", "round", "events" or "finish"."""

    what: str
    time_s: float = 0.0
    """Of the fleet's clock, from the start."""
    down: list[tuple[str, bytes]] = []
    """What the coordinator sent."""


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """What became of a shard's devices."""

    devices: list[DeviceSummary]
    costs: list[Cost]
    peak_mb: float


class Start(msgspec.Struct, frozen=True):
    """What a shard in a process of its own begins with."""

    scenario: Scenario
    first: int
    last: int
    home: str


class _Trunks(dict[str, ModelRuntime | WholeModel]):
    """Loaded trunks by content. The first one stays, and knows what is scored by all devices."""

    def setdefault(self, key: str, trunk: Any = None) -> Any:
        """What is there, or else this one."""
        if key not in self:
            self[key] = trunk
        return self[key]

    def __setitem__(self, key: str, trunk: ModelRuntime | WholeModel) -> None:
        if not isinstance(trunk, WholeModel | _KnowsPools):
            trunk = _KnowsPools(trunk)
        super().__setitem__(key, trunk)


class _KnowsPools:
    """A trunk that remembers the latents of large batches: devices are all scored on the same ones."""

    def __init__(self, inner: ModelRuntime) -> None:
        self._inner = inner
        self._known: dict[bytes, LatentArray] = {}

    def latents(self, x: FloatArray) -> LatentArray:
        """As of the trunk."""
        if len(x) < _POOL_ROWS:
            return self._inner.latents(x)
        key = hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).digest()
        if (found := self._known.get(key)) is None:
            found = self._inner.latents(x)
            if len(self._known) >= _POOLS:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        return found


# ---- several devices


class Shards(Protocol):
    """What a fleet needs of a shard, wherever it runs."""

    def begin(self, order: Order) -> None:
        """Hand over an order."""
        ...

    def result(self) -> object:
        """What came of it: `Turned`, `Ended`, or for "events" a list of `FleetEvent`."""
        ...

    def close(self) -> None:
        """Stop, whatever is under way."""
        ...


class Shard:
    """Devices of one process, on a broker of their own or with connections that are given.

    Args:
        prepared: The scenario.
        numbers: Which of its devices.
        home: Folder for theirs.
        transports: Makes the connection of the device of a name; None: to a broker in memory.
    """

    def __init__(
        self,
        prepared: Prepared,
        numbers: range,
        home: Path,
        *,
        transports: Callable[[str], Transport] | None = None,
    ) -> None:
        limit_databases()
        self.clock = ManualClock(STARTED)
        self.devices: list[SimulatedDevice] = []
        self._broker = MemoryBroker()
        self._post = MemoryTransport(self._broker)
        self._result: object = None
        prefix = prepared.devices[0].config.prefix
        self._retained = (f"{prefix}/g/", f"{prefix}/tuf/")
        self._post.subscribe(f"{prefix}/d/+/up/#")
        self._post.connect()
        world, trunks, files = prepared.world, _Trunks(), dict[str, Path]()
        judge = Judge(world, prepared.manifest)
        labels = prepared.scenario.data.labels
        original = world.score.only(world.numbers(labels)) if labels else world.score
        for number in numbers:
            plan = prepared.devices[number]
            transport = transports(plan.name) if transports else MemoryTransport(self._broker)
            self.devices.append(
                SimulatedDevice(plan, prepared, home=home / plan.name, clock=self.clock, trunks=trunks,
                                transport=transport, original=original, judge=judge, files=files)
            )  # fmt: skip

    def begin(self, order: Order) -> None:
        """Do it."""
        for topic, payload in order.down:
            self._post.publish(topic, payload, retain=topic.startswith(self._retained))
        before_s = self.clock.now() - STARTED
        self.clock.advance(max(0.0, order.time_s - before_s))
        lived: list[Lived] = []
        match order.what:
            case "open":
                for simulated in self.devices:
                    simulated.open()
                    simulated.turn()
            case "tick":
                lived = [simulated.live(before_s, order.time_s) for simulated in self.devices]
            case "round":
                for simulated in self.urgent():
                    simulated.turn()
            case "events":
                self._result = [event for simulated in self.devices for event in simulated.take_events()]
                return
            case "finish":
                found = [simulated.finish() for simulated in self.devices]
                self._result = Ended([summary for summary, _ in found], [cost for _, cost in found], peak_memory_mb())
                return
        up = [(message.topic, message.payload) for message in self._post.receive()]
        self._result = Turned(up, len(self.urgent()), lived)

    def result(self) -> object:
        """What came of the last order."""
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Stop every device; their folders stay."""
        for simulated in self.devices:
            if simulated.device is not None:
                with contextlib.suppress(EdgeError):
                    simulated.device.stop()
                simulated.device = None

    def urgent(self) -> list[SimulatedDevice]:
        """Devices that are on and have mail that will not wait for the next tick."""
        return [simulated for simulated in self.devices if simulated.device is not None and simulated.line.urgent]


def peak_memory_mb() -> float:
    """Most memory that this process has had."""
    import resource  # noqa: PLC0415 - only Unix has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def limit_databases() -> None:
    """Keep the pages that SQLite holds for a thousand databases of one process within bounds."""
    import sqlite3  # noqa: PLC0415 - not needed to read this module

    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA soft_heap_limit = {_SQLITE_BYTES}")


# ---- a process of its own


class ShardProcess:
    """A shard behind a pipe. It ends with this process, whatever ends it.

    Args:
        start: What it begins with.
    """

    def __init__(self, start: Start) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = {"PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
        # a plain child: multiprocessing would run the app's main again, or copy sessions and threads
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edge_sdk.shard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, **path},
        )
        self._kind: type = Turned
        self._write(start)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    def begin(self, order: Order) -> None:
        """Hand over an order; returns at once."""
        self._kind = {"finish": Ended, "events": list[FleetEvent]}.get(order.what, Turned)
        self._write(order)

    def result(self) -> object:
        """Wait for what came of it.

        Raises:
            TransportError: The process has ended.
        """
        assert self._child.stdout is not None
        data = read_frame(self._child.stdout)
        if data is None:
            raise TransportError(f"a process of the simulation ended with code {self._child.wait()}; see its messages")
        return msgspec.msgpack.decode(data, type=self._kind)

    def close(self) -> None:
        """Stop it, whatever is under way."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.kill()
        self._child.wait()

    def _write(self, message: msgspec.Struct) -> None:
        assert self._child.stdin is not None
        try:
            write_frame(self._child.stdin, msgspec.msgpack.encode(message))
        except OSError as error:
            raise TransportError("a process of the simulation has ended; see its messages") from error


def write_frame(pipe: IO[bytes], data: bytes) -> None:
    """A message with its length before it."""
    pipe.write(len(data).to_bytes(8, "big") + data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """What `write_frame` wrote; None: the other end is gone."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "big")
    data = pipe.read(size)
    return data if len(data) == size else None


def main() -> int:
    """Serve orders from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the fleet decides
    orders, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not come between
    if (data := read_frame(orders)) is None:
        return 0
    start = msgspec.msgpack.decode(data, type=Start)
    with without_flushing():
        shard = Shard(prepare_scenario(start.scenario), range(start.first, start.last), Path(start.home))
        while (data := read_frame(orders)) is not None:
            shard.begin(msgspec.msgpack.decode(data, type=Order))
            write_frame(results, msgspec.msgpack.encode(shard.result()))
    return 0  # nobody will read the folders: the fleet is gone, or has all that it wants


if __name__ == "__main__":
    sys.exit(main())
