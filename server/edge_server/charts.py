"""Figures for the charts of the dashboard: plain numbers, which a script draws with plotly. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edge_sdk.messages import Report
from edge_server.fleet_views import FleetView
from edge_server.records import EventRecord, RollupRecord

LANES: Mapping[str, str] = {
    "release_activated": "release", "release_failed": "release", "release_confirmed": "release",
    "release_refused": "release", "release_delayed": "release", "release_untrusted": "release",
    "release_shadowed": "release", "shadow_started": "release", "desired_refused": "release",
    "release_rolled_back": "rollback", "head_rolled_back": "rollback", "rollback_refused": "rollback",
    "drift_warning": "drift", "drift_alarm": "drift", "drift_cleared": "drift", "rereferenced": "drift",
    "learn_started": "adaptation", "learn_failed": "adaptation", "superseded": "adaptation",
    "promoted": "gate", "would_promote": "gate", "rejected": "gate", "confirmed": "gate",
}  # fmt: skip
"""In which line of a device's timeline an event stands; "other" if not here."""
LANE_ORDER = ("release", "rollback", "gate", "adaptation", "drift", "other")
_MOST_FEATURES = 60
_MOST_EVIDENCE = 5.0
"""Evidence grows by powers of ten: beyond this many thresholds it is drawn here, or the rest would lie flat."""


def timeline(
    events: Iterable[EventRecord], reports: Iterable[tuple[float, Report]], sums: Iterable[RollupRecord]
) -> dict[str, Any]:
    """What happened on a device, the evidence of its monitors, and its accuracy.

    Args:
        events: Of the device.
        reports: Time and report, oldest first.
        sums: By the hour, oldest first.
    """
    monitors: dict[str, dict[str, list[float]]] = {}
    for at, report in reports:
        for monitor in report.monitors:
            if monitor.threshold > 0:
                line = monitors.setdefault(monitor.name, {"x": [], "y": []})
                line["x"].append(at)
                line["y"].append(min(monitor.evidence / monitor.threshold, _MOST_EVIDENCE))
    accuracy: dict[str, dict[str, list[float]]] = {}
    for entry in sums:
        if entry.labelled:
            line = accuracy.setdefault(f"release {entry.release}", {"x": [], "y": []})
            line["x"].append(entry.start)
            line["y"].append(entry.correct / entry.labelled)
    return {
        "lanes": LANE_ORDER,
        "events": [
            {"time": event.time, "lane": LANES.get(event.name, "other"), "name": event.name.replace("_", " ")}
            for event in events
        ],
        "monitors": monitors,
        "accuracy": accuracy,
    }


def heat(views: Iterable[FleetView]) -> dict[str, Any]:
    """Population stability index by feature and group: those features that shift most, strongest last.

    Groups whose summaries have several references stand beside each other by reference.
    """
    views = list(views)
    groups = [view.group for view in views]
    labels = [view.group if groups.count(view.group) == 1 else f"{view.group} ({view.reference[:6]})" for view in views]
    found = {(label, feature.name): feature.psi for label, view in zip(labels, views, strict=True)
             for feature in view.features}  # fmt: skip
    strongest: dict[str, float] = {}
    for (_, feature), psi in found.items():
        strongest[feature] = max(strongest.get(feature, 0.0), psi or 0.0)
    features = sorted(strongest, key=lambda name: (strongest[name], name))[-_MOST_FEATURES:]
    return {
        "x": labels,
        "y": features,
        "z": [[found.get((label, feature)) for label in labels] for feature in features],
        "devices": [view.devices for view in views],
        "left_out": max(0, len(strongest) - len(features)),
    }
