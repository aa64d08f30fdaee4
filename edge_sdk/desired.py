"""Whether a desired state counts: signed by the coordinator, for this group, and not older than the last (ADR 30).

The keys are those that TUF's root names for the timestamp: they lie on the coordinator anyway, sign as often, and are
changed and revoked by the same commands. A device with a root takes nothing else, across restarts as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from edge_sdk.clock import is_due
from edge_sdk.errors import ProtocolError, StoreError
from edge_sdk.files import replace_file, storage_error
from edge_sdk.messages import Desired, Signature, decode, encode
from edge_sdk.trust import ROOT_NAME, Trust

if TYPE_CHECKING:
    from tuf.api.metadata import Root

logger = logging.getLogger(__name__)
_DOMAIN = b"edge-desired-1\0"
_ROLE = "timestamp"
_SIGNATURES = Desired.__struct_fields__.index("signatures")
_FIELDS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_AGAIN_S = 60.0
_TELL_S = 3600.0
"""Refusals are told so often at most: whoever may publish can have thousands of them."""


def signed_bytes(payload: bytes, *, prefix: str, group: str) -> bytes:
    """What is signed of an encoded Desired: whom it is for, and every field but the signatures, as it travels.

    A field that a later version appends is signed as well, and need not be understood to be verified.

    Raises:
        ProtocolError: It is no array.
    """
    try:
        fields = _FIELDS.decode(memoryview(payload)[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a Desired: {error}") from error
    del fields[_SIGNATURES : _SIGNATURES + 1]
    return b"".join([_DOMAIN, prefix.encode(), b"\0", group.encode(), b"\0", *map(bytes, fields)])


def sign_desired(
    message: Desired,
    sign: Callable[[bytes], Iterable[Signature]],
    *,
    prefix: str,
    group: str,
    issued: float,
    expires: float,
) -> bytes:
    """The payload of a desired state with its signatures.

    Args:
        message: What the group is told.
        sign: Makes a signature with each key.
        prefix: First level of the topic.
        group: For whom.
        issued: Now, seconds since the epoch.
        expires: Until when it is good, seconds since the epoch.

    Raises:
        ProtocolError: It is too large.
    """
    dated = msgspec.structs.replace(message, issued=issued, expires=expires, signatures=[])
    signatures = list(sign(signed_bytes(encode(dated), prefix=prefix, group=group)))
    return encode(msgspec.structs.replace(dated, signatures=signatures))


class Refusals(msgspec.Struct, frozen=True):
    """Desired states that were not taken since this was last told."""

    count: int
    reason: str
    """Of the last."""


class _Accepted(msgspec.Struct, frozen=True):
    """The newest that was believed."""

    revision: int
    issued: float
    root: int
    """Version of the root that named its keys."""
    keys: list[str]
    """All that could have signed it."""


class _NotYetError(Exception):
    """What would vouch for it may still come, or the clock may be put right."""


class DesiredReader:
    """Reads desired states, and lets those through that count.

    Args:
        trust: Whom the device believes.
        prefix: First level of the device's topics.
        group: Of the device.
    """

    def __init__(self, trust: Trust, *, prefix: str, group: str) -> None:
        self._trust, self._prefix, self._group = trust, prefix, group
        self._path = trust.folder / "desired.json"
        self._accepted = self._load()
        self._root: Root | None = None
        self._waiting = b""
        self._tried_at, self._complained = 0.0, False
        self._refused, self._reason = 0, ""
        self._told_at: float | None = None

    def read(self, payload: bytes, now: float) -> Desired | None:
        """The desired state in a message; None: nobody can say yet whether it counts, and `look_again` will.

        Args:
            payload: As it came.
            now: Seconds since the epoch.

        Raises:
            ProtocolError: It does not count, or is none.
            StoreError: What was believed cannot be remembered; nothing has changed.
        """
        try:
            message = self._verified(payload, now)
        except _NotYetError as error:
            logger.info("a desired state waits: %s", error)
            self._waiting, self._tried_at, self._complained = payload, now, False
            return None
        except ProtocolError as error:
            self._refuse(error)
            raise
        except StoreError:  # the disk may have room again before the broker repeats it
            self._waiting, self._tried_at, self._complained = payload, now, True
            raise
        self._waiting = b""
        return message

    def look_again(self, now: float) -> Desired | None:
        """The one that waits, if it counts by now.

        Raises:
            ProtocolError: It does not, which is told once; it may go on waiting.
            StoreError: As `read`.
        """
        if not self._waiting or not (self._follow_root() or is_due(now, self._tried_at, _AGAIN_S)):
            return None
        self._tried_at = now
        try:
            message = self._verified(self._waiting, now)
        except _NotYetError as error:
            if self._complained:
                return None
            self._complained = True
            refused = ProtocolError(str(error))
            self._refuse(refused)
            raise refused from error
        except ProtocolError as error:
            self._waiting = b""
            self._refuse(error)
            raise
        self._waiting = b""
        return message

    def refusals(self, now: float) -> Refusals | None:
        """What is to be told of them now, if anything is; `told` says that it was."""
        due = self._told_at is None or is_due(now, self._told_at, _TELL_S)
        return Refusals(self._refused, self._reason) if self._refused and due else None

    def told(self, now: float) -> None:
        """`refusals` were recorded."""
        self._refused, self._told_at = 0, now

    def _refuse(self, error: ProtocolError) -> None:
        self._refused += 1
        self._reason = str(error)

    def _verified(self, payload: bytes, now: float) -> Desired:
        message = decode(payload, Desired)
        if self._trust.root is None:
            raise ProtocolError(f"there is no {ROOT_NAME} to check what the group is told with: enrol this device")
        if not message.signatures:
            raise ProtocolError(f"revision {message.revision} is not signed, and this device has a root")
        self._follow_root()
        keys = self._require_signature(message, payload, now)
        if now >= message.expires:
            raise _NotYetError(f"revision {message.revision} was good until {_text(message.expires)}")
        last = self._accepted
        if last is not None and last.keys == keys and (message.revision, message.issued) < (last.revision, last.issued):
            raise ProtocolError(
                f"revision {message.revision}, signed {_text(message.issued)}, is older than revision "
                f"{last.revision}, signed {_text(last.issued)}, which was believed"
            )
        self._remember(_Accepted(message.revision, message.issued, self._known_root.version, keys))
        return message

    def _require_signature(self, message: Desired, payload: bytes, now: float) -> list[str]:
        """The keys that may sign, all of them, if enough of them did."""
        from securesystemslib.signer import Signature as KeySignature  # noqa: PLC0415 - only with a root
        from tuf.api.exceptions import UnsignedMetadataError  # noqa: PLC0415

        root = self._known_root
        if self._accepted is not None and root.version < self._accepted.root:
            raise _NotYetError(f"version {self._accepted.root} of the root, which was here before, has to come again")
        if root.is_expired(datetime.fromtimestamp(now, UTC)):
            raise _NotYetError(f"the root was good until {root.expires:%Y-%m-%d %H:%M UTC}")
        keys = sorted(root.roles[_ROLE].keyids)
        signatures = {s.key: KeySignature(s.key, s.value.hex()) for s in message.signatures if s.key in keys}
        if not signatures:
            raise _NotYetError(f"revision {message.revision} is signed by no key of version {root.version} of the root")
        try:
            data = signed_bytes(payload, prefix=self._prefix, group=self._group)
            root.verify_delegate(_ROLE, data, signatures)
        except UnsignedMetadataError as error:
            raise ProtocolError(f"revision {message.revision} was not signed so for this group: {error}") from error
        return keys

    # ---- the root

    @property
    def _known_root(self) -> Root:
        if self._root is None:
            from tuf.api.exceptions import RepositoryError  # noqa: PLC0415 - memory that only signed updates need
            from tuf.api.metadata import Metadata, Root  # noqa: PLC0415

            try:
                self._root = Metadata[Root].from_bytes(self._trust.root or b"").signed
            except RepositoryError as error:
                raise ProtocolError(f"{ROOT_NAME} is damaged; enrol the device again: {error}") from error
        return self._root

    def _follow_root(self) -> bool:
        """Take up the roots that follow, as far as they are here; whether there was one.

        The rest of the metadata need not be complete for that: each root is signed by the one before it.
        """
        if self._trust.root is None:
            return False
        before = self._known_root
        while (root := self._next_root(self._known_root)) is not None:
            self._root = root
        return self._known_root is not before

    def _next_root(self, root: Root) -> Root | None:
        from tuf.api.exceptions import RepositoryError  # noqa: PLC0415
        from tuf.api.metadata import Metadata, Root  # noqa: PLC0415

        for data in self._trust.roots(root.version + 1):
            try:
                found = Metadata[Root].from_bytes(data)
                for judge in (root, found.signed):
                    judge.verify_delegate(Root.type, found.signed_bytes, found.signatures)
            except (RepositoryError, ValueError, AttributeError) as error:
                logger.debug("version %d of the root is none: %s", root.version + 1, error)
                continue
            if found.signed.version == root.version + 1:
                return found.signed
        return None

    # ---- what was believed

    def _load(self) -> _Accepted | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Accepted)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, f"cannot read {self._path.name}") from error
        except msgspec.MsgspecError as error:
            logger.warning("which desired state came last is lost: %s", error)
            return None

    def _remember(self, accepted: _Accepted) -> None:
        if accepted != self._accepted:
            replace_file(self._path, msgspec.json.encode(accepted))
            self._accepted = accepted


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
