"""A checkpoint over the API: taken in as `push` takes it in, or refused with a reason, and nothing is left behind."""

import asyncio
import io
import os
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from edge_sdk.manifest import MANIFEST_NAME
from edge_server.errors import UploadError
from edge_server.registry import Registry
from edge_server.settings import HttpSettings
from edge_server.upload import Uploads
from tests.edge_server.conftest import serving

PATH = "/api/v1/releases"
DOCS = Path(__file__).parents[2] / "docs"


def packed(folder, form=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        archive.add(folder, arcname=".")
    return out.getvalue()


def archive_of(*members):
    """An archive of (name, bytes, other fields of the header)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def alter(folder, old, new):
    data = (folder / MANIFEST_NAME).read_bytes()
    assert old in data
    (folder / MANIFEST_NAME).write_bytes(data.replace(old, new))


@pytest.fixture
def coordinator(make_coordinator):
    return make_coordinator(http=HttpSettings(max_upload_bytes=200_000))


@pytest.fixture
def upload(request_, token):
    key = token("releaser", "rita")

    def send(body, **headers):
        told = {"authorization": f"Bearer {key}", "content-type": "application/x-tar", **headers}
        return request_("POST", PATH, content=body, headers=told)

    return send


def problem(answer):
    told = answer.json()["error"]
    return answer.status_code, told["type"], told["message"]


def left(home):
    """Files of uploads and of releases that are on the disk."""
    return [path for name in ("uploads", "blobs") for path in (home / name).rglob("*")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_checkpoint_is_taken_in_and_its_rollout_started(upload, request_, coordinator, checkpoint, token, form):
    answer = upload(packed(checkpoint(1), form))
    assert answer.status_code == 201, answer.text
    record = coordinator.registry.release(1).release
    assert answer.json()["release"]["digest"] == record.digest
    assert answer.json()["card"] == "card.md of 1"
    assert coordinator.registry.rollouts() == []
    headers = {"authorization": f"Bearer {token('releaser', 'ruth')}"}
    order = {"release": 1, "group": "lab", "rules": {"stages": ["5 devices", 100]}}
    started = request_("POST", "/api/v1/rollouts", json=order, headers=headers)
    assert (started.status_code, started.json()["plan"]["stages"]) == (201, ["5 devices", 100])


def test_nobody_waits_while_a_rollout_is_signed(request_, coordinator, checkpoint, token, monkeypatch):
    coordinator.registry.add_release(checkpoint(1))
    start, threads = Registry.ship, []

    def ship(registry, *arguments, **options):
        threads.append(threading.current_thread())
        return start(registry, *arguments, **options)

    monkeypatch.setattr(Registry, "ship", ship)
    headers = {"authorization": f"Bearer {token('releaser')}"}
    assert request_("POST", "/api/v1/rollouts", json={"release": 1}, headers=headers).status_code == 201
    assert threads != []
    assert threading.main_thread() not in threads


def test_the_same_content_again_changes_nothing(upload, coordinator, checkpoint, rows, tmp_path):
    body = packed(checkpoint(1))
    first, files = upload(body), left(tmp_path / "home")
    assert upload(body).json() == first.json()
    assert left(tmp_path / "home") == files
    told = rows("SELECT actor, detail FROM audit WHERE action = 'release added'")
    assert [actor for actor, _ in told] == ["rita"]
    assert coordinator.registry.releases()[0].digest in told[0][1]


def test_it_may_come_in_pieces_whose_number_nobody_says(upload, checkpoint):
    body = packed(checkpoint(1))

    async def pieces():
        for i in range(0, len(body), 1000):
            yield body[i : i + 1000]

    assert upload(pieces()).status_code == 201


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, upload, tmp_path):
        yield
        assert [path for path in left(tmp_path / "home") if path.is_file()] == []

    @pytest.mark.parametrize(("body", "why"), [
        (b"", "is empty"),
        (b"not a tar archive" * 100, "no tar archive"),
        (archive_of(("a/b", b"x", {})), "no plain file at its top"),
        (archive_of(("../b", b"x", {})), "no plain file at its top"),
        (archive_of(("/etc/b", b"x", {})), "no plain file at its top"),
        (archive_of(("link", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})), "no plain file at its top"),
        (archive_of(("pipe", b"", {"type": tarfile.FIFOTYPE})), "no plain file at its top"),
        (archive_of(("holes", b"", {"type": tarfile.GNUTYPE_SPARSE})), "no plain file at its top"),
        (archive_of(("a", b"x", {}), ("a", b"y", {})), "twice"),
        (archive_of(("a", b"x" * 2000, {}))[:1500], "ends within 'a', 1012 bytes early"),
        (archive_of(*((f"f{i}", b"", {}) for i in range(300))), "more than 256 entries"),
    ])  # fmt: skip
    def test_what_is_no_archive_of_plain_files(self, upload, body, why):
        status, kind, message = problem(upload(body))
        assert (status, kind) == (400, "UploadError")
        assert why in message

    @pytest.mark.parametrize(("damage", "kind", "why"), [
        (lambda folder: (folder / "head.npz").write_bytes(b"head.npz of 9"), "IntegrityError", "head.npz has SHA-256"),
        (lambda folder: (folder / "head.npz").unlink(), "IntegrityError", "head.npz is missing"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "IntegrityError", "no manifest.json"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{"), "IntegrityError", "damaged or not a manifest"),
        (lambda folder: alter(folder, b'"schema": 1', b'"schema": 2'), "IncompatibleError", "update the SDK"),
    ])  # fmt: skip
    def test_a_damaged_checkpoint(self, upload, checkpoint, damage, kind, why):
        folder = checkpoint(1)
        damage(folder)
        status, found, message = problem(upload(packed(folder)))
        assert (status, found) == (422, kind)
        assert why in message

    def test_a_number_that_is_none(self, upload, checkpoint):
        folder = checkpoint(1)
        alter(folder, b'"release": 1', b'"release": 0')
        assert problem(upload(packed(folder)))[:2] == (409, "ReleaseError")

    @pytest.mark.parametrize("announced", [True, False])
    def test_more_than_is_taken(self, upload, announced):
        async def pieces():
            for _ in range(21):
                yield b"x" * 10_000

        status, kind, message = problem(upload(b"x" * 210_000 if announced else pieces()))
        assert (status, kind) == (413, "UploadTooLargeError")
        assert "http.max_upload_bytes" in message

    def test_another_content_type_and_another_role(self, upload, request_, token, checkpoint):
        body = packed(checkpoint(1))
        assert problem(upload(body, **{"content-type": "application/json"}))[0] == 415
        assert problem(upload(body, origin="http://evil.example"))[0] == 403
        headers = {"authorization": f"Bearer {token('operator')}", "content-type": "application/x-tar"}
        assert problem(request_("POST", PATH, content=body, headers=headers))[0] == 403

    def test_a_full_disk(self, upload, checkpoint, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000_000))
        status, kind, message = problem(upload(packed(checkpoint(1))))
        assert (status, kind) == (507, "DiskFullError")
        assert "alerts.min_disk_mb" in message


def test_a_number_that_is_taken_or_too_low_is_refused_before_its_files_are_kept(upload, checkpoint, tmp_path):
    upload(packed(checkpoint(2)))
    files = left(tmp_path / "home")
    for other, why in ((checkpoint(2, trunk=b"another"), "other content"), (checkpoint(1), "only ever rise")):
        status, kind, message = problem(upload(packed(other)))
        assert (status, kind) == (409, "ReleaseError")
        assert why in message
    assert left(tmp_path / "home") == files


def test_who_goes_away_leaves_nothing_behind(tmp_path):
    messages = iter([{"type": "http.request", "body": b"x" * 600, "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def run():
        async with Uploads(tmp_path / "uploads", max_bytes=1000, min_free_bytes=0).unpacked(
            Request({"type": "http", "headers": []}, receive)
        ):
            pass

    with pytest.raises(UploadError, match="ended after 600 bytes"):
        asyncio.run(run())
    assert list((tmp_path / "uploads").iterdir()) == []


def test_what_a_killed_server_left_is_deleted(tmp_path):
    (tmp_path / "uploads" / "tmp1").mkdir(parents=True)
    Uploads(tmp_path / "uploads", max_bytes=1, min_free_bytes=0)
    assert not (tmp_path / "uploads").exists()


def test_the_documented_commands_do_it(coordinator, checkpoint, token, tmp_path):
    checkpoint(1).rename(tmp_path / "checkpoint")
    (script,) = re.findall(r"```bash\n([^`]*x-tar[^`]*)```", (DOCS / "dashboard.md").read_text())
    with serving(coordinator.registry) as site:
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8080", site)],
            cwd=tmp_path, env={"PATH": os.environ["PATH"], "TOKEN": token("releaser")}, check=True, capture_output=True,
        )  # fmt: skip
    (rollout,) = coordinator.registry.rollouts()
    assert (rollout.plan.release, rollout.plan.group, rollout.plan.approval) == (1, "default", "last")
