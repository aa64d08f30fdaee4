"""Nobody can walk up to the device: damaged files are put aside, and it lives on."""

import errno
import io
import json
import shutil

import numpy as np
import pytest

from edge_sdk.database import Database
from edge_sdk.errors import IntegrityError, StoreError
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, MANIFEST_NAME, parse_manifest
from edge_sdk.store import STEPS


def test_a_damaged_database_is_put_aside_and_serving_goes_on(make_device, tmp_path, digits):
    make_device().stop()
    (tmp_path / "device" / "edge.db").write_bytes(b"no database" * 1000)
    device = make_device(checkpoint=None)
    assert device.predict(digits.life.x[0]).release == 1
    assert device.boot == 1
    assert "store_lost" in [entry.name for entry in device.history()]
    assert (tmp_path / "device" / "edge.db.damaged").exists()


def test_a_damaged_pointer_is_made_anew_from_the_newest_slot_that_verifies(make_device, build, tmp_path, checkpoint):
    make_device().stop()
    make_device(checkpoint=build(release=2, seed=0)).stop()
    (tmp_path / "device" / "slots" / "pointer.json").write_bytes(b"{")
    device = make_device(checkpoint=None)
    assert device.status().release == 2
    assert device.rollback().release == 1


def test_a_damaged_release_is_left_for_the_one_before(make_device, build, tmp_path, digits):
    make_device().stop()
    make_device(checkpoint=build(release=2, seed=0)).stop()
    (damaged,) = [
        path for path in (tmp_path / "device" / "slots").glob("?/manifest.json") if b'"release": 2' in path.read_bytes()
    ]
    trunk = damaged.parent / "trunk.int8.onnx"
    trunk.write_bytes(trunk.read_bytes()[:-1] + b"\0")
    device = make_device(checkpoint=None)
    assert device.predict(digits.life.x[0]).release == 1
    (event,) = [entry for entry in device.history() if entry.name == "release_rolled_back"]
    assert "SHA-256" in event.detail["reason"]


@pytest.mark.parametrize(
    ("number", "name", "own_checkpoint"),
    [
        (errno.EMFILE, "trunk.int8.onnx", True),
        (errno.ENOSPC, "trunk.int8.onnx", False),
        (errno.ENOMEM, "head.npz", False),
        (errno.EMFILE, "manifest.json", True),
    ],
)
def test_a_version_that_cannot_be_read_for_now_is_not_left(
    make_device, build, tmp_path, checkpoint, digits, monkeypatch, number, name, own_checkpoint
):
    make_device().stop()
    make_device(checkpoint=build(release=2, seed=0)).stop()
    opened = io.open

    def fails(file, *arguments, **options):
        if str(file).endswith(f"slots/b/{name}"):
            raise OSError(number, "for now")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(io, "open", fails)
    with pytest.raises(StoreError, match="the version in use cannot be read for now"):
        make_device(checkpoint=checkpoint if own_checkpoint else None)
    monkeypatch.undo()
    device = make_device(checkpoint=checkpoint if own_checkpoint else None)
    assert device.predict(digits.life.x[0]).release == 2
    assert "release_rolled_back" not in [entry.name for entry in device.history()]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_version_that_is_lost_is_left(make_device, build, tmp_path, digits, monkeypatch, number):
    make_device().stop()
    make_device(checkpoint=build(release=2, seed=0)).stop()
    opened = io.open

    def fails(file, *arguments, **options):
        if str(file).endswith("slots/b/trunk.int8.onnx"):
            raise OSError(number, "for good")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(io, "open", fails)
    assert make_device(checkpoint=None).predict(digits.life.x[0]).release == 1


def test_a_damaged_only_release_is_an_error_unless_the_app_brings_a_checkpoint(
    make_device, tmp_path, checkpoint, digits
):
    make_device().stop()
    trunk = tmp_path / "device" / "slots" / "a" / "trunk.int8.onnx"
    trunk.write_bytes(trunk.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError):
        make_device(checkpoint=None)
    assert make_device().predict(digits.life.x[0]).release == 1


def test_a_folder_whose_slots_are_gone_starts_anew(make_device, tmp_path, digits):
    make_device().stop()
    shutil.rmtree(tmp_path / "device" / "slots")
    device = make_device()
    assert device.predict(digits.life.x[0]).release == 1
    assert np.isfinite(device.predict(digits.life.x[1]).probabilities).all()


def test_a_database_whose_pages_were_overwritten_is_put_aside(make_device, tmp_path, digits):
    device = make_device()
    for x in digits.life.x[:200]:
        device.predict(x)
    device.stop()
    path = tmp_path / "device" / "edge.db"
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * len(content[8192:])
    path.write_bytes(content)
    device = make_device(checkpoint=None)
    assert device.predict(digits.life.x[0]).release == 1
    assert (device.boot, device.status().problem) == (1, "")


def test_a_damaged_fallback_does_not_stop_the_device(make_device, build, tmp_path, digits):
    make_device().stop()
    make_device(checkpoint=build(release=2, seed=0)).stop()
    (tmp_path / "device" / "slots" / "a" / "manifest.json").write_bytes(b"{")
    device = make_device(checkpoint=None)
    assert device.predict(digits.life.x[0]).release == 2


EARLIER_STATE = {
    "phase": "idle", "reason": "volume", "since": 1.0, "attempts": 4, "last_ended": 1.0, "parent": None,
    "fresh_keys": [7], "rows": 1, "steps": 9, "before": [], "after": [], "predictions": 0, "errors": 0,
    "recent": [True, False], "demand": "", "waits": "",
}  # fmt: skip


def test_a_device_goes_on_with_the_database_of_an_earlier_version(make_device, tmp_path, checkpoint, digits, clock):
    trunk = parse_manifest((checkpoint / MANIFEST_NAME).read_bytes()).trunk_id
    dim = Head.load(checkpoint / HEAD_NPZ).latent_dim
    (tmp_path / "device").mkdir()
    old = Database(tmp_path / "device" / "edge.db", STEPS[:1])
    with old.transaction():
        old.execute("INSERT INTO meta VALUES ('adaptation', ?)", (json.dumps(EARLIER_STATE).encode(),))
        old.execute(f"INSERT INTO meta VALUES ('seen:{trunk[:16]}', x'7b7d')")
        old.execute("INSERT INTO rows VALUES ('order-7', ?, ?, '3', 1, 0, ?)", (clock.now(), bytes(range(dim)), trunk))
        for number in range(60):
            role, slot = [("fresh", None), ("judge", None), ("replay", number // 3)][number % 3]
            old.execute(
                "INSERT INTO samples (time, latent, label, role, slot, trunk) VALUES (?, ?, ?, ?, ?, ?)",
                (clock.now(), bytes([number] * dim), str(number % 8), role, slot, trunk),
            )
    old.close()

    device = make_device()
    status = device.status()
    assert (status.fresh_rows, status.judge_rows, status.replay_rows) == (20, 20, 20)
    device.observe("order-7", "3")
    pool = digits.life.only(set(range(8)))
    for x, y in zip(pool.x[:60], pool.y[:60], strict=True):
        device.observe(device.predict(x).id, str(y))
    device.learn_now()
    assert device.step().problem == ""
    assert device.status().fresh_rows + device.status().judge_rows + device.status().replay_rows == 121
    assert "learn_started" in [entry.name for entry in device.history()]
    clock.advance(3_600)
    assert device.step().problem == ""
    assert device.lineage()
    device.stop()
    assert make_device().step().problem == ""
