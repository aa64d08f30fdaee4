"""Whom a device believes: a release counts only if the metadata that its own root vouches for names it (TUF).

The root comes with the device (`root.json` in its folder, written by `edge enroll`). All else may come from anywhere:
messages and HTTP fill an inbox, and TUF's client reads it there through a fetcher that never waits: what is not in the
inbox does not exist. So it is asked only once the set that was announced is complete.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edge_sdk.clock import is_due
from edge_sdk.errors import (
    ClockUntrustedError,
    IntegrityError,
    MetadataExpiredError,
    ProtocolError,
    StoreError,
    UntrustedError,
)
from edge_sdk.files import replace_file, storage_error
from edge_sdk.messages import MetadataSet, Offer, Topics, decode
from edge_sdk.transport import Message, Transport

if TYPE_CHECKING:
    from tuf.ngclient import FetcherInterface, Updater

logger = logging.getLogger(__name__)
ROOT_NAME = "root.json"
"""The trusted root, in the device's folder."""
BUILT = "built"
"""Field of the metadata: when it was signed."""
ROLES = ("timestamp", "snapshot", "targets")
TrustState = Literal["no_root", "waiting", "trusted", "expired", "clock_untrusted", "refused"]
_FILE = re.compile(r"([1-9][0-9]{0,8})\.(root|snapshot|targets)\.json|timestamp\.json")
_MAX_ROOTS = 256
_MAX_ROOT_BYTES = 32_768
"""One with the most keys has 12 kB. So what claims to be a root fills no more than 8 MB."""
_SKEW_S = 300.0
_AGAIN_S = 60.0


class _Signed(msgspec.Struct):
    version: int


class _Envelope(msgspec.Struct):
    signed: _Signed


_PEEK = msgspec.json.Decoder(_Envelope)


@dataclass(frozen=True)
class SignedRelease:
    """What the signed metadata says of a release."""

    digest: str
    """SHA-256 of the manifest."""
    size: int
    index: str = ""
    """SHA-256 of the release's index; empty: it has none."""
    index_size: int = 0


def target_path(release: int) -> str:
    """The name under which a release's manifest is signed."""
    return f"releases/{release}/manifest.json"


def version_of(data: bytes) -> int:
    """The version that metadata claims to be. Nothing is verified.

    Raises:
        ProtocolError: It is not metadata.
    """
    try:
        return _PEEK.decode(data).signed.version
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not TUF metadata: {error}") from error


class Trust:
    """Receives metadata, verifies it, and says which releases it vouches for.

    Whatever cannot be verified takes the trust away from everything until something better comes.

    Args:
        folder: For what is received and what was verified.
        root: The root this device was provisioned with; None: there is none, and every release is refused.
    """

    def __init__(self, folder: Path, root: bytes | None) -> None:
        self._inbox, self._trusted, self._root = folder / "inbox", folder / "trusted", root
        self.folder = folder
        self._announced: MetadataSet | None = None
        self._updater: Updater | None = None
        self._vouched: tuple[Offer, SignedRelease] | None = None  # what the updater was asked last
        self._changed = False
        self._checked_at: float | None = None
        self._built = self._expires = 0.0
        self._expired = ""
        self._problem = ""
        self.root_version = 0
        """Of the root that the device was provisioned with."""
        if root is not None:
            try:
                self.root_version = version_of(root)
                for made in (self._inbox, self._trusted):
                    made.mkdir(parents=True, exist_ok=True)
            except ProtocolError as error:
                raise IntegrityError(f"{ROOT_NAME} is damaged; enrol the device again: {error}") from error
            except OSError as error:
                raise storage_error(error, f"cannot make {folder.name}") from error

    # ---- what arrives

    def take(self, name: str, payload: bytes) -> None:
        """Put metadata into the inbox, or take note of which set is to be complete. Nothing is believed yet.

        Args:
            name: Last level of its topic: "set", "timestamp", "snapshot", "targets", or "3.root".
            payload: As it came.

        Raises:
            ProtocolError: It cannot be what the name says.
            StoreError: It cannot be written; it will come again with the next connection.
        """
        if self._root is None:
            return
        if name == "set":
            self.announce(decode(payload, MetadataSet))
            return
        number, _, role = name.rpartition(".")
        version = version_of(payload)
        if role == "root":
            known = number.isdecimal() and str(version) == number
            known = known and self.root_version < version <= self.root_version + _MAX_ROOTS
            if not known or len(payload) > _MAX_ROOT_BYTES:
                return
        elif number or role not in ROLES:
            raise ProtocolError(f"no metadata is called {name!r}")
        path = self._inbox / f"{name}.json"
        if not path.exists() or path.read_bytes() != payload:
            replace_file(path, payload)
            self._changed = True

    def announce(self, wanted: MetadataSet) -> None:
        """This set is current: once it is complete it will be verified."""
        if wanted != self._announced:
            self._announced, self._changed = wanted, True

    @property
    def complete(self) -> bool:
        """Whether everything that was announced is here."""
        wanted = self._announced
        if wanted is None or wanted.root > self.root_version + _MAX_ROOTS:
            return False
        roots = (f"{number}.root.json" for number in range(self.root_version + 1, wanted.root + 1))
        history = self._trusted / "root_history"
        return all((self._inbox / name).exists() or (history / name).exists() for name in roots) and all(
            read_inbox(self._inbox, role, getattr(wanted, role)) is not None for role in ROLES
        )

    # ---- what is believed

    @property
    def root(self) -> bytes | None:
        """The root that the device was provisioned with."""
        return self._root

    def roots(self, version: int) -> list[bytes]:
        """What is here under that version of the root, first what was verified before. Nothing is believed yet."""
        name = f"{version}.root.json"
        paths = (self._trusted / "root_history" / name, self._inbox / name)
        return [path.read_bytes() for path in paths if path.exists()]

    def require(self, offer: Offer, now: float) -> SignedRelease | None:
        """What the metadata says of an offered release; None: the metadata is not here yet.

        Raises:
            MetadataExpiredError: The metadata is past its date.
            ClockUntrustedError: The clock reads before the metadata was made.
            UntrustedError: The metadata does not vouch for this release, or cannot be believed itself.
        """
        if self._root is None:
            raise UntrustedError(
                f"there is no {ROOT_NAME} to check releases with: enrol this device, or set update.trust to none"
            )
        self.refresh(now)
        if self._updater is None:
            if self._expired:
                raise MetadataExpiredError(self._expired)
            if self._problem:
                raise UntrustedError(self._problem)
            return None
        self._require_time(now)
        if self._vouched is not None and self._vouched[0] == offer:
            return self._vouched[1]
        info = self._updater.get_targetinfo(target_path(offer.release))
        if info is None:
            raise UntrustedError(f"release {offer.release} is not signed")
        digest = info.hashes.get("sha256")
        if (digest, info.length) != (offer.digest, offer.size):
            raise UntrustedError(
                f"release {offer.release} is offered with {offer.size} bytes and SHA-256 {offer.digest[:12]}…, "
                f"signed are {info.length} and {str(digest)[:12]}…"
            )
        self._vouched = offer, _signed_release(offer, info.custom or {})
        return self._vouched[1]

    def refresh(self, now: float) -> None:
        """Verify what has come, if anything has changed; what failed for its date is looked at again in time."""
        again = self._updater is None and self._expired and is_due(now, self._checked_at or 0.0, _AGAIN_S)
        if self._root is None or not (self._changed or again) or not self.complete:
            return
        from tuf.api import exceptions  # noqa: PLC0415 - memory that only signed updates need
        from tuf.ngclient import Updater, UpdaterConfig  # noqa: PLC0415

        self._changed, self._checked_at = False, now
        self._updater, self._expired, self._problem, self._vouched = None, "", "", None
        try:
            updater = Updater(
                str(self._trusted),
                "inbox:///",
                fetcher=_fetcher(self._inbox),
                config=UpdaterConfig(prefix_targets_with_hash=False),
                bootstrap=self._root,
            )
            # TUF reads the system's clock; the device has one of its own
            updater._trusted_set.reference_time = datetime.fromtimestamp(now, UTC)  # noqa: SLF001
            updater.refresh()
            self._note_dates()
            self._updater = updater
        except exceptions.ExpiredMetadataError as error:
            self._expired = f"the signed metadata is past its date, by this device's clock: {error}"
        except OSError as error:
            self._changed = True
            raise storage_error(error, "verified metadata cannot be kept") from error
        except (exceptions.RepositoryError, exceptions.DownloadError, ValueError, TypeError, RuntimeError) as error:
            self._problem = f"the signed metadata cannot be believed: {error}"
        if problem := self._expired or self._problem:
            logger.warning("no release is installed now: %s", problem)

    def state(self, now: float) -> TrustState:
        """How it stands, for people. Reads only what was found before."""
        if self._root is None:
            return "no_root"
        if self._updater is None:
            if self._expired:
                return "expired"
            return "refused" if self._problem else "waiting"
        try:
            self._require_time(now)
        except MetadataExpiredError:
            return "expired"
        except ClockUntrustedError:
            return "clock_untrusted"
        return "trusted"

    def _require_time(self, now: float) -> None:
        if now + _SKEW_S < self._built:
            raise ClockUntrustedError(
                f"the clock reads {_text(now)}, and the metadata was signed on {_text(self._built)}: set the clock"
            )
        if now >= self._expires:
            raise MetadataExpiredError(f"the signed metadata was good until {_text(self._expires)}")

    def _note_dates(self) -> None:
        """When what was just verified was built, and until when it is good."""
        from tuf.api.metadata import Metadata  # noqa: PLC0415

        signed = [Metadata.from_file(str(self._trusted / f"{role}.json")).signed for role in (*ROLES, "root")]
        self._expires = min(part.expires.timestamp() for part in signed)
        self._built = max(_built(part.unrecognized_fields.get(BUILT)) for part in signed)


def load_trust(home: Path, wanted: Literal["root", "none"]) -> Trust | None:
    """The trust of a device; None: its updates are not signed, as its settings say.

    Args:
        home: The device's folder. A root in it is always enforced.
        wanted: `update.trust`.

    Raises:
        IntegrityError: The root is damaged.
        StoreError: It cannot be read.
    """
    path, folder = home / ROOT_NAME, home / "tuf"
    try:
        root = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise storage_error(error, f"{ROOT_NAME} cannot be read") from error
    if root is None and wanted == "none" and not folder.exists():
        return None
    return Trust(folder, root)  # without a root although there once was one: everything is refused


class Listening:
    """A transport that puts metadata into the inbox, and passes on all else."""

    def __init__(self, transport: Transport, topics: Topics, trust: Trust) -> None:
        self._transport, self._topics, self._trust = transport, topics, trust

    @property
    def connected(self) -> bool:
        """As of the transport."""
        return self._transport.connected

    @property
    def connections(self) -> int:
        """As of the transport."""
        return self._transport.connections

    def connect(self, will: Message | None = None) -> None:
        """Connect, and listen for metadata."""
        self._transport.subscribe(self._topics.metadata("+"))
        self._transport.connect(will)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, **options: Any) -> None:
        """As of the transport."""
        self._transport.publish(topic, payload, retain=retain, **options)

    def subscribe(self, topic_filter: str) -> None:
        """As of the transport."""
        self._transport.subscribe(topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        """As of the transport."""
        self._transport.unsubscribe(topic_filter)

    def receive(self) -> list[Message]:
        """All but metadata."""
        others = []
        for message in self._transport.receive():
            name = self._topics.parse_metadata(message.topic)
            if name is None:
                others.append(message)
            elif message.payload:
                try:
                    self._trust.take(name, message.payload)
                except (ProtocolError, StoreError) as error:
                    logger.warning("%s was ignored: %s", message.topic, error)
        return others

    def close(self) -> None:
        """As of the transport."""
        self._transport.close()


def read_inbox(inbox: Path, role: str, version: int | None) -> bytes | None:
    """The metadata of a role in the inbox, if it is of that version."""
    try:
        data = (inbox / f"{role}.json").read_bytes()
        return data if version is None or version_of(data) == version else None
    except (OSError, ProtocolError):
        return None


def _fetcher(inbox: Path) -> FetcherInterface:
    from tuf.api.exceptions import DownloadHTTPError  # noqa: PLC0415
    from tuf.ngclient import FetcherInterface  # noqa: PLC0415

    class InboxFetcher(FetcherInterface):
        """Never waits: what is not in the inbox does not exist."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            name = url.rpartition("/")[2]
            data = None
            if found := _FILE.fullmatch(name):
                number, role = found[1], found[2]
                if role in (None, "root"):
                    path = inbox / name
                    data = path.read_bytes() if path.exists() else None
                else:
                    data = read_inbox(inbox, role, int(number))
            if data is None:
                raise DownloadHTTPError(f"{name} has not been received", 404)
            return iter([data])

    return InboxFetcher()


def _signed_release(offer: Offer, custom: dict[str, Any]) -> SignedRelease:
    index = custom.get("index")
    if isinstance(index, dict):
        digest, size = index.get("sha256"), index.get("length")
        if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) and isinstance(size, int):
            return SignedRelease(offer.digest, offer.size, digest, size)
    return SignedRelease(offer.digest, offer.size)


def _built(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
