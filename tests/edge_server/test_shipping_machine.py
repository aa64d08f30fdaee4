"""Rollouts over the registry and its database, in any order of acts, with devices that come and go and restarts."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_sdk.clock import ManualClock
from edge_sdk.messages import Desired, cohort, decode, from_places
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.coordinator import Coordinator
from edge_server.errors import RolloutError
from edge_server.plan import RolloutRules
from edge_server.rollout import allowed, awaits_approval
from edge_server.settings import Settings
from tests.edge_server.conftest import ScriptedDevice, make_checkpoint

DEVICES, RELEASES = 6, 5


class Shipping(RuleBasedStateMachine):
    """Six devices, half of them in the north."""

    @initialize(collisions=st.sampled_from(["refuse", "queue"]))
    def start(self, collisions):
        self.folder = Path(tempfile.mkdtemp(prefix="edge-machine-"))
        self.settings = Settings(accept_unknown=True, durable=False, collisions=collisions)
        self.clock, self.broker = ManualClock(), MemoryBroker()
        self.coordinator = None
        self.coordinator_restarts()
        self.newest = 1
        self.coordinator.push(make_checkpoint(self.folder, 1))
        self.devices = [ScriptedDevice(f"d{i}", self.broker, self.clock).connect() for i in range(DEVICES)]
        self.away, self.bad = set(), set()
        self.live(2)
        for device in self.devices[::2]:
            self.coordinator.registry.label(device.name, {"site": "north"}, actor="test")

    @property
    def rollouts(self):
        return self.coordinator.registry.rollouts()

    def live(self, turns=1, *, seconds=10.0):
        for _ in range(turns):
            here = [device for device in self.devices if device.name not in self.away]
            start = self.clock.now()
            self.clock.advance(seconds)
            for device in here:
                device.receive()
                device.obey()
                device.accuracy = 0.3 if device.release in self.bad else 0.9
                device.report(start=start)
            for _ in range(20):
                for device in here:
                    device.send()
                handled = self.coordinator.pump()
                for device in here:
                    device.receive()
                if not handled and not any(device.rows for device in here):
                    break
            self.coordinator.advance()

    @rule(turns=st.integers(1, 3))
    def time_passes(self, turns):
        self.live(turns)

    @rule(number=st.integers(0, DEVICES - 1))
    def device_goes_or_comes_back(self, number):
        name = f"d{number}"
        if name in self.away:
            self.away.discard(name)
            self.devices[number].connect()
        else:
            self.away.add(name)

    @rule()
    def coordinator_restarts(self):
        if self.coordinator is not None:
            self.coordinator.close()
        self.coordinator = Coordinator(
            self.folder / "home", transport=MemoryTransport(self.broker), clock=self.clock, settings=self.settings
        )
        self.coordinator.start()

    @precondition(lambda self: self.newest < RELEASES)
    @rule(
        stages=st.sampled_from([(100,), (34, 100), ("1 devices", 50, 100)]),
        where=st.sampled_from(["", "", "site=north", "not site=north"]),
        approval=st.sampled_from(["none", "none", "last"]),
        max_parallel=st.sampled_from([0, 0, 2]),
        is_bad=st.booleans(),
    )
    def somebody_pushes(self, is_bad, **rules):
        plan = RolloutRules(soak_s=20.0, timeout_s=200.0, min_labelled=50, reachable_s=60.0, max_failures=6, **rules)
        folder = make_checkpoint(self.folder, self.newest + 1)
        with contextlib.suppress(RolloutError):
            self.coordinator.push(folder, plan=plan)
            if is_bad:
                self.bad.add(self.newest + 1)
        self.newest += 1

    @precondition(lambda self: any(record.state.is_active for record in self.rollouts))
    @rule(act=st.sampled_from(["pause", "resume", "approve", "abort"]), which=st.integers(0, 3))
    def somebody_acts(self, act, which):
        active = [record for record in self.rollouts if record.state.is_active]
        with contextlib.suppress(RolloutError):  # what cannot be done now
            getattr(self.coordinator.registry, act)(active[which % len(active)].id, actor="test")

    @invariant()
    def no_rollout_tells_more_devices_than_its_stage_allows(self):
        if not hasattr(self, "devices"):
            return
        told = decode(self.coordinator.registry.store.groups.get("default").desired, Desired)
        for record in self.rollouts:
            state, plan = record.state, record.plan
            if state.status != "running":
                continue
            pool = [d for d in self.devices if not plan.where or (int(d.name[1:]) % 2 == 0) == (plan.where[0] == "s")]
            part = next((part for part in told.parts if part.salt == plan.salt), None)
            assert (part is None) == state.everyone
            if state.everyone:
                assert not (state.paused)
                assert not (awaits_approval(state, plan))
                continue
            numbers = from_places(part.devices)
            named = {d.name for d in self.devices if cohort(plan.salt, d.name) in numbers}
            assert named <= {d.name for d in pool}
            reached = named | {d.name for d in pool if d.release == plan.release}
            assert len(reached) <= allowed(plan, state, len(pool))
            if state.paused or awaits_approval(state, plan):
                assert not numbers

    @invariant()
    def what_was_withdrawn_is_revoked_and_never_offered(self):
        if not hasattr(self, "devices"):
            return
        group = self.coordinator.registry.store.groups.get("default")
        told = decode(group.desired, Desired)
        offered = {part.offer.release for part in told.parts} | ({told.candidate.release} if told.candidate else set())
        taken = {r.plan.release for r in self.rollouts if r.state.status == "rolling_back"}
        assert taken <= set(told.revoked)
        assert not offered & set(told.revoked)
        assert told.base.release not in told.revoked

    def teardown(self):
        try:
            if hasattr(self, "devices"):
                self.end()
        finally:
            if self.coordinator is not None:
                self.coordinator.close()
            shutil.rmtree(self.folder)

    def end(self):
        """Everybody is back and lets everything go on: it ends, and every device is where it belongs."""
        for device in self.devices:
            if device.name in self.away:
                device.connect()
        self.away.clear()
        registry = self.coordinator.registry
        for _ in range(120):
            active = [record for record in self.rollouts if record.state.is_active]
            if not active:
                break
            for record in active:
                if record.state.paused:
                    registry.resume(record.id, actor="test")
                elif awaits_approval(record.state, record.plan):
                    registry.approve(record.id, actor="test")
            self.live(2)
        assert not [record.state.waits for record in self.rollouts if record.state.is_active], "it always ends"
        self.live(3)
        completed = [r for r in self.rollouts if r.state.status == "completed"]
        for device in self.devices:
            north = int(device.name[1:]) % 2 == 0
            fits = {"": True, "site=north": north, "not site=north": not north}
            assert device.release == max(r.plan.release for r in completed if fits[r.plan.where]), device.name


TestShipping = Shipping.TestCase
TestShipping.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
