"""Drift of the fleet is told from drift of single devices, on fleets made of numbers."""

import msgspec
import numpy as np
import pytest

from edge_server.fleet_drift import ALL, DriftRules, FleetDrift, Observed, Onset, advance, parse_suspects
from edge_server.fleet_words import advice, in_words, local_drift

RULES = DriftRules()
MONITORS = ("input", "quality", "latent", "output", "accuracy")
FEATURES = ("acc_x", "acc_y", "acc_z", "temperature", "load")


class Numbers:
    """A fleet of devices that raise alarms as they are told, an hour a window, with the default budget."""

    def __init__(self, devices, *, seed=0, rules=RULES, cohorts=lambda i: (), local=0.005):
        self.rng, self.rules, self.cohorts, self.local = np.random.default_rng(seed), rules, cohorts, local
        self.devices, self.state, self.hour = devices, FleetDrift(), 0
        self.up = [set() for _ in range(devices)]
        self.onsets, self.raised = [], []

    def window(self, *, drifts=lambda i: None):
        """One hour; `drifts` gives for a device the suspects of an alarm, or None."""
        self.hour += 1
        end = 3600.0 * self.hour
        observed = []
        for i in range(self.devices):
            onsets = []
            for monitor in MONITORS:
                if monitor in self.up[i]:
                    continue
                suspects = drifts(i) if monitor == "input" else None
                if suspects is None and self.rng.random() < (0.02 + self.local) / 24:
                    suspects = (self.rng.choice(FEATURES) + self.rng.choice(["+", "-"]),)
                if suspects is not None:
                    onsets.append(Onset(f"d{i}", monitor, end - 60, "covariate", tuple(suspects)))
                    self.up[i].add(monitor)
            observed.append(
                Observed(f"d{i}", self.cohorts(i), 1.0, dict.fromkeys(MONITORS, 0.02 / 24), frozenset(self.up[i]),
                         tuple(onsets))
            )  # fmt: skip
            self.onsets += onsets
            if self.rng.random() < 0.1:
                self.up[i] -= {monitor for monitor in self.up[i] if not drifts(i) or monitor != "input"}
        before = {(f.cohort, f.monitor) for f in self.state.findings}
        self.state = advance(self.state, observed, self.rules, end=end)
        self.raised += [f for f in self.state.findings if (f.cohort, f.monitor) not in before]
        return self.state.findings


class TestHealthy:
    def test_a_healthy_fleet_raises_no_more_alarms_than_stated(self):
        # one false alarm in five days over all is allowed here; that is 10 in these 50 fleet days
        rules = DriftRules(alarms_per_day=0.2)
        raised = 0
        for seed, devices in enumerate((8, 30)):
            fleet = Numbers(devices, seed=seed, rules=rules, cohorts=lambda i: (f"group={i % 2}",))
            for _ in range(25 * 24):
                fleet.window()
            raised += len(fleet.raised)
        assert raised <= 10 / 2, "half of what is allowed: the bound is not sharp"

    def test_a_few_devices_that_drift_by_themselves_are_local_drift(self):
        fleet = Numbers(50)
        for hour in range(72):
            fleet.window(drifts=lambda i, hour=hour: ("acc_x+",) if i in (3, 17) and hour > 48 else None)
        assert fleet.raised == []
        local = local_drift(fleet.onsets[-20:], fleet.state, {})
        assert {"d3", "d17"} <= {onset.device for onset in local.onsets}
        assert 0 < local.expected < 24 * 50 * 5 * 0.02 / 24 + 1

    def test_local_drift_that_is_usual_in_a_fleet_is_learned(self):
        fleet = Numbers(100, local=0.06)
        for _ in range(24 * 8):
            fleet.window()
        stream = fleet.state.streams["all\tinput"]
        assert fleet.raised == []
        assert 0.04 < stream.alarms / stream.days < 0.08
        assert stream.windows[-1].expected > stream.windows[0].expected


class TestFleetDrift:
    @pytest.mark.parametrize(("devices", "hours"), [(10, 6), (50, 3), (300, 3)])
    def test_it_is_found_within_hours_and_names_the_feature(self, devices, hours):
        fleet = Numbers(devices, seed=devices)
        for _ in range(24):
            fleet.window()
        began = fleet.hour
        # each hour a third of the devices notice it
        while not fleet.raised and fleet.hour < began + 24:
            fleet.window(drifts=lambda i: ("temperature+",) if fleet.rng.random() < 0.33 else None)
        assert fleet.hour - began <= hours
        (finding,) = fleet.raised
        assert (finding.cohort, finding.monitor, finding.scope, finding.kind) == (ALL, "input", "fleet", "covariate")
        assert finding.features[0] == "temperature+"
        assert finding.alarmed > 5 * finding.expected
        assert finding.evidence >= finding.threshold
        assert "temperature up" in in_words(finding)
        assert "new base" in advice(finding)

    def test_it_goes_on_until_the_devices_alarms_are_down(self):
        fleet = Numbers(40)
        fleet.window()
        for _ in range(4):
            fleet.window(drifts=lambda i: ("load-",))
        assert fleet.state.findings
        for up in fleet.up:
            up.clear()
        fleet.window()
        assert fleet.state.findings == []

    def test_many_devices_that_change_each_in_its_own_way_are_told_apart(self):
        fleet = Numbers(60, seed=3)
        for _ in range(3):
            fleet.window(drifts=lambda i: (FEATURES[i % 5] + "+-"[i // 5 % 2],) if fleet.rng.random() < 0.5 else None)
        finding = fleet.state.findings[0]
        assert finding.scope == "scattered"
        assert "do not agree" in in_words(finding)
        assert "in common" in advice(finding)

    def test_the_cohort_that_drifts_is_named_and_others_are_not(self):
        fleet = Numbers(60, cohorts=lambda i: ("hardware=old" if i % 3 == 0 else "hardware=new",))
        for _ in range(6):
            fleet.window(drifts=lambda i: ("acc_z+",) if i % 3 == 0 and fleet.rng.random() < 0.5 else None)
        found = fleet.state.findings
        assert "hardware=new" not in {finding.cohort for finding in found}
        strongest = max(found, key=lambda finding: finding.alarmed / finding.at_risk)
        assert strongest.cohort == "hardware=old"
        assert {finding.episode for finding in found} == {1}, "one cause"

    def test_devices_that_a_drift_of_the_fleet_explains_are_not_local(self):
        fleet = Numbers(40)
        for _ in range(3):
            fleet.window(drifts=lambda i: ("load+",) if i < 35 else None)
        now = fleet.hour * 3600.0
        same = Onset("d5", "latent", now, "covariate", ("latent 3-",))
        own = Onset("d39", "input", now, "covariate", ("acc_y-",))
        local = local_drift([*fleet.onsets, same, own], fleet.state, {})
        assert own in local.onsets
        assert same not in local.onsets, "another monitor of a device that drifts with the fleet"
        assert all("load+" not in onset.suspects for onset in local.onsets)

    def test_late_devices_do_not_undo_what_was_found(self):
        fleet = Numbers(40)
        for _ in range(3):
            fleet.window(drifts=lambda i: ("load+",))
        (finding, *_) = fleet.state.findings
        restored = msgspec.json.decode(msgspec.json.encode(fleet.state), type=FleetDrift)
        assert restored == fleet.state
        after = advance(restored, [], RULES, end=fleet.hour * 3600.0 + 3600)
        assert finding in after.findings

    def test_another_drift_days_later_is_another_episode(self):
        fleet = Numbers(40)
        for _ in range(3):
            fleet.window(drifts=lambda i: ("load+",))
        for up in fleet.up:
            up.clear()
        for _ in range(48):
            fleet.window()
        for _ in range(3):
            fleet.window(drifts=lambda i: ("acc_x-",))
        assert [finding.episode for finding in fleet.raised] == [1, 2]


def test_small_cohorts_are_not_tested_by_themselves():
    fleet = Numbers(20, cohorts=lambda i: (f"site={i // 4}",))
    fleet.window(drifts=lambda i: ("load+",) if i < 4 else None)
    assert {name.partition("\t")[0] for name in fleet.state.streams} == {ALL}


def test_what_a_device_says_of_its_suspects_is_read():
    assert parse_suspects("acc_x +0.31, spread of acc_y -0.20") == ("acc_x+", "spread of acc_y-")
    assert parse_suspects("") == ()
    assert parse_suspects("nonsense, more") == ()
