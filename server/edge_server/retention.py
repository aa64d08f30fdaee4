"""What becomes of old rows: added up over minutes, hours and days, and deleted when their time has come.

Done a little at a time beside the ingest: each call is one short transaction.
"""

from __future__ import annotations

from edge_server.settings import RetentionSettings
from edge_server.store import Store
from edge_server.store_rollups import HOUR, MINUTE

REPORTS = 1_000
"""Most rows of a call, which takes some tens of milliseconds."""
_SUMMARIES = 200
_DAYS = 4
"""Of a device, added up in one call: 10 ms each, at most 50 if it tells of more than one summary an hour."""
_DAY_S = 86_400.0


def tend(store: Store, settings: RetentionSettings, now: float) -> bool:
    """Add up what came, delete what is too old, within one transaction.

    Args:
        store: Nothing may be under way in it.
        settings: How long what is kept.
        now: Seconds since the epoch.

    Returns:
        Whether there is more to do.

    Raises:
        StoreError: Nothing changed.
    """
    with store.transaction():
        rollups = store.rollups
        full = [rollups.add_reports(REPORTS) == REPORTS, rollups.add_summaries(_SUMMARIES) == _SUMMARIES]
        for table, days in (
            ("reports", settings.reports_days),
            ("events", settings.events_days),
            ("gaps", settings.events_days),
            ("rejected", settings.reports_days),
        ):
            if days:
                full.append(rollups.drop_rows(table, before=now - days * _DAY_S, limit=REPORTS) == REPORTS)
        before = now - settings.summaries_days * _DAY_S
        full.append(rollups.add_up_days(before=before, limit=_DAYS) == _DAYS)
        if settings.day_summaries_days:
            before = now - settings.day_summaries_days * _DAY_S
            full.append(rollups.drop_summaries(before=before, limit=REPORTS) == REPORTS)
        for span, days in ((MINUTE, settings.minutes_days), (HOUR, settings.hours_days)):
            if days:
                full.append(rollups.drop_sums(span, before=now - days * _DAY_S, limit=REPORTS) == REPORTS)
    return any(full)
