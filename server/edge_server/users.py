"""Who may do what over the API and the dashboard: tokens, roles, sessions.

A token has 256 random bits, so that its SHA-256 is kept and not a slow hash: nobody can try them all, and a look-up at
each request must be cheap. Whoever reads the database cannot log in with what is there.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import get_args

from edge_sdk.clock import Clock
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import check_name
from edge_server.errors import UnknownUserError, UserError
from edge_server.records import Role, UserRecord
from edge_server.store import Store

ROLES: tuple[Role, ...] = get_args(Role)
"""From the least to the most: each may do what those before it may."""
RESERVED = ("api", "cli", "coordinator", "dashboard", "library")
"""Actors of the audit log that are nobody's name."""
_PREFIX = "edge-"
_BYTES = 32


def may(role: Role, wanted: Role) -> bool:
    """Whether somebody of that role may do what `wanted` may."""
    return ROLES.index(role) >= ROLES.index(wanted)


def digest(secret: str) -> str:
    """What is kept of a token or a session's secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Users:
    """The users of one coordinator. To be used by one thread at a time.

    Args:
        store: The records.
        clock: Where the time comes from.
        session_s: How long a session lasts.
    """

    def __init__(self, store: Store, *, clock: Clock, session_s: float) -> None:
        self._store, self._clock, self._session_s = store, clock, session_s

    def exist(self) -> bool:
        """Whether there ever was a user: from then on everybody needs a token."""
        return self._store.users.exist()

    def all(self) -> list[UserRecord]:
        """Everybody, revoked ones too, in the order in which they came."""
        return self._store.users.all()

    def add(self, name: str, role: Role, *, actor: str) -> str:
        """Add a user; returns the token, which is kept nowhere.

        Raises:
            UserError: The name is taken, reserved or cannot be used, or there is no such role.
        """
        try:
            check_name(name, "user name")
        except ProtocolError as error:
            raise UserError(str(error)) from error
        if role not in ROLES:
            raise UserError(f"there is no role {role!r}; there are {', '.join(ROLES)}")
        if name in RESERVED:
            raise UserError(f"{name!r} stands for something else in the audit log: choose another name")
        token = _PREFIX + secrets.token_urlsafe(_BYTES)
        with self._store.transaction():
            if any(user.name == name and user.revoked is None for user in self.all()):
                raise UserError(f"there is a user {name!r}: revoke it first, or choose another name")
            now = self._clock.now()
            self._store.users.add(name=name, role=role, digest=digest(token), now=now)
            self._store.audit.add(now, actor, "user added", {"user": name, "role": role})
        return token

    def revoke(self, name: str, *, actor: str) -> None:
        """Turn a user away, and end the user's sessions.

        Raises:
            UnknownUserError: There is no such user.
        """
        with self._store.transaction():
            found = [user for user in self.all() if user.name == name and user.revoked is None]
            if not found:
                raise UnknownUserError(f"there is no user {name!r}: edge-coordinator users list")
            now = self._clock.now()
            self._store.users.revoke(found[0].id, now=now)
            self._store.audit.add(now, actor, "user revoked", {"user": name})

    def by_token(self, token: str) -> UserRecord | None:
        """Whose token it is; None: nobody's."""
        return _checked(self._store.users.by_token(digest(token)), token)

    # ---- sessions of browsers

    def log_in(self, token: str) -> str | None:
        """Begin a session; returns its secret, or None: the token is nobody's."""
        user = self.by_token(token)
        if user is None:
            return None
        secret, now = secrets.token_urlsafe(_BYTES), self._clock.now()
        with self._store.transaction():
            self._store.users.begin(digest=digest(secret), user=user.id, now=now, expires=now + self._session_s)
            self._store.audit.add(now, user.name, "logged in", {})
        return secret

    def by_session(self, secret: str) -> UserRecord | None:
        """Whose session it is; None: nobody's, or it is over."""
        return _checked(self._store.users.by_session(digest(secret), now=self._clock.now()), secret)

    def log_out(self, secret: str) -> None:
        """End a session."""
        with self._store.transaction():
            self._store.users.end(digest(secret))


def _checked(found: tuple[UserRecord, str] | None, secret: str) -> UserRecord | None:
    """The index was searched for the digest; what it found is compared in constant time."""
    if found is None or not hmac.compare_digest(found[1], digest(secret)):
        return None
    return found[0]
