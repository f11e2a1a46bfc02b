"""MACE on a device: graphs that stay there, and passes that are replayed. The same code on a CPU and on a GPU."""

import importlib
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from ase import Atoms  # noqa: E402
from ase.build import bulk  # noqa: E402
from test_mace_backends import ARCHITECTURES, STRUCTURES, cutoffs_of, engine, make_model, task, within  # noqa: E402
from test_mace_replays import raising, record_at_once  # noqa: E402

from rootstockd.worker.engines import ModelSpec, Task, guarded  # noqa: E402
from rootstockd.worker.engines.differences import compare  # noqa: E402
from rootstockd.worker.engines.mace import MaceEngine, begin_cuda, captured, selection  # noqa: E402
from rootstockd.worker.engines.mace import device as on_device  # noqa: E402
from rootstockd.worker.engines.mace.budget import Size  # noqa: E402
from rootstockd.worker.engines.mace.device import DeviceBackend  # noqa: E402
from rootstockd.worker.engines.mace.device_lists import Lists  # noqa: E402
from rootstockd.worker.engines.mace.neighbours import Neighbours  # noqa: E402
from rootstockd.worker.engines.mace.reference import ReferenceBackend  # noqa: E402
from rootstockd.worker.engines.mace.skin import SMALL, STEADY, UNUSED, WIDTH  # noqa: E402

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
    record_at_once(monkeypatch)


@pytest.fixture
def lists(monkeypatch):
    """The cutoffs of all neighbour lists that are made."""
    return cutoffs_of(monkeypatch, Lists, "edges")


@cache
def model_on(device, dtype, small):
    made = make_model(dtype=getattr(torch, dtype), **(SMALL_MODEL if small else {})).to(device)
    return made.requires_grad_(False)


class OnDevice:
    """A model, the reference on the CPU, and the backend on the device."""

    def __init__(self, device, dtype="float64", small=False, architecture=None):
        torch.set_default_dtype(getattr(torch, dtype))
        if device != "cpu":
            begin_cuda("test")
        if architecture is None:
            self.model, there = (model_on(where, dtype, small) for where in ("cpu", device))
        else:
            self.model = there = make_model(**architecture)
            if device != "cpu":
                there = make_model(**architecture).to(device)
        self.of = engine(self.model, dtype)
        self.reference = ReferenceBackend(self.model, "cpu")
        self.backend = DeviceBackend(there.requires_grad_(False), "by edges")

    def task(self, atoms, session=None, head=None):
        return task(self.of, atoms, session, head=head or self.model.heads[-1])

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


# --- graphs that stay


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
    monkeypatch.setattr(on.backend._residents, "most", int(2.5 * len(next(iter(kept.values())))))
    for one in (tasks[1], tasks[0], tasks[2]):
        assert on.difference(one).within(1e-11)
    assert list(kept) == [tasks[0].system, tasks[2].system]
    monkeypatch.setattr(on.backend._residents, "most", 1)
    assert on.difference(tasks[1]).within(1e-11)
    assert list(kept) == [tasks[1].system], "the last one stays, however large"


# --- passes that are replayed


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_rows_are_mace_torchs_to_rounding(device, recording, architecture):
    on = OnDevice(device, architecture=ARCHITECTURES[architecture])
    for name, atoms in STRUCTURES.items():
        one = on.task(atoms)
        right = on.reference.evaluate([one])[0]
        for how in ("evaluated", "replayed"):
            result = on.backend.evaluate([one])[0]
            difference = compare(result, right)
            assert within(difference, 5e-11), f"{name}, {how}: {difference}"
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
    """Of any sizes, and for any heads."""
    on = OnDevice(device, architecture=ARCHITECTURES["two heads"])
    tasks = [on.task(atoms, head=head) for atoms in STRUCTURES.values() for head in on.model.heads]
    right = {id(one): on.reference.evaluate([one])[0] for one in tasks}
    for batch in [tasks, tasks[::-1], tasks[3:6], tasks[:1], tasks] * 2:
        for one, result in zip(batch, on.backend.evaluate(batch), strict=True):
            assert compare(result, right[id(one)]).within(5e-11)
    assert on.buckets > 1


def test_a_large_batch_is_evaluated_in_passes_that_fit_and_not_replayed(device, recording, monkeypatch):
    monkeypatch.setattr(on_device, "REPLAYED", 10)
    on = OnDevice(device, small=True)
    tasks = [on.task(STRUCTURES[name]) for name in ("alloy", "dense", "molecule", "dense")]
    on.backend._packing._budget.learn(Size(20, 3_000), 2**50)
    passes = noting_passes(on, monkeypatch)
    for _ in range(3):
        for one, result in zip(tasks, on.backend.evaluate(tasks), strict=True):
            assert compare(result, on.reference.evaluate([one])[0]).within(1e-11)
    assert sum(passes) == 3 * len(tasks) and len(passes) > 3
    assert not on.buckets


class Memory:
    """A device's with so many bytes free, of which a pass takes some for each atom; counts its measurements."""

    def __init__(self, free, taken):
        self._free, self._taken, self.measured = free, taken, 0

    def free(self):
        return self._free

    def begin(self):
        self.measured += 1

    def taken(self):
        return self._taken


def noting_passes(on, monkeypatch):
    """The structures in each pass from now on."""
    passes, one_pass = [], on.backend._one_pass
    monkeypatch.setattr(
        on.backend, "_one_pass", lambda tasks, *rest: passes.append(len(tasks)) or one_pass(tasks, *rest)
    )
    return passes


def test_small_passes_teach_what_a_larger_one_takes(device, recording, monkeypatch, caplog):
    """The first that is much larger may take half of what is free, and what is replayed is not measured."""
    on = OnDevice(device, small=True)
    memory = on.backend._packing._memory = Memory(free=2**30, taken=2**26)
    on.backend._packing._held = lambda: 0  # what a GPU has of replays is no part of the sum below
    tasks = [on.task(STRUCTURES["dense"]) for _ in range(24)]
    on.backend.evaluate(tasks[:1])
    assert memory.measured == 1
    for one in tasks[:3] * 2:
        on.backend.evaluate([one])
    assert on.buckets == 1 and memory.measured == 1, "in the steady state nothing is"
    passes = noting_passes(on, monkeypatch)
    memory._taken *= 8
    for one, result in zip(tasks, on.backend.evaluate(tasks), strict=True):
        assert compare(result, on.reference.evaluate([one])[0]).within(1e-11)
    assert passes == [8, 10, 6], "the second is no longer much larger than any before, and may take 80 %"
    assert "24 structures" in caplog.text and "took 3 passes" in caplog.text


def test_a_replay_has_its_memory_already(device, recording, monkeypatch):
    """Where others have taken the rest it is not split into passes that have none."""
    on = OnDevice(device, small=True)
    memory = on.backend._packing._memory = Memory(free=2**32, taken=2**26)
    tasks = [on.task(STRUCTURES["dense"]) for _ in range(4)]
    for _ in range(2):
        on.backend.evaluate(tasks)
    passes = noting_passes(on, monkeypatch)
    memory._free = 0
    on.backend.evaluate(tasks)
    on.backend.evaluate(tasks[:2])
    assert passes == [4, 1, 1]


def test_what_would_keep_much_of_the_memory_is_not_recorded(device, recording):
    on = OnDevice(device, small=True)
    memory = on.backend._packing._memory = Memory(free=2**30, taken=2**29)
    one = on.task(STRUCTURES["dense"])
    for _ in range(3):
        on.backend.evaluate([one])
    assert not on.buckets
    memory._free = 2**31
    on.backend.evaluate([one])
    assert on.buckets


def test_as_many_jobs_as_the_goals_have_are_replayed(recording):
    on = OnDevice("cpu", small=True)
    shapes = {captured._shape(Size(64 * jobs, 64 * 80 * jobs)) for jobs in range(1, 33)}
    assert 2 * len(shapes) <= captured.MOST
    jobs = [on.task(bulk("Cu", cubic=True) * (2, 2, 4)) for _ in range(32)]
    for _ in range(2):
        on.backend.evaluate(jobs)
    assert on.backend._captures.have(Size(2_048, sum(map(len, on.backend._graphs))))


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
        edges = len(on.backend._residents.lists([one])[0])
        assert edges > len(Neighbours(4.5).edges(one, one.system.pbc).sender), "nothing is in the skin"
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


def test_heads_are_masked_without_the_host(monkeypatch):
    blocks = importlib.import_module("mace.modules.blocks")
    on = OnDevice("cpu", architecture=ARCHITECTURES["two heads"])
    one = on.task(STRUCTURES["alloy"])
    right = on.reference.evaluate([one])[0]
    usual = raising(AssertionError("mace-torch's own mask was used"))
    monkeypatch.setattr(blocks, "mask_head", lambda *_: usual())
    before = blocks.mask_head
    assert compare(on.backend.evaluate([one])[0], right).within(1e-11)
    assert blocks.mask_head is before, "the reference is mace-torch's own"


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


@pytest.mark.parametrize("when", ["at loading", "later"])
def test_what_a_backend_has_to_say_is_said_of_the_model(recording, when):
    on = OnDevice("cpu", small=True)

    def fail(*_):
        raise RuntimeError("no such kernel")

    if when == "at loading":
        on.backend._captures._evaluate = fail
    spec = ModelSpec("test", "mace", "cpu", "float64")
    of = MaceEngine(on.model, spec, on.reference, [on.backend], "not accelerated further: for a reason")
    before = of.info
    assert ("no such kernel" in before.note) == (when == "at loading")
    on.backend._captures._evaluate = fail
    one = task(of, STRUCTURES["alloy"])
    assert [of.evaluate([one])[0].backend for _ in range(3)] == ["mace-torch", "by edges", "by edges"]
    assert (of.info is before) == (when == "at loading"), "another object if, and only if, it says something else"
    assert of.info.note.startswith("not accelerated further: for a reason; ")
    assert "no such kernel" in of.info.note


def test_for_a_gpu_backends_are_timed_as_they_replay(device, monkeypatch):
    monkeypatch.setattr(captured, "WORTHWHILE", float("inf"))
    on = OnDevice(device, small=True)
    both = [on.backend, DeviceBackend(on.backend._model, "another")]
    seen = []

    def part_of(*_):
        seen.extend(tuple(graph.attributes.shape[0] for graph in one._graphs) for one in both)
        seen.extend(len(one._captures._buckets) for one in both)
        return 1.0

    monkeypatch.setattr(selection, "part_of", part_of)
    elements = [int(z) for z in on.model.atomic_numbers]
    chosen = selection.Selection(ModelSpec("test", "mace", "cuda", "float64"), on.reference, elements, ["Default"])
    assert chosen.best(both) == (on.backend, [])
    assert seen == [(64,), (64,), 1, 1]
    assert not any(one._graphs or one._captures._buckets for one in both)
