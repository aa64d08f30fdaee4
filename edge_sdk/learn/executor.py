"""Where a learning job runs: in a child process on devices, in place in simulations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from edge_sdk.errors import LearnError
from edge_sdk.learn.base import RESULT_JSON, LearnResult
from edge_sdk.learn.worker import run_job

STDERR = "stderr.txt"


class LearnExecutor(Protocol):
    """Runs one job at a time; the job's folder holds its files."""

    def start(self, folder: Path) -> None:
        """Begin the job in `folder`; returns at once or when it is done."""
        ...

    def poll(self) -> LearnResult | None:
        """The result, once there is one."""
        ...

    def cancel(self) -> None:
        """Stop the job if it runs."""
        ...


class InlineExecutor:
    """Runs the job within `start`: no process is started, so a thousand simulated devices cost little."""

    def __init__(self) -> None:
        self._result: LearnResult | None = None

    def start(self, folder: Path) -> None:
        """Run the job."""
        self._result = run_job(folder)

    def poll(self) -> LearnResult | None:
        """The result, once."""
        result, self._result = self._result, None
        return result

    def cancel(self) -> None:
        """Drop the result."""
        self._result = None


class ProcessExecutor:
    """Runs the job in a child process: serving keeps its core, and whatever happens there leaves the champion alone.

    A plain child, not multiprocessing: spawn would run the app's main again, fork would copy sessions and threads.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.pid if self._child else None

    def start(self, folder: Path) -> None:
        """Start the child.

        Raises:
            LearnError: A job runs already, or the child cannot be started.
        """
        if self._child is not None:
            raise LearnError("a learning job runs already")
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            with (folder / STDERR).open("wb") as stderr:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "edge_sdk.learn.worker", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env={**os.environ, **one_thread},
                )
        except OSError as error:
            raise LearnError(f"the learner cannot be started: {error}") from error
        self._folder = folder

    def poll(self) -> LearnResult | None:
        """The result, once the child has ended, by itself or by force."""
        if self._child is None or self._folder is None or (code := self._child.poll()) is None:
            return None
        self._child = None
        return read_result(self._folder, code)

    def cancel(self) -> None:
        """Kill the child and wait for its end."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


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
