"""What rollouts are judged by: committed reports, events and summaries, as figures for each device."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from edge_sdk.database import Database
from edge_sdk.messages import Report, ShadowTally, Summary, unpack
from edge_server.gates import DeviceMetrics, Sums, share
from edge_server.plan import APP_METRIC, LATENCIES, Gate, RolloutPlan
from edge_server.power import Pace
from edge_server.rollout import RolloutState

_EVENTS = {
    "crashes": ("crashed",),
    "rollbacks": ("head_rolled_back", "release_rolled_back"),
    "drift": ("drift_alarm",),
}
_DAY_S = 86_400.0
_MOST_KEPT = 16
_SUMMARIES_BEFORE = 12
"""Of a device: a day's course."""
_WINDOWS_BEFORE = 30
"""Of a device, whose latencies are known by them."""

Pair = tuple[Sums, Sums]


class _Look(NamedTuple):
    """What the summaries of one stage of a rollout said so far: each is read once."""

    since: float
    received: float
    found: dict[str, tuple[bool, dict[str, Pair]]]
    """By device: whether it ran the release, and what its gates look at."""


class _Pasts(NamedTuple):
    """Figures before a stage, by device, its first row in the stage, and whether it had the release."""

    since: float
    found: dict[tuple[str, int, bool], tuple[int, int]]
    """Labelled and correct predictions."""
    latencies: dict[tuple[str, int, bool], dict[str, Sums]]


class MetricsStore:
    """Figures by device for the gates of a rollout."""

    def __init__(self, db: Database) -> None:
        self._db = db
        need_ln(db.conn)
        self._looks: dict[str, _Look] = {}
        self._pasts: dict[str, _Pasts] = {}

    def read(
        self, plan: RolloutPlan, state: RolloutState | None, *, now: float, eligible: Collection[str] | None = None
    ) -> list[DeviceMetrics]:
        """One entry for every device of the plan's group, from committed reports and events alone.

        Windows are cut by the devices' own report times, not by when the messages came.

        Args:
            plan: The rollout.
            state: Where it is; None before it begins.
            now: Seconds since the epoch.
            eligible: Devices with the labels that the plan asks for; None: all.
        """
        release = plan.release
        since, baseline_since = (now, now) if state is None else (state.stage_started, state.baseline_since)
        windows = self._db.read(
            "SELECT r.device, sum(r.predictions), sum(r.errors), sum(r.labelled), sum(r.correct), min(r.id), count(*),"
            " sum(r.time - r.start)"
            " FROM reports r JOIN devices d ON d.name = r.device WHERE d.group_name = ?1 AND r.start >= ?3"
            " AND (r.release = ?2) = (d.row_release IS ?2) GROUP BY r.device",
            plan.group,
            release,
            since,
        )
        counts = {row[0]: row[1:] for row in windows}
        earlier = self._db.read("SELECT DISTINCT device FROM reports WHERE release = ? AND start < ?", release, since)
        had_it = {row[0] for row in earlier}
        last_words = dict(
            self._db.read(
                # with a bare column beside max(), SQLite gives the row of the maximum
                "SELECT device, name FROM (SELECT device, name, max(id) FROM events WHERE subject = ?"
                " AND name IN ('release_activated', 'release_failed', 'release_rolled_back')"
                " GROUP BY device)",
                release,
            )
        )
        shadowing = state is not None and state.shadowing
        values = self._values(plan, state, had_it) if state is not None else {}
        pasts = self._past_of(plan, since)
        entries = []
        for name, row_release, row_time in self._db.read(
            "SELECT name, row_release, row_time FROM devices WHERE group_name = ? AND revoked IS NULL ORDER BY name",
            plan.group,
        ):
            runs_it = row_release == release
            predictions, errors, labelled, correct, first, reports, seconds = counts.get(name, (0, 0, 0, 0, 0, 0, 0.0))
            before = (0, 0)
            if labelled:
                key = (name, first, name in had_it)
                if key not in pasts.found:
                    pasts.found[key] = self._before(name, first, baseline_since, had_it=name in had_it, plan=plan)
                before = pasts.found[key]
            own = {
                metric: (msgspec.structs.replace(pair[0], count=reports) if metric in _EVENTS else pair[0], pair[1])
                for metric, pair in values.get(name, {}).items()
            }
            entries.append(
                DeviceMetrics(
                    device=name,
                    eligible=eligible is None or name in eligible,
                    on_candidate=runs_it,
                    in_shadow=shadowing and "disagreement" in own,
                    switched=runs_it and name not in had_it,
                    reachable=row_time is not None and now - row_time <= plan.reachable_s,
                    failed=last_words.get(name) == "release_failed" and not runs_it,
                    rolled_back=last_words.get(name) == "release_rolled_back" and not runs_it,
                    predictions=predictions,
                    errors=errors,
                    labelled=labelled,
                    correct=correct,
                    labelled_before=before[0],
                    correct_before=before[1],
                    reports=reports,
                    seconds=seconds,
                    values=own,
                )
            )
        return entries

    def _past_of(self, plan: RolloutPlan, since: float) -> _Pasts:
        """What is known of the figures before of one stage: rows before a device's first one there never change."""
        pasts = self._pasts.get(plan.salt)
        if pasts is None or pasts.since != since:
            pasts = self._pasts[plan.salt] = _Pasts(since, {}, {})
            _forget_oldest(self._pasts)
        return pasts

    def _before(self, device: str, first: int, since: float, *, had_it: bool, plan: RolloutPlan) -> tuple[int, int]:
        """(labelled, correct) in a device's last labelled reports begun after `since` and before row `first`.

        On the candidate, if the device ran it before this stage already; else on what it ran before.
        """
        row = self._db.read(
            "SELECT coalesce(sum(labelled), 0), coalesce(sum(correct), 0) FROM"
            " (SELECT labelled, correct FROM reports WHERE device = ? AND id < ? AND start >= ?"
            " AND (release = ?) = ? AND labelled > 0 ORDER BY id DESC LIMIT ?)",
            device,
            first,
            since,
            plan.release,
            had_it,
            plan.baseline_reports,
        )[0]
        return row[0], row[1]

    def pace(self, plan: RolloutPlan, *, now: float, days: float = 7.0) -> Pace:
        """How many labelled predictions the plan's group has told of lately."""
        row = self._db.read(
            "SELECT coalesce(sum(r.labelled), 0), coalesce(sum(r.correct), 0), coalesce(sum(r.time - r.start), 0.0)"
            " FROM reports r JOIN devices d ON d.name = r.device WHERE d.group_name = ? AND r.start >= ?",
            plan.group,
            now - days * _DAY_S,
        )[0]
        return Pace(labelled=row[0], correct=row[1], device_days=row[2] / _DAY_S)

    def at_least(self, group: str, release: int) -> set[str]:
        """Devices of a group that run the release or a newer one."""
        return {row[0] for row in self._db.read(
            "SELECT name FROM devices WHERE group_name = ? AND row_release >= ?", group, release)}  # fmt: skip

    # ---- what else the gates look at

    def _values(self, plan: RolloutPlan, state: RolloutState, had_it: Collection[str]) -> dict[str, dict[str, Pair]]:
        found: dict[str, dict[str, Pair]] = {}
        if state.shadowing:
            return self._tallies(plan, state)
        gates = [gate for gate in plan.judged_by() if gate.metric not in ("accuracy", "errors")]
        if any(gate.metric in _EVENTS for gate in gates):
            self._count_events(plan, state, found)
        if latencies := [gate.metric for gate in gates if gate.metric in LATENCIES]:
            self._add_latencies(plan, state, latencies, had_it, found)
        told = [gate for gate in gates if gate.metric.startswith(APP_METRIC)]
        if told:
            for device, (_, pairs) in self._summed_up(plan, state, told).items():
                found.setdefault(device, {}).update(pairs)
        return found

    def _tallies(self, plan: RolloutPlan, state: RolloutState) -> dict[str, dict[str, Pair]]:
        """Of the devices that run the release in shadow: what they told last, of all the time since they do."""
        found: dict[str, dict[str, Pair]] = {}
        rows = self._db.read(
            # with a bare column beside max(), SQLite gives the row of the maximum
            "SELECT device, body FROM (SELECT r.device, r.body, max(r.id) FROM reports r JOIN devices d"
            " ON d.name = r.device WHERE d.group_name = ? AND r.start >= ? GROUP BY r.device)",
            plan.group,
            state.stage_started,
        )
        for device, body in rows:
            for tally in unpack(body, Report).shadow:
                if tally.release == plan.release:
                    found[device] = _paired(tally)
        return found

    def _count_events(self, plan: RolloutPlan, state: RolloutState, found: dict[str, dict[str, Pair]]) -> None:
        """Crashes, rollbacks and alarms since the stage began; how many reports they are of is known elsewhere."""
        metric_of = {name: metric for metric, names in _EVENTS.items() for name in names}
        for device in self._names(plan.group):
            found.setdefault(device, {}).update(dict.fromkeys(_EVENTS, (Sums(), Sums())))
        rows = self._db.read(
            "SELECT e.device, e.name, count(*) FROM events e JOIN devices d ON d.name = e.device"
            " WHERE d.group_name = ?1 AND e.received >= ?2 AND e.time >= ?2"
            " AND e.name IN (SELECT value FROM json_each(?4))"
            " AND (d.row_release IS NOT ?3 OR e.release = ?3) GROUP BY e.device, e.name",
            plan.group,
            state.stage_started,
            plan.release,
            msgspec.json.encode(list(metric_of)).decode(),
        )
        for device, name, count in rows:
            sums = found[device][metric_of[name]][0]
            found[device][metric_of[name]] = (sums + Sums(0, count, count), Sums())

    def _add_latencies(
        self,
        plan: RolloutPlan,
        state: RolloutState,
        metrics: Sequence[str],
        had_it: Collection[str],
        found: dict[str, dict[str, Pair]],
    ) -> None:
        """What reports tell of their own windows, as logarithms: a quantile of so many milliseconds each."""
        sums = ", ".join(f"count(ln({name})), total(ln({name})), total(ln({name}) * ln({name}))" for name in metrics)
        rows = self._db.read(
            f"SELECT r.device, min(r.id), {sums} FROM reports r JOIN devices d ON d.name = r.device"  # noqa: S608
            " WHERE d.group_name = ?1 AND r.start >= ?3 AND (r.release = ?2) = (d.row_release IS ?2) GROUP BY r.device",
            plan.group,
            plan.release,
            state.stage_started,
        )
        pasts = self._past_of(plan, state.stage_started).latencies
        for device, first, *numbers in rows:
            key = (device, first, device in had_it)
            if key not in pasts:
                told = self._db.read(
                    f"SELECT {sums} FROM (SELECT {', '.join(LATENCIES)} FROM reports WHERE device = ? AND id < ?"  # noqa: S608
                    " AND start >= ? AND (release = ?) = ? AND p50_ms > 0 ORDER BY id DESC LIMIT ?)",
                    *(device, first, state.baseline_since, plan.release, device in had_it, _WINDOWS_BEFORE),
                )[0]
                pasts[key] = _threes(metrics, told)
            before = pasts[key]
            pairs = {name: (after, before[name]) for name, after in _threes(metrics, numbers).items()}
            found.setdefault(device, {}).update(pairs)

    def _names(self, group: str) -> list[str]:
        return [row[0] for row in self._db.read("SELECT name FROM devices WHERE group_name = ?", group)]

    def _summed_up(
        self, plan: RolloutPlan, state: RolloutState, gates: Collection[Gate]
    ) -> Mapping[str, tuple[bool, dict[str, Pair]]]:
        """The app's own metrics, which come in summaries.

        A summary of a large fleet is read once, not at every look: what a device's summaries say is kept here until
        it sends another, or changes its release.
        """
        look = self._looks.get(plan.salt)
        if look is None or look.since != state.stage_started:
            look = _Look(state.stage_started, 0.0, {})
        runs_it = {
            name: release == plan.release
            for name, release in self._db.read("SELECT name, row_release FROM devices WHERE group_name = ?", plan.group)
        }
        told = self._db.read(
            "SELECT device, max(received) FROM summaries WHERE received >= ? GROUP BY device",
            look.received or state.stage_started,
        )
        news = {device for device, _ in told if device in runs_it}
        news |= {device for device, (ran_it, _) in look.found.items() if runs_it.get(device) is not ran_it}
        found = {device: entry for device, entry in look.found.items() if device in runs_it}
        for device in sorted(news):
            found[device] = (runs_it[device], self._of_summaries(device, plan, state, gates, runs_it=runs_it[device]))
        received = max([look.received, *(time for _, time in told)])
        self._looks[plan.salt] = look._replace(received=received, found=found)
        _forget_oldest(self._looks)
        return found

    def _of_summaries(
        self, device: str, plan: RolloutPlan, state: RolloutState, gates: Iterable[Gate], *, runs_it: bool
    ) -> dict[str, Pair]:
        since = self._read_summaries(
            "WHERE device = ?1 AND start >= ?2 AND (release = ?3) = ?4 ORDER BY hour", device, state.stage_started,
            plan.release, runs_it,
        )  # fmt: skip
        if not since:
            return {}
        had_it = bool(
            self._db.read(
                "SELECT 1 FROM summaries WHERE device = ? AND start < ? AND release = ? LIMIT 1",
                device,
                state.stage_started,
                plan.release,
            )
        )
        before = self._read_summaries(
            "WHERE device = ?1 AND start < ?2 AND (release = ?3) = ?4 AND start >= ?5 ORDER BY hour DESC LIMIT ?6",
            device, min(summary.start for summary in since), plan.release, runs_it and had_it, state.baseline_since,
            _SUMMARIES_BEFORE,
        )  # fmt: skip
        pairs: dict[str, Pair] = {}
        for gate in gates:
            name = gate.metric.removeprefix(APP_METRIC)
            pairs[gate.metric] = (_recorded(name, since), _recorded(name, before))
        return pairs

    def _read_summaries(self, where: str, *args: object) -> list[Summary]:
        return [unpack(row[0], Summary) for row in self._db.read(f"SELECT body FROM summaries {where}", *args)]  # noqa: S608


def _threes(metrics: Sequence[str], numbers: Sequence[float]) -> dict[str, Sums]:
    return {name: Sums(*numbers[3 * place : 3 * place + 3]) for place, name in enumerate(metrics)}


def need_ln(conn: sqlite3.Connection) -> None:
    """The natural logarithm, with which not every SQLite is built."""
    try:
        conn.execute("SELECT ln(1)")
    except sqlite3.OperationalError:
        conn.create_function("ln", 1, lambda x: math.log(x) if x and x > 0 else None, deterministic=True)


def _forget_oldest(known: dict[str, Any]) -> None:
    """What belongs to rollouts that are over: few are under way at a time, and what is forgotten is read again."""
    while len(known) > _MOST_KEPT:
        del known[next(iter(known))]


def _paired(tally: ShadowTally) -> dict[str, Pair]:
    return {
        "accuracy": (Sums(tally.labelled, tally.won - tally.lost, tally.won + tally.lost), Sums()),
        # an input that it fails on is answered differently
        "disagreement": (share(tally.rows + tally.errors, tally.disagreed + tally.errors), Sums()),
    }


def _recorded(name: str, summaries: Iterable[Summary]) -> Sums:
    total = Sums()
    for summary in summaries:
        for metric in summary.metrics:
            if metric.name == name:
                mean_square = metric.std**2 + metric.mean**2
                total += Sums(metric.count, metric.count * metric.mean, metric.count * mean_square)
    return total
