"""Where a learning job runs: in a child process on devices, in place in simulations."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from edge_sdk.errors import LearnError
from edge_sdk.files import storage_error
from edge_sdk.learn.base import CHALLENGER, RESULT_JSON, LearnResult
from edge_sdk.learn.worker import PAUSE, run_job

STDERR = "stderr.txt"


class LearnExecutor(Protocol):
    """Runs one job at a time; the job's folder holds its files."""

    @property
    def paused(self) -> bool:
        """Whether the job, or the next one to start, waits for `resume`. A pause ends with its job."""
        ...

    @property
    def worked_s(self) -> float:
        """Seconds since the job started without those in which it was paused; of the last job after its end."""
        ...

    def start(self, folder: Path) -> None:
        """Begin the job in `folder`; returns at once or when it is done."""
        ...

    def poll(self) -> LearnResult | None:
        """The result, once there is one."""
        ...

    def pause(self) -> None:
        """Let the job stop between two micro-batches; while it works on one, it finishes it."""
        ...

    def resume(self) -> None:
        """Let the job go on."""
        ...

    def cancel(self) -> None:
        """Stop the job if it runs."""
        ...


class InlineExecutor:
    """Runs the job within `start`: no process is started, so a thousand simulated devices cost little.

    A job that is started while paused runs within `resume`; one that runs cannot be paused, and takes no time.
    """

    def __init__(self) -> None:
        self.paused = False
        self.worked_s = 0.0
        self._result: LearnResult | None = None
        self._waits: Path | None = None

    def start(self, folder: Path) -> None:
        """Run the job, or keep it for `resume`."""
        if self.paused:
            self._waits = folder
        else:
            self._result = run_job(folder, between=_go_on)

    def poll(self) -> LearnResult | None:
        """The result, once."""
        result, self._result = self._result, None
        self.paused = self.paused and result is None
        return result

    def pause(self) -> None:
        """Let a job that is started from now on wait."""
        self.paused = True

    def resume(self) -> None:
        """Run the job that waits."""
        self.paused = False
        if self._waits is not None:
            folder, self._waits = self._waits, None
            self.start(folder)

    def cancel(self) -> None:
        """Drop the job and its result."""
        self.paused, self._result, self._waits = False, None, None


class ProcessExecutor:
    """Runs the job in a child process: serving keeps its core, and whatever happens there leaves the champion alone.

    A plain child, not multiprocessing: spawn would run the app's main again, fork would copy sessions and threads.

    Args:
        clock: Seconds that never go back, for `worked_s`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.paused = False
        self._clock = clock
        self._worked = 0.0
        self._works_since: float | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._folder = Path()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.pid if self._child else None

    @property
    def worked_s(self) -> float:
        """Seconds since the child started without those in which it was paused; of the last one after its end."""
        return self._worked + (0.0 if self._works_since is None else self._clock() - self._works_since)

    def start(self, folder: Path) -> None:
        """Start the child.

        Raises:
            LearnError: A job runs already, or the child cannot be started.
        """
        if self._child is not None:
            raise LearnError("a learning job runs already")
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # what the app can import, a learner of its own can; -P: and nothing that merely lies in the present folder
        path = {"PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
        try:
            for name in (CHALLENGER, RESULT_JSON, PAUSE):  # of a job before
                (folder / name).unlink(missing_ok=True)
            if self.paused:
                (folder / PAUSE).touch()
            with (folder / STDERR).open("wb") as stderr:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "edge_sdk.learn.worker", str(folder), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env={**os.environ, **one_thread, **path},
                )
        except OSError as error:
            raise LearnError(f"the learner cannot be started: {error}") from error
        _give_way(self._child.pid)
        self._folder = folder
        self._worked, self._works_since = 0.0, None if self.paused else self._clock()

    def poll(self) -> LearnResult | None:
        """The result, once the child has ended, by itself or by force."""
        if self._child is None or (code := self._child.poll()) is None:
            return None
        self._end()
        return read_result(self._folder, code)

    def pause(self) -> None:
        """Let the child wait after the micro-batch that it works on.

        Raises:
            StoreError: The job's folder cannot be written; the child works on.
        """
        if self._child is not None:
            try:
                (self._folder / PAUSE).touch()
            except OSError as error:
                raise storage_error(error, "the learner cannot be paused") from error
        self.paused = True
        self._stop_counting()

    def resume(self) -> None:
        """Let the child go on."""
        if self._child is not None and self.paused:
            (self._folder / PAUSE).unlink(missing_ok=True)
            self._works_since = self._clock()
        self.paused = False

    def cancel(self) -> None:
        """Kill the child and wait for its end."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._end()

    def _end(self) -> None:
        self._child, self.paused = None, False
        self._stop_counting()

    def _stop_counting(self) -> None:
        self._worked, self._works_since = self.worked_s, None


def read_result(folder: Path, code: int) -> LearnResult:
    """The result in a job's folder, or one that says how the child ended without leaving any."""
    try:
        return msgspec.json.decode((folder / RESULT_JSON).read_bytes(), type=LearnResult)
    except (OSError, msgspec.MsgspecError):
        said = (folder / STDERR).read_text(errors="replace").strip().splitlines() if (folder / STDERR).exists() else []
        last = f": {said[-1]}" if said else ""
        return LearnResult(error=f"LearnError: the learner ended with code {code} and left no result{last}")


def new_executor(kind: Literal["process", "inline"]) -> LearnExecutor:
    """The executor of that name."""
    return ProcessExecutor() if kind == "process" else InlineExecutor()


def _go_on() -> None:
    """Between two micro-batches of a job that runs in place nothing waits."""


def _give_way(pid: int) -> None:
    """Let all others come first, for CPU, disk and memory. What the platform does not allow is left out."""
    import psutil  # noqa: PLC0415 - not needed to predict

    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, 19)
    with contextlib.suppress(OSError, AttributeError, psutil.Error):
        psutil.Process(pid).ionice(psutil.IOPRIO_CLASS_IDLE)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # short of memory, the kernel ends the learner first
