"""What devices learn of every kind of model that learns, and what becomes of it with the next release."""

from __future__ import annotations

import copy
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_quantize import Dataset, repack_checkpoint
from edge_sdk.config import UpdateConfig
from edge_sdk.errors import IncompatibleError, InputError
from edge_sdk.head import Head
from edge_sdk.manifest import (
    HEAD_NPZ,
    MANIFEST_NAME,
    digest_of,
    parse_manifest,
)
from edge_sdk.messages import (
    Desired,
    Need,
    Offer,
    Topics,
    block_count,
    decode,
    encode,
    from_bitmap,
)
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
CREATED = "2026-01-01T00:00:00Z"
BLOCK = 16 * 1024


@pytest.fixture
def adapting(make_device, config):
    """Opens a device for a change: `adapting(change, learn={...})`."""

    def make(change, home="device", *, checkpoint=None, **sections):
        changed = {
            name: msgspec.structs.replace(
                getattr(config, name), **change.settings.get(name, {}), **sections.get(name, {})
            )
            for name in {*change.settings, *sections}
        }
        return make_device(home, checkpoint=checkpoint or change.folder, variant="auto", **changed)

    return make


def live(device, clock, x, truths, *, ticks, until=lambda device: False):
    """Rows and their truths, over and over, until something is so."""
    for tick in range(ticks):
        clock.advance(300)
        rows = np.arange(tick * 40, tick * 40 + 40) % len(x)
        for prediction, row in zip(device.predict_batch(x[rows]), rows, strict=True):
            device.observe(prediction.id, truths[row])
        assert device.step().problem == ""
        if until(device):
            break
    return device


def has_learned(device):
    status = device.status()
    return status.counters.promotions > 0 and status.phase == "idle" and (status.accuracy or 0) >= 0.65


@pytest.mark.parametrize(
    ("name", "fall", "rise", "forgets"),
    [("multilabel", 0.2, 0.1, 0.03), ("sensor", 0.3, 0.3, 0.05), ("regression", 0.8, 0.5, 1)],
)
def test_device_follows_its_world_and_takes_what_it_learned_to_the_next_release_on_the_same_trunk(
    change_of, adapting, clock, tmp_path, name, fall, rise, forgets
):
    change = change_of(name)
    device = adapting(change)
    before, drifted = device.evaluate(change.then, change.answers), device.evaluate(change.now, change.answers)
    assert drifted <= before - fall

    live(device, clock, change.x, change.truths, ticks=40, until=has_learned)

    learned = device.evaluate(change.now, change.answers)
    assert learned >= drifted + rise
    assert device.evaluate(change.then, change.answers) >= before - forgets
    status = device.status()
    assert status.counters.promotions >= 1
    promoted = [entry for entry in device.lineage() if entry.outcome == "promoted"]
    assert promoted[-1].head == status.head
    assert all(entry.detail["evidence"] >= 1 / entry.detail["alpha"] for entry in promoted)
    device.stop()

    again = adapting(change)  # after a restart
    assert (again.status().head, again.evaluate(change.now, change.answers)) == (status.head, learned)
    again.stop()

    following, other = tmp_path / "release-2", tmp_path / "release-3"
    repack_checkpoint(
        change.folder, following, head=Head.load(change.folder / HEAD_NPZ), release=2, created=CREATED,
        data=change.kind.data,
    )  # fmt: skip
    updated = adapting(change, checkpoint=following)
    assert updated.status().release == 2
    assert carried(updated) == (True, "kept: personal head")
    assert updated.evaluate(change.now, change.answers) == learned
    assert updated.status().judge_rows + updated.status().replay_rows > 0
    updated.stop()

    replace(change.kind, model=retrained(change.kind.model)).build(other, release=3)
    anew = adapting(change, checkpoint=other, update={"shadow_rows": 0})  # without a time beside the old trunk
    assert (anew.status().release, anew.status().head) == (3, 0)
    assert carried(anew) == (False, "dropped: the new release has another trunk")
    assert anew.evaluate(change.now, change.answers) == pytest.approx(drifted, abs=0.05)


def carried(device):
    """Whether the last release took the personal head along, and the beginning of why."""
    (*_, detail) = [entry.detail for entry in device.history(limit=1_000) if entry.name == "release_activated"]
    return detail["carried"], detail["head"].partition(" 0.")[0]


def retrained(net):
    """As good a network, with another trunk."""
    import torch

    changed = copy.deepcopy(net)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.01)
    return changed


@pytest.mark.parametrize("name", ["classification_none", "raw", "recurrent"])
def test_feedback_to_a_model_that_does_not_learn_is_counted_and_can_be_forgotten(pack, make_device, name, ask):
    packed = pack(name)
    device = make_device(checkpoint=packed.folder, holdout_share=0.5)
    said = ask(device, packed.rows(20))
    labelled = 0
    if packed.kind.truth is not None:
        labelled = 10
        for prediction, y in zip(said[:8], packed.kind.data.holdout_y, strict=False):
            device.observe(prediction.id, packed.kind.truth(y))
        device.reward(said[8].id, 1.0)
        device.reward(said[9].id, 0.0)
    with pytest.raises((IncompatibleError, InputError)):
        device.learn(np.stack(packed.rows(2)), ["any", "any"])
    device.learn_now()
    report = device.step()
    assert (report.labelled, report.problem) == (labelled, "")
    status = device.status()
    assert (status.fresh_rows, status.judge_rows, status.phase) == (0, 0, "idle")
    assert (device.label_requests(5), device.lineage(), device.skew().training.rows) == ([], [], 0)
    assert device.forget([prediction.id for prediction in said[10:15]]) == 5
    assert device.forget_all().head == 0
    assert device._store.read("SELECT count(*) FROM rows") == [(0,)]
    assert device.predict(packed.kind.data.holdout_x[0]).release == 1
    assert device.step().problem == ""


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_a_world_that_contradicts_the_factory_s_is_not_learned_unless_that_may_be_forgotten(
    pack, make_device, clock, name
):
    packed = pack(name)
    device = make_device(checkpoint=packed.folder, variant="auto")
    off = np.resize(np.array([1, 0.5, 0, 0, 0], np.float32), packed.kind.data.train_x.shape[1])
    truths = [packed.kind.truth(y) for y in packed.kind.data.train_y]
    live(device, clock, packed.kind.data.train_x + off, truths, ticks=10)
    rejected = [entry.detail["reason"] for entry in device.lineage() if entry.outcome == "rejected"]
    assert rejected
    assert all(reason.startswith("forgets: ") for reason in rejected)
    assert device.status().head == 0


@pytest.mark.parametrize(
    ("learning", "learned"),
    [
        ({"learner": "sgd", "ewc_lambda": 0.0, "passes": 60}, False),
        ({"learner": "sgd", "ewc_lambda": 0.0, "passes": 60, "loss": "huber", "huber_delta": 0.3}, True),
        ({"learner": "hybrid", "filter_share": 0.2}, True),
    ],
    ids=["squared", "huber", "filtered"],
)
def test_regression_learns_although_every_tenth_truth_is_far_off(change_of, adapting, clock, learning, learned):
    change = change_of("regression")
    device = adapting(change, learn=learning)
    stds = [target.std for target in device._served.manifest.targets]
    truths = [
        truth if i % 10 else [value + 10 * std for value, std in zip(truth, stds, strict=True)]
        for i, truth in enumerate(change.truths)
    ]
    live(device, clock, change.x, truths, ticks=25)
    assert (device.evaluate(change.now, change.answers) >= 0.4) == learned


def test_device_learns_a_digit_that_it_never_saw_and_takes_it_to_the_next_release(
    make_device, checkpoint, digits, clock, tmp_path
):
    known, eights = digits.score.only(set(range(8))), digits.score.only({8})
    names = [str(y) for y in known.y]
    pool = digits.life.only(set(range(9)))
    device = make_device()
    before = device.evaluate(known.x, names)
    assert "8" not in device.labels

    truths = [str(y) for y in pool.y]
    live(device, clock, pool.x, truths, ticks=10)
    assert device.status().new_labels["8"] >= 20
    device.learn_now()
    live(device, clock, pool.x, truths, ticks=20, until=has_learned)

    assert device.labels == (*(str(i) for i in range(8)), "8")
    learned = device.evaluate(eights.x, ["8"] * len(eights.y)), device.evaluate(known.x, names)
    assert learned[0] >= 0.8
    assert learned[1] >= before - 0.03
    device.stop()
    base = digits.factory.only(set(range(8)))
    repack_checkpoint(
        checkpoint, tmp_path / "release-2", head=Head.load(checkpoint / HEAD_NPZ), release=2, created=CREATED,
        data=Dataset(base.x[:480], base.y[:480], base.x[480:], base.y[480:]),
    )  # fmt: skip
    updated = make_device(checkpoint=tmp_path / "release-2")
    assert updated.status().release == 2
    assert carried(updated) == (True, "kept: personal head")
    assert updated.labels[-1] == "8"
    assert (updated.evaluate(eights.x, ["8"] * len(eights.y)), updated.evaluate(known.x, names)) == learned


# ---- releases between adapt levels


class Publisher:
    """Says what the group should run, and answers requests for blocks."""

    def __init__(self):
        self.broker, self.topics = MemoryBroker(), Topics()
        self.transport = MemoryTransport(self.broker)
        self.transport.subscribe(self.topics.up("+", "need"))
        self.transport.connect()
        self.blobs, self.revision = {}, 0

    def publish(self, folder):
        self.blobs |= {digest_of(path.read_bytes()): path.read_bytes() for path in folder.iterdir()}
        data = (folder / MANIFEST_NAME).read_bytes()
        self.revision += 1
        desired = Desired(
            revision=self.revision, base=Offer(parse_manifest(data).release, digest_of(data), len(data)),
            candidate=None, salt="", threshold=0, revoked=[], block_bytes=BLOCK,
        )  # fmt: skip
        self.transport.publish(self.topics.desired("default"), encode(desired), retain=True)

    def pump(self):
        for message in self.transport.receive():
            need = decode(message.payload, Need)
            data = self.blobs[need.digest]
            for i in sorted(from_bitmap(need.blocks, block_count(need.size, BLOCK))):
                self.transport.publish(self.topics.block(need.digest, i), data[i * BLOCK : (i + 1) * BLOCK])


def test_releases_of_other_adapt_levels_come_over_the_network_without_a_gap_in_serving(
    pack, make_device, clock, tmp_path
):
    """Head, then none, then head again, on the same rows."""
    kind = pack("classification_none").kind
    levels = ("head", "none", "head")
    folders = [tmp_path / f"release-{release}" for release in (1, 2, 3)]
    for release, (folder, level) in enumerate(zip(folders, levels, strict=True), start=1):
        kind.build(folder, release=release, adapt=level, parent=folders[release - 2] if release > 1 else None)
    publisher = Publisher()
    device = make_device(
        checkpoint=folders[0],
        transport=MemoryTransport(publisher.broker),
        update=UpdateConfig(trust="none", min_free_bytes=0),
    )
    device.connect()
    rows, said = list(zip(kind.data.holdout_x, kind.data.holdout_y, strict=True)), []
    for release, folder in enumerate(folders, start=1):
        if release > 1:
            publisher.publish(folder)
        for turn in range(40):
            for row, y in rows[turn * 6 : turn * 6 + 6]:
                prediction = device.predict(row)
                device.observe(prediction.id, kind.truth(y))
                said.append(prediction.release)
            clock.advance(5)
            assert device.step().problem == ""
            publisher.pump()
        status = device.status()
        assert status.release == release
        assert ("served, not learned on" in status.waits) == (levels[release - 1] == "none"), status.waits
        assert status.accuracy >= 0.85
        assert bool(status.fresh_rows) == (levels[release - 1] == "head")
    assert said == sorted(said)
    assert len(said) == 3 * len(rows)
    activated = [entry.detail["release"] for entry in device.history(limit=1000) if entry.name == "release_activated"]
    assert activated == [1, 2, 3]


def test_released_model_of_another_task_replaces_the_one_before(pack, make_device, tmp_path):
    folder = tmp_path / "release-2"
    pack("raw").kind.build(folder, release=2, parent=pack("table").folder)
    device = make_device(checkpoint=pack("table").folder)
    assert device.predict({"age": 80}).label
    device.stop()
    device = make_device(checkpoint=folder)
    assert device.predict(pack("raw").kind.data.holdout_x[0]).outputs["map"].shape == (9,)
    assert device.step().problem == ""
