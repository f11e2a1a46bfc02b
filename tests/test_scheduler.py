"""What a worker does next."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.scheduler import (
    GROW_AFTER,
    MAX_ATTEMPTS,
    MAX_BLAMED,
    MAX_EVALUATIONS,
    MAX_STARVED,
    Scheduler,
)
from rootstockd.worker.version import MESSAGE_SIZE

BUDGET = 100


def queue(*atoms: int) -> tuple[Scheduler[str], list[Evaluation[str]]]:
    scheduler = Scheduler[str](BUDGET)
    evaluations = [Evaluation(f"session {n}", size) for n, size in enumerate(atoms)]
    for evaluation in evaluations:
        scheduler.submit(evaluation)
    return scheduler, evaluations


def drain(scheduler: Scheduler[str]) -> list[list[int]]:
    """The sizes in each batch until nothing waits."""
    batches = []
    while batch := scheduler.next_batch():
        batches.append([evaluation.atoms for evaluation in batch])
        assert scheduler.finished() == batch
    return batches


def test_nothing_waits():
    scheduler, _ = queue()
    assert scheduler.next_batch() == []
    assert scheduler.finished() == []
    assert scheduler.worker_lost() == []
    assert scheduler.clear() == []


@pytest.mark.parametrize(
    ("atoms", "batches"),
    [
        ([10], [[10]]),
        ([40, 60], [[40, 60]]),
        ([40, 61], [[40], [61]]),
        ([50, 60, 40, 50, 50], [[40, 50], [50, 50], [60]]),  # of what came together the smaller goes first
        ([30, 60, 50], [[30, 50], [60]]),
        ([101], [[101]]),
        ([500, 10], [[10], [500]]),
        ([10, 500, 10], [[10, 10], [500]]),
        ([100, 1], [[1], [100]]),
        ([1] * 250, [[1] * 100, [1] * 100, [1] * 50]),
    ],
)
def test_batches_are_what_fits_in_order(atoms, batches):
    scheduler, _ = queue(*atoms)
    assert drain(scheduler) == batches


def test_a_batch_fits_a_message():
    scheduler = Scheduler[int](20_000)
    for number in range(2 * MAX_EVALUATIONS + 5):
        scheduler.submit(Evaluation(number, 1))
    assert [len(batch) for batch in drain(scheduler)] == [MAX_EVALUATIONS, MAX_EVALUATIONS, 5]
    assert len(b"E" + bytes(4 * MAX_EVALUATIONS)) <= MESSAGE_SIZE


def test_the_order_is_that_of_submission():
    scheduler, evaluations = queue(60, 60, 60, 60)
    order = []
    while batch := scheduler.next_batch():
        order += batch
        scheduler.finished()
    assert order == evaluations


def test_one_batch_at_a_time():
    scheduler, (first, second) = queue(100, 100)
    assert scheduler.next_batch() == [first]
    assert scheduler.next_batch() == []
    assert scheduler.finished() == [first]
    assert scheduler.next_batch() == [second]


def test_what_waited_under_a_worker_that_died_runs_alone_and_first():
    scheduler, (a, b, c) = queue(10, 10, 10)
    assert scheduler.next_batch() == [a, b, c]
    late = Evaluation("late", 10)
    scheduler.submit(late)
    assert scheduler.worker_lost() == []
    for suspect in (a, b, c):
        assert scheduler.next_batch() == [suspect]
        scheduler.finished()
    assert scheduler.next_batch() == [late]


@pytest.mark.parametrize(
    ("end", "deaths"),
    [
        ({"blame": True}, MAX_BLAMED),
        ({"blame": False, "starved": True}, MAX_STARVED),
        ({"blame": False}, MAX_ATTEMPTS),
    ],
)
def test_what_killed_too_many_workers_is_given_up(end, deaths):
    scheduler, (bad, good) = queue(10, 10)
    assert scheduler.next_batch() == [bad, good]
    for death in range(1, deaths):
        assert scheduler.worker_lost(f"end {death}", **end) == []
        assert bad.attempts == death
        if death == 2:  # it has had its turn
            assert scheduler.next_batch() == [good]
            assert scheduler.finished() == [good]
        assert scheduler.next_batch() == [bad]
    assert scheduler.worker_lost("the last", **end) == [bad]
    assert bad.ends == (*(f"end {death}" for death in range(1, deaths)), "the last")
    assert scheduler.next_batch() == ([good] if deaths == 2 else [])


def test_deaths_that_were_not_its_fault_do_not_hasten_the_end():
    scheduler, (one,) = queue(10)
    for blame in (False, True, False):
        scheduler.next_batch()
        assert scheduler.worker_lost("", blame=blame) == []
    scheduler.next_batch()
    assert scheduler.worker_lost("", blame=True) == [one]


def test_whoever_ends_workers_again_and_again_takes_turns_with_others():
    scheduler, (bad, *good) = queue(60, 60, 60)
    assert scheduler.next_batch() == [bad]
    order = []
    while True:
        scheduler.worker_lost("it ended", blame=False, starved=True, seconds=3.0)
        while (batch := scheduler.next_batch()) and batch != [bad]:
            order += batch
            scheduler.finished()
        if not batch:
            break
        order.append("bad")
    assert order == ["bad", good[0], "bad", good[1], "bad", "bad"]
    assert bad.lost == MAX_STARVED * 3.0


def test_kills_from_outside_are_nothing_to_make_amends_for():
    scheduler, (one,) = queue(10)
    scheduler.next_batch()
    scheduler.worker_lost("somebody killed it", blame=False, seconds=3.0)
    assert one.lost == 0.0


def test_a_worker_that_dies_idle_costs_nobody_an_attempt():
    scheduler, (one,) = queue(10)
    assert scheduler.worker_lost() == []
    assert one.attempts == 0
    assert scheduler.next_batch() == [one]


def test_withdraw_while_waiting():
    scheduler, (a, b, c) = queue(10, 10, 10)
    scheduler.withdraw(b)
    scheduler.withdraw(b)
    assert scheduler.next_batch() == [a, c]


def test_equal_evaluations_are_not_mistaken_for_each_other():
    scheduler, _ = queue()
    first, second = Evaluation("same", 10), Evaluation("same", 10)
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.withdraw(second)
    (left,) = scheduler.next_batch()
    assert left is first


def test_what_runs_ends_as_it_will_when_it_is_withdrawn():
    scheduler, (a, b) = queue(10, 10)
    scheduler.next_batch()
    scheduler.withdraw(a)
    assert scheduler.next_batch() == []
    assert scheduler.finished() == [a, b]


def test_what_was_withdrawn_while_it_ran_is_not_run_again():
    """Its session is gone, and its slot's descriptor is closed: there is nothing to hand to the next worker."""
    scheduler, (gone, still_wanted) = queue(10, 10)
    scheduler.next_batch()
    scheduler.withdraw(gone)
    assert scheduler.worker_lost() == []
    assert scheduler.next_batch() == [still_wanted]
    scheduler.finished()
    assert scheduler.next_batch() == []


def test_what_a_worker_was_at_that_was_sent_away_is_at_the_front_again():
    scheduler, (one, two, three) = queue(40, 40, 40)
    scheduler.next_batch()
    scheduler.withdraw(two)
    scheduler.put_back()
    assert (scheduler.running, scheduler.waiting, one.attempts) == ([], 2, 0)
    assert scheduler.next_batch() == [one]
    scheduler.finished()
    assert scheduler.next_batch() == [three]


def test_a_fresh_worker_gets_nothing_but_what_others_ended_over():
    """As one that sessions go over to, whose evaluations the other worker did not bear."""
    scheduler, _ = queue()
    suspects = [Evaluation(f"session {n}", 10, attempts=1) for n in range(2)]
    for suspect in suspects:
        scheduler.submit(suspect)
    for clock, suspect in enumerate(suspects):
        assert scheduler.next_batch(clock) == [suspect]
        assert scheduler.finished(0.1, clock + 0.1) == [suspect]
    assert (scheduler.running, scheduler.waiting) == ([], 0)


@pytest.mark.parametrize("withdrawn", [False, True])
def test_one_users_many_that_end_workers_leave_others_their_share(withdrawn: bool) -> None:
    """A hundred, in whose batch there was another user's step, each ending a worker when it is alone."""
    scheduler, load = Scheduler[object](100_000), 10.0
    bad = [Evaluation(f"bad {n}", 10, user=1) for n in range(100)]
    for evaluation in (*bad, good := Evaluation("good", 10, user=2)):
        scheduler.submit(evaluation)
    had, lost = 0.0, 0.0
    while lost < 30 * load:
        batch = scheduler.next_batch()
        if any(evaluation.user == 1 for evaluation in batch):
            if withdrawn and len(batch) == 1:  # whoever sent it goes as soon as it is under way
                scheduler.withdraw(batch[0])
                scheduler.submit(Evaluation(f"bad {lost}", 10, user=1, attempts=1))
            scheduler.worker_lost("it crashed", seconds=load)
            lost += load
            continue
        assert batch == [good]
        scheduler.finished(0.1)
        had += 0.1
        scheduler.submit(good := Evaluation("good", 10, user=2))
    assert had == pytest.approx(lost, rel=0.2)


def test_clear_gives_up_what_runs_and_what_waits():
    scheduler, (a, b, c) = queue(60, 60, 60)
    scheduler.next_batch()
    assert scheduler.clear() == [a, b, c]
    assert scheduler.next_batch() == []
    assert scheduler.finished() == []


def test_batches_grow_again_where_memory_lacked_once():
    scheduler, _ = queue()

    def run(*atoms: int) -> None:
        for size in atoms:
            scheduler.submit(Evaluation("", size))
        scheduler.next_batch()
        scheduler.finished(0.001)

    for _ in range(2):
        for _ in range(4):
            scheduler.submit(Evaluation("", 25))
        scheduler.next_batch()
        scheduler.back_off()
        scheduler.finished(0.001)
    sizes = [scheduler.batch_atoms]
    for batch in range(10 * GROW_AFTER):
        run(10)
        if scheduler.batch_atoms != sizes[-1]:
            assert (batch + 2) % GROW_AFTER == 0
            sizes.append(scheduler.batch_atoms)
    assert sizes[0] < sizes[1] < sizes[2] < BUDGET
    assert sizes == sorted(sizes)
    assert sizes[-1] == BUDGET


class Story(RuleBasedStateMachine):
    """Anything may happen; no evaluation is lost, run twice for nothing, or let into a batch too large."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(BUDGET)
        self.live = []
        """Submitted and not ended, oldest first."""
        self.ended = []
        self.running = []
        self.unwanted = []
        """Withdrawn while they ran."""
        self.put_back = []
        self.clock = 0.0

    @initialize(attempts=st.sampled_from([[], [1, 1], [2, 1, 1]]))
    def come_from_another_worker(self, attempts):
        for session, ends in enumerate(attempts):
            self.submit(10, session, 1.0, 0.0, False, ends)

    @rule(
        atoms=st.one_of(st.integers(1, 60), st.integers(90, 300)),
        session=st.integers(0, 20),
        shares=st.sampled_from([1.0, 0.1, 3.0]),
        away=st.sampled_from([10.0, 0.0, 1e-3]),
        alone=st.booleans(),
        attempts=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def submit(self, atoms, session, shares, away, alone, attempts):
        if any(evaluation.owner == session for evaluation in self.live):
            return  # a session has one at a time
        evaluation = Evaluation(session, atoms, session % 3, shares, self.clock, away, alone, attempts)
        self.live.append(evaluation)
        self.scheduler.submit(evaluation)

    @rule(passed=st.sampled_from([0.0, 1e-3, 1.0]))
    def next_batch(self, passed):
        self.clock += passed
        before = {evaluation: self.scheduler._start(evaluation.user) for evaluation in self.live}
        batch = self.scheduler.next_batch(self.clock)
        if self.running:
            assert batch == []
            return
        if self.scheduler.expected:  # somebody is waited for, which has an end
            assert self.live and batch == [] and self.clock < self.scheduler.expected < self.clock + 2.0
            self.clock = self.scheduler.expected
            batch = self.scheduler.next_batch(self.clock)
            assert batch
        assert bool(batch) == bool(self.live)
        assert all(evaluation in self.live for evaluation in batch)
        if len(batch) > 1:
            assert not any(evaluation.alone for evaluation in batch)
            assert sum(evaluation.atoms for evaluation in batch) <= BUDGET
            assert not any(evaluation.attempts for evaluation in batch)
        elif suspects := [evaluation for evaluation in before if evaluation.attempts == 1]:
            first = batch[0]  # what is suspect goes first, but that of users who had more behind others
            other_rules = first.attempts or first in self.put_back or any(one.attempts > 1 for one in before)
            assert other_rules or before[first] < min(before[suspect] for suspect in suspects)
        self.running = list(batch)

    def end(self, evaluations):
        for evaluation in evaluations:
            assert evaluation not in self.ended
            self.live.remove(evaluation)
        self.ended += evaluations

    @precondition(lambda self: self.running)
    @rule(seconds=st.none() | st.floats(1e-6, 10))
    def finished(self, seconds):
        self.clock += seconds or 0.0
        batch = self.scheduler.finished(seconds, self.clock)
        assert batch == self.running
        self.running = []
        self.end(batch)

    @rule(blame=st.booleans(), starved=st.booleans())
    def worker_lost(self, blame, starved):
        given_up = self.scheduler.worker_lost("it ended", blame=blame, starved=starved)
        for evaluation in self.running:
            starved_too_often = evaluation.starved >= MAX_STARVED
            if evaluation.attempts >= MAX_ATTEMPTS or evaluation.blamed >= MAX_BLAMED or starved_too_often:
                assert self.running == [evaluation]  # what was suspect ran alone
                assert evaluation in given_up or evaluation in self.unwanted
            elif evaluation in self.unwanted and evaluation not in given_up:
                given_up.append(evaluation)
        self.running = []
        self.end(given_up)

    @rule()
    def worker_sent_away(self):
        self.scheduler.put_back()
        self.put_back += self.running
        self.end([evaluation for evaluation in self.running if evaluation in self.unwanted])
        self.running = []

    @precondition(lambda self: len(self.live) > len(self.running))
    @rule(data=st.data())
    def withdraw(self, data):
        evaluation = data.draw(st.sampled_from([e for e in self.live if e not in self.running]))
        self.scheduler.withdraw(evaluation)
        self.end([evaluation])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def withdraw_what_runs(self, data):
        self.unwanted.append(data.draw(st.sampled_from(self.running)))
        self.scheduler.withdraw(self.unwanted[-1])

    @rule()
    def clear(self):
        given_up = self.scheduler.clear()
        assert len(given_up) == len(self.live)
        assert set(map(id, given_up)) == set(map(id, self.live))
        self.running = []
        self.end(list(self.live))

    @invariant()
    def nothing_is_lost(self):
        assert self.scheduler.running == self.running
        assert self.scheduler.waiting == len(self.live) - len(self.running)
        assert all(evaluation.attempts < MAX_ATTEMPTS for evaluation in self.live)
        assert all(evaluation.blamed < MAX_BLAMED for evaluation in self.live)
        assert all(evaluation.starved < MAX_STARVED for evaluation in self.live)


Story.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestStory = Story.TestCase
