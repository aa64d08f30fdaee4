"""The interface of every drift detector."""

from __future__ import annotations

from abc import ABC, abstractmethod

from edge_sdk.types import AnyArray, DoubleArray


class DriftDetector(ABC):
    """Watches bounded channels, a block of rows at a time, and raises a latched alarm.

    Contract (held by `edge_sdk.checks.check_detector`): `update` returns nothing; a raised alarm stays until `reset`;
    folding a stream in one block or in many gives the same state; memory does not grow; `restore(state())` continues
    exactly.
    """

    @abstractmethod
    def update(self, block: DoubleArray) -> None:
        """Fold rows, float64 [N, K] with values in [0, 1], oldest first. N may be 0.

        Raises:
            ValueError: The shape is wrong or a value lies outside [0, 1].
        """

    @property
    @abstractmethod
    def evidence(self) -> float:
        """How much speaks for a change, in the units of `threshold`."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """Evidence at which the alarm is raised."""

    @property
    @abstractmethod
    def warning(self) -> bool:
        """Whether evidence has reached the level below the alarm since the last reset."""

    @property
    @abstractmethod
    def drift_detected(self) -> bool:
        """Whether the alarm is up."""

    @abstractmethod
    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """The channels that carry the evidence, strongest first, with their recent shift from the reference mean."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the evidence and take the alarm down."""

    @abstractmethod
    def state(self) -> dict[str, AnyArray]:
        """All that `restore` needs, as plain arrays."""

    @abstractmethod
    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: It is the state of a detector of another shape.
        """
