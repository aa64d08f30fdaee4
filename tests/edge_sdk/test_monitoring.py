"""What a device makes of its monitors and of the app's own metrics: events, status, learning, roll-back, summaries."""

import msgspec
import numpy as np
import pytest

from edge_sdk.config import DeviceConfig, DriftConfig, GateConfig, LearnConfig, MetricConfig, PolicyConfig, ReportConfig
from edge_sdk.errors import InputError
from edge_sdk.messages import Envelope, Summary, decode, unpack
from edge_sdk.streams import noise
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
BASE = set(range(8))
CALM = PolicyConfig(volume_rows=100_000, triggers=(("volume",),))
QUICK = DriftConfig(rows_per_day=2_000, alarms_per_day=1, clear_rows=320, cooldown_s=7_200)


def config(**changes):
    learn = LearnConfig(executor="inline")
    return DeviceConfig(device="pump-1", mode="monitor", policy=CALM, drift=QUICK, learn=learn, **changes)


def live(device, clock, digits, blocks, *, change=lambda x: x, seed=0, right=None):
    """So many flushes of 32 predictions, labelled if `right` says how many of ten are."""
    rng = np.random.default_rng(seed)
    pool = digits.life.only(BASE)
    for _ in range(blocks):
        rows = rng.integers(len(pool.y), size=32)
        clock.advance(60)
        for prediction, y in zip(device.predict_batch(change(pool.x[rows])), pool.y[rows], strict=True):
            if right is not None:
                device.observe(prediction.id, str(y) if rng.random() < right / 10 else str((y + 1) % 8))
        device.step()


def told(device, name):
    return [entry.detail for entry in device.history() if entry.name == name]


def noisy(x):
    return noise(0.5)(x, np.random.default_rng(1))


def test_an_alarm_says_what_kind_of_change_it_is_and_what_carries_it(make_device, clock, digits):
    device = make_device(config=config())
    live(device, clock, digits, 15)
    assert device.status().alarms == []
    assert device.status().diagnosis == ""
    live(device, clock, digits, 25, change=noisy)
    status = device.status()
    assert {"input", "latent"} & set(status.alarms)
    kind, _, words = status.diagnosis.partition(": ")
    assert kind in ("covariate", "quality")
    assert words
    first = told(device, "drift_alarm")[0]
    assert (first["kind"], bool(first["words"])) == (kind, True)
    assert first["evidence"] >= first["threshold"]


def test_an_alarm_is_cleared_when_all_is_well_again_and_not_told_twice_within_the_cool_down(make_device, clock, digits):
    device = make_device(config=config())
    live(device, clock, digits, 25, change=noisy)
    alarms = told(device, "drift_alarm")
    live(device, clock, digits, 60, seed=1)
    assert device.status().alarms == []
    assert {entry["monitor"] for entry in told(device, "drift_cleared")} == {entry["monitor"] for entry in alarms}
    live(device, clock, digits, 25, change=noisy, seed=2)
    assert device.status().alarms
    assert told(device, "drift_alarm") == alarms
    clock.advance(7_200)
    live(device, clock, digits, 60, seed=3)
    live(device, clock, digits, 25, change=noisy, seed=4)
    assert len(told(device, "drift_alarm")) > len(alarms)


def test_evidence_and_what_was_told_survive_a_restart(make_device, clock, digits):
    device = make_device(config=config())
    live(device, clock, digits, 25, change=noisy)
    before, alarms = device.status(), told(device, "drift_alarm")
    device.stop()
    again = make_device(config=config())
    assert again.status().alarms == before.alarms
    live(again, clock, digits, 3, change=noisy, seed=1)
    assert told(again, "drift_alarm") == alarms


def test_accuracy_is_estimated_without_labels_until_inputs_change(make_device, clock, digits):
    device = make_device(config=config())
    live(device, clock, digits, 10)
    assert device.status().estimated_accuracy > 0.85
    live(device, clock, digits, 25, change=noisy)
    assert device.status().estimated_accuracy is None


def test_running_scores_are_told_by_class(make_device, clock, digits):
    device = make_device(config=config())
    live(device, clock, digits, 10, right=8)
    scores = device.scores()
    assert 0.7 < scores["accuracy"] < 0.9
    assert set(scores["classes"]) <= {str(label) for label in range(8)}


def test_labels_that_turn_wrong_while_inputs_stay_are_a_change_of_the_concept(make_device, clock, digits):
    device = make_device(config=config())
    live(device, clock, digits, 15, right=10)
    live(device, clock, digits, 25, right=5, seed=1)
    assert device.status().alarms == ["accuracy"]
    assert device.status().diagnosis.startswith("concept: ")


# ---- the app's own metrics


def test_what_the_app_records_is_shown_and_kept_over_a_restart(make_device):
    device = make_device(config=config())
    for value in (1.0, 0.0, 1.0, 0.0):
        device.record("click", value)
    device.step()
    assert device.status().metrics == {"click": pytest.approx(0.5, abs=0.01)}
    device.stop()
    assert make_device(config=config()).status().metrics == {"click": pytest.approx(0.5, abs=0.01)}


@pytest.mark.parametrize(("name", "value"), [("", 1.0), ("x" * 65, 1.0), ("click", float("nan")), ("click", 2.0)])
def test_a_metric_that_cannot_be_is_refused_at_once(make_device, name, value):
    device = make_device(config=config(metrics={"click": MetricConfig(low=0, high=1)}))
    with pytest.raises(InputError):
        device.record(name, value)


def test_a_metric_below_its_floor_calls_for_learning(make_device, clock, digits):
    asked = msgspec.structs.replace(
        config(metrics={"click": MetricConfig(floor=0.2, low=0, high=1)}),
        mode="adapt", policy=PolicyConfig(triggers=(("metric",),)),
    )  # fmt: skip
    device = make_device(config=asked)
    live(device, clock, digits, 5, right=10)
    assert told(device, "learn_started") == []
    for _ in range(400):
        device.record("click", 0.0)
    live(device, clock, digits, 2, right=10, seed=1)
    assert told(device, "learn_started")[0]["reason"].startswith("click: ")


def test_a_promoted_head_that_makes_a_metric_worse_is_rolled_back(make_device, clock, digits):
    asked = msgspec.structs.replace(
        config(metrics={"click": MetricConfig(margin=0.05, low=0, high=1)}), mode="adapt",
        policy=PolicyConfig(triggers=(("volume",),), volume_rows=300), gate=GateConfig(probation_rows=2_000),
    )  # fmt: skip
    device = make_device(config=asked)
    rng = np.random.default_rng(0)
    for block in range(80):
        promoted = bool(told(device, "promoted"))
        for _ in range(20):
            device.record("click", float(rng.random() < (0.1 if promoted else 0.9)))
        live(device, clock, digits, 1, change=noisy, right=10, seed=block)
        if told(device, "head_rolled_back"):
            break
    (back,) = told(device, "head_rolled_back")
    assert back["reason"].startswith("click: ")
    assert device.status().head == 0


# ---- summaries


def test_how_inputs_looked_is_summed_up_for_the_coordinator(make_device, clock, digits):
    broker = MemoryBroker()
    coordinator = MemoryTransport(broker)
    coordinator.subscribe("#")
    coordinator.connect()
    report = ReportConfig(interval_s=600, summary_interval_s=1_800)
    device = make_device(config=config(report=report), transport=MemoryTransport(broker))
    device.connect()
    for _ in range(40):
        device.record("click", 1.0)
    live(device, clock, digits, 40)
    heard = [decode(m.payload, Envelope) for m in coordinator.receive() if "/up/report" in m.topic]
    (summary,) = [unpack(envelope.body, Summary) for envelope in heard if envelope.kind == "summary"][:1]
    assert summary.reference == device._maintenance.monitoring._monitors.reference.digest
    assert 0 < summary.rows <= 40 * 32
    assert summary.end - summary.start >= 1_800
    assert [metric.name for metric in summary.metrics] == ["click"]


def test_what_came_together_before_another_version_served_is_summed_up_as_its_own(make_device, clock, digits):
    broker = MemoryBroker()
    coordinator = MemoryTransport(broker)
    coordinator.subscribe("#")
    coordinator.connect()
    report = ReportConfig(interval_s=600, summary_interval_s=36_000)
    device = make_device(config=config(report=report), transport=MemoryTransport(broker))
    device.connect()
    live(device, clock, digits, 10)
    slots = device._slots
    number = slots.write_head(slots.pointer.current.slot, slots.head(slots.pointer.current))
    slots.promote(number)
    live(device, clock, digits, 10)
    clock.advance(36_000)
    live(device, clock, digits, 5)
    heard = [decode(m.payload, Envelope) for m in coordinator.receive() if "/up/report" in m.topic]
    unique = {envelope.seq: envelope.body for envelope in heard if envelope.kind == "summary"}
    told = [unpack(body, Summary) for body in unique.values()]
    assert [(s.release, s.head) for s in told] == [(1, 0), (1, number)]
    assert told[0].rows > 0
    assert told[0].end == told[1].start
