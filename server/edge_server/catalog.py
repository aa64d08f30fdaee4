"""The releases that are here: checkpoints that were taken in, and what of them is signed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuf.api.metadata import TargetFile

from edge_sdk.clock import Clock
from edge_sdk.manifest import Manifest, digest_of, parse_manifest
from edge_sdk.trust import target_path
from edge_server.errors import ReleaseError, UnknownReleaseError
from edge_server.keys import Repository
from edge_server.records import ReleaseRecord
from edge_server.releases import BlobStore, check, describe, take_in
from edge_server.settings import SigningSettings
from edge_server.store import Store


class Catalog:
    """Takes in checkpoints, and signs them as releases.

    Args:
        store: The coordinator's database.
        blobs: Files of the releases.
        repository: Signs them.
        settings: How many stay signed, and from how many patches are made.
        clock: Where the time comes from.
    """

    def __init__(
        self, store: Store, blobs: BlobStore, repository: Repository, *, settings: SigningSettings, clock: Clock
    ) -> None:
        self._store, self._blobs, self._repository = store, blobs, repository
        self._settings, self._clock = settings, clock

    def add(self, folder: Path, *, actor: str) -> ReleaseRecord:
        """See `Registry.add_release`."""
        release = self.take_in(folder)
        with self._store.transaction():
            if self.record(release):
                detail = {"release": release.release, "digest": release.digest}
                self._store.audit.add(self._clock.now(), actor, "release added", detail)
        return self.find(release.release)

    def take_in(self, folder: Path) -> ReleaseRecord:
        """Check a checkpoint and keep its files; it is no release before `record`. Errors as `Registry.add_release`."""
        manifest, data = check(folder)
        release = ReleaseRecord(
            release=manifest.release,
            name=manifest.name,
            digest=digest_of(data),
            size=len(data),
            parent=manifest.parent,
            labels=manifest.labels,
            metrics=manifest.metrics,
            pushed=self._clock.now(),
        )
        self._is_new(release)  # what is refused leaves no files behind
        take_in(folder, manifest, data, self._blobs)
        return release

    def find(self, number: int) -> ReleaseRecord:
        """The release of that number.

        Raises:
            UnknownReleaseError: There is none.
        """
        found = self._store.releases.find(number=number)
        if not found:
            raise UnknownReleaseError(f"there is no release {number}: edge-coordinator releases list")
        return found[0]

    def to_sign(self, release: ReleaseRecord) -> TargetFile | None:
        """What is signed of a release that was taken in; None: there are no keys."""
        if not self._repository.exists:
            return None
        known = self._repository.targets().get(target_path(release.release))
        if known is not None and known.hashes.get("sha256") == release.digest:
            return known
        return self._describe(release, self._patched_from())

    def sign(self, target: TargetFile) -> None:
        """Sign a release beside those that are signed and stay so.

        Raises:
            SigningError: A key is missing, or the root has expired.
            StoreError: A file cannot be read or kept.
        """
        self._repository.sign({**self._signed_still(), target.path: target})

    def sign_all(self) -> int:
        """See `Registry.sign_all`."""
        signed = self._signed_still()
        for release in self._kept():
            if target_path(release.release) not in signed:
                signed[target_path(release.release)] = self._describe(release)
        self._repository.sign(signed)
        return len(signed)

    def _describe(self, release: ReleaseRecord, before: Sequence[Manifest] = ()) -> TargetFile:
        data = self._blobs.read(release.digest)
        return describe(parse_manifest(data), data, self._blobs, before)

    def _kept(self) -> list[ReleaseRecord]:
        """The newest releases, and those that groups run; without withdrawn ones that nobody is told to run."""
        groups = self._store.groups.all()
        told = {group.base for group in groups}
        told |= {rollout.plan.release for rollout in self._store.rollouts.find(active=True)
                 if rollout.state.status in ("queued", "running")}  # fmt: skip
        for group in groups:
            told |= {part.plan.release for part in self._store.rollouts.parts(group.name, above=group.base or 0)}
        withdrawn = {number for group in groups for number in group.revoked} - told
        newest = self._store.releases.find(limit=self._settings.keep_releases)
        older = [record for number in told if number is not None for record in self._store.releases.find(number=number)]
        found = {record.release: record for record in (*newest, *older) if record.release not in withdrawn}
        return list(found.values())

    def _signed_still(self) -> dict[str, TargetFile]:
        """What is signed and stays so."""
        kept = {target_path(record.release) for record in self._kept()}
        return {path: target for path, target in self._repository.targets().items() if path in kept}

    def _patched_from(self) -> list[Manifest]:
        """The releases that devices are likely to have."""
        count = self._settings.patches_from
        records = sorted(self._kept(), key=lambda record: -record.release)[:count]
        return [parse_manifest(self._blobs.read(record.digest)) for record in records]

    def require_won(self, release: ReleaseRecord, force: str) -> None:
        """Refuse a candidate that was measured against the base and lost, unless a person says why it ships.

        Raises:
            ReleaseError: It lost, and nobody says why it ships.
        """
        evaluation = self._store.candidates.find(release.digest)
        if evaluation is not None and evaluation.verdict == "lost" and not force:
            raise ReleaseError(
                f"release {release.release} lost against release {evaluation.champion} on the held-out rows: "
                f"{evaluation.reason}; push it anyway with --force and a reason"
            )

    def record(self, release: ReleaseRecord) -> bool:
        """Keep what was taken in as a release; whether it was not one before. Belongs inside a transaction."""
        new = self._is_new(release)
        if new:
            self._store.releases.add(release)
        return new

    def _is_new(self, release: ReleaseRecord) -> bool:
        """Whether it is to be added; False: it is here.

        Raises:
            ReleaseError: Its number is not above all others, or is that of other content.
        """
        if known := self._store.releases.find(number=release.release):
            if known[0].digest != release.digest:
                raise ReleaseError(
                    f"release {release.release} was pushed before with other content: give the checkpoint a new number"
                )
            return False
        newest = self._store.releases.find()
        if newest and release.release < newest[0].release:
            raise ReleaseError(
                f"release {release.release} is older than {newest[0].release}: release numbers only ever rise"
            )
        return True
