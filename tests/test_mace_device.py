"""MACE on a device: graphs that stay there, and passes that are replayed. The same code on a CPU and on a GPU."""

import itertools
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from ase import Atoms  # noqa: E402
from ase.build import bulk  # noqa: E402
from test_mace_backends import ARCHITECTURES, STRUCTURES, engine, make_model, task  # noqa: E402

from rootstockd.worker.engines import ModelSpec, Task, guarded  # noqa: E402
from rootstockd.worker.engines.differences import compare  # noqa: E402
from rootstockd.worker.engines.mace import MaceEngine, captured, resident  # noqa: E402
from rootstockd.worker.engines.mace.captured import Captures, padded  # noqa: E402
from rootstockd.worker.engines.mace.device import DeviceBackend  # noqa: E402
from rootstockd.worker.engines.mace.graph import Neighbours  # noqa: E402
from rootstockd.worker.engines.mace.reference import ReferenceBackend  # noqa: E402
from rootstockd.worker.engines.mace.skin import SMALL, STEADY, UNUSED, WIDTH, Skin  # noqa: E402

FAR = float("inf")
SMALL_MODEL = {"hidden": "2x0e", "max_ell": 1, "correlation": 2}
DIFFERENT = ("as MACE-MP-0 medium", "density, as the embedded model", "two heads", "repulsion and Agnesi", "one layer")
"""Architectures that differ in what they make of edges and atoms."""


ON_GPU = [pytest.mark.gpu, pytest.mark.may_leak("CUDA keeps descriptors for the whole process")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def recording(monkeypatch):
    """Each shape is recorded when it first comes, and replayed from then on even if that is no faster."""
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    monkeypatch.setattr(captured, "SEEN", -1000)
    monkeypatch.setattr(captured, "TIMED", 1)


@pytest.fixture
def lists(monkeypatch):
    """The cutoffs of all neighbour lists that are made."""
    made, edges = [], Neighbours.edges

    def noted(self, *arguments):
        made.append(self._cutoff)
        return edges(self, *arguments)

    monkeypatch.setattr(Neighbours, "edges", noted)
    return made


@cache
def model_on(device, dtype, small):
    made = make_model(dtype=getattr(torch, dtype), **(SMALL_MODEL if small else {})).to(device)
    return made.requires_grad_(False)


class OnDevice:
    """A model, the reference on the CPU, and the backend on the device."""

    def __init__(self, device, dtype="float64", small=False, architecture=None):
        torch.set_default_dtype(getattr(torch, dtype))
        if architecture is None:
            self.model, on_device = (model_on(where, dtype, small) for where in ("cpu", device))
        else:
            self.model = on_device = make_model(**architecture)
            if device != "cpu":
                on_device = make_model(**architecture).to(device)
        self.of = engine(self.model, dtype)
        self.reference = ReferenceBackend(self.model, "cpu")
        self.backend = DeviceBackend(on_device.requires_grad_(False), "by edges")

    def task(self, atoms, session=None):
        return task(self.of, atoms, session, head=self.model.heads[-1])

    def difference(self, one):
        return compare(self.backend.evaluate([one])[0], self.reference.evaluate([one])[0])

    @property
    def buckets(self):
        return len(self.backend._captures._buckets)


def moved(one, by, seed=0):
    """The same system a step further; no atom moves further than `by`."""
    way = np.random.default_rng(seed).normal(size=one.positions.shape)
    way *= by / np.linalg.norm(way, axis=1).max()
    return Task(one.system, one.cell, one.positions + way, stress=True, energies=True)


# --- skins


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


def test_a_list_serves_until_an_atom_has_moved_by_half_the_skin(device, lists):
    on = OnDevice(device, small=True)
    one = on.task(STRUCTURES["alloy"])
    assert on.difference(one).within(1e-11)
    for _ in range(3):
        assert on.difference(moved(one, 0.49 * WIDTH)).within(1e-11)
    assert len(lists) == 1
    assert on.difference(moved(one, 0.51 * WIDTH)).within(1e-11)
    assert lists == [4.5 + WIDTH] * 2


def test_pairs_that_come_within_the_cutoff_are_seen(device, lists):
    on = OnDevice(device, small=True)
    one = on.task(Atoms("Cu3", [[0, 0, 0], [0, 0, 2.4], [4.9, 0, 1.2]]))
    for step in range(12):
        positions = one.positions - np.array([[0, 0, 0], [0, 0, 0], [0.09 * step, 0, 0]])
        assert on.difference(Task(one.system, one.cell, positions, True, True)).within(1e-11)
    assert 1 < len(lists) < 6


def test_another_cell_is_another_list(device, lists):
    on = OnDevice(device, small=True)
    one = on.task(STRUCTURES["alloy"])
    for stretch in (1.0, 1.0, 1.0 + 1e-12, 1.01):
        stretched = Task(one.system, one.cell * stretch, one.positions, True, True)
        assert on.difference(stretched).within(1e-11)
    assert len(lists) == 3


def test_a_screening_gets_no_skin_and_a_relaxation_after_it_does(device, lists):
    on = OnDevice(device, small=True)
    for number in range(UNUSED + 2):
        atoms = bulk("Cu", a=3.5 + 0.02 * number, cubic=True)
        assert on.difference(on.task(atoms, session=1_000_001)).within(1e-11)
    assert lists == [4.5 + WIDTH] * UNUSED + [4.5] * 2
    lists.clear()
    one = on.task(STRUCTURES["dense"], session=1_000_001)
    for seed in range(12):
        one = moved(one, SMALL / 2, seed)
        assert on.difference(one).within(1e-11)
    assert lists == [4.5] * STEADY + [4.5 + WIDTH]


def test_frames_of_one_session_have_a_list_each(device, lists):
    on = OnDevice(device, small=True)
    one = on.task(STRUCTURES["alloy"])
    frames = [moved(one, 1.0, seed) for seed in range(4)]
    for step in range(5):
        frames = [moved(frame, 0.01, step) for frame in frames]
        for result, frame in zip(on.backend.evaluate(frames), frames, strict=True):
            assert compare(result, on.reference.evaluate([frame])[0]).within(1e-11)
    assert len(lists) == 4


def test_graphs_go_with_their_systems(device):
    on = OnDevice(device, small=True)
    kept = on.backend._residents._kept
    one, other = on.task(STRUCTURES["alloy"]), on.task(STRUCTURES["dense"])
    on.backend.evaluate([one, other])
    assert len(kept) == 2
    del one
    assert len(kept) == 1


def test_graphs_that_were_not_used_for_longest_make_room(device, monkeypatch):
    on = OnDevice(device, small=True)
    tasks = [on.task(STRUCTURES["alloy"]) for _ in range(3)]
    kept = on.backend._residents._kept
    on.backend.evaluate(tasks[:1])
    monkeypatch.setattr(resident, "MOST_EDGES", int(2.5 * next(iter(kept.values())).edges))
    for one in (tasks[1], tasks[0], tasks[2]):
        assert on.difference(one).within(1e-11)
    assert list(kept) == [tasks[0].system, tasks[2].system]
    monkeypatch.setattr(resident, "MOST_EDGES", 1)
    assert on.difference(tasks[1]).within(1e-11)
    assert list(kept) == [tasks[1].system], "the last one stays, however large"


# --- passes that are replayed


def test_buckets_are_a_quarter_larger_from_one_to_the_next():
    sizes = sorted({padded(count) for count in range(300_000)})
    assert all(count <= padded(count) for count in range(3_000))
    assert all(1.1 < larger / smaller <= 1.25 for smaller, larger in itertools.pairwise(sizes))
    assert len(sizes) < 50


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_rows_are_mace_torchs_to_rounding(device, recording, architecture):
    on = OnDevice(device, architecture=ARCHITECTURES[architecture])
    for name, atoms in STRUCTURES.items():
        one = on.task(atoms)
        right = on.reference.evaluate([one])[0]
        for how in ("evaluated", "replayed"):
            result = on.backend.evaluate([one])[0]
            difference = compare(result, right)
            assert difference.within(5e-11), f"{name}, {how}: {difference}"
            np.testing.assert_allclose(result.energies, right.energies, rtol=0, atol=1e-11 * max(1, abs(right.energy)))
            np.testing.assert_array_equal(result.virial, result.virial.T)
    assert on.buckets > 2 and not on.backend.note


def test_rows_in_single_precision(device, recording):
    on = OnDevice(device, "float32")
    for name, atoms in STRUCTURES.items():
        one = on.task(atoms)
        for how in ("evaluated", "replayed"):
            difference = on.difference(one)
            assert difference.within(2e-5), f"{name}, {how}: {difference}"
    assert on.buckets > 2


def test_a_batch_is_its_parts(device, recording):
    on = OnDevice(device)
    tasks = [on.task(atoms) for atoms in STRUCTURES.values()]
    right = {id(one): on.reference.evaluate([one])[0] for one in tasks}
    for batch in [tasks, tasks[::-1], tasks[3:6], tasks[:1], tasks] * 2:
        for one, result in zip(batch, on.backend.evaluate(batch), strict=True):
            assert compare(result, right[id(one)]).within(5e-11)
    assert on.buckets > 1


def test_structures_of_many_sizes_share_a_bucket(device, recording):
    """What one leaves behind in it is nothing to the next."""
    on = OnDevice(device, small=True)
    atoms = [Atoms("Cu", pbc=False), STRUCTURES["molecule"], STRUCTURES["wire"], STRUCTURES["out of reach"]]
    tasks = [on.task(one) for one in atoms]
    for one in [*tasks, *tasks[::-1], *tasks]:
        assert on.difference(one).within(1e-11)
    assert on.buckets < len(tasks)


class NoCutoff(torch.nn.Module):
    """An envelope that leaves edges beyond the cutoff as they are, as networks with biases do."""

    def forward(self, lengths):
        return torch.ones_like(lengths)


def test_edges_in_the_skin_contribute_nothing_whatever_the_model_makes_of_them(recording):
    on = OnDevice("cpu", architecture=SMALL_MODEL)
    on.model.radial_embedding.cutoff_fn = NoCutoff()
    for name in ("alloy", "dense", "slab without a cell across"):
        one = on.task(STRUCTURES[name])
        edges = len(on.backend._residents.graphs([one])[0].edges)
        assert edges > len(Neighbours(4.5).graph([one], [one.system.pbc]).sender), "nothing is in the skin"
        for _ in range(2):
            assert on.difference(one).within(1e-11)
    assert on.buckets


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_trajectory_reuses_its_graph_and_is_replayed(device, recording, lists, dtype):
    on = OnDevice(device, dtype)
    one = on.task(STRUCTURES["alloy"])
    for step in range(50):
        one = moved(one, 0.02, step)
        on.backend.evaluate([one])
    assert on.difference(one).within(1e-11 if dtype == "float64" else 2e-5)
    assert len(lists) < 10
    assert on.buckets


class Passes:
    """Captures over a pass of our own: rows of zeros, unless told otherwise."""

    def __init__(self):
        self.captures = Captures(self.evaluate, 1e-6)
        self.fail = lambda: None
        self.off, self.evaluated, self.recorded = 0.0, 0, 0

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
    assert not any(passes.replayed(captured.LARGEST + 1) for _ in range(20)), "too large for launches to matter"


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


def test_a_replay_that_has_positions_baked_in_is_found(recording, monkeypatch):
    def once_and_for_all(_recorder, function):
        rows = function()
        return lambda: rows

    monkeypatch.setattr(captured.Recorder, "record", once_and_for_all)
    on = OnDevice("cpu", small=True)
    one = on.task(STRUCTURES["alloy"])
    for _ in range(2):
        assert on.difference(one).within(1e-11)
    assert "replayed, it differs by" in on.backend.note and not on.buckets


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


def test_memory_that_lacks_while_recording_is_no_failure(monkeypatch):
    monkeypatch.setattr(captured, "WORTHWHILE", FAR)
    passes, lacking = Passes(), RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    for fail in (raising(lacking), raising_at_the_end(lacking, RuntimeError("CUDA error: previous error"))) * 2:
        passes.fail = fail
        assert not any(passes.replayed(10) for _ in range(7))
        assert not passes.captures.note
    passes.fail = lambda: None
    assert any(passes.replayed(10) for _ in range(20)), "it is tried again"


def test_a_pass_that_lacks_memory_gives_back_all_that_is_kept(recording, monkeypatch):
    on = OnDevice("cpu", small=True)
    one = on.task(STRUCTURES["alloy"])
    for _ in range(2):
        on.backend.evaluate([one])
    assert on.buckets and len(on.backend._residents._kept)
    with monkeypatch.context() as patch:
        patch.setattr(on.backend._captures, "rows", lambda *_: raising(RuntimeError("CUDA out of memory."))())
        with pytest.raises(MemoryError):
            guarded(on.backend.evaluate, [one])
    assert not on.buckets and not on.backend._residents._kept
    assert on.difference(one).within(1e-11)


def test_what_a_backend_has_to_say_is_said_of_the_model(recording):
    on = OnDevice("cpu", small=True)
    on.backend._captures._evaluate = lambda *_: raising(RuntimeError("no such kernel"))()
    spec = ModelSpec("test", "mace", "cpu", "float64")
    of = MaceEngine(on.model, spec, on.reference, on.backend, "not accelerated further: for a reason")
    assert of.info.note.startswith("not accelerated further: for a reason; ")
    assert "no such kernel" in of.info.note
    before = of.info
    one = task(of, STRUCTURES["alloy"])
    assert [of.evaluate([one])[0].backend for _ in range(3)] == ["mace-torch", "by edges", "by edges"]
    assert of.info is before or "no such kernel" in of.info.note
