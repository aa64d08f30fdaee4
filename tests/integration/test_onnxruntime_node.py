"""The exported file says in ONNX Runtime for Node what the device says."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from platformdirs import user_cache_path

from edge_sdk.head import Head

pytestmark = [pytest.mark.node, pytest.mark.torch]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "04_export_to_node"
SAME = 1e-6


def run(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def modules():
    """`node_modules` of the example, installed once for each lockfile and kept in the user's cache (290 MB)."""
    locked = hashlib.sha256((EXAMPLE / "package-lock.json").read_bytes()).hexdigest()[:12]
    kept = user_cache_path("edge-sdk-tests") / f"node-{locked}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / "made"
            made.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(EXAMPLE / name, made)
            # the package holds the CPU engine; its install script would only fetch CUDA's
            run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=made)
            made.rename(kept)
    return kept / "node_modules"


@pytest.fixture
def node(modules, tmp_path):
    """Runs the example's program; gives what it found."""
    folder = tmp_path / "node"
    folder.mkdir()
    shutil.copy(EXAMPLE / "predict.mjs", folder)
    (folder / "node_modules").symlink_to(modules)

    def predict(model, samples):
        return json.loads(run("node", "predict.mjs", model, samples, cwd=folder))

    return predict


def test_the_example_gives_the_same_answers_in_node(node, tmp_path):
    said = run(sys.executable, EXAMPLE / "export.py", tmp_path / "out", cwd=tmp_path)
    assert "knows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in said
    found = node(tmp_path / "out" / "model.onnx", tmp_path / "out" / "samples.json")
    assert (found["count"], found["sameLabel"]) == (100, 100)
    assert found["difference"] <= SAME
    assert int(found["head"]) > 0


@pytest.mark.parametrize("variant", ["int8", "fp32"])
def test_a_head_that_has_grown_gives_the_same_answers_in_node(node, tmp_path, make_device, digits, rng, variant):
    device = make_device(variant=variant)
    slots = device._slots
    head = slots.head(slots.pointer.current).grown([*"01234567", "8", "neun"])
    head = Head(
        {name: w + rng.normal(size=w.shape).astype(np.float32) / 8 for name, w in head.weights.items()}, head.labels
    )
    slots.promote(slots.write_head(slots.pointer.current.slot, head))
    device.step()
    device.step()
    said = [device.predict(x) for x in digits.life.x[:64]]
    samples = {
        "shape": [64, 1, 8, 8],
        "x": digits.life.x[:64].ravel().tolist(),
        "labels": [one.label for one in said],
        "probabilities": [one.probabilities.tolist() for one in said],
    }
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    command = [Path(sys.executable).with_name("edge"), "export", "--home", tmp_path / "device", "--variant", variant]
    run(*command, "--output", tmp_path / "model.onnx", cwd=tmp_path)
    found = node(tmp_path / "model.onnx", tmp_path / "samples.json")
    assert (found["release"], found["head"]) == ("1", "1")
    assert found["labels"] == list(head.labels)
    assert found["sameLabel"] == found["count"] == 64
    assert found["difference"] <= SAME
