"""When larger batches stop paying."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootstockd.supervision.cost_curve import ENOUGH, PATIENCE, STALE, WORSE, CostCurve
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.scheduler import Scheduler


def learnt(costs: dict[int, float]) -> CostCurve:
    """What is known after some batches of each size, seconds by atoms."""
    curve = CostCurve()
    for _ in range(ENOUGH):
        for atoms, seconds in costs.items():
            curve.learn(atoms, seconds)
    return curve


@pytest.mark.parametrize(
    ("costs", "limit"),
    [
        ({}, None),
        ({10: 1.0}, None),
        ({10: 1.0, 20: 1.5, 40: 2.0, 1000: 50.0}, None),  # cheaper and cheaper
        ({10: 1.0, 100: 10.0, 1000: 100.0}, None),  # neither
        ({10: 1.0, 100: 10.0, 1000: 100.0 * WORSE + 1}, 511),  # 1,000 atoms lie in the size from 512 on
        ({16: 1.0, 32: 2.0 * WORSE + 0.1}, 31),
        ({1000: 200.0, 100: 10.0, 10: 1.0}, 511),  # in whatever order it was learnt
    ],
)
def test_the_limit_lies_below_the_first_size_that_is_slower_than_its_parts(costs, limit):
    assert learnt(costs).limit == limit


def test_one_slow_batch_among_many_does_not_count():
    curve = CostCurve()
    for _ in range(20):
        curve.learn(10, 1.0)
        curve.learn(100, 5.0)
    curve.learn(100, 15.0)
    assert curve.limit is None


def test_a_size_is_not_found_slow_before_it_was_tried_some_times():
    curve = learnt({10: 1.0})
    for _ in range(ENOUGH - 1):
        curve.learn(100, 30.0)
        assert curve.limit is None
    curve.learn(100, 30.0)
    assert curve.limit == 63


def test_what_gains_by_a_batch():
    assert CostCurve().gains(32, 32), "as far as is known"
    assert not learnt({32: 1.0, 64: 2.0}).gains(32, 32)
    assert learnt({32: 1.0, 64: 1.7}).gains(32, 32)
    assert learnt({32: 1.0}).gains(32, 32), "nobody has tried"


def test_what_gained_nothing_is_tried_again_after_a_while():
    curve = learnt({32: 1.0, 64: 2.0})
    for _ in range(STALE + 1):
        assert not curve.gains(32, 32)
        curve.learn(32, 1.0)
    assert curve.gains(32, 32)
    curve.learn(64, 2.0)
    assert not curve.gains(32, 32)


def test_one_timing_that_is_far_too_short_does_not_end_batching_for_good():
    curve = learnt({54: 0.05, 1000: 0.5})
    for _ in range(ENOUGH):
        curve.learn(8, 1e-5)
    assert curve.limit is not None
    for _ in range(PATIENCE):
        curve.learn(54, 0.05)
    assert curve.limit is None


def test_a_size_that_was_slow_is_tried_again():
    curve = learnt({10: 1.0, 100: 30.0})
    assert curve.limit == 63
    for _ in range(PATIENCE):
        curve.learn(10, 1.0)
    assert curve.limit is None


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1e3)), max_size=50))
def test_the_limit_leaves_room_for_an_atom(costs):
    curve = CostCurve()
    for atoms, seconds in costs:
        curve.learn(atoms, seconds)
        assert curve.limit is None or curve.limit >= 1


def test_a_scheduler_makes_no_batch_that_was_found_slower_than_its_parts():
    scheduler = Scheduler[str](1000)

    def run(sizes: list[int], seconds: float) -> list[int]:
        for size in sizes:
            scheduler.submit(Evaluation("", size))
        batch = scheduler.next_batch()
        done = [evaluation.atoms for evaluation in batch]
        assert scheduler.finished(seconds) == batch
        return done

    for _ in range(ENOUGH):
        assert run([100], 1.0) == [100]
        assert run([100] * 3, 9.0) == [100] * 3  # three times as slow as one by one
    assert run([100] * 3, 1.0) == [100] * 2  # what fits below the slow size
    assert run([500], 5.0) == [100]  # the one that was left
    assert run([], 5.0) == [500]  # a single evaluation runs whatever its size


def test_a_batch_too_large_for_the_memory_halves_the_budget():
    scheduler = Scheduler[str](1000)
    for _ in range(10):
        scheduler.submit(Evaluation("", 100))
    assert len(scheduler.next_batch()) == 10
    scheduler.back_off()
    scheduler.finished()
    assert scheduler.batch_atoms == 500
    for _ in range(10):
        scheduler.submit(Evaluation("", 100))
    assert len(scheduler.next_batch()) == 5
