"""A release that runs beside the one in use because the coordinator asked: what both say of the same inputs, counted.

Nothing of it is served. Some inputs of each flush pass the other release, too, off the request path; once a label
comes, both answers are held against it. Only counts leave the device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edge_sdk.errors import IncompatibleError, InputError, ModelError
from edge_sdk.join import Judged
from edge_sdk.manifest import Manifest
from edge_sdk.messages import ShadowTally
from edge_sdk.pending import LoggedPrediction
from edge_sdk.serving import Served
from edge_sdk.tasks import is_right, stored_answer
from edge_sdk.types import AnyArray

logger = logging.getLogger(__name__)
MAX_WAITING = 10_000
"""Answers that wait for their label; beyond it the oldest go."""


def check_can_run(manifest: Manifest) -> None:
    """Whether a release can run beside another one.

    Raises:
        IncompatibleError: It has several inputs or a state, of which a flush keeps nothing; or its outputs are no
            answers that could be compared.
    """
    if manifest.more_inputs or manifest.state:
        raise IncompatibleError(f"{manifest.name} has several inputs or a state: it cannot run in shadow")
    if manifest.task == "raw":
        raise IncompatibleError(f"{manifest.name} has task=raw: there are no answers to compare in shadow")


class Beside:
    """Counts how a release in shadow does.

    Args:
        served: The release, loaded.
        tally: Of it so far.
    """

    def __init__(self, served: Served, tally: ShadowTally) -> None:
        self._served, self.tally = served, tally
        self._waiting: dict[str, str] = {}
        """What it said of each prediction, in stored form."""

    def see(self, rows: Sequence[LoggedPrediction], inputs: Mapping[str, AnyArray]) -> None:
        """Let inputs that were just answered pass the release in shadow.

        Args:
            rows: Predictions of a flush.
            inputs: Of the latest of them, by id.
        """
        manifest = self._served.manifest
        agreed = failed = asked = 0
        for row in rows:
            if row.id not in inputs or row.version == self._served.version:
                continue
            try:
                said = self._answer(inputs[row.id])
            except (ModelError, InputError) as error:
                logger.debug("the release in shadow fails: %s", error)
                failed += 1
                continue
            asked += 1
            # of a regression: within the tolerance of each target
            agreed += is_right(said, row.said, manifest)
            self._waiting[row.id] = said
        while len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
        tally = self.tally
        self.tally = msgspec.structs.replace(
            tally, rows=tally.rows + asked, disagreed=tally.disagreed + asked - agreed, errors=tally.errors + failed
        )

    def judge(self, rows: Sequence[Judged]) -> None:
        """Hold the answers against labels: rows that the release in use is judged by, too."""
        manifest = self._served.manifest
        right = [(is_right(said, row.label, manifest), row.correct)
                 for row in rows if (said := self._waiting.pop(row.id, None)) is not None]  # fmt: skip
        tally = self.tally
        self.tally = msgspec.structs.replace(
            tally,
            labelled=tally.labelled + len(right),
            won=tally.won + sum(its and not ours for its, ours in right),
            lost=tally.lost + sum(ours and not its for its, ours in right),
        )

    def _answer(self, x: AnyArray) -> str:
        served = self._served
        scores = served.run(np.asarray(served.check_batch(x[None]))).scores
        return stored_answer(scores[0], *served.read(scores)[0], served.manifest.task)


def to_tell(tally: ShadowTally, told: ShadowTally, *, min_count: int) -> ShadowTally:
    """The counts that may be told after those told last: a step of fewer rows would say too much about single ones.

    Args:
        tally: All there is.
        told: What was told last.
        min_count: Fewest rows, and fewest labelled ones, between two different figures.
    """
    if tally.release != told.release:
        told = ShadowTally.new(tally.release)
    if tally.rows + tally.errors - told.rows - told.errors >= min_count:
        told = msgspec.structs.replace(told, rows=tally.rows, disagreed=tally.disagreed, errors=tally.errors)
    if tally.labelled - told.labelled >= min_count:
        told = msgspec.structs.replace(told, labelled=tally.labelled, won=tally.won, lost=tally.lost)
    return told
