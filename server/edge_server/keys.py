"""The keys that devices trust, and what they sign (TUF).

The root keys are made here once and taken away: any `threshold` of them change all others. The keys of targets,
snapshot and timestamp stay with the coordinator and sign what it publishes. `tuf/` holds what is public; `keys/` holds
the secrets.
"""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edge_sdk.clock import Clock
from edge_sdk.errors import StoreError
from edge_sdk.files import fsync_folder, remove_tree, replace_file, storage_error
from edge_sdk.messages import MAX_MESSAGE_BYTES, MetadataSet, Signature
from edge_sdk.trust import BUILT
from edge_server.errors import SigningError
from edge_server.settings import SigningSettings

logger = logging.getLogger(__name__)
TUF_FOLDER = "tuf"
KEYS_FOLDER = "keys"
Role = Literal["root", "targets", "snapshot", "timestamp"]
ONLINE: tuple[Role, ...] = ("targets", "snapshot", "timestamp")
_NAME = re.compile(r"timestamp|[1-9][0-9]*\.(root|snapshot|targets)")
_KEPT_VERSIONS = 3
_DAY_S = 86_400.0
S = TypeVar("S", Root, Timestamp, Snapshot, Targets)


class KeyRecord(msgspec.Struct, frozen=True):
    """A key that the root names."""

    role: str
    key: str
    """Its id."""
    threshold: int
    """How many of the role's keys must sign."""
    expires: str
    """When what the role has signed expires."""
    here: bool
    """Whether the secret part is in the coordinator's folder, as it must be of all but the root's."""


@dataclass(frozen=True)
class Published:
    """What is public now."""

    versions: MetadataSet
    files: dict[str, bytes]
    """By name: "timestamp", "snapshot", "targets", "1.root" and so on."""


class Voucher(NamedTuple):
    """Signs what the coordinator says at any time, beside the metadata."""

    expires: float
    """Of the timestamp, seconds since the epoch."""
    sign: Callable[[bytes], list[Signature]]
    """With every key of the timestamp's role that is here."""


class Repository:
    """The signed metadata of a coordinator. Several processes may have one each.

    Args:
        home: The coordinator's folder.
        settings: How long signatures are good.
        clock: Where the time comes from.
    """

    def __init__(self, home: Path, *, settings: SigningSettings, clock: Clock) -> None:
        self._home, self._settings, self._clock = home, settings, clock
        self._folder, self._keys = home / TUF_FOLDER, home / KEYS_FOLDER

    # ---- what is there

    @property
    def exists(self) -> bool:
        """Whether keys were made: from then on everything is signed, or not pushed at all."""
        return self._folder.exists()

    @property
    def stamp(self) -> tuple[int, int]:
        """Changes with whatever is signed."""
        try:
            found = (self._folder / "timestamp.json").stat()
        except OSError:
            return (0, 0)
        return (found.st_mtime_ns, found.st_ino)

    def path(self, name: str) -> Path | None:
        """The file of public metadata of that name without its ending; None if there is none."""
        path = self._folder / f"{name}.json"
        return path if _NAME.fullmatch(name) and path.exists() else None

    def root(self) -> bytes:
        """The newest root, to be given to devices.

        Raises:
            SigningError: There are no keys.
            StoreError: It cannot be read.
        """
        return self._read(f"{self._newest_root()}.root.json")

    def root_left_s(self) -> float:
        """Time until the root expires, and its owners must have signed again."""
        root = self._load(Root, f"{self._newest_root()}.root.json").signed
        return root.expires.timestamp() - self._clock.now()

    def targets(self) -> dict[str, TargetFile]:
        """What is signed now, by path."""
        return dict(self._chain()[2].signed.targets) if (self._folder / "timestamp.json").exists() else {}

    def published(self) -> Published:
        """All that devices need, as it is now.

        Raises:
            SigningError: It is incomplete or damaged.
            StoreError: It cannot be read.
        """
        newest = self._newest_root()
        timestamp, snapshot, targets = (part.signed.version for part in self._chain())
        files = {
            **{f"{number}.root": self._read(f"{number}.root.json") for number in range(1, newest + 1)},
            "targets": self._read(f"{targets}.targets.json"),
            "snapshot": self._read(f"{snapshot}.snapshot.json"),
            "timestamp": self._read("timestamp.json"),
        }
        return Published(MetadataSet(root=newest, timestamp=timestamp, snapshot=snapshot, targets=targets), files)

    def keys(self) -> list[KeyRecord]:
        """Every key that the newest root names."""
        root = self._load(Root, f"{self._newest_root()}.root.json")
        signed: dict[str, Metadata[Any]] = {"root": root}
        if (self._folder / "timestamp.json").exists():
            signed |= dict(zip(("timestamp", "snapshot", "targets"), self._chain(), strict=True))
        return [
            KeyRecord(
                role=role,
                key=key,
                threshold=root.signed.roles[role].threshold,
                expires=f"{signed[role].signed.expires:%Y-%m-%d %H:%M}" if role in signed else "",
                here=self._key_path(key).exists(),
            )
            for role in ("root", *ONLINE)
            for key in root.signed.roles[role].keyids
        ]

    # ---- root keys

    def init(self, away: Path, *, count: int, threshold: int, passphrase: bytes | None) -> None:
        """Make all keys, and sign that there is no release yet.

        Args:
            away: Folder for the root keys, to be taken away; must not exist, or be empty.
            count: How many root keys.
            threshold: How many of them must sign; at least 2.
            passphrase: Encrypts the root keys; None: they are not.

        Raises:
            SigningError: There are keys already, or the numbers or the folder cannot be.
            StoreError: Something cannot be written.
        """
        if not 2 <= threshold <= count <= 16:
            raise SigningError(
                f"a threshold of {threshold} with {count} root keys: take 2 to {count}, of at most 16 keys"
            )
        if self.exists:
            raise SigningError(
                f"there are keys already: see {self._folder}; change them with: keys rotate, keys revoke"
            )
        signers = self._make_root_keys(away, count, passphrase)
        online = {role: self._make_online_key() for role in ONLINE}
        root = Root(version=1, expires=self._until("root"), consistent_snapshot=True, unrecognized_fields=self._built())
        for signer in signers:
            root.add_key(signer.public_key, "root")
        root.roles["root"].threshold = threshold
        for role, signer in online.items():
            root.add_key(signer.public_key, role)
        metadata = Metadata(root)
        for signer in signers:
            metadata.sign(signer, append=True)
        final = self._folder
        try:  # in one step: half a repository would be taken for a whole one
            self._folder = final.with_name(f"{TUF_FOLDER}.new")
            remove_tree(self._folder)
            with self._locked():
                self._write("1.root.json", metadata)
                self._sign({}, everything=True)
                self._folder.rename(final)
                fsync_folder(self._home)
        finally:
            self._folder = final

    def renew_root(self, away: Sequence[Path], *, passphrase: bytes | None) -> int:
        """Sign the root anew, so that it is good for longer; returns its version."""
        return self._next_root(away, passphrase, lambda _root: None)

    def rotate(self, role: Role, away: Sequence[Path], *, passphrase: bytes | None, new: Path | None = None) -> int:
        """Replace the keys of a role by new ones; returns the version of the new root.

        Args:
            role: Which.
            away: Folders with enough of the root keys.
            passphrase: Of the root keys, old and new.
            new: For role "root": folder for the new root keys.

        Raises:
            SigningError: Too few root keys, or a wrong passphrase.
        """
        root = self._load(Root, f"{self._newest_root()}.root.json").signed
        return self._replace(root.roles[role].keyids, away, passphrase=passphrase, new=new)

    def revoke(self, key: str, away: Sequence[Path], *, passphrase: bytes | None, new: Path | None = None) -> int:
        """Take a key that is lost or known to others out of the root, and put a new one in its place.

        Args:
            key: Its id, or the beginning of it.
            away: Folders with enough of the root keys; one that is revoked may still sign this.
            passphrase: Of the root keys, old and new.
            new: For a root key: folder for the one that replaces it.

        Raises:
            SigningError: There is no such key, or too few root keys, or a wrong passphrase.
        """
        found = sorted({record.key for record in self.keys() if key and record.key.startswith(key)})
        if len(found) != 1:
            raise SigningError(f"{len(found)} keys begin with {key!r}: see edge-coordinator keys list")
        return self._replace(found, away, passphrase=passphrase, new=new)

    def _replace(self, gone: Sequence[str], away: Sequence[Path], *, passphrase: bytes | None, new: Path | None) -> int:
        current = self._load(Root, f"{self._newest_root()}.root.json").signed
        changes = [(role, key) for role in ("root", *ONLINE) for key in gone if key in current.roles[role].keyids]
        roots = [key for role, key in changes if role == "root"]
        if roots and new is None:
            raise SigningError("new root keys need a folder: --new-root-keys")
        self._require_signers(current, self._load_root_keys(away, current, passphrase), away)
        fresh = iter(self._make_root_keys(new, len(roots), passphrase)) if roots and new is not None else iter(())

        def change(root: Root) -> None:
            for role, key in changes:
                made = next(fresh) if role == "root" else self._make_online_key()
                root.revoke_key(key, role)
                root.add_key(made.public_key, role)

        version = self._next_root([*away, *([new] if roots and new is not None else [])], passphrase, change)
        for _, key in changes:
            self._key_path(key).unlink(missing_ok=True)
        return version

    def _next_root(self, away: Sequence[Path], passphrase: bytes | None, change: Callable[[Root], None]) -> int:
        with self._locked():
            before = self._load(Root, f"{self._newest_root()}.root.json")
            root = deepcopy(before.signed)
            change(root)
            root.version += 1
            root.expires = self._until("root")
            root.unrecognized_fields.update(self._built())
            metadata = Metadata(root)
            signers = {
                **self._load_root_keys(away, before.signed, passphrase),
                **self._load_root_keys(away, root, passphrase),
            }
            for signer in signers.values():
                metadata.sign(signer, append=True)
            for judge in (before.signed, root):
                self._require_signers(judge, signers, away)
                judge.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
            self._write(f"{root.version}.root.json", metadata)
            self._sign(None)
            return root.version

    def _require_signers(self, root: Root, signers: Mapping[str, CryptoSigner], away: Sequence[Path]) -> None:
        role = root.roles["root"]
        found = len(set(role.keyids) & set(signers))
        if found < role.threshold:
            raise SigningError(
                f"{found} of the {role.threshold} root keys that must sign are in "
                f"{', '.join(str(path) for path in away) or 'no folder'}: give --root-keys for each folder"
            )

    def _make_root_keys(self, away: Path, count: int, passphrase: bytes | None) -> list[CryptoSigner]:
        if away.resolve().is_relative_to(self._home.resolve()):
            raise SigningError(f"{away} lies in the coordinator's own folder: whoever gets one would get the other")
        try:
            away.mkdir(parents=True, exist_ok=True, mode=0o700)
            if any(away.iterdir()):
                raise SigningError(f"{away} is not empty: choose a new folder for the root keys")
        except OSError as error:
            raise storage_error(error, f"cannot make {away}") from error
        encryption: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        signers = []
        for _ in range(count):
            secret = Ed25519PrivateKey.generate()
            signer = CryptoSigner(secret)
            data = secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
            replace_file(away / f"root-{signer.public_key.keyid[:16]}.pem", data, mode=0o600)
            signers.append(signer)
        return signers

    def _load_root_keys(self, away: Sequence[Path], root: Root, passphrase: bytes | None) -> dict[str, CryptoSigner]:
        """Those of the root's own keys that are in the folders, by id."""
        found = {}
        wanted = {key[:16]: key for key in root.roles["root"].keyids}
        for path in sorted(path for folder in away for path in folder.glob("root-*.pem")):
            key = wanted.get(path.stem.removeprefix("root-"))
            if key is not None:
                found[key] = _load_secret(path, passphrase)
        return {key: signer for key, signer in found.items() if signer.public_key.keyid == key}

    # ---- signing

    def sign(self, targets: Mapping[str, TargetFile]) -> None:
        """Sign these targets, and nothing else.

        Raises:
            SigningError: A key is missing, the root has expired, or it is more than one message holds.
            StoreError: It cannot be written; what was signed before is still whole.
        """
        with self._locked():
            self._sign(targets)

    def voucher(self) -> Voucher:
        """What signs desired states: the timestamp's keys, for as long as the timestamp is good (ADR 30).

        Raises:
            SigningError: Too few of the keys are here.
            StoreError: They cannot be read.
        """
        role = self._load(Root, f"{self._newest_root()}.root.json").signed.roles["timestamp"]
        paths = {key: self._key_path(key) for key in role.keyids}
        signers = {key: _load_secret(path, None) for key, path in paths.items() if path.exists()}
        if len(signers) < role.threshold:
            raise SigningError(
                f"the key of role timestamp is not in {self._keys}: bring it back, or: edge-coordinator keys rotate "
                "timestamp"
            )
        expires = self._load(Timestamp, "timestamp.json").signed.expires.timestamp()
        return Voucher(
            expires, lambda data: [Signature(key, bytes.fromhex(s.sign(data).signature)) for key, s in signers.items()]
        )

    def renew(self) -> bool:
        """Sign anew what is near its end or was not signed with the present keys; returns whether anything was.

        Raises:
            SigningError: A key is missing, or the root has expired: devices will soon believe nothing.
            StoreError: It cannot be written.
        """
        if not self._due():
            return False
        with self._locked():
            if not self._due():  # another process did
                return False
            self._sign(None)
        return True

    def _due(self) -> bool:
        root = self._load(Root, f"{self._newest_root()}.root.json").signed
        chain: tuple[Metadata[Any], ...] = self._chain()
        return any(self._is_stale(root, part.signed.type, part) for part in chain)

    def _is_stale(self, root: Root, role: str, metadata: Metadata[Any]) -> bool:
        left = metadata.signed.expires.timestamp() - self._clock.now()
        if left < self._lifetime_s(role) / 2:
            return True
        try:
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError:
            return True
        return False

    def _sign(self, targets: Mapping[str, TargetFile] | None, *, everything: bool = False) -> None:
        """Sign targets if they change, and of the rest what has to follow. The timestamp is the last to be written.

        A process that ends before it leaves files that nothing refers to, and that the next one overwrites.
        """
        root = self._load(Root, f"{self._newest_root()}.root.json").signed
        if root.is_expired(self._now()):
            raise SigningError(f"the root expired on {root.expires:%Y-%m-%d}: edge-coordinator keys renew")
        if everything:
            old_timestamp, old_snapshot, old_targets = Metadata(Timestamp()), Metadata(Snapshot()), Metadata(Targets())
            for part in (old_timestamp, old_snapshot, old_targets):
                part.signed.version = 0
        else:
            old_timestamp, old_snapshot, old_targets = self._chain()
        part_targets, part_snapshot = old_targets, old_snapshot
        if everything or targets is not None or self._is_stale(root, "targets", old_targets):
            listed = dict(old_targets.signed.targets if targets is None else targets)
            signed = Targets(**self._common(old_targets, "targets"), targets=listed)
            part_targets = self._signed(root, "targets", signed)
        changed = part_targets is not old_targets
        if changed or self._is_stale(root, "snapshot", old_snapshot):
            data = part_targets.to_bytes()
            meta = {"targets.json": MetaFile.from_data(part_targets.signed.version, data, ["sha256"])}
            part_snapshot = self._signed(
                root, "snapshot", Snapshot(**self._common(old_snapshot, "snapshot"), meta=meta)
            )
        data = part_snapshot.to_bytes()
        about = MetaFile.from_data(part_snapshot.signed.version, data, ["sha256"])
        timestamp = self._signed(
            root, "timestamp", Timestamp(**self._common(old_timestamp, "timestamp"), snapshot_meta=about)
        )
        for part, name in ((part_targets, "targets"), (part_snapshot, "snapshot")):
            self._write(f"{part.signed.version}.{name}.json", part)
            for old in range(1, part.signed.version - _KEPT_VERSIONS):
                (self._folder / f"{old}.{name}.json").unlink(missing_ok=True)
        self._write("timestamp.json", timestamp)

    def _common(self, before: Metadata[Any], role: Role) -> dict[str, Any]:
        return {
            "version": before.signed.version + 1,
            "expires": self._until(role),
            "unrecognized_fields": self._built(),
        }

    def _signed(self, root: Root, role: Role, signed: S) -> Metadata[S]:
        metadata = Metadata(signed)
        for key in root.roles[role].keyids:
            path = self._key_path(key)
            if path.exists():
                metadata.sign(_load_secret(path, None), append=True)
        try:
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError as error:
            raise SigningError(
                f"the key of role {role} is not in {self._keys}: bring it back, or: edge-coordinator keys rotate {role}"
            ) from error
        if (size := len(metadata.to_bytes())) > MAX_MESSAGE_BYTES:
            raise SigningError(f"the metadata of role {role} has {size} bytes; at most {MAX_MESSAGE_BYTES} are sent")
        return metadata

    def _make_online_key(self) -> CryptoSigner:
        signer = CryptoSigner.generate_ed25519()
        try:
            self._keys.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(error, f"cannot make {self._keys}") from error
        replace_file(self._key_path(signer.public_key.keyid), signer.private_bytes, mode=0o600)
        return signer

    def _key_path(self, key: str) -> Path:
        return self._keys / f"{key[:16]}.pem"

    # ---- files and dates

    def _chain(self) -> tuple[Metadata[Timestamp], Metadata[Snapshot], Metadata[Targets]]:
        """Timestamp, and the snapshot and targets that it leads to."""
        timestamp = self._load(Timestamp, "timestamp.json")
        snapshot = self._load(Snapshot, f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        return timestamp, snapshot, self._load(Targets, f"{snapshot.signed.meta['targets.json'].version}.targets.json")

    def _newest_root(self) -> int:
        numbers = [int(path.name.partition(".")[0]) for path in self._folder.glob("*.root.json")]
        if not numbers:
            raise SigningError("there are no keys; make them with: edge-coordinator keys init")
        return max(numbers)

    def _load(self, kind: type[S], name: str) -> Metadata[S]:
        try:
            metadata = Metadata[S].from_bytes(self._read(name))
        except RepositoryError as error:
            raise SigningError(f"{self._folder / name} is damaged: {error}") from error
        if not isinstance(metadata.signed, kind):
            raise SigningError(f"{self._folder / name} is of another role")
        return metadata

    def _read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise storage_error(error, f"cannot read {self._folder / name}") from error

    def _write(self, name: str, metadata: Metadata[Any]) -> None:
        data = metadata.to_bytes()
        path = self._folder / name
        if not path.exists() or path.read_bytes() != data:
            replace_file(path, data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process signs at a time; others wait for a moment."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._home / "signing.lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise storage_error(error, f"cannot sign in {self._folder}") from error

    def _lifetime_s(self, role: str) -> float:
        days: float = getattr(self._settings, f"{role}_days")
        return days * _DAY_S

    def _until(self, role: str) -> datetime:
        return self._now() + timedelta(seconds=self._lifetime_s(role))

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), UTC)

    def _built(self) -> dict[str, str]:
        return {BUILT: f"{self._now():%Y-%m-%dT%H:%M:%SZ}"}


def _load_secret(path: Path, passphrase: bytes | None) -> CryptoSigner:
    try:
        secret = load_pem_private_key(path.read_bytes(), passphrase)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise SigningError(f"{path} cannot be opened: wrong passphrase, or not a key") from error
    if not isinstance(secret, Ed25519PrivateKey):
        raise SigningError(f"{path} is not an Ed25519 key")
    return CryptoSigner(secret)
