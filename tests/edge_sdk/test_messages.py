"""What crosses the wire: fixed bytes, room for new fields, and a typed error for everything else."""

import contextlib
import json
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import messages
from edge_sdk.commands import sign
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import (
    BLOCK_BYTES,
    MAX_MESSAGE_BYTES,
    THRESHOLD_ALL,
    WIRE_VERSION,
    Ack,
    Desired,
    Envelope,
    Event,
    Gap,
    MetadataSet,
    MetricSummary,
    MonitorState,
    Need,
    Offer,
    Order,
    Part,
    Report,
    ShadowTally,
    Signature,
    State,
    Summary,
    Topics,
    as_json,
    block_count,
    check_name,
    cohort,
    decode,
    encode,
    from_bitmap,
    from_buckets,
    from_cells,
    from_counts,
    from_places,
    raw,
    to_bitmap,
    to_buckets,
    to_cells,
    to_counts,
    to_places,
    unpack,
)

GOLDEN = Path(__file__).parents[1] / "golden"

EVENT = Event(name="promoted", release=2, head=5, detail={"rows": 120, "gain": 0.25, "by": "gate", "dry": False})
ORDER = Order(
    id="7d3a", device="pump-1", name="pause-learning", issued=1_767_225_600.0, expires=1_767_312_000.0,
    args={"seconds": 3600.0},
)  # fmt: skip
MESSAGES = {
    "state": State(
        device="pump-1",
        store_id="5f0c",
        time=1_767_225_600.5,
        online=True,
        reason="birth",
        boot=3,
        release=2,
        head=5,
        digest="ab" * 32,
        group="plant-a",
        mode="adapt",
        sdk="0.1.0",
        hardware="pi4",
    ),
    "report": Report(
        start=1_767_225_600.0,
        end=1_767_225_660.0,
        release=2,
        head=5,
        mode="adapt",
        predictions=600,
        labelled=120,
        correct=110,
        unmatched=1,
        rejected_inputs=2,
        errors=0,
        mean_confidence=0.875,
        p50_ms=0.5,
        p95_ms=1.25,
        predicted={"0": 300, "1": 280, "other": 20},
        monitors=[MonitorState("input", 12.5, 1000.0, warning=True, alarm=False)],
        replay_rows=2000,
        fresh_rows=64,
        promotions=1,
        rejections=2,
        rollbacks=0,
        labels_lost=0,
        outbox_dropped=0,
        rss_mb=71.5,
        written_bytes=40_960,
        labels=["0", "1"],
        confusion=to_cells({"0\t0": 60, "1\t1": 50, "other": 10})[1],
        scores={"accuracy": 0.9167, "f1": 0.875},
        p99_ms=2.5,
        temperature_c=48.5,
        shadow=[ShadowTally(3, 200, 12, 40, 5, 2, 1)],
        disk_free_mb=812,
        memory_free_mb=301,
        memory_total_mb=926,
    ),
    "summary": Summary(
        start=1_767_225_600.0,
        end=1_767_229_200.0,
        release=2,
        head=5,
        reference="9f86d081",
        unit=10,
        rows=600,
        features=["acc_x", "acc_y"],
        bins=4,
        counts=to_counts([14, 16, 15, 15, 20, 10, 15, 150]),
        missing=to_counts([0, 1]),
        moments=struct.pack("<8f", 2.5, 0.5, 1.0, 4.0, -1.0, 0.25, -2.0, 0.5),
        confidence=to_counts([0] * 60 + [5, 5, 10, 40]),
        classes={"0": 300, "1": 280, "other": 20},
        latency=to_buckets([-17, -16, 40], [20, 39, 1], 0),
        metrics=[MetricSummary("click", 600, 0.25, 0.4375, 0.0, 1.0, to_buckets([0], [15], 45), b"")],
        monitors=[MonitorState("input", 12.5, 1000.0, warning=True, alarm=False)],
    ),
    "event": EVENT,
    "gap": Gap(7, 19),
    "envelope": Envelope(store_id="5f0c", seq=20, oldest=3, time=1_767_225_660.0, kind="event", body=raw(EVENT)),
    "ack": Ack("5f0c", 20),
    "need": Need(digest="cd" * 32, size=200_000, blocks=b"\x0d"),
    "desired": Desired(
        revision=4,
        base=Offer(1, "ab" * 32, 2048),
        candidate=Offer(2, "cd" * 32, 4096),
        salt="r2",
        threshold=2**30,
        revoked=[3],
        parts=[
            Part(offer=Offer(4, "ef" * 32, 4096), salt="r4", devices=to_places([5, 70_000]), shadow_s=3600.0),
            Part(offer=Offer(2, "cd" * 32, 4096), salt="r2", devices=b"", shadow_s=0.0),
        ],
    ),
    "desired-signed": Desired(
        revision=1_767_225_600,
        base=Offer(1, "ab" * 32, 2048),
        candidate=None,
        salt="",
        threshold=0,
        revoked=[3],
        issued=1_767_225_660.0,
        expires=1_767_830_460.0,
        signatures=[  # by the key of 32 bytes 0 to 31; docs/protocol.md has it as an example
            Signature(
                "63d00ee3cf4f5c61ad94efa696c68f13b608fe56ecea13fb144a6fd18e9235b9",
                bytes.fromhex(
                    "9feba53319109141ab557a1a556418c9f25cf16f7855b18b3127f8d61032abc2"
                    "99bd57a001a23c2ee8bb95cd9c77983ff5a2ada0e5ff27dce976baf18fb48704"
                ),
            )
        ],
    ),
    "metadata-set": MetadataSet(root=2, timestamp=300, snapshot=17, targets=16),
    "order": ORDER,
    "command": sign(ORDER, bytes(range(32))),
    "desired-empty": Desired(revision=0, base=None, candidate=None, salt="", threshold=0, revoked=[]),
}
named_messages = pytest.mark.parametrize(("name", "message"), MESSAGES.items(), ids=MESSAGES)


@named_messages
def test_bytes_on_the_wire_are_fixed(name, message):
    assert encode(message) == (GOLDEN / f"{name}.bin").read_bytes()
    assert as_json(message) == json.loads((GOLDEN / f"{name}.json").read_text())


@named_messages
def test_golden_bytes_still_decode(name, message):
    assert decode((GOLDEN / f"{name}.bin").read_bytes(), type(message)) == message


def test_every_message_has_a_golden_file():
    structs = {value for value in vars(messages).values() if isinstance(value, type(Ack))} - {msgspec.Struct}
    assert structs - {Offer, Part, Signature, MonitorState, ShadowTally, MetricSummary} == {
        type(message) for message in MESSAGES.values()
    }


@named_messages
def test_fields_of_a_later_version_are_ignored(name, message):
    fields = msgspec.msgpack.decode(encode(message)[1:])
    later = bytes([WIRE_VERSION]) + msgspec.msgpack.encode([*fields, "new", {"more": 1}])
    assert decode(later, type(message)) == message


@named_messages
def test_a_message_that_lacks_a_field_is_refused(name, message):
    required = sum(field.required for field in msgspec.structs.fields(message))
    fields = msgspec.msgpack.decode(encode(message)[1:])[: required - 1]
    with pytest.raises(ProtocolError, match=type(message).__name__):
        decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields), type(message))


def test_the_block_size_has_a_default_for_older_writers():
    fields = msgspec.msgpack.decode(encode(MESSAGES["desired"])[1:])[:6]
    assert decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields), Desired).block_bytes == BLOCK_BYTES


def test_a_desired_state_of_an_older_writer_is_not_signed():
    fields = msgspec.msgpack.decode(encode(MESSAGES["desired"])[1:])[:8]
    assert decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields), Desired) == MESSAGES["desired"]


def test_a_report_of_an_older_writer_has_no_scores():
    fields = msgspec.msgpack.decode(encode(MESSAGES["report"])[1:])[:-9]
    report = decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields), Report)
    assert (report.written_bytes, report.labels, report.confusion, report.scores) == (40_960, [], b"", {})
    assert (report.p99_ms, report.temperature_c, report.shadow) == (0.0, None, [])
    assert (report.disk_free_mb, report.memory_free_mb, report.memory_total_mb) == (None, None, None)


def test_an_envelope_carries_its_body_unread():
    envelope = decode(encode(MESSAGES["envelope"]), Envelope)
    assert unpack(envelope.body, Event) == EVENT
    with pytest.raises(ProtocolError, match="not a Report"):
        unpack(envelope.body, Report)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "0 bytes"),
        (bytes([WIRE_VERSION]) + bytes(MAX_MESSAGE_BYTES), "120001 bytes"),
        (bytes([WIRE_VERSION + 1]) + encode(MESSAGES["ack"])[1:], "wire version 2"),
        (bytes([WIRE_VERSION]), "not a Ack"),
        (encode(MESSAGES["ack"])[:-1], "not a Ack"),
        (encode(MESSAGES["ack"]) + b"x", "not a Ack"),
        (bytes([WIRE_VERSION]) + msgspec.msgpack.encode(["id", "20"]), "not a Ack"),
        (bytes([WIRE_VERSION]) + msgspec.msgpack.encode({"store_id": "id", "seq": 2}), "not a Ack"),
        (b'\x01{"store_id": "id"}', "not a Ack"),
    ],
)
def test_what_is_not_a_message_is_refused(payload, reason):
    with pytest.raises(ProtocolError, match=reason):
        decode(payload, Ack)


OFFER = Offer(1, "ab" * 32, 2048)
EMPTY = {"base": None, "candidate": None, "salt": "", "threshold": 0, "revoked": []}


@pytest.mark.parametrize(
    "message",
    [
        Ack("5f0c", 2**63),
        Ack("5f0c", -1),
        Need(digest="cd" * 32, size=-1, blocks=b""),
        MetadataSet(root=2**64 - 1, timestamp=1, snapshot=1, targets=1),
        Desired(revision=2**63, **EMPTY),
        Desired(revision=1, **EMPTY | {"threshold": -1}),
        Desired(revision=1, **EMPTY | {"revoked": [2**63]}),
        Desired(revision=1, **EMPTY | {"base": msgspec.structs.replace(OFFER, release=2**63)}),
        Desired(revision=1, **EMPTY | {"base": msgspec.structs.replace(OFFER, size=-1)}),
        Desired(revision=1, **EMPTY, issued=float("nan")),
        Desired(revision=1, **EMPTY, expires=1e300),
        Desired(revision=1, **EMPTY, parts=[Part(offer=OFFER, salt="s", devices=b"", shadow_s=float("inf"))]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_numbers_that_a_device_could_not_store_or_compare_are_refused(message):
    with pytest.raises(ProtocolError, match=f"not a {type(message).__name__}"):
        decode(encode(message), type(message))


DEEP = b"\x91" * 100_000


@pytest.mark.parametrize("body", [b"\x96\xa4\x00\x00\x00\x80", b"\x96\xa1s\x01\x01\xca\0\0\0\0\xa1e" + DEEP])
def test_text_that_is_none_and_endless_nesting_are_refused(body):
    with pytest.raises(ProtocolError, match="not a Envelope"):
        decode(bytes([WIRE_VERSION]) + body, Envelope)
    for part in (b"\x94\xa4\x00\x00\x00\x80", b"\x94\xa1n\x01\x01" + DEEP, b"\x95\xa1n\x01\x01\x80" + DEEP):
        with pytest.raises(ProtocolError, match="not a Event"):
            unpack(part, Event)


@given(payload=st.binary(max_size=200), name=st.sampled_from(sorted(MESSAGES)))
def test_no_bytes_make_decode_raise_anything_else(payload, name):
    for start in (b"", bytes([WIRE_VERSION])):
        with contextlib.suppress(ProtocolError):
            decode(start + payload, type(MESSAGES[name]))


def test_an_oversize_message_is_not_encoded():
    largest = MAX_MESSAGE_BYTES - len(encode(Need(digest="", size=0, blocks=bytes(70_000)))) + 70_000
    assert len(encode(Need(digest="", size=0, blocks=bytes(largest)))) == MAX_MESSAGE_BYTES
    with pytest.raises(ProtocolError, match="a Need of 120001 bytes"):
        encode(Need(digest="", size=0, blocks=bytes(largest + 1)))


digests = st.integers(0, 2**256 - 1).map("{:064x}".format)
texts = st.text(max_size=40)
counts = st.integers(0, 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(Ack, texts, counts)
    | st.builds(Gap, counts, counts)
    | st.builds(Offer, counts, digests, counts)
    | st.builds(Need, digest=texts, size=counts, blocks=st.binary(max_size=300))
    | st.builds(MonitorState, texts, finite, finite, st.booleans(), st.booleans())
    | st.builds(
        Event,
        name=texts,
        release=counts,
        head=counts,
        detail=st.dictionaries(texts, texts | st.booleans() | counts | finite, max_size=5),
    )
    | st.builds(
        Desired,
        revision=counts,
        base=st.none() | st.builds(Offer, counts, digests, counts),
        candidate=st.none(),
        salt=texts,
        threshold=st.integers(0, THRESHOLD_ALL),
        revoked=st.lists(counts, max_size=5),
    )
)
def test_messages_survive_the_wire(message):
    assert decode(encode(message), type(message)) == message
    assert unpack(raw(message), type(message)) == message


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(0, n - 1))))))
def test_bitmaps_survive_the_wire(case):
    count, blocks = case
    blocks = {i for i in blocks if i < count}
    bits = to_bitmap(blocks, count)
    assert len(bits) == (count + 7) // 8
    assert from_bitmap(bits, count) == blocks


def test_bitmaps_count_bits_from_the_lowest_and_ignore_those_beyond_the_end():
    assert to_bitmap({0, 2, 3, 8}, 9) == b"\x0d\x01"
    assert from_bitmap(b"\xff\xff", 10) == set(range(10))
    assert from_bitmap(b"\x01", 100) == {0}
    assert from_bitmap(b"", 5) == set()


@given(st.lists(st.integers(0, 2**63 - 1), max_size=40))
def test_counts_survive_the_wire(numbers):
    assert from_counts(to_counts(numbers)) == numbers


@given(st.dictionaries(st.integers(-20_000, 20_000), st.integers(0, 2**40), max_size=40), st.integers(0, 2**40))
def test_sketches_survive_the_wire_but_for_their_empty_buckets(buckets, zeros):
    indexes = sorted(buckets)
    filled = [index for index in indexes if buckets[index]]
    data = to_buckets(indexes, [buckets[index] for index in indexes], zeros)
    assert from_buckets(data) == (filled, [buckets[index] for index in filled], zeros)
    assert bool(data) == bool(filled or zeros)


def test_a_sketch_that_is_cut_off_is_refused():
    with pytest.raises(ProtocolError, match="within a bucket"):
        from_buckets(to_counts([1, 4]))


@given(
    st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), st.integers(0, 2**40)), st.integers(0, 9)
)
def test_confusions_survive_the_wire(counts, other):
    cells = {f"{truth}\t{said}": count for (truth, said), count in counts.items()} | ({"other": other} if other else {})
    assert from_cells(*to_cells(cells)) == cells


@pytest.mark.parametrize("numbers", [[0, 0], [0, 2, 5], [1, 2, 5], [3, 3, 1]])
def test_confusions_of_labels_that_are_not_there_are_refused(numbers):
    with pytest.raises(ProtocolError, match="a confusion"):
        from_cells(["a", "b"], to_counts(numbers))


def test_a_report_of_ten_labels_is_small():
    labels = [f"class-{i}" for i in range(10)]
    cells = {f"{label}\t{label}": 110 for label in labels} | {f"{labels[i]}\t{labels[i - 1]}": 10 for i in range(10)}
    names, confusion = to_cells(cells)
    monitors = [
        MonitorState(name, 12.5, 1000.0, warning=False, alarm=False) for name in ("input", "output", "accuracy")
    ]
    report = msgspec.structs.replace(
        MESSAGES["report"], predicted=dict.fromkeys(labels, 600), monitors=monitors, labels=names, confusion=confusion
    )
    as_text = json.dumps(as_json(report) | {"confusion": cells}, separators=(",", ":"))
    assert len(encode(report)) < 0.4 * len(as_text)
    assert len(encode(report)) < 500


def test_small_counts_take_one_byte_each():
    assert to_counts([0, 1, 127, 128, 300]) == bytes([0, 1, 127, 0x80, 1, 0xAC, 2])


@pytest.mark.parametrize("data", [b"\x80", b"\x01\xff", b"\xff" * 9 + b"\x01", b"\xff" * 100, b"\x80" * 10 + b"\x00"])
def test_counts_that_are_cut_off_or_too_large_are_refused(data):
    with pytest.raises(ProtocolError, match="count"):
        from_counts(data)


@given(st.binary(max_size=100))
def test_no_bytes_make_counts_raise_anything_else(data):
    with contextlib.suppress(ProtocolError):
        assert all(0 <= number < 2**63 for number in from_counts(data))


@pytest.mark.parametrize(
    ("size", "blocks"), [(0, 0), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2), (3 * BLOCK_BYTES, 3)]
)
def test_blocks_cover_a_file(size, blocks):
    assert block_count(size) == blocks


def test_a_block_fits_into_a_message():
    assert BLOCK_BYTES <= MAX_MESSAGE_BYTES


def test_cohorts_never_move():
    """Rollouts in progress, and devices in other languages, depend on these numbers."""
    assert cohort("r2", "pump-1") == 1_482_752_880
    assert cohort("", "") == 0x8A5EDAB2


def test_cohorts_spread_evenly_and_differ_by_salt():
    devices = [f"device-{i}" for i in range(4000)]
    for salt in ("a", "b"):
        assert all(0 <= cohort(salt, device) < THRESHOLD_ALL for device in devices)
        share = sum(cohort(salt, device) < THRESHOLD_ALL // 10 for device in devices) / len(devices)
        assert 0.08 < share < 0.12
    first = {device for device in devices if cohort("a", device) < THRESHOLD_ALL // 10}
    second = {device for device in devices if cohort("b", device) < THRESHOLD_ALL // 10}
    assert len(first & second) < 0.3 * len(first)


def test_topics_are_made_and_read_back():
    topics = Topics("plant.1")
    assert topics.up("pump-1", "report") == "plant.1/d/pump-1/up/report"
    assert topics.down("pump-1", "ack") == "plant.1/d/pump-1/dn/ack"
    assert topics.desired("all") == "plant.1/g/all/desired"
    assert topics.block("abc", "+") == "plant.1/b/abc/+"
    assert topics.parse_up(topics.up("pump-1", "report")) == ("pump-1", "report")
    assert topics.parse_block(topics.block("abc", 12)) == ("abc", 12)


@pytest.mark.parametrize(
    "topic",
    ["", "edge", "other/d/a/up/report", "edge/d/a/dn/ack", "edge/d/a/up", "edge/d/a/up/x/y", "edge/x/a/up/state"],
)
def test_foreign_up_topics_are_not_read(topic):
    assert Topics().parse_up(topic) is None


@pytest.mark.parametrize(
    "topic",
    [
        "edge/b/abc",
        "edge/b/abc/x",
        "edge/b/abc/-1",
        "edge/b/abc/1/2",
        "other/b/abc/1",
        "edge/b/abc/\u00b2",
        "edge/b/abc/" + "9" * 5000,
    ],
)
def test_foreign_block_topics_are_not_read(topic):
    assert Topics().parse_block(topic) is None


@pytest.mark.parametrize("name", ["a", "pump-1", "A.b_c-9", "0" * 64])
def test_names_that_fit_a_topic(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "+", "#", "a b", "é", "0" * 65, "a\n"])
def test_names_that_do_not(name):
    with pytest.raises(ProtocolError, match="device name"):
        check_name(name)
    with pytest.raises(ProtocolError, match="topic prefix"):
        Topics(name)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "/" * 64])
def test_an_offer_whose_digest_is_no_hash_is_refused_before_it_becomes_a_file_name(digest):
    fields = [1, [1, digest, 100], None, "", 0, []]
    with pytest.raises(ProtocolError, match="digest"):
        decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields), Desired)


@pytest.mark.parametrize("block_bytes", [0, -1, MAX_MESSAGE_BYTES + 1])
def test_a_block_size_that_cannot_be_sent_is_refused(block_bytes):
    fields = [1, None, None, "", 0, [], block_bytes]
    with pytest.raises(ProtocolError, match="block_bytes"):
        decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields), Desired)


@given(st.sets(st.integers(0, 2**32 - 1)))
def test_places_survive_the_wire_in_order(places):
    assert from_places(to_places(places)) == sorted(places)
