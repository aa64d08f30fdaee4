"""Encryption of what is kept on disk by choice: AES-256-GCM under a key in a file of its own.

It protects a database that leaves the device without the key file: a backup, a copy, an erased but recoverable page.
Who can read both files can read the inputs.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.errors import ConfigError, IntegrityError, MissingExtraError, StoreError
from edge_sdk.files import replace_file, storage_error

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
MARK = b"edge-sealed-1\0"
"""What every encrypted value begins with."""
_NONCE_BYTES = 12


class Seal:
    """Encrypts values, each bound to its name.

    Args:
        path: The key file: 32 bytes, for its owner alone. Made if it is missing.

    Raises:
        MissingExtraError: The package cryptography is not installed.
        ConfigError: The file holds no key, or others may read it.
        DiskFullError, StoreError: It cannot be read or made.
    """

    def __init__(self, path: Path) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtraError("encrypting inputs", "encrypt") from error
        self._cipher: AESGCM = AESGCM(_read_key(path))

    def close(self, name: str, data: bytes) -> bytes:
        """The value as it may lie on the disk."""
        nonce = os.urandom(_NONCE_BYTES)
        return MARK + nonce + self._cipher.encrypt(nonce, data, name.encode())

    def open(self, name: str, data: bytes) -> bytes:
        """The value that was closed under this name.

        Raises:
            IntegrityError: It was closed with another key or under another name, or is damaged.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

        begin = len(MARK) + _NONCE_BYTES
        try:
            return self._cipher.decrypt(data[len(MARK) : begin], data[begin:], name.encode())
        except (InvalidTag, ValueError) as error:
            raise IntegrityError("it was encrypted with another key, or is damaged") from error


def is_sealed(data: bytes) -> bool:
    """Whether a value was closed by a `Seal`."""
    return data.startswith(MARK)


def _make_key(path: Path) -> None:
    try:
        replace_file(path, os.urandom(KEY_BYTES), mode=0o600)
    except StoreError as error:
        raise type(error)(f"the key file {path} cannot be made: {error}") from error


def _read_key(path: Path) -> bytes:
    try:
        if not path.exists():
            _make_key(path)
        mode, key = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        raise storage_error(error, f"the key file {path} cannot be read") from error
    if mode & 0o077:
        raise ConfigError(f"the key file {path} is open to others (mode {mode:o}): chmod 600 {path}")
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the key file {path} has {len(key)} bytes, not {KEY_BYTES}: it holds no key of this SDK")
    return key
