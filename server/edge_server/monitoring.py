"""What watches the coordinator itself: `/metrics` for Prometheus, `/healthz` and `/readyz`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from edge_sdk.errors import EdgeError
from edge_server.registry import Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_DAY_S = 86_400.0
_LEVELS = (0.0, 0.05, 0.5)
Labels = Mapping[str, str]


class Pulse(msgspec.Struct, frozen=True):
    """What only the running coordinator knows."""

    connected: bool
    """With the broker."""
    lag_s: float
    """Age of the newest rows that it took in last."""
    unstored: str = ""
    """Why what devices send cannot be stored; empty: it can."""


def metrics_text(registry: Registry, pulse: Pulse | None) -> str:
    """The fleet in the text format of Prometheus, version 0.0.4.

    Args:
        registry: The records.
        pulse: Of the running coordinator; None: there is none in this process.

    Source:
        https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    glance = registry.glance()
    fleet = registry.fleet()
    state = Counter((device.health, "none" if device.release is None else str(device.release)) for device in glance)
    rollouts = Counter(record.state.status for record in registry.store.rollouts.find())
    firing = Counter(alert.severity for alert in registry.store.alerts.find(status="firing", limit=10_000))
    counters = fleet.counters
    machines = registry.store.devices.machines(since=registry.clock.now() - _DAY_S)
    disks = sorted(free for _, _, free, _, _ in machines if free is not None)
    memories = sorted(free for _, _, _, free, _ in machines if free is not None)
    least = registry.settings.alerts.min_device_disk_mb
    lines = [
        *_family("edge_devices", "gauge", "Devices by health and release.",
                 [({"health": health, "release": release}, n) for (health, release), n in sorted(state.items())]),
        *_family("edge_devices_online", "gauge", "Devices that are connected.", [({}, fleet.online)]),
        *_family("edge_devices_in_drift", "gauge", "Devices with a drift alarm.", [({}, fleet.in_drift)]),
        *_family("edge_ingest_rows_total", "counter", "Rows from devices by what became of them.",
                 [({"outcome": name}, n) for name, n in sorted(counters.items())]),
        *_family("edge_rollouts", "gauge", "Rollouts by status.",
                 [({"status": status}, n) for status, n in sorted(rollouts.items())]),
        *_family("edge_alerts_firing", "gauge", "Alerts that are not resolved, by severity.",
                 [({"severity": name}, firing[name]) for name in ("info", "warning", "critical")]),
    ]  # fmt: skip
    if disks:
        lines += _quantiles("edge_device_disk_free_bytes", "Room on the disks of devices heard of within a day.", disks)
        lines += _family("edge_devices_low_on_disk", "gauge", "Those with less than alerts.min_device_disk_mb.",
                         [({}, sum(free < least for free in disks))])  # fmt: skip
    if memories:
        lines += _quantiles("edge_device_memory_free_bytes", "Memory left, of devices heard of within a day.", memories)
    if fleet.accuracy is not None:
        lines += _family(
            "edge_accuracy", "gauge", "Share of labelled predictions that were right.", [({}, fleet.accuracy)]
        )
    if pulse is not None:
        lines += _family(
            "edge_broker_connected", "gauge", "1 with a connection to the broker.", [({}, int(pulse.connected))]
        )
        lines += _family(
            "edge_storing", "gauge", "0 while what devices send cannot be stored.", [({}, int(not pulse.unstored))]
        )
        lines += _family(
            "edge_ingest_lag_seconds", "gauge", "Age of the newest rows taken in last.", [({}, pulse.lag_s)]
        )
    return "\n".join(lines) + "\n"


def _quantiles(name: str, text: str, megabytes: Sequence[int]) -> list[str]:
    """Of ascending values: the least, those that a twentieth and a half of the devices are below."""
    samples = [({"quantile": f"{q:g}"}, megabytes[int(q * (len(megabytes) - 1))] * 10**6) for q in _LEVELS]
    return _family(name, "gauge", text, samples)


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Labels, float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        told = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
        lines.append(f"{name}{{{told}}} {value}" if told else f"{name} {value}")
    return lines


def problems(registry: Registry, pulse: Pulse | None) -> list[str]:
    """Why the coordinator is not ready to take in what devices send; empty: it is."""
    found = []
    try:
        with registry.store.transaction():
            registry.store.read("SELECT 1")  # the transaction is the test: it takes the lock for writing
    except EdgeError as error:
        found.append(f"the database cannot be written: {error}")
    if pulse is not None and pulse.unstored:
        found.append(f"what devices send cannot be stored: {pulse.unstored}")
    if pulse is not None and not pulse.connected:
        found.append("there is no connection to the broker")
    return found
