"""Every error this package adds to those of the SDK.

EdgeError
├─ ExportError              the network cannot be exported, or has no dense head that could be cut off
├─ ParityError              a step changed what the network computes
└─ DataError (ValueError)   the rows given cannot be used

CalibrationWarning (UserWarning)   the calibration data are usable, but thin
"""

from __future__ import annotations

from edge_sdk.errors import EdgeError


class ExportError(EdgeError):
    """The network cannot be exported or split; the message names what was found. A retry does not help."""


class ParityError(EdgeError):
    """A step changed what the network computes beyond rounding. A retry does not help."""


class DataError(EdgeError, ValueError):
    """The rows given cannot be used: too few, wrong shape, or a label without any. A retry does not help."""


class CalibrationWarning(UserWarning):
    """The calibration data are few; the activation ranges may be too narrow."""
