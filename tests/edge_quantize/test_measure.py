"""Turns taken while timing, with a clock of its own."""

import pytest

from edge_quantize.measure import footprint, time_interleaved
from edge_sdk.errors import RuntimeUnavailableError


class Machine:
    """Calls that take a known time on a clock that only they move."""

    def __init__(self):
        self.now, self.order, self.slow = 0.0, [], ()

    def clock(self):
        return self.now

    def call(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds * (10 if len(self.order) in self.slow else 1)

        return run


def test_variants_take_turns_and_the_first_changes():
    machine = Machine()
    calls = {"int8": machine.call("int8", 0.001), "fp32": machine.call("fp32", 0.002)}
    found = time_interleaved(calls, batch=4, repeats=10, rounds=5, clock=machine.clock)
    assert machine.order[-8:] == ["fp32", "int8", "int8", "fp32", "fp32", "int8", "int8", "fp32"]
    for name, milliseconds in (("int8", 1), ("fp32", 2)):
        timing = found[name]
        assert (timing.batch, timing.calls) == (4, 10)
        assert (timing.p50_ms, timing.p95_ms, timing.p99_ms) == pytest.approx((milliseconds,) * 3)


def test_one_busy_moment_moves_no_figure():
    machine = Machine()
    machine.slow = range(20, 24)  # two calls of each, in one round
    calls = {name: machine.call(name, 0.001) for name in ("int8", "fp32")}
    found = time_interleaved(calls, batch=1, repeats=50, rounds=5, clock=machine.clock)
    assert all(timing.p99_ms == pytest.approx(1) for timing in found.values())


def test_slow_models_are_called_less_often_but_once_a_round_at_least():
    machine = Machine()
    found = time_interleaved({"fp32": machine.call("fp32", 1.0)}, batch=1, budget_s=10, clock=machine.clock)
    assert found["fp32"].calls == 10
    machine = Machine()
    found = time_interleaved({"fp32": machine.call("fp32", 60.0)}, batch=1, budget_s=10, clock=machine.clock)
    assert found["fp32"].calls == 5


def test_process_that_fails_is_named_with_what_it_said(tmp_path):
    with pytest.raises(RuntimeUnavailableError, match=r"serves int8 failed: .*manifest\.json"):
        footprint(tmp_path, "int8", {})
