"""Who waits for whom, in hours of somebody's jobs that take a fraction of a second: a device with a made-up cost."""

from __future__ import annotations

import gc
import heapq
import itertools
import statistics
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootstockd.supervision.scheduler import STILL_HERE, Evaluation, Scheduler


class Job(NamedTuple):
    """A driver that asks again as soon as it has moved its atoms."""

    user: int
    atoms: int
    thinks: float = 0.001
    share: float = 1.0


def cpu(atoms: int) -> float:
    return 0.004 + 2e-4 * atoms


def gpu(atoms: int) -> float:
    return 0.02 + 5e-6 * atoms


def run(jobs: list[Job], cost: Callable[[int], float], until: float) -> tuple[dict[int, list[float]], Counter[int]]:
    """How long each job's steps took, and how much of the device each user had."""
    scheduler = Scheduler[int](2_048)
    number = itertools.count()
    events = [(1e-4 * n, next(number), n, None) for n in range(len(jobs))]
    heapq.heapify(events)
    asked: dict[int, float] = {}
    steps: dict[int, list[float]] = defaultdict(list)
    used: Counter[int] = Counter()
    clock = 0.0
    while clock < until:
        clock, _, job, took = heapq.heappop(events)
        if took is None:
            asked[job] = clock
            scheduler.submit(Evaluation(job, jobs[job].atoms, jobs[job].user, jobs[job].share))
        else:
            batch = scheduler.finished(took)
            atoms = sum(evaluation.atoms for evaluation in batch)
            for evaluation in batch:
                used[evaluation.user] += took * evaluation.atoms / atoms
                steps[evaluation.owner].append(clock - asked[evaluation.owner])
                again = clock + jobs[evaluation.owner].thinks
                heapq.heappush(events, (again, next(number), evaluation.owner, None))
        if batch := scheduler.next_batch():
            took = cost(sum(evaluation.atoms for evaluation in batch))
            heapq.heappush(events, (clock + took, next(number), -1, took))
    return steps, used


def fair_step(job: Job, jobs: list[Job], cost: Callable[[int], float]) -> float:
    """A step of a user's only job, if each user had a device of their own, as fast as their share."""
    shares = {job.user: job.share for job in jobs}
    return cost(job.atoms) * sum(shares.values()) / job.share


@pytest.mark.parametrize("cost", [cpu, gpu])
@pytest.mark.parametrize("thinks", [0.0002, 0.005, 0.05])
@pytest.mark.parametrize("atoms", [8, 64, 1_000])
@pytest.mark.parametrize("share", [1.0, 3.0])
def test_one_job_beside_fifty_of_another_user(cost, thinks, atoms, share):
    one = Job(2, 64, thinks, share)
    jobs = [*(Job(1, atoms, thinks) for _ in range(50)), one]
    steps, _ = run(jobs, cost, 60)
    # a batch that is under way can't be taken back, nor can one evaluation be cut into pieces
    assert statistics.median(steps[50][5:]) <= 2 * fair_step(one, jobs, cost) + cost(atoms)


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_a_large_job_beside_fifty_small_ones(cost):
    one = Job(2, 1_000)
    jobs = [*(Job(1, 8) for _ in range(50)), one]
    steps, used = run(jobs, cost, 60)
    assert statistics.median(steps[50][5:]) <= 2 * fair_step(one, jobs, cost)
    assert used[1] > 0.25 * sum(used.values())  # they are not starved either


def test_time_goes_by_shares():
    jobs = [Job(user, 64, share=share) for user, share in ((1, 1.0), (2, 2.0), (3, 4.0)) for _ in range(20)]
    _, used = run(jobs, cpu, 200)
    everything = sum(used.values())
    assert [used[user] / everything for user in (1, 2, 3)] == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=0.1)


def test_fifty_jobs_on_their_own_are_batched_as_ever():
    jobs = [Job(1, 64) for _ in range(50)]
    steps, _ = run(jobs, gpu, 20)
    assert statistics.median(steps[0]) < 3 * gpu(32 * 64)


def test_somebody_who_has_left_is_waited_for_no_longer():
    """After one evaluation of another user, batches are soon as large as before."""
    scheduler = Scheduler[str](1_000)
    for _ in range(20):
        for atoms in (10, 100, 1_000):
            scheduler.costs.learn(atoms, 0.01 * atoms)

    def sizes() -> list[int]:
        for session in range(20):
            scheduler.submit(Evaluation(f"a {session}", 10, 1))
        sizes = []
        while batch := scheduler.next_batch():
            sizes.append(len(batch))
            scheduler.finished()
        return sizes

    assert sizes() == [20]
    scheduler.submit(Evaluation("b", 10, 2))
    assert sizes() == [2] * (STILL_HERE + 1) + [11]
    assert sizes() == [20]


def test_sessions_of_one_user_share_by_atoms():
    """A session of a hundred times as many atoms has its turn a hundred times as rarely, and is not starved."""
    scheduler = Scheduler[str](100)
    evaluations = [Evaluation("large", 100), Evaluation("small", 1)]
    counts: Counter[str] = Counter()
    for evaluation in evaluations:
        scheduler.submit(evaluation)
    for _ in range(5_000):
        scheduler.next_batch()
        for done in scheduler.finished():
            counts[done.owner] += 1
            scheduler.submit(Evaluation(done.owner, done.atoms))
    assert counts["small"] / counts["large"] == pytest.approx(100, rel=0.1)


def test_sessions_that_are_ever_new_do_not_starve_an_old_one():
    """A screening with a session for each structure, beside an MD of the same user."""
    scheduler = Scheduler[str](1)
    scheduler.submit(Evaluation("old", 100))
    scheduler.submit(Evaluation("new", 10))
    served = []
    for number in range(200):
        scheduler.next_batch()
        (done,) = scheduler.finished()
        served.append(done.owner)
        scheduler.submit(Evaluation("old", 100) if done.owner == "old" else Evaluation(f"new {number}", 10))
    assert served.count("old") == pytest.approx(200 / 11, abs=2)


def test_nothing_is_kept_of_a_session_that_has_gone():
    class Session:
        pass

    scheduler = Scheduler[Session](100)
    gone = []
    for _ in range(100):
        session = Session()
        gone.append(weakref.ref(session))
        scheduler.submit(Evaluation(session, 10))
        scheduler.next_batch()
        scheduler.finished(0.1)
    del session
    gc.collect()
    assert not any(reference() for reference in gone)


users = st.integers(1, 4)
some_jobs = st.lists(st.tuples(users, st.integers(1, 500), st.sampled_from([2e-4, 1e-2])), min_size=2, max_size=30)


@settings(deadline=None, max_examples=40)
@given(some_jobs, st.sampled_from([cpu, gpu]))
def test_nobody_starves(described, cost):
    """Whoever has a single job waits for no more than two turns, whatever others do."""
    jobs = [Job(*job) for job in described]
    steps, _ = run(jobs, cost, 20)
    largest = max(cost(job.atoms) for job in jobs)
    count = Counter(job.user for job in jobs)
    for number, job in enumerate(jobs):
        if count[job.user] == 1:
            assert statistics.median(steps[number]) <= 2 * fair_step(job, jobs, cost) + len(count) * largest
