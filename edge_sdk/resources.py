"""What the machine can spare, read from the platform."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from edge_sdk.clock import Clock
from edge_sdk.policy import ResourceState

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MAX_HARDWARE = 64
_CALLED = (Path("/proc/device-tree/model"), Path("/sys/class/dmi/id/product_name"))


class ResourceReader(Protocol):
    """A platform's way to tell; a seam for boards that psutil does not know, and for simulations.

    It may also tell `hardware()`, what the board calls itself, and `disk_free_mb(folder)`, the room on a folder's disk.
    """

    def read(self) -> ResourceState:
        """The state now; None for what is unknown. `local_minute` may be left open."""
        ...

    def rss_mb(self) -> float:
        """Memory of this process, in MB."""
        ...


class PsutilReader:
    """Reads battery, temperature, memory and load through psutil, and from Linux what the machine is."""

    def hardware(self) -> str:
        """What the board or the machine calls itself, or else its processor's architecture; 64 characters at most."""
        for path in _CALLED:
            with suppress(OSError, UnicodeDecodeError):
                if name := " ".join(path.read_text("utf-8").replace("\0", " ").split()):
                    return name[:_MAX_HARDWARE]
        return platform.machine()[:_MAX_HARDWARE]

    def read(self) -> ResourceState:
        """The state now; what the platform does not tell is None."""
        import psutil  # noqa: PLC0415 - not needed to predict

        battery = _told(psutil, "sensors_battery")
        sensors = _told(psutil, "sensors_temperatures") or {}
        memory = _told(psutil, "virtual_memory")
        load = _told(psutil, "getloadavg")
        cores = os.cpu_count() or 1
        return ResourceState(
            battery=battery.percent / 100 if battery else None,
            on_mains=battery.power_plugged if battery else None,
            temperature_c=max((entry.current for entries in sensors.values() for entry in entries), default=None),
            free_mb=memory.available / 1e6 if memory else None,
            cpu_load=load[0] / cores if load else None,
            cores=cores,
            total_mb=memory.total / 1e6 if memory else None,
        )

    def disk_free_mb(self, folder: Path) -> float:
        """Room for this process on the disk that holds a folder, in MB."""
        return shutil.disk_usage(folder).free / 1e6

    def rss_mb(self) -> float:
        """Memory of this process, in MB."""
        import psutil  # noqa: PLC0415

        return float(psutil.Process().memory_info().rss / 1e6)


class FixedReader:
    """Always says the same: for simulations, whose results must not depend on the machine."""

    def __init__(
        self, state: ResourceState | None = None, *, rss_mb: float = 0.0, disk_free_mb: float | None = None
    ) -> None:
        self.state = state or ResourceState()
        self._rss_mb, self._disk_free_mb = rss_mb, disk_free_mb

    def read(self) -> ResourceState:
        """The state given."""
        return self.state

    def rss_mb(self) -> float:
        """The memory given."""
        return self._rss_mb

    def disk_free_mb(self, folder: Path) -> float | None:  # noqa: ARG002 - as other readers
        """The room given, whatever the folder."""
        return self._disk_free_mb


class SafeReader:
    """A reader whose failures stop nothing: what it does not tell is unknown. The time of day comes from the clock.

    Args:
        reader: The platform's.
        clock: Of the device; tells `local_minute` where the reader leaves it open.
    """

    def __init__(self, reader: ResourceReader, clock: Clock) -> None:
        self._reader, self._clock = reader, clock
        self._failed = False

    def read(self) -> ResourceState:
        """The state now; all unknown but the time of day if the reader raises, which is logged once."""
        state = self._ask(self._reader.read, ResourceState())
        return state if state.local_minute is not None else replace(state, local_minute=local_minute(self._clock.now()))

    def rss_mb(self) -> float:
        """Memory of this process, in MB; 0 if the reader raises."""
        return self._ask(self._reader.rss_mb, 0.0)

    def hardware(self) -> str:
        """What the machine is; empty if the reader does not tell."""
        return self._ask(getattr(self._reader, "hardware", str), "")

    def disk_free_mb(self, folder: Path) -> float | None:
        """Room on the disk that holds a folder, in MB; None if the reader does not tell."""
        tell = getattr(self._reader, "disk_free_mb", None)
        return None if tell is None else self._ask(lambda: tell(folder), None)

    def _ask(self, read: Callable[[], T], unknown: T) -> T:
        try:
            return read()
        except Exception:  # a board's own code may raise anything
            if not self._failed:
                logger.exception("%s failed; what it reads counts as unknown", type(self._reader).__name__)
            self._failed = True
            return unknown


def local_minute(now: float) -> int:
    """Minutes since midnight, local time, of a time in seconds since the epoch."""
    local = time.localtime(now)
    return 60 * local.tm_hour + local.tm_min


def _told(platform: ModuleType, name: str) -> Any:
    """What the platform tells, or None if it does not: no such sensor, no such function, no permission."""
    try:
        return getattr(platform, name)()
    except (OSError, AttributeError, ValueError):
        return None
