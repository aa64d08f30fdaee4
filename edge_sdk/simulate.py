"""Simulated fleets: the real device code in the time of a clock that is advanced. Same seed, same events.

A `Fleet` follows the plans of a scenario (`edge_sdk.plan`), in one of two ways. In process, devices talk over a broker
in memory and may be spread over several processes; with `broker`, every device has a connection of its own to an MQTT
broker. Either way a tick ends only when all that was sent has arrived.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from edge_sdk.clock import Clock, ManualClock
from edge_sdk.errors import ConfigError, EdgeError, MissingExtraError, TransportError
from edge_sdk.files import without_flushing
from edge_sdk.fleet_report import FleetEvent, FleetReport, ReleaseSummary, build_report
from edge_sdk.fleet_tally import Lived, Tally
from edge_sdk.messages import Ack, Envelope, Topics, decode, encode
from edge_sdk.plan import Prepared
from edge_sdk.scenario import Release
from edge_sdk.shard import Ended, Order, Shard, ShardProcess, Shards, Start, Turned
from edge_sdk.simulated import STARTED, SimulatedDevice
from edge_sdk.streams import HOUR_S
from edge_sdk.transport import MemoryBroker, MemoryTransport, Transport, allow_connections

if TYPE_CHECKING:
    from edge_sdk.mqtt import Address, Tls

logger = logging.getLogger(__name__)
COORDINATORS = "edge_sdk.coordinators"
"""Entry points that open a coordinator for simulations: a `CoordinatorFactory`."""
_WAIT_S = 0.002
_SETTLE_S = 60.0
_SWEEP_S = 5.0
_ROUNDS = 100_000
_FILES_A_DEVICE = 6


class FleetTimeoutError(TransportError):
    """A tick did not settle: something that was sent never arrived. A retry may help on a loaded machine."""


class Coordinator(Protocol):
    """What a fleet needs of its coordinator."""

    def pump(self) -> int:
        """Take in what came, answer it; returns how many messages and blocks were handled."""
        ...

    def advance(self) -> Any:
        """Let rollouts take one turn."""
        ...

    def desired_revision(self, group: str) -> int:
        """Of the group's desired state; 0 before the first."""
        ...

    def release(self, folder: Path, *, group: str, rules: Mapping[str, Any]) -> None:
        """Start the rollout of a checkpoint.

        Args:
            folder: The checkpoint.
            group: Who gets it.
            rules: As in a scenario's `release.rollout`.

        Raises:
            ConfigError: A rule is unknown or impossible.
            EdgeError: It cannot be started.
        """
        ...

    def outcome(self, release: int, group: str) -> tuple[str, str, list[tuple[float, str, str]]] | None:
        """Status, reason and history (seconds since the epoch, status, reason) of a rollout; None: there is none."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


class CoordinatorFactory(Protocol):
    """Opens a coordinator."""

    def __call__(self, home: Path, *, transport: Transport, clock: Clock, prefix: str) -> Coordinator:
        """Open one in a folder of its own; it connects and listens."""
        ...


class Acknowledging:
    """Stands in for a coordinator where there are no releases: it acknowledges what comes, and keeps nothing."""

    def __init__(self, home: Path, *, transport: Transport, clock: Clock, prefix: str) -> None:  # noqa: ARG002
        self._transport, self._topics = transport, Topics(prefix)
        transport.subscribe(f"{prefix}/d/+/up/#")
        transport.connect()

    def pump(self) -> int:
        """Acknowledge what came: once a device, for all that it has sent."""
        last: dict[str, Ack] = {}
        for message in self._transport.receive():
            device, kind = self._topics.parse_up(message.topic) or ("", "")
            if kind in ("event", "report"):
                envelope = decode(message.payload, Envelope)
                last[device] = Ack(envelope.store_id, envelope.seq)
        for device, ack in last.items():
            self._transport.publish(self._topics.down(device, "ack"), encode(ack))
        return len(last)

    def advance(self) -> None:
        """There are no rollouts."""

    def desired_revision(self, group: str) -> int:  # noqa: ARG002
        """There is none."""
        return 0

    def release(self, folder: Path, *, group: str, rules: Mapping[str, Any]) -> None:  # noqa: ARG002
        """It cannot.

        Raises:
            MissingExtraError: Always.
        """
        raise MissingExtraError("a scenario with releases", "server")

    def outcome(self, release: int, group: str) -> None:  # noqa: ARG002
        """There is none."""
        return

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()


def installed_coordinator() -> CoordinatorFactory:
    """The coordinator that is installed beside this package.

    Raises:
        MissingExtraError: None is.
    """
    for entry in entry_points(group=COORDINATORS):
        try:
            found: CoordinatorFactory = entry.load()
        except ImportError as error:
            raise MissingExtraError("a scenario with releases", "server") from error
        return found
    raise MissingExtraError("a scenario with releases", "server")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        time_s: Of the simulation.
        duration_s: Of the whole.
        made: Predictions in this tick.
        right: Right ones among them; of numbers: those within the tolerance.
        off: Of numbers: the sum of their errors; None: labels are predicted.
        predictions: So far.
        alarms: So far, as all below.
        promotions: Of heads.
        rollbacks: Of heads and releases.
        devices: Of this tick, in the order of the plans.
    """

    time_s: float
    duration_s: float
    made: int
    right: int
    off: float | None
    predictions: int
    alarms: int
    promotions: int
    rollbacks: int
    devices: Sequence[Lived]


class Fleet:
    """Devices that follow the plans of a scenario, and their coordinator.

    Args:
        prepared: The scenario.
        broker: URL of an MQTT broker, mqtt://user:password@host:port, or mqtts:// for TLS; "": in process.
        tls: With mqtts://: whom to trust, and the certificate that all connections show, the coordinator's too; None:
            the system's authorities, and none.
        workers: Processes over which devices are spread, in process. The result is the same for any number; None: by
            the size of the fleet and the machine.
        coordinator: Opens one; None: the installed one if there are releases, else one that only acknowledges.
        home: Folder for everything that devices and coordinator write; None: a temporary one, removed by `close`.
        settle_timeout_s: With a broker: real seconds after which a tick that does not settle fails.

    Raises:
        ConfigError: The broker's URL or a certificate cannot be read, or does not go with the rest.
        MissingExtraError: There are releases, and no coordinator is installed.

    Example:
        >>> with Fleet(prepare(Path("scenario.toml"))) as fleet:  # doctest: +SKIP
        ...     report = fleet.run()
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        broker: str = "",
        tls: Tls | None = None,
        workers: int | None = None,
        coordinator: CoordinatorFactory | None = None,
        home: Path | None = None,
        settle_timeout_s: float = _SETTLE_S,
    ) -> None:
        scenario = prepared.scenario
        if broker and workers not in (None, 1):
            raise ConfigError("a fleet with a broker lives in one process; leave out either of both")
        if coordinator is None:
            coordinator = installed_coordinator() if scenario.release else Acknowledging
        if tls is not None and not broker:
            raise ConfigError("certificates were given without a broker; name it as mqtts://host:port")
        self._address = _address(broker, tls) if broker else None
        self._context = self._address.tls.context() if self._address and self._address.tls else None
        if self._address:  # what an earlier run left at the broker must not be heard
            prepared = _with_prefix(prepared, f"simulation-{os.urandom(6).hex()}")
        self.prepared = prepared
        self.clock = ManualClock(STARTED)
        self.workers = 1 if broker else workers or _fitting_workers(prepared)
        self._factory, self._timeout_s = coordinator, settle_timeout_s
        self._given_home, self._home = home, home
        self._prefix = prepared.devices[0].config.prefix
        self._duration_s = scenario.fleet.duration_h * HOUR_S
        self._releases = sorted(scenario.release, key=lambda release: release.at_h)
        self._problems: dict[str, str] = {}
        self._pushed: dict[str, tuple[int, str]] = {}
        self._shards: list[Shards] = []
        self._local: Shard | None = None
        self._swarm: Any = None
        self._tally = Tally(prepared)
        self._counts = dict.fromkeys(("drift_alarm", "promoted", "rolled_back"), 0)
        self._predictions, self._wall_s, self._ended = 0, 0.0, False
        self._order = {plan.name: number for number, plan in enumerate(prepared.devices)}
        self._opened = ExitStack()
        self.coordinator: Coordinator | None = None
        """Once it is open."""
        self.events: list[FleetEvent] = []
        """By tick and device."""
        self.stop_requested = False
        """Set it, from a signal handler for instance, to let `run` end after the tick under way."""

    # ---- running

    @property
    def time_s(self) -> float:
        """Seconds since the start."""
        return self.clock.now() - STARTED

    @property
    def done(self) -> bool:
        """Whether the scenario has come to its end."""
        return self.time_s >= self._duration_s - 1e-6

    @property
    def devices(self) -> list[SimulatedDevice]:
        """Those devices that live in this process: all of them if there is no other."""
        return self._local.devices if self._local else []

    def run(self, *, on_tick: Callable[[Progress], None] | None = None) -> FleetReport:
        """Open it if it is not, run to the end or until `stop_requested`, and report. Closing is up to the caller.

        Raises:
            FleetTimeoutError: With a broker: a tick did not settle.
            EdgeError: The devices could not be opened.
        """
        self.open()
        while not self.done and not self.stop_requested:
            progress = self.tick()
            if on_tick is not None:
                on_tick(progress)
        return self.report()

    def open(self) -> None:
        """Switch on coordinator and devices, and let the first exchange settle. Does nothing if they are."""
        if self._shards:
            return
        began = time.monotonic()
        count = len(self.prepared.devices)
        self._opened.enter_context(without_flushing())
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix="edge-simulation-"))
        allow_connections(_FILES_A_DEVICE * count)
        homes = self._home / "devices"
        if self._address:
            self._open_swarm(homes)
        else:
            self._open_memory(homes)
        assert self.coordinator is not None
        if self._releases:  # what comes later is compared with what devices have
            for group in sorted({plan.config.group for plan in self.prepared.devices}):
                self.coordinator.release(Path(self.prepared.scenario.fleet.checkpoint), group=group, rules={})
        self._all(Order("open"))
        self._settle()
        self._collect()
        self._wall_s += time.monotonic() - began

    def tick(self) -> Progress:
        """One tick: life and a turn of each device, the network, the rollouts, the network."""
        assert self.coordinator is not None, "open it first"
        began = time.monotonic()
        tick_s = self.prepared.scenario.fleet.tick_s
        self._push_due()
        number = round(self.time_s / tick_s) + 1
        now_s = min(number * tick_s, self._duration_s)
        self.clock.advance(now_s - self.time_s)
        lived = self._all(Order("tick", now_s))
        self._settle()
        self.coordinator.advance()
        self._settle()
        for device, life in enumerate(lived):
            self._tally.add(device, now_s, life)
            if life.kept is not None:
                self._tally.kept[device].append((now_s, life.kept))
        self._collect()
        made, right = sum(life.made for life in lived), sum(life.right for life in lived)
        self._predictions += made
        self._wall_s += time.monotonic() - began
        counts, off = self._counts, sum(life.off for life in lived) if self.prepared.world.targets else None
        return Progress(now_s, self._duration_s, made, right, off, self._predictions, counts["drift_alarm"],
                        counts["promoted"], counts["rolled_back"], lived)  # fmt: skip

    def report(self) -> FleetReport:
        """Sum up, once: devices are switched off by it. A run that was stopped before its end gives a partial one."""
        if self._ended:
            raise ValueError("the fleet has reported already")
        began, self._ended = time.monotonic(), True
        ended = [result for result in self._ask(Order("finish")) if isinstance(result, Ended)]
        if self._local is not None and self._address:
            self._swarm_turns()
        self._collect()
        peak = sum(part.peak_mb for part in ended)
        releases = [self._outcome(release) for release in self._releases]
        self._wall_s += time.monotonic() - began
        return build_report(
            self.prepared,
            self._tally,
            devices=[device for part in ended for device in part.devices],
            costs=[cost for part in ended for cost in part.costs],
            events=self.events,
            releases=releases,
            ended_s=self.time_s,
            wall_s=self._wall_s,
            workers=self.workers,
            peak_mb=peak,
        )

    def close(self) -> None:
        """Stop everything that runs, whatever it does, and remove what was temporary. Twice is once."""
        shards, self._shards, self._local = self._shards, [], None
        for shard in shards:
            shard.close()
        if self.coordinator is not None:
            self.coordinator.close()
            self.coordinator = None
        if self._swarm is not None:
            self._sweep()
            self._swarm.close()
            self._swarm = None
        self._opened.close()
        if self._given_home is None and self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sweep(self) -> None:
        """Leave nothing retained at the broker."""
        topics, plans = Topics(self._prefix), self.prepared.devices
        sweeper = self._swarm.transport(f"{self._prefix}-sweeper", **self._login)
        sweeper.connect()
        if not self._swarm.until(lambda: sweeper.connected, min(self._timeout_s, _SWEEP_S)):
            return
        for topic in [*(topics.up(plan.name, "state") for plan in plans),
                      *(topics.desired(group) for group in {plan.config.group for plan in plans})]:  # fmt: skip
            sweeper.publish(topic, b"", retain=True)

    # ---- opening

    def _open_memory(self, homes: Path) -> None:
        broker = MemoryBroker()
        self._post = MemoryTransport(broker)
        for topic in ("d/+/dn/#", "g/#", "b/#", "tuf/#"):
            self._post.subscribe(f"{self._prefix}/{topic}")
        self._post.connect()
        self._open_coordinator(MemoryTransport(broker))
        count = len(self.prepared.devices)
        ends = [round(count * i / self.workers) for i in range(self.workers + 1)]
        for first, last in pairwise(ends[:-1]):
            self._shards.append(ShardProcess(Start(self.prepared.scenario, first, last, str(homes))))
        # this process would only wait for the others: it takes its part, after they have begun with theirs
        self._local = Shard(self.prepared, range(ends[-2], count), homes)
        self._shards.append(self._local)

    def _open_swarm(self, homes: Path) -> None:
        from edge_sdk.swarm import Swarm  # noqa: PLC0415 - only with a broker

        assert self._address is not None
        host, port, username, password, _ = self._address
        count = len(self.prepared.devices)
        self._swarm = Swarm(host, port, tls=self._context)
        self._login = {"username": username, "password": password}

        def transport(name: str) -> Transport:
            made: Transport = self._swarm.transport(f"{self._prefix}-{name}", **self._login)
            return made

        allow_connections((_FILES_A_DEVICE + 1) * count)
        self._swarm.start()
        self._open_coordinator(transport("coordinator"))
        self._local = Shard(self.prepared, range(count), homes, transports=transport)
        self._shards.append(self._local)

    def _open_coordinator(self, transport: Transport) -> None:
        assert self._home is not None
        self.coordinator = self._factory(
            self._home / "coordinator", transport=transport, clock=self.clock, prefix=self._prefix
        )

    # ---- releases

    def _push_due(self) -> None:
        assert self.coordinator is not None
        for release in self._releases:
            key = _name(release)
            if key in self._pushed or key in self._problems or release.at_h * HOUR_S > self.time_s:
                continue
            try:
                self.coordinator.release(Path(release.checkpoint), group=release.group, rules=release.rollout)
                self._pushed[key] = (_number(release), release.group)
            except ConfigError:
                raise
            except EdgeError as error:
                self._problems[key] = str(error)
                logger.warning("%s was not pushed: %s", key, error)

    def _outcome(self, release: Release) -> ReleaseSummary:
        key = _name(release)
        found = None
        if self.coordinator is not None and key in self._pushed:
            found = self.coordinator.outcome(*self._pushed[key])
        status, reason, history = found or ("not pushed", self._problems.get(key, "the simulation ended before"), [])
        hours = [(round((at - STARTED) / HOUR_S, 4), step, why) for at, step, why in history]
        return ReleaseSummary(name=key, group=release.group, bad=release.bad, at_h=release.at_h, status=status,
                              reason=reason, history=hours)  # fmt: skip

    # ---- the network

    def _ask(self, order: Order) -> list[object]:
        """Let all shards do the same beside each other; their results in order."""
        for shard in self._shards:
            shard.begin(order)
        return [shard.result() for shard in self._shards]

    def _all(self, order: Order) -> list[Lived]:
        """A round of all shards: their mail is brought before and fetched after it."""
        if not self._address:
            order = msgspec.structs.replace(order, down=[(m.topic, m.payload) for m in self._post.receive()])
        elif order.what == "tick":
            self._await_lines(order.time_s)
        turned = [result for result in self._ask(order) if isinstance(result, Turned)]
        self._waiting = sum(part.waiting for part in turned)
        if not self._address:
            for part in turned:
                for topic, payload in part.up:
                    self._post.publish(topic, payload, retain=topic.endswith("/up/state"))
        return [life for part in turned for life in part.lived]

    def _settle(self) -> None:
        """Let messages travel until nobody waits for any.

        Raises:
            FleetTimeoutError: It takes longer than it may; the message says who waits for what.
        """
        assert self.coordinator is not None
        if self._address:
            self._settle_swarm()
            return
        for _ in range(_ROUNDS):
            while self.coordinator.pump():
                pass
            if not self._waiting and all(self._is_ack(message.topic) for message in self._post.unread):
                return
            self._all(Order("round"))
        raise FleetTimeoutError(f"{self.time_s / HOUR_S:.2f} h: messages never cease")

    def _is_ack(self, topic: str) -> bool:
        return topic.endswith("/dn/ack")

    def _await_lines(self, time_s: float) -> None:
        """Cut the lines that are to be cut by now and mend the others, and wait until they are."""
        lines = [simulated.line for simulated in self.devices if simulated.line.is_open]
        for simulated in self.devices:
            simulated.line.online = simulated.plan.online(time_s)
        self._await(lambda: [line for line in lines if line.online and not line.connected], "a connection")

    def _settle_swarm(self) -> None:
        assert self.coordinator is not None
        assert self._local is not None
        deadline = time.monotonic() + self._timeout_s
        online = [s for s in self.devices if s.device is not None and s.line.online]
        self._await(lambda: [s for s in online if not s.line.connected], "a connection")
        while True:
            handled = self.coordinator.pump()
            urgent = self._local.urgent()
            for simulated in urgent:
                simulated.turn()
            if handled or urgent:
                continue
            waiting = next(((s.plan.name, why) for s in online if (why := self._waits(s))), None)
            if waiting is None:
                return
            if time.monotonic() > deadline:
                raise FleetTimeoutError(f"{self.time_s / HOUR_S:.2f} h: {waiting[0]} waits in vain for {waiting[1]}")
            threading.Event().wait(_WAIT_S)  # the network has its own time, whatever the clock says

    def _waits(self, simulated: SimulatedDevice) -> str:
        """What a device waits for, or "": everything that was sent by it, to it, or is on its way to it."""
        assert self.coordinator is not None
        if simulated.line.unacknowledged:
            return f"{simulated.line.unacknowledged} acknowledgements"
        if simulated.line.revision < (wanted := self.coordinator.desired_revision(simulated.plan.config.group)):
            return f"desired state {wanted}, has {simulated.line.revision}"
        return f"{len(simulated.line.fetching)} files" if simulated.line.fetching else ""

    def _await(self, missing: Callable[[], list[Any]], what: str) -> None:
        if not self._swarm.until(lambda: not missing(), self._timeout_s):
            raise FleetTimeoutError(f"{len(missing())} devices still wait for {what}: {self._swarm.last_error or ''}")

    def _swarm_turns(self) -> None:
        """Take in the goodbyes."""
        if self.coordinator is not None:
            self.coordinator.pump()

    def _collect(self) -> None:
        """What happened in this tick, by device."""
        new = [event for part in self._ask(Order("events")) for event in part]  # type: ignore[attr-defined]
        for event in sorted(new, key=lambda event: self._order[event.device]):
            self.events.append(event)
            name = "rolled_back" if event.name.endswith("rolled_back") else event.name
            if name in self._counts:
                self._counts[name] += 1


def _fitting_workers(prepared: Prepared) -> int:
    """As many processes as there are cores, if there is enough to do for them."""
    fleet = prepared.scenario.fleet
    turns = len(prepared.devices) * fleet.duration_h * HOUR_S / fleet.tick_s
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, len(prepared.devices), math.ceil(turns / 200)))


def _with_prefix(prepared: Prepared, prefix: str) -> Prepared:
    from dataclasses import replace  # noqa: PLC0415

    devices = tuple(replace(plan, config=msgspec.structs.replace(plan.config, prefix=prefix))
                    for plan in prepared.devices)  # fmt: skip
    return replace(prepared, devices=devices)


def _address(url: str, tls: Tls | None) -> Address:
    """Where the broker is.

    Raises:
        ConfigError: It is neither an mqtt:// nor an mqtts:// URL, or there are certificates and no encryption.
    """
    from edge_sdk.mqtt import read_url  # noqa: PLC0415 - only with a broker

    try:
        return read_url(url, tls=tls)
    except ValueError as error:
        raise ConfigError(f"this is no broker's URL for a simulation: {error}") from error


def _number(release: Release) -> int:
    from edge_sdk.manifest import MANIFEST_NAME, parse_manifest  # noqa: PLC0415

    return parse_manifest((Path(release.checkpoint) / MANIFEST_NAME).read_bytes()).release


def _name(release: Release) -> str:
    return f"release {_number(release)}" + ("" if release.group == "default" else f" for {release.group}")
