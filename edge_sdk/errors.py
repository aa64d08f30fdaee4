"""Every error this package raises.

EdgeError
├─ ConfigError (ValueError)     bad or unknown field; names file and key
├─ MissingExtraError            carries the exact pip line
├─ InputError (ValueError)      a prediction input the model cannot take
│   ├─ DtypeError
│   ├─ ShapeError               expected and got
│   ├─ NonFiniteError           NaN or Inf, and where
│   └─ RangeError               outside the range the manifest declares
├─ LabelError (ValueError)      feedback that cannot be used
│   ├─ UnknownLabelError        not a label of the model and not allowed to become one
│   └─ DuplicateIdError         the prediction id is in use
├─ ModelError
│   └─ RuntimeUnavailableError  the inference engine refused the model
├─ ArtifactError
│   ├─ IntegrityError           hash or size is wrong; never retried
│   ├─ IncompatibleError        SDK, task or I/O contract does not fit
│   ├─ UntrustedError           no signature vouches for it; retry helps once new metadata has come
│   │   ├─ MetadataExpiredError what would vouch for it is past its date
│   │   └─ ClockUntrustedError  the clock is too wrong to tell
│   ├─ SelfTestError            the model does not reproduce its stored outputs here
│   └─ RollbackRefusedError     older than the installed release, revoked, or nothing to go back to
├─ StoppedError                 the device was stopped; make another
├─ LearnError
│   ├─ EmptyBufferError         nothing to learn from
│   └─ DivergedError            non-finite loss or weights; the champion is untouched
├─ StoreError                   the local database cannot be read or written
│   └─ DiskFullError            retry helps once there is room
└─ TransportError
    ├─ NotConnectedError        retry helps
    └─ ProtocolError            retry does not
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of every error of the SDK."""


class ConfigError(EdgeError, ValueError):
    """A setting is unknown, missing or out of range. Fix the file; a retry does not help."""


class MissingExtraError(EdgeError):
    """A feature needs packages that are not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs more packages: pip install 'edge-sdk[{extra}]'")
        self.extra = extra


class InputError(EdgeError, ValueError):
    """An input that the model cannot take. A retry with the same input does not help."""


class DtypeError(InputError):
    """The input has the wrong dtype."""


class ShapeError(InputError):
    """The input has the wrong shape; the message says which was expected."""


class NonFiniteError(InputError):
    """The input holds NaN or infinity; the message says where."""


class RangeError(InputError):
    """The input lies outside the range that the manifest declares."""


class LabelError(EdgeError, ValueError):
    """Feedback that cannot be used. A retry does not help."""


class UnknownLabelError(LabelError):
    """The label is not one of the model's and may not become one."""


class DuplicateIdError(LabelError):
    """The prediction id given by the caller is already in use."""


class ModelError(EdgeError):
    """The model cannot be run."""


class RuntimeUnavailableError(ModelError):
    """The inference engine refused to load or run the model."""


class ArtifactError(EdgeError):
    """A checkpoint or release cannot be used."""


class IntegrityError(ArtifactError):
    """A file's hash or size differs from its manifest. Never retried with the same bytes."""


class IncompatibleError(ArtifactError):
    """The checkpoint asks for something this SDK or device does not do."""


class UntrustedError(ArtifactError):
    """No signed metadata that this device believes names the release. A retry helps once better metadata has come."""


class MetadataExpiredError(UntrustedError):
    """The signed metadata is past its date. A retry helps once the coordinator has signed anew."""


class ClockUntrustedError(UntrustedError):
    """The clock reads before the metadata was signed. A retry helps once it is set."""


class SelfTestError(ArtifactError):
    """The model does not reproduce its stored outputs on this machine."""


class RollbackRefusedError(ArtifactError):
    """The release is older than the installed one or revoked, or there is nothing to go back to."""


class StoppedError(EdgeError):
    """The device was stopped: it takes nothing any more. Make another one on its folder."""


class LearnError(EdgeError):
    """Learning failed; the champion is untouched."""


class EmptyBufferError(LearnError):
    """There are no samples to learn from."""


class DivergedError(LearnError):
    """Loss or weights became non-finite. A lower learning rate may help."""


class StoreError(EdgeError):
    """The local database cannot be read or written."""


class DiskFullError(StoreError):
    """There is no room left. A retry helps once there is."""


class TransportError(EdgeError):
    """The network could not do what was asked."""


class NotConnectedError(TransportError):
    """There is no connection now. A retry helps."""


class ProtocolError(TransportError):
    """A message does not follow the protocol. A retry with the same bytes does not help."""
