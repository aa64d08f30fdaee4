"""Enrolment: a device's name and password, made here and handed over as one file.

The database keeps a salted hash only, in the form of mosquitto's password file, so that a production broker
can check the same passwords.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from pathlib import Path

import msgspec

from edge_sdk.errors import ConfigError, ProtocolError, StoreError
from edge_sdk.files import replace_file
from edge_sdk.messages import check_name
from edge_server.errors import DeviceExistsError
from edge_server.settings import Settings
from edge_server.store import Store

# mosquitto's own default: the passwords are 256 random bits, which stretching does not make harder to guess
_ITERATIONS = 101
_SALT_BYTES = 12


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Where the device connects, and as whom."""

    host: str
    port: int
    username: str
    password: str


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """All that a device needs to join: the file that `edge enroll` reads."""

    schema: int = 1
    device: str
    group: str
    prefix: str
    broker: BrokerAccess
    root: str = ""
    """TUF root metadata that the device is to trust; empty: the coordinator has no keys, and nothing is signed."""


def hash_password(password: str) -> str:
    """The password as mosquitto's password file has it: PBKDF2-HMAC-SHA512 with a salt of its own."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    return f"$7${_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def enrol(
    store: Store,
    settings: Settings,
    name: str,
    *,
    group: str,
    out: Path,
    actor: str,
    now: float,
    root: str = "",
) -> Bundle:
    """Register a device and write its bundle, readable by its owner only. Both happen, or neither.

    Raises:
        ConfigError: The name or group cannot stand in a topic, or the broker has no fixed port.
        DeviceExistsError: The name is taken.
        StoreError: The bundle exists already or cannot be written.
    """
    try:
        check_name(name)
        check_name(group, "group")
    except ProtocolError as error:
        raise ConfigError(str(error)) from error
    broker = settings.broker
    if broker.port == 0:
        raise ConfigError("devices cannot be told where the broker is: set broker.port to a fixed port")
    if out.exists():
        raise StoreError(f"{out} exists already: move it away, or choose another file")
    password = secrets.token_urlsafe(32)
    bundle = Bundle(
        device=name,
        group=group,
        prefix=settings.prefix,
        broker=BrokerAccess(host=broker.public_host or broker.host, port=broker.port, username=name, password=password),
        root=root,
    )
    try:
        with store.transaction():
            if not store.add_device(name, group=group, credential=hash_password(password), now=now):
                raise DeviceExistsError(f"there is a device {name!r} already: choose another name")
            store.audit(now, actor, "device added", {"device": name, "group": group})
            replace_file(out, msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n", mode=0o600)
    except StoreError:
        out.unlink(missing_ok=True)  # a password that nobody knows of
        raise
    return bundle


def password_file(store: Store) -> str:
    """Every enrolled device's name and hashed password, as mosquitto's `password_file` reads them."""
    return "".join(f"{name}:{credential}\n" for name, credential in store.credentials())
