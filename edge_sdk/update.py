"""The update client: learns what the device should run, and fetches it in blocks that survive anything.

A release is a manifest and the files it names; all of them travel as content-addressed blobs. What an installed
release already holds is never fetched again. Checked here are SHA-256, size and a rising release number, and, before
the first block is asked for and again before anything is installed, that signed metadata names the offer (`trust`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edge_sdk.clock import is_due
from edge_sdk.config import UpdateConfig
from edge_sdk.desired import DesiredReader
from edge_sdk.download import Download
from edge_sdk.errors import (
    ArtifactError,
    DiskFullError,
    IntegrityError,
    MetadataExpiredError,
    NotConnectedError,
    RollbackRefusedError,
)
from edge_sdk.files import remove_tree, replace_file, sha256_file
from edge_sdk.index import MAX_INDEX, Patch, ReleaseIndex, apply_patch, can_patch, parse_index
from edge_sdk.manifest import Manifest, digest_of, parse_manifest
from edge_sdk.messages import (
    THRESHOLD_ALL,
    Desired,
    MetadataSet,
    Need,
    Offer,
    Topics,
    cohort,
    decode,
    encode,
    from_places,
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


class UpdateClient:
    """Follows the desired state, and fetches one release at a time.

    Args:
        folder: For what is on its way.
        device: This device's name.
        topics: Of the coordinator's prefix.
        transport: Where to ask.
        config: Limits.
        trust: Says which releases are signed; None: they are not, and nothing is asked for a signature.
        group: Whose desired state this device follows.
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
        group: str = "default",
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
        self._heard_at = 0.0
        self._longest_gap = 0.0
        self._fresh = self._others_lead = False
        self._full_at: float | None = None
        self._sound: dict[str, bool] = {}
        self._damaged = 0
        self.trust = trust
        self.reader = None if trust is None else DesiredReader(trust, prefix=topics.prefix, group=group)
        """Says which desired states count; None: all that are not stale."""
        self._source = HttpSource(config.url, retry_s=10 * config.retry_s) if config.url else None
        self._looked_at: float | None = None
        self._signed: SignedRelease | None = None
        self._manifest = b""
        self._wanted: dict[str, int] = {}  # the sizes of its files, by SHA-256
        self._files: dict[str, Path] = {}  # those of them that are here
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
        if self.desired is not None and 0 < self.desired.expires <= now:
            raise MetadataExpiredError("what the group is told to run is past its date: nothing newer has come")
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

    def hear(self, payload: bytes, now: float) -> None:
        """Take a desired state as it came, if it counts.

        Raises:
            ProtocolError: It is none, or is refused.
            StoreError: What was believed cannot be remembered; it will come again with the next connection.
        """
        if self.reader is None:
            self.follow(decode(payload, Desired))
        else:
            self._believe(self.reader.read(payload, now))

    def look_again(self, now: float) -> None:
        """Take a desired state that waited for what would vouch for it. Errors as `hear`."""
        if self.reader is not None:
            self._believe(self.reader.look_again(now))

    def _believe(self, desired: Desired | None) -> None:
        if desired is not None:  # the reader knows which is the newer one, also with new keys
            _check_parts(desired)
            self.desired = desired

    def follow(self, desired: Desired) -> None:
        """Take a new desired state that nobody signed; a stale one is ignored.

        Raises:
            ProtocolError: A list of devices in it cannot be read.
        """
        _check_parts(desired)
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
        offers = self._for_this_device()
        # what cannot be had here leaves the others to be had
        for offer, _ in offers:
            if offer.digest in refused or offer.release in self.desired.revoked:
                continue
            if offer.release == installed:
                return None
            if installed is not None and offer.release < installed:
                if installed in self._named():
                    return None  # installed early, by hand, or told before: it stays
                raise RollbackRefusedError(f"release {offer.release} is older than the installed {installed}")
            return offer
        return None

    def shadow_s(self, offer: Offer) -> float:
        """How long the release is to run beside the one in use before anything else is said; 0: it is to serve."""
        return next((shadow_s for other, shadow_s in self._for_this_device() if other == offer), 0.0)

    def _for_this_device(self) -> list[tuple[Offer, float]]:
        """The releases that this device is told to run, the first one first, and for how long in shadow."""
        desired = self.desired
        if desired is None:
            return []
        found = [
            (part.offer, part.shadow_s)
            for part in desired.parts
            if cohort(part.salt, self._device) in from_places(part.devices)
        ]
        if desired.candidate is not None and cohort(desired.salt, self._device) < desired.threshold:
            found.append((desired.candidate, 0.0))
        if desired.base is not None:
            found.append((desired.base, 0.0))
        return found

    def _named(self) -> set[int]:
        """Releases that some devices of the group are told to run, whoever they are."""
        desired = self.desired
        if desired is None:
            return set()
        offers = [desired.candidate, *(part.offer for part in desired.parts if not part.shadow_s)]
        return {offer.release for offer in offers if offer is not None}

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
        self._manifest, self._wanted, self._files = b"", {}, {}
        self._index = None
        self._unpatchable = set()

    def abandon(self) -> None:
        """Stop fetching; blocks that are here stay for another try."""
        self._let_go()
        self._offer, self._asked_at = None, None

    def _let_go(self) -> None:
        if self._download is not None:
            self._transport.unsubscribe(self._topics.block(self._download.digest, "+"))
            self._download.close()
            self._download = None

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
            self._fresh = True
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
            if self._download is not None and not self._is_here(self._download, now):
                return None
            data = self._fetch_manifest(offer, now, held)
            if data is None or not self._fetch_index(offer, now, held) or not self._fetch_files(now, held):
                return None
        except DiskFullError:
            self._full_at = now
            raise
        return FetchedRelease(offer, data, self._files)

    def _fetch_manifest(self, offer: Offer, now: float, held: Mapping[str, Path]) -> bytes | None:
        if self._manifest:
            return self._manifest
        path = self._fetch(offer.digest, offer.size, now, held)
        if path is None:
            return None
        data = path.read_bytes()
        if digest_of(data) != offer.digest:
            path.unlink()
            raise IntegrityError(f"the manifest of release {offer.release} was damaged on the disk")
        parsed = parse_manifest(data)
        self._require_fit(offer, parsed)
        self._manifest = data
        self._wanted = {entry.sha256: entry.size for _, entry in sorted(parsed.files.items())}
        return data

    def _fetch_files(self, now: float, held: Mapping[str, Path]) -> bool:
        """Whether every file that the manifest names is here."""
        self._require_room(
            sum(self._lacking(digest, size) for digest, size in self._wanted.items() if digest not in held)
        )
        for digest, size in self._wanted.items():
            if digest not in self._files:
                path = self._obtain(digest, size, now, held)
                if path is None:
                    return False
                self._files[digest] = path
        return True

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
            self._let_go()
            block_bytes = self.desired.block_bytes if self.desired else 65_536
            hashes = self._index.hashes(digest, size, block_bytes) if self._index else []
            if not hashes and self._signed is not None and size <= block_bytes:
                hashes = [bytes.fromhex(digest)]  # its only block: somebody else's is known when it comes
            self._download = Download(self._folder, digest, size, block_bytes, hashes)
            self._asked_at, self._asked = None, set()
            self._fresh = self._others_lead = False
            self._heard_at, self._longest_gap = now, 0.0
            self._transport.subscribe(self._topics.block(digest, "+"))
        download = self._download
        if not self._is_here(download, now):
            return None
        self._let_go()
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

    def _is_here(self, download: Download, now: float) -> bool:
        """Whether all of it is here and safe; if not, what is missing is asked for."""
        if download.complete or download.unflushed >= self._config.window_blocks // 2 or not self._fresh:
            download.flush()
        if not download.complete:
            self._ask(download, now)
        return download.complete

    def _is_sound(self, digest: str, path: Path) -> bool:
        """Whether an installed file still has its hash; looked at once. One that has aged is fetched again."""
        if digest not in self._sound:
            self._sound[digest] = path.exists() and sha256_file(path) == digest
            if not self._sound[digest]:
                logger.warning("%s is damaged on the disk and is fetched again", path.name)
        return self._sound[digest]

    def _ask(self, download: Download, now: float) -> None:
        """Ask for the next blocks of the window, if it is for us to ask."""
        if self._fresh:
            self._longest_gap = max(self._longest_gap, now - self._heard_at) if self._others_lead else 0.0
            self._heard_at, self._fresh, self._others_lead = now, False, self._asked_at is None
        if self._source is not None and self._source.usable(now):
            self._source.ask(download.digest, download.size, download.block_bytes, download.missing())
            return
        reconnected = self._asked_at is not None and self._asked_on != self._transport.connections
        overdue = self._asked_at is not None and is_due(now, self._heard_at, self._config.retry_s)
        if reconnected or overdue:
            self._asked.clear()
        elif not self._may_ask(download, now):
            return
        lacking = (index for index in download.missing() if index not in self._asked)
        wanted = set(islice(lacking, self._config.window_blocks - len(self._asked)))
        if not wanted:
            return
        need = Need(digest=download.digest, size=download.size, blocks=to_bitmap(wanted, download.count))
        try:
            self._transport.publish(self._topics.up(self._device, "need"), encode(need))
        except NotConnectedError:
            return
        self._asked |= wanted
        self._asked_at, self._asked_on, self._heard_at = now, self._transport.connections, now

    def _may_ask(self, download: Download, now: float) -> bool:
        """Whether to ask without a special reason: what one device asks for reaches all that wait for the same file.

        So a device that has begun to ask leads and keeps its window full, and the others listen. Each begins only when
        nothing has come for a while of its own. What fits into a window is not worth that.
        """
        if self._asked_at is not None:
            return len(self._asked) <= self._config.window_blocks // 2
        if download.count <= self._config.window_blocks:
            return True
        share = cohort(download.digest, self._device) / THRESHOLD_ALL
        return is_due(now, self._heard_at, (1 + share) * self._config.quiet_s + 2 * self._longest_gap)

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


def _check_parts(desired: Desired) -> None:
    for part in desired.parts:
        from_places(part.devices)  # one that cannot be read is refused here, once
