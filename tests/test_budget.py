"""How much goes into one pass: what is learnt from passes, and where it is split; memory, really measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

pytest.importorskip("mace")

from rootstockd.worker import memory
from rootstockd.worker.engines import Result
from rootstockd.worker.engines.mace.budget import GROW_AFTER, LARGER, LEAST, SAFE, UNTRIED, Budget, Size, total
from rootstockd.worker.engines.mace.packing import Packing

ENDLESS = 2**70
GIB = 2**30
MIB = 2**20

sizes = st.builds(Size, st.integers(1, 10_000), st.integers(0, 1_000_000))


def learnt(*passes: tuple[int, int, int]) -> Budget:
    budget = Budget()
    for atoms, edges, taken in passes:
        budget.learn(Size(atoms, edges), taken)
    return budget


def counts(budget: Budget, several: list[Size], free: int) -> list[int]:
    """How many structures are in each pass."""
    passes: list[int] = []
    while rest := several[sum(passes) :]:
        passes.append(budget.count(rest, free))
    return passes


def test_how_large_a_structure_would_fit() -> None:
    budget = Budget()
    assert budget.would_fit(Size(1000, 50_000), 10**9) == 0, "nothing was measured"
    budget.learn(Size(100, 5_000), 10**8)
    assert budget.would_fit(Size(1000, 50_000), 10**9 // 2) == 400
    assert budget.would_fit(Size(1000, 100_000), 10**9 // 2) == 200, "twice as dense"
    assert budget.would_fit(Size(1000, 50_000), 2 * 10**9) == 0, "it should have fitted"


def test_as_long_as_nothing_is_known_all_go_into_one_pass():
    assert counts(Budget(), [Size(10**6, 10**8)] * 3, free=1) == [3]


@pytest.mark.parametrize(
    ("size", "free", "passes"),
    [
        (Size(100, 8_000), GIB, [8]),  # 80 %: just about
        (Size(100, 8_000), GIB - MIB, [7, 1]),
        (Size(100, 16_000), GIB, [4, 4]),  # dense: edges say how many
        (Size(200, 8_000), GIB, [4, 4]),  # thin: atoms do
        (Size(2_000, 8_000), GIB, [1] * 8),  # too large: tried all the same
    ],
)
def test_passes_are_limited_by_atoms_and_by_edges(size, free, passes):
    budget = learnt((800, 64_000, int(SAFE * GIB)))
    assert counts(budget, [size] * 8, free) == passes


def test_passes_much_larger_than_any_before_may_take_less():
    """What they take is a guess: a malloc's gaps and an allocation's steps are not in proportion."""
    budget = learnt((100, 8_000, int(UNTRIED * GIB / 4)))
    several = [Size(100, 8_000)] * 16
    assert counts(budget, several, GIB) == [4, 4, 4, 4]
    budget.learn(Size(400, 32_000), int(UNTRIED * GIB))
    assert counts(budget, several, int(1.01 * GIB * 5 / 4 * UNTRIED / SAFE)) == [5, 5, 5, 1]


def test_one_that_is_too_large_takes_no_other_with_it():
    budget = learnt((100, 8_000, 100 * MIB))
    small, huge = Size(10, 800), Size(10_000, 800_000)
    assert counts(budget, [small, small, huge, small, small], GIB) == [2, 1, 2]


@given(
    st.floats(0, 1e6),
    st.floats(0, 1e5),
    st.lists(sizes, min_size=1, max_size=20),
    sizes,
)
def test_no_pass_needs_more_than_is_foreseen(by_atom, by_edge, before, size):
    """Whatever a model takes for an atom and for an edge."""

    def cost(of: Size) -> float:
        return by_atom * of.atoms + by_edge * of.edges

    budget = Budget()
    for known in before:
        budget.learn(known, int(cost(known)) + 1)
    assert budget.need(size) * (1 + 1e-9) >= cost(size)


@given(st.lists(sizes, min_size=1, max_size=5), st.lists(sizes, min_size=2, max_size=40), st.integers(1, 2**40))
def test_as_many_go_into_a_pass_as_fit(before, several, free):
    budget = learnt(*[(size.atoms, size.edges, 1_000 * size.edges) for size in before])
    count = budget.count(several, free)
    assert 1 <= count <= len(several)

    def fits(size: Size) -> bool:
        return budget.need(size) <= (UNTRIED if budget.is_new(size) else SAFE) * free

    assert count == 1 or fits(total(several[:count]))
    assert count == len(several) or not fits(total(several[: count + 1]))


def test_what_is_larger_than_any_before_is_measured():
    budget = Budget()
    assert budget.is_new(Size(1, 0))
    budget.learn(Size(100, 1_000), MIB)
    assert not budget.is_new(Size(int(100 * LARGER), int(1_000 * LARGER)))
    assert budget.is_new(Size(int(100 * LARGER) + 1, 10))
    assert budget.is_new(Size(1, int(1_000 * LARGER) + 1))


def test_of_what_was_measured_the_largest_counts():
    """Small passes say little: some of what they take is the same for all."""
    budget = learnt((1, 10, 100 * MIB))
    assert budget.need(Size(100, 1_000)) == 10_000 * MIB
    budget.learn(Size(100, 1_000), 200 * MIB)
    assert budget.need(Size(100, 1_000)) == 200 * MIB
    assert budget.need(Size(1, 10)) == 2 * MIB
    budget.learn(Size(10, 2_000), 300 * MIB)  # dense, so both are kept
    assert budget.need(Size(100, 1_000)) == 200 * MIB
    assert budget.need(Size(10, 2_000)) == 300 * MIB


def test_little_is_taken_for_more_and_no_edges_for_one():
    budget = learnt((10, 0, -5))
    assert budget.need(Size(10, 0)) == LEAST
    assert budget.need(Size(10, 3)) == 3 * LEAST


def test_where_memory_lacked_passes_are_smaller_until_it_went_well_for_a_while():
    budget = learnt((100, 8_000, MIB))
    several = [Size(100, 8_000)] * 8
    budget.back_off(total(several))
    seen = []
    for _ in range(4):
        seen.append(counts(budget, several, ENDLESS))
        for _ in range(GROW_AFTER - 1):
            budget.went_well()
        assert seen[-1] == counts(budget, several, ENDLESS)
        budget.went_well()
    assert seen == [[4, 4], [5, 3], [6, 2], [7, 1]]
    assert counts(budget, several, ENDLESS) == [8]
    assert counts(budget, several * 9, ENDLESS) == [72], "the limit is gone"


def test_memory_that_lacks_again_halves_again_and_starts_counting_anew():
    budget = learnt((1, 1, 1))
    several = [Size(1, 10)] * 8
    budget.back_off(total(several))
    assert counts(budget, [Size(1, 0)] * 8, ENDLESS) == counts(budget, [Size(0, 10)] * 8, ENDLESS) == [4, 4]
    for _ in range(GROW_AFTER - 1):
        budget.went_well()
    budget.back_off(total(several[:4]))
    budget.went_well()
    assert counts(budget, several, ENDLESS) == [2] * 4
    budget.back_off(Size(1, 0))
    assert counts(budget, several, ENDLESS) == [1] * 8


class Device(RuleBasedStateMachine):
    """A device with some memory, of which others have now more, now less, and a model that takes what it takes."""

    @initialize(by_atom=st.integers(0, 10**6), by_edge=st.integers(0, 10**5), memory=st.integers(LEAST, 2**40))
    def begin(self, by_atom, by_edge, memory):
        self.by_atom, self.by_edge, self.memory, self.others = by_atom, by_edge, memory, 0
        self.budget = Budget()
        self.known = False

    @rule(part=st.floats(0, 1))
    def others_take(self, part):
        self.others = int(part * self.memory)

    @rule(several=st.lists(sizes, min_size=1, max_size=12), stolen=st.booleans())
    def evaluate(self, several, stolen):
        """A batch; memory may go behind its back."""
        free = self.memory - self.others
        there = free // 2 if stolen else free
        while several:
            count = self.budget.count(several, free)
            size, several = total(several[:count]), several[count:]
            cost = self.by_atom * size.atoms + self.by_edge * size.edges
            if cost > there:
                assert count == 1 or stolen or not self.known, "it was known, and did not fit"
                if count > 1:
                    self.budget.back_off(size)
                return
            if self.budget.is_new(size):
                self.budget.learn(size, cost)
                self.known = True
            self.budget.went_well()
            assert not self.budget.is_new(size)


TestDevice = Device.TestCase


# --- packing


def test_a_pass_for_which_memory_lacks_all_the_same_makes_later_ones_smaller():
    packing, seen = Packing("cpu"), []

    def evaluate(pack: slice) -> list[Result]:
        count = pack.stop - pack.start
        seen.append(count)
        if count > most:
            np.ones(2**48)  # PiB
        return [Result(float(number), np.zeros((1, 3))) for number in range(8)[pack]]

    several = [Size(10, 500)] * 8
    most = 0
    with pytest.raises(MemoryError):
        packing.evaluate(several[:1], evaluate)  # one that is too large says nothing of others
    most = 4
    with pytest.raises(MemoryError):
        packing.evaluate(several, evaluate)
    results = packing.evaluate(several, evaluate)
    assert [result.energy for result in results] == list(range(8))
    assert seen == [1, 8, 4, 4]


def test_the_log_tells_when_a_batch_takes_twice_as_many_passes_as_any_before(caplog):
    packing = Packing("cpu")
    for count, told in ((1, 0), (2, 1), (3, 1), (4, 2), (2, 2), (4, 2)):
        packing._budget.back_off(Size(1, 0))  # one structure a pass
        packing.evaluate([Size(10, 500)] * count, lambda _: [Result(0.0, np.zeros((1, 3)))])
        assert len(caplog.messages) == told
    assert caplog.messages[-1] == "4 structures of 40 atoms took 4 passes: memory allows no fewer"


# --- memory


@pytest.fixture
def measured(monkeypatch) -> Iterator[memory.CpuMemory]:
    monkeypatch.setattr(memory, "_peak", None)  # as it is again afterwards
    memory.open_peak()
    if memory._peak is None:
        pytest.skip("this kernel does not forget peaks")
    yield memory.CpuMemory()
    os.close(memory._peak)


def test_each_pass_is_measured_by_itself(measured):
    for size in (200, 50, 100):
        measured.begin()
        np.ones(size * MIB, np.int8)
        assert measured.taken() == pytest.approx(size * MIB, abs=4 * MIB)


def test_what_is_free_is_what_the_least_limit_leaves():
    text = """
import resource
from rootstockd.worker import memory
measured = memory.CpuMemory()
least = measured.free()
limit = memory._usage().data + 2**29
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
limited = memory.CpuMemory().free()
assert measured.free() == least, "it is looked at once a second"
assert 0.9 * 2**29 <= limited <= 2**29 + memory._free_heap() + 2**20, limited
assert limited < least
memory.Bound().renew()
assert resource.getrlimit(resource.RLIMIT_DATA) == (limit, limit), "what the operator said is kept"
"""
    subprocess.run([sys.executable, "-c", text], check=True)


def test_a_worker_is_kept_within_what_is_free_and_that_leaves_its_passes_all_of_it():
    text = """
import resource, time
import numpy as np
from rootstockd.worker import memory
memory._FRESH = 0.1
memory._available, memory.control_groups = lambda: 2**33, lambda: iter([])  # others' come and go
measured, bound = memory.CpuMemory(), memory.Bound()
free = measured.free()
for _ in range(5):  # its own bound is not what is free: else each would be a tenth less than the last
    time.sleep(0.15)
    bound.renew()
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
assert hard == resource.RLIM_INFINITY
usage = memory._usage()
assert 0.85 * 2**33 < soft - usage.resident + usage.shared < 0.95 * 2**33
assert free >= 2**33 and measured.free() >= 2**33
try:
    np.empty(2**33, np.int8)
except MemoryError:
    np.empty(2**32, np.int8)
else:
    raise SystemExit("it got all that there is")
"""
    subprocess.run([sys.executable, "-c", text], check=True)


def test_a_control_groups_memory_is_without_what_the_kernel_could_drop(tmp_path: Path):
    assert list(memory.control_group_memory(tmp_path)) == []
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory.control_group_memory(tmp_path)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert list(memory.control_group_memory(tmp_path)) == [(1000, 550)]


def test_the_first_version_of_control_groups_too(tmp_path: Path):
    (tmp_path / "memory.usage_in_bytes").write_text("700\n")
    (tmp_path / "memory.stat").write_text("inactive_file 1\ntotal_rss 500\ntotal_inactive_file 150\n")
    (tmp_path / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert list(memory.control_group_memory(tmp_path)) == []
    (tmp_path / "memory.limit_in_bytes").write_text("1000\n")
    assert list(memory.control_group_memory(tmp_path)) == [(1000, 550)]


def test_which_control_groups_a_process_is_in(monkeypatch):
    lines = "4:cpuset,memory:/slurm/uid_0/job_1\n1:cpu:/elsewhere\n0::/system.slice/a:b.service\n"
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    root = Path("/sys/fs/cgroup")
    assert list(memory.control_groups()) == [
        root / "memory/slurm/uid_0/job_1",
        root / "memory/slurm/uid_0",
        root / "memory/slurm",
        root / "memory",
        root / "system.slice/a:b.service",
        root / "system.slice",
        root,
    ]


@pytest.mark.gpu
def test_each_pass_on_a_gpu_is_measured_by_itself():
    torch = pytest.importorskip("torch")
    measured = memory.memory_of("cuda:0")
    before = measured.free()
    for size in (200, 50, 100):
        measured.begin()
        torch.ones(size * MIB, dtype=torch.int8, device="cuda:0")
        assert measured.taken() == size * MIB
    assert before > 200 * MIB
