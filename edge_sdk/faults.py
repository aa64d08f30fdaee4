"""Networks as they are: a TCP proxy between a device and its broker that is slow, loses lines, and falls silent.

It works with any client and any broker, also from the command line (`edge faults`):

    with FaultProxy(("127.0.0.1", 1883), faults=Faults(latency_s=0.2, loss=0.02)) as proxy:
        transport = MqttTransport(proxy.host, proxy.port, client_id="pump-1")

What a proxy of TCP can and cannot do. It sees streams of bytes, not packets: a byte that was lost on the way is one
that came late, since TCP sends it again. So `loss` delays, as a retransmission would, all that follows; nothing
vanishes from the middle of a stream. Connections can be lost: with a reset that both ends notice (`cut`), or in
silence, half open, so that only a keepalive finds out (`half_open`). The kernel completes a connection before the
proxy sees it: a new line costs no latency, and during a partition a client gets its line, and silence on it.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from typing import Any, Self

import msgspec

from edge_sdk.errors import TransportError
from edge_sdk.transport import allow_connections

_SEGMENT_BYTES = 1_460
_READ_BYTES = 65_536
_WINDOW_BYTES = 1_048_576
"""Most bytes on their way in one direction; then the sender has to wait, as with TCP's own window."""
_MOST_RETRANSMIT_S = 60.0
_NEVER = float("inf")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a socket closed so sends a reset

logger = logging.getLogger(__name__)


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How bad the network is. The default is a perfect one; all of it applies to each direction by itself."""

    latency_s: float = 0.0
    """Seconds that a byte takes one way."""
    jitter_s: float = 0.0
    """Up to so many seconds more, evenly spread; bytes never overtake each other."""
    loss: float = 0.0
    """Share of segments (1,460 bytes or less) that are lost and come after a retransmission, below 1."""
    retransmit_s: float = 0.2
    """Seconds until a lost segment is sent again; doubled each time it is lost once more, up to a minute."""
    bandwidth: float = 0.0
    """Bytes a second of one connection; 0: no limit."""
    life_s: float = 0.0
    """Mean life of a new connection in seconds; then it is lost. 0: it lasts."""
    half_open: float = 0.0
    """Share of lost connections that fall silent instead of being reset."""
    refuse: float = 0.0
    """Share of new connections that are reset at once."""
    partition_every_s: float = 0.0
    """Seconds from the beginning of one partition to that of the next, during which nothing passes; 0: none."""
    partition_s: float = 0.0
    """How long each of them lasts. They come at the end of each interval."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: A field is out of range; it is named.
        """
        for name in self.__struct_fields__:
            if not 0 <= getattr(self, name) < _NEVER:
                raise ValueError(f"{name} is zero or more and finite, got {getattr(self, name)}")
        for name in ("half_open", "refuse"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")
        if self.loss >= 1:
            raise ValueError(f"loss is a share below 1, got {self.loss}; for none at all use a partition")
        if self.partition_s > self.partition_every_s:
            raise ValueError(f"partition_s ({self.partition_s}) exceeds partition_every_s ({self.partition_every_s})")

    def partitioned(self, since_start_s: float) -> bool:
        """Whether the schedule has the network partitioned so long after the start."""
        every = self.partition_every_s
        return every > 0 and since_start_s % every >= every - self.partition_s

    def next_change(self, since_start_s: float) -> float:
        """Seconds until `partitioned` changes; infinite if it never does."""
        every = self.partition_every_s
        if every <= 0 or self.partition_s == 0:
            return _NEVER
        phase = since_start_s % every
        begin = every - self.partition_s
        return begin - phase if phase < begin else every - phase


class Pipe:
    """One direction of a connection: bytes go in, and are due later. Pure: time and chance are arguments.

    Bytes come out in order and complete. `None` stands for the end of the stream.

    Example:
        >>> pipe = Pipe(random.Random(0))
        >>> pipe.push(b"hello", 10.0, Faults(latency_s=0.5))
        >>> pipe.pop(10.4), pipe.pop(10.5)
        ([], [b'hello'])
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._latest = 0.0
        self._line_free = 0.0
        self.held_bytes = 0
        """How many bytes are on their way."""

    def push(self, data: bytes | None, now: float, faults: Faults) -> None:
        """Let these bytes, or the end of the stream, begin their way."""
        if data is None:
            self._queue.append((max(self._latest, now + faults.latency_s), None))
            return
        self.held_bytes += len(data)
        for start in range(0, len(data), _SEGMENT_BYTES):
            segment = data[start : start + _SEGMENT_BYTES]
            # what is sent faster than the line takes it waits in front of it
            if faults.bandwidth:
                self._line_free = max(self._line_free, now) + len(segment) / faults.bandwidth
                leaves = self._line_free
            else:
                leaves = now
            self._latest = max(self._latest, leaves + faults.latency_s + self._delay(faults))
            self._queue.append((self._latest, segment))

    def pop(self, now: float) -> list[bytes | None]:
        """What has arrived by now."""
        arrived: list[bytes | None] = []
        while self._queue and self._queue[0][0] <= now:
            piece = self._queue.popleft()[1]
            self.held_bytes -= len(piece or b"")
            arrived.append(piece)
        return arrived

    @property
    def due(self) -> float:
        """When the next byte arrives; infinite if none is on its way."""
        return self._queue[0][0] if self._queue else _NEVER

    def _delay(self, faults: Faults) -> float:
        delay = self._rng.uniform(0, faults.jitter_s) if faults.jitter_s else 0.0
        again = faults.retransmit_s
        while faults.loss and self._rng.random() < faults.loss:
            delay += again
            again = min(2 * again, _MOST_RETRANSMIT_S)
        return delay


class FaultProxy:
    """A proxy with faults, on a thread of its own from `start` to `close`; `with proxy:` does both.

    The same seed gives the n-th connection the same life, and its k-th segment in either direction the same fate. How
    the kernel cuts a stream into segments is its own business, so bulk transfers repeat only on average.

    Example:
        >>> proxy = FaultProxy(("127.0.0.1", 1883), faults=Faults(latency_s=0.2))
        >>> with proxy:  # doctest: +SKIP
        ...     transport = MqttTransport(proxy.host, proxy.port, client_id="pump-1")
        ...     transport.connect()
        ...     proxy.partition()
        ...     proxy.heal()
    """

    def __init__(
        self,
        to: tuple[str, int],
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        faults: Faults = Faults(),  # noqa: B008 - frozen
        seed: int = 0,
    ) -> None:
        """Describe a proxy; nothing listens before `start`.

        Args:
            to: Host and port of the broker.
            listen: Where devices connect; port 0: any free one, see `port`. By default this machine only.
            faults: How bad the network is; `set` changes it later.
            seed: Of all chance.
        """
        self.host, self.port = listen
        self._to, self._seed = to, seed
        self._faults = faults
        self._selector: selectors.BaseSelector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._lock = threading.RLock()
        self._address: tuple[socket.AddressFamily, Any] | None = None
        self._pairs: dict[_Pair, None] = {}  # a set that keeps its order
        self._timers: list[tuple[float, int, _Pair]] = []  # a heap
        self._timer_count = self._count = 0
        self._partitioned = self._frozen = False
        self._thread: threading.Thread | None = None
        self._ending = False
        self._started = 0.0
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)

    @property
    def faults(self) -> Faults:
        """How bad the network is now."""
        return self._faults

    @property
    def connections(self) -> int:
        """How many lines there are now, half-open ones included."""
        with self._lock:
            return len(self._pairs)

    @property
    def accepted(self) -> int:
        """How many connections there have been, refused ones included."""
        return self._count

    def set(self, faults: Faults) -> None:
        """Make the network this bad from now on; what is on its way arrives as it was to."""
        with self._lock:
            self._faults = faults
        self._wake()

    def partition(self) -> None:
        """Let nothing pass until `heal`. Lines stay open, and bytes wait, as TCP would send them again."""
        with self._lock:
            self._partitioned = True
            self._freeze_or_thaw(time.monotonic())
        self._wake()

    def heal(self) -> None:
        """End a partition. One of the schedule begins anew with its next interval."""
        with self._lock:
            self._partitioned = False
            self._freeze_or_thaw(time.monotonic())
        self._wake()

    def cut(self) -> int:
        """Reset all lines, so that both ends notice; returns how many."""
        with self._lock:
            pairs = list(self._pairs)
            for pair in pairs:
                self._reset(pair)
        return len(pairs)

    def half_open(self) -> int:
        """Silence all lines for good: whatever either end sends, a goodbye too, vanishes. Returns how many."""
        with self._lock:
            pairs = list(self._pairs)
            for pair in pairs:
                pair.silent = True
                self._watch(pair)
        return len(pairs)

    def start(self) -> None:
        """Listen, on a thread.

        Raises:
            TransportError: The address cannot be listened on, or the broker's name is not known.
        """
        if self._thread is not None:
            return
        try:
            found = socket.getaddrinfo(*self._to, type=socket.SOCK_STREAM)[0]
            self._address = found[0], found[-1]
        except (OSError, UnicodeError) as error:  # what cannot be a name at all is the latter
            raise TransportError(f"the broker's address {self._to[0]}:{self._to[1]} is not known: {error}") from error
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self._listener = socket.create_server((self.host, self.port), family=family, backlog=1024)
        except OSError as error:
            raise TransportError(f"cannot listen on {self.host}:{self.port}: {error}") from error
        self._listener.setblocking(False)
        self.host, self.port = self._listener.getsockname()[:2]
        self._started = time.monotonic()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="edge-faults", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Reset all lines, stop listening and end the thread. A closed proxy stays closed."""
        if self._ending:
            return
        self._ending = True
        if self._thread is not None:
            self._wake()
            self._thread.join()
            self.cut()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway
            self._wake_writer.send(b"\0")

    # On the proxy's thread.

    def _run(self) -> None:
        while not self._ending:
            with self._lock:
                now = time.monotonic()
                self._freeze_or_thaw(now)
                wait = self._do_what_is_due(now)
            for key, events in self._selector.select(None if wait == _NEVER else max(0.0, wait - time.monotonic())):
                with self._lock:
                    self._handle(key, events)

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        now = time.monotonic()
        if key.fileobj is self._wake_reader:
            self._wake_reader.recv(4096)
        elif key.fileobj is self._listener:
            self._accept(now)
        elif key.data.end(key.fd) is not None:  # it may have gone within this turn
            self._move(key.data, key.data.end(key.fd), events, now)

    def _freeze_or_thaw(self, now: float) -> None:
        """Begin or end a partition: neither new lines nor bytes are taken while it lasts."""
        frozen = self._partitioned or self._faults.partitioned(now - self._started)
        if frozen == self._frozen or self._listener is None or self._ending:
            return
        self._frozen = frozen
        if frozen:
            self._selector.unregister(self._listener)
        else:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        for pair in self._pairs:
            self._watch(pair)
            self._remind(pair, now)

    def _do_what_is_due(self, now: float) -> float:
        """Deliver what has arrived and end lives; returns when there is more to do."""
        while self._timers and self._timers[0][0] <= now:
            pair = heapq.heappop(self._timers)[2]
            pair.reminder = _NEVER
            if self._frozen:
                continue  # thawing reminds of all
            if pair in self._pairs and pair.dies_at <= now:
                self._lose(pair)
            for end in pair.ends:
                if pair in self._pairs:
                    self._deliver(pair, end, now)
            if pair in self._pairs:
                self._remind(pair, pair.dies_at)
        change = now + self._faults.next_change(now - self._started)
        return min(change, self._timers[0][0] if self._timers else _NEVER)

    def _remind(self, pair: _Pair, when: float) -> None:
        """Look at this connection then, or earlier."""
        if when < pair.reminder:
            pair.reminder = when
            self._timer_count += 1
            heapq.heappush(self._timers, (when, self._timer_count, pair))

    def _accept(self, now: float) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            logger.warning("a connection could not be taken: %s", error)
            return
        self._count += 1
        rng = random.Random(f"{self._seed}/{self._count}")  # noqa: S311 - it has to repeat
        refused, silent, life = rng.random() < self._faults.refuse, rng.random(), rng.expovariate(1.0)
        if refused:
            _close_with_reset(client)
            return
        try:
            assert self._address is not None
            allow_connections(2 * len(self._pairs) + 2)
            family, address = self._address
            broker = socket.socket(family, socket.SOCK_STREAM)
        except (OSError, TransportError) as error:
            logger.warning("no line to the broker: %s", error)
            _close_with_reset(client)
            return
        for line in (client, broker):
            line.setblocking(False)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = _Pair(client, broker, self._seed, self._count)
        pair.dies_at = now + life * self._faults.life_s if self._faults.life_s else _NEVER
        pair.dies_silently = silent < self._faults.half_open
        self._pairs[pair] = None
        if broker.connect_ex(address) in (0, errno.EINPROGRESS):  # the socket tells, once it is writable
            self._watch(pair)
            self._remind(pair, pair.dies_at)
        else:
            self._refused(pair)

    def _move(self, pair: _Pair, end: _End, events: int, now: float) -> None:
        other = pair.other(end)
        try:
            if events & selectors.EVENT_WRITE:
                if not end.connected:
                    if end.line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        self._refused(pair)
                        return
                    end.connected = True
                self._deliver(pair, end, now)
            if events & selectors.EVENT_READ and end.reads and pair in self._pairs:
                data = end.line.recv(_READ_BYTES)
                end.reads = bool(data)
                if not pair.silent:
                    other.outgoing.push(data or None, now, self._faults)
                    self._deliver(pair, other, now)
                elif not data:
                    self._gone(pair, end)
        except BlockingIOError:
            pass
        except OSError:
            self._gone(pair, end)
            return
        if pair in self._pairs:
            self._watch(pair)

    def _deliver(self, pair: _Pair, end: _End, now: float) -> None:
        """Give an end what has arrived for it, as far as its socket takes it."""
        if not end.connected or self._frozen or pair.silent:
            return
        try:
            end.deliver(now)
        except OSError:
            self._gone(pair, end)
            return
        if all(each.shut for each in pair.ends):
            self._remove(pair)
            for each in pair.ends:
                each.line.close()
            return
        self._watch(pair)
        if not end.unsent:
            self._remind(pair, end.outgoing.due)

    def _watch(self, pair: _Pair) -> None:
        """Ask the selector for what can be used: no byte more than fits, none during a partition."""
        for end in pair.ends:
            wanted = 0
            if end.closed:
                pass
            elif not end.connected:
                wanted = selectors.EVENT_WRITE
            elif not self._frozen:
                room = pair.silent or pair.other(end).held_bytes < _WINDOW_BYTES
                wanted |= selectors.EVENT_READ if end.reads and room else 0
                wanted |= selectors.EVENT_WRITE if end.unsent and not pair.silent else 0
            if wanted == end.watched:
                continue
            if not end.watched:
                self._selector.register(end.line, wanted, pair)
            elif not wanted:
                self._selector.unregister(end.line)
            else:
                self._selector.modify(end.line, wanted, pair)
            end.watched = wanted

    def _gone(self, pair: _Pair, end: _End) -> None:
        """One end has reset its line: so does the other, unless the network is silent about it."""
        if not pair.silent:
            self._reset(pair)
            return
        end.closed = True
        self._watch(pair)
        end.line.close()
        if all(each.closed for each in pair.ends):
            self._pairs.pop(pair, None)

    def _refused(self, pair: _Pair) -> None:
        logger.warning("the broker at %s:%s refused a line", *self._to)
        self._reset(pair)

    def _lose(self, pair: _Pair) -> None:
        pair.dies_at = _NEVER
        if pair.dies_silently:
            pair.silent = True
            self._watch(pair)
        else:
            self._reset(pair)

    def _reset(self, pair: _Pair) -> None:
        self._remove(pair)
        for end in pair.ends:
            if not end.closed:
                _close_with_reset(end.line)

    def _remove(self, pair: _Pair) -> None:
        self._pairs.pop(pair, None)
        for end in pair.ends:
            if end.watched:
                self._selector.unregister(end.line)
                end.watched = 0


class _End:
    """A socket of a connection through the proxy, and what is on its way to it."""

    def __init__(self, line: socket.socket, rng: random.Random, *, connected: bool) -> None:
        self.line, self.connected = line, connected
        self.outgoing = Pipe(rng)
        self.unsent = bytearray()  # arrived, but the socket had no room
        self.reads = True
        self.finished = self.shut = self.closed = False
        self.watched = 0

    @property
    def held_bytes(self) -> int:
        """How many bytes this end has not got yet."""
        return self.outgoing.held_bytes + len(self.unsent)

    def deliver(self, now: float) -> None:
        """Write what has arrived; what the socket has no room for stays in `unsent`."""
        for piece in self.outgoing.pop(now):
            if piece is None:
                self.finished = True
            else:
                self.unsent += piece
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.line.send(self.unsent)]
        if self.finished and not self.unsent and not self.shut:
            self.shut = True
            self.line.shutdown(socket.SHUT_WR)


class _Pair:
    """A connection through the proxy: the device's end and the broker's."""

    def __init__(self, client: socket.socket, broker: socket.socket, seed: int, number: int) -> None:
        # each direction has a chance of its own, so that the other's traffic does not change its fate
        down, up = (random.Random(f"{seed}/{number}/{direction}") for direction in ("down", "up"))  # noqa: S311
        self.ends = (_End(client, down, connected=True), _End(broker, up, connected=False))
        self.silent = self.dies_silently = False
        self.dies_at = self.reminder = _NEVER

    def end(self, number: int) -> _End | None:
        """The end whose socket has this file number."""
        return next((end for end in self.ends if not end.closed and end.line.fileno() == number), None)

    def other(self, end: _End) -> _End:
        """The opposite one."""
        return self.ends[1] if end is self.ends[0] else self.ends[0]


def _close_with_reset(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    line.close()
