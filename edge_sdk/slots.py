"""Two slots for base releases, the personal heads in them, and the one pointer that says which version serves.

slots/pointer.json      the only thing that is ever flipped
slots/a/  slots/b/      a checkpoint folder each, with heads/0001.npz, … beside its files
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

import msgspec

from edge_sdk.errors import ArtifactError, IntegrityError, RollbackRefusedError
from edge_sdk.files import crashpoint, flush, fsync_folder, remove_tree, replace_file, storage_error
from edge_sdk.head import Head
from edge_sdk.learn.ewc import Importance
from edge_sdk.manifest import HEAD_NPZ, MANIFEST_NAME, Manifest, digest_of, parse_manifest, verify_checkpoint

Slot = Literal["a", "b"]
_EWC = ".ewc.npz"
logger = logging.getLogger(__name__)


class Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A base release and the head on it; head 0 is the one it came with."""

    slot: Slot
    release: int
    digest: str
    head: int = 0


class Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which version serves, and where one could go back to."""

    current: Version | None = None
    previous: Version | None = None
    """What served before the last change."""
    fallback: Version | None = None
    """What served last on the release before: where a revoked release goes back to."""
    heads: int = 0
    """Personal heads ever made: the next one's number is one more."""
    boots: int = 0
    """Starts on a release on probation without a healthy step since."""


class Slots:
    """The versions on disk. Every change is a rename or one pointer flip, so a kill leaves the old or the new.

    Args:
        root: Folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._path = root / "pointer.json"
        self._heads: WeakValueDictionary[Version, Head] = WeakValueDictionary()
        """Those that are in use somewhere: read once."""
        try:
            self.pointer = msgspec.json.decode(self._path.read_bytes(), type=Pointer)
        except FileNotFoundError:
            self.pointer = Pointer()
        except msgspec.MsgspecError as error:
            logger.error("%s is damaged and made anew from what the slots hold: %s", self._path, error)  # noqa: TRY400
            self.pointer = self._rebuilt()
            replace_file(self._path, msgspec.json.encode(self.pointer))

    def _rebuilt(self) -> Pointer:
        """A pointer to the newest release whose files verify, with its own head: nobody can walk up to the device."""
        found: list[Version] = []
        slots: tuple[Slot, ...] = ("a", "b")
        for slot in slots:
            try:
                manifest = verify_checkpoint(self.root / slot)
            except ArtifactError:
                continue
            found.append(Version(slot, manifest.release, digest_of((self.root / slot / MANIFEST_NAME).read_bytes())))
        found.sort(key=lambda version: version.release)
        heads = [int(file.name[:4]) for slot in slots for file in (self.root / slot / "heads").glob("*.npz")]
        before = found[0] if len(found) > 1 else None
        return Pointer(
            current=found[-1] if found else None, previous=before, fallback=before, heads=max(heads, default=0)
        )

    # ---- reading

    def folder(self, version: Version) -> Path:
        """The checkpoint folder of a version."""
        return self.root / version.slot

    def manifest(self, version: Version) -> Manifest:
        """The manifest of a version's release.

        Raises:
            IntegrityError: It is gone, or not the one that was installed.
        """
        try:
            data = (self.folder(version) / MANIFEST_NAME).read_bytes()
        except OSError as error:
            raise IntegrityError(f"the manifest in slot {version.slot} cannot be read: {error.strerror}") from error
        if digest_of(data) != version.digest:
            raise IntegrityError(f"the manifest in slot {version.slot} is not the one that was installed")
        return parse_manifest(data)

    def head(self, version: Version) -> Head:
        """The head of a version.

        Raises:
            IntegrityError: It is damaged.
        """
        head = self._heads.get(version)
        if head is None:
            folder = self.folder(version)
            head = Head.load(folder / "heads" / f"{version.head:04d}.npz" if version.head else folder / HEAD_NPZ)
            self._heads[version] = head
        return head

    def importance(self, version: Version) -> Importance | None:
        """What EWC holds on to while a version serves; None: what its release came with.

        Raises:
            IntegrityError: It is damaged.
        """
        path = self.folder(version) / "heads" / f"{version.head:04d}{_EWC}"
        return Importance.load(path) if version.head and path.exists() else None

    def held_files(self) -> dict[str, Path]:
        """Files of the installed releases by SHA-256: what need not be fetched again."""
        return {
            entry.sha256: self.folder(version) / name
            for version, manifest in self._installed()
            for name, entry in manifest.files.items()
        }

    def trunk_ids(self) -> list[str]:
        """The trunks of the installed releases: whose latents can still be read."""
        return sorted({manifest.trunk_id for _, manifest in self._installed()})

    def _installed(self) -> Iterator[tuple[Version, Manifest]]:
        """The release in use and the one to go back to, as far as their manifests can be read."""
        for version in (self.pointer.fallback, self.pointer.current):
            if version is None:
                continue
            try:
                manifest = self.manifest(version)
            except ArtifactError as error:  # a damaged fallback must not spoil the release that would replace it
                logger.warning("%s", error)
                continue
            yield version, manifest

    # ---- changing

    def stage(self, manifest: bytes, sources: Mapping[str, Path], *, link: bool = True) -> tuple[Slot, Manifest]:
        """Put a release into the idle slot. It does not serve until `activate`.

        Args:
            manifest: The manifest's bytes.
            sources: Where each file of the manifest is, by SHA-256; never moved.
            link: Whether the sources are ours and may share their bytes with the slot; else they are copied.

        Raises:
            IntegrityError: A file differs from the manifest.
            DiskFullError, StoreError: It cannot be written. The serving version is untouched in every case.
        """
        parsed = parse_manifest(manifest)
        current = self.pointer.current
        slot: Slot = "b" if current is not None and current.slot == "a" else "a"
        building = self.root / f"{slot}.new"
        remove_tree(building)
        try:
            building.mkdir()
            for name, entry in parsed.files.items():
                _take(sources[entry.sha256], building / name, link=link)
            replace_file(building / MANIFEST_NAME, manifest)
            verify_checkpoint(building)
        except OSError as error:
            remove_tree(building)
            raise storage_error(error, f"release {parsed.release} cannot be staged") from error
        except BaseException:
            remove_tree(building)
            raise
        crashpoint("stage:built")
        self._forget(slot)
        remove_tree(self.root / slot)
        building.rename(self.root / slot)
        fsync_folder(self.root)
        crashpoint("stage:renamed")
        return slot, parsed

    def write_head(self, slot: Slot, head: Head, importance: Importance | None = None) -> int:
        """Store a personal head beside a release; returns its number. It does not serve yet.

        Args:
            slot: Of the release.
            head: The head.
            importance: What EWC is to hold on to once it serves, if not what the release came with.

        Raises:
            DiskFullError, StoreError: It cannot be written.
        """
        number = self.pointer.heads + 1
        folder = self.root / slot / "heads"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"no head can be written to slot {slot}") from error
        if importance is not None:
            replace_file(folder / f"{number:04d}{_EWC}", importance.to_bytes())
        replace_file(folder / f"{number:04d}.npz", head.to_bytes())
        self._flip(msgspec.structs.replace(self.pointer, heads=number))
        return number

    def activate(self, version: Version) -> None:
        """Let a staged release serve; the one before becomes the fallback."""
        current = self.pointer.current
        self._flip(msgspec.structs.replace(self.pointer, current=version, previous=current, fallback=current, boots=0))

    def promote(self, head: int) -> Version:
        """Let a personal head on the current release serve (0: the release's own)."""
        current = self._current()
        version = msgspec.structs.replace(current, head=head)
        self._flip(msgspec.structs.replace(self.pointer, current=version, previous=current))
        return version

    def rollback(self) -> Version:
        """Go back to what served before the last change.

        Raises:
            RollbackRefusedError: There is nothing to go back to.
        """
        previous, current = self.pointer.previous, self._current()
        if previous is None:
            raise RollbackRefusedError("there is no version to go back to")
        return self._return_to(previous, current)

    def rollback_release(self) -> Version:
        """Go back to the release before, with the head it had.

        Raises:
            RollbackRefusedError: Its slot has been used again, or there never was one.
        """
        fallback, current = self.pointer.fallback, self._current()
        if fallback is None:
            raise RollbackRefusedError(f"no release to go back to from {current.release}")
        return self._return_to(fallback, current)

    def count_boot(self) -> int:
        """Note a start on probation; returns how many there were without a healthy step since."""
        self._flip(msgspec.structs.replace(self.pointer, boots=self.pointer.boots + 1))
        return self.pointer.boots

    def clear_boots(self) -> None:
        """A healthy step was made."""
        if self.pointer.boots:
            self._flip(msgspec.structs.replace(self.pointer, boots=0))

    def forget_heads(self) -> Version:
        """Give up every personal head, also those that one could go back to; returns what serves then."""
        pointer = self.pointer

        def plain(version: Version | None) -> Version | None:
            return version and msgspec.structs.replace(version, head=0)

        current = msgspec.structs.replace(self._current(), head=0)
        self._flip(
            msgspec.structs.replace(
                pointer, current=current, previous=plain(pointer.previous), fallback=plain(pointer.fallback)
            )
        )
        self.collect_garbage()
        return current

    def collect_garbage(self) -> None:
        """Delete heads and half-built folders that no version needs."""
        pointer = self.pointer
        kept = {(v.slot, v.head) for v in (pointer.current, pointer.previous, pointer.fallback) if v is not None}
        for slot in ("a", "b"):
            remove_tree(self.root / f"{slot}.new")
            for file in sorted((self.root / slot / "heads").glob("*")):
                number = file.name.partition(".")[0]
                if not number.isdigit() or (slot, int(number)) not in kept:
                    file.unlink()

    def _return_to(self, version: Version, current: Version) -> Version:
        fallback = self.pointer.fallback if version.slot == current.slot else None
        self._flip(msgspec.structs.replace(self.pointer, current=version, previous=None, fallback=fallback, boots=0))
        return version

    def _forget(self, slot: Slot) -> None:
        """Before a slot is overwritten, nothing may point into it."""
        pointer = self.pointer
        self._flip(
            msgspec.structs.replace(
                pointer,
                previous=None if pointer.previous and pointer.previous.slot == slot else pointer.previous,
                fallback=None if pointer.fallback and pointer.fallback.slot == slot else pointer.fallback,
            )
        )

    def _current(self) -> Version:
        if self.pointer.current is None:
            raise RollbackRefusedError("no release is installed yet")
        return self.pointer.current

    def _flip(self, pointer: Pointer) -> None:
        if pointer != self.pointer:
            replace_file(self._path, msgspec.json.encode(pointer))
            self.pointer = pointer


def _take(source: Path, target: Path, *, link: bool) -> None:
    """A second name for the same bytes where that is allowed; else a copy, flushed to disk."""
    if link:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
        else:
            return
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
