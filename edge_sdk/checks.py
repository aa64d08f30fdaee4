"""Contract suites: what every implementation of an interface must do. For your own tests as much as for ours.

Each `check_…` takes a factory, runs the whole contract and raises `CheckFailed` at the first broken rule.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError, EmptyBufferError, IntegrityError, NotConnectedError, ProtocolError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob, Rows
from edge_sdk.learn.ewc import fisher_diagonal, grown_like
from edge_sdk.learn.moments import Moments, fresh_mass
from edge_sdk.learn.slda import closed_form
from edge_sdk.manifest import LatentSpec
from edge_sdk.messages import MAX_MESSAGE_BYTES
from edge_sdk.replay.base import ROW_OVERHEAD
from edge_sdk.transport import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.drift.base import DriftDetector
    from edge_sdk.learn.base import Learner
    from edge_sdk.replay import ReplayBuffer
    from edge_sdk.runtime import ModelRuntime
    from edge_sdk.transport import Transport
    from edge_sdk.types import AnyArray, DoubleArray, FloatArray, LatentArray, Task


class CheckFailed(AssertionError):  # noqa: N818 - an `AssertionError`, so named like one
    """An implementation breaks its contract; the message says which rule."""


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - an `assert` that -O leaves in
    if not condition:
        raise CheckFailed(message)


def _require_raises(error: type[Exception], call: Callable[[], object], message: str) -> None:
    try:
        call()
    except error:
        return
    raise CheckFailed(f"{message}: {error.__name__} expected, nothing was raised")


def check_transport(
    make: Callable[[str], Transport],
    *,
    settle: Callable[[Transport], object] = lambda _transport: None,
    restart: Callable[[], object] | None = None,
    cut: Callable[[Transport], object] | None = None,
    timeout_s: float = 10.0,
    prefix: str = "check",
) -> None:
    """Check a `Transport` against a broker that runs.

    Args:
        make: Gives a new transport with the client id it is passed, not yet connected, to the same broker
        each time. settle: Lets the network deliver: returns once something may have changed for the
        transport. For an
            `MqttTransport`: `lambda transport: transport.wait(0.1)`.
        restart: Stops the broker and starts it again; None skips the rules about reconnecting.
        cut: Breaks a transport's connection as a lost network does; None skips the rule about the last will.
        timeout_s: How long each expected thing may take.
        prefix: First level of all topics used; nothing retained stays below it.

    Raises:
        CheckFailed: A rule is broken.
    """
    peers: list[_Peer] = []

    def peer(will: Message | None = None, *, connect: bool = True) -> _Peer:
        name = f"{prefix}-{len(peers)}"
        peers.append(_Peer(make(name), settle, timeout_s, marker=f"{prefix}/marker/{name}"))
        if connect:
            peers[-1].connect(will)
        return peers[-1]

    try:
        _check_not_connected(peer(connect=False), prefix)
        sender, reader = peer(), peer()
        _check_delivery(sender, reader, prefix)
        _check_unsubscribe(sender, reader, prefix)
        _check_retained(sender, reader, peer(), peer(), prefix)
        _check_size_limit(sender, reader, prefix)
        will = Message(f"{prefix}/will", b"lost", retain=True)
        _check_close(peer(will), reader, will)
        if cut is not None:
            _check_will(peer(will), reader, peer(), will, cut)
        if restart is not None:
            _check_reconnect(sender, reader, prefix, restart)
    finally:
        for made in peers:
            made.transport.close()


class _Peer:
    """A transport with what it has received, and means to wait for more."""

    def __init__(
        self, transport: Transport, settle: Callable[[Transport], object], timeout_s: float, *, marker: str
    ) -> None:
        self.transport = transport
        self._settle, self._timeout_s, self._marker = settle, timeout_s, marker
        self._markers_sent = 0
        self._received: list[Message] = []

    def connect(self, will: Message | None) -> None:
        self.transport.subscribe(self._marker)
        self.transport.connect(will)
        self.until(lambda: self.transport.connected, "connect() leads to a connection")
        _require(self.transport.connections == 1, "`connections` is 1 after the first connection")

    def reconnect(self) -> None:
        self.until(lambda: self.transport.connections == 2, "a transport reconnects by itself")
        self.sync()

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe, and wait until the broker knows."""
        self.transport.subscribe(topic_filter)
        self.sync()

    def sync(self) -> None:
        """Wait until the broker has done all this peer asked for: it takes a connection's wishes in turn."""
        self._markers_sent += 1
        marker = Message(self._marker, str(self._markers_sent).encode())
        self.transport.publish(marker.topic, marker.payload)
        self.until(lambda: marker in self._received, "a transport receives what it sends to itself")
        self._received = [message for message in self._received if message.topic != self._marker]

    def expect(self, rule: str, *expected: Message) -> None:
        """Wait for these messages, in order within a topic, and see that no others come."""
        self.until(lambda: len(self._received) >= len(expected), rule)
        before = -1
        while before < len(self._received):
            before = len(self._received)
            self._turn()
        got, wanted = (sorted(messages, key=lambda message: message.topic) for messages in (self._received, expected))
        _require(got == wanted, f"{rule}: expected {_brief(wanted)}, received {_brief(got)}")
        self._received = []

    def until(self, condition: Callable[[], bool], rule: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not condition():
            _require(
                time.monotonic() < deadline,
                f"{rule}: not within {self._timeout_s:g} s; received {_brief(self._received)}",
            )
            self._turn()

    def _turn(self) -> None:
        self._settle(self.transport)
        self._received += self.transport.receive()


def _brief(messages: list[Message]) -> str:
    return str([(message.topic, message.payload[:20], message.retain) for message in messages])


def _check_not_connected(peer: _Peer, prefix: str) -> None:
    transport = peer.transport
    _require(not transport.connected, "a transport is not connected before connect()")
    _require(transport.connections == 0, "`connections` is 0 before connect()")
    _require(transport.receive() == [], "nothing is received before connect()")
    _require_raises(
        NotConnectedError,
        lambda: transport.publish(f"{prefix}/x", b"x"),
        "publish() before connect() is refused",
    )


def _check_delivery(sender: _Peer, reader: _Peer, prefix: str) -> None:
    filters = [f"{prefix}/exact", f"{prefix}/one/+/level", f"{prefix}/all/#"]
    for topic_filter in [*filters, filters[0]]:
        reader.transport.subscribe(topic_filter)
    reader.sync()
    wanted = [
        *(Message(f"{prefix}/exact", bytes([i])) for i in range(50)),
        Message(f"{prefix}/one/a/level", bytes(range(256))),
        Message(f"{prefix}/all", b"parent"),
        Message(f"{prefix}/all/x/y", b""),
    ]
    unwanted = [
        Message(f"{prefix}/exact/deeper", b"-"),
        Message(f"{prefix}/one/a/b/level", b"-"),
        Message(f"{prefix}/one/a", b"-"),
        Message(f"{prefix}/other", b"-"),
    ]
    for message in [*unwanted, *wanted]:
        sender.transport.publish(message.topic, message.payload)
    reader.expect("what matches a subscription arrives once, unaltered and in order, and nothing else", *wanted)
    for topic_filter in filters[1:]:
        reader.transport.unsubscribe(topic_filter)


def _check_unsubscribe(sender: _Peer, reader: _Peer, prefix: str) -> None:
    topic = f"{prefix}/unsubscribe"
    reader.subscribe(topic)
    reader.transport.unsubscribe(topic)
    reader.transport.unsubscribe(f"{prefix}/never-subscribed")
    reader.sync()
    sender.transport.publish(topic, b"-")
    sender.transport.publish(f"{prefix}/exact", b"after")
    reader.expect("nothing arrives after unsubscribe()", Message(f"{prefix}/exact", b"after"))


def _check_retained(sender: _Peer, reader: _Peer, late: _Peer, later: _Peer, prefix: str) -> None:
    topic = f"{prefix}/retained"
    reader.subscribe(topic)
    sender.transport.publish(topic, b"old", retain=True)
    sender.transport.publish(topic, b"new", retain=True)
    reader.expect(
        "a retained message reaches present subscribers without the flag",
        Message(topic, b"old"),
        Message(topic, b"new"),
    )
    late.subscribe(topic)
    late.expect("a later subscriber gets the last retained message, flagged", Message(topic, b"new", retain=True))
    sender.transport.publish(topic, b"", retain=True)
    reader.expect("an empty retained message reaches present subscribers", Message(topic, b""))
    later.subscribe(topic)
    later.expect("an empty retained message clears the topic")
    reader.transport.unsubscribe(topic)


def _check_size_limit(sender: _Peer, reader: _Peer, prefix: str) -> None:
    topic = f"{prefix}/exact"
    _require_raises(
        ProtocolError,
        lambda: sender.transport.publish(topic, bytes(MAX_MESSAGE_BYTES + 1)),
        "publish() of more than MAX_MESSAGE_BYTES is refused",
    )
    largest = bytes(MAX_MESSAGE_BYTES)
    sender.transport.publish(topic, largest)
    reader.expect("MAX_MESSAGE_BYTES arrive, and a refused size breaks nothing", Message(topic, largest))
    _require(sender.transport.connections == 1, "a refused size does not cost the connection")


def _check_close(leaver: _Peer, reader: _Peer, will: Message) -> None:
    reader.subscribe(will.topic)
    leaver.transport.publish(will.topic, b"goodbye")
    leaver.transport.close()
    _require(not leaver.transport.connected, "a closed transport is not connected")
    _require_raises(
        NotConnectedError,
        lambda: leaver.transport.publish(will.topic, b"-"),
        "publish() after close() is refused",
    )
    reader.expect("what was published before close() arrives, and no will", Message(will.topic, b"goodbye"))


def _check_will(victim: _Peer, reader: _Peer, late: _Peer, will: Message, cut: Callable[[Transport], object]) -> None:
    cut(victim.transport)
    reader.expect("the will is published when a connection breaks", Message(will.topic, will.payload))
    victim.transport.close()
    late.subscribe(will.topic)
    late.expect("a retained will is retained", will)
    late.transport.publish(will.topic, b"", retain=True)
    late.sync()
    reader.expect("a will can be cleared", Message(will.topic, b""))


def _check_reconnect(sender: _Peer, reader: _Peer, prefix: str, restart: Callable[[], object]) -> None:
    topic = f"{prefix}/exact"
    restart()
    for peer in (sender, reader):
        peer.reconnect()
    sender.transport.publish(topic, b"again")
    sender.transport.publish(f"{prefix}/unsubscribe", b"-")
    reader.expect("a reconnected transport has its subscriptions, each once", Message(topic, b"again"))


def check_detector(
    make: Callable[[], DriftDetector], *, channels: int = 3, rows: int = 2_000, history: int = 0, seed: int = 0
) -> None:
    """Check a `DriftDetector`.

    Args:
        make: Gives a new detector, always the same one, that notices when channels about 0.5 become 1.
        channels: How many it watches.
        rows: Within how many rows of ones it raises the alarm.
        history: Calm rows, 600 at most, that it must have seen before: for a detector without a reference, which
            compares a stream with its own past.
        seed: Of the streams shown to it.

    Raises:
        CheckFailed: A rule is broken.
    """
    rng = np.random.default_rng(seed)
    calm, ones = rng.uniform(0.4, 0.6, (600, channels)), np.ones((rows, channels))
    _check_detector_begins(make(), calm[:10])
    for stream in (calm, np.concatenate([calm[:300], ones, calm[300:]])):
        _check_detector_blocks(make, stream, rng)
    _check_detector_alarm(make, ones, calm, calm[:history])
    _check_detector_restore(make, calm, ones)
    _check_detector_input(make(), calm[:50])


def _check_detector_begins(detector: DriftDetector, block: DoubleArray) -> None:
    _require(not detector.drift_detected and not detector.warning, "a new detector raises neither alarm nor warning")
    _require(0 <= detector.evidence < detector.threshold, "a new detector's evidence is below its threshold")
    returned: object = detector.update(block)
    _require(returned is None, "update() returns None: what it found is told by properties")


def _check_detector_blocks(make: Callable[[], DriftDetector], stream: DoubleArray, rng: np.random.Generator) -> None:
    whole = make()
    shapes = _shapes(whole)
    whole.update(stream)
    cuts = np.sort(rng.integers(len(stream), size=len(stream) // 20))
    parts = {
        "single rows": np.split(stream, len(stream)),
        "blocks of 32 rows": np.split(stream, range(32, len(stream), 32)),
        "blocks of any size, also none": np.split(stream, cuts),
    }
    for name, blocks in parts.items():
        detector = make()
        for block in blocks:
            detector.update(block)
        _require(_shapes(detector) == shapes, f"{name}: memory does not grow; state arrays keep shape and type")
        _require(
            _similar(detector.state(), whole.state())
            and bool(np.isclose(detector.evidence, whole.evidence, rtol=_ROUNDING))
            and (detector.warning, detector.drift_detected) == (whole.warning, whole.drift_detected),
            f"{name} give the same state as one block",
        )


def _check_detector_alarm(
    make: Callable[[], DriftDetector], ones: DoubleArray, calm: DoubleArray, history: DoubleArray
) -> None:
    detector = make()
    detector.update(history)
    for row in ones:
        detector.update(row[None])
        if detector.drift_detected:
            break
    _require(detector.drift_detected, f"the alarm is up within {len(ones)} rows of ones")
    _require(detector.warning, "an alarm implies the warning")
    suspects = detector.suspects(2)
    _require(len(suspects) <= 2, "suspects(count) names no more than `count` channels")
    _require(all(0 <= channel < ones.shape[1] for channel, _ in suspects), "suspects() names channels that exist")
    detector.update(calm)
    _require(detector.drift_detected, "a raised alarm is latched: calm rows do not take it down")
    detector.reset()
    _require(not detector.drift_detected and not detector.warning, "reset() takes alarm and warning down")
    _require(_same(detector.state(), make().state()), "reset() forgets all evidence")


def _check_detector_restore(make: Callable[[], DriftDetector], calm: DoubleArray, ones: DoubleArray) -> None:
    goes_on, restored = make(), make()
    for before, after in ((calm[:100], calm[100:]), (ones, calm)):
        goes_on.update(before)
        state = goes_on.state()
        kept = {key: array.copy() for key, array in state.items()}
        restored.restore(state)
        for block in np.array_split(after, 7):
            goes_on.update(block)
            restored.update(block)
        _require(_same(state, kept), "what state() gave does not change with later updates")
        _require(
            _same(restored.state(), goes_on.state())
            and restored.evidence == goes_on.evidence
            and (restored.warning, restored.drift_detected) == (goes_on.warning, goes_on.drift_detected),
            "restore(state()) continues exactly",
        )


def _check_detector_input(detector: DriftDetector, block: DoubleArray) -> None:
    detector.update(block)
    before = {key: array.copy() for key, array in detector.state().items()}
    given = block.copy()
    detector.update(block[:0])
    _require(_same(detector.state(), before), "an empty block changes nothing")
    wrong = {
        "another number of channels": np.full((4, block.shape[1] + 1), 0.5),
        "a single row without its dimension": block[0],
        **{f"a value of {v}": np.where(np.arange(len(block))[:, None] == 7, v, block) for v in (-0.01, 1.01, np.nan)},
    }
    for name, rows in wrong.items():
        _require_raises(ValueError, lambda rows=rows: detector.update(rows), f"{name} is refused")  # type: ignore[misc]
        _require(_same(detector.state(), before), f"{name} leaves the state as it was")
    detector.update(block)
    _require(np.array_equal(block, given), "update() leaves its block as it was")


def check_buffer(make: Callable[..., ReplayBuffer], *, seed: int = 0) -> None:
    """Check a `ReplayBuffer`.

    Args:
        make: Gives an empty buffer when called as the class is: `make(capacity, latent_dim, rng=rng)`.
        seed: Of the rows offered to it.

    Raises:
        CheckFailed: A rule is broken.
    """
    dim = 4
    for capacity in (0, 1, 7, 50):
        chance = np.random.default_rng([seed, capacity])
        again = make(capacity, dim, rng=deepcopy(chance))
        buffer = make(capacity, dim, rng=chance)
        _require(len(buffer) == 0 and buffer.latents.shape == (0, dim), "a new buffer is empty")
        rows = _BufferRows(np.random.default_rng(seed), capacity, dim)
        for _ in range(8 * capacity + 20):
            latent, label = rows.draw()
            slot = rows.offer(buffer, latent, label)
            _require(slot == again.add(latent, label), "the same rows and the same chance give the same slots")
        for _ in range(2 * capacity):
            rows.remove(buffer)
            rows.offer(buffer, *rows.draw())
        _check_buffer_state(buffer, partial(make, capacity, dim), chance, rows)
        while len(buffer):
            rows.remove(buffer)
        for _ in range(capacity + 20):
            rows.offer(buffer, *rows.draw())
        _check_buffer_put(buffer, make(capacity, dim, rng=chance), dim)
    _require_raises(ValueError, lambda: make(-1, dim, rng=np.random.default_rng(seed)), "a capacity below 0 is refused")


class _BufferRows:
    """Rows offered to a buffer, and which of them it should hold in each slot."""

    def __init__(self, rng: np.random.Generator, capacity: int, dim: int) -> None:
        self._rng, self._capacity, self._dim = rng, capacity, dim
        self.held: list[tuple[bytes, int]] = []
        self._offered: dict[int, int] = {}

    def draw(self) -> tuple[LatentArray, int]:
        return self._rng.integers(0, 256, self._dim, dtype=np.uint8), int(self._rng.choice([0, 0, 0, 1, 1, 5]))

    def offer(self, buffer: ReplayBuffer, latent: LatentArray, label: int) -> int | None:
        given = latent.copy()
        slot = buffer.add(given, label)
        _require(np.array_equal(latent, given), "add() leaves the row as it was")
        given[:] = 0  # the caller's array is the caller's
        self._offered[label] = self._offered.get(label, 0) + 1
        if len(self.held) < self._capacity:
            _require(slot == len(self.held), "while there is room, every row goes to the next slot")
            self.held.append((latent.tobytes(), label))
        elif slot is not None:
            _require(0 <= slot < self._capacity, "add() returns a slot below the capacity, or None")
            self.held[slot] = latent.tobytes(), label
        self._compare(buffer)
        return slot

    def remove(self, buffer: ReplayBuffer) -> None:
        slot, last = int(self._rng.integers(len(self.held))), len(self.held) - 1
        moved = buffer.remove(slot)
        _require(moved == (None if slot == last else last), "remove() returns the old slot of the row that moved")
        self.held[slot] = self.held[last]
        self.held.pop()
        self._compare(buffer)
        for outside in (-1, len(self.held)):
            _require_raises(ValueError, partial(buffer.remove, outside), f"remove({outside}) of {len(self.held)} rows")

    def _compare(self, buffer: ReplayBuffer) -> None:
        latents, labels = buffer.latents, buffer.labels
        _require(len(buffer) <= self._capacity, "a buffer never holds more rows than its capacity")
        _require(len(buffer) == len(latents) == len(labels), "len(), `latents` and `labels` agree")
        held = [(latent.tobytes(), int(label)) for latent, label in zip(latents, labels, strict=True)]
        _require(held == self.held, "a row is found in its slot until another takes it or remove() moves it")
        latents[:], labels[:] = 0, -7
        _require(not len(labels) or bool((buffer.labels != -7).all()), "`latents` and `labels` are copies")
        _require(buffer.seen == self._offered, "`seen` counts the rows offered, whatever becomes of them")
        budget = self._capacity * (self._dim + ROW_OVERHEAD) + len({label for _, label in held}) * buffer.label_bytes
        _require(buffer.nbytes <= budget, f"a buffer stays within its bytes: {buffer.nbytes} of {budget}")


def _check_buffer_state(
    buffer: ReplayBuffer, make: Callable[..., ReplayBuffer], chance: np.random.Generator, rows: _BufferRows
) -> None:
    state = buffer.state()
    restored = _put_back(buffer, make(rng=deepcopy(chance)))
    without = restored.state()
    for damaged in (b"", b"state", state[:-10], state[: len(state) // 2]):
        _require_raises(IntegrityError, partial(restored.restore, damaged), "a damaged state is refused")
    _require(restored.state() == without, "a state that is refused changes nothing")
    restored.restore(state)
    _require(restored.state() == state == buffer.state(), "equal content gives equal bytes of state")
    for position in range(0, len(state), max(1, len(state) // 64)):
        flipped = state[:position] + bytes([state[position] ^ 0x10]) + state[position + 1 :]
        with suppress(IntegrityError):
            restored.restore(flipped)
            _require(restored.state() == state, f"a damaged state is refused, or read as it was: byte {position}")
    for _ in range(4 * buffer.capacity + 4):
        latent, label = rows.draw()
        slot = rows.offer(buffer, latent, label)
        _require(slot == restored.add(latent, label), "a restored buffer goes on as the one that was saved")
    _require(restored.state() == buffer.state(), "a restored buffer goes on as the one that was saved")


def _put_back(buffer: ReplayBuffer, into: ReplayBuffer) -> ReplayBuffer:
    for slot, (latent, label) in enumerate(zip(buffer.latents, buffer.labels, strict=True)):
        into.put(slot, latent, int(label))
    return into


def _check_buffer_put(buffer: ReplayBuffer, restored: ReplayBuffer, dim: int) -> None:
    row = np.full(dim, 9, dtype=np.uint8)
    for slot in (-1, 1, buffer.capacity):
        _require_raises(ValueError, partial(restored.put, slot, row, 0), f"slot {slot} of an empty buffer")
    _put_back(buffer, restored)
    _require(
        np.array_equal(restored.latents, buffer.latents) and np.array_equal(restored.labels, buffer.labels),
        "put() in ascending order restores a buffer",
    )
    _require(sum(restored.seen.values()) == len(buffer), "a row that is put back counts as seen")
    _require_raises(ValueError, partial(restored.put, buffer.capacity, row, 0), "put() at the capacity is refused")
    if len(buffer):
        restored.put(0, row, 3)
        _require(
            len(restored) == len(buffer) and int(restored.labels[0]) == 3 and np.array_equal(restored.latents[0], row),
            "put() into a filled slot takes the place of the row that was there",
        )


def check_runtime(runtime: ModelRuntime, x: FloatArray, *, latent_dim: int, threads: int = 4) -> None:
    """Check a `ModelRuntime`.

    Args:
        runtime: With its model loaded.
        x: At least two checked and preprocessed inputs, float32 [N, ...].
        latent_dim: Width of the latent, as the manifest says.
        threads: From how many it is called at once.

    Raises:
        CheckFailed: A rule is broken.
    """
    given = x.copy()
    whole = runtime.latents(x)
    _require(whole.dtype == np.uint8, f"latents are uint8, got {whole.dtype}")
    _require(whole.shape == (len(x), latent_dim), f"latents are [N, {latent_dim}], got {whole.shape}")
    _require(np.array_equal(x, given), "inputs are left as they were")
    singles = np.concatenate([runtime.latents(x[i : i + 1]) for i in range(len(x))])
    _require(np.array_equal(singles, whole), "a batch gives exactly what its samples give one by one")
    _require(np.array_equal(runtime.latents(x[::-1].copy())[::-1], whole), "a sample's latent depends on it alone")
    kept = whole.copy()
    with ThreadPoolExecutor(threads) as pool:
        parts = [x[i % len(x) :] for i in range(8 * threads)]
        results = list(pool.map(runtime.latents, parts))
    _require(
        all(np.array_equal(r, kept[len(x) - len(p) :]) for r, p in zip(results, parts, strict=True)),
        "calls from several threads at once give what they give alone",
    )
    _require(np.array_equal(whole, kept), "a result belongs to the caller: later calls do not change it")


def check_learner(learner: Learner, *, seed: int = 0) -> None:
    """Check a `Learner` on small jobs of every task, and of heads with and without a hidden layer.

    Args:
        learner: The learner.
        seed: Of the jobs.

    Raises:
        CheckFailed: A rule is broken.
    """
    for task, hidden in _LEARNED:
        job, judge = example_job(task, hidden=hidden, seed=seed)
        before = _job_arrays(job)
        for array in before.values():
            array.setflags(write=False)
        kept = {name: array.copy() for name, array in before.items()}
        chance = np.random.get_state()  # noqa: NPY002 - the global generator is what must not move
        _check_learner_learns(learner, job, judge)
        _check_learner_is_pure(learner, job)
        _check_learner_between(learner, job)
        _check_learner_edges(learner, job)
        _require(_same(_job_arrays(job), kept), "the job is only read")
        _require(
            _same_chance(chance, np.random.get_state()),  # noqa: NPY002
            "chance comes from the job's seed: numpy's global generator is left alone",
        )


_LEARNED: tuple[tuple[Task, int], ...] = (
    ("classification", 0),
    ("classification", 24),
    ("multilabel", 0),
    ("multilabel", 24),
    ("regression", 0),
    ("regression", 24),
)


class _Interrupted(Exception):  # noqa: N818 - nothing has gone wrong
    """What stops a learner between two micro-batches."""


def _check_learner_learns(learner: Learner, job: LearnJob, judge: Rows) -> None:
    challenger = _challenger(learner, job)
    was, now = (_mistakes(head, judge, job) for head in (job.champion, challenger))
    _require(
        now < was,
        f"the challenger does better than the champion on rows like the fresh ones: of {job.task} the error is "
        f"{now:.3g}, the champion's {was:.3g}",
    )


def _mistakes(head: Head, rows: Rows, job: LearnJob) -> float:
    """Share of wrong labels, or mean squared error."""
    outputs = head.logits(dequantize(rows.latents, job.latent))
    if job.task == "regression":
        return float(((outputs - rows.targets) ** 2).mean())
    wrong = outputs.argmax(axis=1) != rows.targets if job.task == "classification" else (outputs > 0) != rows.targets
    return float(wrong.mean())


def _check_learner_is_pure(learner: Learner, job: LearnJob) -> None:
    first, second = (_challenger(learner, job).to_bytes() for _ in range(2))
    _require(first == second, "the same job gives the same bytes")
    weights = (np.arange(len(job.fresh)) % 5 > 0).astype(np.float32)
    without = _weighed(job, weights)
    other = np.where(weights[:, None] > 0, job.fresh.latents, 255 - job.fresh.latents)
    _require(
        _challenger(learner, replace(without, fresh=replace(without.fresh, latents=other))).to_bytes()
        == _challenger(learner, without).to_bytes(),
        "a row of weight 0 has no influence",
    )


def _same_chance(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _check_learner_between(learner: Learner, job: LearnJob) -> None:
    def interrupt() -> None:
        raise _Interrupted

    _require_raises(
        _Interrupted, lambda: learner(job, between=interrupt), "`between` is called, and what it raises is let through"
    )


def _check_learner_edges(learner: Learner, job: LearnJob) -> None:
    job = replace(job, config=LearnConfig(passes=2))
    count = len(job.fresh)
    nothing, zeros = job.fresh.take(np.zeros(0, np.int64)), np.zeros(count, np.float32)
    for rule, refused in {
        "a job without fresh rows is refused": replace(job, fresh=nothing, fresh_mass=zeros[:0]),
        "a job whose fresh rows all weigh 0 is refused": _weighed(job, zeros),
    }.items():
        _require_raises(EmptyBufferError, partial(learner, refused), rule)
    unknown = replace(job, moments=Moments.none(job.moments.labels, len(job.moments.x)))
    dead = replace(job.fresh, latents=np.full_like(job.fresh.latents, job.latent.zero_point))
    zero = job.base.hidden(dequantize(dead.latents, job.latent))
    still = replace(job, moments=Moments.of(zero, dead.targets, dead.weights, job.moments.labels))
    free = replace(job, fisher={key: np.zeros_like(value) for key, value in job.fisher.items()})
    edges = {
        "an empty buffer": replace(job, replay=nothing),
        "one fresh row": replace(job, fresh=job.fresh.take(np.arange(1)), fresh_mass=job.fresh_mass[:1]),
        "no moments": unknown,
        "no moments and an empty buffer": replace(unknown, replay=nothing),
        "features that are all 0": replace(still, fresh=dead, replay=dead),
        "features that were all 0": still,
        "a seed of many digits": replace(job, seed=2**80),
        "nothing of importance": replace(free, config=LearnConfig(ewc_lambda=1e300, passes=2)),
    }
    for strength in (0, 1e6, 1e300):
        edges[f"ewc_lambda={strength:g}"] = replace(job, config=LearnConfig(ewc_lambda=strength, passes=2))
    if job.task == "classification":
        edges["labels that do not apply"] = _weighed(job, np.where(np.arange(count) % 4, 1, -1).astype(np.float32))
    for edge, changed in edges.items():
        _challenger(learner, changed, edge)
    for rate in (1e3, 1e30, 1e300):
        with suppress(DivergedError):
            _challenger(learner, replace(job, config=LearnConfig(learning_rate=rate, passes=2)), f"{rate=:g}")
    if job.task == "classification":
        _check_learner_label_without_rows(learner, job)


def _weighed(job: LearnJob, weights: FloatArray) -> LearnJob:
    """The job with other weights of its fresh rows."""
    mass = fresh_mass(job.moments, job.fresh.targets, weights, job.task)
    return replace(job, fresh=replace(job.fresh, weights=weights), fresh_mass=mass)


def _check_learner_label_without_rows(learner: Learner, job: LearnJob) -> None:
    labels = (*job.champion.labels, "never seen")
    champion = job.champion.grown(labels)
    grown = replace(
        job,
        champion=champion,
        base=job.base.grown(labels),
        anchor=grown_like(job.anchor, champion.weights),
        fisher=grown_like(job.fisher, champion.weights),
        moments=job.moments.aligned(labels),
    )
    challenger = _challenger(learner, grown, "a label without rows")
    said = challenger.predict(dequantize(job.fresh.latents, job.latent))
    _require(not (said == len(labels) - 1).any(), "a label that no row has is not predicted")


def _challenger(learner: Learner, job: LearnJob, edge: str = "") -> Head:
    """What the learner makes of a job, once its form is seen to be right."""
    where = f" ({edge})" if edge else ""
    try:
        challenger, result = learner(job)
    except ValueError as error:
        _require("read-only" not in str(error), f"the job is only read{where}: {error}")
        raise
    champion = job.champion
    _require(
        challenger.labels == champion.labels, f"the challenger has the champion's labels in the champion's order{where}"
    )
    _require(
        {key: (w.shape, w.dtype) for key, w in challenger.weights.items()}
        == {key: (w.shape, w.dtype) for key, w in champion.weights.items()},
        f"the challenger's weights have the champion's names, shapes and types{where}",
    )
    _require(
        all(np.isfinite(w).all() for w in challenger.weights.values()), f"the challenger's weights are finite{where}"
    )
    _require(not result.error, f"a result that comes with a challenger tells of no error{where}")
    _require(
        bool(np.isfinite([result.first_loss, result.last_loss, result.seconds]).all()),
        f"the result's numbers are finite{where}",
    )
    return challenger


def example_job(task: Task = "classification", *, hidden: int = 0, seed: int = 0) -> tuple[LearnJob, Rows]:
    """A small job to try a learner on: the fresh rows are seen through another sensor, and one label is new.

    Args:
        task: Classification of eight labels, of which the factory's rows have seven; five labels at a time; or two
            values.
        hidden: Width of a hidden layer; 0: a linear head.
        seed: Of the job.

    Returns:
        The job, with 96 fresh and 64 replayed rows, and 200 more like the fresh ones.
    """
    rng = np.random.default_rng(seed)
    dim, count = 16, {"classification": 8, "multilabel": 5}.get(task, 2)
    latent = LatentSpec(dim=dim, scale=1 / 32, zero_point=128)
    centres, mixing = rng.normal(0, 30, (count, dim)), rng.normal(0, dim**-0.5, (dim, count))
    shift = 20 * np.linalg.pinv(mixing).sum(axis=0)  # every value rises by one standard deviation

    def rows(number: int, *, known: int = count, moved: bool = True) -> Rows:
        said = rng.integers(known, size=number)
        x = rng.normal(0, 20, (number, dim)) + (centres[said] if task == "classification" else 0)
        values = x @ mixing / 20 + rng.normal(0, 0.1, (number, count))
        multiple: AnyArray = (values > 0 if task == "multilabel" else values).astype(np.float32)
        latents = np.clip(np.round(latent.zero_point + x + moved * shift), 0, 255).astype(np.uint8)
        return Rows(latents, said if task == "classification" else multiple, np.ones(number, np.float32))

    factory = rows(400, known=count - 1 if task == "classification" else count, moved=False)
    labels = tuple(f"label {i}" for i in range(count))
    widths = (dim, hidden, count) if hidden else (dim, count)
    weights: dict[str, FloatArray] = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = np.zeros(outputs, np.float32)
    start = Head(weights, labels)
    features = dequantize(factory.latents, latent)
    moments = Moments.of(start.hidden(features), factory.targets, factory.weights, labels)
    fitted = closed_form(moments, task)
    doubt = 4 if task == "classification" else 1  # the closed form is surer than what is trained
    champion = start.with_last((fitted.w / doubt).astype(np.float32), (fitted.b / doubt).astype(np.float32))
    fresh = rows(96)
    return LearnJob(
        champion=champion,
        base=champion,
        anchor=champion.weights,
        fisher=fisher_diagonal(champion, features, task=task),
        fresh=fresh,
        replay=factory.take(np.arange(64)),
        moments=moments,
        fresh_mass=fresh_mass(moments, fresh.targets, fresh.weights, task),
        latent=latent,
        task=task,
        config=LearnConfig(passes=12, ewc_lambda=1),
        seed=seed,
    ), rows(200)


def _job_arrays(job: LearnJob) -> dict[str, AnyArray]:
    moments = vars(job.moments)
    parts: dict[str, dict[str, Any]] = {
        "champion": job.champion.weights, "base": job.base.weights, "anchor": job.anchor, "fisher": job.fisher,
        "fresh": vars(job.fresh), "replay": vars(job.replay),
        "moments": {key: moments[key] for key in ("x", "xx", "y", "xy")}, "": {"fresh_mass": job.fresh_mass},
    }  # fmt: skip
    return {f"{part} {key}": value for part, values in parts.items() for key, value in values.items()}


def _shapes(detector: DriftDetector) -> dict[str, object]:
    return {key: (array.shape, array.dtype) for key, array in detector.state().items()}


_ROUNDING = 1e-4
"""What sums and products of some hundred numbers in single precision may differ by."""


def _same(first: dict[str, AnyArray], second: dict[str, AnyArray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def _similar(first: dict[str, AnyArray], second: dict[str, AnyArray]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].shape == second[key].shape and np.allclose(first[key], second[key], rtol=_ROUNDING) for key in first
    )
