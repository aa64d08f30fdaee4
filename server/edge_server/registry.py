"""What a person or the coordinator may do with the fleet's records: push, abort, look.

The command line works on the same database from a process of its own. So whatever changes what a group should
run stores the new desired state in the same transaction; whoever holds the connection publishes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edge_sdk.clock import Clock, SystemClock
from edge_sdk.files import storage_error
from edge_sdk.manifest import CARD, parse_manifest
from edge_sdk.messages import Report, as_json
from edge_sdk.trust import target_path
from edge_server.alert_sources import Sources
from edge_server.alerting import Alerting
from edge_server.catalog import Catalog
from edge_server.enrol import Bundle, enrol, password_file
from edge_server.errors import DeviceError, UnknownDeviceError, UnknownReleaseError
from edge_server.identity import Identities
from edge_server.insight import Insight
from edge_server.keys import Repository
from edge_server.labels import MAX_LABELS, Is, Query, Several, parse
from edge_server.modes import Modes
from edge_server.plan import RolloutPlan, RolloutRules
from edge_server.power import Power
from edge_server.records import (
    DeviceRecord,
    EventRecord,
    FleetRecord,
    Glance,
    ReleaseDetail,
    ReleaseRecord,
    RolloutRecord,
)
from edge_server.releases import BlobStore
from edge_server.segments import Segments
from edge_server.settings import Settings
from edge_server.shipping import Shipping
from edge_server.store import Store
from edge_server.users import Users


class Registry:
    """The fleet's records. To be used by one thread at a time; several processes may have one each.

    Args:
        home: The coordinator's folder; made if it is missing.
        settings: As read from its `coordinator.toml`.
        clock: Where the time comes from.
    """

    def __init__(self, home: Path, *, settings: Settings | None = None, clock: Clock | None = None) -> None:
        self.home = home
        self.settings = settings or Settings()
        self.clock = clock or SystemClock()
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"cannot make {home}") from error
        self.blobs = BlobStore(home / self.settings.blobs)
        self.repository = Repository(home, settings=self.settings.signing, clock=self.clock)
        self.store = Store(home / self.settings.database, durable=self.settings.durable)
        self.identities = Identities(home, store=self.store, settings=self.settings, clock=self.clock)
        self.insight = Insight(self.store, self.blobs, settings=self.settings, clock=self.clock)
        self.alerts = Alerting(
            Sources(
                home,
                store=self.store,
                repository=self.repository,
                drift=self.insight.drift,
                settings=self.settings.alerts,
            ),
            store=self.store,
            settings=self.settings.alerts,
            clock=self.clock,
        )
        self.segments = Segments(self.store, clock=self.clock)
        self.users = Users(self.store, clock=self.clock, session_s=self.settings.http.session_hours * 3600)
        self.modes = Modes(self.store, self.identities, clock=self.clock)
        self.catalog = Catalog(
            self.store, self.blobs, self.repository, settings=self.settings.signing, clock=self.clock
        )
        self.shipping = Shipping(
            self.store, self.catalog, settings=self.settings, clock=self.clock, select=self._select
        )

    def close(self) -> None:
        """Close the database."""
        self.store.close()

    def reopen(self) -> Registry:
        """The same records with a connection of its own, for another thread."""
        return Registry(self.home, settings=self.settings, clock=self.clock)

    def _select(self, group: str, where: str) -> Collection[str] | None:
        """Names of a group's devices with the labels of a query; None: all of them."""
        if not where:
            return None
        return set(self.store.labels.matching(Several((Is("group", (group,)), self._parse(where)), all_of=True)))

    # ---- labels

    def label(self, name: str, changes: Mapping[str, str | None], *, actor: str) -> dict[str, str]:
        """Set labels of a device, None takes one away; returns those it has then.

        Args:
            name: Of the device.
            changes: By key, as `labels.parse_label` reads them.
            actor: Who asks, for the audit.

        Raises:
            UnknownDeviceError: There is no such device.
            DeviceError: It would have more than `MAX_LABELS`.
            StoreError: Nothing changed.
        """
        with self.store.transaction():
            self.device(name)
            self.store.labels.set(name, changes)
            labels = self.store.labels.of(name)
            if len(labels) > MAX_LABELS:
                raise DeviceError(f"{name} would have {len(labels)} labels; at most {MAX_LABELS} are kept")
            self.store.audit.add(self.clock.now(), actor, "device labelled", {"device": name, "labels": dict(changes)})
        return labels

    def matching(self, query: str) -> list[str]:
        """Names of the devices that a label query is true of; see `labels`.

        Raises:
            ConfigError: It is no query.
        """
        return self.store.labels.matching(self._parse(query))

    def _parse(self, query: str) -> Query:
        return parse(self.store.segments.spell_out(query))

    # ---- releases and rollouts

    def push(
        self,
        folder: Path,
        *,
        group: str = "default",
        plan: RolloutRules | None = None,
        actor: str = "library",
        force: str = "",
    ) -> int:
        """Take in a checkpoint and start its rollout; returns the rollout's number.

        The first release of a group has nothing to be compared with and goes to all at once.

        Args:
            folder: The checkpoint.
            group: Who gets it.
            plan: The rules; None takes those of the settings.
            actor: Who asks, for the audit.
            force: Why it ships although it lost against the release in use; "": then it does not.

        Raises:
            IntegrityError: A file of the checkpoint is missing or altered.
            IncompatibleError: The checkpoint is of a newer form.
            ReleaseError: The release number is not above all earlier ones, or the release lost against the one in use.
            RolloutError: Another rollout is for some of the same devices, `plan` is for something else, or an A/B test
                would see too little.
            SigningError: There are keys, and the release cannot be signed with them.
            ConfigError: The group's name cannot stand in a topic.
            StoreError: Nothing was recorded.
        """
        return self.shipping.push(folder, group=group, plan=plan, actor=actor, force=force)

    def add_release(self, folder: Path, *, actor: str = "library") -> ReleaseRecord:
        """Take in a checkpoint without a rollout; the same content again changes nothing.

        Raises:
            IntegrityError: A file of the checkpoint is missing or altered.
            IncompatibleError: The checkpoint is of a newer form.
            ReleaseError: The release number is not above all earlier ones, or is that of other content.
            DiskFullError, StoreError: Nothing was recorded.
        """
        return self.catalog.add(folder, actor=actor)

    def ship(
        self,
        release: int,
        *,
        group: str = "default",
        plan: RolloutRules | None = None,
        actor: str = "library",
        force: str = "",
    ) -> int:
        """Start the rollout of a release that was pushed before, to another group; returns the rollout's number.

        Raises:
            UnknownReleaseError: There is none of that number.
            ReleaseError, RolloutError, SigningError, ConfigError, StoreError: As `push`.
        """
        return self.shipping.ship(release, group=group, plan=plan, actor=actor, force=force)

    def sign_all(self) -> int:
        """Sign every release that devices may still be told to run; returns how many.

        Raises:
            SigningError: A key is missing, or the root has expired.
            StoreError: A file cannot be read or kept.
        """
        return self.catalog.sign_all()

    def reach(self, plan: RolloutPlan) -> int:
        """How many devices the plan is for as things are: of its group, with its labels, not revoked."""
        return self.shipping.reach(plan)

    def power(self, release: int, *, group: str = "default", plan: RolloutRules | None = None) -> Power | None:
        """What the A/B test that `ship` would start can be expected to see; None: it would be none.

        Raises:
            UnknownReleaseError: There is none of that number.
            ConfigError: The devices are chosen by what is no query.
        """
        return self.shipping.calculate(release, group=group, plan=plan)

    def advance(self) -> list[RolloutRecord]:
        """Give every active rollout one turn; returns those that went on, or told other devices.

        Raises:
            StoreError: Nothing changed.
        """
        return self.shipping.advance()

    def approve(self, rollout: int, *, reason: str = "", actor: str = "library") -> None:
        """Let the stage begin that waits for a person.

        Raises:
            UnknownRolloutError: There is no such rollout.
            RolloutError: It waits for no approval.
        """
        self.shipping.approve(rollout, reason=reason, actor=actor)

    def pause(self, rollout: int, *, reason: str = "", actor: str = "library") -> None:
        """Tell no further device and begin no stage until `resume`; who runs it keeps it, and gates still halt.

        Raises:
            UnknownRolloutError: There is no such rollout.
            RolloutError: It is not running, or paused already.
        """
        self.shipping.pause(rollout, reason=reason, actor=actor)

    def resume(self, rollout: int, *, actor: str = "library") -> None:
        """Go on with a rollout that was paused.

        Raises:
            UnknownRolloutError: There is no such rollout.
            RolloutError: It is not paused.
        """
        self.shipping.resume(rollout, actor=actor)

    def abort(self, rollout: int, *, reason: str = "", actor: str = "library") -> None:
        """Withdraw a release that is on its way; devices that run it go back to what they had.

        Raises:
            UnknownRolloutError: There is no such rollout.
            RolloutError: It is not running.
        """
        self.shipping.abort(rollout, reason=reason, actor=actor)

    # ---- looking

    def fleet(self) -> FleetRecord:
        """The fleet in numbers."""
        return self.store.devices.fleet()

    def devices(self, *, group: str | None = None, after: str = "", limit: int = 100_000) -> list[DeviceRecord]:
        """Devices whose name comes after `after`, in order."""
        return self.store.devices.page(group=group, after=after, limit=limit)

    def glance(self) -> list[Glance]:
        """Every device that was not revoked, by group and name, in the least detail."""
        return self.store.devices.glance()

    def device(self, name: str) -> DeviceRecord:
        """The device of that name.

        Raises:
            UnknownDeviceError: There is none.
        """
        record = self.store.devices.get(name)
        if record is None:
            raise UnknownDeviceError(f"there is no device {name!r}")
        return record

    def last_report(self, name: str) -> dict[str, Any] | None:
        """The newest report of a device with field names, or None."""
        report = self.store.reports.last(name)
        return None if report is None else as_json(report)

    def is_signed(self, release: int) -> bool:
        """Whether devices with keys would take the release."""
        return self.repository.exists and target_path(release) in self.repository.targets()

    def reports(self, device: str, *, before: int | None = None, limit: int = 100) -> list[tuple[int, float, Report]]:
        """Number, time and report of a device below `before`, newest first."""
        return self.store.reports.find(device, before=before, limit=limit)

    def releases(self, *, before: int | None = None, limit: int = 1000) -> list[ReleaseRecord]:
        """Releases below `before`, newest first."""
        return self.store.releases.find(before=before, limit=limit)

    def release(self, number: int) -> ReleaseDetail:
        """A release with its lineage and its model card.

        Raises:
            UnknownReleaseError: There is none of that number.
            StoreError: Its files cannot be read.
        """
        line = self.store.releases.lineage(number)
        if not line:
            raise UnknownReleaseError(f"there is no release {number}")
        manifest = parse_manifest(self.blobs.read(line[0].digest))
        card = self.blobs.read(manifest.files[CARD].sha256).decode("utf-8", "replace")
        return ReleaseDetail(release=line[0], lineage=line[1:], origin=line[-1].parent, card=card)

    def note(self, actor: str, action: str, detail: dict[str, Any]) -> None:
        """Write to the audit log what was done outside of the database."""
        with self.store.transaction():
            self.store.audit.add(self.clock.now(), actor, action, detail)

    def rollouts(self, *, before: int | None = None, limit: int = 1000) -> list[RolloutRecord]:
        """Rollouts below `before`, newest first."""
        return self.store.rollouts.find(before=before, limit=limit)

    def rollout(self, number: int) -> RolloutRecord:
        """The rollout of that number.

        Raises:
            UnknownRolloutError: There is none.
        """
        return self.shipping.find(number)

    def events(
        self,
        *,
        device: str | None = None,
        name: str | None = None,
        before: int | None = None,
        limit: int = 1000,
    ) -> list[EventRecord]:
        """Events with a number below `before`, newest first."""
        return self.store.reports.events(device=device, name=name, before=before, limit=limit)

    # ---- devices

    def forget_presence(self) -> None:
        """Count no device as online until its retained state says so again: the coordinator was away.

        Raises:
            StoreError: Nothing changed.
        """
        with self.store.transaction():
            self.store.devices.forget_presence()

    def enrol(self, name: str, *, group: str, out: Path, actor: str) -> Bundle:
        """Register a device and write its bundle; see `enrol.enrol`."""
        root = self.repository.root().decode() if self.repository.exists else ""
        credentials, now = self.identities.credentials(name), self.clock.now()
        return enrol(
            self.store,
            self.settings,
            name,
            group=group,
            out=out,
            actor=actor,
            now=now,
            root=root,
            credentials=credentials,
        )

    def replace(self, name: str, *, out: Path, actor: str) -> Bundle:
        """Enrol a device anew under its name; see `Identities.replace`."""
        root = self.repository.root().decode() if self.repository.exists else ""
        return self.identities.replace(name, out=out, actor=actor, root=root)

    def password_file(self) -> str:
        """Names and hashed passwords of all enrolled devices, for mosquitto."""
        return password_file(self.store)
