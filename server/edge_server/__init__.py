"""The coordinator: registry of devices and releases, staged rollouts, ingest of reports.

    from edge_server import Coordinator

    coordinator = Coordinator(home, transport=transport)
    coordinator.start()
    coordinator.push(Path("checkpoint"))
    while True:
        coordinator.step()

Names are resolved when they are first used, so that importing the package loads no web framework.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_server.broker import EmbeddedBroker
    from edge_server.coordinator import Coordinator
    from edge_server.enrol import Bundle
    from edge_server.errors import (
        CoordinatorError,
        DeviceExistsError,
        ReleaseError,
        RolloutError,
        SigningError,
        UnknownDeviceError,
        UnknownRolloutError,
    )
    from edge_server.plan import Gate, RolloutPlan, RolloutRules
    from edge_server.rollout import RolloutState
    from edge_server.settings import Settings, load_settings

_HOME = {
    "Bundle": "enrol",
    "Coordinator": "coordinator",
    "CoordinatorError": "errors",
    "DeviceExistsError": "errors",
    "EmbeddedBroker": "broker",
    "Gate": "plan",
    "ReleaseError": "errors",
    "RolloutError": "errors",
    "RolloutPlan": "plan",
    "RolloutRules": "plan",
    "RolloutState": "rollout",
    "Settings": "settings",
    "SigningError": "errors",
    "UnknownDeviceError": "errors",
    "UnknownRolloutError": "errors",
    "load_settings": "settings",
}

__all__ = [
    "Bundle",
    "Coordinator",
    "CoordinatorError",
    "DeviceExistsError",
    "EmbeddedBroker",
    "Gate",
    "ReleaseError",
    "RolloutError",
    "RolloutPlan",
    "RolloutRules",
    "RolloutState",
    "Settings",
    "SigningError",
    "UnknownDeviceError",
    "UnknownRolloutError",
    "load_settings",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
