"""A device's certificates on its disk: put there by `edge enroll`, and replaced by later ones of the same key."""

from __future__ import annotations

import ssl
from pathlib import Path

from edge_sdk.config import BrokerConfig
from edge_sdk.errors import ConfigError
from edge_sdk.files import replace_file, storage_error

CA_FILE, CERT_FILE, KEY_FILE = "tls/ca.pem", "tls/device.pem", "tls/device.key"


def install(home: Path, *, ca: str, certificate: str, key: str) -> None:
    """Write what a bundle brings, readable by its owner only.

    Args:
        home: The device's folder.
        ca: Certificates of the authority that signed the broker's, PEM; empty: the system knows it.
        certificate: The device's own, PEM; empty: it has none.
        key: Of the certificate, PEM.

    Raises:
        ConfigError: It is no certificate, or the key is of another one.
        StoreError: The files cannot be written.
    """
    if not ca and not certificate:
        return
    folder = (home / CERT_FILE).parent
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise storage_error(error, f"cannot make {folder}") from error
    if ca:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=ca)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the bundle's authority is no certificate: {error}") from error
    if certificate:
        _check_pair(folder, certificate, key)
        replace_file(home / KEY_FILE, key.encode(), mode=0o600)
        replace_file(home / CERT_FILE, certificate.encode(), mode=0o600)
    if ca:
        replace_file(home / CA_FILE, ca.encode(), mode=0o600)


def renew(home: Path, broker: BrokerConfig, certificate: str) -> None:
    """Take a later certificate for the key that the device has; it is used from the next connection on.

    Raises:
        ConfigError: The device has no certificate, or this one is for another key.
        StoreError: It cannot be written.
    """
    if not (broker.cert_file and broker.key_file):
        raise ConfigError("this device has no certificate of its own")
    target = home / broker.cert_file
    try:
        key = (home / broker.key_file).read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the device's key cannot be read: {type(error).__name__}") from error
    _check_pair(target.parent, certificate, key)
    replace_file(target, certificate.encode(), mode=0o600)


def _check_pair(folder: Path, certificate: str, key: str) -> None:
    candidate, private = folder / "candidate.pem", folder / "candidate.key"  # the ssl module reads files only
    try:
        replace_file(candidate, certificate.encode(), mode=0o600)
        replace_file(private, key.encode(), mode=0o600)
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(candidate, private)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError("the certificate is none, or for another key") from error
    finally:
        candidate.unlink(missing_ok=True)
        private.unlink(missing_ok=True)
