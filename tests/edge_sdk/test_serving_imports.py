"""What the device loads: nothing of the workshop, and nothing at all before it is used."""

import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import edge_sdk

WORKSHOP = {"torch", "onnx", "onnxscript", "sklearn", "scipy", "pandas", "edge_server", "edge_quantize"}
MACHINERY = {"numpy", "onnxruntime", "paho", "sqlite_utils", "torch", "onnx"}

APP = """
    import json, sys
    import numpy as np
    from edge_sdk import DeviceConfig, EdgeDevice
    from edge_sdk.config import LearnConfig, PolicyConfig

    config = DeviceConfig(mode="adapt", policy=PolicyConfig(min_fresh_rows=20), learn=LearnConfig(executor="inline"))
    device = EdgeDevice(sys.argv[1], checkpoint=sys.argv[2], config=config)
    for sample in np.random.default_rng(0).random((60, 1, 8, 8), dtype=np.float32):
        device.observe(device.predict(sample).id, "3")
    device.learn_now()
    device.step()
    device.step()
    names = [entry.name for entry in device.history()]
    device.stop()
    print(json.dumps({"names": names, "modules": sorted(sys.modules)}))
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.torch
def test_serving_and_training_the_head_load_nothing_of_the_workshop(tmp_path, checkpoint):
    found = run(APP, tmp_path / "home", checkpoint)
    assert "learn_started" in found["names"]
    assert "learn_failed" not in found["names"]
    assert not WORKSHOP & set(found["modules"])


def test_importing_the_package_loads_no_machinery():
    modules = run("import edge_sdk, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert "edge_sdk" in modules
    assert not MACHINERY & set(modules)


def test_the_engine_tells_its_makers_nothing(tmp_path):
    # of what it would tell it leaves an identifier and a queue in the user's cache; where CI is set it tells nothing
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(tmp_path)}
    script = "import edge_sdk.runtime, onnxruntime"
    subprocess.run([sys.executable, "-c", script], env=bare, cwd=Path.cwd(), timeout=60, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_an_engine_that_was_imported_first_is_told_to_be_silent(monkeypatch):
    told = []
    engine = SimpleNamespace(disable_telemetry_events=lambda: told.append("disable"))
    monkeypatch.setitem(sys.modules, "onnxruntime", engine)
    for choice in ("1", "0", None):  # 0: somebody wants it
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        if choice is not None:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", choice)
        runpy.run_path(edge_sdk.__file__, run_name="edge_sdk")
        told.append(os.environ["ORT_DISABLE_TELEMETRY"])
    assert told == ["disable", "1", "0", "disable", "1"]
