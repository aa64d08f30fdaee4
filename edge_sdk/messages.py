"""What crosses the wire: topics, messages and their encoding. `docs/protocol.md` is the contract.

A payload is one version byte and a MessagePack array. Fields are only ever appended, readers ignore those they do
not know, so that an old device and a new coordinator understand each other within one version.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, TypeVar

import msgspec

from edge_sdk.errors import ProtocolError

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 120_000
"""Larger payloads are never published: some brokers drop the line at 128 kB."""
MAX_SUMMARY_BYTES = 8192
"""Of a Summary as the body of an envelope: one comes from every device in every hour, often over a mobile network."""
BLOCK_BYTES = 64 * 1024
DEFAULT_PREFIX = "edge"
UP = ("state", "report", "event", "need")
"""Last levels of the topics that a device publishes on."""
THRESHOLD_ALL = 2**32
"""A rollout threshold that every device is below."""

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises, whatever bytes it is given."""
_HEX = frozenset("0123456789abcdef")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_INDEX = re.compile(r"[0-9]{1,9}")


Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What a database can hold. Checked while it is read, as the two below: no code after that is as fast."""
Real = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Finite."""
Time = Annotated[float, msgspec.Meta(ge=0.0, lt=253_402_300_800.0)]
"""Seconds since the epoch, before the year 10000, which no calendar function knows."""


class State(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Retained on `up/state`: a device's birth and, as last will, its death."""

    device: str
    store_id: str
    time: Time
    online: bool
    reason: str
    """"birth", "stopped", or "lost" (the broker says it for the device)."""
    boot: Count
    release: Count
    head: Count
    digest: str
    """SHA-256 of the manifest of the release in use."""
    group: str
    mode: str
    sdk: str
    hardware: str = ""
    """What the device runs on: as configured, or as the machine calls itself."""


class MonitorState(msgspec.Struct, frozen=True, array_like=True):
    """One drift monitor in a report."""

    name: str
    evidence: Real
    threshold: Real
    warning: bool
    alarm: bool


class ShadowTally(msgspec.Struct, frozen=True, array_like=True):
    """How a release in shadow did on inputs of the window that the release in use answered, too."""

    release: Count
    rows: Count
    """Inputs both answered."""
    disagreed: Count
    """Of them, those answered differently."""
    labelled: Count
    """Of them, those whose label came in the window; 0 while fewer than `min_count` have come together."""
    won: Count
    """Of these, right by the release in shadow alone."""
    lost: Count
    """Of these, right by the release in use alone."""
    errors: Count
    """Inputs that the release in shadow failed on."""

    @classmethod
    def new(cls, release: int) -> ShadowTally:
        """Nothing is known yet."""
        return cls(release, 0, 0, 0, 0, 0, 0)


class Report(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What happened on a device since its last report. Aggregates only; small cells are suppressed."""

    start: Time
    end: Time
    release: Count
    head: Count
    mode: str
    predictions: Count
    labelled: Count
    """Labelled predictions scored in the window; 0 while fewer than `min_count` have come together."""
    correct: Count
    unmatched: Count
    """Labels whose prediction was gone."""
    rejected_inputs: Count
    errors: Count
    mean_confidence: Real
    p50_ms: Real
    p95_ms: Real
    predicted: dict[str, Count]
    """Predictions per label; cells below `min_count` merged."""
    monitors: list[MonitorState]
    replay_rows: Count
    fresh_rows: Count
    promotions: Count
    """Since the store was made, as the four below."""
    rejections: Count
    rollbacks: Count
    labels_lost: Count
    outbox_dropped: Count
    rss_mb: Real
    written_bytes: Count
    """Bytes given to flash since the last report."""
    labels: list[str] = []
    """Those that `confusion` counts."""
    confusion: bytes = b""
    """Labelled predictions by truth and answer, see `to_cells`; cells below `min_count` merged."""
    scores: dict[str, Real] = {}
    """Prequential scores: of the labelled predictions so far, older ones faded."""
    p99_ms: Real = 0.0
    temperature_c: Real | None = None
    """Hottest sensor; None: there is none."""
    shadow: list[ShadowTally] = []
    """Of the release that runs beside the one in use because the coordinator asked for it; empty if none does."""
    disk_free_mb: Count | None = None
    """Room for this process on the disk of its database, in whole MB; None: unknown, as the next two."""
    memory_free_mb: Count | None = None
    """Memory of the machine that can be had without swapping."""
    memory_total_mb: Count | None = None
    """Memory of the machine."""


class MetricSummary(msgspec.Struct, frozen=True, array_like=True):
    """One of the app's own metrics in a Summary."""

    name: str
    count: Count
    """Values recorded, rounded to a multiple of `unit`."""
    mean: Real
    std: Real
    low: Real
    """Of all values, rounded away from the mean to within about one `std`; as `high`."""
    high: Real
    above: bytes
    """Quantile sketch of the values of 0 or more, see `to_buckets`; empty if there was no room, as `below`."""
    below: bytes
    """Of those below 0, without their sign."""


class Summary(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How a device's data looked over some time. Counts are rounded at random to multiples of `unit`, without bias."""

    start: Time
    end: Time
    release: Count
    head: Count
    reference: str
    """Names the reference whose quantiles the bins are of; only summaries of one reference can be added."""
    unit: Count
    rows: Count
    """Predictions, rounded to a multiple of `unit`."""
    features: list[str]
    bins: Count
    """By feature; each holds as many rows of the reference."""
    counts: bytes
    """Rows by feature and bin in units, row after row, see `to_counts`; so `missing` by feature."""
    missing: bytes
    moments: bytes
    """Little-endian float32 [features, 4]: mean, standard deviation, low and high."""
    confidence: bytes
    """Rows in units by 64 equal parts of 0 to 1; empty where the model has no probabilities."""
    classes: dict[str, Count]
    """Predictions by label, rounded to multiples of `unit`."""
    latency: bytes
    """Quantile sketch of milliseconds for one prediction, see `to_buckets`; may be empty."""
    metrics: list[MetricSummary]
    monitors: list[MonitorState]


class Event(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Something that happened once: `name` is one of those listed in docs/protocol.md."""

    name: str
    release: Count
    head: Count
    detail: dict[str, str | int | float | bool]


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """Rows `first` to `last` were dropped on the device because its outbox was full."""

    first: Count
    last: Count


class Envelope(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Carries one outbox row. Identity is (device, store_id, seq)."""

    store_id: str
    seq: Count
    oldest: Count
    """Lowest sequence number this device still holds: nothing below it will ever come."""
    time: Time
    kind: str
    """"report", "summary", "event" or "gap"; a gap's `seq` is its last row."""
    body: msgspec.Raw


class Ack(msgspec.Struct, frozen=True, array_like=True):
    """Everything up to and including `seq` is committed at the coordinator."""

    store_id: str
    seq: Count


class Need(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A device asks for blocks of a file."""

    digest: str
    size: Count
    blocks: bytes
    """Bitmap, bit i of byte i // 8 (lowest first) set for each block asked for."""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A release: its number, and hash and size of its manifest."""

    release: Count
    digest: str
    size: Count

    def __post_init__(self) -> None:
        """Refuse what could not be a file's hash: it becomes a file name on the device."""
        if len(self.digest) != 64 or set(self.digest) - _HEX:
            raise ValueError("digest is not 64 lower-case hexadecimal digits")


class Part(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Some devices of a group that should run another release than its base, in Desired."""

    offer: Offer
    salt: str
    devices: bytes
    """The `cohort(salt, device)` of each, see `to_places`."""
    shadow_s: Real
    """0: run it; above: run it so long beside the release in use, and tell how it does."""


class Signature(msgspec.Struct, frozen=True, array_like=True):
    """Who vouches for a Desired."""

    key: str
    """Id of a key that TUF's root names for the timestamp."""
    value: bytes
    """Over what `edge_sdk.desired.signed_bytes` gives."""


class Desired(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Retained on `g/{group}/desired`: what the group should run."""

    revision: Count
    """Grows with every change; a lower one is stale."""
    base: Offer | None
    """For every device of the group."""
    candidate: Offer | None
    """For the devices whose `cohort(salt, device)` is below `threshold`."""
    salt: str
    threshold: Count
    revoked: list[Count]
    """Releases to leave at once for the previous one, and never to install."""
    block_bytes: int = BLOCK_BYTES
    parts: list[Part] = []
    """The first that names a device comes before the others, the candidate and the base."""
    issued: Time = 0.0
    """When it was signed, seconds since the epoch; 0: it was not."""
    expires: Time = 0.0
    """Nothing is installed by it from then on; 0: it was not signed."""
    signatures: list[Signature] = []
    """Empty: the coordinator has no keys."""

    def __post_init__(self) -> None:
        """Refuse a block size that cannot be sent."""
        if not 1 <= self.block_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(f"block_bytes is {self.block_bytes}, not 1 to {MAX_MESSAGE_BYTES}")


class MetadataSet(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Retained on `tuf/set`: the versions of the signed metadata that belong together. It claims nothing else."""

    root: Count
    timestamp: Count
    snapshot: Count
    targets: Count


class Order(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a device is told to do, in a Command."""

    id: str
    """Never given twice; the answer names it."""
    device: str
    name: str
    """One of those in `edge_sdk.commands`."""
    issued: float
    expires: float
    """Not carried out from then on."""
    args: dict[str, str | int | float | bool] = {}


class Command(msgspec.Struct, frozen=True, array_like=True):
    """An order and the proof that it comes from the coordinator."""

    order: bytes
    """An Order, without a version byte: these very bytes were signed."""
    mac: bytes
    """HMAC-SHA256, see `edge_sdk.commands`."""


SENT_BY_DEVICES = (State, Envelope, Report, MonitorState, ShadowTally, Summary, MetricSummary, Event, Gap, Need)
"""All that a device ever sends is in fields of these."""

M = TypeVar("M", bound=msgspec.Struct)
_READ: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (
        *(State, MonitorState, Report, MetricSummary, Summary, Event, Gap, Envelope, Ack, Need, Offer, Part),
        *(Signature, Desired, MetadataSet),
    )
}
"""Built before two devices of one process may read their first message at once, which could end it."""
_READ |= {kind: msgspec.msgpack.Decoder(kind) for kind in (Order, Command)}


def encode(message: msgspec.Struct) -> bytes:
    """The payload of a message.

    Raises:
        ProtocolError: It would exceed `MAX_MESSAGE_BYTES`.
    """
    payload = bytes([WIRE_VERSION]) + msgspec.msgpack.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are sent")
    return payload


def decode(payload: bytes, kind: type[M]) -> M:
    """The message of the given kind in `payload`.

    Raises:
        ProtocolError: Oversize, of another wire version, or not of the message's form.
    """
    if not payload or len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a payload of {len(payload)} bytes; 1 to {MAX_MESSAGE_BYTES} are read")
    if payload[0] != WIRE_VERSION:
        raise ProtocolError(f"wire version {payload[0]}, this side reads {WIRE_VERSION}")
    try:
        read: msgspec.msgpack.Decoder[M] = _READ[kind]
        return read.decode(memoryview(payload)[1:])
    except _UNREADABLE as error:
        raise ProtocolError(f"not a {kind.__name__}: {error}") from error


def raw(message: msgspec.Struct) -> msgspec.Raw:
    """A message as the body of an envelope."""
    return msgspec.Raw(msgspec.msgpack.encode(message))


def unpack(body: msgspec.Raw | bytes, kind: type[M]) -> M:
    """The message in an envelope's body.

    Raises:
        ProtocolError: Not of the message's form.
    """
    try:
        read: msgspec.msgpack.Decoder[M] = _READ[kind]
        return read.decode(body)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a {kind.__name__}: {error}") from error


def as_json(message: msgspec.Struct) -> dict[str, Any]:
    """A message with field names, for people; an envelope's body as its plain array."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    result: dict[str, Any] = msgspec.to_builtins(fields, enc_hook=msgspec.msgpack.decode)
    return result


def check_name(name: str, what: str = "device name") -> str:
    """`name` if it can stand in a topic.

    Raises:
        ProtocolError: It is empty, too long, or holds other characters.
    """
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"{what} {name!r}: use 1 to 64 letters, digits, '_', '.' or '-', not starting with a sign")
    return name


class Topics:
    """The topic names under one prefix."""

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        self.prefix = check_name(prefix, "topic prefix")

    def up(self, device: str, kind: str) -> str:
        """From a device: kind is "report" (summaries too), "event", "need" or "state"."""
        return f"{self.prefix}/d/{device}/up/{kind}"

    def down(self, device: str, kind: str) -> str:
        """To a device: kind is "ack" or "cmd"."""
        return f"{self.prefix}/d/{device}/dn/{kind}"

    def desired(self, group: str) -> str:
        """What a group should run."""
        return f"{self.prefix}/g/{group}/desired"

    def block(self, digest: str, index: int | str) -> str:
        """One block of a file; index "+" to subscribe to all."""
        return f"{self.prefix}/b/{digest}/{index}"

    def metadata(self, name: str) -> str:
        """Signed metadata: name is "set", "timestamp", "snapshot", "targets" or "3.root"; "+" to subscribe to all."""
        return f"{self.prefix}/tuf/{name}"

    def alerts(self, sink: str) -> str:
        """Where the coordinator tells people's tools."""
        return f"{self.prefix}/alerts/{sink}"

    def parse_metadata(self, topic: str) -> str | None:
        """The name of a topic made by `metadata`, or None."""
        parts = topic.split("/")
        return parts[2] if len(parts) == 3 and parts[:2] == [self.prefix, "tuf"] else None

    def parse_up(self, topic: str) -> tuple[str, str] | None:
        """(device, kind) of a topic made by `up`, or None."""
        parts = topic.split("/")
        if len(parts) == 5 and parts[0] == self.prefix and parts[1] == "d" and parts[3] == "up":
            return parts[2], parts[4]
        return None

    def parse_block(self, topic: str) -> tuple[str, int] | None:
        """(digest, index) of a topic made by `block`, or None."""
        parts = topic.split("/")
        if len(parts) == 4 and parts[0] == self.prefix and parts[1] == "b" and _INDEX.fullmatch(parts[3]):
            return parts[2], int(parts[3])
        return None


def cohort(salt: str, device: str) -> int:
    """A device's place in a rollout, 0 to 2**32 - 1: the first 4 bytes of SHA-256 of "salt/device", big-endian."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{device}".encode()).digest()[:4], "big")


def block_count(size: int, block_bytes: int = BLOCK_BYTES) -> int:
    """How many blocks a file of `size` bytes has; an empty file has none."""
    return -(-size // block_bytes)


def to_bitmap(blocks: set[int], count: int) -> bytes:
    """The set of block numbers as a bitmap of `count` bits."""
    bits = bytearray(-(-count // 8))
    for i in blocks:
        bits[i // 8] |= 1 << (i % 8)
    return bytes(bits)


def from_bitmap(bits: bytes, count: int) -> set[int]:
    """The block numbers set in a bitmap, those beyond `count` left out."""
    return {i for i in range(min(count, len(bits) * 8)) if bits[i // 8] >> (i % 8) & 1}


def to_counts(numbers: Iterable[int]) -> bytes:
    """Whole numbers from 0 to 2^63 - 1, small ones in one byte each: LEB128, as DWARF and Protocol Buffers have it."""
    numbers = list(numbers)
    if max(numbers, default=0) < 128:  # as in most summaries: 40 times as fast
        return bytes(numbers)
    data = bytearray()
    for number in numbers:
        rest = number
        while rest > 127:
            data.append(rest & 127 | 128)
            rest >>= 7
        data.append(rest)
    return bytes(data)


def from_counts(data: bytes) -> list[int]:
    """The numbers that `to_counts` wrote.

    Raises:
        ProtocolError: The last one is cut off, or one is above 2^63 - 1.
    """
    if data.isascii():  # every number in one byte, as in most summaries: 200 times as fast
        return list(data)
    numbers, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        shift += 7
        if number >= 2**63 or shift > 63:
            raise ProtocolError("a count above 2^63 - 1")
        if byte < 128:
            numbers.append(number)
            number, shift = 0, 0
    if shift:
        raise ProtocolError("counts that end within a number")
    return numbers


def to_places(places: Iterable[int]) -> bytes:
    """Whole numbers of 0 or more, ascending, each as its distance from the one before, in the form of `to_counts`."""
    ordered = sorted(set(places))
    return to_counts(number - before for before, number in zip([0, *ordered], ordered, strict=False))


def from_places(data: bytes) -> list[int]:
    """The numbers that `to_places` wrote, ascending.

    Raises:
        ProtocolError: It did not write this.
    """
    return list(accumulate(from_counts(data)))


def to_cells(cells: Mapping[str, int]) -> tuple[list[str], bytes]:
    """Counts by truth and answer, a tab between the two, or "other", as labels and a run of numbers.

    The numbers are three for each cell: that of the truth among the labels, that of the answer, and the count. What is
    not told apart has the number of labels in place of both.
    """
    pairs = {cell: cell.partition("\t")[::2] for cell in cells if cell != "other"}
    labels = sorted({label for pair in pairs.values() for label in pair})
    number = {label: i for i, label in enumerate(labels)}
    numbers: list[int] = []
    for cell, count in cells.items():
        truth, said = (number[label] for label in pairs[cell]) if cell in pairs else (len(labels), len(labels))
        numbers += [truth, said, count]
    return labels, to_counts(numbers)


def from_cells(labels: Sequence[str], data: bytes) -> dict[str, int]:
    """The counts that `to_cells` wrote.

    Raises:
        ProtocolError: It did not write this.
    """
    check_cells(labels, data)
    numbers = from_counts(data)
    return {
        "other" if truth == len(labels) else f"{labels[truth]}\t{labels[said]}": count
        for truth, said, count in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    }


def check_cells(labels: Sequence[str], data: bytes) -> int:
    """How many counts `from_cells` would give, without making them.

    Raises:
        ProtocolError: As `from_cells` does.
    """
    numbers = from_counts(data)
    if len(numbers) % 3:
        raise ProtocolError("a confusion that ends within a cell")
    truths, answers, count = numbers[::3], numbers[1::3], len(labels)
    if truths and max(*truths, *answers) >= count:
        for truth, said in zip(truths, answers, strict=True):
            if max(truth, said) >= count and not truth == said == count:
                raise ProtocolError(f"a confusion of label {max(truth, said)} among {count}")
    return len(truths)


def to_buckets(indexes: Sequence[int], counts: Sequence[int], zeros: int) -> bytes:
    """A quantile sketch in the form of `to_counts`; empty buckets are left out.

    First come the zeros, then each bucket as its distance from the one before and its count. The distance of the first
    is from 0, and coded as twice as much, or twice as much less 1 if it is negative.
    """
    filled = [(index, count) for index, count in zip(indexes, counts, strict=True) if count]
    if not filled:
        return to_counts([zeros]) if zeros else b""
    first = filled[0][0]
    numbers = [zeros, 2 * first if first >= 0 else -2 * first - 1, filled[0][1]]
    for (before, _), (index, count) in pairwise(filled):
        numbers += [index - before, count]
    return to_counts(numbers)


def from_buckets(data: bytes) -> tuple[list[int], list[int], int]:
    """Numbers of the buckets, their counts, and the zeros, as `to_buckets` wrote them.

    Raises:
        ProtocolError: It did not write this.
    """
    zeros, *numbers = from_counts(data) or [0]
    if len(numbers) % 2:
        raise ProtocolError("a sketch that ends within a bucket")
    distances, counts = numbers[::2], numbers[1::2]
    if distances:
        first = distances[0]
        distances[0] = first // 2 if first % 2 == 0 else -(first + 1) // 2
    return list(accumulate(distances)), counts, zeros
