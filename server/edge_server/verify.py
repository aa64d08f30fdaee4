"""Looking at what is published as a device would, from the first root on."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from edge_sdk.errors import ArtifactError, StoreError
from edge_sdk.files import sha256_file, storage_error
from edge_sdk.index import parse_index
from edge_sdk.manifest import parse_manifest
from edge_sdk.messages import Offer
from edge_sdk.trust import Trust, target_path
from edge_server.keys import TUF_FOLDER
from edge_server.records import ReleaseRecord
from edge_server.registry import Registry


class ReleaseState(msgspec.Struct, frozen=True):
    """A release, and whether a device would take it."""

    release: int
    name: str
    digest: str
    pushed: float
    signed: bool
    problem: str = ""
    """Why a device would not take it; found by `verify` alone."""


def list_releases(registry: Registry) -> list[ReleaseState]:
    """Every release, newest first, and whether it is signed now."""
    targets = registry.repository.targets() if registry.repository.exists else {}
    return [
        ReleaseState(
            release=record.release,
            name=record.name,
            digest=record.digest,
            pushed=record.pushed,
            signed=target_path(record.release) in targets,
        )
        for record in registry.releases()
    ]


def verify_releases(registry: Registry) -> list[ReleaseState]:
    """The same, each signed one checked as a device would: signatures, dates, and every file that it needs.

    Raises:
        SigningError: There are no keys, or what is signed is damaged.
    """
    published = registry.repository.published()
    records = {record.release: record for record in registry.releases()}
    with TemporaryDirectory() as name:
        trust = Trust(Path(name), published.files["1.root"])
        for part, data in published.files.items():
            trust.take(part, data)
        trust.announce(published.versions)
        return [
            msgspec.structs.replace(
                state, problem=_problem(registry, trust, records[state.release]) if state.signed else "not signed"
            )
            for state in list_releases(registry)
        ]


def _problem(registry: Registry, trust: Trust, record: ReleaseRecord) -> str:
    blobs = registry.blobs
    try:
        signed = trust.require(Offer(record.release, record.digest, record.size), registry.clock.now())
        manifest = parse_manifest(blobs.read(record.digest))
        wanted = {record.digest: record.size} | {entry.sha256: entry.size for entry in manifest.files.values()}
        if signed is not None and signed.index:
            wanted[signed.index] = signed.index_size
            wanted |= {patch.digest: patch.size for patch in parse_index(blobs.read(signed.index)).patches}
    except (ArtifactError, StoreError) as error:
        return str(error)
    for digest, size in wanted.items():
        path = blobs.path(digest)
        if path is None or path.stat().st_size != size or sha256_file(path) != digest:
            return f"file {digest[:12]}… is missing or damaged"
    return ""


def export(registry: Registry, folder: Path) -> int:
    """Copy what is public into a folder for a web server: signed metadata, and the files of signed releases.

    What is there already is left alone; the timestamp comes last, so that a device never sees half of it.

    Returns:
        How many files were copied.

    Raises:
        SigningError: There are no keys.
        StoreError: A file cannot be copied.
    """
    published, copied = registry.repository.published(), 0
    names = {role: f"{getattr(published.versions, role)}.{role}" for role in ("snapshot", "targets")}
    try:
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / TUF_FOLDER).mkdir(exist_ok=True)
        for digest in sorted(_digests(registry)):
            source, target = registry.blobs.path(digest), folder / "blobs" / digest
            if source is not None and (not target.exists() or target.stat().st_size != source.stat().st_size):
                shutil.copyfile(source, target)
                copied += 1
        for name, data in published.files.items():  # the timestamp is the last
            target = folder / TUF_FOLDER / f"{names.get(name, name)}.json"
            if not target.exists() or target.read_bytes() != data:
                part = target.with_suffix(".part")
                part.write_bytes(data)
                part.replace(target)
                copied += 1
    except OSError as error:
        raise storage_error(error, f"cannot copy to {folder}") from error
    return copied


def _digests(registry: Registry) -> set[str]:
    """Every file of every signed release."""
    found = set()
    for target in registry.repository.targets().values():
        manifest = target.hashes["sha256"]
        found.add(manifest)
        found |= {entry.sha256 for entry in parse_manifest(registry.blobs.read(manifest)).files.values()}
        index = (target.custom or {}).get("index", {}).get("sha256")
        if index:
            found.add(index)
            found |= {patch.digest for patch in parse_index(registry.blobs.read(index)).patches}
    return found
