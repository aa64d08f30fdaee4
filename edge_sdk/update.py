"""The update client: learns what the device should run, and fetches it in blocks that survive anything.

A release is a manifest and the files it names; all of them travel as content-addressed blobs. What an installed
release already holds is never fetched again. Checked here are SHA-256, size and a rising release number, and, before
the first block is asked for and again before anything is installed, that signed metadata names the offer (`trust`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.clock import is_due
from edge_sdk.config import UpdateConfig
from edge_sdk.errors import ArtifactError, DiskFullError, IntegrityError, NotConnectedError, RollbackRefusedError
from edge_sdk.files import crashpoint, flush, fsync_folder, remove_tree, replace_file, sha256_file, storage_error
from edge_sdk.index import MAX_INDEX, Patch, ReleaseIndex, apply_patch, can_patch, parse_index
from edge_sdk.manifest import Manifest, digest_of, parse_manifest
from edge_sdk.messages import (
    Desired,
    MetadataSet,
    Need,
    Offer,
    Topics,
    block_count,
    cohort,
    encode,
    from_bitmap,
    to_bitmap,
)
from edge_sdk.ranges import HttpSource, set_of
from edge_sdk.transport import Transport
from edge_sdk.trust import SignedRelease, Trust

logger = logging.getLogger(__name__)
_MAX_MANIFEST = 4_000_000
_MAX_DAMAGED = 3


@dataclass(frozen=True)
class FetchedRelease:
    """A release whose every byte is here and has the right hash."""

    offer: Offer
    manifest: bytes
    files: dict[str, Path]
    """By SHA-256."""


class Download:
    """One blob on its way: blocks written in place, and a map of those that are safely on disk.

    The map is written only after the blocks it names were flushed, so that after a power cut it never promises too
    much; a block that is on disk but not in the map is merely fetched again.
    """

    def __init__(self, folder: Path, digest: str, size: int, block_bytes: int, hashes: Sequence[bytes] = ()) -> None:
        self.digest, self.size, self.block_bytes = digest, size, block_bytes
        self._hashes = hashes
        self.count = block_count(size, block_bytes)
        self.path = folder / digest
        self._part = folder / f"{digest}.part"
        self._map = folder / f"{digest}.map"
        self._have: set[int] = set()
        self._unflushed: set[int] = set()
        if self._map.exists() and self._part.exists():
            self._have = from_bitmap(self._map.read_bytes(), self.count)

    @property
    def complete(self) -> bool:
        """Whether every block is here."""
        return len(self._have) + len(self._unflushed) == self.count

    def missing(self) -> list[int]:
        """Blocks that are not here, in order."""
        return [i for i in range(self.count) if i not in self._have and i not in self._unflushed]

    def write(self, index: int, payload: bytes) -> bool:
        """Put a block in its place; False if it is not one that is missing, or not the one that was signed.

        Raises:
            DiskFullError, StoreError: It cannot be written.
        """
        expected = min(self.block_bytes, self.size - index * self.block_bytes)
        if index in self._have or index in self._unflushed or len(payload) != expected or index >= self.count:
            return False
        if self._hashes and hashlib.sha256(payload).digest() != self._hashes[index]:
            logger.warning("block %d of %s is damaged and is fetched again", index, self.digest[:12])
            return False
        try:
            descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                written = 0
                while written < len(payload):  # a disk that is nearly full takes a part of it first
                    written += os.pwrite(descriptor, payload[written:], index * self.block_bytes + written)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error(error, f"block {index} of {self.digest[:12]} cannot be written") from error
        self._unflushed.add(index)
        return True

    def flush(self) -> None:
        """Make the blocks written so far safe, and note them.

        Raises:
            DiskFullError, StoreError: They cannot be; they will be fetched again.
        """
        if not self._unflushed:
            return
        try:
            descriptor = os.open(self._part, os.O_RDONLY)
            try:
                flush(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._unflushed.clear()
            raise storage_error(error, f"{self.digest[:12]} cannot be flushed") from error
        crashpoint("blocks:flushed")
        replace_file(self._map, to_bitmap(self._have | self._unflushed, self.count))
        self._have |= self._unflushed
        self._unflushed.clear()

    def finish(self) -> None:
        """Check the hash and give the file its name.

        Raises:
            IntegrityError: The hash differs; all blocks are thrown away.
        """
        if self.size == 0:
            self._part.touch()
        if sha256_file(self._part) != self.digest:
            self._part.unlink()
            self._map.unlink(missing_ok=True)
            self._have.clear()
            raise IntegrityError(f"the blocks of {self.digest[:12]}… do not have its SHA-256")
        self._part.replace(self.path)
        crashpoint("blocks:finished")
        self._map.unlink(missing_ok=True)
        fsync_folder(self.path.parent)


class UpdateClient:
    """Follows the desired state, and fetches one release at a time.

    Args:
        folder: For what is on its way.
        device: This device's name.
        topics: Of the coordinator's prefix.
        transport: Where to ask.
        config: Limits.
        trust: Says which releases are signed; None: they are not, and none is asked for a signature.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        topics: Topics,
        transport: Transport,
        config: UpdateConfig,
        trust: Trust | None = None,
    ) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._device, self._topics, self._transport, self._config = device, topics, transport, config
        self.desired: Desired | None = None
        self._offer: Offer | None = None
        self._download: Download | None = None
        self._asked_at: float | None = None
        self._asked: set[int] = set()
        self._asked_on = 0
        self._full_at: float | None = None
        self._sound: dict[str, bool] = {}
        self._damaged = 0
        self.trust = trust
        self._source = HttpSource(config.url, retry_s=10 * config.retry_s) if config.url else None
        self._looked_at: float | None = None
        self._signed: SignedRelease | None = None
        self._index: ReleaseIndex | None = None
        self._unpatchable: set[str] = set()

    def authorise(self, offer: Offer, now: float) -> bool:
        """Whether the offer may be fetched; False: what would vouch for it has not come yet.

        Raises:
            UntrustedError: Nothing vouches for it.
            StoreError: Metadata cannot be written.
        """
        if self.trust is None:
            self._signed = None
            return True
        self._signed = None
        source = self._source
        if source is not None and (found := source.metadata()):
            # what came over MQTT meanwhile is at least as new: a set that does not fit together only waits
            for name, data in found.items():
                self.trust.take(name, data)
            self.trust.announce(MetadataSet(**set_of(found, self.trust.root_version)))
        signed = None
        try:
            signed = self.trust.require(offer, now)
        finally:
            if signed is None and source is not None:
                self._look_for_metadata(source, now)
        self._signed = signed
        return signed is not None

    def _look_for_metadata(self, source: HttpSource, now: float) -> None:
        due = self._looked_at is None or is_due(now, self._looked_at, self._config.retry_s)
        if self.trust is not None and self.trust.root_version and due and source.usable(now):
            self._looked_at = now
            source.ask_metadata(self.trust.root_version)

    @property
    def fetching(self) -> Offer | None:
        """The release on its way, if one is."""
        return self._offer

    def follow(self, desired: Desired) -> None:
        """Take a new desired state; a stale one is ignored."""
        if self.desired is None or desired.revision >= self.desired.revision:
            self.desired = desired

    def offered(self, installed: int | None, refused: Mapping[str, str]) -> Offer | None:
        """The release that this device should fetch now, or None.

        Args:
            installed: Number of the release in use.
            refused: Releases that failed here before, by digest, with the reason.

        Raises:
            RollbackRefusedError: The offer is older than what is installed.
        """
        if self.desired is None:
            return None
        desired = self.desired
        candidate = desired.candidate
        included = candidate is not None and cohort(desired.salt, self._device) < desired.threshold
        # a candidate that cannot be had here leaves the base to be had
        for offer in (candidate if included else None, desired.base):
            if offer is None or offer.digest in refused or offer.release in desired.revoked:
                continue
            if offer.release == installed:
                return None
            if installed is not None and offer.release < installed:
                if candidate is not None and candidate.release == installed:
                    return None  # installed early, by hand: it stays
                raise RollbackRefusedError(f"release {offer.release} is older than the installed {installed}")
            return offer
        return None

    def begin(self, offer: Offer) -> None:
        """Start to fetch a release, dropping any other that was on its way.

        Raises:
            IntegrityError: The offer is larger than the limits allow.
        """
        if self._offer == offer:
            return
        self.abandon()
        if not 0 < offer.size <= _MAX_MANIFEST:
            raise IntegrityError(f"release {offer.release} has a manifest of {offer.size} bytes")
        if self.trust is None:
            logger.warning("release %d is not signed: it is fetched because update.trust is none", offer.release)
        self._offer = offer
        self._damaged = 0
        self._sound = {}
        self._index = None
        self._unpatchable = set()

    def abandon(self) -> None:
        """Stop fetching; blocks that are here stay for another try."""
        if self._download is not None:
            self._transport.unsubscribe(self._topics.block(self._download.digest, "+"))
        self._offer, self._download, self._asked_at = None, None, None

    def clean(self) -> None:
        """Delete all that was fetched: it is installed, or never will be."""
        self.abandon()
        remove_tree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def take_block(self, digest: str, index: int, payload: bytes) -> bool:
        """A block arrived; False if it is not one we wait for.

        Raises:
            DiskFullError, StoreError: It cannot be written.
        """
        if self._download is None or self._download.digest != digest:
            return False
        taken = self._download.write(index, payload)
        if taken:
            self._asked.discard(index)
        return taken

    def turn(self, now: float, held: Mapping[str, Path]) -> FetchedRelease | None:
        """One turn: flush, finish, ask for more. Returns the release when it is complete.

        Args:
            now: Seconds since the epoch.
            held: Files of installed releases, by SHA-256.

        Raises:
            IntegrityError: What was fetched is not what was offered.
            DiskFullError: There is no room; try again later.
        """
        if self._offer is None or (self._full_at is not None and not is_due(now, self._full_at, self._config.retry_s)):
            return None
        offer = self._offer
        if self._source is not None:
            for block in self._source.blocks():
                self.take_block(*block)
        try:
            data = self._fetch_manifest(offer, now, held)
            if data is None:
                return None
            parsed = parse_manifest(data)
            self._require_fit(offer, parsed)
            if not self._fetch_index(offer, now, held):
                return None
            files: dict[str, Path] = {}
            wanted = {entry.sha256: entry.size for _, entry in sorted(parsed.files.items())}
            self._require_room(
                sum(self._lacking(digest, size) for digest, size in wanted.items() if digest not in held)
            )
            for digest, size in wanted.items():
                path = self._obtain(digest, size, now, held)
                if path is None:
                    return None
                files[digest] = path
        except DiskFullError:
            self._full_at = now
            raise
        return FetchedRelease(offer, data, files)

    def _fetch_manifest(self, offer: Offer, now: float, held: Mapping[str, Path]) -> bytes | None:
        path = self._fetch(offer.digest, offer.size, now, held)
        if path is None:
            return None
        data = path.read_bytes()
        if digest_of(data) != offer.digest:
            path.unlink()
            raise IntegrityError(f"the manifest of release {offer.release} was damaged on the disk")
        return data

    def _require_fit(self, offer: Offer, parsed: Manifest) -> None:
        if parsed.release != offer.release:
            raise IntegrityError(f"offered as release {offer.release}, its manifest says {parsed.release}")
        total = sum(entry.size for entry in parsed.files.values())
        if total > self._config.max_bytes:
            raise IntegrityError(f"release {offer.release} has {total} bytes; at most {self._config.max_bytes}")

    def _fetch_index(self, offer: Offer, now: float, held: Mapping[str, Path]) -> bool:
        """Whether the release's index is here, or there is none. One that cannot be read is done without."""
        signed = self._signed
        if self._index is not None or signed is None or not 0 < signed.index_size <= MAX_INDEX:
            return True
        path = self._fetch(signed.index, signed.index_size, now, held)
        if path is None:
            return False
        try:
            self._index = parse_index(path.read_bytes())
        except ArtifactError as error:
            logger.warning("the index of release %d is of no use: %s", offer.release, error)
            self._index = ReleaseIndex(release=offer.release, block_bytes=0)
        return True

    def _obtain(self, digest: str, size: int, now: float, held: Mapping[str, Path]) -> Path | None:
        """A file of the release: held, patched or fetched whole; None: not yet."""
        done = self._folder / digest
        patch = None if digest in held or done.exists() else self._patch_for(digest, held)
        if patch is None:
            return self._fetch(digest, size, now, held)
        arrived = self._fetch(patch.digest, patch.size, now, held)
        if arrived is None:
            return None
        try:
            made = apply_patch(held[patch.source], arrived, digest=digest, size=size)
        except (ArtifactError, OSError) as error:
            logger.warning("%s is fetched whole: %s", digest[:12], error)
            self._unpatchable.add(digest)
            return self._fetch(digest, size, now, held)
        replace_file(done, made)
        arrived.unlink()
        return done

    def _patch_for(self, digest: str, held: Mapping[str, Path]) -> Patch | None:
        if self._index is None or digest in self._unpatchable or not can_patch():
            return None
        fitting = (patch for patch in self._index.patches if patch.target == digest and patch.form == "bsdiff4")
        return next((p for p in fitting if p.source in held and self._is_sound(p.source, held[p.source])), None)

    def _fetch(self, digest: str, size: int, now: float, held: Mapping[str, Path]) -> Path | None:
        """The file with this hash if it is here; else ask for its missing blocks."""
        if digest in held and self._is_sound(digest, held[digest]):
            return held[digest]
        if (done := self._folder / digest).exists():
            return done
        if self._download is None or self._download.digest != digest:
            if self._download is not None:
                self._transport.unsubscribe(self._topics.block(self._download.digest, "+"))
            block_bytes = self.desired.block_bytes if self.desired else 65_536
            hashes = self._index.hashes(digest, size, block_bytes) if self._index else []
            self._download = Download(self._folder, digest, size, block_bytes, hashes)
            self._asked_at = None
            self._transport.subscribe(self._topics.block(digest, "+"))
        download = self._download
        download.flush()
        if not download.complete:
            self._ask(download, now)
            return None
        self._transport.unsubscribe(self._topics.block(digest, "+"))
        self._download = None
        try:
            download.finish()
        except IntegrityError:
            # whoever may publish blocks could spoil a good release for ever if the first damage were final
            self._damaged += 1
            if self._damaged >= _MAX_DAMAGED:
                raise
            logger.warning("%s came damaged and is fetched again", digest[:12])
            return None
        return done

    def _is_sound(self, digest: str, path: Path) -> bool:
        """Whether an installed file still has its hash; looked at once. One that has aged is fetched again."""
        if digest not in self._sound:
            self._sound[digest] = path.exists() and sha256_file(path) == digest
            if not self._sound[digest]:
                logger.warning("%s is damaged on the disk and is fetched again", path.name)
        return self._sound[digest]

    def _ask(self, download: Download, now: float) -> None:
        """Ask for the next window of blocks when the last one is here, is overdue, or the connection is new."""
        if self._source is not None and self._source.usable(now):
            self._source.ask(download.digest, download.size, download.block_bytes, download.missing())
            return
        reconnected = self._asked_on != self._transport.connections
        overdue = self._asked_at is None or is_due(now, self._asked_at, self._config.retry_s)
        if self._asked and not overdue and not reconnected:
            return
        window = set(download.missing()[: self._config.window_blocks])
        need = Need(digest=download.digest, size=download.size, blocks=to_bitmap(window, download.count))
        try:
            self._transport.publish(self._topics.up(self._device, "need"), encode(need))
        except NotConnectedError:
            return
        self._asked, self._asked_at, self._asked_on = window, now, self._transport.connections

    def _lacking(self, digest: str, size: int) -> int:
        """Bytes of a file that are not on the disk yet."""
        if (self._folder / digest).exists():
            return 0
        part = self._folder / f"{digest}.part"
        return max(0, size - part.stat().st_blocks * 512) if part.exists() else size

    def _require_room(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free - size < self._config.min_free_bytes:
            raise DiskFullError(
                f"{size} bytes are to come, {self._config.min_free_bytes} must stay free, and there are {free}"
            )
