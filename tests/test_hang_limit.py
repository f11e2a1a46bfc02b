"""How long is too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootstockd.supervision.hang_limit import FEW, MARGIN, PRIOR, HangLimit

LEAST = 60.0


def test_before_anything_was_seen_it_is_generous():
    limit = HangLimit(LEAST)
    assert limit.seconds(4, first=False, larger=True) == LEAST
    assert limit.seconds(10_000, first=False, larger=True) == pytest.approx(MARGIN * PRIOR * 10_000)


def test_a_slow_model_gets_more():
    limit = HangLimit(LEAST)
    limit.learn(1000, 500.0, first=False)
    assert limit.seconds(1000, first=False) == pytest.approx(5000)
    assert limit.seconds(500, first=False) == pytest.approx(2500)


def test_a_fast_model_is_found_hung_soon():
    limit = HangLimit(LEAST)
    limit.learn(10_000, 1.0, first=False)
    assert limit.seconds(10_000, first=False) == LEAST


def test_what_is_larger_than_all_before_may_be_slower_an_atom():
    limit = HangLimit(LEAST)
    limit.learn(10_000, 1.0, first=False)  # a hundred structures of a hundred atoms
    assert limit.seconds(10_000, first=False) == LEAST
    assert limit.seconds(10_000, first=False, larger=True) == pytest.approx(MARGIN * PRIOR * 10_000)


def test_steps_do_not_wear_off_what_a_first_structure_cost():
    limit = HangLimit(LEAST)
    limit.learn(500, 50.0, first=True)
    for _ in range(100_000):
        limit.learn(500, 1.0, first=False)
    assert limit.seconds(500, first=True) == pytest.approx(500)
    assert limit.seconds(500, first=False) == LEAST  # nor does it count for steps


@pytest.mark.parametrize("first", [False, True])
def test_a_hiccup_is_forgotten(first):
    limit = HangLimit(LEAST)
    limit.learn(1000, 5000.0, first=first)
    for _ in range(10_000):
        limit.new_system()
        limit.learn(1000, 0.5, first=first)
    assert limit.seconds(1000, first=True) == LEAST


def test_a_first_structure_may_take_as_long_as_a_slow_step():
    limit = HangLimit(LEAST)
    limit.learn(1000, 500.0, first=False)
    assert limit.seconds(1000, first=True) == limit.seconds(1000, first=False) == pytest.approx(5000)


def test_what_it_costs_to_begin_is_not_what_an_atom_costs():
    limit = HangLimit(LEAST)
    limit.learn(10_000, 1.0, first=False)
    limit.learn(1, 5.0, first=False)
    assert limit.seconds(10_000, first=False) == pytest.approx(MARGIN * 5.0 * 10_000 / FEW)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1e4), st.booleans()), min_size=1, max_size=30))
def test_what_was_done_once_may_take_as_long_again(batches):
    limit = HangLimit(1.0)
    for atoms, seconds, first in batches:
        limit.learn(atoms, seconds, first=first)
    for atoms, seconds, first in batches:
        assert limit.seconds(atoms, first=first) > seconds


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1e4)), min_size=1, max_size=30))
def test_an_ordinary_batch_teaches_nothing(batches):
    """So that it need not be told."""
    limit = HangLimit(1.0)
    limit.learn(10**6, 1.0, first=False)
    for atoms, seconds in batches:
        before = limit.seconds(1000, first=False)
        ordinary = seconds <= limit.ordinary
        limit.learn(atoms, seconds, first=False)
        assert limit.seconds(1000, first=False) == before or not ordinary
