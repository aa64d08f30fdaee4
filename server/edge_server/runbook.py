"""What each kind of alert means and what to do: the text that comes with it."""

from __future__ import annotations

import msgspec

from edge_server.alerts import Rule


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of alert.

    Attributes:
        title: What it says, in a few words.
        meaning: How it comes about.
        todo: What to do, in this order.
        rule: How soon it is raised and resolved.
    """

    title: str
    meaning: str
    todo: tuple[str, ...]
    rule: Rule = Rule()


AT_ONCE = Rule(raise_after=1, resolve_after=2)
"""For what was tested before it came here, or happens once."""

RUNBOOK: dict[str, Entry] = {
    "device_offline": Entry(
        title="devices offline for too long",
        meaning="Nothing was heard of a device for longer than alerts.offline_s, whatever its retained state says.",
        todo=(
            "If many devices of one group went at once, look at the broker, the network there, and certificates.",
            "If it is one: power, network, disk. On it: edge status, and its log.",
            "If it was taken away on purpose: edge-coordinator devices revoke NAME, or a silence with an end.",
        ),
    ),
    "drift_fleet": Entry(
        title="drift of the fleet",
        meaning="More devices raised a drift alarm at once than their own budgets and drift of single devices allow.",
        todo=(
            "edge-coordinator fleet drift names the features, the cohort and the evidence.",
            "Kind quality: look at sensors, firmware and what feeds them; train nothing before.",
            "Else gather labelled samples there and build a new base; fleet freshness says what it brings.",
        ),
        rule=AT_ONCE,
    ),
    "drift_local": Entry(
        title="single devices drift",
        meaning="Devices raised drift alarms that no drift of the fleet explains. Some are false: budgets are told.",
        todo=(
            "Let them personalise: mode adapt, and see to it that they get labels.",
            "A warning means broken data, or fewer right answers: look at that device's sensor and inputs.",
        ),
        rule=Rule(raise_after=1, resolve_after=60),
    ),
    "rollback": Entry(
        title="devices went back",
        meaning="A release or a learned head did worse on probation, crashed or was revoked, and the device left it.",
        todo=(
            "The reason stands in the device's events (release_rolled_back, head_rolled_back).",
            "Several devices and one release: halt its rollout: edge-coordinator rollout abort NUMBER.",
            "Learned heads on one device again and again: look at its labels, or set mode shadow for it.",
        ),
        rule=AT_ONCE,
    ),
    "rollout_halted": Entry(
        title="a rollout was halted",
        meaning="A gate failed; devices that took the release go back to what they had.",
        todo=(
            "edge-coordinator rollout show NUMBER gives the gate and its numbers.",
            "Mend the release and push it under a new number.",
        ),
        rule=AT_ONCE,
    ),
    "rollout_waits": Entry(
        title="a rollout waits for a person",
        meaning="A stage begins only once it is approved, or somebody paused the rollout alerts.paused_s ago.",
        todo=(
            "edge-coordinator rollout show NUMBER: how the gates of the stages before stand.",
            "Go on: edge-coordinator rollout approve NUMBER, or rollout resume NUMBER if it is paused.",
            "Or withdraw it: edge-coordinator rollout abort NUMBER. A pause that is meant: a silence with an end.",
        ),
        rule=Rule(raise_after=2, resolve_after=2),
    ),
    "update_failed": Entry(
        title="devices could not take a release",
        meaning="It was damaged, did not fit, failed its self-test, or its signatures were not believed.",
        todo=(
            "edge-coordinator releases verify checks what devices would find.",
            "All devices of one hardware: the release does not run there; build one for it.",
            "One device: its disk and memory, and the reason in its events.",
        ),
        rule=AT_ONCE,
    ),
    "clock_untrusted": Entry(
        title="device clocks are wrong",
        meaning="A device's clock reads before the metadata was signed, or its rows come from the future.",
        todo=("Set up NTP on the device; until then it installs no release.",),
        rule=AT_ONCE,
    ),
    "disk_full": Entry(
        title="no room on a disk",
        meaning="A device could not store a release, or the coordinator's own disk is nearly full.",
        todo=(
            "Coordinator: free room at once; nothing acknowledged is lost, but nothing new is taken in.",
            "Device: smaller replay.max_bytes, other files on the disk; it tries again by itself.",
        ),
    ),
    "disk_low": Entry(
        title="devices are low on disk",
        meaning="Devices report less room than alerts.min_device_disk_mb on the disk that holds their database.",
        todo=(
            "edge-coordinator devices show NAME tells how much is left; most often it is logs or other programs.",
            "Give room before the next release: a device needs that of the release, and cannot install it else.",
            "Smaller replay.max_bytes and report.outbox_rows take less.",
        ),
        rule=Rule(raise_after=3, resolve_after=10),
    ),
    "memory_low": Entry(
        title="a process has grown too large",
        meaning="A device's process takes more than alerts.max_rss_mb.",
        todo=("edge-coordinator command DEVICE diagnostics", "Compare its release and replay settings with others'."),
        rule=Rule(raise_after=3, resolve_after=10),
    ),
    "accuracy_below": Entry(
        title="accuracy below the floor",
        meaning="Of a device's last labelled predictions so few were right that it is below alerts.accuracy_floor, "
        "with 97.5 % confidence.",
        todo=(
            "edge-coordinator fleet drift: is it one device, or the fleet?",
            "One device: mode adapt, or edge-coordinator command DEVICE adapt-now; look at its labels.",
            "The fleet: fleet freshness, and a new base.",
        ),
        rule=Rule(raise_after=3, resolve_after=10),
    ),
    "certificate_expiry": Entry(
        title="certificates end soon",
        meaning="A device's certificate ends within alerts.certificate_days, and its renewal has not come through.",
        todo=(
            "Is the device online? Renewal goes by a command to it.",
            "Else bring it a new bundle: edge-coordinator devices replace NAME.",
        ),
    ),
    "metadata_expiry": Entry(
        title="signed metadata ends soon",
        meaning="The root ends within alerts.root_days, or metadata could not be renewed: devices stop installing.",
        todo=("edge-coordinator keys renew, with the root keys.", "edge-coordinator releases verify"),
    ),
    "desired_refused": Entry(
        title="somebody else tells devices what to run",
        meaning="Devices got a desired state that was not signed for their group, or an older one, and did not follow.",
        todo=(
            "The reason stands in their events (desired_refused).",
            "Not signed: does an older coordinator still publish? Else see who may publish there: the broker's ACL.",
            "Older: after a restore, look at the coordinator's clock, or edge-coordinator keys rotate timestamp.",
            "By no key of the root: a device that gets no metadata from the broker, or a key that was revoked.",
        ),
        rule=AT_ONCE,
    ),
    "coordinator_behind": Entry(
        title="the coordinator falls behind",
        meaning="The newest rows that it takes in were made longer ago than alerts.behind_s.",
        todo=(
            "Look at its disk and CPU; longer report intervals (command report-interval) bring relief.",
            "Nothing is lost: devices keep what was not acknowledged.",
        ),
        rule=Rule(raise_after=5, resolve_after=5),
    ),
    "outbox_gaps": Entry(
        title="devices dropped rows",
        meaning="An outbox was full, or a device's database was lost, before everything had been sent.",
        todo=(
            "Longer offline than the outbox holds: raise report.outbox_rows or the report interval.",
            "store_lost: the device's storage is failing.",
        ),
        rule=AT_ONCE,
    ),
}
RULES = {kind: entry.rule for kind, entry in RUNBOOK.items()}
