"""The learner's own process: `python -m edge_sdk.learn.worker JOBDIR [PARENT]`. Files in, files out."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_sdk.errors import EdgeError, LearnError
from edge_sdk.files import replace_file
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER, RESULT_JSON, LearnJob, LearnResult, load_learner
from edge_sdk.learn.prepare import prepare

logger = logging.getLogger(__name__)
PAUSE = "pause"
"""While a file of this name is in the job's folder, the learner waits."""
ORPHANED = 3
"""Exit code of a learner whose parent has died: nobody waits for its result."""
_POLL_S = 0.2


def run_job(folder: Path, between: Callable[[], None]) -> LearnResult:
    """Train the job in `folder` and write challenger and result beside it; the result comes last.

    Whatever the learner raises is part of the result: the caller reads one file, whichever process ran the job.

    Args:
        folder: Holds the job.
        between: Called by the learner between micro-batches, and once before the challenger is written.
    """
    started = time.process_time()
    try:
        job = LearnJob.load(folder)
        between()
        chosen, wrong = prepare(job)
        head, result = load_learner(job.config.learner)(chosen, between=between)
        _check_form(head, job)
        result = msgspec.structs.replace(result, rows=len(chosen.fresh), wrong=wrong)
        between()
        replace_file(folder / CHALLENGER, head.to_bytes())
    except EdgeError as error:
        result = LearnResult(error=f"{type(error).__name__}: {error}")
    except Exception as error:  # a user's learner may raise anything, and memory may run out
        logger.exception("the learner failed")
        result = LearnResult(error=f"{type(error).__name__}: {error}")
    result = msgspec.structs.replace(result, seconds=time.process_time() - started)
    replace_file(folder / RESULT_JSON, msgspec.json.encode(result))
    return result


def _check_form(head: Head, job: LearnJob) -> None:
    """The challenger takes the champion's place in a graph: a learner of the user's may not change labels or shapes."""
    found, wanted = ({key: value.shape for key, value in part.weights.items()} for part in (head, job.champion))
    if found != wanted or head.labels != job.champion.labels:
        raise LearnError(
            f"the learner {job.config.learner!r} gave a head of {len(head.labels)} labels and shapes {found}; "
            f"the champion has {len(job.champion.labels)}, in the order given, and {wanted}"
        )


def hold(folder: Path, parent: int | None, *, sleep: Callable[[float], None] = time.sleep) -> Callable[[], None]:
    """What a learner in a process of its own calls between micro-batches: it waits there while it is paused.

    Args:
        folder: Of the job.
        parent: Process id of who waits for the result; without one the learner works for itself.
        sleep: Waits for so many seconds.

    Returns:
        A function that raises SystemExit once the parent has died, so that no orphan trains on.
    """

    def between() -> None:
        while True:
            if parent is not None and os.getppid() != parent:
                raise SystemExit(ORPHANED)
            if not (folder / PAUSE).exists():
                return
            sleep(_POLL_S)

    return between


def main() -> int:
    """Run the job named on the command line; exit 0 when there is a result, good or bad."""
    match sys.argv[1:]:
        case [folder]:
            between = hold(Path(folder), None)
        case [folder, parent] if parent.isdecimal():
            between = hold(Path(folder), int(parent))
        case _:
            sys.stderr.write("usage: python -m edge_sdk.learn.worker JOBDIR [PARENT]\n")
            return 2
    run_job(Path(folder), between)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
