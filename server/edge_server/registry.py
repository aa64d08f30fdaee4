"""What a person or the coordinator may do with the fleet's records: push, abort, look.

The command line works on the same database from a process of its own. So whatever changes what a group should
run stores the new desired state in the same transaction; whoever holds the connection publishes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from tuf.api.metadata import TargetFile

from edge_sdk.clock import Clock, SystemClock
from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.files import storage_error
from edge_sdk.manifest import Manifest, digest_of, parse_manifest
from edge_sdk.messages import Desired, Offer, as_json, check_name, decode, encode
from edge_sdk.trust import target_path
from edge_server.alert_sources import Sources
from edge_server.alerting import Alerting
from edge_server.enrol import Bundle, enrol, password_file
from edge_server.errors import ReleaseError, RolloutError, UnknownDeviceError, UnknownRolloutError
from edge_server.identity import Identities
from edge_server.insight import Insight
from edge_server.keys import Repository
from edge_server.records import (
    DeviceRecord,
    EventRecord,
    FleetRecord,
    GroupRecord,
    ReleaseRecord,
    RolloutRecord,
)
from edge_server.releases import BlobStore, describe, take_in
from edge_server.rollout import RolloutPlan, RolloutRules, advance, begin, desired, halt
from edge_server.settings import Settings
from edge_server.store import Store


class Registry:
    """The fleet's records. To be used by one thread at a time; several processes may have one each.

    Args:
        home: The coordinator's folder; made if it is missing.
        settings: As read from its `coordinator.toml`.
        clock: Where the time comes from.
    """

    def __init__(self, home: Path, *, settings: Settings | None = None, clock: Clock | None = None) -> None:
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

    def close(self) -> None:
        """Close the database."""
        self.store.close()

    # ---- releases and rollouts

    def push(
        self,
        folder: Path,
        *,
        group: str = "default",
        plan: RolloutRules | None = None,
        actor: str = "library",
    ) -> int:
        """Take in a checkpoint and start its rollout; returns the rollout's number.

        The first release of a group has nothing to be compared with and goes to all at once.

        Args:
            folder: The checkpoint.
            group: Who gets it.
            plan: The rules; None takes those of the settings.
            actor: Who asks, for the audit.

        Raises:
            IntegrityError: A file of the checkpoint is missing or altered.
            IncompatibleError: The checkpoint is of a newer form.
            ReleaseError: The release number is not above all earlier ones.
            RolloutError: The group has an active rollout, or `plan` is for something else.
            SigningError: There are keys, and the release cannot be signed with them.
            ConfigError: The group's name cannot stand in a topic.
            StoreError: Nothing was recorded.
        """
        try:
            check_name(group, "group")
        except ProtocolError as error:
            raise ConfigError(str(error)) from error
        manifest, data = take_in(folder, self.blobs)
        release = ReleaseRecord(
            release=manifest.release,
            name=manifest.name,
            digest=digest_of(data),
            size=len(data),
            parent=manifest.parent,
            labels=manifest.labels,
            metrics=manifest.metrics,
            pushed=self.clock.now(),
        )
        full_plan = _plan(plan or self.settings.rollout, release.release, group)
        target = None
        if self.repository.exists:
            target = self.repository.targets().get(target_path(release.release))
            if target is None or target.hashes.get("sha256") != release.digest:
                target = describe(manifest, data, self.blobs, self._patched_from())
        with self.store.transaction():
            self._record_release(release)
            rollout = self._start(full_plan, actor)
            if target is not None:  # the last that can fail: nobody is offered what is not signed
                self.repository.sign({**self._signed_still(), target.path: target})
            return rollout

    def sign_all(self) -> int:
        """Sign every release that devices may still be told to run; returns how many.

        Raises:
            SigningError: A key is missing, or the root has expired.
            StoreError: A file cannot be read or kept.
        """
        signed = self._signed_still()
        for release in self._kept():
            if target_path(release.release) not in signed:
                data = self.blobs.read(release.digest)
                signed[target_path(release.release)] = describe(parse_manifest(data), data, self.blobs)
        self.repository.sign(signed)
        return len(signed)

    def _kept(self) -> list[ReleaseRecord]:
        """The newest releases, and those that groups run; without withdrawn ones that nobody is told to run."""
        groups = self.store.groups.all()
        told = {group.base for group in groups}
        told |= {
            rollout.plan.release
            for rollout in self.store.rollouts.find(active=True)
            if rollout.state.status == "running"
        }
        withdrawn = {number for group in groups for number in group.revoked} - told
        newest = self.store.releases.find(limit=self.settings.signing.keep_releases)
        older = [record for number in told if number is not None for record in self.store.releases.find(number=number)]
        found = {record.release: record for record in (*newest, *older) if record.release not in withdrawn}
        return list(found.values())

    def _signed_still(self) -> dict[str, TargetFile]:
        """What is signed and stays so."""
        kept = {target_path(record.release) for record in self._kept()}
        return {path: target for path, target in self.repository.targets().items() if path in kept}

    def _patched_from(self) -> list[Manifest]:
        """The releases that devices are likely to have."""
        count = self.settings.signing.patches_from
        records = sorted(self._kept(), key=lambda record: -record.release)[:count]
        return [parse_manifest(self.blobs.read(record.digest)) for record in records]

    def _record_release(self, release: ReleaseRecord) -> None:
        if known := self.store.releases.find(number=release.release):
            if known[0].digest != release.digest:
                raise ReleaseError(
                    f"release {release.release} was pushed before with other content: give the checkpoint a new number"
                )
            return
        newest = self.store.releases.find()
        if newest and release.release < newest[0].release:
            raise ReleaseError(
                f"release {release.release} is older than {newest[0].release}: release numbers only ever rise"
            )
        self.store.releases.add(release)

    def _start(self, plan: RolloutPlan, actor: str) -> int:
        for earlier in self.store.rollouts.find(group=plan.group):
            if earlier.state.is_active:
                raise RolloutError(
                    f"group {plan.group!r} is busy with rollout {earlier.id} of release "
                    f"{earlier.plan.release} ({earlier.state.status}): wait for its end, or abort it"
                )
            if plan.release <= earlier.plan.release:
                raise ReleaseError(
                    f"group {plan.group!r} had release {earlier.plan.release} already: push one above it, "
                    f"not {plan.release}"
                )
        now = self.clock.now()
        group = self.store.groups.get(plan.group)
        metrics = self.store.rollouts.metrics(plan, None, now=now)
        rollout = RolloutRecord(
            id=self.store.rollouts.next_id(),
            started=now,
            plan=plan,
            state=begin(plan, metrics, has_base=group.base is not None, now=now),
        )
        self._save(rollout)
        self.store.audit.add(now, actor, "release pushed", {"release": plan.release, "group": plan.group})
        return rollout.id

    def advance(self) -> list[RolloutRecord]:
        """Give every active rollout one turn; returns those that changed their status, stage or threshold.

        Raises:
            StoreError: Nothing changed.
        """
        changed = []
        with self.store.transaction():
            now = self.clock.now()
            for rollout in self.store.rollouts.find(active=True):
                metrics = self.store.rollouts.metrics(rollout.plan, rollout.state, now=now)
                state = advance(rollout.state, rollout.plan, metrics, now)
                if state != rollout.state:
                    changed.append(msgspec.structs.replace(rollout, state=state))
                    self._save(changed[-1])
        return changed

    def abort(self, rollout: int, *, reason: str = "", actor: str = "library") -> None:
        """Withdraw a release that is on its way; devices that run it go back to what they had.

        Raises:
            UnknownRolloutError: There is no such rollout.
            RolloutError: It is not running.
        """
        with self.store.transaction():
            record = self.rollout(rollout)
            if record.state.status != "running":
                raise RolloutError(f"rollout {rollout} is {record.state.status}: only a running one can be aborted")
            now = self.clock.now()
            text = f"aborted: {reason}" if reason else "aborted"
            self._save(msgspec.structs.replace(record, state=halt(record.state, text, now)))
            self.store.audit.add(now, actor, "rollout aborted", {"rollout": rollout, "reason": reason})

    def _save(self, rollout: RolloutRecord) -> None:
        """Store a rollout and what follows from it for its group."""
        self.store.rollouts.save(rollout)
        group = self.store.groups.get(rollout.plan.group)
        base, revoked = group.base, set(group.revoked)
        if rollout.state.status == "completed":
            base = rollout.plan.release
        elif rollout.state.status == "rolling_back":
            revoked.add(rollout.plan.release)
        message = desired(
            revision=group.revision,
            base=self._offer(base),
            candidate=self._offer(rollout.plan.release),
            salt=rollout.plan.salt,
            threshold=rollout.state.threshold,
            revoked=sorted(revoked),
        )
        if group.desired and decode(group.desired, Desired) == message:
            return
        message = msgspec.structs.replace(message, revision=group.revision + 1)
        self.store.groups.save(
            GroupRecord(
                name=group.name,
                revision=message.revision,
                base=base,
                revoked=tuple(sorted(revoked)),
                desired=encode(message),
            )
        )

    def _offer(self, release: int | None) -> Offer | None:
        if release is None:
            return None
        record = self.store.releases.find(number=release)[0]
        return Offer(record.release, record.digest, record.size)

    # ---- looking

    def fleet(self) -> FleetRecord:
        """The fleet in numbers."""
        return self.store.devices.fleet()

    def devices(self, *, group: str | None = None, after: str = "", limit: int = 100_000) -> list[DeviceRecord]:
        """Devices whose name comes after `after`, in order."""
        return self.store.devices.page(group=group, after=after, limit=limit)

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

    def releases(self, *, before: int | None = None, limit: int = 1000) -> list[ReleaseRecord]:
        """Releases below `before`, newest first."""
        return self.store.releases.find(before=before, limit=limit)

    def rollouts(self, *, before: int | None = None, limit: int = 1000) -> list[RolloutRecord]:
        """Rollouts below `before`, newest first."""
        return self.store.rollouts.find(before=before, limit=limit)

    def rollout(self, number: int) -> RolloutRecord:
        """The rollout of that number.

        Raises:
            UnknownRolloutError: There is none.
        """
        found = self.store.rollouts.find(number=number)
        if not found:
            raise UnknownRolloutError(f"there is no rollout {number}")
        return found[0]

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


def _plan(rules: RolloutRules, release: int, group: str) -> RolloutPlan:
    if isinstance(rules, RolloutPlan):
        if (rules.release, rules.group) != (release, group):
            raise RolloutError(
                f"the plan is for release {rules.release} and group {rules.group!r}, "
                f"the push for {release} and {group!r}"
            )
        return rules
    return RolloutPlan(release=release, group=group, **msgspec.structs.asdict(rules))
