"""Learn from the feedback there is: few labels, asked for; many clicks; new labels that a person has to accept.

A till reads digits; 8 and 9 are new to it. A person labels what the device asks for, forty a day. Of all else nobody
says more than that a reading was taken over or corrected. Runs offline, in the time of a clock that is advanced.
"""

import tempfile
from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import DeviceConfig, EdgeDevice, ManualClock
from edge_sdk.config import FeedbackConfig, GateConfig, LearnConfig
from edge_sdk.resources import FixedReader

with tempfile.TemporaryDirectory() as folder:
    digits, clock, rng = factory.load(seed=0), ManualClock(), np.random.default_rng(0)
    factory.release_1(digits, Path(folder) / "checkpoint", seed=0)
    config = DeviceConfig(
        mode="adapt",
        learn=LearnConfig(executor="inline", new_labels="ask"),
        feedback=FeedbackConfig(sources={"person": 1.0, "clicks": 0.3}, requests_per_day=40),
        gate=GateConfig(max_wait_s=3 * 86_400),  # few labels a day: a challenger needs time to prove itself
    )
    device = EdgeDevice(Path(folder) / "state", checkpoint=Path(folder) / "checkpoint", config=config, clock=clock,
                        resources=FixedReader(), rng=rng)  # fmt: skip
    test = digits.score.x, [str(label) for label in digits.score.y]
    print(f"before: {device.evaluate(*test):.3f} right, labels {' '.join(device.labels)}")

    for day in range(1, 11):
        kept = {}  # the app keeps its own pictures by id: the device does not
        for row in rng.integers(len(digits.life.y), size=100):
            prediction = device.predict(digits.life.x[row], slice="till-2")
            kept[prediction.id] = (prediction.label, str(digits.life.y[row]))
            clock.advance(60)
        device.step()
        asked = {request.id for request in device.label_requests(40)}
        for name, (said, truth) in kept.items():
            if name in asked:
                device.observe(name, truth, source="person")
            else:
                device.reward(name, float(said == truth), source="clicks")
        device.step()
        for label, rows in device.status().new_labels.items():
            print(f"day {day}: {label!r} has {rows} samples to learn from; accepted")
            device.accept_label(label)
        clock.advance(80_500)  # until the next day

    for head in device.lineage():
        print(f"{head.outcome}: head {head.head} from {head.detail['fresh']} rows, {head.detail['reason']}")
    print(f"after: {device.evaluate(*test):.3f} right, labels {' '.join(device.labels)}")
    print(f"{device.forget(list(kept))} rows of the last day forgotten")
    device.stop()
