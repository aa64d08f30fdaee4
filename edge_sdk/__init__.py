"""Continual learning on edge devices.

    from edge_sdk import EdgeDevice

    with EdgeDevice("state", checkpoint="checkpoint") as device:
        prediction = device.predict(x)
        device.observe(prediction.id, "7")

Names are resolved when they are first used, so that importing the package loads neither numpy's users nor a network
library.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edge_sdk.ask import LabelRequest
    from edge_sdk.clock import Clock, ManualClock, SystemClock
    from edge_sdk.config import DeviceConfig, load_config
    from edge_sdk.device import EdgeDevice
    from edge_sdk.errors import EdgeError
    from edge_sdk.head import Head
    from edge_sdk.labelling import LabellingFunction, LabellingFunctions
    from edge_sdk.learn.base import Learner, LearnJob, LearnResult, Rows
    from edge_sdk.learn.moments import Moments
    from edge_sdk.manifest import Manifest, verify_checkpoint
    from edge_sdk.mqtt import MqttTransport
    from edge_sdk.simulate import Fleet
    from edge_sdk.skew import Skew
    from edge_sdk.status import Status, StepReport
    from edge_sdk.store import Lineage
    from edge_sdk.transport import MemoryBroker, MemoryTransport, Transport
    from edge_sdk.types import Mode, Prediction

_HOME = {
    "Clock": "clock",
    "DeviceConfig": "config",
    "EdgeDevice": "device",
    "EdgeError": "errors",
    "Fleet": "simulate",
    "FleetReport": "fleet_report",
    "Head": "head",
    "LabelRequest": "ask",
    "LabellingFunction": "labelling",
    "LabellingFunctions": "labelling",
    "LearnJob": "learn.base",
    "LearnResult": "learn.base",
    "Learner": "learn.base",
    "Lineage": "store",
    "Manifest": "manifest",
    "ManualClock": "clock",
    "MemoryBroker": "transport",
    "MemoryTransport": "transport",
    "Mode": "types",
    "Moments": "learn.moments",
    "MqttTransport": "mqtt",
    "Prediction": "types",
    "Rows": "learn.base",
    "SimulatedDevice": "shard",
    "Skew": "skew",
    "Status": "status",
    "StepReport": "status",
    "SystemClock": "clock",
    "Transport": "transport",
    "load_config": "config",
    "verify_checkpoint": "manifest",
}

__all__ = [
    "Clock",
    "DeviceConfig",
    "EdgeDevice",
    "EdgeError",
    "Fleet",
    "FleetReport",
    "Head",
    "LabelRequest",
    "LabellingFunction",
    "LabellingFunctions",
    "LearnJob",
    "LearnResult",
    "Learner",
    "Lineage",
    "Manifest",
    "ManualClock",
    "MemoryBroker",
    "MemoryTransport",
    "Mode",
    "Moments",
    "MqttTransport",
    "Prediction",
    "Rows",
    "SimulatedDevice",
    "Skew",
    "Status",
    "StepReport",
    "SystemClock",
    "Transport",
    "__version__",
    "load_config",
    "verify_checkpoint",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

# ONNX Runtime's official builds tell its makers about models and machines unless this is set before it is imported.
if os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") == "1" and "onnxruntime" in sys.modules:
    sys.modules["onnxruntime"].disable_telemetry_events()  # late: what the import itself told is gone


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
