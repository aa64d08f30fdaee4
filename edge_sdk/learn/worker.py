"""The learner's own process: `python -m edge_sdk.learn.worker JOBDIR`. Files in, files out."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import msgspec

from edge_sdk.errors import EdgeError
from edge_sdk.files import replace_file
from edge_sdk.learn.base import CHALLENGER, RESULT_JSON, LearnJob, LearnResult
from edge_sdk.learn.numpy_learner import train_head


def run_job(folder: Path) -> LearnResult:
    """Train the job in `folder` and write challenger and result beside it; the result comes last.

    Errors of learning are part of the result: the caller reads one file, whichever process ran the job.
    """
    try:
        head, result = train_head(LearnJob.load(folder))
        replace_file(folder / CHALLENGER, head.to_bytes())
    except EdgeError as error:
        result = LearnResult(error=f"{type(error).__name__}: {error}")
    replace_file(folder / RESULT_JSON, msgspec.json.encode(result))
    return result


def main() -> int:
    """Run at the lowest priority on one thread; exit 0 when there is a result, good or bad."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m edge_sdk.learn.worker JOBDIR\n")
        return 2
    with contextlib.suppress(OSError):  # not allowed everywhere; learning is then merely less polite
        os.nice(19)
    run_job(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
