"""What `predict` and `observe` leave in memory until the next step, under one lock."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from os import getpid
from typing import NamedTuple

import numpy as np

from edge_sdk.errors import DuplicateIdError, StoppedError
from edge_sdk.manifest import Manifest
from edge_sdk.slots import Version
from edge_sdk.tasks import stored_answer
from edge_sdk.types import AnyArray, FloatArray, LatentArray

_ROW_BYTES = 1_500
"""What a row takes beside the content of its arrays: a dozen objects."""


class LoggedPrediction(NamedTuple):
    """One prediction as it was served. `x`, a thumbnail, is for the input monitor and never leaves memory."""

    id: str
    time: float
    x: FloatArray
    latent: LatentArray
    scores: FloatArray
    label: str
    present: tuple[str, ...]
    version: Version
    manifest: Manifest
    latency_ms: float
    slice: str = ""
    holdout: bool = False

    @property
    def said(self) -> str:
        """The answer in stored form."""
        return stored_answer(self.scores, self.label, self.present, self.manifest.task)

    @property
    def memory_bytes(self) -> int:
        """About what it takes until it is written."""
        return _ROW_BYTES + self.x.nbytes + self.latent.nbytes + self.scores.nbytes


class Label(NamedTuple):
    """A label that waits to be joined.

    `reward` says instead how right the prediction was, 0 to 1. A label that is not `trusted` is learned from, and
    neither judges nor counts for the live accuracy: it was guessed.
    """

    id: str
    label: str
    time: float
    source: str = ""
    weight: float = 1.0
    trusted: bool = True
    reward: float | None = None


class Taught(NamedTuple):
    """A labelled row that was never predicted."""

    latent: LatentArray
    label: str
    time: float
    trunk: str
    source: str = ""
    slice: str = ""


@dataclass
class Batch:
    """All that came since the last drain."""

    predictions: list[LoggedPrediction] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    taught: list[Taught] = field(default_factory=list)
    rejected_inputs: int = 0
    errors: int = 0
    rows_lost: int = 0
    labels_lost: int = 0
    memory_bytes: int = 0
    """About what the predictions take."""

    def __len__(self) -> int:
        return len(self.predictions) + len(self.labels) + len(self.taught)

    def __bool__(self) -> bool:
        return bool(self.predictions or self.labels or self.taught or self.rejected_inputs or self.errors)


class Pending:
    """Thread-safe. Bounded: when nothing is drained, the oldest rows go and are counted.

    Args:
        max_rows: Most predictions, and most labels, held.
        prefix: What this process's own prediction ids begin with.
        max_bytes: Of memory, about, that the predictions may take.
    """

    def __init__(self, max_rows: int, prefix: str, *, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._max_rows, self._max_bytes, self._bytes = max_rows, max_bytes, 0
        self._owner = getpid()
        self._prefix = prefix
        self._numbers = count(1)  # `next` of it is atomic
        self._given: set[str] = set()
        self._predictions: deque[LoggedPrediction] = deque()
        self._labels: deque[Label] = deque()
        self._taught: deque[Taught] = deque()
        self._rejected = self._errors = self._rows_lost = self._labels_lost = 0
        self._closed = False
        self._inputs: OrderedDict[str, AnyArray] = OrderedDict()
        self.most_inputs = 0
        """So many inputs of the latest predictions are held; 0: none, and what is held goes with the next one."""
        self.refused: frozenset[str] = frozenset()
        """Labels that a person said are none; what came with one of them before that is not to be written, either."""

    def close(self) -> None:
        """Take nothing more: what came before is in the next drain, and the last."""
        with self._lock:
            self._closed = True

    def _check_process(self) -> None:
        """Before the lock, which may have been held when this process was forked."""
        if getpid() != self._owner:
            raise StoppedError("this process was forked from the one that owns the device, and what it gives would be "
                               "lost: send it there, or make the device here")  # fmt: skip

    def _check_open(self) -> None:
        if self._closed:
            raise StoppedError("this device was stopped; make another EdgeDevice on its folder")

    def new_id(self, given: str | None) -> str:
        """An id for a prediction: the app's own, if it gave one.

        Raises:
            DuplicateIdError: The app's id waits for a label already.
        """
        if given is None:
            return f"{self._prefix}{next(self._numbers)}"
        self._check_process()
        with self._lock:
            if given in self._given:
                raise DuplicateIdError(f"prediction id {given!r} waits for its label; give each prediction its own")
            self._given.add(given)
            return given

    def reserve(self, ids: list[str]) -> None:
        """Ids that the app gave in an earlier life of the process and that still wait."""
        with self._lock:
            self._given.update(ids)

    def release(self, ids: list[str]) -> None:
        """Ids that no longer wait."""
        with self._lock:
            self._given.difference_update(ids)

    def log(self, predictions: Iterable[LoggedPrediction]) -> None:
        """Keep served predictions.

        Raises:
            StoppedError: Nothing will write them any more.
        """
        self._check_process()
        with self._lock:
            self._check_open()
            for prediction in predictions:
                self._predictions.append(prediction)
                self._bytes += prediction.memory_bytes
                while len(self._predictions) > self._max_rows or self._bytes > self._max_bytes:
                    gone = self._predictions.popleft()
                    self._bytes -= gone.memory_bytes
                    self._given.discard(gone.id)
                    self._rows_lost += 1

    def hold(self, names: Sequence[str], x: AnyArray) -> None:
        """Keep the latest of the inputs [N, ...] of these predictions, in memory."""
        with self._lock:
            for name, row in list(zip(names, x, strict=True))[-self.most_inputs :] if self.most_inputs else ():
                self._inputs[name] = np.array(row)  # the app may write to its own
            while len(self._inputs) > self.most_inputs:
                self._inputs.popitem(last=False)

    def held(self) -> dict[str, AnyArray]:
        """The inputs that are held, by prediction."""
        with self._lock:
            return dict(self._inputs)

    def let_go(self, names: Iterable[str]) -> None:
        """Hold these inputs no longer."""
        with self._lock:
            for name in names:
                self._inputs.pop(name, None)

    def label(self, label: Label) -> None:
        """Keep a label. Errors as in `log`."""
        self._check_process()
        with self._lock:
            self._check_open()
            if len(self._labels) >= self._max_rows:
                self._labels.popleft()
                self._labels_lost += 1
            self._labels.append(label)

    def teach(self, rows: list[Taught]) -> None:
        """Keep labelled rows that were never predicted. Errors as in `log`."""
        self._check_process()
        with self._lock:
            self._check_open()
            for row in rows:
                if len(self._taught) >= self._max_rows:
                    self._taught.popleft()
                    self._labels_lost += 1
                self._taught.append(row)

    def forget(self, ids: set[str]) -> int:
        """Drop predictions and labels of these ids; returns how many."""
        with self._lock:
            before = len(self._predictions) + len(self._labels)
            self._predictions = deque(row for row in self._predictions if row.id not in ids)
            self._bytes = sum(row.memory_bytes for row in self._predictions)
            self._labels = deque(row for row in self._labels if row.id not in ids)
            self._given -= ids
            for name in ids:
                self._inputs.pop(name, None)
            return before - len(self._predictions) - len(self._labels)

    def reject(self) -> None:
        """An input was refused."""
        with self._lock:
            self._rejected += 1

    def fail(self) -> None:
        """The model failed."""
        with self._lock:
            self._errors += 1

    def drain(self) -> Batch:
        """All that came since the last call."""
        with self._lock:
            batch = Batch(
                list(self._predictions), list(self._labels), list(self._taught),
                self._rejected, self._errors, self._rows_lost, self._labels_lost, self._bytes,
            )  # fmt: skip
            self._bytes = 0
            self._predictions.clear()
            self._labels.clear()
            self._taught.clear()
            self._rejected = self._errors = self._rows_lost = self._labels_lost = 0
            return batch
