"""A simulated device: a real one that lives by its plan, on a connection that is counted and can be cut."""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_sdk.clock import Clock, ManualClock
from edge_sdk.device import EdgeDevice
from edge_sdk.errors import InputError, LabelError, NotConnectedError
from edge_sdk.fleet_report import Cost, DeviceSummary, FleetEvent, alarm_facts, changed_at, extreme_at
from edge_sdk.fleet_tally import Lived
from edge_sdk.manifest import MANIFEST_NAME, Manifest, parse_manifest
from edge_sdk.messages import Ack, Desired, Envelope, Topics, decode
from edge_sdk.model import Trunks
from edge_sdk.plan import DAY_S, DevicePlan, Prepared, SkewedClock
from edge_sdk.policy import ResourceState
from edge_sdk.streams import HOUR_S, Pool, ScriptedStream, World
from edge_sdk.tasks import rows_loss, rows_right
from edge_sdk.transport import Message, Qos, Transport
from edge_sdk.types import AnyArray, Prediction, Truth

STARTED = 1_767_225_600.0
"""When simulations begin, in seconds since the epoch: a midnight."""
_HEADER_BYTES = 11
"""Of MQTT v5 for a publication at QoS 1 beside topic and payload: two headers, lengths, number, acknowledgement."""


class Line:
    """A device's connection: counts what goes over it, can be cut, and knows what is still to come.

    Args:
        inner: The connection itself.
        topics: As the device uses them.
        device: Its name.
    """

    def __init__(self, inner: Transport, topics: Topics, device: str) -> None:
        self.inner = inner
        self._ack, self._desired = topics.down(device, "ack"), f"{topics.prefix}/g/"
        self._blocks = f"{topics.prefix}/b/"
        self.fetching: set[str] = set()
        """Files whose blocks it listens for."""
        self._mail: list[Message] = []
        self._numbered = self._acknowledged = 0
        self.revision = 0
        """Of the newest desired state that came."""
        self.payload_sent = self._sent = self._received = 0
        self._will: Message | None = None
        self._online, self._open = True, False

    @property
    def connected(self) -> bool:
        """As of the connection."""
        return self.inner.connected

    @property
    def connections(self) -> int:
        """As of the connection."""
        return self.inner.connections

    @property
    def wire(self) -> tuple[int, int]:
        """Bytes sent and received: those given to TCP, or an estimate where there is none."""
        real = getattr(self.inner, "bytes_sent", None)
        return (self._sent, self._received) if real is None else (real, self.inner.bytes_received)  # type: ignore[attr-defined]

    @property
    def is_open(self) -> bool:
        """Whether a device uses it."""
        return self._open

    @property
    def online(self) -> bool:
        """Whether there is a network."""
        return self._online

    @online.setter
    def online(self, value: bool) -> None:
        if value == self._online:
            return
        self._online = value
        if self._open and value:
            self.inner.connect(self._will)
        elif self._open:
            # in memory the broker notices as of a broken line; a real client says goodbye, so that nobody need wait
            getattr(self.inner, "vanish", self.inner.close)()

    def connect(self, will: Message | None = None) -> None:
        """Connect as soon as there is a network."""
        self._will, self._open = will, True
        if self._online:
            self.inner.connect(will)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expires_s: float | None = None, qos: Qos = 1
    ) -> None:
        """As of the connection."""
        if not self._online:
            raise NotConnectedError(f"no network: {topic} was not sent")
        self.inner.publish(topic, payload, retain=retain, expires_s=expires_s, qos=qos)
        if topic.endswith(("/up/event", "/up/report")):
            self._numbered = max(self._numbered, decode(payload, Envelope).seq)
        self.payload_sent += len(payload)
        self._sent += len(topic) + len(payload) + _HEADER_BYTES

    def subscribe(self, topic_filter: str) -> None:
        """As of the connection."""
        if topic_filter.startswith(self._blocks):
            self.fetching.add(topic_filter)
        self.inner.subscribe(topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        """As of the connection."""
        self.fetching.discard(topic_filter)
        self.inner.unsubscribe(topic_filter)

    def receive(self) -> list[Message]:
        """As of the connection."""
        self.fetch()
        messages, self._mail = self._mail, []
        return messages

    def fetch(self) -> None:
        """Take in what has come, for the device to read at its next turn."""
        for message in self.inner.receive():
            self._received += len(message.topic) + len(message.payload) + _HEADER_BYTES
            self._mail.append(message)
            if message.topic == self._ack:
                self._acknowledged = max(self._acknowledged, decode(message.payload, Ack).seq)
            elif message.topic.startswith(self._desired) and message.payload:
                self.revision = max(self.revision, decode(message.payload, Desired).revision)

    @property
    def urgent(self) -> bool:
        """Whether there is mail that will not wait: acknowledgements are read at the next turn anyway."""
        self.fetch()
        return any(message.topic != self._ack for message in self._mail)

    @property
    def unacknowledged(self) -> int:
        """How many messages beyond the last acknowledgement that came were sent."""
        return max(0, self._numbered - self._acknowledged)

    def close(self) -> None:
        """As of the connection."""
        self._open = False
        self.inner.close()


class _PlannedResources:
    """What the machine can spare, as the plan says."""

    def __init__(self, plan: DevicePlan, clock: Clock) -> None:
        self._plan, self._clock = plan, clock

    def read(self) -> ResourceState:
        return self._plan.resources(self._clock.now() - STARTED)

    def rss_mb(self) -> float:
        return 0.0


class SimulatedDevice:
    """A real device that lives by its plan: samples come, labels come late, the network and the power come and go.

    Args:
        plan: What happens to it.
        prepared: The scenario.
        home: Its folder.
        clock: The simulation's.
        trunks: Loaded trunks, shared by content.
        transport: Its connection to the broker.
        original: The data without any drift, for judging.
        judge: Tells how good predictions are.
        files: Files of releases by their hash, shared by content.
    """

    def __init__(
        self,
        plan: DevicePlan,
        prepared: Prepared,
        *,
        home: Path,
        clock: ManualClock,
        trunks: Trunks,
        transport: Transport,
        original: Pool,
        judge: Judge,
        files: dict[str, Path],
    ) -> None:
        self.plan, self.line = plan, Line(transport, Topics(plan.config.prefix), plan.name)
        self._scenario, self._world = prepared.scenario, prepared.world
        self._home, self._clock, self._trunks, self._files = home, clock, trunks, files
        self._stream: ScriptedStream = plan.stream(self._world)
        self._truths = plan.late_labels(self._world)
        self._rng = plan.rng("device")
        self._judge, self._original = judge, (original.x, self._world.truths(original.y))
        self._due: list[tuple[float, int, str, Truth]] = []
        self._told = self._key = 0
        self._version = (0, 0)
        self._duration_s = self._scenario.fleet.duration_h * HOUR_S
        self._changed_s = changed_at(plan, self._duration_s)
        self._met = False
        self._events: list[FleetEvent] = []
        self._alarms: list[float] = []
        self._cpu_s = 0.0
        self._summary: DeviceSummary | None = None
        self._learner_s = 0.0
        self._kept: float | None = None
        self.made = self.right = self.refused = self.learned = 0
        self._off = 0.0
        self.before: float | None = None
        self.under: float | None = None
        self.device: EdgeDevice | None = None
        """None while it is off."""

    def open(self) -> None:
        """Switch it on, the first time or again."""
        self.device = EdgeDevice(
            self._home,
            checkpoint=self._scenario.fleet.checkpoint,
            config=self.plan.config,
            transport=self.line,
            clock=SkewedClock(self._clock, self.plan, started=STARTED),
            resources=_PlannedResources(self.plan, self._clock),
            trunks=self._trunks,
            rng=self._rng,
        )
        self.line.online = self.plan.online(self._clock.now() - STARTED)
        self.device.connect()
        self._notice_version()

    def live(self, start_s: float, end_s: float) -> Lived:
        """A tick of life, and one turn of the device."""
        began, made, right, off, squares = time.process_time(), 0, 0, 0.0, 0.0
        if not self.plan.is_on(end_s):
            self._switch_off(end_s)
        else:
            if self.device is None:
                self.open()
            self.line.online = self.plan.online(end_s)
            judging = self._meet_change(end_s)
            made, right, off, squares = self._predict(self.plan.predictions(start_s, end_s), end_s)
            self._tell(end_s)
            self.turn()
            began += judging
        self._cpu_s += time.process_time() - began
        kept, self._kept = self._kept, None
        return Lived(made, right, *self._version, kept, off, squares)

    def turn(self) -> None:
        """One turn of the device."""
        assert self.device is not None
        if self.device.step().swapped:
            self._notice_version()
        for entry in self.device.history(limit=1_000, after=self._key):
            time_s = self._clock.now() - STARTED
            self._events.append(FleetEvent(round(time_s, 3), self.plan.name, entry.name, entry.detail))
            self._key = entry.key
            if entry.name == "drift_alarm":
                self._alarms.append(time_s)
            self.learned += entry.name == "learn_started"

    def take_events(self) -> list[FleetEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def finish(self) -> tuple[DeviceSummary, Cost]:
        """Switch it off for good, and sum up."""
        now_s = self._clock.now() - STARTED
        if self._summary is None:
            if self.device is None:  # its battery is empty; its files are there
                self.line.online = False
                self.open()
            self._sum_up(min(now_s, self._duration_s, self.plan.lost_at_s))
        assert self._summary is not None
        watts = self.plan.config.resources.watts
        return self._summary, Cost(self.plan.name, self._cpu_s, self._learner_s, self._cpu_s * watts)

    # ---- what happens to it

    def _predict(self, count: int, now_s: float) -> tuple[int, int, float, float]:
        """Samples come; returns predictions made, and what the judge says of them."""
        assert self.device is not None
        if not count or not self.device.ready:
            return 0, 0, 0.0, 0.0
        x, y = self._stream.draw(count, now_s)
        said: Sequence[Prediction | None]
        try:
            said = self.device.predict_batch(x)
        except InputError:
            said = [self._one(row) for row in x]
        made = sum(p is not None for p in said)
        right, off, squares = self._judge.count(said, y)
        for late in self._truths.draw(y, now_s):
            prediction = said[late.row]
            if prediction is not None:
                self._told += 1
                heapq.heappush(self._due, (late.due_s, self._told, prediction.id, late.label))
        self.made, self.right, self.refused = self.made + made, self.right + right, self.refused + count - made
        self._off += off
        return made, right, off, squares

    def _one(self, row: object) -> Prediction | None:
        assert self.device is not None
        try:
            return self.device.predict(row)
        except InputError:
            return None

    def _tell(self, now_s: float) -> None:
        """Labels that are due; one that the model may not learn is nobody's fault."""
        assert self.device is not None
        while self._due and self._due[0][0] <= now_s:
            _, _, name, label = heapq.heappop(self._due)
            with contextlib.suppress(LabelError):
                self.device.observe(name, label, source=self.plan.label.source)

    def _meet_change(self, now_s: float) -> float:
        """Judge the version that meets the first change, just before it does; returns the seconds that this took."""
        if self._met or self._changed_s is None or now_s < self._changed_s or not self.plan.drifts:
            return 0.0
        self._met, began = True, time.process_time()
        self.under = self._score(*self._changed())
        return time.process_time() - began

    def _changed(self) -> tuple[object, list[Truth]]:
        x, y = self._stream.view(self._world.score, extreme_at(self.plan, self._duration_s))
        return x, self._world.truths(y)

    def _score(self, x: object, truths: list[Truth]) -> float | None:
        """Score of the version in use; None if it cannot take the samples."""
        if self.device is None or not self.device.ready or not truths:
            return None
        try:
            return self._judge.score(self.device, x, truths)
        except (InputError, LabelError):
            return None

    def _notice_version(self) -> None:
        assert self.device is not None
        serving = self.device.version
        version = (serving.release, serving.head) if serving else (0, 0)
        if version == self._version:
            return
        if version[0] != self._version[0]:
            _share_files(self._home / "slots", self._files)
        self._version = version
        began = time.process_time()
        self._kept = self._score(*self._original)
        self._cpu_s -= time.process_time() - began
        if self.before is None:
            self.before = self._kept

    def _switch_off(self, now_s: float) -> None:
        """The battery is empty, or the device is lost."""
        if self.device is None:
            return
        if now_s >= self.plan.lost_at_s:
            self.line.online = False  # nobody says goodbye
            self._sum_up(self.plan.lost_at_s)
            return
        self.turn()
        self.device.stop()
        self.device = None

    def _sum_up(self, there_s: float) -> None:
        """The end of its life, at the end of the simulation or before."""
        assert self.device is not None
        plan, device = self.plan, self.device
        self.turn()
        counters, (sent, received) = device.counters, self.line.wire
        changed_s = None if self._changed_s is None or self._changed_s >= there_s else self._changed_s
        false, clear_days, delay_h = alarm_facts(self._alarms, changed_s, there_s)
        self._learner_s = sum(float(entry.detail.get("cpu_s") or 0) for entry in device.lineage(limit=1_000_000))
        original = self._score(*self._original)
        known = self.before is not None and original is not None
        self._summary = DeviceSummary(
            device=plan.name,
            cohort=plan.cohort,
            poisoned=plan.poison is not None,
            lost_h=there_s / HOUR_S if there_s == plan.lost_at_s else None,
            changed_h=None if changed_s is None else changed_s / HOUR_S,
            days=there_s / DAY_S,
            predictions=self.made,
            right=self.right,
            error=self._off / self.made if self._judge.numbers and self.made else None,
            refused=self.refused,
            labels=counters.labelled,
            before=self.before,
            under=self.under,
            after=self._score(*self._changed()) if self._met else None,
            original=original,
            forgotten=self._judge.loss(self.before, original) if known else None,  # type: ignore[arg-type]
            alarms=len(self._alarms),
            false_alarms=false,
            clear_days=clear_days,
            delay_h=delay_h,
            learned=self.learned,
            promotions=counters.promotions,
            rejections=counters.rejections,
            rollbacks=counters.rollbacks,
            release=self._version[0],
            head=self._version[1],
            bytes_sent=self.line.payload_sent,
            wire_sent=sent,
            wire_received=received,
        )
        device.stop()
        self.device = None


class Judge:
    """Tells how good predictions are, as only the simulation can know.

    Args:
        world: The data.
        manifest: Of the checkpoint that devices start with: errors of all releases are told in the spreads of its
            targets.
    """

    def __init__(self, world: World, manifest: Manifest) -> None:
        self._labels, self._manifest = world.labels, manifest
        self.numbers = bool(world.targets)

    def count(self, said: Sequence[Prediction | None], y: AnyArray) -> tuple[int, float, float]:
        """How many predictions are right; of numbers also the sum of their errors, and of the errors' squares."""
        if not self.numbers:
            return sum(p is not None and p.label == self._labels[i] for p, i in zip(said, y, strict=True)), 0.0, 0.0
        rows = [row for row, prediction in enumerate(said) if prediction is not None]
        if not rows:
            return 0, 0.0, 0.0
        values = np.stack([prediction.values for prediction in said if prediction is not None])
        errors = rows_loss(values, y[rows], self._manifest)
        return int(rows_right(values, y[rows], self._manifest).sum()), float(errors.sum()), float((errors**2).sum())

    def score(self, device: EdgeDevice, x: object, truths: list[Truth]) -> float:
        """Accuracy of the version in use, or its mean error."""
        if not self.numbers:
            return device.evaluate(x, truths)
        spreads = np.array([target.std for target in self._manifest.targets])
        return float((device.mean_error(x, truths) / spreads).mean())

    def loss(self, before: float, after: float) -> float:
        """By how much a score has become worse."""
        return after - before if self.numbers else before - after


def _share_files(slots: Path, known: dict[str, Path]) -> None:
    """Give the files of installed releases one copy on the disk, however many devices have them: they never change."""
    for manifest_path in slots.glob(f"?/{MANIFEST_NAME}"):
        for name, entry in parse_manifest(manifest_path.read_bytes()).files.items():
            path = manifest_path.parent / name
            held = known.setdefault(entry.sha256, path)
            if held == path or not path.exists():
                continue
            if not held.exists():  # its device has moved on
                known[entry.sha256] = path
            elif not path.samefile(held):
                spare = path.with_name(f"{name}.shared")
                with contextlib.suppress(OSError):  # a file system without links has copies
                    os.link(held, spare)
                    spare.replace(path)
