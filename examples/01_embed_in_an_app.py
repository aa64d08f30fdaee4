"""Embed the SDK in a device app: predict, give labels as they come, let the device learn.

A lens gets dirty after a while. The device notices, learns from the labels it was given, proves the new head on rows it
did not train on, and swaps it in. Runs offline; the first lines stand for the factory (see examples/demo/factory.py).
"""

import tempfile
from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import DeviceConfig, EdgeDevice
from edge_sdk.config import DriftConfig, LearnConfig, PolicyConfig
from edge_sdk.resources import FixedReader

with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "checkpoint"
    digits = factory.load(seed=0)
    factory.release_1(digits, checkpoint, seed=0)

    # `shadow`, the default mode, learns and judges but never promotes; `adapt` trusts the gate
    config = DeviceConfig(
        mode="adapt",
        drift=DriftConfig(alarms_per_day=1, rows_per_day=10_000),
        policy=PolicyConfig(min_fresh_rows=60, cooldown_s=0),
        learn=LearnConfig(executor="inline"),  # a real device uses the default: a child process at low priority
    )
    # a real device leaves `resources` out: learning then waits while battery, temperature, memory or load say so
    device = EdgeDevice(Path(folder) / "state", checkpoint=checkpoint, config=config, resources=FixedReader())

    known = digits.life.only(factory.BASE)
    rng = np.random.default_rng(0)
    for minute in range(60):
        rows = rng.integers(len(known.y), size=20)
        x, y = known.x[rows], known.y[rows]
        if minute >= 10:
            x = x * np.float32(0.35)
        right = 0
        for sample, label in zip(x, y, strict=True):
            prediction = device.predict(sample)
            right += prediction.label == str(label)
            device.observe(prediction.id, str(label))  # real labels come later, and only for some
        if device.step().swapped:  # `with device:` does this in a thread of its own
            print(f"minute {minute}: head {device.status().head} serves")
        if minute % 10 == 9:
            print(f"minute {minute}: {right} of 20 right, alarms: {device.status().alarms or 'none'}")

    for entry in device.history():
        print(f"  {entry.name:18} {entry.detail.get('reason', entry.detail.get('monitor', ''))}")
    device.stop()
