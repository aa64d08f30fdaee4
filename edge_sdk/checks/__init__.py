"""Contract suites: what every implementation of an interface must do. For your own tests as much as for ours.

Each `check_…` takes a factory, runs the whole contract and raises `CheckFailed` at the first broken rule.
"""

from edge_sdk.checks.buffer import check_buffer
from edge_sdk.checks.common import CheckFailed
from edge_sdk.checks.detector import check_detector
from edge_sdk.checks.learner import check_learner, example_job
from edge_sdk.checks.runtime import check_runtime
from edge_sdk.checks.transport import check_transport

__all__ = [
    "CheckFailed",
    "check_buffer",
    "check_detector",
    "check_learner",
    "check_runtime",
    "check_transport",
    "example_job",
]
