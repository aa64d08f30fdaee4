"""The base wheel alone, in an environment of its own, serves, notices drift and learns."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

APP = """
    import sys
    from pathlib import Path
    import numpy as np
    from edge_sdk import DeviceConfig, EdgeDevice
    from edge_sdk.config import LearnConfig, PolicyConfig

    home, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
    config = DeviceConfig(mode="adapt", policy=PolicyConfig(min_fresh_rows=20), learn=LearnConfig(executor="inline"))
    device = EdgeDevice(home, checkpoint=checkpoint, config=config)
    x = np.random.default_rng(0).random((60, 1, 8, 8), dtype=np.float32)
    for sample in x:
        device.observe(device.predict(sample).id, "3", durable=False)
    device.learn_now()
    device.step()
    device.step()
    names = [entry.name for entry in device.history()]
    assert "learn_started" in names, names
    device.stop()
    foreign = {"torch", "onnx", "onnxscript", "sklearn", "scipy", "pandas", "edge_server", "edge_quantize", "tuf"}
    loaded = foreign & set(sys.modules)
    assert not loaded, loaded
    for absent in ("torch", "onnx", "sklearn", "scipy", "starlette", "iotcore", "cryptography", "bsdiff4"):
        try:
            __import__(absent)
        except ImportError:
            continue
        raise SystemExit(f"{absent} is installed: the environment is not the base one")
    import tuf.ngclient  # what signed updates need is there
    print("the base wheel is enough")
"""


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(a) for a in arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.torch
def test_the_base_wheel_alone_serves_and_learns_without_torch_or_onnx(tmp_path, checkpoint):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    script = tmp_path / "app.py"
    script.write_text(textwrap.dedent(APP))
    assert "the base wheel is enough" in run(python, script, tmp_path / "home", checkpoint)
    assert "Exit codes" in run(tmp_path / "venv" / "bin" / "edge", "--help")
