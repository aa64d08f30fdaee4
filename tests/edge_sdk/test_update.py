"""Fetching a release in blocks, over anything that a network, a disk and a clock may do."""

import errno
import hashlib
import os
import resource
import shutil
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.config import UpdateConfig
from edge_sdk.download import Download
from edge_sdk.errors import DiskFullError, IntegrityError, RollbackRefusedError, StoreError
from edge_sdk.files import set_crash_hook
from edge_sdk.manifest import REQUIRED, FileEntry, HeadSpec, LatentSpec, Manifest, manifest_bytes
from edge_sdk.messages import THRESHOLD_ALL, Desired, Need, Offer, Topics, cohort, decode, from_bitmap
from edge_sdk.schema import InputSpec
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_sdk.update import UpdateClient

BLOCK = 64
RETRY_S = 20.0
TOPICS = Topics()
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as the standard library's own


class PowerCut(BaseException):
    pass


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


def content_of(size, salt=0):
    """Bytes in which no two blocks are equal."""
    return b"".join(hashlib.sha256(f"{salt}/{i}".encode()).digest() for i in range(size // 32 + 1))[:size]


def blocks_of(data):
    return [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]


# ---- one file


DATA = content_of(5 * BLOCK + 7)


@pytest.fixture
def download(tmp_path):
    return lambda data=DATA: Download(tmp_path, digest_of(data), len(data), BLOCK)


@given(
    size=st.integers(0, 6 * BLOCK),
    events=st.lists(st.one_of(st.integers(0, 7), st.sampled_from(["flush", "reopen"])), max_size=30),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_order_of_blocks_with_losses_and_repeats_gives_the_file(size, events):
    data = content_of(size)
    blocks = dict(enumerate(blocks_of(data)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download = Download(folder, digest_of(data), size, BLOCK)
        written, safe = set(), set()
        for event in events:
            if event == "flush":
                download.flush()
                safe |= written
                written.clear()
            elif event == "reopen":
                download = Download(folder, digest_of(data), size, BLOCK)
                written.clear()
            else:
                is_new = event in blocks and event not in written | safe
                assert download.write(event, blocks.get(event, b"")) == is_new
                written |= {event} if is_new else set()
            assert download.missing() == sorted(set(blocks) - written - safe)
            assert download.complete == (not download.missing())
        for index in download.missing():
            assert download.write(index, blocks[index])
        download.flush()
        download.finish()
        assert download.path.read_bytes() == data
        assert list(folder.iterdir()) == [download.path]


@pytest.mark.parametrize(
    ("index", "payload"),
    [(0, b""), (0, DATA[: BLOCK - 1]), (0, DATA[: BLOCK + 1]), (5, DATA[:BLOCK]), (6, b""), (6, DATA[:BLOCK])],
    ids=["empty", "short", "long", "last too long", "empty after the last", "after the last"],
)
def test_a_block_of_the_wrong_size_or_place_is_not_taken(download, tmp_path, index, payload):
    fetched = download()
    assert not fetched.write(index, payload)
    assert fetched.missing() == list(range(6))
    assert list(tmp_path.iterdir()) == []


def test_nothing_lies_after_a_last_block_that_is_whole(download):
    assert not download(DATA[: 2 * BLOCK]).write(2, b"")


def test_blocks_that_were_flushed_are_here_after_a_restart_and_others_are_not(download):
    fetched = download()
    fetched.write(4, DATA[4 * BLOCK : 5 * BLOCK])
    fetched.flush()
    fetched.write(1, DATA[BLOCK : 2 * BLOCK])
    assert download().missing() == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("suffix", [".part", ".map"])
def test_without_the_blocks_or_their_map_all_is_fetched_again(download, tmp_path, suffix):
    fetched = download()
    fetched.write(0, DATA[:BLOCK])
    fetched.flush()
    (tmp_path / f"{fetched.digest}{suffix}").unlink()
    assert download().missing() == list(range(6))


@pytest.fixture
def signed(tmp_path):
    hashes = [hashlib.sha256(block).digest() for block in blocks_of(DATA)]
    return lambda: Download(tmp_path, digest_of(DATA), len(DATA), BLOCK, hashes)


def test_with_signed_hashes_no_block_on_the_disk_is_fetched_again_after_a_kill(signed):
    first = signed()
    for index in (0, 2, 5):
        first.write(index, blocks_of(DATA)[index])
    assert signed().missing() == [1, 3, 4]  # nothing was flushed


def test_with_signed_hashes_a_block_that_a_power_cut_spoilt_is_fetched_again_and_no_other(signed, tmp_path):
    first = signed()
    for index, block in enumerate(blocks_of(DATA)):
        first.write(index, block)
    part = tmp_path / f"{digest_of(DATA)}.part"
    part.write_bytes(part.read_bytes()[: 3 * BLOCK] + bytes(BLOCK) + part.read_bytes()[4 * BLOCK :])
    again = signed()
    assert again.missing() == [3]
    assert again.write(3, blocks_of(DATA)[3])
    again.finish()
    assert again.path.read_bytes() == DATA


def test_what_came_out_of_order_and_over_a_restart_is_hashed_whole(download):
    first = download()
    for index in (0, 1, 3):
        first.write(index, blocks_of(DATA)[index])
    first.flush()
    again = download()
    for index in (4, 2, 5):
        again.write(index, blocks_of(DATA)[index])
    again.flush()
    again.finish()
    assert again.path.read_bytes() == DATA


def test_a_file_with_another_hash_is_thrown_away(download, tmp_path):
    fetched = download()
    for index, block in enumerate(blocks_of(DATA)):
        fetched.write(index, bytes(len(block)) if index == 3 else block)
    fetched.flush()
    with pytest.raises(IntegrityError, match=fetched.digest[:12]):
        fetched.finish()
    assert fetched.missing() == list(range(6))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def crash_hook():
    yield set_crash_hook
    set_crash_hook(None)


def fetch(download):
    """All blocks, each flushed alone."""
    for index in (5, 0, 3, 1, 4, 2):
        download.write(index, blocks_of(DATA)[index])
        download.flush()
    download.finish()


@pytest.mark.parametrize("point", ["blocks:flushed", "written:", "renamed:", "blocks:finished"])
def test_after_a_power_cut_the_map_never_promises_too_much(download, tmp_path, crash_hook, point):
    def hook(name):
        if name.startswith(point):
            raise PowerCut

    blocks = blocks_of(DATA)
    crash_hook(hook)
    with pytest.raises(PowerCut):
        fetch(download())
    crash_hook(None)
    again = download()
    if not again.path.exists():
        part = (tmp_path / f"{again.digest}.part").read_bytes()
        assert all(blocks_of(part)[i] == blocks[i] for i in set(range(6)) - set(again.missing()))
        for index in again.missing():
            again.write(index, blocks[index])
        again.flush()
        again.finish()
    assert again.path.read_bytes() == DATA


@contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_block_for_which_there_is_only_half_the_room_is_a_full_disk(download):
    fetched = download()
    with largest_file(BLOCK // 2), pytest.raises(DiskFullError, match="block 0"):
        fetched.write(0, DATA[:BLOCK])
    assert 0 in fetched.missing()
    assert fetched.write(0, DATA[:BLOCK])


def test_blocks_that_cannot_be_flushed_are_fetched_again(download, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    fetched = download()
    fetched.write(0, DATA[:BLOCK])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(StoreError, match="cannot be flushed"):
            fetched.flush()
    assert 0 in fetched.missing()
    fetched.flush()
    assert download().missing() == list(range(6))


# ---- which release


def release(number, *, size=4 * BLOCK):
    """A manifest and its files by hash; all but the first two are alike in every release."""
    files = {name: content_of(size + i, salt=f"{number}/{name}" if i < 2 else name) for i, name in enumerate(REQUIRED)}
    manifest = Manifest(
        name="digits",
        release=number,
        created="2026-01-01T00:00:00Z",
        labels=["0", "1"],
        input=InputSpec(shape=[1]),
        latent=LatentSpec(2, 1.0, 0),
        head=HeadSpec(),
        files={name: FileEntry(len(data), digest_of(data)) for name, data in files.items()},
    )
    return manifest_bytes(manifest), {digest_of(data): data for data in files.values()}


def offer(number):
    data = release(number)[0]
    return Offer(number, digest_of(data), len(data))


def desired(base=None, candidate=None, *, revision=1, threshold=0, revoked=(), salt="s"):
    return Desired(
        revision=revision,
        base=None if base is None else offer(base),
        candidate=None if candidate is None else offer(candidate),
        salt=salt,
        threshold=threshold,
        revoked=list(revoked),
        block_bytes=BLOCK,
    )


class Coordinator:
    """Answers every request for blocks, unless told to lose or spoil some."""

    def __init__(self, broker):
        self.transport = MemoryTransport(broker)
        self.transport.connect()
        self.transport.subscribe(TOPICS.up("+", "need"))
        self.blobs = {}
        self.asked = []
        """(digest, block numbers) of every request."""
        self.lose = set()
        """Digests whose blocks never arrive."""
        self.spoil = {}
        """How many more times the first block of a file is damaged."""

    def publish(self, number):
        manifest, files = release(number)
        self.blobs |= files | {digest_of(manifest): manifest}

    def listen(self):
        needs = [decode(message.payload, Need) for message in self.transport.receive()]
        for need in needs:
            assert need.size == len(self.blobs[need.digest])
            self.asked.append((need.digest, from_bitmap(need.blocks, len(blocks_of(self.blobs[need.digest])))))
        return self.asked[len(self.asked) - len(needs) :]

    def answer(self):
        for digest, numbers in self.listen():
            for index in sorted(numbers) if digest not in self.lose else ():
                payload = blocks_of(self.blobs[digest])[index]
                if index == 0 and self.spoil.get(digest, 0) > 0:
                    self.spoil[digest] -= 1
                    payload = bytes(len(payload))
                self.transport.publish(TOPICS.block(digest, index), payload)


class Device:
    """An update client with its network, that can be started again on the same folder."""

    def __init__(self, folder, broker, clock, coordinator, **config):
        self.folder, self.broker, self.clock, self.coordinator = folder, broker, clock, coordinator
        self.config = UpdateConfig(
            **{"window_blocks": 3, "retry_s": RETRY_S, "quiet_s": 0, "min_free_bytes": 0, "max_bytes": 100_000} | config
        )
        self.held = {}
        self.start()

    def start(self):
        self.transport = MemoryTransport(self.broker)
        self.transport.connect()
        self.client = UpdateClient(
            self.folder, device="dev-1", topics=TOPICS, transport=self.transport, config=self.config
        )

    def restart(self):
        self.transport.vanish()
        self.start()

    def follow(self, number, *, block_bytes=BLOCK):
        self.client.follow(desired(number))
        self.client.begin(offer(number))

    def turn(self):
        for message in self.transport.receive():
            self.client.take_block(*TOPICS.parse_block(message.topic), message.payload)
        return self.client.turn(self.clock.now(), self.held)

    def fetch(self, turns=200):
        """The release, if it is complete within so many turns; the clock stands still."""
        for _ in range(turns):
            if (fetched := self.turn()) is not None:
                return fetched
            self.coordinator.answer()
        return None


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.fixture
def coordinator(broker):
    made = Coordinator(broker)
    made.publish(1)
    made.publish(2)
    return made


@pytest.fixture
def make_device(tmp_path, broker, clock, coordinator):
    return lambda **config: Device(tmp_path / "fetch", broker, clock, coordinator, **config)


@pytest.fixture
def device(make_device):
    return make_device()


MANIFEST = offer(1).digest
FILES = release(1)[1]


def test_nothing_is_offered_before_anything_is_known(device):
    assert device.client.offered(1, {}) is None
    device.client.follow(desired())
    assert device.client.offered(None, {}) is None


def test_a_newer_base_is_offered_and_the_installed_one_is_not(device):
    device.client.follow(desired(2))
    assert device.client.offered(None, {}) == offer(2)
    assert device.client.offered(1, {}) == offer(2)
    assert device.client.offered(2, {}) is None


def test_an_older_release_than_the_installed_one_is_refused(device):
    device.client.follow(desired(1))
    with pytest.raises(RollbackRefusedError, match="release 1 is older than the installed 2"):
        device.client.offered(2, {})


def test_a_candidate_that_was_installed_early_by_hand_stays(device):
    device.client.follow(desired(1, 2))
    assert device.client.offered(2, {}) is None


def test_a_revoked_release_is_never_offered(device):
    device.client.follow(desired(2, revoked=[2]))
    assert device.client.offered(1, {}) is None
    device.client.follow(desired(1, 2, threshold=THRESHOLD_ALL, revoked=[2]))
    assert device.client.offered(1, {}) is None


def test_a_release_that_failed_before_is_not_offered_again(device):
    device.client.follow(desired(2))
    assert device.client.offered(1, {offer(2).digest: "self-test"}) is None
    assert device.client.offered(1, {offer(1).digest: "self-test"}) == offer(2)


@pytest.mark.parametrize("why", ["revoked", "failed before"])
def test_without_its_candidate_a_device_still_gets_the_base(device, why):
    device.client.follow(desired(1, 2, threshold=THRESHOLD_ALL, revoked=[2] if why == "revoked" else []))
    assert device.client.offered(None, {offer(2).digest: "self-test"} if why == "failed before" else {}) == offer(1)


def test_a_candidate_is_for_the_devices_below_the_threshold(device):
    place = cohort("s", "dev-1")
    for threshold, expected in [(0, 1), (place, 1), (place + 1, 2), (THRESHOLD_ALL, 2)]:
        device.client.follow(desired(1, 2, threshold=threshold))
        assert device.client.offered(None, {}) == offer(expected)


def test_another_salt_draws_another_cohort(device):
    drawn = []
    for salt in "abcdefghijklmnop":
        device.client.follow(desired(1, 2, threshold=2**31, salt=salt))
        drawn.append(device.client.offered(None, {}).release)
    assert set(drawn) == {1, 2}


def test_a_stale_desired_state_is_ignored(device):
    device.client.follow(desired(2, revision=5))
    device.client.follow(desired(1, revision=4))
    assert device.client.desired.base.release == 2
    device.client.follow(desired(1, revision=5))
    assert device.client.desired.base.release == 1


# ---- fetching it


def test_a_release_is_fetched_whole(device):
    device.follow(1)
    assert device.client.fetching == offer(1)
    fetched = device.fetch()
    assert fetched.offer == offer(1)
    assert fetched.manifest == release(1)[0]
    assert {digest: path.read_bytes() for digest, path in fetched.files.items()} == FILES


def test_what_an_installed_release_holds_is_not_fetched(device, coordinator, tmp_path):
    shared = sorted(set(FILES) & set(release(2)[1]))
    assert len(shared) == len(REQUIRED) - 2
    for digest in shared:
        device.held[digest] = tmp_path / digest
        device.held[digest].write_bytes(FILES[digest])
    device.follow(2)
    fetched = device.fetch()
    assert {digest for digest, _ in coordinator.asked}.isdisjoint(shared)
    assert {digest: path.read_bytes() for digest, path in fetched.files.items()} == release(2)[1]


def test_no_block_that_was_flushed_is_fetched_again_after_a_restart(device, coordinator):
    device.follow(1)
    for _ in range(7):
        device.turn()
        coordinator.answer()
    device.turn()
    before = {(digest, i) for digest, numbers in coordinator.asked[:-1] for i in numbers}
    assert len(before) > 6
    device.restart()
    device.follow(1)
    count = len(coordinator.asked)
    coordinator.listen()
    coordinator.asked.pop()  # what was asked for, and not answered, before the restart
    assert device.fetch() is not None
    after = {(digest, i) for digest, numbers in coordinator.asked[count - 1 :] for i in numbers}
    assert before.isdisjoint(after)


def test_a_release_that_is_here_is_given_again_after_a_restart(device, coordinator):
    device.follow(1)
    device.fetch()
    device.restart()
    device.follow(1)
    coordinator.asked.clear()
    assert device.turn().manifest == release(1)[0]
    assert coordinator.listen() == []


@pytest.mark.parametrize("spoilt", ["manifest", "file"])
def test_a_damaged_file_is_fetched_again(device, coordinator, spoilt):
    coordinator.spoil[MANIFEST if spoilt == "manifest" else min(FILES)] = 2
    device.follow(1)
    fetched = device.fetch()
    assert {digest: path.read_bytes() for digest, path in fetched.files.items()} == FILES


def test_the_third_damage_is_final(device, coordinator):
    coordinator.spoil[min(FILES)] = 3
    device.follow(1)
    with pytest.raises(IntegrityError, match="do not have its SHA-256"):
        device.fetch()
    assert coordinator.spoil[min(FILES)] == 0


def test_a_file_that_was_damaged_on_the_disk_is_not_handed_over(device, tmp_path):
    device.follow(1)
    device.fetch()
    (tmp_path / "fetch" / MANIFEST).write_bytes(release(2)[0])
    device.restart()
    device.follow(1)
    with pytest.raises(IntegrityError):
        device.fetch()


def test_a_manifest_of_another_release_than_offered_is_refused(device):
    wrong = Offer(9, offer(1).digest, offer(1).size)
    device.client.follow(desired(1))
    device.client.begin(wrong)
    with pytest.raises(IntegrityError, match="offered as release 9, its manifest says 1"):
        device.fetch()


def test_a_release_beyond_the_limit_is_refused_before_its_first_block(make_device, coordinator):
    device = make_device(max_bytes=1_000)
    device.follow(1)
    with pytest.raises(IntegrityError, match="at most 1000"):
        device.fetch()
    assert {digest for digest, _ in coordinator.asked} == {MANIFEST}


@pytest.mark.parametrize("size", [-1, 0, 4_000_001])
def test_an_impossible_size_of_a_manifest_is_refused(device, size):
    with pytest.raises(IntegrityError, match=f"a manifest of {size} bytes"):
        device.client.begin(Offer(1, MANIFEST, size))
    assert device.client.fetching is None


def test_blocks_that_nobody_asked_for_are_not_taken(device, tmp_path):
    assert not device.client.take_block(MANIFEST, 0, bytes(BLOCK))
    device.follow(1)
    device.turn()
    assert not device.client.take_block(offer(2).digest, 0, bytes(BLOCK))
    assert not device.client.take_block(MANIFEST, 10_000, bytes(BLOCK))
    assert list((tmp_path / "fetch").iterdir()) == []


def test_another_release_takes_the_place_of_the_one_on_its_way(device, coordinator):
    device.follow(1)
    device.turn()
    device.client.follow(desired(2, revision=2))
    device.client.begin(offer(2))
    assert device.client.fetching == offer(2)
    assert device.fetch().offer == offer(2)


def test_blocks_of_an_abandoned_release_stay_for_another_try(device, coordinator):
    device.follow(1)
    device.turn()
    coordinator.answer()
    device.turn()
    device.client.abandon()
    assert device.client.fetching is None
    assert device.fetch(turns=3) is None
    coordinator.asked.clear()
    device.client.begin(offer(1))
    device.turn()
    ((digest, numbers),) = coordinator.listen()
    assert digest == MANIFEST
    assert numbers.isdisjoint({0, 1, 2})


def test_an_abandoned_release_is_no_longer_listened_for(device, coordinator):
    device.follow(1)
    device.turn()
    device.client.abandon()
    coordinator.answer()
    assert device.transport.receive() == []


def test_a_clean_folder_holds_nothing(device, coordinator, tmp_path):
    device.follow(1)
    device.fetch()
    device.client.clean()
    assert list((tmp_path / "fetch").iterdir()) == []
    coordinator.asked.clear()
    device.follow(1)
    assert device.fetch() is not None
    assert coordinator.asked


# ---- windows and time


def manifest_windows():
    count = -(-len(release(1)[0]) // BLOCK)
    return [set(range(start, min(start + 3, count))) for start in range(0, count, 3)]


def test_blocks_are_asked_for_a_window_at_a_time(device, coordinator):
    device.follow(1)
    device.fetch()
    asked = [numbers for digest, numbers in coordinator.asked if digest == MANIFEST]
    assert asked == manifest_windows()
    assert all(len(numbers) <= 3 for _, numbers in coordinator.asked)


def test_nothing_more_is_asked_for_while_a_window_is_under_way(device, coordinator, clock):
    device.follow(1)
    for _ in range(5):
        device.turn()
        clock.advance(RETRY_S / 10)
    assert coordinator.listen() == [(MANIFEST, {0, 1, 2})]


def test_blocks_that_did_not_come_are_asked_for_again_in_time(device, coordinator, clock):
    device.follow(1)
    device.turn()
    coordinator.listen()
    coordinator.transport.publish(TOPICS.block(MANIFEST, 1), blocks_of(release(1)[0])[1])
    device.turn()
    clock.advance(RETRY_S - 0.001)
    device.turn()
    assert coordinator.listen() == []
    clock.advance(0.001)
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0, 2, 3})]


def test_the_window_is_filled_up_once_half_of_it_is_here(make_device, coordinator):
    device = make_device(window_blocks=4)
    device.follow(1)
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0, 1, 2, 3})]
    for index, asked in ((0, []), (1, [(MANIFEST, {4, 5})])):
        coordinator.transport.publish(TOPICS.block(MANIFEST, index), blocks_of(release(1)[0])[index])
        device.turn()
        assert coordinator.listen() == asked


def test_before_it_asks_for_a_large_file_each_device_waits_a_while_of_its_own(make_device, coordinator, clock):
    device = make_device(quiet_s=10.0)
    device.follow(1)
    share = cohort(MANIFEST, "dev-1") / THRESHOLD_ALL
    device.turn()
    clock.advance(10.0 + 10.0 * share - 0.001)
    device.turn()
    assert coordinator.listen() == []
    clock.advance(0.002)
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0, 1, 2})]


def test_a_file_that_fits_the_window_is_asked_for_at_once(make_device, coordinator):
    device = make_device(quiet_s=10.0, window_blocks=1_000)
    device.follow(1)
    device.turn()
    assert [digest for digest, _ in coordinator.listen()] == [MANIFEST]


def test_who_hears_what_others_asked_for_listens_and_asks_for_the_rest_when_it_is_quiet(
    make_device, coordinator, clock
):
    device = make_device(quiet_s=10.0)
    device.follow(1)
    device.turn()
    blocks = blocks_of(release(1)[0])
    for index in range(1, len(blocks)):
        coordinator.transport.publish(TOPICS.block(MANIFEST, index), blocks[index])
        device.turn()
        clock.advance(9.0)
        device.turn()
        assert coordinator.listen() == []
    clock.advance(10.0 + 10.0 + 2 * 9.0)
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0})]


def test_a_network_that_loses_half_of_the_requests_only_costs_time(device, coordinator, clock):
    device.follow(1)
    fetched = None
    for i in range(400):
        fetched = device.turn()
        if fetched is not None:
            break
        if i % 2:
            coordinator.answer()
        else:
            coordinator.listen()
        clock.advance(RETRY_S)
    assert set(fetched.files) == set(FILES)


@pytest.mark.parametrize("cut", ["broker", "device"])
def test_after_a_reconnect_the_blocks_are_asked_for_again_at_once(device, coordinator, broker, cut):
    device.follow(1)
    device.turn()
    coordinator.listen()
    if cut == "broker":
        broker.stop()
        device.turn()
        broker.start()
    else:
        device.transport.online = False
        device.turn()
        device.transport.online = True
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0, 1, 2})]
    device.turn()
    assert coordinator.listen() == []
    assert device.client.fetching == offer(1)


def test_without_a_connection_nothing_fails_and_the_first_connection_asks(device, coordinator, broker):
    broker.stop()
    device.follow(1)
    for _ in range(3):
        assert device.turn() is None
    broker.start()
    assert device.fetch() is not None


def test_a_clock_that_is_set_back_does_not_stall_the_fetching(device, coordinator, clock):
    device.follow(1)
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0, 1, 2})]
    clock._now -= 86_400.0
    device.turn()
    assert coordinator.listen() == [(MANIFEST, {0, 1, 2})]
    device.turn()
    assert coordinator.listen() == []


# ---- room


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """How many bytes the disk has in all; what was fetched is taken off."""

    class Disk:
        size = 10**9

        def free(self):
            return self.size - sum(file.stat().st_size for file in (tmp_path / "fetch").rglob("*"))

    made = Disk()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(made.size, 0, made.free()))
    return made


def test_too_little_room_delays_the_release_and_is_looked_at_again_in_time(make_device, coordinator, disk, clock):
    device = make_device(min_free_bytes=1_000)
    disk.size = 3_000
    device.follow(1)
    with pytest.raises(DiskFullError, match="1000 must stay free"):
        device.fetch()
    assert {digest for digest, _ in coordinator.asked} == {MANIFEST}
    disk.size = 10**6
    clock.advance(RETRY_S - 0.001)
    assert device.fetch(turns=5) is None
    clock.advance(0.001)
    assert device.fetch() is not None


def test_a_disk_that_stays_full_is_told_at_every_look(make_device, disk, clock):
    device = make_device(min_free_bytes=1_000)
    disk.size = 3_000
    device.follow(1)
    for _ in range(3):
        with pytest.raises(DiskFullError):
            device.fetch()
        clock.advance(RETRY_S)
    assert device.client.fetching == offer(1)


def test_a_clock_that_is_set_back_does_not_keep_a_delayed_release_waiting(make_device, disk, clock):
    device = make_device(min_free_bytes=1_000)
    disk.size = 3_000
    device.follow(1)
    with pytest.raises(DiskFullError):
        device.fetch()
    disk.size = 10**6
    clock._now -= 86_400.0
    assert device.fetch() is not None


def test_a_release_for_which_there_is_just_enough_room_is_fetched(make_device, disk):
    device = make_device(min_free_bytes=1_000)
    total = sum(len(data) for data in FILES.values())
    disk.size = 1_000 + total + len(release(1)[0]) + 4_096
    device.follow(1)
    assert device.fetch() is not None


def test_what_is_held_already_needs_no_room(make_device, disk, tmp_path):
    device = make_device(min_free_bytes=1_000)
    for digest, data in FILES.items():
        device.held[digest] = tmp_path / digest
        device.held[digest].write_bytes(data)
    disk.size = 1_000 + 2 * len(release(1)[0])
    device.follow(1)
    assert device.fetch() is not None


def test_a_disk_that_fills_up_on_the_way_delays_and_goes_on_where_it_was(device, coordinator, monkeypatch, clock):
    device.follow(1)
    for _ in range(4):
        device.turn()
        coordinator.answer()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError):
            device.turn()
    assert device.turn() is None
    clock.advance(RETRY_S)
    coordinator.asked.clear()
    assert device.fetch() is not None
    assert (MANIFEST, {0, 1, 2}) not in coordinator.asked
