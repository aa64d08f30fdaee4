"""The coordinator as simulated fleets want it: `edge simulate` finds it by an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.clock import Clock
from edge_sdk.errors import ConfigError
from edge_sdk.transport import Transport
from edge_server.coordinator import Coordinator
from edge_server.plan import RolloutRules
from edge_server.settings import Settings


class SimulatedCoordinator(Coordinator):
    """The real one, told by plain values."""

    def advance(self) -> None:
        """Let rollouts take one turn, and look at the fleet."""
        super().advance()
        self.watch()

    def release(self, folder: Path, *, group: str, rules: Mapping[str, Any]) -> None:
        """Start the rollout of a checkpoint.

        Args:
            folder: The checkpoint.
            group: Who gets it.
            rules: Those of `RolloutRules` that differ from their defaults.

        Raises:
            ConfigError: A rule is unknown or impossible.
            CoordinatorError, ArtifactError: It cannot be started.
        """
        try:
            plan = msgspec.convert(dict(rules), RolloutRules)
        except msgspec.ValidationError as error:
            raise ConfigError(f"release.rollout: {error}") from error
        self.push(folder, group=group, plan=plan)

    def outcome(self, release: int, group: str) -> tuple[str, str, list[tuple[float, str, str]]] | None:
        """Status, reason and history (seconds since the epoch, status, reason) of a rollout; None: there is none."""
        for rollout in self.rollouts():
            if (rollout.plan.release, rollout.plan.group) == (release, group):
                state = rollout.state
                return state.status, state.reason, [(step.time, step.status, step.reason) for step in state.history]
        return None


def open_coordinator(home: Path, *, transport: Transport, clock: Clock, prefix: str) -> SimulatedCoordinator:
    """A coordinator that takes in every device, in a folder of its own, connected and listening."""
    settings = Settings(prefix=prefix, accept_unknown=True, durable=False, repeat_blocks_s=0.0)
    coordinator = SimulatedCoordinator(home, transport=transport, clock=clock, settings=settings)
    coordinator.start()
    return coordinator
