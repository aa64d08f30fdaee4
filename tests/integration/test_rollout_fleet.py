"""Rollouts to the end with real devices in virtual time: every strategy, and bad releases that gates halt."""

import msgspec
import numpy as np
import pytest

from edge_quantize import Dataset, repack_checkpoint
from edge_sdk.config import ReportConfig, UpdateConfig
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.coordinator import Coordinator
from edge_server.plan import Gate, RolloutRules
from edge_server.settings import Settings

pytestmark = pytest.mark.torch
DEVICES = 4
RULES = RolloutRules(
    stages=("1 devices", 100), soak_s=60.0, timeout_s=3_000.0, min_labelled=40, max_accuracy_drop=0.1, reachable_s=900.0
)


@pytest.fixture(scope="module")
def repack(checkpoint, digits, tmp_path_factory):
    base = digits.factory.only(set(range(8)))
    data = Dataset(base.x[:480], base.y[:480], base.x[480:], base.y[480:])

    def make(head, release=2):
        target = tmp_path_factory.mktemp("repacked") / f"release-{release}"
        repack_checkpoint(checkpoint, target, head=head, data=data, release=release, created="2026-02-01T00:00:00Z")
        return target

    return make


@pytest.fixture(scope="module")
def same(repack, checkpoint):
    """Release 2 that says the same."""
    return repack(Head.load(checkpoint / HEAD_NPZ))


@pytest.fixture(scope="module")
def bad(repack, checkpoint):
    """Release 2 that says the neighbour of every label: it passes its self-test all the same."""
    head = Head.load(checkpoint / HEAD_NPZ)
    return repack(Head({key: np.roll(value, 1, axis=-1) for key, value in head.weights.items()}, head.labels))


class World:
    """Real devices around a coordinator in memory, all on one clock."""

    def __init__(self, folder, make_device, clock, pool):
        self.clock, self.pool, self.broker = clock, pool, MemoryBroker()
        self.folder, self.make_device = folder, make_device
        self.coordinator = None
        self.restart_coordinator()
        self.trunks = {}
        self.devices = {}
        self.drawn = 0
        for i in range(DEVICES):
            self.open(f"d{i}")

    def open(self, name, **settings):
        self.devices[name] = self.make_device(
            name, checkpoint=settings.pop("checkpoint", None), device=name, mode="monitor", trunks=self.trunks,
            transport=MemoryTransport(self.broker),
            report=ReportConfig(interval_s=60.0, summary_interval_s=60.0, min_count=1),
            # what the coordinator is to find, the device must not find first
            update=UpdateConfig(trust="none", min_free_bytes=0, max_accuracy_drop=1.0), **settings,
        )  # fmt: skip
        self.devices[name].connect()

    def restart_coordinator(self):
        if self.coordinator is not None:
            self.coordinator.close()
        self.coordinator = Coordinator(
            self.folder / "home", transport=MemoryTransport(self.broker), clock=self.clock,
            settings=Settings(accept_unknown=True, durable=False),
        )  # fmt: skip
        self.coordinator.start()

    def release(self, name):
        return self.devices[name].status().release

    @property
    def releases(self):
        return [self.release(name) for name in sorted(self.devices)]

    def live(self, minutes=1, *, labels=12, disturb=None):
        """Every device answers, is told the truth, reports; then the coordinator looks at the rollouts."""
        for _ in range(minutes):
            self.clock.advance(60.0)
            for name, device in list(self.devices.items()):
                if device.status().ready:
                    self.work(name, device, labels)
                if disturb is not None:
                    disturb(name)
            self.talk()
            self.coordinator.advance()
            self.talk()

    def work(self, name, device, labels):
        for _ in range(labels):
            self.drawn = (self.drawn + 1) % len(self.pool.y)
            prediction = device.predict(self.pool.x[self.drawn])
            device.observe(prediction.id, str(self.pool.y[self.drawn]))

    def talk(self):
        for _ in range(200):
            moved = 0
            for device in list(self.devices.values()):
                report = device.step()
                assert report.problem == ""
                moved += report.received + report.sent + report.swapped
            moved += self.coordinator.pump()
            if not moved:
                return
        raise AssertionError("devices and coordinator never fall silent")

    def until_over(self, number, *, minutes=60, **options):
        for _ in range(minutes):
            self.live(**options)
            state = self.coordinator.registry.rollout(number).state
            if not state.is_active:
                return state
        raise AssertionError(f"it never ends: {state.waits}")


@pytest.fixture
def world(tmp_path, make_device, clock, digits, checkpoint):
    world = World(tmp_path, make_device, clock, digits.life.only(set(range(8))))
    world.coordinator.push(checkpoint)
    world.talk()
    world.live(6)
    assert world.releases == [1] * DEVICES
    yield world
    world.coordinator.close()


def test_a_good_release_passes_every_stage_over_a_restart_of_the_coordinator(world, same):
    number = world.coordinator.push(same, plan=RULES)
    world.live(2)
    assert sorted(world.releases) == [1, 1, 1, 2]
    world.restart_coordinator()
    state = world.until_over(number)
    assert state.status == "completed", state.reason
    assert world.releases == [2] * DEVICES


def test_a_release_that_is_wrong_is_halted_by_its_accuracy_and_left(world, bad):
    number = world.coordinator.push(bad, plan=RULES)
    state = world.until_over(number)
    assert state.status == "rolled_back"
    assert "accuracy on release 2" in state.reason
    assert world.releases == [1] * DEVICES


def test_a_release_that_crashes_its_device_is_halted(world, same):
    """The process dies each minute on the release, and never on the old one."""
    rules = msgspec.structs.replace(RULES, min_labelled=0, soak_s=2_000.0, gates=(Gate(metric="crashes", margin=5.0),))
    number = world.coordinator.push(same, plan=rules)

    def crash(name):
        device = world.devices[name]
        if world.release(name) == 2:
            device._stopped = True  # as a kill: no last step, locks and files closed
            device._files.close()
            world.open(name)

    state = world.until_over(number, disturb=crash)
    assert state.status == "rolled_back"
    assert "crashes by report on release 2" in state.reason
    assert world.releases == [1] * DEVICES


def test_a_release_that_spoils_what_the_app_counts_is_halted(world, same):
    rules = msgspec.structs.replace(
        RULES, min_labelled=0, soak_s=2_000.0, gates=(Gate(metric="metric:clicks", margin=0.1, min_sample=60),)
    )
    rng = np.random.default_rng(0)

    def click(name):
        rate = 0.1 if world.release(name) == 2 else 0.6
        for value in rng.random(30) < rate:
            world.devices[name].record("clicks", float(value))

    world.live(4, disturb=click)
    number = world.coordinator.push(same, plan=rules)
    state = world.until_over(number, disturb=click)
    assert state.status == "rolled_back"
    assert "clicks on release 2" in state.reason


def test_a_release_is_seen_in_shadow_and_then_serves_without_being_fetched_again(world, same):
    rules = msgspec.structs.replace(
        RULES, strategy="shadow", stages=(100,), shadow_s=300.0, max_disagreement=0.1, min_labelled=60
    )
    number = world.coordinator.push(same, plan=rules)
    world.live(3)
    assert world.releases == [1] * DEVICES
    status = world.devices["d0"].status().shadow
    assert (status.release, status.pairs > 0) == (2, True)
    assert [event.name for event in world.devices["d0"].history(limit=5)].count("shadow_started") == 1
    asked = world.coordinator.registry.store.read("SELECT count(*) FROM events WHERE name = 'shadow_started'")
    assert asked == [(DEVICES,)]
    state = world.until_over(number)
    assert state.status == "completed", state.reason
    assert world.releases == [2] * DEVICES


def test_a_bad_release_is_dropped_from_the_shadow_and_never_serves(world, bad):
    rules = msgspec.structs.replace(RULES, strategy="shadow", stages=(100,), shadow_s=600.0, min_labelled=40)
    number = world.coordinator.push(bad, plan=rules)
    served = set()
    state = world.until_over(number, disturb=lambda name: served.add(world.release(name)))
    assert state.status == "rolled_back"
    assert "in shadow is right" in state.reason
    assert served == {1}
    world.live(2)
    assert all(device.status().shadow is None for device in world.devices.values())


def test_a_device_restarts_in_shadow_and_goes_on_counting(world, same):
    rules = msgspec.structs.replace(RULES, strategy="shadow", stages=(100,), shadow_s=900.0, min_labelled=40)
    world.coordinator.push(same, plan=rules)
    world.live(3)
    before = world.devices["d0"].status().shadow
    world.devices["d0"].stop()
    world.open("d0")
    world.live(2)
    after = world.devices["d0"].status().shadow
    assert (after.release, after.since) == (2, before.since)
    assert after.pairs > before.pairs


def test_an_ab_test_ends_with_the_better_one_for_all(world, bad, repack, checkpoint):
    """The group runs the bad release; the good one is shown to be better, and the held-out devices get it last."""
    worse = world.coordinator.push(bad, plan=RolloutRules(stages=(100,), min_labelled=0, soak_s=0.0, max_failures=4,
                                                          max_accuracy_drop=1.0, max_error_rate=1.0))  # fmt: skip
    assert world.until_over(worse).status == "completed"
    good = repack(Head.load(checkpoint / HEAD_NPZ), release=3)
    rules = RolloutRules(strategy="ab", stages=(100,), effect=0.3, soak_s=60.0, timeout_s=3_000.0, on_small="warn")
    number = world.coordinator.push(good, plan=rules)
    plan = world.coordinator.registry.rollout(number).plan
    held_out = {name for name in world.devices if plan.in_control(name)}
    assert 0 < len(held_out) < DEVICES
    world.live(3)
    assert {name: world.release(name) for name in world.devices} == {
        name: 2 if name in held_out else 3 for name in world.devices
    }
    state = world.until_over(number)
    assert state.status == "completed", state.reason
    world.live(2)
    assert world.releases == [3] * DEVICES


def test_a_device_that_was_off_for_weeks_joins_at_the_right_release(world, same, bad, repack, checkpoint):
    world.devices.pop("d3").stop()
    world.clock.advance(1_000.0)
    withdrawn = world.coordinator.push(bad, plan=RULES)
    assert world.until_over(withdrawn).status == "rolled_back"
    kept = world.coordinator.push(repack(Head.load(checkpoint / HEAD_NPZ), release=3), plan=RULES)
    assert world.until_over(kept).status == "completed"
    world.clock.advance(30 * 86_400.0)
    world.open("d3")
    world.live(2)
    assert world.releases == [3] * DEVICES
