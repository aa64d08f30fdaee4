"""The versions on disk: whatever happens in between, the pointer names something that serves."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_sdk.errors import DiskFullError, IntegrityError, RollbackRefusedError, StoreError
from edge_sdk.files import set_crash_hook
from edge_sdk.head import Head
from edge_sdk.learn.ewc import Importance
from edge_sdk.manifest import (
    CARD,
    HEAD_NPZ,
    MANIFEST_NAME,
    TRUNK_INT8,
    digest_of,
    manifest_bytes,
    parse_manifest,
    verify_checkpoint,
)
from edge_sdk.slots import Pointer, Slots, Version


class PowerCut(BaseException):
    pass


class Releases:
    """As many releases as one wants from one checkpoint: they differ in their manifest's number."""

    def __init__(self, folder):
        self.manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
        self.sources = {entry.sha256: folder / name for name, entry in self.manifest.files.items()}
        self.head = Head.load(folder / HEAD_NPZ)

    def data(self, number):
        return manifest_bytes(msgspec.structs.replace(self.manifest, release=number))

    def stage(self, slots, number):
        return slots.stage(self.data(number), self.sources)[0]

    def install(self, slots, number, *, personal=False):
        """Returns the new version."""
        slot = self.stage(slots, number)
        head = slots.write_head(slot, self.head) if personal else 0
        version = Version(slot, number, digest_of(self.data(number)), head)
        slots.activate(version)
        return version

    def promote(self, slots):
        return slots.promote(slots.write_head(slots.pointer.current.slot, self.head))


@pytest.fixture(scope="module")
def releases(checkpoint):
    return Releases(checkpoint)


@pytest.fixture
def slots(tmp_path):
    return Slots(tmp_path / "slots")


@pytest.fixture
def crash_hook():
    yield set_crash_hook
    set_crash_hook(None)


def named(slots):
    pointer = slots.pointer
    return [version for version in (pointer.current, pointer.previous, pointer.fallback) if version is not None]


def loads(slots, version):
    """A version's release verifies, and its head can be read."""
    assert verify_checkpoint(slots.folder(version)).release == version.release
    assert slots.manifest(version).release == version.release
    assert slots.head(version).weights


def number_of_heads(slots):
    return len(list(slots.root.glob("?/heads/*")))


# ---- one step at a time


def test_new_slots_point_to_nothing(slots):
    assert slots.pointer == Pointer()
    assert slots.held_files() == {}
    for refused in (slots.rollback, slots.rollback_release, lambda: slots.promote(1)):
        with pytest.raises(RollbackRefusedError):
            refused()


def test_a_staged_release_serves_only_once_it_is_activated(slots, releases):
    first = releases.install(slots, 1)
    before = slots.pointer
    slot, manifest = slots.stage(releases.data(2), releases.sources)
    assert (slot, manifest.release) == ("b", 2)
    assert slots.pointer == before
    slots.activate(Version(slot, 2, digest_of(releases.data(2))))
    assert slots.pointer.current.release == 2
    assert slots.pointer.previous == slots.pointer.fallback == first
    loads(slots, slots.pointer.current)
    loads(slots, first)


def test_the_pointer_survives_a_restart(slots, releases):
    releases.install(slots, 1)
    releases.install(slots, 2, personal=True)
    assert Slots(slots.root).pointer == slots.pointer


def test_a_third_release_takes_the_slot_of_the_first(slots, releases):
    releases.install(slots, 1)
    second = releases.install(slots, 2)
    third = releases.install(slots, 3)
    assert third.slot == "a"
    assert slots.pointer.fallback == second
    assert slots.rollback_release() == second


def test_staging_forgets_what_was_in_the_slot(slots, releases):
    releases.install(slots, 1)
    second = releases.install(slots, 2)
    releases.stage(slots, 3)
    assert slots.pointer.current == second
    with pytest.raises(RollbackRefusedError, match="no release to go back to from 2"):
        slots.rollback_release()
    with pytest.raises(RollbackRefusedError, match="no version to go back to"):
        slots.rollback()


def test_a_promoted_head_serves_and_can_be_rolled_back_once(slots, releases):
    own = releases.install(slots, 1)
    personal = releases.promote(slots)
    assert personal == msgspec.structs.replace(own, head=1)
    loads(slots, personal)
    assert slots.rollback() == own
    with pytest.raises(RollbackRefusedError):
        slots.rollback()


def test_going_back_a_release_gives_the_head_that_served_on_it(slots, releases):
    releases.install(slots, 1)
    personal = releases.promote(slots)
    releases.install(slots, 2)
    releases.promote(slots)
    releases.promote(slots)
    slots.collect_garbage()
    assert slots.rollback_release() == personal
    loads(slots, personal)
    with pytest.raises(RollbackRefusedError):
        slots.rollback_release()


def test_rolling_back_a_head_keeps_the_release_to_go_back_to(slots, releases):
    first = releases.install(slots, 1)
    releases.install(slots, 2)
    releases.promote(slots)
    assert slots.rollback().release == 2
    assert slots.rollback_release() == first


def test_a_personal_head_moves_to_a_new_release_and_back(slots, releases):
    first = releases.install(slots, 1, personal=True)
    second = releases.install(slots, 2, personal=True)
    assert (first.head, second.head) == (1, 2)
    assert slots.rollback() == first


def test_head_numbers_are_never_used_again(slots, releases):
    releases.install(slots, 1)
    releases.promote(slots)
    slots.rollback()
    slots.collect_garbage()
    assert number_of_heads(slots) == 0
    again = Slots(slots.root)
    assert again.write_head("a", releases.head) == 2


def important(head, scale):
    return Importance(head.weights, {key: np.full_like(value, scale) for key, value in head.weights.items()})


def test_what_ewc_holds_on_to_lies_beside_its_head_and_goes_with_it(slots, releases):
    first = releases.install(slots, 1)
    assert slots.importance(first) is None
    versions = [
        slots.promote(slots.write_head("a", releases.head, important(releases.head, scale)))
        for scale in (1.0, 2.0, 3.0)
    ]
    again = Slots(slots.root)
    for version, scale in zip(versions, (1.0, 2.0, 3.0), strict=True):
        assert {float(value.max()) for value in again.importance(version).fisher.values()} == {scale}
    again.collect_garbage()
    names = sorted(file.name for file in (slots.root / "a" / "heads").iterdir())
    assert names == ["0002.ewc.npz", "0002.npz", "0003.ewc.npz", "0003.npz"]
    assert again.importance(again.rollback()).fisher["b0"].max() == 2.0
    assert again.importance(again.promote(again.write_head("a", releases.head))) is None
    (slots.root / "a" / "heads" / "0002.ewc.npz").write_bytes(b"damaged")
    with pytest.raises(IntegrityError):
        again.importance(versions[1])


def test_a_kill_between_a_head_and_what_ewc_holds_on_to_leaves_neither(slots, releases, crash_hook):
    releases.install(slots, 1)

    def cut(point):
        if point == "renamed:0001.ewc.npz":
            raise PowerCut

    crash_hook(cut)
    with pytest.raises(PowerCut):
        slots.write_head("a", releases.head, important(releases.head, 1.0))
    crash_hook(None)
    again = Slots(slots.root)
    again.collect_garbage()
    assert number_of_heads(again) == 0
    assert again.importance(again.promote(again.write_head("a", releases.head))) is None


def test_only_heads_that_a_version_needs_are_kept(slots, releases):
    releases.install(slots, 1)
    for _ in range(4):
        releases.promote(slots)
    (slots.root / "a" / "heads" / "0009.npz.tmp").touch()
    (slots.root / "b.new").mkdir()
    slots.collect_garbage()
    assert sorted(file.name for file in slots.root.glob("a/heads/*")) == ["0003.npz", "0004.npz"]
    assert not (slots.root / "b.new").exists()
    for version in named(slots):
        loads(slots, version)


def test_boots_are_counted_until_a_healthy_step_and_over_restarts(slots, releases):
    releases.install(slots, 1)
    assert slots.count_boot() == 1
    again = Slots(slots.root)
    assert again.count_boot() == 2
    again.clear_boots()
    assert Slots(slots.root).count_boot() == 1
    releases.install(again, 2)
    assert again.pointer.boots == 0


def test_held_files_are_those_of_both_releases(slots, releases):
    releases.install(slots, 1)
    releases.install(slots, 2)
    held = slots.held_files()
    assert set(held) == set(releases.sources)
    assert held[releases.manifest.files[CARD].sha256] == slots.root / "b" / CARD
    shutil.rmtree(slots.root / "a")
    assert slots.held_files() == held


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_damaged_release_to_go_back_to_does_not_stop_the_next_one(slots, releases, damage):
    releases.install(slots, 1)
    releases.install(slots, 2)
    manifest = slots.root / "a" / MANIFEST_NAME
    if damage == "gone":
        manifest.unlink()
    else:
        manifest.write_bytes(b"{}")
    held = slots.held_files()
    assert {path.parent.name for path in held.values()} == {"b"}
    third = slots.stage(releases.data(3), held)[1]
    assert third.release == 3


# ---- bad input


def test_a_source_that_is_not_what_the_manifest_says_is_refused(slots, releases, tmp_path):
    version = releases.install(slots, 1)
    wrong = tmp_path / "wrong"
    digest = releases.manifest.files[TRUNK_INT8].sha256
    wrong.write_bytes(releases.sources[digest].read_bytes()[:-1] + b"\xff")
    before = slots.pointer
    with pytest.raises(IntegrityError, match=TRUNK_INT8):
        slots.stage(releases.data(2), releases.sources | {digest: wrong})
    assert slots.pointer == before
    loads(slots, version)
    assert [path.name for path in sorted(slots.root.iterdir())] == ["a", "pointer.json"]


def test_an_altered_manifest_is_not_the_one_that_was_installed(slots, releases):
    version = releases.install(slots, 1)
    (slots.root / "a" / MANIFEST_NAME).write_bytes(releases.data(7))
    with pytest.raises(IntegrityError, match="not the one that was installed"):
        slots.manifest(version)


def test_a_damaged_head_is_an_integrity_error(slots, releases):
    releases.install(slots, 1)
    version = releases.promote(slots)
    (slots.root / "a" / "heads" / "0001.npz").write_bytes(b"PK")
    with pytest.raises(IntegrityError):
        slots.head(version)


def test_sources_are_copied_when_they_may_not_be_shared(slots, releases):
    slots.stage(releases.data(1), releases.sources, link=False)
    for name, entry in releases.manifest.files.items():
        assert not (slots.root / "a" / name).samefile(releases.sources[entry.sha256])


def test_sources_on_another_disk_are_copied(slots, releases, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    loads(slots, releases.install(slots, 1))


@pytest.mark.parametrize("operation", ["link", "mkdir"])
def test_a_full_disk_leaves_the_serving_version_and_a_later_try_succeeds(slots, releases, monkeypatch, operation):
    version = releases.install(slots, 1)
    before = slots.pointer

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(DiskFullError):
            releases.stage(slots, 2)
    assert slots.pointer == before
    loads(slots, version)
    loads(slots, releases.install(slots, 2))


def test_a_full_disk_refuses_a_head_with_a_typed_error(slots, releases, monkeypatch):
    releases.install(slots, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(DiskFullError):
            slots.write_head("a", releases.head)
    assert slots.write_head("a", releases.head) == 1


def test_a_folder_that_cannot_be_written_gives_a_typed_error(slots, releases, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="release 1 cannot be staged"):
        releases.stage(slots, 1)


def test_a_damaged_pointer_is_made_anew_from_the_slots(slots, releases):
    releases.install(slots, 1)
    releases.promote(slots)
    releases.install(slots, 2)
    (slots.root / "pointer.json").write_bytes(b"\xff")
    again = Slots(slots.root)
    assert (again.pointer.current.release, again.pointer.previous.release) == (2, 1)
    assert again.pointer.heads == 1
    for version in named(again):
        loads(again, version)
    assert Slots(slots.root).pointer == again.pointer


def test_a_damaged_pointer_over_damaged_slots_leaves_what_verifies(slots, releases):
    releases.install(slots, 1)
    releases.install(slots, 2)
    (slots.root / "b" / CARD).unlink()
    (slots.root / "pointer.json").write_bytes(b"{")
    again = Slots(slots.root)
    assert again.pointer.current.release == 1
    assert again.pointer.previous is None


# ---- any sequence of changes


class Changes(RuleBasedStateMachine):
    """What `Slots` promises, against a model that remembers where one may go back to."""

    releases: Releases

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.slots = Slots(self.folder / "slots")
        self.newest = 0
        self.previous = self.fallback = None

    def teardown(self):
        shutil.rmtree(self.folder)

    @property
    def current(self):
        return self.slots.pointer.current

    @initialize()
    def first(self):
        self.newest = 1
        self.releases.install(self.slots, 1)

    @rule(personal=st.booleans())
    def install(self, personal):
        self.newest += 1
        before = self.current
        after = self.releases.install(self.slots, self.newest, personal=personal)
        assert self.current == after
        assert after.slot != before.slot
        self.previous = self.fallback = before

    @rule()
    def stage_and_fail(self):
        before = self.current
        slot = self.releases.stage(self.slots, self.newest + 1)
        assert self.current == before
        self.previous = None if self.previous and self.previous.slot == slot else self.previous
        self.fallback = None

    @rule()
    def promote(self):
        before = self.current
        self.releases.promote(self.slots)
        assert self.current.head > before.head
        self.previous = before

    @rule()
    def promote_own_head(self):
        before = self.current
        assert self.slots.promote(0).head == 0
        self.previous = before

    @precondition(lambda self: self.previous is not None)
    @rule()
    def rollback(self):
        other = self.previous.slot != self.current.slot
        assert self.slots.rollback() == self.previous == self.current
        self.previous = None
        self.fallback = None if other else self.fallback

    @precondition(lambda self: self.fallback is not None)
    @rule()
    def rollback_release(self):
        assert self.slots.rollback_release() == self.fallback == self.current
        self.previous = self.fallback = None

    @precondition(lambda self: self.previous is None)
    @rule()
    def rollback_is_refused(self):
        with pytest.raises(RollbackRefusedError):
            self.slots.rollback()

    @precondition(lambda self: self.fallback is None)
    @rule()
    def rollback_release_is_refused(self):
        with pytest.raises(RollbackRefusedError):
            self.slots.rollback_release()

    @rule()
    def collect_garbage(self):
        self.slots.collect_garbage()
        kept = {(version.slot, version.head) for version in named(self.slots) if version.head}
        assert number_of_heads(self.slots) == len(kept)

    @rule()
    def boot(self):
        assert self.slots.count_boot() >= 1
        self.slots.clear_boots()

    @rule()
    def reopen(self):
        before = self.slots.pointer
        self.slots = Slots(self.slots.root)
        assert self.slots.pointer == before

    @invariant()
    def all_that_is_named_loads(self):
        for version in named(self.slots):
            assert self.slots.manifest(version).release == version.release
            assert self.slots.head(version).weights

    @invariant()
    def one_can_go_back_to_where_one_came_from(self):
        assert self.slots.pointer.previous == self.previous
        assert self.slots.pointer.fallback == self.fallback


def test_no_sequence_of_changes_leaves_a_pointer_to_something_missing(releases):
    class OnReleases(Changes):
        pass

    OnReleases.releases = releases
    run_state_machine_as_test(
        OnReleases,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


# ---- a power cut at any instant


def started(root, releases):
    """Release 1 with a personal head in slot a, then release 2 with two in slot b, serving."""
    slots = Slots(root)
    releases.install(slots, 1)
    releases.promote(slots)
    releases.install(slots, 2)
    releases.promote(slots)
    releases.promote(slots)
    return slots


CHANGES = {
    "install": lambda slots, releases: releases.install(slots, 3),
    "install with a personal head": lambda slots, releases: releases.install(slots, 3, personal=True),
    "promote": lambda slots, releases: releases.promote(slots),
    "rollback": lambda slots, _: slots.rollback(),
    "rollback of the release": lambda slots, _: slots.rollback_release(),
    "count a boot": lambda slots, _: slots.count_boot(),
}


def cut_at(nth, seen, root, copy):
    """A hook that ends the process at the nth crash point; `copy` is what was on disk at that instant."""

    def hook(name):
        seen.append(name)
        if len(seen) == nth:
            if root.exists():
                shutil.copytree(root, copy)
            raise PowerCut(name)

    return hook


def still_serves(root, allowed, change, releases):
    slots = Slots(root)
    assert slots.pointer.current in allowed
    for version in named(slots):
        loads(slots, version)
    slots.collect_garbage()
    for version in named(slots):
        loads(slots, version)
    if slots.pointer.current == allowed[0] and slots.pointer.previous is not None:
        change(slots, releases)
        loads(slots, slots.pointer.current)


@pytest.mark.parametrize("name", CHANGES)
def test_a_power_cut_at_any_instant_leaves_the_old_version_or_the_new(releases, tmp_path, crash_hook, name):
    change = CHANGES[name]
    whole = started(tmp_path / "whole", releases)
    old = whole.pointer.current
    points = []
    crash_hook(points.append)
    change(whole, releases)
    crash_hook(None)
    allowed = [old, whole.pointer.current]
    assert len(points) >= 2
    for nth in range(1, len(points) + 1):
        root, copy, seen = tmp_path / f"{nth}", tmp_path / f"{nth}-cut", []
        slots = started(root, releases)
        crash_hook(cut_at(nth, seen, root, copy))
        with pytest.raises(PowerCut):
            change(slots, releases)
        crash_hook(None)
        assert seen[:nth] == points[:nth]
        still_serves(copy, allowed, change, releases)  # as the disk was at that instant
        still_serves(root, allowed, change, releases)  # as it is if the process could still tidy up


def test_a_power_cut_during_the_first_install_leaves_nothing_or_the_release(releases, tmp_path, crash_hook):
    points = []
    crash_hook(points.append)
    new = releases.install(Slots(tmp_path / "whole"), 1)
    for nth in range(1, len(points) + 1):
        root, copy = tmp_path / f"{nth}", tmp_path / f"{nth}-cut"
        crash_hook(cut_at(nth, [], root, copy))
        with pytest.raises(PowerCut):
            releases.install(Slots(root), 1)
        crash_hook(None)
        slots = Slots(copy)
        assert slots.pointer.current in (None, new)
        slots.collect_garbage()
        if slots.pointer.current is None:
            releases.install(slots, 1)
        loads(slots, new)
