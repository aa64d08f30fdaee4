"""What was found about drift, in words that a person can act on; and which alarms are of single devices. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from edge_server.fleet_drift import ALL, Finding, FleetDrift, Onset

_DO = {
    "quality": "The data are at fault: look at the sensor, its firmware and what feeds it before anything is trained.",
    "covariate": "Gather labelled samples from these devices and build a new base: see `edge-coordinator build`.",
    "prior": "Classes come in other shares: devices in mode adapt can follow; weigh them anew in the next base.",
    "concept": "Answers have changed though inputs look as they did: new labels are needed, then a new base.",
    "": "Look at the features named, gather labelled samples from these devices, and build a new base.",
}
LOCAL = "Drift of single devices: let them personalise (mode adapt) and see to it that they get labels."


def in_words(finding: Finding) -> str:
    """What happened, and with which evidence, in one or two sentences."""
    who = "the fleet" if finding.cohort == ALL else finding.cohort
    hours = max(1, round((finding.raised - finding.since) / 3600))
    text = (
        f"{finding.alarmed} of {finding.at_risk} devices of {who} raised the {finding.monitor} alarm within {hours} h; "
        f"chance and drift of single devices allow {finding.expected:.2g}."
    )
    if finding.features:
        text += f" {feature_in_words(finding.features[0])} on {100 * finding.agreement:.0f} % of them."
    if finding.scope == "scattered":
        text += " They do not agree in what changed."
    return text


def advice(finding: Finding) -> str:
    """What a person should do."""
    if finding.scope == "scattered":
        return (
            "Many devices at once, each in its own way: look for what they have in common (a release, an installation, "
            "a season); let them personalise (mode adapt)."
        )
    return _DO.get(finding.kind, _DO[""])


def feature_in_words(feature: str) -> str:
    """Such as "acc_x up" of "acc_x+"."""
    return f"{feature[:-1]} {'up' if feature.endswith('+') else 'down'}"


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that drift by themselves."""

    onsets: tuple[Onset, ...]
    """Newest first."""
    expected: float
    """False alarms that the devices' own budgets allow in the same time."""


def local_drift(onsets: Iterable[Onset], state: FleetDrift, members: Mapping[str, tuple[str, ...]]) -> Local:
    """The alarms of devices of which no alarm is explained by a drift of the fleet.

    Args:
        onsets: Of the windows that `state` remembers.
        state: What goes on.
        members: Cohorts by device.
    """
    findings = state.findings

    def explained(onset: Onset) -> bool:
        cohorts = (ALL, *members.get(onset.device, ()))
        return any(
            finding.cohort in cohorts
            and finding.scope == "fleet"
            and (set(finding.shared) & set(onset.suspects) if onset.suspects else finding.monitor == onset.monitor)
            for finding in findings
        )

    told = list(onsets)
    taken = {onset.device for onset in told if explained(onset)}  # its other monitors see the same in other words
    own = sorted((onset for onset in told if onset.device not in taken), key=lambda onset: (-onset.time, onset.device))
    expected = sum(w.budget for name, stream in state.streams.items() if name.startswith(f"{ALL}\t")
                   for w in stream.windows)  # fmt: skip
    return Local(onsets=tuple(own), expected=expected)
