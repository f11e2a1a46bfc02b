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

from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.scheduler import STILL_HERE, WORTHWHILE, Scheduler


class Job(NamedTuple):
    """A driver that asks again as soon as it has moved its atoms."""

    user: int
    atoms: int
    thinks: float = 0.001
    share: float = 1.0
    alone: bool = False


DONE, LATE = -1, -2
EXACT = 8
"""How many times as long an evaluation takes that is not accelerated."""


def cpu(atoms: int) -> float:
    return 0.004 + 2e-4 * atoms


def gpu(atoms: int) -> float:
    return 0.02 + 5e-6 * atoms


def one_by_one(atoms: int) -> float:
    return 2e-4 + 2e-4 * atoms


def run(
    jobs: list[Job], cost: Callable[[int], float], until: float, begins: dict[int, float] | None = None
) -> tuple[dict[int, list[float]], Counter[int]]:
    """How long each job's steps took, and how much of the device each user had; some jobs begin later.

    A step that is not done in the end counts as long as it was waited for.
    """
    scheduler = Scheduler[int](2_048)
    number = itertools.count()
    first = {n: 1e-4 * n for n in range(len(jobs))} | (begins or {})
    events: list[tuple[float, int, int, float | None]] = [(at, next(number), n, None) for n, at in first.items()]
    heapq.heapify(events)
    asked: dict[int, float] = {}
    answered: dict[int, float] = {}
    steps: dict[int, list[float]] = defaultdict(list)
    used: Counter[int] = Counter()
    clock = 0.0
    while clock < until:
        clock, _, job, took = heapq.heappop(events)
        if job == LATE:  # whoever was waited for
            pass
        elif took is None:
            asked[job] = clock
            _, atoms, _, share, alone = jobs[job]
            away = clock - answered.get(job, clock)
            scheduler.submit(Evaluation(job, atoms, jobs[job].user, share, clock, away, alone))
        else:
            batch = scheduler.finished(took, clock)
            atoms = sum(evaluation.atoms for evaluation in batch)
            for evaluation in batch:
                used[evaluation.user] += took * evaluation.atoms / atoms
                steps[evaluation.owner].append(clock - asked.pop(evaluation.owner))
                answered[evaluation.owner] = clock
                again = clock + jobs[evaluation.owner].thinks
                heapq.heappush(events, (again, next(number), evaluation.owner, None))
        if batch := scheduler.next_batch(clock):
            took = cost(sum(evaluation.atoms for evaluation in batch)) * (EXACT if batch[0].alone else 1)
            heapq.heappush(events, (clock + took, next(number), DONE, took))
        elif scheduler.expected:
            assert scheduler.waiting and clock < scheduler.expected
            heapq.heappush(events, (scheduler.expected, next(number), LATE, None))
    for job, since in asked.items():
        steps[job].append(clock - since)
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
    assert max(steps[50][5:]) <= 2 * fair_step(one, jobs, cost) + cost(atoms)


@pytest.mark.parametrize("atoms", [32, 256])
def test_where_batches_gain_nothing_one_job_beside_fifty_has_half_of_the_device(atoms):
    one = Job(2, atoms)
    jobs = [*(Job(1, atoms) for _ in range(50)), one]
    steps, used = run(jobs, one_by_one, 60)
    assert used[2] > 0.45 * sum(used.values())
    assert statistics.median(steps[50][5:]) < 1.1 * fair_step(one, jobs, one_by_one)
    assert sum(map(len, steps.values())) > 0.97 * 60 / one_by_one(atoms), "nor does that cost anything"


def test_it_is_noticed_when_batches_gain_something_again():
    """Nothing of what was learnt is true any more, and no batch is as large as those by which that would be noticed."""

    def idle_gpu(atoms: int) -> float:
        return 0.004 + 5e-6 * atoms

    jobs = [*(Job(1, 32) for _ in range(50)), Job(2, 32)]
    batches = itertools.count()

    def cost(atoms: int) -> float:
        return one_by_one(atoms) if next(batches) < 2_000 else idle_gpu(atoms)

    steps, _ = run(jobs, cost, 2_000 * one_by_one(32) + 60)
    always, _ = run(jobs, idle_gpu, 60)
    assert len(steps[0]) > 0.8 * len(always[0])


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_a_large_job_beside_fifty_small_ones(cost):
    one = Job(2, 1_000)
    jobs = [*(Job(1, 8) for _ in range(50)), one]
    steps, used = run(jobs, cost, 60)
    assert statistics.median(steps[50][5:]) <= 2 * fair_step(one, jobs, cost)
    assert used[1] > 0.25 * sum(used.values())  # they are not starved either


@pytest.mark.parametrize("share", [1.0, 3.0])
@pytest.mark.parametrize("thinks", [2e-4, 2e-3])
@pytest.mark.parametrize("other", [Job(1, 4_000), Job(1, 1_000), Job(1, 32, alone=True)])
def test_a_small_job_beside_one_that_takes_much_longer(other, thinks, share):
    """It does not have one step for each of the other's: each user has their share of the time."""
    small = Job(2, 8, thinks, share)
    steps, _ = run([other, small], cpu, 120)
    alone = cpu(small.atoms) + thinks
    fair = 120 / alone * share / (1 + share)
    assert len(steps[1]) >= 0.6 * fair
    long = cpu(other.atoms) * (EXACT if other.alone else 1)
    assert len(steps[0]) >= 0.8 * 120 / (long + other.thinks) / (1 + share)
    assert max(steps[1]) <= 2 * long, "one that has begun can't be taken back"


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_a_small_session_of_the_same_user_beside_a_large_one(cost):
    """They have about the same time, though the small one's atoms cost more: up to MOST_TIMES as much counts."""
    steps, _ = run([Job(1, 4_000), Job(1, 8, 2e-4)], cost, 240)
    assert 0.4 < len(steps[1]) * cost(8) / (len(steps[0]) * cost(4_000)) < 1.4


def test_what_somebody_waited_for_alone_is_nobody_elses_due():
    """After ten minutes of a small job beside a large one of the same user, another has no claim to what comes."""
    alone, clock = [Job(1, 4_000, 0.0), Job(1, 8, 4.5e-3)], 600.0
    others = [Job(2, 32, 0.0) for _ in range(3)]
    _, before = run(alone, cpu, clock)
    steps, used = run([*alone, *others], cpu, clock + 30, begins={2: clock, 3: clock, 4: clock})
    assert max(max(steps[job]) for job in (0, 1)) < 5
    assert min(used[1] - before[1], used[2]) > 30 / 3, "each has about half of the time, less what is waited for them"


def test_whoever_computes_for_long_between_steps_is_not_waited_for():
    large = Job(1, 1_000, 0.0)
    _, used = run([large, Job(2, 8, 0.05)], cpu, 60)
    assert used[1] > 0.85 * 60, "the device is never idle for long"


def test_somebody_who_does_not_come_back_is_not_waited_for_for_ever():
    scheduler = Scheduler[str](2_048)
    scheduler.costs.learn(10, 0.001)
    scheduler.costs.learn(2_000, 0.2)
    for user, name, atoms, clock in ((2, "small", 10, 0.1), (1, "large", 2_000, 0.3), (2, "small", 10, 0.4)):
        scheduler.submit(Evaluation(name, atoms, user, away=0.001))
        (one,) = scheduler.next_batch(clock)
        if clock < 0.4:
            assert scheduler.finished() == [one]
    scheduler.submit(Evaluation("large", 2_000, 1, away=0.0))
    assert scheduler.finished(0.001, 0.401) == [one]
    assert scheduler.next_batch(0.401) == [] and 0.401 < scheduler.expected < 0.401 + WORTHWHILE * 0.2
    assert scheduler.next_batch(0.402) == []
    (again,) = scheduler.next_batch(scheduler.expected)
    assert again.owner == "large" and not scheduler.expected


def test_exact_evaluations_are_in_no_batch_with_others():
    scheduler = Scheduler[str](1_000)
    for number in range(8):
        scheduler.submit(Evaluation(f"session {number}", 10 + number // 2, alone=number % 4 == 0))
    batches = []
    while batch := scheduler.next_batch():
        batches.append([evaluation.alone for evaluation in batch])
        scheduler.finished()
    assert sorted(batches, key=len) == [[True], [True], *([False] * n for n in sorted(map(len, batches)) if n > 1)]
    assert sum(map(len, batches)) == 8


def test_a_slow_first_evaluation_starves_nobody():
    """The first of its kind is compared with the reference, on a worker that has not even compiled its kernels yet."""
    scheduler = Scheduler[int](1_000)
    new, clock, asked, longest = set(range(8)), 0.0, dict.fromkeys(range(8), 0.0), 0.0
    for session in range(8):
        scheduler.submit(Evaluation(session, 8, alone=session < 4))
    while clock < 200:
        batch = scheduler.next_batch(clock)
        sessions = [evaluation.owner for evaluation in batch]
        took = 20.0 if new & set(sessions) else 0.02 if batch[0].alone else 0.003
        clock, new = clock + took, new - set(sessions)
        assert scheduler.finished(took, clock) == batch
        for session in sessions:
            if not new:
                longest = max(longest, clock - max(asked[session], 120.0))
            asked[session] = clock
            scheduler.submit(Evaluation(session, 8, alone=session < 4))
    assert not new
    assert longest < 5


def test_time_goes_by_shares():
    jobs = [Job(user, 64, share=share) for user, share in ((1, 1.0), (2, 2.0), (3, 4.0)) for _ in range(20)]
    _, used = run(jobs, cpu, 200)
    everything = sum(used.values())
    assert [used[user] / everything for user in (1, 2, 3)] == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=0.1)


@pytest.mark.parametrize("before", [1e-6, 1e-3, 1e3])
def test_a_share_that_is_changed_holds_from_then_on(before):
    """What was charged by the old one is not held against whoever had it."""
    scheduler = Scheduler[int](2_048)
    scheduler.costs.learn(64, 0.01)
    shares, used = {1: before, 2: 1.0}, Counter()

    def go(batches: int) -> None:
        used.clear()
        for _ in range(batches):
            for evaluation in scheduler.finished():
                used[evaluation.user] += 1
                scheduler.submit(Evaluation(evaluation.owner, 64, evaluation.user, shares[evaluation.user]))
            scheduler.next_batch()

    for session in range(8):
        scheduler.submit(Evaluation(session, 64, 1 + session % 2, shares[1 + session % 2]))
    go(200)
    shares[1] = 1.0
    scheduler.reshare(shares)
    go(200)
    assert used[1] == pytest.approx(used[2], rel=0.1)


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


@settings(max_examples=40)
@given(some_jobs, st.sampled_from([cpu, gpu]))
def test_nobody_starves(described, cost):
    """Whoever has a single job waits for no more than two turns, whatever others do."""
    jobs = [Job(*job) for job in described]
    steps, _ = run(jobs, cost, 20)
    largest = max(cost(job.atoms) for job in jobs)
    count = Counter(job.user for job in jobs)
    for number, job in enumerate(jobs):
        if count[job.user] == 1:
            assert max(steps[number][5:]) <= 2 * fair_step(job, jobs, cost) + len(count) * largest
