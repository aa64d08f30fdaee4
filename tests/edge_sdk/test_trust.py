"""Signed releases: what a device believes, and everything it must refuse while it goes on serving."""

import hashlib
import logging
import os
import shutil

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, TargetFile

from edge_sdk.config import UpdateConfig
from edge_sdk.desired import sign_desired
from edge_sdk.errors import ClockUntrustedError, IntegrityError, MetadataExpiredError, ProtocolError, UntrustedError
from edge_sdk.manifest import MANIFEST_NAME, manifest_bytes, parse_manifest
from edge_sdk.messages import Desired, MetadataSet, Offer, Topics, encode
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_sdk.trust import ROOT_NAME, Listening, Trust, load_trust, target_path
from edge_server.coordinator import Coordinator
from edge_server.keys import Published, Repository, _load_secret
from edge_server.plan import RolloutRules
from edge_server.settings import Settings, SigningSettings

DAY = 86_400.0
MANIFEST = b'{"a": "manifest"}'
OFFER = Offer(1, hashlib.sha256(MANIFEST).hexdigest(), len(MANIFEST))


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of small files are written here, and no power is cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def target_of(release, data=MANIFEST, **custom):
    target = TargetFile(len(data), {"sha256": hashlib.sha256(data).hexdigest()}, target_path(release))
    if custom:
        target.unrecognized_fields["custom"] = custom
    return target


class Owner:
    """The repository and the folders with root keys."""

    def __init__(self, folder, clock, **settings):
        folder.mkdir(exist_ok=True)
        self.folder, self.away = folder, [folder.parent / f"{folder.name}-away"]
        self.repository = Repository(folder, settings=SigningSettings(**settings), clock=clock)
        self.repository.init(self.away[0], count=3, threshold=2, passphrase=None)

    def sign(self, *releases):
        self.repository.sign({target_path(n): target_of(n) for n in releases})
        return self.repository.published()

    def secret(self, role):
        """The signer of an online role, as a thief would have it."""
        key = next(found.key for found in self.repository.keys() if found.role == role)  # noqa: SIM118 - no dict
        return _load_secret(self.folder / "keys" / f"{key[:16]}.pem", None)


def give(trust, published, *, announce=True):
    for name, data in published.files.items():
        trust.take(name, data)
    if announce:
        trust.announce(published.versions)


def altered(published, role, change, *signers):
    """The same with one file changed and signed by others."""
    metadata = Metadata.from_bytes(published.files[role])
    change(metadata.signed)
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return Published(published.versions, {**published.files, role: metadata.to_bytes()})


@pytest.fixture
def owner(tmp_path, clock):
    return Owner(tmp_path / "home", clock)


@pytest.fixture
def trust(tmp_path, owner):
    return Trust(tmp_path / "device" / "tuf", owner.repository.root())


# ---- what is believed


def test_a_signed_release_is_believed_with_its_size_hash_and_index(owner, trust, clock):
    index = {"sha256": "ab" * 32, "length": 77}
    owner.repository.sign({target_path(1): target_of(1, index=index)})
    give(trust, owner.repository.published())
    signed = trust.require(OFFER, clock.now())
    assert (signed.digest, signed.size, signed.index, signed.index_size) == (OFFER.digest, OFFER.size, "ab" * 32, 77)
    assert trust.state(clock.now()) == "trusted"


@pytest.mark.parametrize("left_out", ["timestamp", "snapshot", "targets", "set"])
def test_nothing_is_verified_before_the_announced_set_is_complete(owner, trust, clock, left_out):
    published = owner.sign(1)
    for name, data in published.files.items():
        if name != left_out:
            trust.take(name, data)
    if left_out != "set":
        trust.announce(published.versions)
    assert trust.require(OFFER, clock.now()) is None
    assert trust.state(clock.now()) == "waiting"
    give(trust, published)
    assert trust.require(OFFER, clock.now()) is not None


def test_a_root_that_is_missing_in_between_is_waited_for(owner, trust, clock):
    for _ in range(2):
        owner.repository.rotate("timestamp", owner.away, passphrase=None)
    published = owner.sign(1)
    assert published.versions.root == 3
    give(trust, Published(published.versions, {k: v for k, v in published.files.items() if k != "2.root"}))
    assert trust.require(OFFER, clock.now()) is None
    trust.take("2.root", published.files["2.root"])
    assert trust.require(OFFER, clock.now()) is not None


def test_trust_survives_a_restart_and_needs_nothing_twice(owner, trust, tmp_path, clock):
    give(trust, owner.sign(1))
    trust.require(OFFER, clock.now())
    again = Trust(tmp_path / "device" / "tuf", (tmp_path / "home" / "tuf" / "1.root.json").read_bytes())
    again.announce(owner.repository.published().versions)
    assert again.require(OFFER, clock.now()) is not None


def test_every_role_can_get_new_keys(owner, trust, clock):
    give(trust, owner.sign(1))
    trust.require(OFFER, clock.now())
    for role in ("timestamp", "snapshot", "targets"):
        owner.repository.rotate(role, owner.away, passphrase=None)
        give(trust, owner.repository.published())
        assert trust.require(OFFER, clock.now()) is not None
    new = owner.folder.parent / "new"
    owner.repository.rotate("root", owner.away, passphrase=None, new=new)
    owner.repository.rotate("targets", [new], passphrase=None)
    give(trust, owner.repository.published())
    assert trust.require(OFFER, clock.now()) is not None
    assert trust.state(clock.now()) == "trusted"


def test_signatures_are_checked_also_without_the_package_cryptography(owner, trust, clock, monkeypatch):
    published = owner.sign(1)
    spoilt = altered(published, "timestamp", lambda signed: None, CryptoSigner.generate_ed25519())
    monkeypatch.setattr("securesystemslib.signer._key.CRYPTO_IMPORT_ERROR", "as in the base install")
    give(trust, spoilt)
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())
    give(trust, published)
    assert trust.require(OFFER, clock.now()) is not None


# ---- what is refused


def test_a_swapped_file_is_refused(owner, trust, clock):
    give(trust, owner.sign(1))
    with pytest.raises(UntrustedError, match="signed are 17"):
        trust.require(Offer(1, "cd" * 32, OFFER.size), clock.now())


def test_a_longer_file_is_refused(owner, trust, clock):
    give(trust, owner.sign(1))
    with pytest.raises(UntrustedError, match="is offered with 18 bytes"):
        trust.require(Offer(1, OFFER.digest, OFFER.size + 1), clock.now())


def test_a_release_under_another_number_is_refused(owner, trust, clock):
    give(trust, owner.sign(1))
    with pytest.raises(UntrustedError, match="release 2 is not signed"):
        trust.require(Offer(2, OFFER.digest, OFFER.size), clock.now())


def test_older_metadata_is_refused_also_after_a_restart(owner, trust, tmp_path, clock):
    old = owner.sign(1)
    give(trust, owner.sign(1, 2))
    assert trust.require(Offer(2, OFFER.digest, OFFER.size), clock.now()) is not None
    for device in (trust, Trust(tmp_path / "device" / "tuf", old.files["1.root"])):
        give(device, old)
        with pytest.raises(UntrustedError, match="cannot be believed"):
            device.require(OFFER, clock.now())
        assert device.state(clock.now()) == "refused"


def test_older_targets_behind_a_new_timestamp_are_refused(owner, trust, clock):
    old, new = owner.sign(1), owner.sign(1, 2)
    give(trust, old)
    trust.require(OFFER, clock.now())
    stolen = owner.secret("timestamp")
    mixed = Published(
        MetadataSet(root=1, timestamp=9, snapshot=old.versions.snapshot, targets=old.versions.targets),
        {**old.files, "timestamp": new.files["timestamp"]},
    )

    def back(signed):
        signed.version = 9
        signed.snapshot_meta.version = old.versions.snapshot - 1

    give(trust, altered(mixed, "timestamp", back, stolen))
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_parts_of_two_sets_do_not_go_together(owner, trust, clock, role):
    old, new = owner.sign(1), owner.sign(1, 2)
    changed = altered(old, role, lambda signed: setattr(signed, "version", getattr(new.versions, role)))
    give(trust, Published(new.versions, {**new.files, role: changed.files[role]}))
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())


def test_a_snapshot_of_another_version_only_waits(owner, trust, clock):
    old, new = owner.sign(1), owner.sign(1, 2)
    give(trust, Published(new.versions, {**new.files, "snapshot": old.files["snapshot"]}))
    assert trust.require(OFFER, clock.now()) is None


def test_past_its_date_metadata_is_refused_and_renewed_metadata_believed(owner, trust, clock):
    give(trust, owner.sign(1))
    trust.require(OFFER, clock.now())
    clock.advance(7 * DAY)
    with pytest.raises(MetadataExpiredError, match="good until 2026-01-08"):
        trust.require(OFFER, clock.now())
    assert trust.state(clock.now()) == "expired"
    assert owner.repository.renew()
    give(trust, owner.repository.published())
    assert trust.require(OFFER, clock.now()) is not None


def test_metadata_that_comes_too_late_is_refused_until_the_clock_is_put_right(owner, trust, clock):
    published = owner.sign(1)
    give(trust, published)
    for _ in range(3):
        with pytest.raises(MetadataExpiredError, match="past its date"):
            trust.require(OFFER, clock.now() + 365 * DAY)
    assert trust.state(clock.now()) == "expired"
    clock.advance(61)
    assert trust.require(OFFER, clock.now()) is not None


def test_a_clock_before_the_metadata_is_not_trusted(owner, trust, clock):
    clock.advance(10 * DAY)
    give(trust, owner.sign(1))
    with pytest.raises(ClockUntrustedError, match="the clock reads 2026-01-01 00:00 UTC"):
        trust.require(OFFER, clock.now() - 10 * DAY)
    assert trust.state(clock.now() - 10 * DAY) == "clock_untrusted"
    assert trust.require(OFFER, clock.now() - 299) is not None


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_wrong_key_is_refused(owner, trust, clock, role):
    published = owner.sign(1)
    give(trust, altered(published, role, lambda signed: None, CryptoSigner.generate_ed25519()))
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())


def test_metadata_of_another_coordinator_is_refused(owner, trust, tmp_path, clock):
    give(trust, Owner(tmp_path / "other", clock).sign(1))
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_root_with_too_few_signatures_is_refused(owner, trust, clock, count):
    owner.repository.renew_root(owner.away, passphrase=None)
    published = owner.sign(1)
    signers = [_load_secret(path, None) for path in sorted(owner.away[0].iterdir())[:count]]
    give(trust, altered(published, "2.root", lambda root: None, *signers))
    if count < 2:
        with pytest.raises(UntrustedError, match="cannot be believed"):
            trust.require(OFFER, clock.now())
    else:
        assert trust.require(OFFER, clock.now()) is not None


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_what_a_revoked_key_signs_is_refused(owner, trust, tmp_path, clock, role):
    give(trust, owner.sign(1))
    trust.require(OFFER, clock.now())
    thief = owner.secret(role)
    owner.repository.revoke(thief.public_key.keyid, owner.away, passphrase=None)
    published = owner.sign(1)
    give(trust, published)
    assert trust.require(OFFER, clock.now()) is not None
    stolen = {other: owner.secret(other) for other in ("timestamp", "snapshot", "targets")}
    give(trust, forged(published, {**stolen, role: thief}))
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())
    witness = Trust(tmp_path / "witness", published.files["1.root"])
    give(witness, forged(published, stolen))
    assert witness.require(OFFER, clock.now()) is not None, "with keys in force it would have passed"


def forged(published, signers):
    """A whole new set, made by someone who has these keys."""
    made, about = {}, None
    for role in ("targets", "snapshot", "timestamp"):
        metadata = Metadata.from_bytes(published.files[role])
        metadata.signed.version += 1
        if role == "snapshot":
            metadata.signed.meta["targets.json"] = about
        elif role == "timestamp":
            metadata.signed.snapshot_meta = about
        metadata.signatures.clear()
        metadata.sign(signers[role])
        made[role] = metadata.to_bytes()
        about = MetaFile.from_data(metadata.signed.version, made[role], ["sha256"])
    versions = {role: getattr(published.versions, role) + 1 for role in made}
    return Published(msgspec.structs.replace(published.versions, **versions), {**published.files, **made})


def test_a_revoked_root_key_no_longer_counts(owner, trust, clock, tmp_path):
    thieves = [_load_secret(path, None) for path in sorted(owner.away[0].iterdir())]
    key = thieves[0].public_key.keyid
    owner.repository.revoke(key, owner.away, passphrase=None, new=tmp_path / "new")
    published = owner.sign(1)
    give(trust, published)
    assert trust.require(OFFER, clock.now()) is not None
    forged = Metadata.from_bytes(published.files["2.root"])
    forged.signed.version = 3
    forged.signatures.clear()
    for thief in thieves[:2]:  # two of the old ones: one is revoked
        forged.sign(thief, append=True)
    versions = msgspec.structs.replace(published.versions, root=3)
    give(trust, Published(versions, {**published.files, "3.root": forged.to_bytes()}))
    with pytest.raises(UntrustedError):
        trust.require(OFFER, clock.now())


# ---- what is not even looked at


@pytest.mark.parametrize("name", ["timestamp", "targets", "2.root"])
@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"signed": {"version": "1"}}', b"\xff" * 100, b"[" * 100_000])
def test_what_is_no_metadata_is_not_taken(trust, name, payload):
    with pytest.raises(ProtocolError, match="not TUF metadata"):
        trust.take(name, payload)


@pytest.mark.parametrize("name", ["", "../root", "3.targets", "mirrors", "timestamp.json"])
def test_other_names_are_not_taken(owner, trust, tmp_path, name):
    with pytest.raises(ProtocolError, match="no metadata is called"):
        trust.take(name, owner.sign(1).files["targets"])
    assert list((tmp_path / "device" / "tuf" / "inbox").iterdir()) == []


@pytest.mark.parametrize("name", ["1.root", "2.root", "3.root", "258.root", "x.root", ".root"])
def test_roots_that_are_known_misnamed_far_away_or_huge_are_left(owner, trust, tmp_path, name):
    owner.repository.renew_root(owner.away, passphrase=None)
    root = Metadata[Root].from_bytes(owner.repository.root())
    if name == "258.root":
        root.signed.version = 258
    if name == "2.root":
        root.signed.unrecognized_fields["padding"] = "x" * 32_768
    trust.take(name, root.to_bytes())
    assert list((tmp_path / "device" / "tuf" / "inbox").iterdir()) == []


def test_a_coordinator_that_was_restored_elsewhere_is_believed_again_with_new_keys(owner, trust, clock, tmp_path):
    copy = shutil.copytree(owner.folder, tmp_path / "copy")
    for releases in ((1,), (1, 2), (1, 2, 3)):
        give(trust, owner.sign(*releases))
        assert trust.require(OFFER, clock.now()) is not None
    restored = Owner.__new__(Owner)
    restored.folder, restored.away = copy, owner.away
    restored.repository = Repository(copy, settings=SigningSettings(), clock=clock)
    give(trust, restored.sign(1))
    with pytest.raises(UntrustedError, match="cannot be believed"):
        trust.require(OFFER, clock.now())
    for role in ("timestamp", "snapshot"):
        restored.repository.rotate(role, owner.away, passphrase=None)
    give(trust, restored.repository.published())
    assert trust.require(OFFER, clock.now()) is not None


def test_a_set_that_claims_thousands_of_roots_only_waits(owner, trust, clock):
    published = owner.sign(1)
    give(trust, published, announce=False)
    trust.announce(msgspec.structs.replace(published.versions, root=10**9))
    assert trust.require(OFFER, clock.now()) is None


# ---- with and without a root


def test_without_a_root_everything_is_refused_unless_the_settings_say_none(tmp_path, clock):
    (tmp_path / "device").mkdir()
    trust = load_trust(tmp_path / "device", "root")
    with pytest.raises(UntrustedError, match="no root"):
        trust.require(OFFER, clock.now())
    assert trust.state(clock.now()) == "no_root"
    assert load_trust(tmp_path / "device", "none") is None


def test_a_root_is_enforced_whatever_the_settings_say(owner, tmp_path, clock):
    home = tmp_path / "device"
    home.mkdir()
    (home / ROOT_NAME).write_bytes(owner.repository.root())
    assert load_trust(home, "none").state(clock.now()) == "waiting"
    (home / ROOT_NAME).unlink()
    trust = load_trust(home, "none")
    assert trust.state(clock.now()) == "no_root", "a root that is gone does not make the device believe all"


def test_a_damaged_root_is_an_error(tmp_path):
    (tmp_path / ROOT_NAME).write_bytes(b"{")
    with pytest.raises(IntegrityError, match="enrol the device again"):
        load_trust(tmp_path, "root")


def test_a_transport_that_listens_keeps_metadata_and_passes_on_the_rest(owner, trust, clock, caplog):
    broker, topics = MemoryBroker(), Topics()
    coordinator = MemoryTransport(broker)
    coordinator.connect()
    published = owner.sign(1)
    for name, data in {**published.files, "set": encode(published.versions)}.items():
        coordinator.publish(topics.metadata(name), data, retain=True)
    coordinator.publish(topics.metadata("targets2"), b"junk", retain=True)
    device = Listening(MemoryTransport(broker), topics, trust)
    device.connect()
    device.subscribe("edge/g/#")
    coordinator.publish(topics.desired("default"), b"x")
    with caplog.at_level(logging.WARNING):
        assert [message.topic for message in device.receive()] == [topics.desired("default")]
    assert "edge/tuf/targets2 was ignored" in caplog.text
    assert trust.require(OFFER, clock.now()) is not None
    assert (device.connected, device.connections) == (True, 1)
    device.unsubscribe("edge/g/#")
    device.close()
    assert not device.connected


# ---- a whole device under attack: it refuses, says so, and serves as before


class Field:
    """A coordinator with keys, a device on release 1 with its root, and someone else who may publish anything."""

    def __init__(self, folder, clock, make_device, checkpoint):
        self.clock, self.folder, self.checkpoint = clock, folder, checkpoint
        self.broker, self.topics = MemoryBroker(), Topics()
        self.coordinator = Coordinator(
            folder / "home",
            transport=MemoryTransport(self.broker),
            clock=clock,
            settings=Settings(accept_unknown=True, durable=False),
        )
        self.repository = self.coordinator.registry.repository
        self.away = folder / "away"
        self.repository.init(self.away, count=2, threshold=2, passphrase=None)
        self.coordinator.start()
        self.coordinator.push(checkpoint)
        (folder / "device").mkdir()
        (folder / "device" / ROOT_NAME).write_bytes(self.repository.root())
        self.transport = MemoryTransport(self.broker)
        self.device = make_device(transport=self.transport, update=UpdateConfig(min_free_bytes=0))
        self.device.connect()
        self.attacker = MemoryTransport(self.broker)
        self.attacker.connect()
        self.steps(3)
        self.first = self.repository.published()

    def steps(self, count):
        for _ in range(count):
            assert self.device.step().problem == ""
            self.coordinator.pump()

    def push(self, release=2):
        """A release that differs from the first by its number; nobody hears of it yet."""
        folder = shutil.copytree(self.checkpoint, self.folder / f"release-{release}")
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
        (folder / MANIFEST_NAME).write_bytes(manifest_bytes(msgspec.structs.replace(manifest, release=release)))
        self.transport.online = False
        plan = RolloutRules(stages=(100,), soak_s=0, min_labelled=0)
        self.coordinator.push(folder, plan=plan)
        return self.repository.published()

    def publish(self, published):
        for name, data in {**published.files, "set": encode(published.versions)}.items():
            self.attacker.publish(self.topics.metadata(name), data, retain=True)

    def offer(self, release, digest, size):
        """With the key that desired states are signed with: somebody has stolen it."""
        desired = Desired(
            revision=2**40, base=Offer(release, digest, size), candidate=None, salt="", threshold=0, revoked=[]
        )
        voucher = self.repository.voucher()
        payload = sign_desired(
            desired, voucher.sign, prefix="edge", group="default", issued=self.clock.now(), expires=voucher.expires
        )
        self.attacker.publish(self.topics.desired("default"), payload, retain=True)

    def honest(self):
        """The coordinator's own word again."""
        self.broker.stop()
        self.broker.start()
        self.coordinator.pump()

    def told(self):
        return {entry.name for entry in self.device.history(limit=1000)}

    def secret(self, role):
        key = next(found.key for found in self.repository.keys() if found.role == role)  # noqa: SIM118 - no dict
        return _load_secret(self.folder / "home" / "keys" / f"{key[:16]}.pem", None)


@pytest.fixture
def field(tmp_path, clock, make_device, checkpoint):
    made = Field(tmp_path, clock, make_device, checkpoint)
    yield made
    made.coordinator.close()


def swap_a_file(field):
    field.push()
    field.offer(2, hashlib.sha256(b"evil").hexdigest(), len(b"evil"))


def send_a_longer_file(field):
    field.push()
    record = field.coordinator.registry.releases()[0]
    field.offer(2, record.digest, record.size + 1)


def replay_older_metadata(field):
    field.push()
    field.publish(field.first)


def mix_two_sets(field):
    new = field.push()
    old = altered(field.first, "targets", lambda signed: setattr(signed, "version", new.versions.targets))
    field.publish(Published(new.versions, {**new.files, "targets": old.files["targets"]}))


def let_it_expire(field):
    field.push()
    field.clock.advance(8 * DAY)


def set_the_clock_back(field):
    field.clock.advance(10 * DAY)
    field.push()
    field.clock._now -= 10 * DAY


def sign_with_a_wrong_key(field):
    field.publish(altered(field.push(), "timestamp", lambda signed: None, CryptoSigner.generate_ed25519()))


def sign_a_root_too_seldom(field):
    field.repository.renew_root([field.away], passphrase=None)
    signer = _load_secret(min(field.away.iterdir()), None)
    field.publish(altered(field.push(), "2.root", lambda root: None, signer))


def use_a_revoked_key(field):
    thief = field.secret("targets")
    field.repository.revoke(thief.public_key.keyid, [field.away], passphrase=None)
    stolen = {role: field.secret(role) for role in ("timestamp", "snapshot")}
    field.publish(forged(field.push(), {**stolen, "targets": thief}))


ATTACKS = {
    swap_a_file: "release_untrusted",
    send_a_longer_file: "release_untrusted",
    replay_older_metadata: "release_untrusted",
    mix_two_sets: "release_untrusted",
    let_it_expire: "metadata_expired",
    set_the_clock_back: "clock_untrusted",
    sign_with_a_wrong_key: "release_untrusted",
    sign_a_root_too_seldom: "release_untrusted",
    use_a_revoked_key: "release_untrusted",
}


@pytest.mark.torch
@pytest.mark.parametrize(("attack", "event"), ATTACKS.items(), ids=[attack.__name__ for attack in ATTACKS])
def test_a_device_refuses_and_serves_as_before(field, digits, attack, event):
    x = digits.score.x[0]
    before = field.device.predict(x)
    attack(field)
    field.transport.online = True
    field.steps(12)
    after = field.device.predict(x)
    status = field.device.status()
    assert (after.label, after.confidence, after.release) == (before.label, before.confidence, 1)
    assert (status.release, status.fetching, status.updates != "unsigned") == (1, None, True)
    assert event in field.told()
    assert "release_failed" not in field.told(), "it may be had as soon as it is signed as it must be"
    if attack is set_the_clock_back:
        field.clock.advance(10 * DAY)
    for _ in range(2):  # above the versions that a thief may have used
        field.repository.sign(field.repository.targets())
    field.honest()
    if attack in (swap_a_file, send_a_longer_file):  # its revision was higher: with another key that is void
        assert "desired_refused" not in field.told()
        field.repository.rotate("timestamp", [field.away], passphrase=None)
        field.honest()
    field.steps(40)
    assert field.device.status().release == 2, "the honest word is believed"
    assert field.device.status().updates == "trusted"


@pytest.mark.torch
def test_an_older_release_is_refused_though_it_is_signed(field):
    field.push()
    field.transport.online = True
    field.steps(40)
    assert field.device.status().release == 2
    record = next(release for release in field.coordinator.registry.releases() if release.release == 1)
    field.offer(1, record.digest, record.size)
    field.steps(10)
    assert field.device.status().release == 2
    assert "release_refused" in field.told()


@pytest.mark.torch
def test_somebody_without_keys_cannot_make_a_device_go_back_or_flood_the_coordinator(field):
    field.push()
    field.transport.online = True
    field.steps(40)
    field.clock.advance(10)
    before = field.device.status().counters.bad_messages
    revoking = Desired(revision=2**40, base=None, candidate=None, salt="", threshold=0, revoked=[2])
    for _ in range(20):
        field.attacker.publish(field.topics.desired("default"), encode(revoking), retain=True)
        field.steps(1)
    field.clock.advance(3600)
    field.steps(2)
    told = [entry.detail["count"] for entry in field.device.history(limit=1000) if entry.name == "desired_refused"]
    assert told == [1, 19], "at once, and the rest an hour later"
    assert field.device.status().counters.bad_messages == before + 20
    assert (field.device.status().release, field.device.status().updates) == (2, "trusted")


@pytest.mark.torch
def test_expiry_is_told_also_while_there_is_nothing_to_install(field):
    field.clock.advance(8 * DAY)
    field.steps(3)
    status = field.device.status()
    assert (status.release, status.updates) == (1, "expired")
    assert "metadata_expired" in field.told()


@pytest.mark.torch
def test_without_a_root_the_settings_decide_and_the_status_tells(make_device, clock):
    broker = MemoryBroker()
    attacker = MemoryTransport(broker)
    attacker.connect()
    desired = Desired(revision=1, base=OFFER, candidate=None, salt="", threshold=0, revoked=[])
    desired = msgspec.structs.replace(desired, base=Offer(2, OFFER.digest, OFFER.size))
    attacker.publish(Topics().desired("default"), encode(desired), retain=True)
    found = {}
    for wanted in ("root", "none"):
        device = make_device(wanted, transport=MemoryTransport(broker), update=UpdateConfig(trust=wanted))
        device.connect()
        device.step()
        device.step()
        found[wanted] = (device.status().updates, device.status().fetching)
        told = [entry.name for entry in device.history(limit=1000)]
        assert ("desired_refused" in told) is (wanted == "root")
    assert found == {"root": ("no_root", None), "none": ("unsigned", 2)}
