"""The training of a challenger: the files of one learning job, who runs it, and what came of it."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.config import LearnConfig
from edge_sdk.errors import EdgeError
from edge_sdk.files import remove_tree
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER, LearnJob, LearnResult
from edge_sdk.learn.executor import LearnExecutor


class Training:
    """One learning job at a time.

    Args:
        folder: Of the job's files; it comes and goes with the job.
        executor: Runs the job.
        config: How long it may take.
    """

    def __init__(self, folder: Path, executor: LearnExecutor, config: LearnConfig) -> None:
        self._folder, self._executor, self._config = folder, executor, config
        self.result: LearnResult | None = None
        """What came of the job: the executor says so only once, and it may not be recorded then."""
        self._challenger: Head | None = None

    def start(self, job: LearnJob) -> int:
        """Start a job. One that cannot be started has ended at once.

        Returns:
            Bytes written.
        """
        self.result, written = None, 0
        try:
            self.discard()
            self._folder.mkdir(parents=True)
            job.save(self._folder)
            written = sum(file.stat().st_size for file in self._folder.iterdir())
            self._executor.start(self._folder)
        except (EdgeError, OSError) as error:
            self.result = LearnResult(error=f"{type(error).__name__}: {error}")
        return written

    def hold(self, *, on: bool) -> None:
        """Pause the job, or let it go on."""
        if on:
            self._executor.pause()
        else:
            self._executor.resume()

    def poll(self) -> LearnResult | None:
        """What came of the job, once it has ended; one that takes too long is stopped."""
        if self.result is None:
            self.result = self._executor.poll()
            limit, worked = self._config.max_seconds, self._executor.worked_s
            if self.result is None and worked > limit:
                self.cancel()
                self.result = LearnResult(error=f"stopped after {limit:g} s", seconds=worked)
        return self.result

    def challenger(self) -> Head:
        """What the job made.

        Raises:
            EdgeError, OSError: It is lost or damaged.
        """
        if self._challenger is None:
            self._challenger = Head.load(self._folder / CHALLENGER)
        return self._challenger

    def cancel(self) -> None:
        """Stop the job."""
        self._executor.cancel()

    def discard(self) -> None:
        """Remove the job's files."""
        self._challenger = None
        remove_tree(self._folder)
