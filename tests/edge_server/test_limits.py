from hypothesis import given
from hypothesis import strategies as st

from edge_server.limits import Limiter


@given(
    per_minute=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=200),
)
def test_never_more_than_the_burst_and_what_came_in_meanwhile(per_minute, gaps):
    limiter, now, taken = Limiter(per_minute), 0.0, 0
    for gap in gaps:
        now += gap
        taken += limiter.wait_s("a", now) == 0.0
        assert taken <= per_minute + now * per_minute / 60 + 1e-6


def test_who_waits_as_long_as_told_may_act():
    limiter = Limiter(2)
    assert [limiter.wait_s("a", 0.0), limiter.wait_s("a", 0.0)] == [0.0, 0.0]
    wait_s = limiter.wait_s("a", 0.0)
    assert wait_s == 30.0
    assert limiter.wait_s("a", wait_s) == 0.0


def test_keys_do_not_share_their_allowance():
    limiter = Limiter(1)
    assert limiter.wait_s("a", 0.0) == 0.0
    assert limiter.wait_s("a", 0.0) > 0
    assert limiter.wait_s("b", 0.0) == 0.0


def test_a_clock_that_is_set_back_gives_nobody_more():
    limiter = Limiter(1)
    limiter.wait_s("a", 100.0)
    assert limiter.wait_s("a", 0.0) > 0


def test_it_remembers_no_more_than_so_many_keys():
    limiter = Limiter(1)
    for i in range(20_000):
        limiter.wait_s(str(i), 0.0)
    assert len(limiter._left) == 10_000
    assert limiter.wait_s("19999", 0.0) > 0
