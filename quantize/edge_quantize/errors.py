"""Every error this package adds to those of the SDK.

EdgeError
├─ ExportError              the network cannot be exported, or has no dense head that could be cut off
├─ ParityError              a step changed what the network computes
└─ DataError (ValueError)   the rows given cannot be used

CalibrationWarning (UserWarning)   rows for calibrating or choosing are usable, but few or unlike the others
LeakageWarning (UserWarning)       held-out rows are also training rows
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
    """Rows to calibrate on or to choose a recipe by are few, or unlike those held out: what is found may not hold."""


class LeakageWarning(UserWarning):
    """Held-out rows are also among the rows that the model was made from; the figures are too good."""
