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
from edge_server.errors import DeviceExistsError, UnknownDeviceError
from edge_server.settings import Settings
from edge_server.store import Store

# mosquitto's own default: the passwords are 256 random bits, which stretching does not make harder to guess
_ITERATIONS = 101
_SALT_BYTES = 12


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the device connects, and as whom."""

    host: str
    port: int
    username: str
    password: str
    tls: bool = False
    ca: str = ""
    """Certificates of the authority that signed the broker's, PEM; empty: the device's system knows it."""
    certificate: str = ""
    """The device's own, PEM; empty: the password alone says who it is."""
    key: str = ""
    """Of the certificate, PEM."""


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a device gets beside its password."""

    command_key: str
    """Hexadecimal digits."""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    serial: str = ""
    expires: float = 0.0
    """Of the certificate, seconds since the epoch."""


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """All that a device needs to join: the file that `edge enroll` reads."""

    schema: int = 1
    device: str
    group: str
    prefix: str
    command_key: str = ""
    """Proves to the device that a command comes from the coordinator; empty: it takes none."""
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
    credentials: Credentials | None = None,
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
    if name == coordinator_name(settings):
        raise ConfigError(f"{name!r} is what the coordinator itself is called at the broker: choose another name")
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
        command_key=credentials.command_key if credentials else "",
        broker=_access(settings, name, password, credentials),
        root=root,
    )
    try:
        with store.transaction():
            if not store.devices.add(name, group=group, credential=hash_password(password), now=now):
                raise DeviceExistsError(f"there is a device {name!r} already: choose another name")
            _keep_certificate(store, name, credentials, now)
            store.audit.add(now, actor, "device added", {"device": name, "group": group})
            replace_file(out, msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n", mode=0o600)
    except StoreError:
        out.unlink(missing_ok=True)  # a password that nobody knows of
        raise
    return bundle


def replace(
    store: Store,
    settings: Settings,
    name: str,
    *,
    group: str,
    out: Path,
    actor: str,
    now: float,
    credentials: Credentials,
    root: str = "",
) -> Bundle:
    """Write a new bundle for a device that was added before; its password and certificates so far are void then.

    Raises:
        UnknownDeviceError: It was never added.
        StoreError: The bundle exists already or cannot be written.
    """
    if out.exists():
        raise StoreError(f"{out} exists already: move it away, or choose another file")
    password = secrets.token_urlsafe(32)
    bundle = Bundle(
        device=name,
        group=group,
        prefix=settings.prefix,
        command_key=credentials.command_key,
        broker=_access(settings, name, password, credentials),
    )
    if root:
        bundle = msgspec.structs.replace(bundle, root=root)
    try:
        with store.transaction():
            store.certificates.revoke(name, now=now)
            if not store.devices.replace(name, credential=hash_password(password)):
                raise UnknownDeviceError(f"no device {name!r} was added here")
            _keep_certificate(store, name, credentials, now)
            store.audit.add(now, actor, "device replaced", {"device": name})
            replace_file(out, msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n", mode=0o600)
    except StoreError:
        out.unlink(missing_ok=True)
        raise
    return bundle


def coordinator_name(settings: Settings) -> str:
    """What the coordinator is called at the broker."""
    return settings.broker.username or "coordinator"


def _access(settings: Settings, name: str, password: str, credentials: Credentials | None) -> BrokerAccess:
    broker = settings.broker
    given = credentials or Credentials(command_key="")
    return BrokerAccess(
        host=broker.public_host or broker.host,
        port=broker.port,
        username=name,
        password=password,
        tls=broker.tls,
        ca=given.ca,
        certificate=given.certificate,
        key=given.key,
    )


def _keep_certificate(store: Store, name: str, credentials: Credentials | None, now: float) -> None:
    """Inside a transaction."""
    if credentials is not None and credentials.certificate:
        pem, expires = credentials.certificate, credentials.expires
        store.certificates.add(name, serial=credentials.serial, pem=pem, issued=now, expires=expires)


def password_file(store: Store) -> str:
    """Every enrolled device's name and hashed password, as mosquitto's `password_file` reads them."""
    return "".join(f"{name}:{credential}\n" for name, credential in store.devices.credentials())
