"""Replay buffers: bounded memory of past samples, one policy a file."""

from edge_sdk.replay.balanced import BalancedBuffer
from edge_sdk.replay.base import ReplayBuffer, capacity_for
from edge_sdk.replay.reservoir import ReservoirBuffer

BUFFERS: dict[str, type[ReplayBuffer]] = {"balanced": BalancedBuffer, "reservoir": ReservoirBuffer}
"""By the name used in the configuration."""

__all__ = ["BUFFERS", "BalancedBuffer", "ReplayBuffer", "ReservoirBuffer", "capacity_for"]
