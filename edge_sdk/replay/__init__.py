"""Replay buffers: bounded memory of past samples, one policy a file."""

from edge_sdk.replay.balanced import BalancedBuffer
from edge_sdk.replay.base import ReplayBuffer, capacity_for
from edge_sdk.replay.herding import HerdingBuffer
from edge_sdk.replay.recent import RecentBuffer
from edge_sdk.replay.reservoir import ReservoirBuffer

BUFFERS: dict[str, type[ReplayBuffer]] = {
    "balanced": BalancedBuffer,
    "reservoir": ReservoirBuffer,
    "herding": HerdingBuffer,
    "recent": RecentBuffer,
}
"""By the name used in the configuration."""

__all__ = [
    "BUFFERS",
    "BalancedBuffer",
    "HerdingBuffer",
    "RecentBuffer",
    "ReplayBuffer",
    "ReservoirBuffer",
    "capacity_for",
]
