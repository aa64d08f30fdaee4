"""A release that runs beside the one in use: what is counted, and what of it may be told."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.beside import MAX_WAITING, Beside, check_can_run, to_tell
from edge_sdk.errors import IncompatibleError, ModelError
from edge_sdk.join import Judged
from edge_sdk.messages import ShadowTally

LATENT = np.zeros(0, np.uint8)


class Parrot:
    """A release that says what its input says; "x" makes it fail."""

    version = "new"
    manifest = SimpleNamespace(task="classification", targets=[])

    def check_batch(self, x):
        return x

    def run(self, x):
        if x[0] == "x":
            raise ModelError("it fails")
        return SimpleNamespace(scores=x)

    def read(self, scores):
        return [(scores[0], (scores[0],))]


def row(name, said, version="old"):
    return SimpleNamespace(id=name, said=said, version=version)


@pytest.fixture
def beside():
    return Beside(Parrot(), ShadowTally.new(2))


def see(beside, *rows):
    """Rows of (id, what the release in use said, what the other one will say)."""
    beside.see([row(name, said) for name, said, _ in rows], {name: np.array(other) for name, _, other in rows})


def judged(name, label, correct):
    return Judged(LATENT, label, correct, id=name)


def test_answers_are_counted_and_held_against_labels(beside):
    see(beside, ("1", "a", "a"), ("2", "a", "b"), ("3", "b", "a"), ("4", "a", "x"))
    assert beside.tally == ShadowTally(2, 3, 2, 0, 0, 0, 1)
    beside.judge([judged("1", "a", True), judged("2", "b", False), judged("3", "b", True), judged("9", "a", True)])
    assert beside.tally == ShadowTally(2, 3, 2, 3, 1, 1, 1)
    beside.judge([judged("1", "a", True)])
    assert beside.tally.labelled == 3, "a label counts once"


def test_rows_without_an_input_and_rows_of_its_own_are_left_out(beside):
    beside.see([row("1", "a"), row("2", "a", version="new")], {"2": np.array("a")})
    assert beside.tally == ShadowTally.new(2)


def test_answers_that_wait_are_bounded(beside):
    see(beside, *[(str(i), "a", "a") for i in range(MAX_WAITING + 5)])
    assert len(beside._waiting) == MAX_WAITING
    beside.judge([judged("0", "a", True), judged(str(MAX_WAITING + 4), "a", True)])
    assert beside.tally.labelled == 1, "the oldest went"


@pytest.mark.parametrize("what", [{"more_inputs": [1]}, {"state": [1]}, {"task": "raw"}])
def test_what_cannot_be_compared_is_refused(what):
    manifest = SimpleNamespace(**{"name": "m", "more_inputs": [], "state": [], "task": "classification", **what})
    with pytest.raises(IncompatibleError, match="shadow"):
        check_can_run(manifest)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=40))
def test_no_two_figures_that_are_told_differ_by_fewer_rows_than_allowed(steps):
    tally, told = ShadowTally.new(2), ShadowTally.new(0)
    for rows, labelled in steps:
        tally = ShadowTally(2, tally.rows + rows, 0, tally.labelled + labelled, 0, 0, 0)
        before, told = told, to_tell(tally, told, min_count=10)
        assert told.rows == before.rows or told.rows - before.rows >= 10
        assert told.labelled == before.labelled or told.labelled - before.labelled >= 10
        assert tally.rows - told.rows < 10
