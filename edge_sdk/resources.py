"""What the machine can spare, read from the platform."""

from __future__ import annotations

from typing import Protocol

from edge_sdk.policy import ResourceState


class ResourceReader(Protocol):
    """A platform's way to tell; a seam for boards that psutil does not know, and for simulations."""

    def read(self) -> ResourceState:
        """The state now."""
        ...

    def rss_mb(self) -> float:
        """Memory of this process, in MB."""
        ...


class PsutilReader:
    """Reads battery, temperature and memory through psutil."""

    def read(self) -> ResourceState:
        """The state now; what the platform does not tell is None."""
        import psutil  # noqa: PLC0415 - not needed to predict

        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        hottest = max((entry.current for entries in sensors.values() for entry in entries), default=None)
        return ResourceState(
            battery=battery.percent / 100 if battery else None,
            on_mains=battery.power_plugged if battery else None,
            temperature_c=hottest,
            free_mb=psutil.virtual_memory().available / 1e6,
        )

    def rss_mb(self) -> float:
        """Memory of this process, in MB."""
        import psutil  # noqa: PLC0415

        return float(psutil.Process().memory_info().rss / 1e6)


class FixedReader:
    """Always says the same: for simulations, whose results must not depend on the machine."""

    def __init__(self, state: ResourceState | None = None, *, rss_mb: float = 0.0) -> None:
        self.state = state or ResourceState()
        self._rss_mb = rss_mb

    def read(self) -> ResourceState:
        """The state given."""
        return self.state

    def rss_mb(self) -> float:
        """The memory given."""
        return self._rss_mb
