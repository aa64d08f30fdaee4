"""Copies of a coordinator that can be trusted: made while it runs, checked, and put back only where nothing is lost.

A backup is a folder: the database, the releases' files, the settings and the signed metadata; keys only on request.
`backup.json` lists every file with its SHA-256 and is written last, so that half a backup is none.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from edge_sdk import __version__
from edge_sdk.database import copy_database, read_only
from edge_sdk.errors import IntegrityError, StoreError
from edge_sdk.files import fsync_folder, lock_folder, replace_file, sha256_file, storage_error
from edge_server.errors import BackupError
from edge_server.identity import CA_FOLDER, SECRET_NAME
from edge_server.keys import KEYS_FOLDER, TUF_FOLDER
from edge_server.schema import STEPS
from edge_server.settings import SETTINGS_NAME, Settings, load_settings
from edge_server.store_audit import last_change

LIST_NAME = "backup.json"
DATABASE_NAME = "coordinator.db"
_BLOBS = "blobs"
_SCHEMA = 1


class Entry(msgspec.Struct, frozen=True):
    """A file of a backup."""

    size: int
    sha256: str


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """What `backup.json` says.

    Attributes:
        created: Seconds since the epoch, as `changed`.
        changed: The last thing that the database knows of.
        form: Of the database: how many steps of its schema were made.
        keys: Whether secrets are in it.
        files: By path within the folder.
    """

    schema: int = _SCHEMA
    created: float
    changed: float
    form: int
    sdk: str
    keys: bool
    files: dict[str, Entry]


def make(home: Path, folder: Path, *, settings: Settings, now: float, keys: bool = False) -> Backup:
    """Copy a coordinator into a new folder, also while it runs, and check the copy.

    Args:
        home: The coordinator's folder.
        folder: Where to; it must not exist, or be empty.
        settings: Say where its files are.
        now: Seconds since the epoch.
        keys: Also the signing keys that are here, the authority's, the secret of commands, and the files that the
            settings name: passwords, certificates with their keys, secrets of webhooks.

    Raises:
        BackupError: `folder` is not empty, or there is no database.
        IntegrityError: The copy is not as it should be.
        StoreError: A file cannot be read or written.
    """
    database = home / settings.database
    if not database.exists():
        raise BackupError(f"{database} is missing: there is nothing to back up")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(folder.iterdir()):
            raise BackupError(f"{folder} is not empty: a backup goes into a folder of its own")
        copy_database(database, folder / DATABASE_NAME)
        # after the database, so that every file it knows is there
        for source, name in _sources(home, settings, keys=keys):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(source, target)
    except OSError as error:
        raise storage_error(error, f"cannot back up to {folder}") from error
    files = {
        path.relative_to(folder).as_posix(): Entry(path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    form, changed = _look_into(folder / DATABASE_NAME)
    found = Backup(created=now, changed=changed, form=form, sdk=__version__, keys=keys, files=files)
    replace_file(folder / LIST_NAME, msgspec.json.format(msgspec.json.encode(found), indent=1), mode=0o600)
    return verify(folder)


def verify(folder: Path) -> Backup:
    """Read a backup, every file of it.

    Raises:
        BackupError: It is none, or of a later form than this version knows.
        IntegrityError: A file is missing or altered, or the database is damaged.
        StoreError: A file cannot be read.
    """
    try:
        found = msgspec.json.decode((folder / LIST_NAME).read_bytes(), type=Backup)
    except FileNotFoundError as error:
        raise BackupError(f"{folder} has no {LIST_NAME}: it is no backup, or half of one") from error
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{folder / LIST_NAME} is damaged: {error}") from error
    except OSError as error:
        raise storage_error(error, f"cannot read {folder / LIST_NAME}") from error
    if found.schema > _SCHEMA or found.form > len(STEPS):
        raise BackupError(
            f"{folder} was made by edge-sdk {found.sdk}, with a database of form {found.form}; this version reads up "
            f"to {len(STEPS)}: update the SDK"
        )
    if DATABASE_NAME not in found.files:
        raise IntegrityError(f"{folder / LIST_NAME} lists no {DATABASE_NAME}")
    for name, entry in found.files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise IntegrityError(f"{folder / LIST_NAME} names {name!r}, outside of it")
        if not path.is_file() or path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
            raise IntegrityError(f"{path} is missing or was altered")
    if _look_into(folder / DATABASE_NAME)[0] != found.form:
        raise IntegrityError(f"{folder / DATABASE_NAME} is of another form than {LIST_NAME} says")
    return found


def restore(folder: Path, home: Path, *, force: bool = False) -> Backup:
    """Put a backup's database and files back; what is there of settings, signed metadata and keys stays.

    Signed metadata is not put back over what is there: devices refuse metadata older than they have seen. The database
    that was there is kept beside, as `*.replaced`.

    Args:
        folder: The backup.
        home: The coordinator's folder; made if it is missing.
        force: Also over a database that knows of later things, or that cannot be read.

    Raises:
        BackupError: The coordinator runs, or its database is newer than the backup.
        IntegrityError: The backup is damaged; nothing was changed.
        StoreError: A file cannot be read or written.
    """
    found = verify(folder)
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            lock = lock_folder(home)
        except StoreError as error:
            raise BackupError(f"the coordinator in {home} is running: stop it first") from error
        with lock:
            settings = _settings_of(home, folder)
            database = home / settings.database
            if database.exists() and not force:
                _refuse_newer(database, found)
            for name in found.files:
                target = _target(home, settings, name)
                if target is not None and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _copy(folder / name, target)
            part = database.with_name(f"{database.name}.part")
            _copy(folder / DATABASE_NAME, part)
            for suffix in ("-wal", "-shm", ""):
                old = database.with_name(database.name + suffix)
                if old.exists():
                    old.replace(database.with_name(f"{database.name}.replaced{suffix}"))
            part.replace(database)
            fsync_folder(home)
    except OSError as error:
        raise storage_error(error, f"cannot restore to {home}") from error
    return found


def _look_into(path: Path) -> tuple[int, float]:
    """(form, last change) of a whole database."""
    try:
        with closing(read_only(path)) as connection:
            if (problem := connection.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise IntegrityError(f"{path} is damaged: {problem}")
            return int(connection.execute("PRAGMA user_version").fetchone()[0]), last_change(connection)
    except sqlite3.Error as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error


def _refuse_newer(database: Path, found: Backup) -> None:
    try:
        form, changed = _look_into(database)
    except IntegrityError as error:
        raise BackupError(f"{error}; to put the backup in its place: --force (it is kept beside)") from error
    if form > found.form or changed > found.changed:
        raise BackupError(
            f"{database} is newer than the backup (by {max(0.0, changed - found.changed):.0f} s, form {form}): what "
            "came since would be lost; if that is meant: --force (it is kept beside)"
        )


def _settings_of(home: Path, folder: Path) -> Settings:
    for path in (home / SETTINGS_NAME, folder / SETTINGS_NAME):
        if path.exists():
            return load_settings(path)
    return Settings()


def _sources(home: Path, settings: Settings, *, keys: bool) -> Iterator[tuple[Path, str]]:
    """(file, its name in a backup) of everything but the database."""
    if (home / SETTINGS_NAME).exists():
        yield home / SETTINGS_NAME, SETTINGS_NAME
    folders = [(home / settings.blobs, _BLOBS), (home / TUF_FOLDER, TUF_FOLDER)]
    if keys:
        folders += [(home / KEYS_FOLDER, KEYS_FOLDER), (home / CA_FOLDER, CA_FOLDER)]
        if (home / SECRET_NAME).exists():
            yield home / SECRET_NAME, SECRET_NAME
        for name in _named(settings):
            if (home / name).is_file():
                yield home / name, name
    for folder, name in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".tmp", ".part"):
                yield path, f"{name}/{path.relative_to(folder).as_posix()}"


def _named(settings: Settings) -> set[str]:
    """Files within the folder that the settings name."""
    broker, http = settings.broker, settings.http
    names = (broker.password_file, broker.ca_file, broker.cert_file, broker.key_file, http.cert_file, http.key_file)
    told = {name for name in (*names, *(sink.secret_file for sink in settings.alerts.sinks.values())) if name}
    return {name for name in told if not Path(name).is_absolute() and ".." not in Path(name).parts}


def _target(home: Path, settings: Settings, name: str) -> Path | None:
    """Where a file of a backup belongs; None: the database, which is put in place by itself."""
    if name == DATABASE_NAME:
        return None
    first, _, rest = name.partition("/")
    return home / settings.blobs / rest if first == _BLOBS else home / name


def _copy(source: Path, target: Path) -> None:
    """Copy and flush; only the owner may read a copy of what only the owner may read."""
    shutil.copy(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
