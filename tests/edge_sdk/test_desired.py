"""What a group is told to run counts only from the coordinator, for this group, and not from before."""

import logging
import os
import shutil

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from edge_sdk.config import UpdateConfig
from edge_sdk.desired import sign_desired, signed_bytes
from edge_sdk.errors import MetadataExpiredError, ProtocolError, StoreError
from edge_sdk.messages import THRESHOLD_ALL, WIRE_VERSION, Desired, Offer, Part, Signature, Topics, decode, encode
from edge_sdk.transport import MemoryBroker, MemoryTransport, NoTransport
from edge_sdk.trust import Trust
from edge_sdk.update import UpdateClient
from edge_server import backup
from edge_server.coordinator import Coordinator
from edge_server.keys import Repository, _load_secret
from edge_server.settings import Settings, SigningSettings

DAY = 86_400.0
PLAIN = Desired(revision=7, base=Offer(1, "ab" * 32, 100), candidate=None, salt="", threshold=0, revoked=[])


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of small files are written here, and no power is cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Owner:
    """A coordinator's keys, and the folders of its root keys."""

    def __init__(self, home, clock):
        home.mkdir()
        self.home, self.away, self.clock = home, [home.parent / "away"], clock
        self.repository = Repository(home, settings=SigningSettings(), clock=clock)
        self.repository.init(self.away[0], count=2, threshold=2, passphrase=None)

    def say(self, message=PLAIN, *, voucher=None, prefix="edge", group="default", **changes):
        voucher = voucher or self.repository.voucher()
        return sign_desired(
            msgspec.structs.replace(message, **changes),
            voucher.sign,
            prefix=prefix,
            group=group,
            issued=self.clock.now(),
            expires=voucher.expires,
        )

    def rotate(self):
        self.repository.rotate("timestamp", self.away, passphrase=None)


class Device:
    """The part of a device that listens to what its group is told."""

    def __init__(self, folder, owner, clock):
        self.folder, self.owner, self.clock = folder, owner, clock
        self.root = owner.repository.root()
        self.restart()

    def restart(self):
        self.trust = Trust(self.folder / "tuf", self.root)
        self.client = UpdateClient(
            self.folder / "incoming",
            device="dev-1",
            topics=Topics(),
            transport=NoTransport(),
            config=UpdateConfig(),
            trust=self.trust,
        )
        return self

    def hear(self, payload):
        self.client.hear(payload, self.clock.now())
        return self.client.desired

    def look_again(self):
        self.client.look_again(self.clock.now())
        return self.client.desired

    def get_root(self, version):
        self.trust.take(f"{version}.root", self.owner.repository.published().files[f"{version}.root"])

    @property
    def refusals(self):
        return self.client.reader.refusals(self.clock.now())


@pytest.fixture
def owner(tmp_path, clock):
    return Owner(tmp_path / "home", clock)


@pytest.fixture
def device(tmp_path, owner, clock):
    return Device(tmp_path / "device", owner, clock)


def test_what_the_coordinator_signed_is_followed(owner, device):
    message = device.hear(owner.say())
    assert msgspec.structs.replace(message, issued=0.0, expires=0.0, signatures=[]) == PLAIN
    assert device.client.offered(None, {}) == PLAIN.base
    assert device.refusals is None


def test_a_device_of_the_version_before_understands_it_as_it_did(owner):
    fields = msgspec.msgpack.decode(owner.say()[1:])
    assert decode(bytes([WIRE_VERSION]) + msgspec.msgpack.encode(fields[:8]), Desired) == PLAIN


def test_what_a_later_version_appends_is_signed_too(owner, device):
    voucher = owner.repository.voucher()
    fields = msgspec.msgpack.decode(owner.say()[1:])

    def payload(signatures, appended):
        all_ = [*fields[:10], [[s.key, s.value] for s in signatures], appended]
        return bytes([WIRE_VERSION]) + msgspec.msgpack.encode(all_)

    signatures = voucher.sign(signed_bytes(payload([], "later"), prefix="edge", group="default"))
    assert device.hear(payload(signatures, "later")).revision == 7
    with pytest.raises(ProtocolError, match="not signed so"):
        device.hear(payload(signatures, "other"))


# ---- what is refused


def forged(owner):
    """Signed by somebody else, under the name of the true key."""
    true = owner.repository.voucher()
    thief = CryptoSigner.generate_ed25519()
    key = decode(owner.say(), Desired).signatures[0].key
    return owner.say(
        voucher=true._replace(sign=lambda data: [Signature(key, bytes.fromhex(thief.sign(data).signature))])
    )


def unsigned(owner):
    return encode(PLAIN)


def stripped(owner):
    return encode(msgspec.structs.replace(decode(owner.say(), Desired), signatures=[]))


def of_another_group(owner):
    return owner.say(group="other")


def of_another_prefix(owner):
    return owner.say(prefix="other")


def signed_by_another_role(owner):
    key = next(found.key for found in owner.repository.keys() if found.role == "targets")  # noqa: SIM118 - no dict
    signer = _load_secret(owner.home / "keys" / f"{key[:16]}.pem", None)
    true = decode(owner.say(), Desired).signatures[0].key
    voucher = owner.repository.voucher()
    return owner.say(
        voucher=voucher._replace(sign=lambda data: [Signature(true, bytes.fromhex(signer.sign(data).signature))])
    )


REFUSED = {
    forged: "not signed so for this group",
    unsigned: "is not signed",
    stripped: "is not signed",
    of_another_group: "not signed so for this group",
    of_another_prefix: "not signed so for this group",
    signed_by_another_role: "not signed so for this group",
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.items(), ids=[make.__name__ for make in REFUSED])
def test_what_the_coordinator_did_not_say_to_this_group_is_refused_and_counted(owner, device, make, reason):
    before = device.hear(owner.say(revision=6))
    with pytest.raises(ProtocolError, match=reason):
        device.hear(make(owner))
    assert device.client.desired is before
    assert device.refusals.count == 1
    assert reason in device.refusals.reason


OTHERS = {
    "revision": 8,
    "base": Offer(1, "cd" * 32, 100),
    "candidate": Offer(2, "cd" * 32, 100),
    "salt": "other",
    "threshold": THRESHOLD_ALL,
    "revoked": [1],
    "block_bytes": 1000,
    "parts": [Part(offer=Offer(2, "cd" * 32, 100), salt="s", devices=b"\x01", shadow_s=0.0)],
    "issued": 4e9,
    "expires": 4e9,
}


@pytest.mark.parametrize("field", [name for name in Desired.__struct_fields__ if name != "signatures"])
def test_no_field_can_be_altered(owner, device, field):
    altered = msgspec.structs.replace(decode(owner.say(), Desired), **{field: OTHERS[field]})
    with pytest.raises(ProtocolError, match="not signed so"):
        device.hear(encode(altered))
    assert device.client.desired is None


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damage_anywhere_leaves_what_was_said_or_nothing(owner, device, data):
    payload = bytearray(owner.say())
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    device.client.desired = None
    try:
        found = device.hear(bytes(payload))
    except ProtocolError:
        found = None
    assert found is None or msgspec.structs.replace(found, signatures=[]) == msgspec.structs.replace(
        decode(owner.say(), Desired), signatures=[]
    )


def test_without_a_root_nothing_is_believed_where_signatures_are_wanted(tmp_path, owner, device):
    device.root = None
    device.folder = tmp_path / "other"
    with pytest.raises(ProtocolError, match=r"no root\.json"):
        device.restart().hear(owner.say())


def test_with_a_damaged_root_nothing_is_believed(tmp_path, owner, device):
    device.root = b'{"signed": {"version": 1}}'
    device.folder = tmp_path / "other"
    with pytest.raises(ProtocolError, match=r"root\.json is damaged; enrol the device again"):
        device.restart().hear(owner.say())
    assert device.refusals.count == 1


def test_where_no_signatures_are_wanted_signed_and_unsigned_are_followed_as_before(tmp_path, owner, clock):
    client = UpdateClient(
        tmp_path / "in", device="dev-1", topics=Topics(), transport=NoTransport(), config=UpdateConfig()
    )
    client.hear(encode(PLAIN), clock.now())
    client.hear(owner.say(revision=8), clock.now())
    client.hear(encode(PLAIN), clock.now())
    client.look_again(clock.now())
    assert client.desired.revision == 8


def test_refusals_are_told_once_an_hour_and_all_counted(device, clock):
    for _ in range(3):
        with pytest.raises(ProtocolError):
            device.hear(encode(PLAIN))
    assert device.refusals.count == 3
    device.client.reader.told(clock.now())
    with pytest.raises(ProtocolError):
        device.hear(encode(PLAIN))
    assert device.refusals is None
    clock.advance(3600)
    assert device.refusals.count == 1


# ---- what was so before


def test_an_older_one_is_refused_also_after_a_restart(owner, device, clock):
    old = owner.say(revision=6)
    clock.advance(1)
    device.hear(owner.say())
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"revision 6, signed .*, is older than revision 7"):
            device.hear(old)
        device.restart()
    assert device.hear(owner.say()).revision == 7


def test_of_one_revision_the_one_that_was_signed_last_counts(owner, device, clock):
    first = owner.say(revoked=[1])
    clock.advance(1)
    second = owner.say(revoked=[2])
    assert device.hear(first).revoked == [1]
    assert device.hear(second).revoked == [2]
    assert device.restart().hear(second).revoked == [2]
    with pytest.raises(ProtocolError, match="is older"):
        device.hear(first)


def test_one_past_its_date_is_believed_by_nobody_new_and_installs_nothing(tmp_path, owner, device, clock):
    payload = owner.say()
    message = device.hear(payload)
    clock.advance(message.expires - clock.now())
    with pytest.raises(MetadataExpiredError, match="past its date"):
        device.client.authorise(PLAIN.base, clock.now())
    fresh = Device(tmp_path / "fresh", owner, clock)
    assert fresh.hear(payload) is None
    clock.advance(60)
    with pytest.raises(ProtocolError, match="was good until"):
        fresh.look_again()
    clock._now -= DAY  # it was the clock that was wrong
    assert fresh.look_again().revision == 7


def test_what_cannot_be_remembered_is_not_followed_until_it_can(owner, device, clock, monkeypatch):
    def full(path, data, **options):
        raise StoreError("no room")

    with monkeypatch.context() as disk:
        disk.setattr("edge_sdk.desired.replace_file", full)
        with pytest.raises(StoreError, match="no room"):
            device.hear(owner.say())
        assert device.client.desired is None
    clock.advance(60)
    assert device.look_again().revision == 7


def test_a_memory_that_was_damaged_is_begun_anew(owner, device, caplog):
    device.hear(owner.say())
    (device.folder / "tuf" / "desired.json").write_text("{")
    assert device.restart().hear(owner.say(revision=3)).revision == 3
    assert "is lost" in caplog.text


# ---- other keys


def test_one_of_a_new_key_waits_for_the_root_that_names_it(owner, device):
    device.hear(owner.say())
    owner.rotate()
    assert device.hear(owner.say(revision=8)).revision == 7
    assert device.look_again().revision == 7
    assert device.refusals is None, "it is not known to be false"
    device.get_root(2)
    assert device.look_again().revision == 8


def test_one_whose_key_nobody_names_is_refused_once(owner, device, clock):
    owner.rotate()
    assert device.hear(owner.say()) is None
    clock.advance(60)
    with pytest.raises(ProtocolError, match="by no key of version 1 of the root"):
        device.look_again()
    clock.advance(60)
    assert device.look_again() is None
    assert device.refusals.count == 1


def test_a_key_that_was_revoked_says_nothing_any_more(owner, device, clock):
    stolen = owner.repository.voucher()
    device.hear(owner.say())
    owner.repository.revoke(decode(owner.say(), Desired).signatures[0].key, owner.away, passphrase=None)
    device.get_root(2)
    device.hear(owner.say(revision=8))
    device.hear(owner.say(voucher=stolen, revision=9))
    clock.advance(60)
    with pytest.raises(ProtocolError, match="by no key of version 2"):
        device.look_again()
    assert device.client.desired.revision == 8


def test_what_a_thief_numbered_high_is_void_with_the_next_key(owner, device):
    device.hear(owner.say(revision=2**62))
    with pytest.raises(ProtocolError, match="is older"):
        device.hear(owner.say())
    owner.rotate()
    device.get_root(2)
    assert device.hear(owner.say()).revision == 7


def test_a_root_that_was_followed_is_not_left_again(owner, device, clock):
    stolen = owner.repository.voucher()
    owner.rotate()
    device.get_root(2)
    device.hear(owner.say())
    (device.folder / "tuf" / "inbox" / "2.root.json").write_bytes(b"junk")
    assert device.restart().hear(owner.say(voucher=stolen, revision=9)) is None
    clock.advance(60)
    with pytest.raises(ProtocolError, match="version 2 of the root, which was here before"):
        device.look_again()
    device.get_root(2)
    assert device.hear(owner.say(revision=8)).revision == 8


def test_a_root_that_does_not_follow_from_the_last_is_none(owner, device, clock, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = Owner(tmp_path / "elsewhere" / "home", clock)
    other.rotate()
    device.trust.take("2.root", other.repository.published().files["2.root"])
    assert device.hear(other.say()) is None
    assert device.hear(owner.say()).revision == 7


def test_nothing_is_believed_once_the_root_has_expired(owner, device, clock):
    payload = owner.say()
    clock.advance(5000 * DAY)
    assert device.hear(payload) is None
    clock.advance(60)
    with pytest.raises(ProtocolError, match="the root was good until"):
        device.look_again()


# ---- what the coordinator publishes


@pytest.fixture
def fleet(tmp_path, clock):
    """Coordinators on one broker and one folder, a listener, and a device that hears what is retained."""
    made = []

    class Fleet:
        home, broker = tmp_path / "coordinator", MemoryBroker()

        def start(self):
            transport = MemoryTransport(self.broker)
            coordinator = Coordinator(self.home, transport=transport, clock=clock, settings=Settings(durable=False))
            made.append(coordinator)
            coordinator.start()
            return coordinator

        def keys(self, coordinator):
            coordinator.registry.repository.init(tmp_path / "root-keys", count=2, threshold=2, passphrase=None)

        def said(self):
            ear = MemoryTransport(self.broker)
            ear.subscribe(Topics().desired("default"))
            ear.connect()
            return [message.payload for message in ear.receive()][-1]

    yield Fleet()
    for coordinator in made:
        coordinator.close()


def tell(coordinator, *revoked):
    """What `push` and `abort` do to a group, without a release."""
    with coordinator.registry.store.transaction():
        coordinator.registry.shipping._tell("default", revoked=set(revoked))
    coordinator.pump()


def test_without_keys_nothing_is_signed_and_with_keys_everything(fleet, tmp_path, clock):
    coordinator = fleet.start()
    tell(coordinator, 1)
    assert decode(fleet.said(), Desired).signatures == []
    fleet.keys(coordinator)
    coordinator.pump()
    message = decode(fleet.said(), Desired)
    assert (len(message.signatures), message.revoked, message.issued) == (1, [1], clock.now())
    assert Device(tmp_path / "device", coordinator.registry, clock).hear(fleet.said()).revoked == [1]


def test_it_is_signed_anew_with_the_metadata_and_as_good(fleet, tmp_path, clock):
    coordinator = fleet.start()
    fleet.keys(coordinator)
    tell(coordinator, 1)
    device = Device(tmp_path / "device", coordinator.registry, clock)
    before = device.hear(fleet.said())
    clock.advance(4 * DAY)
    coordinator.step()
    after = device.hear(fleet.said())
    assert after.revision == before.revision
    assert after.expires == pytest.approx(before.expires + 4 * DAY)


def test_while_its_key_is_away_nothing_is_told_and_that_is_said_once(fleet, tmp_path, clock, caplog):
    coordinator = fleet.start()
    fleet.keys(coordinator)
    tell(coordinator, 1)
    keys = fleet.home / "keys"
    keys.rename(tmp_path / "taken")
    with caplog.at_level(logging.ERROR):
        tell(coordinator, 1, 2)
        coordinator.pump()
    assert caplog.text.count("groups are told nothing new") == 1
    assert decode(fleet.said(), Desired).revoked == [1]
    (tmp_path / "taken").rename(keys)
    coordinator.pump()
    assert decode(fleet.said(), Desired).revoked == [1, 2]


def test_a_coordinator_that_was_restored_from_a_backup_is_heard_at_once(fleet, tmp_path, clock):
    coordinator = fleet.start()
    fleet.keys(coordinator)
    tell(coordinator, 1)
    backup.make(fleet.home, tmp_path / "backup", settings=Settings(), now=clock.now())
    for number in range(2, 6):
        clock.advance(10)
        tell(coordinator, *range(1, number + 1))
    device = Device(tmp_path / "device", coordinator.registry, clock)
    assert device.hear(fleet.said()).revoked == [1, 2, 3, 4, 5]
    coordinator.close()
    backup.restore(tmp_path / "backup", fleet.home, force=True)
    clock.advance(10)
    fleet.start()
    assert device.restart().hear(fleet.said()).revoked == [1], "what it knows is what holds, though it knows less"


def test_a_coordinator_that_was_restored_and_whose_clock_was_set_back_needs_another_key(fleet, tmp_path, clock):
    coordinator = fleet.start()
    fleet.keys(coordinator)
    tell(coordinator, 1)
    shutil.copytree(fleet.home, tmp_path / "copy")
    clock.advance(DAY)
    tell(coordinator, 1, 2)
    device = Device(tmp_path / "device", coordinator.registry, clock)
    device.hear(fleet.said())
    coordinator.close()
    shutil.rmtree(fleet.home)
    shutil.copytree(tmp_path / "copy", fleet.home)
    clock._now -= DAY / 2
    again = fleet.start()
    with pytest.raises(ProtocolError, match="is older"):
        device.hear(fleet.said())
    again.registry.repository.rotate("timestamp", [tmp_path / "root-keys"], passphrase=None)
    again.pump()
    device.owner = again.registry
    device.get_root(2)
    assert device.hear(fleet.said()).revoked == [1]
