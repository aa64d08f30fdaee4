"""The learning transaction on full disks, killed, and in any sequence of events (see `Rig`)."""

from contextlib import contextmanager, suppress

import numpy as np
import pytest

from edge_sdk.errors import DiskFullError
from edge_sdk.learn.base import LearnJob
from edge_sdk.slots import Slots

# ---- a full disk


@pytest.mark.parametrize("at", range(8))
def test_wherever_the_disk_is_full_the_transaction_goes_on_once_there_is_room(rig, at):
    made = rig()
    made.add(40)
    made.add(30, "judge")
    commit, count = made.store.transaction, [0]

    @contextmanager
    def transaction():
        with commit():
            yield
            count[0] += 1
            if count[0] - 1 == at:
                raise DiskFullError("no room")

    made.store.transaction = transaction
    assert made.tries(8) == 1
    assert made.state.phase == "probation"
    assert made.events().count("promoted") == made.events().count("learn_started") == 1
    assert made.moments.rows == 40
    assert [sample.slot for sample in made.samples("replay")] == list(range(40))
    assert [entry.outcome for entry in made.store.lineage()] == ["promoted"]


def test_a_job_that_finds_no_room_fails_once_that_can_be_recorded(rig, monkeypatch):
    def no_room(self, folder):
        raise DiskFullError("no room")

    made = rig()
    with monkeypatch.context() as patch:
        patch.setattr(LearnJob, "save", no_room)
        made.fails_on = "learn_failed"
        made.add(40)
        assert made.tries(3) == 3
    assert made.state.phase == "training"
    made.fails_on = ""
    made.turn()
    assert made.events("learn_failed")[0]["reason"] == "DiskFullError: no room"
    made.add(30, "judge")
    made.turn(seconds=60)
    assert made.state.phase == "probation"


def test_a_promotion_waits_for_room_and_not_for_another_judge_row(rig, monkeypatch):
    def no_room(*args):
        raise DiskFullError("no room")

    made = rig()
    made.add(40)
    made.add(30, "judge")
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "write_head", no_room)
        assert made.tries(2) == 2
    made.turn()
    assert made.state.phase == "probation"


# ---- killed between a change of the pointer and its record


def test_a_promotion_that_was_not_recorded_is_one_after_the_restart(rig):
    made = rig()
    made.fails_on = "promoted"
    made.add(40)
    made.add(30, "judge")
    assert made.tries(1) == 1
    assert made.slots.pointer.current.head == 1
    made.state.superseded = 2
    with made.store.transaction():
        made.adaptation.save()
    made.fails_on = ""
    made.open()
    assert made.events("promoted") == [{"to": 1, "trigger": "40 new labelled rows", "recovered": True}]
    assert (made.state.phase, made.state.superseded) == ("probation", 0)
    assert (made.state.skew.training.rows, made.state.skew.judge.rows) == (40, 30)
    assert made.moments.rows == 40
    assert [(entry.outcome, entry.head) for entry in made.store.lineage()] == [("promoted", 1)]
    made.confirm()


def test_a_promotion_that_cannot_be_recorded_yet_is_neither_judged_nor_watched(rig):
    made = rig()
    made.add(40)
    made.add(30, "judge")
    made.fails_on = "promoted"
    assert made.tries(4) == 4
    assert made.experience is None
    made.fails_on = ""
    made.turn()
    assert (made.state.phase, made.events().count("promoted")) == ("probation", 1)


@pytest.mark.parametrize("way", ["rollback", "reset"])
def test_going_back_while_a_challenger_is_judged_is_no_promotion_after_a_restart(rig, way, never_sure):
    made = rig()
    made.promote()
    made.confirm()
    made.change(**never_sure)
    made.learn()
    assert made.state.phase == "judging"
    made.slots.rollback() if way == "rollback" else made.slots.promote(0)
    made.open()
    assert (made.state.phase, made.slots.pointer.current.head) == ("idle", 0)
    assert made.events().count("promoted") == 1
    assert len(made.samples("fresh")) == 40
    assert made.moments.rows == 40


def test_going_back_to_the_releases_head_ends_a_probation_also_after_a_restart(rig):
    made = rig()
    made.promote()
    made.slots.promote(0)
    made.open()
    assert made.state.phase == "idle"
    made.turn()
    assert made.slots.pointer.current.head == 0


def test_a_rollback_that_was_not_recorded_also_takes_back_what_was_summed_up(rig):
    made = rig()
    made.promote()
    made.slots.rollback()
    made.open()
    assert made.state.phase == "idle"
    assert made.events("head_rolled_back") == [{"reason": "on probation", "to": 0, "recovered": True}]
    assert made.moments is None


def test_a_state_of_an_earlier_version_is_begun_anew(rig, caplog):
    made = rig()
    with made.store.transaction():
        made.store.put("adaptation", b'{"phase": "probation", "recent": [true, false], "fresh_keys": [1]}')
    made.open()
    assert made.state.phase == "idle"
    assert "how far learning had come is lost" in caplog.text
    made.promote()


# ---- any sequence of events


EAGER = {
    "gate": {"alpha": 0.5, "class_margin": 1.0, "factory_margin": 1.0, "probation_rows": 8, "probation_s": 1e5},
    "policy": {"min_fresh_rows": 6, "volume_rows": 12, "cooldown_s": 2.0},
}


KINDS = (
    {},
    {"learn": {"new_labels": "ask", "consolidation": "online"}},
    {"hidden": (8,)},
    {"learn": {"learner": "sgd", "ewc_lambda": 0.0, "consolidation": "offline", "scratch_every": 3}},
)


class Walk:
    """Things that happen to a rig, drawn at random."""

    def __init__(self, rig, seed):
        self.rig, self.rng, self.roles = rig, np.random.default_rng(seed), {}

    def some(self, most):
        return int(self.rng.integers(1, most))

    def fresh(self):
        self.rig.add(self.some(20), moved=bool(self.rng.integers(2)))

    def judging(self):
        self.rig.add(self.some(12), "judge", moved=bool(self.rng.integers(2)))

    def new_label(self):
        self.rig.add(self.some(15), str(self.rng.choice(["fresh", "judge"])), label="new", things=[3])

    def odd_rows(self):
        self.rig.add(4, weight=-1.0)
        self.rig.add(4, time=self.rig.now - 500)

    def turn(self):
        changed_at = self.rig.now - 100 if self.rng.integers(2) else None
        self.rig.turn(mode="adapt" if self.rng.random() < 0.8 else "shadow", changed_at=changed_at)

    def long_turn(self):
        self.rig.turn(seconds=3_600)

    def live(self):
        label = str(self.rng.choice(["a", "b", "c"])) if self.rng.integers(2) else None
        self.rig.live(self.some(12), moved=bool(self.rng.integers(2)), label=label)

    def restart(self):
        self.rig.open()

    def go_back(self):
        """As a person asks for it, perhaps killed right after."""
        slots = self.rig.slots
        if self.rng.integers(2) and slots.pointer.previous is not None:
            slots.rollback()
        elif slots.pointer.current.head:
            slots.promote(0)
        else:
            return
        if self.rng.integers(2):
            self.rig.open()
        else:
            self.rig.adaptation.abandon(self.rig.now)

    def forget(self):
        rows = [row for role in ("fresh", "judge", "replay") for row in self.rig.samples(role)]
        if rows and self.rig.experience is not None:
            found = [
                (rows[i], self.rig.manifest.trunk_id) for i in self.rng.choice(len(rows), min(3, len(rows)), False)
            ]
            self.rig.adaptation.erase(found, self.rig.now, unlearn=True)

    def decide_label(self):
        if "new" not in self.rig.head.labels and self.rig.experience is not None:
            self.rig.adaptation.decide_label("new", self.rig.now, accept=bool(self.rng.integers(2)))

    def check(self):
        rig = self.rig
        for role in ("fresh", "judge", "replay"):
            for row in rig.samples(role):  # a role is given once
                was = self.roles.setdefault((row.key, row.latent), role)
                assert (was == "judge") == (role == "judge")
        promoted = [line.head for line in rig.store.lineage(limit=500) if line.head]
        assert len(set(promoted)) == len(promoted)
        if rig.attached != rig.slots.pointer.current or rig.experience is None:
            return  # not recorded yet
        labels = [rig.experience._strata[number] for number in rig.experience.buffer.labels]
        held = [(i, rig.experience.buffer.latents[i].tobytes(), label) for i, label in enumerate(labels)]
        assert held == [(row.slot, row.latent, row.label) for row in rig.samples("replay")]
        added = sum(row.mass for row in rig.samples("replay"))
        assert (rig.moments.mass if rig.moments else 0.0) == pytest.approx(added, rel=1e-3, abs=1e-3)
        if rig.state.phase == "judging":
            assert rig.state.parent == rig.slots.pointer.current
        if rig.state.phase == "probation":
            assert rig.state.parent == rig.slots.pointer.previous


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_rows_sums_and_pointer_stay_in_step(rig, seed):
    walk = Walk(rig(**EAGER, **KINDS[seed % 4]), seed)
    events = [walk.fresh] * 4 + [walk.judging] * 3 + [walk.turn] * 10 + [walk.live] * 4 + [walk.go_back] * 2
    events += [walk.new_label, walk.odd_rows, walk.long_turn, walk.restart, walk.forget, walk.decide_label]
    for number in walk.rng.integers(len(events), size=60):
        walk.rig.full = int(walk.rng.random() < 0.1)  # the first transaction finds no room
        with suppress(DiskFullError):
            events[number]()
        walk.rig.full = 0
        walk.check()
    assert "learn_started" in walk.rig.events()
