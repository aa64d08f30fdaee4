"""Every error the coordinator adds to those of `edge_sdk.errors`.

EdgeError
└─ CoordinatorError
    ├─ DeviceError
    │   ├─ UnknownDeviceError   no device of that name is registered
    │   └─ DeviceExistsError    the name is taken
    ├─ BackupError              nothing was backed up or restored: what it would be written over, or what it is
    ├─ SigningError             keys are missing, too few, or expired; the message says which command helps
    ├─ ReleaseError             the release cannot be taken in: its number or its content conflicts
    │   ├─ UnknownReleaseError  there is no release of that number
    │   └─ UnknownCandidateError  there is no candidate of that digest
    ├─ RolloutError             the rollout cannot start or change now
    │   └─ UnknownRolloutError  there is no rollout of that number
    ├─ SegmentError             a segment cannot be made or deleted
    │   └─ UnknownSegmentError  there is none of that name
    ├─ UploadError              what came over the API is no checkpoint's archive
    │   └─ UploadTooLargeError  it has more bytes than are taken
    ├─ TrainerError             the owner's own trainer function raised, or returned what is no model
    ├─ UnknownAlertError        there is no alert or silence of that number
    └─ UserError                a user cannot be added or revoked
        └─ UnknownUserError     there is none of that name
"""

from __future__ import annotations

from edge_sdk.errors import EdgeError


class CoordinatorError(EdgeError):
    """The coordinator refused an order. A retry does not help unless its state changes."""


class DeviceError(CoordinatorError):
    """An order about a device was refused."""


class UnknownDeviceError(DeviceError):
    """No device of that name is registered."""


class DeviceExistsError(DeviceError):
    """The device name is taken."""


class BackupError(CoordinatorError):
    """Nothing was backed up or restored; the message says what stands in the way."""


class ReleaseError(CoordinatorError):
    """A release cannot be taken in: its number is not new, or its content differs. A retry does not help."""


class UnknownReleaseError(ReleaseError):
    """There is no release of that number. A retry does not help."""


class UnknownCandidateError(ReleaseError):
    """There is no candidate of that digest. A retry does not help."""


class SigningError(CoordinatorError):
    """Nothing can be signed as things are: a key is missing, too few root keys are at hand, or the root has expired."""


class RolloutError(CoordinatorError):
    """A rollout cannot start or change now. A retry helps once the group's active rollout has ended."""


class UnknownRolloutError(RolloutError):
    """There is no rollout of that number. A retry does not help."""


class SegmentError(CoordinatorError):
    """A segment cannot be made or deleted: its name is taken, or a rollout is for it. A retry helps once it is over."""


class UnknownSegmentError(SegmentError):
    """There is no segment of that name. A retry does not help."""


class UploadError(CoordinatorError):
    """What came over the API is no archive of a checkpoint. A retry helps only if it ended early."""


class UploadTooLargeError(UploadError):
    """An upload has more bytes than are taken. A retry does not help."""


class TrainerError(CoordinatorError):
    """The owner's trainer raised, or returned what is no model; its own error is the cause. A retry does not help."""


class UnknownAlertError(CoordinatorError):
    """There is no alert or silence of that number. A retry does not help."""


class UserError(CoordinatorError):
    """A user cannot be added or revoked as asked. A retry does not help."""


class UnknownUserError(UserError):
    """There is no user of that name. A retry does not help."""
