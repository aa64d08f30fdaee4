"""Releases come, prove themselves or are left; what was learned survives where it can."""

import shutil

import msgspec
import numpy as np
import pytest

from edge_quantize import Dataset, repack_checkpoint
from edge_sdk.config import UpdateConfig
from edge_sdk.experience import meaning_of_outputs
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head
from edge_sdk.manifest import (
    HEAD_NPZ,
    MANIFEST_NAME,
    Manifest,
    TargetSpec,
    describe_folder,
    manifest_bytes,
    parse_manifest,
)
from edge_sdk.schema import InputSpec
from edge_sdk.transport import MemoryTransport
from edge_sdk.upgrade import Upgrade

pytestmark = pytest.mark.torch


@pytest.fixture
def online(make_device, publisher):
    """Opens connected devices."""

    def make(**settings):
        settings.setdefault("update", UpdateConfig(trust="none", min_free_bytes=0))
        device = make_device(transport=MemoryTransport(publisher.transport._broker), **settings)
        device.connect()
        return device

    return make


def settle(device, publisher, *, turns=60):
    """Step and serve until nothing is on its way."""
    for _ in range(turns):
        report = device.step()
        assert report.problem == ""
        publisher.pump()
        if device.status().fetching is None and not report.received and not report.swapped:
            return
    pytest.fail("the device never settles")


@pytest.fixture(scope="module")
def repack(checkpoint, digits, tmp_path_factory):
    """Makes a release on the first one's trunk: `repack(2, head)`."""
    base = digits.factory.only(set(range(8)))
    data = Dataset(base.x[:480], base.y[:480], base.x[480:], base.y[480:])

    def make(release, head=None):
        target = tmp_path_factory.mktemp("repacked") / f"release-{release}"
        head = head or Head.load(checkpoint / HEAD_NPZ)
        repack_checkpoint(checkpoint, target, head=head, data=data, release=release, created="2026-02-01T00:00:00Z")
        return target

    return make


@pytest.fixture(scope="module")
def same_trunk(repack):
    return repack(2)


@pytest.fixture(scope="module")
def bad(repack, checkpoint):
    """Release 2 on the same trunk, with every label moved to its neighbour: it passes its self-test all the same."""
    head = Head.load(checkpoint / HEAD_NPZ)
    return repack(2, Head({key: np.roll(value, 1, axis=-1) for key, value in head.weights.items()}, head.labels))


@pytest.fixture
def altered(other_trunk, tmp_path):
    """Makes a release 2 one of whose files was altered before it was described: every hash is right."""

    def make(name, change):
        folder = shutil.copytree(other_trunk, tmp_path / "altered")
        arrays = load_npz(folder / name)
        change(arrays)
        (folder / name).write_bytes(npz_bytes(arrays))
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
        entries = describe_folder(folder, tuple(manifest.files))
        (folder / MANIFEST_NAME).write_bytes(manifest_bytes(msgspec.structs.replace(manifest, files=entries)))
        return folder

    return make


@pytest.fixture
def lying(altered):
    """Release 2 whose stored outputs no machine reproduces."""

    def lie(arrays):
        for variant in ("int8", "fp32"):
            arrays[f"out.{variant}"] = 255 - arrays[f"out.{variant}"]

    return altered("selftest.npz", lie)


def events(device, name):
    return [entry.detail for entry in device.history(limit=2_000) if entry.name == name]


def feed(device, pool, count):
    for i in range(count):
        prediction = device.predict(pool.x[i % len(pool.y)])
        device.observe(prediction.id, str(pool.y[i % len(pool.y)]))


def tilt(device, seed=1):
    """Let a personal head serve that is nearly the release's own, as learning would; returns it."""
    current = device._slots.pointer.current
    head = device._slots.head(current)
    bias = np.random.default_rng(seed).normal(0, 1e-3, head.weights["b0"].shape).astype(np.float32)
    head = Head({**head.weights, "b0": head.weights["b0"] + bias}, head.labels)
    device._slots.promote(device._slots.write_head(current.slot, head))
    assert device.step().swapped
    return head


def crash(device):
    """What a killed process leaves behind: no last step, and its locks and files closed."""
    device._stopped = True
    device._files.close()


# ---- from a folder


def test_a_newer_checkpoint_of_the_app_is_installed_at_the_start(make_device, other_trunk, digits):
    make_device().stop()
    device = make_device(checkpoint=other_trunk)
    assert device.predict(digits.life.x[0]).release == 2
    assert [detail["release"] for detail in events(device, "release_activated")] == [1, 2]
    assert device.status().release_on_probation


def test_a_folder_that_is_no_newer_stays_unused_and_the_log_says_so(make_device, other_trunk, checkpoint, caplog):
    make_device(checkpoint=other_trunk).stop()
    make_device(checkpoint=other_trunk).stop()
    assert "stays unused" not in caplog.text  # it is the one in use
    assert make_device(checkpoint=checkpoint).version.release == 2
    assert "release 1 stays unused: release 2 serves, only a higher one replaces it" in caplog.text


def test_a_folder_that_fails_its_self_test_leaves_the_release_in_use(make_device, lying, digits):
    make_device().stop()
    for _ in range(2):
        device = make_device(checkpoint=lying)
        assert device.predict(digits.life.x[0]).release == 1
        assert "self-test" in events(device, "release_refused")[-1]["reason"]
        device.stop()


# ---- over the network


def test_an_offered_release_is_fetched_checked_and_served(online, publisher, other_trunk, digits):
    device = online()
    publisher.desire(publisher.add(other_trunk))
    settle(device, publisher)
    assert device.predict(digits.life.x[0]).release == 2
    assert events(device, "release_activated")[-1]["previous"] == 1
    assert not list((device._home / "incoming").iterdir())


def test_a_device_without_a_release_takes_its_first_from_the_coordinator(online, publisher, checkpoint, digits):
    device = online(checkpoint=None)
    publisher.desire(publisher.add(checkpoint))
    settle(device, publisher)
    assert device.predict(digits.life.x[0]).release == 1


def test_a_release_on_the_same_trunk_fetches_no_trunk(online, publisher, same_trunk):
    device = online()
    publisher.desire(publisher.add(same_trunk))
    settle(device, publisher)
    assert device.status().release == 2
    files = parse_manifest((same_trunk / MANIFEST_NAME).read_bytes()).files
    assert files["trunk.int8.onnx"].sha256 not in publisher.needs


def test_altered_blocks_fail_the_release_once_and_serving_goes_on(online, publisher, other_trunk, digits):
    device = online()
    offer = publisher.add(other_trunk)
    digest = parse_manifest((other_trunk / MANIFEST_NAME).read_bytes()).files["trunk.int8.onnx"].sha256
    publisher.blobs[digest] = b"\0" + publisher.blobs[digest][1:]
    publisher.desire(offer)
    settle(device, publisher)
    (failed,) = events(device, "release_failed")
    assert failed["release"] == 2
    assert "SHA-256" in failed["reason"]
    assert device.predict(digits.life.x[0]).release == 1
    assert_never_tried_again(device, publisher, offer)


def test_one_altered_block_is_fetched_again_and_the_release_is_taken(online, publisher, other_trunk):
    device = online()
    publisher.desire(publisher.add(other_trunk))
    digest = parse_manifest((other_trunk / MANIFEST_NAME).read_bytes()).files["trunk.int8.onnx"].sha256
    good = publisher.blobs[digest]
    publisher.blobs[digest] = b"\0" + good[1:]
    for _ in range(60):
        device.step()
        publisher.pump()
        if digest in publisher.needs:
            publisher.blobs[digest] = good
    settle(device, publisher)
    assert device.status().release == 2


def test_a_failed_self_test_fails_the_release_once_and_serving_goes_on(online, publisher, lying, digits):
    device = online()
    offer = publisher.add(lying)
    publisher.desire(offer)
    settle(device, publisher)
    (failed,) = events(device, "release_failed")
    assert failed["release"] == 2
    assert "self-test" in failed["reason"]
    assert device.predict(digits.life.x[0]).release == 1
    assert_never_tried_again(device, publisher, offer)
    device.stop()
    device = online()  # not after a restart either
    assert_never_tried_again(device, publisher, offer)


def assert_never_tried_again(device, publisher, offer):
    asked = len(publisher.needs)
    publisher.desire(offer)
    settle(device, publisher)
    assert len(publisher.needs) == asked
    assert len(events(device, "release_failed")) == 1
    assert device.status().release == 1


UNUSABLE = {
    "no memory": ("memory.npz", lambda arrays: arrays.pop("latents")),
    "memory of another width": ("memory.npz", lambda arrays: arrays.update(latents=arrays["latents"][:, :-1])),
    "memory of other numbers": ("memory.npz", lambda arrays: arrays.update(latents=arrays["latents"] / 2)),
    "memory of unknown labels": ("memory.npz", lambda arrays: arrays.update(labels=arrays["labels"] + 100)),
    "memory of fewer labels": ("memory.npz", lambda arrays: arrays.update(labels=arrays["labels"][:-1])),
    "no importance": ("fisher.npz", lambda arrays: arrays.pop("b0")),
    "importance of another head": ("fisher.npz", lambda arrays: arrays.update(W0=arrays["W0"][:-1])),
    "importance without numbers": ("fisher.npz", lambda arrays: arrays.update(b0=np.full_like(arrays["b0"], np.nan))),
    "no reference": ("reference.npz", lambda arrays: arrays.pop("input_mean")),
    "reference of other inputs": ("reference.npz", lambda arrays: arrays.update(edges=arrays["edges"][:-1])),
    "reference of other labels": (
        "reference.npz",
        lambda arrays: arrays.update(output_mean=arrays["output_mean"][:-1]),
    ),
    "reference of a mean of no range": ("reference.npz", lambda arrays: arrays.update(input_std=np.zeros(0))),
    "head of other labels": ("head.npz", lambda arrays: arrays.update(labels=arrays["labels"][::-1])),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_release_that_could_not_be_lived_with_is_never_activated(online, publisher, altered, digits, what):
    offer = publisher.add(altered(*UNUSABLE[what]))
    device = online()
    publisher.desire(offer)
    settle(device, publisher)
    assert [detail["release"] for detail in events(device, "release_failed")] == [2]
    assert device.predict(digits.life.x[0]).release == 1
    feed(device, digits.life, 3)
    assert device.step().labelled == 3
    assert device.status().problem == ""


def test_an_older_offer_is_refused_and_recorded_once(online, publisher, checkpoint, other_trunk, digits):
    device = online(checkpoint=other_trunk)
    offer = publisher.add(checkpoint)
    for _ in range(3):
        publisher.desire(offer)
        settle(device, publisher)
    (refused,) = events(device, "release_refused")
    assert "release 1 is older than the installed 2" in refused["reason"]
    assert not publisher.needs
    assert device.predict(digits.life.x[0]).release == 2


def test_a_revoked_release_is_left_for_the_one_before_with_its_head(online, publisher, other_trunk, digits):
    device = online(update=UpdateConfig(trust="none", min_free_bytes=0, shadow_rows=0))
    tilt(device)
    before = device.predict(digits.life.x[0])
    offer = publisher.add(other_trunk)
    publisher.desire(offer)
    settle(device, publisher)
    assert device.status().release == 2
    publisher.desire(None, revoked=[2])
    settle(device, publisher)
    after = device.predict(digits.life.x[0])
    assert (after.release, after.head) == (1, before.head)
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    (left,) = events(device, "release_rolled_back")
    assert (left["release"], left["to"], left["reason"]) == (2, 1, "revoked by the coordinator")
    publisher.desire(offer)  # even if somebody offers it again
    settle(device, publisher)
    assert device.status().release == 1


def test_a_revoked_release_without_a_way_back_serves_on_and_takes_a_newer_one(online, publisher, other_trunk, digits):
    device = online()
    publisher.desire(None, revoked=[1])
    settle(device, publisher)
    settle(device, publisher)
    assert device.predict(digits.life.x[0]).release == 1
    assert len(events(device, "rollback_refused")) == 1
    publisher.desire(publisher.add(other_trunk), revoked=[1])
    settle(device, publisher)
    assert device.predict(digits.life.x[0]).release == 2


# ---- the personal head


def test_a_personal_head_stays_on_the_same_trunk(online, publisher, same_trunk, digits):
    device = online()
    tilt(device)
    before = device.predict(digits.life.x[0])
    publisher.desire(publisher.add(same_trunk))
    settle(device, publisher)
    after = device.predict(digits.life.x[0])
    assert after.release == 2
    assert after.head > before.head
    np.testing.assert_allclose(after.probabilities, before.probabilities, atol=1e-6)
    detail = events(device, "release_activated")[-1]
    assert detail["carried"]
    assert detail["head"].startswith("kept: personal head")


def test_a_personal_head_is_dropped_on_another_trunk_and_the_reason_is_told(online, publisher, other_trunk):
    device = online(update=UpdateConfig(trust="none", min_free_bytes=0, shadow_rows=0))
    tilt(device)
    publisher.desire(publisher.add(other_trunk))
    settle(device, publisher)
    assert (device.status().release, device.status().head) == (2, 0)
    detail = events(device, "release_activated")[-1]
    assert not detail["carried"]
    assert detail["head"] == "dropped: the new release has another trunk"


# ---- probation


def test_a_release_that_does_worse_in_use_is_left(make_device, bad, digits):
    known = digits.life.only(set(range(8)))
    device = make_device(mode="monitor")
    feed(device, known, 60)
    device.stop()
    device = make_device(mode="monitor", checkpoint=bad)
    assert device.status().release == 2
    for _ in range(5):
        feed(device, known, 20)
        assert device.step().problem == ""
    assert device.predict(known.x[0]).release == 1
    (left,) = events(device, "release_rolled_back")
    assert (left["release"], left["to"]) == (2, 1)
    assert "live accuracy" in left["reason"]
    device.stop()
    assert make_device(mode="monitor", checkpoint=bad).status().release == 1


def test_a_release_that_does_as_well_is_confirmed(make_device, same_trunk, digits):
    known = digits.life.only(set(range(8)))
    device = make_device(mode="monitor")
    feed(device, known, 60)
    device.stop()
    device = make_device(mode="monitor", checkpoint=same_trunk)
    feed(device, known, 120)
    device.step()
    status = device.status()
    assert (status.release, status.release_on_probation) == (2, False)
    assert len(events(device, "release_confirmed")) == 1


def test_a_release_that_keeps_crashing_the_app_is_left_after_the_allowed_starts(make_device, other_trunk):
    update = UpdateConfig(max_boots=3)
    make_device().stop()
    crash(make_device(checkpoint=other_trunk, update=update))
    for _ in range(update.max_boots):
        device = make_device(checkpoint=other_trunk, update=update)
        assert device.status().release == 2
        crash(device)
    device = make_device(checkpoint=other_trunk, update=update)
    assert device.status().release == 1
    (left,) = events(device, "release_rolled_back")
    assert left["reason"] == "3 starts without a healthy step"


def test_a_healthy_step_forgets_the_crashes_before_it(make_device, other_trunk):
    update = UpdateConfig(max_boots=3)
    make_device().stop()
    for _ in range(3):
        for _ in range(2):
            crash(make_device(checkpoint=other_trunk, update=update))
        device = make_device(checkpoint=other_trunk, update=update)
        assert device.step().problem == ""
        crash(device)
    assert make_device(checkpoint=other_trunk, update=update).status().release == 2


def test_a_damaged_release_with_a_learned_head_is_left_for_the_release_before(make_device, other_trunk, digits):
    make_device().stop()
    device = make_device(checkpoint=other_trunk)
    tilt(device)
    folder = device._slots.folder(device._slots.pointer.current)
    device.stop()
    (folder / "trunk.int8.onnx").write_bytes(b"worn out")
    again = make_device(checkpoint=None)
    assert again.predict(digits.life.x[0]).release == 1
    assert [detail["release"] for detail in events(again, "release_rolled_back")] == [2]
    assert events(again, "head_rolled_back") == []


def test_ids_of_predictions_that_went_with_their_trunk_are_free_again(online, publisher, build, other_trunk, digits):
    device = online()
    device.predict(digits.life.x[0], id="order-7")
    device.step()
    for folder in (other_trunk, build(release=3, seed=2)):  # the second takes the slot of the first release
        publisher.desire(publisher.add(folder))
        settle(device, publisher)
    assert device.status().release == 3
    assert device.predict(digits.life.x[0], id="order-7").id == "order-7"


# ---- what a personal head can be carried over to


@pytest.mark.parametrize(
    ("task", "next_release", "reason"),
    [
        ("classification", {}, "kept: personal head"),
        ("classification", {"labels": ("a", "b", "c", "d")}, "kept: personal head"),
        ("classification", {"hidden": (8,)}, "dropped: the new release's head has other outputs or hidden layers"),
        ("multilabel", {}, "kept: personal head"),
        ("multilabel", {"labels": ("b", "a", "c")}, "dropped: the new release's head has other outputs"),
        ("multilabel", {"labels": ("a", "b")}, "dropped: the new release's head has other outputs"),
        ("regression", {"labels": ("a", "b")}, "dropped: the new release's head has other outputs"),
        ("multilabel", {"task": "classification"}, "dropped: the new release's head has other outputs"),
    ],
)
def test_a_personal_head_is_carried_where_its_outputs_mean_the_same(rig, monkeypatch, task, next_release, reason):
    made = rig(task=task)
    made.slots.promote(made.slots.write_head("a", made.head))
    made.add(5, "judge", moved=False)
    manifest = made.write(made.slots.root / "b", **{"task": task, "labels": ("a", "b", "c"), **next_release})
    monkeypatch.setattr(made.slots, "manifest", lambda version: made.manifest)
    upgrade = Upgrade(store=made.store, slots=made.slots, client=None, config=made.config, emit=made.emit)
    rebase = upgrade._rebase("b", manifest, made.adaptation)
    assert rebase.reason.startswith(reason)
    assert (rebase.head is not None) == reason.startswith("kept")


def test_values_in_another_unit_are_other_outputs():
    def release(mean, std, tolerance):
        return Manifest(
            name="m", release=1, created="", task="regression", labels=["t"], input=InputSpec(shape=[1]), files={},
            targets=[TargetSpec(mean, std, tolerance)],
        )  # fmt: skip

    assert meaning_of_outputs(release(0, 1, 0.5)) == meaning_of_outputs(release(0, 1, 0.7))
    for other in (release(1, 1, 0.5), release(0, 2, 0.5)):
        assert meaning_of_outputs(other) != meaning_of_outputs(release(0, 1, 0.5))
