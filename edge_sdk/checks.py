"""Contract suites: what every implementation of an interface must do. For your own tests as much as for ours.

Each `check_…` takes a factory, runs the whole contract and raises `CheckFailed` at the first broken rule.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import EmptyBufferError, NotConnectedError, ProtocolError
from edge_sdk.head import Head
from edge_sdk.learn.base import LearnJob
from edge_sdk.learn.ewc import fisher_diagonal
from edge_sdk.manifest import LatentSpec
from edge_sdk.messages import MAX_MESSAGE_BYTES
from edge_sdk.transport import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edge_sdk.drift.base import DriftDetector
    from edge_sdk.learn.base import Learner
    from edge_sdk.replay import ReplayBuffer
    from edge_sdk.runtime import ModelRuntime
    from edge_sdk.transport import Transport
    from edge_sdk.types import AnyArray, DoubleArray, FloatArray


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


def check_detector(make: Callable[[], DriftDetector], *, channels: int = 3, rows: int = 2_000, seed: int = 0) -> None:
    """Check a `DriftDetector`.

    Args:
        make: Gives a new detector, always the same one, that notices when channels about 0.5 become 1.
        channels: How many it watches.
        rows: Within how many rows of ones it raises the alarm.
        seed: Of the streams shown to it.

    Raises:
        CheckFailed: A rule is broken.
    """
    rng = np.random.default_rng(seed)
    calm, ones = rng.uniform(0.4, 0.6, (600, channels)), np.ones((rows, channels))
    _check_detector_begins(make(), calm[:10])
    for stream in (calm, np.concatenate([calm[:300], ones, calm[300:]])):
        _check_detector_blocks(make, stream, rng)
    _check_detector_alarm(make, ones, calm)
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
            and bool(np.isclose(detector.evidence, whole.evidence, rtol=1e-6))
            and (detector.warning, detector.drift_detected) == (whole.warning, whole.drift_detected),
            f"{name} give the same state as one block",
        )


def _check_detector_alarm(make: Callable[[], DriftDetector], ones: DoubleArray, calm: DoubleArray) -> None:
    detector = make()
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
    rng = np.random.default_rng(seed)
    dim = 4
    for capacity in (1, 7, 50):
        buffer = make(capacity, dim, rng=np.random.default_rng(seed))
        again = make(capacity, dim, rng=np.random.default_rng(seed))
        _require(len(buffer) == 0 and buffer.latents.shape == (0, dim), "a new buffer is empty")
        kept: dict[int, tuple[bytes, int]] = {}
        for number in range(8 * capacity + 20):
            latent = rng.integers(0, 256, dim, dtype=np.uint8)
            label = int(rng.choice([0, 0, 0, 1, 1, 5]))
            given = latent.copy()
            slot = buffer.add(latent, label)
            _require(slot == again.add(latent, label), "the same rows and the same chance give the same slots")
            _require(np.array_equal(latent, given), "add() leaves the row as it was")
            _require(slot is None or 0 <= slot < capacity, "add() returns a slot below the capacity, or None")
            _require(slot is not None or number >= capacity, "nothing is turned away while there is room")
            if slot is not None:
                kept[slot] = (latent.tobytes(), label)
            latent[:] = 0  # the caller's array is the caller's
            _check_buffer_rows(buffer, kept, capacity)
        _check_buffer_put(buffer, make(capacity, dim, rng=np.random.default_rng(seed)), dim)
    _require_raises(ValueError, lambda: make(0, dim, rng=rng), "a buffer without room for a row is refused")


def _check_buffer_rows(buffer: ReplayBuffer, kept: dict[int, tuple[bytes, int]], capacity: int) -> None:
    latents, labels = buffer.latents, buffer.labels
    _require(len(buffer) <= capacity, "a buffer never holds more rows than its capacity")
    _require(len(buffer) == len(latents) == len(labels), "len(), `latents` and `labels` agree")
    held = {slot: (latents[slot].tobytes(), int(labels[slot])) for slot in range(len(buffer))}
    _require(held == kept, "a row that add() placed is found in its slot until another one takes it")
    latents[:], labels[:] = 0, -7
    _require(not len(labels) or bool((buffer.labels != -7).all()), "`latents` and `labels` are copies")


def _check_buffer_put(buffer: ReplayBuffer, restored: ReplayBuffer, dim: int) -> None:
    row = np.full(dim, 9, dtype=np.uint8)
    for slot in (-1, 1, buffer.capacity):
        _require_raises(ValueError, lambda slot=slot: restored.put(slot, row, 0), f"slot {slot} of an empty buffer")  # type: ignore[misc]
    for slot, (latent, label) in enumerate(zip(buffer.latents, buffer.labels, strict=True)):
        restored.put(slot, latent, int(label))
    _require(
        np.array_equal(restored.latents, buffer.latents) and np.array_equal(restored.labels, buffer.labels),
        "put() in ascending order restores a buffer",
    )
    _require_raises(
        ValueError, lambda: restored.put(restored.capacity, row, 0), "put() into a slot at the capacity is refused"
    )
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


def check_learner(learner: Learner, *, hidden: Iterable[int] = (0, 12), seed: int = 0) -> None:
    """Check a `Learner` on jobs of eight classes, seven of them known.

    Args:
        learner: The learner.
        hidden: Widths of the hidden layer of the heads it is given; 0: a linear head.
        seed: Of the jobs.

    Raises:
        CheckFailed: A rule is broken.
    """
    for width in hidden:
        job = _example_job(width, seed)
        _check_learner_is_pure(learner, job)
        _check_learner_result(learner, replace(job, replay_latents=job.replay_latents[:0],
                                               replay_labels=job.replay_labels[:0]))  # fmt: skip
        _check_learner_result(learner, replace(job, fresh_latents=job.fresh_latents[:1],
                                               fresh_labels=job.fresh_labels[:1]))  # fmt: skip
        for strength in (0.0, 1e6):
            _check_learner_result(learner, replace(job, config=LearnConfig(ewc_lambda=strength, passes=2)))
        empty = replace(job, fresh_latents=job.fresh_latents[:0], fresh_labels=job.fresh_labels[:0])
        _require_raises(EmptyBufferError, lambda job=empty: learner(job), "a job without fresh rows is refused")  # type: ignore[misc]


def _check_learner_is_pure(learner: Learner, job: LearnJob) -> None:
    before = {key: array.copy() for key, array in _job_arrays(job).items()}
    first = _check_learner_result(learner, job)
    _require(_same(_job_arrays(job), before), "champion, anchor, Fisher information and rows are left as they were")
    _require(
        not any(
            np.shares_memory(weight, array) for weight in first.weights.values() for array in _job_arrays(job).values()
        ),
        "the challenger shares no memory with the job",
    )
    _require(not _same(dict(first.weights), dict(job.champion.weights)), "the challenger has learned something")
    np.random.default_rng().random()
    second = _check_learner_result(learner, job)
    _require(first.to_bytes() == second.to_bytes(), "the same job gives the same bytes")


def _check_learner_result(learner: Learner, job: LearnJob) -> Head:
    challenger, result = learner(job)
    champion = job.champion
    _require(challenger.labels == champion.labels, "the challenger has the champion's labels in the champion's order")
    _require(
        {key: (w.shape, w.dtype) for key, w in challenger.weights.items()}
        == {key: (w.shape, w.dtype) for key, w in champion.weights.items()},
        "the challenger's weights have the champion's names, shapes and types",
    )
    _require(all(np.isfinite(w).all() for w in challenger.weights.values()), "the challenger's weights are finite")
    _require(not result.error, "a result that comes with a challenger tells of no error")
    _require(result.steps > 0, "the result tells how many steps were taken")
    _require(
        bool(np.isfinite([result.first_loss, result.last_loss, result.seconds]).all()),
        "the result's numbers are finite",
    )
    return challenger


def _example_job(hidden: int, seed: int) -> LearnJob:
    """Latents around one centre a class; the last class is new and the head starts without knowing it."""
    rng = np.random.default_rng(seed)
    dim, classes = 16, 8
    centres = rng.integers(20, 235, (classes, dim))

    def rows(labels: AnyArray) -> AnyArray:
        return np.clip(centres[labels] + rng.normal(0, 20, (len(labels), dim)), 0, 255).astype(np.uint8)

    replayed, fresh = rng.integers(classes - 1, size=90), rng.integers(classes, size=60)
    widths = (dim, hidden, classes - 1) if hidden else (dim, classes - 1)
    weights: dict[str, FloatArray] = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = np.zeros(outputs, np.float32)
    names = tuple(f"class {i}" for i in range(classes))
    champion = Head(weights, names[:-1]).grown(names)
    replay_latents = rows(replayed)
    return LearnJob(
        champion=champion,
        anchor={key: value.copy() for key, value in champion.weights.items()},
        fisher=fisher_diagonal(champion, (replay_latents / 64.0).astype(np.float32)),
        fresh_latents=rows(fresh),
        fresh_labels=fresh,
        replay_latents=replay_latents,
        replay_labels=replayed,
        latent=LatentSpec(dim=dim, scale=1 / 64, zero_point=0),
        config=LearnConfig(passes=3),
        seed=seed,
    )


def _job_arrays(job: LearnJob) -> dict[str, AnyArray]:
    arrays: dict[str, AnyArray] = {
        "fresh latents": job.fresh_latents,
        "fresh labels": job.fresh_labels,
        "replay latents": job.replay_latents,
        "replay labels": job.replay_labels,
    }
    for name, weights in (("champion", job.champion.weights), ("anchor", job.anchor), ("fisher", job.fisher)):
        arrays |= {f"{name} {key}": value for key, value in weights.items()}
    return arrays


def _shapes(detector: DriftDetector) -> dict[str, object]:
    return {key: (array.shape, array.dtype) for key, array in detector.state().items()}


def _same(first: dict[str, AnyArray], second: dict[str, AnyArray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def _similar(first: dict[str, AnyArray], second: dict[str, AnyArray]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].shape == second[key].shape and np.allclose(first[key], second[key], rtol=1e-6) for key in first
    )
