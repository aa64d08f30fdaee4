"""Read the version that a device serves, from beside it: its database and its lock are not touched.

The device may be running. It may then delete a head or put another release into a slot while that is read, but it
always flips the pointer first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

import msgspec

from edge_sdk.errors import ArtifactError, ConfigError, IntegrityError, ModelError
from edge_sdk.fuse import fuse
from edge_sdk.manifest import MANIFEST_NAME, digest_of, verify_checkpoint
from edge_sdk.selftest import choose_variant, read_choice
from edge_sdk.serving import Served, load_served
from edge_sdk.slots import Pointer, Slots, Version
from edge_sdk.types import Variant

T = TypeVar("T")
Wanted = Literal["auto", "int8", "fp32"]
Use = Callable[[Slots, Version, Variant], T]
"""Reads what it needs of a version."""


def load(slots: Slots, version: Version, variant: Variant) -> Served:
    """The version as a device serves it. A `Use`."""
    return load_served(slots, version, variant, {})


def export(slots: Slots, version: Version, variant: Variant, *, latent: bool = False) -> bytes:
    """The version as one ONNX file. A `Use`."""
    manifest = slots.manifest(version)
    head = None if manifest.adapt == "none" else slots.head(version)
    return fuse(slots.folder(version), manifest, head, variant, number=version.head, latent=latent)


def from_checkpoint(folder: Path, wanted: Wanted, use: Use[T]) -> T:
    """Use a checkpoint folder, checked as a device would, with the head it came with.

    Raises:
        ArtifactError: It is damaged, or fails its self-test here.
    """
    manifest = verify_checkpoint(folder)
    version = Version("a", manifest.release, digest_of((folder / MANIFEST_NAME).read_bytes()))
    return use(_Folder(folder), version, choose_variant(folder, manifest, wanted).variant)


def from_home(home: Path, wanted: Wanted, use: Use[T]) -> T:
    """Use the version that the device in `home` serves.

    Raises:
        ConfigError: There is no device, or nothing is installed.
        ArtifactError, ModelError: What `use` raised, although the version still serves.
    """
    while True:
        slots = _Installed(home / "slots")
        version = slots.pointer.current
        if version is None:
            raise ConfigError(f"no release is installed in {home} yet")
        try:
            result = use(slots, version, _variant(slots, version, wanted))
            slots.manifest(version)  # the slot still holds this release: nothing of another one was read
        except (ArtifactError, ModelError, OSError):
            if _Installed(home / "slots").pointer.current == version:
                raise
        else:
            return result


def _variant(slots: Slots, version: Version, wanted: Wanted) -> Variant:
    """The one asked for, or the one that the device serves; chosen anew if the device has not said which."""
    manifest = slots.manifest(version)
    if wanted == "auto" and (choice := read_choice(slots.folder(version), manifest)) is not None:
        return choice.variant
    return choose_variant(slots.folder(version), manifest, wanted).variant


class _Installed(Slots):
    """Slots that belong to another process: nothing is made or mended."""

    def __init__(self, root: Path) -> None:
        self.root, self._heads = root, WeakValueDictionary()
        try:
            self.pointer = msgspec.json.decode((root / "pointer.json").read_bytes(), type=Pointer)
        except FileNotFoundError as error:
            raise ConfigError(f"there is no device in {root.parent}: use --home, or run one first") from error
        except msgspec.MsgspecError as error:
            raise IntegrityError(f"{root / 'pointer.json'} is damaged; start the device, which mends it") from error


class _Folder(Slots):
    """A checkpoint folder in place of the slots."""

    def __init__(self, folder: Path) -> None:
        self.root, self._heads = folder, WeakValueDictionary()
        self.pointer = Pointer()

    def folder(self, version: Version) -> Path:
        """The checkpoint folder, whatever the version."""
        del version
        return self.root
