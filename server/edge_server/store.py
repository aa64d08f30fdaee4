"""The coordinator's database: SQLite in WAL mode. SQL is here and in the `store_*.py` alone.

Other processes (the command line) may write to the same file at any time, so nothing is cached: every
decision reads what it needs inside the transaction that writes its outcome.

A new family of tables: append a step to `schema.py`, put the queries into a class in a `store_*.py` of its own
(it is given the connection), and name it below.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from edge_sdk.database import Database, copy_database
from edge_server.schema import STEPS
from edge_server.store_alerts import AlertStore
from edge_server.store_audit import AuditStore
from edge_server.store_candidates import CandidateStore
from edge_server.store_certificates import CertificateStore
from edge_server.store_commands import CommandStore
from edge_server.store_devices import DeviceStore
from edge_server.store_fleet import FleetStore
from edge_server.store_groups import GroupStore
from edge_server.store_ingest import IngestStore
from edge_server.store_labels import LabelStore
from edge_server.store_live import LiveStore
from edge_server.store_metrics import MetricsStore
from edge_server.store_releases import ReleaseStore
from edge_server.store_reports import ReportStore
from edge_server.store_rollouts import RolloutStore
from edge_server.store_rollups import RollupStore
from edge_server.store_secrets import SecretStore
from edge_server.store_segments import SegmentStore
from edge_server.store_users import UserStore

_CACHE_KB = 16_384
_CHECKPOINT_PAGES = 4000


class Store(Database):
    """Everything the coordinator must remember, by family.

    Writes happen inside `transaction`, which spans all families. To be used by one thread at a time.

    Args:
        path: The database file; made if it is missing. A damaged one is an error: a person decides what becomes of it.
        durable: Flush to the disk at every commit; False only for simulations.

    Example:
        >>> with store.transaction():  # doctest: +SKIP
        ...     store.devices.revoke("dev-1", now=now)
        ...     store.audit.add(now, "cli", "device revoked", {"device": "dev-1"})
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.kept = _keep_before_upgrade(path)
        """The copy that was made because the file is of an earlier form; None: it was not."""
        super().__init__(path, STEPS, durable=durable)
        # each device's part of every index is written to in turn: what is at hand is neither read nor written twice
        self.conn.execute(f"PRAGMA cache_size = {-_CACHE_KB}")
        self.conn.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        self.ingest = IngestStore(self)
        self.reports = ReportStore(self)
        self.devices = DeviceStore(self)
        self.labels = LabelStore(self)
        self.segments = SegmentStore(self)
        self.certificates = CertificateStore(self)
        self.secrets = SecretStore(self)
        self.commands = CommandStore(self)
        self.releases = ReleaseStore(self)
        self.groups = GroupStore(self)
        self.rollouts = RolloutStore(self)
        self.metrics = MetricsStore(self)
        self.candidates = CandidateStore(self)
        self.rollups = RollupStore(self)
        self.audit = AuditStore(self)
        self.users = UserStore(self)
        self.live = LiveStore(self)
        self.fleet = FleetStore(self)
        self.alerts = AlertStore(self)


def _keep_before_upgrade(path: Path) -> Path | None:
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as connection:
            form = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error:  # not a database, or not ours to read: opening it says so
        return None
    if not 0 < form < len(STEPS):
        return None
    copy = path.with_name(f"{path.name}.form-{form}")
    part = copy.with_name(f"{copy.name}.part")
    copy_database(path, part)
    return part.replace(copy)
