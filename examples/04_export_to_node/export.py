"""Export what a device has learned as one ONNX file, and let Node predict with it.

    PYTHONPATH=examples python examples/04_export_to_node/export.py node-out
    cd examples/04_export_to_node && npm ci --ignore-scripts
    node predict.mjs ../../node-out/model.onnx ../../node-out/samples.json

Only `npm ci` needs a network (ONNX Runtime for Node, 290 MB on disk). `samples.json` holds images and what the device
says about them; Node compares. On a real device `edge export --home HOME --output model.onnx` is all there is to do.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import DeviceConfig, EdgeDevice, ManualClock
from edge_sdk.config import LearnConfig, PolicyConfig
from edge_sdk.files import replace_file
from edge_sdk.installed import export, from_home

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as folder:
    home, digits = Path(folder) / "state", factory.load(seed=0)
    factory.release_1(digits, Path(folder) / "checkpoint", seed=0)
    config = DeviceConfig(
        mode="adapt",
        variant="fp32",
        policy=PolicyConfig(min_fresh_rows=200, cooldown_s=0),
        learn=LearnConfig(executor="inline"),
    )
    rng, clock = np.random.default_rng(0), ManualClock()
    device = EdgeDevice(home, checkpoint=Path(folder) / "checkpoint", config=config, clock=clock, rng=rng)
    for _ in range(60):  # 8 and 9 turn up, which the factory did not know
        for row in rng.integers(len(digits.life.y), size=20):
            device.observe(device.predict(digits.life.x[row]).id, str(digits.life.y[row]))
        clock.advance(60)
        device.step()
    samples = digits.score.x[:100]
    said = [device.predict(sample) for sample in samples]
    print(f"release {said[0].release}, head {said[0].head} knows {', '.join(said[0].labels)}")
    replace_file(out / "model.onnx", from_home(home, config.variant, export))
    device.stop()
content = {
    "shape": samples.shape,
    "x": samples.ravel().tolist(),
    "labels": [one.label for one in said],
    "probabilities": [one.probabilities.tolist() for one in said],
}
replace_file(out / "samples.json", json.dumps(content).encode())
