"""What decides how MACE is evaluated on a device, without a model: lists' skins, and which passes are replayed."""

import contextlib
import gc
import itertools
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from rootstockd.worker.engines.mace import captured, resident, timing  # noqa: E402
from rootstockd.worker.engines.mace.budget import Size  # noqa: E402
from rootstockd.worker.engines.mace.captured import Captures, padded  # noqa: E402
from rootstockd.worker.engines.mace.skin import SMALL, STEADY, UNUSED, WIDTH, Skin  # noqa: E402

FAR = float("inf")


def record_at_once(monkeypatch):
    """Each shape is recorded when it first comes, and replayed from then on even if that is no faster."""
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    monkeypatch.setattr(captured, "SEEN", -1000)
    monkeypatch.setattr(timing, "TIMED", 1)


@pytest.fixture
def recording(monkeypatch):
    record_at_once(monkeypatch)


class TestSkin:
    def test_lists_that_serve_again_have_one(self):
        skin = Skin()
        for _ in range(10 * UNUSED):
            assert skin.next(WIDTH) == WIDTH
            skin.reused()

    def test_lists_that_never_serve_again_have_none(self):
        skin = Skin()
        assert [skin.next(FAR) for _ in range(UNUSED)] == [WIDTH] * UNUSED
        assert [skin.next(FAR) for _ in range(20)] == [0.0] * 20

    def test_one_that_served_again_is_enough(self):
        skin = Skin()
        for _ in range(UNUSED):
            skin.next(WIDTH)
        skin.reused()
        assert [skin.next(WIDTH) for _ in range(UNUSED)] == [WIDTH] * UNUSED
        assert skin.next(WIDTH) == 0.0

    def test_small_steps_bring_it_back_and_large_ones_take_it_again(self):
        skin = Skin()
        for _ in range(UNUSED + 1):
            skin.next(FAR)
        for large in (2 * SMALL, FAR):
            assert [skin.next(SMALL) for _ in range(STEADY - 1)] == [0.0] * (STEADY - 1)
            assert skin.next(large) == 0.0, "they must come in a row"
        skin.reused()  # of the very same structure: no step at all
        assert [skin.next(SMALL) for _ in range(STEADY)] == [0.0] * (STEADY - 1) + [WIDTH]
        assert [skin.next(FAR) for _ in range(UNUSED)] == [WIDTH] * (UNUSED - 1) + [0.0]


# --- passes that are replayed


def test_buckets_are_a_quarter_larger_from_one_to_the_next():
    sizes = sorted({padded(count) for count in range(300_000)})
    assert all(count <= padded(count) for count in range(3_000))
    assert all(1.1 < larger / smaller <= 1.25 for smaller, larger in itertools.pairwise(sizes))
    assert len(sizes) < 50


class Passes:
    """Captures over a pass of our own: rows of zeros, unless told otherwise."""

    def __init__(self):
        self.captures = Captures(self.evaluate, 1e-6, lambda size: size.atoms <= self.room)
        self.fail = lambda: None
        self.off, self.evaluated, self.recorded = 0.0, 0, 0
        self.room = 1_000
        """Atoms of a pass whose memory may be kept."""

    def evaluate(self, positions, _graph, _ghosts):
        self.recorded += 1
        self.fail()
        return torch.zeros((len(positions), 13), dtype=torch.float64) + self.off

    def rows(self, natoms):
        graph = resident.Graph(
            torch.ones((natoms, 1)),
            torch.zeros(natoms, dtype=torch.int64),
            torch.zeros((0, 2), dtype=torch.int64),
            torch.zeros((0, 3), dtype=torch.float64),
            0.0,
        )

        def eagerly(_positions):
            self.evaluated += 1
            return np.zeros((natoms, 13))

        found = self.captures.rows(graph, torch.zeros((natoms, 3), dtype=torch.float64), eagerly)
        assert found.shape == (natoms, 13) and not found.any()

    def replayed(self, natoms):
        """Whether a pass is replayed, without being evaluated."""
        before = self.evaluated
        self.rows(natoms)
        return self.evaluated == before


def test_a_shape_is_recorded_when_it_comes_again(monkeypatch):
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    passes = Passes()
    for number, natoms in enumerate((10, 100, 300)):
        assert not any(passes.replayed(natoms) for _ in range(captured.SEEN + number)), "each one time later"
        assert passes.replayed(natoms)


def test_no_more_shapes_are_kept_than_there_is_room_for(monkeypatch, recording):
    monkeypatch.setattr(captured, "MOST", 2)
    passes = Passes()
    for natoms in (10, 100, 10, 300):
        passes.rows(natoms)
    assert passes.replayed(10) and passes.replayed(300) and not passes.replayed(100)


def test_a_replay_that_is_not_faster_is_not_used(monkeypatch):
    monkeypatch.setattr(captured, "WORTHWHILE", 0.0)
    passes = Passes()
    assert not any(passes.replayed(10) for _ in range(10))
    recorded = passes.recorded
    assert not passes.replayed(10) and passes.recorded == recorded and not passes.captures.note


def test_a_replay_that_differs_is_not_used_and_after_two_nothing_is_recorded(recording):
    passes = Passes()
    passes.off = 1e-3
    assert not passes.replayed(10)
    assert "atoms and 32 edges are not replayed" in passes.captures.note and "1.0e-03" in passes.captures.note
    passes.off = 0.0
    passes.rows(100)
    assert passes.replayed(100) and not passes.replayed(10), "others are not concerned"
    passes.off = np.nan
    passes.rows(300)
    assert "no pass is replayed" in passes.captures.note
    passes.off, recorded = 0.0, passes.recorded
    assert not any(passes.replayed(natoms) for natoms in (10, 100, 300, 700))
    assert passes.recorded == recorded


def test_a_pass_that_would_keep_much_of_the_memory_is_not_recorded_until_there_is_more(recording):
    passes = Passes()
    passes.room = 200
    for natoms in (100, 300, 300):
        passes.rows(natoms)
    assert passes.captures.have(Size(100, 0)) and not passes.captures.have(Size(300, 0))
    passes.room = 300
    passes.rows(300)
    assert passes.captures.have(Size(300, 0)) and passes.replayed(300)


def raising(error):
    def fail():
        raise error

    return fail


def raising_at_the_end(first, then):
    """As torch does where recording was broken off: the end of it has an error of its own."""

    def fail():
        try:
            raise first
        finally:
            raise then

    return fail


def test_what_can_not_be_recorded_is_evaluated_and_the_first_cause_is_told(recording):
    passes = Passes()
    ended = RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
    passes.fail = raising_at_the_end(RuntimeError("CUDA error: operation not permitted\nwhen capturing"), ended)
    assert not passes.replayed(10)
    assert passes.captures.note.endswith("RuntimeError: CUDA error: operation not permitted")


def test_nothing_of_a_pass_whose_recording_failed_is_kept(recording):
    """Not even until Python looks for circles."""
    kept = []

    def fail():
        features = torch.ones(3)
        kept.append(weakref.ref(features))
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    passes = Passes()
    passes.fail = fail
    gc.disable()
    try:
        assert not any(passes.replayed(10) for _ in range(7))
        assert kept and not any(features() is not None for features in kept)
    finally:
        gc.enable()


def test_many_ghosts_where_many_edges_pad():
    assert captured.ghosts_of(captured.padded(100)) == captured.GHOSTS
    for edges in (8_000, 60_000, 200_000):
        bucket = captured.padded(edges)
        ghosts = captured.ghosts_of(bucket)
        assert bucket / 3 / ghosts < 300
        assert ghosts <= max(8, 0.2 * edges / 76), "few beside copper's atoms"


def test_memory_that_lacks_while_recording_is_no_failure(monkeypatch):
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    lacking = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    for fail in (raising(lacking), raising_at_the_end(lacking, RuntimeError("CUDA error: previous error"))):
        passes = Passes()
        passes.fail = fail
        while not passes.recorded:
            assert not passes.replayed(10)
        assert not passes.captures.note
        passes.fail = lambda: None
        assert any(passes.replayed(10) for _ in range(20)), "it is tried again"


# --- recordings that were broken off


class Cuda:
    """What a recorder asks of torch: a recording takes 1,000 bytes, and can be broken off."""

    def __init__(self, monkeypatch):
        self.reserved, self.by_hand = 0, []
        self.pools, self.used = itertools.count(1), []
        """Of these, which were recorded into."""
        self.broken_off = None
        """What torch says at the beginning of a recording."""
        self.error = None
        """What torch says at the end of a recording."""
        self.ended = False
        """It has told its allocator of the end nevertheless."""
        usual = SimpleNamespace(wait_stream=lambda _: None)
        for name, function in {
            "Stream": lambda _: usual,
            "current_stream": lambda _: usual,
            "set_stream": lambda _: None,
            "stream": lambda _: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph_pool_handle": lambda: (0, next(self.pools)),
            "graph": self.graph,
            "memory_reserved": lambda _: self.reserved,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: self.by_hand.append("released"), raising=False)

    @contextlib.contextmanager
    def graph(self, *_, pool, **__):
        if self.broken_off is not None:
            raise self.broken_off
        self.used.append(pool)
        try:
            yield
        finally:
            self.reserved += 1_000
            if self.error is not None:
                raise self.error

    def end(self, *_):
        if self.ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.by_hand.append("ended")


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def on_cuda():
    """Passes whose recorder believes to be on a GPU."""
    passes = Passes()
    passes.captures._recorder = captured.Recorder(torch.device("cuda", 0))
    return passes


def test_a_pool_that_torch_left_open_is_released(recording, cuda):
    passes = on_cuda()
    cuda.error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert not passes.replayed(10)
    assert cuda.by_hand == ["ended", "released"]
    assert passes.captures.held == 0
    cuda.error = None
    passes.rows(100)
    assert passes.replayed(100) and passes.captures.held == 1_000


@pytest.mark.parametrize("first", ["CUDA out of memory. Tried to allocate 20.00 MiB", "no such kernel"])
def test_a_pool_that_may_have_leaked_counts_and_nothing_more_is_recorded(recording, cuda, first):
    passes = on_cuda()
    passes.rows(100)
    assert passes.replayed(100)
    cuda.error, cuda.ended = RuntimeError("CUDA error: operation failed due to a previous error during capture"), True
    fail = raising(RuntimeError(first))
    passes.fail = lambda: fail() if passes.recorded % 4 == 0 else None  # not when it is evaluated before
    assert not passes.replayed(10)
    assert not cuda.by_hand, "to release it once too often would end the process"
    assert passes.captures.note == f"no pass is replayed as a CUDA graph: RuntimeError: {first}"
    cuda.error, recorded = None, passes.recorded
    assert not any(passes.replayed(natoms) for natoms in (10, 100, 300))
    assert passes.recorded == recorded
    passes.captures.forget()
    assert passes.captures.held == 2_000


def test_what_is_refused_has_nothing_of_the_pool(recording, cuda, monkeypatch):
    """Which never shrinks while others are in it: it is tried in one of its own, whose memory is free again."""
    passes = on_cuda()
    passes.rows(10)
    monkeypatch.setattr(captured, "WORTHWHILE", 0.0)
    assert not passes.replayed(100) and passes.replayed(10)
    assert passes.captures.held == 1_000 and len(set(cuda.used)) == len(cuda.used) == 2
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    passes.rows(300)
    assert passes.replayed(300) and passes.captures.held == 2_000 and cuda.used[3] == cuda.used[0]


@pytest.mark.parametrize(("evaluation", "broken", "held"), [(8, 1, 2_000), (12, 2, 3_000)])
def test_into_a_pool_that_was_ended_by_hand_nothing_more_is_recorded(recording, cuda, evaluation, broken, held):
    """torch's allocator of pinned memory was not told, and refuses to begin once more."""
    passes = on_cuda()
    passes.rows(300)
    lacking = raising(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))

    def fail():
        if passes.recorded == evaluation:
            cuda.error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
            lacking()

    passes.fail = fail
    passes.rows(10)
    cuda.error = None
    passes.rows(100)
    assert cuda.by_hand == ["ended", "released"] and cuda.used[broken] not in cuda.used[broken + 1 :]
    assert passes.replayed(300) and passes.replayed(100), "what was recorded before stays"
    assert passes.captures.held == held


def test_a_recording_that_could_not_begin_says_nothing_of_the_next(recording, cuda):
    """Nothing had been begun that would have to be ended."""
    passes = on_cuda()
    cuda.broken_off, cuda.ended = RuntimeError("CUDA error: operation not permitted"), True
    assert not passes.replayed(10)
    assert "atoms and 32 edges are not replayed" in passes.captures.note and not cuda.by_hand
    cuda.broken_off, cuda.ended = None, False
    passes.rows(100)
    assert passes.replayed(100) and passes.captures.held == 1_000


def test_a_pool_that_was_opened_for_a_recording_that_did_not_begin_is_closed_and_not_released(recording, cuda):
    passes = on_cuda()
    cuda.broken_off = RuntimeError("CUDA error: operation not permitted")
    assert not passes.replayed(10)
    assert cuda.by_hand == ["ended"], "torch may release it, and twice would end the process"
    cuda.broken_off, recorded = None, passes.recorded
    assert not any(passes.replayed(natoms) for natoms in (10, 100))
    assert passes.recorded == recorded and "no pass is replayed" in passes.captures.note


def test_what_torch_could_end_is_left_to_it(recording, cuda):
    passes = on_cuda()
    fail = raising(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    passes.fail = lambda: fail() if passes.recorded == 4 else None
    cuda.ended = True
    passes.rows(10)
    assert passes.recorded == 4 and not cuda.by_hand
    passes.rows(100)
    assert passes.replayed(100) and not passes.captures.note


def test_what_lacks_memory_again_and_again_is_not_recorded_and_others_stay_replayed(monkeypatch, cuda):
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    passes = on_cuda()
    assert any(passes.replayed(10) for _ in range(20))
    passes.fail = raising(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    for _ in range(100):
        assert not passes.replayed(100)
        assert passes.replayed(10)
    assert passes.recorded == 4 + captured.LACKS and passes.captures.held
    text = (
        r"passes of about 1\d\d atoms and 32 edges and larger ones are not replayed .*: memory lacks for recording them"
    )
    assert re.fullmatch(text, passes.captures.note)
    passes.fail = lambda: None
    assert not any(passes.replayed(natoms) for natoms in (100, 300) for _ in range(20))
    assert any(passes.replayed(40) for _ in range(20)), "smaller ones are"
    passes.captures.forget()
    assert not passes.captures.note
    assert any(passes.replayed(300) for _ in range(20)), "there may be enough now"
