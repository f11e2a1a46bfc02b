"""Neighbour lists that are made on the device: those that the host makes, and made there only where that is faster."""

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_mace_backends import AWKWARD, STRUCTURES, engine, medium, task  # noqa: E402

from rootstockd.worker.engines.mace import device_lists  # noqa: E402
from rootstockd.worker.engines.mace.device_lists import DeviceNeighbours, Lists  # noqa: E402
from rootstockd.worker.engines.mace.gathering import manageable  # noqa: E402
from rootstockd.worker.engines.mace.neighbours import Neighbours  # noqa: E402

CUTOFF = 4.5
ON_GPU = [pytest.mark.gpu, pytest.mark.may_leak("CUDA keeps descriptors for the whole process")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request):
    return torch.device(request.param)


def rows(edges, shifts, cell):
    """Receiver, sender and the image of each edge, in one order whatever theirs is."""
    edges, shifts = np.asarray(edges), np.asarray(shifts)
    assert (np.diff(edges[:, 1]) >= 0).all(), "sorted by receiver"
    images = np.rint(shifts @ np.linalg.inv(cell)).astype(np.int64)
    np.testing.assert_allclose(images @ cell, shifts, atol=1e-9)
    found = np.concatenate([edges[:, ::-1], images], 1)
    return found[np.lexsort(found.T[::-1])]


def of_the_host(cell, positions, cutoff=CUTOFF):
    receiver, sender, shifts = Neighbours(cutoff).lasting(cell, positions)
    return rows(np.stack([sender, receiver], 1), shifts, cell)


def compare(device, cell, positions, pbc, cutoff=CUTOFF):
    cell, positions = manageable(cell, positions, pbc, cutoff)
    found = DeviceNeighbours(cutoff, device).lasting(cell, positions)
    right = of_the_host(cell, positions, cutoff)
    np.testing.assert_array_equal(rows(*(part.cpu() for part in found), cell), right)


@pytest.mark.parametrize("name", [*STRUCTURES, *AWKWARD])
def test_they_are_those_of_the_host(device, name):
    one = task(engine(medium()), {**STRUCTURES, **AWKWARD}[name])
    compare(device, one.cell, one.positions, one.system.pbc)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    atoms=st.integers(1, 60),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    size=st.floats(1.0, 12.0),
    left_handed=st.booleans(),
    cutoff=st.floats(0.5, 6.0),
)
def test_they_are_those_of_the_host_whatever_the_cell(seed, atoms, pbc, size, left_handed, cutoff):
    rng = np.random.default_rng(seed)
    cell = size * (np.eye(3) + 0.5 * rng.uniform(-1, 1, (3, 3)))
    if abs(np.linalg.det(cell)) < 0.05 * size**3:
        cell = size * np.eye(3)
    if left_handed:
        cell[0] *= -1
    positions = rng.uniform(-2, 3, (atoms, 3)) @ cell
    compare(torch.device("cpu"), cell, positions, pbc, cutoff)


def test_they_are_made_part_by_part_where_there_are_many_pairs(device, monkeypatch):
    one = task(engine(medium()), STRUCTURES["alloy"])
    monkeypatch.setattr(device_lists, "CANDIDATES", 1_000)
    compare(device, one.cell, one.positions, one.system.pbc)


def wrongly(make):
    """One edge is lost: the shortest, and not the way back."""

    def made(self, cell, positions):
        edges, shifts = make(self, cell, positions)
        there = torch.from_numpy(positions).to(shifts.device)
        lengths = (there[edges[:, 1]] - there[edges[:, 0]] + shifts).square().sum(1)
        kept = torch.arange(len(edges), device=edges.device) != lengths.argmin()
        return edges[kept], shifts[kept]

    return made


def failing(_make):
    def made(self, cell, positions):
        raise RuntimeError("no kernel image is available for execution on the device")

    return made


@pytest.mark.parametrize(("fault", "words"), [(wrongly, "are off by"), (failing, "no kernel image")])
def test_one_that_is_wrong_is_noticed_and_the_host_makes_them(device, fault, words, monkeypatch, caplog):
    one = task(engine(medium()), STRUCTURES["alloy"])
    monkeypatch.setattr(DeviceNeighbours, "lasting", fault(DeviceNeighbours.lasting))
    lists = Lists(CUTOFF, device)
    cell, positions = manageable(one.cell, one.positions, one.system.pbc, CUTOFF)
    right = of_the_host(cell, positions)
    for _ in range(3):
        found = lists.edges(one)
        assert found[0].device.type == device.type
        np.testing.assert_array_equal(rows(*(part.cpu() for part in found), cell), right)
    (record,) = caplog.records
    assert "made on the host" in record.message and words in record.message


@pytest.mark.parametrize("slow", [DeviceNeighbours, Neighbours])
def test_the_faster_one_makes_them(device, slow, monkeypatch):
    one = task(engine(medium()), STRUCTURES["alloy"])
    made = []
    for kind in (DeviceNeighbours, Neighbours):

        def noted(self, *arguments, kind=kind, make=kind.lasting):
            made.append(kind)
            if kind is slow:
                time.sleep(0.3)
            return make(self, *arguments)

        monkeypatch.setattr(kind, "lasting", noted)
    lists = Lists(CUTOFF, device)
    for _ in range(4):
        lists.edges(one)
    assert made[4:] == [kind for kind in (DeviceNeighbours, Neighbours) if kind is not slow] * 3


def test_where_memory_lacks_the_host_makes_those_of_that_size(device, monkeypatch, caplog):
    """Which needs none of the device's; nobody hears of it."""

    def exhausted(self, cell, positions):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    one = task(engine(medium()), STRUCTURES["alloy"])
    count = len(Neighbours(CUTOFF).edges(one, one.system.pbc).sender)
    known, new = Lists(CUTOFF, device), Lists(CUTOFF, device)
    known._faster[len(one.positions).bit_length()] = True
    monkeypatch.setattr(DeviceNeighbours, "lasting", exhausted)
    for lists in (known, new, new):
        assert len(lists.edges(one)[0]) == count
    assert not caplog.records
