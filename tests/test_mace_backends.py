"""The fused MACE against mace-torch in this process: many architectures, many structures, and no belief."""

import dataclasses
import importlib
import itertools
import logging
import re
import sys
import types
import warnings
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from ase import Atoms  # noqa: E402
from ase.build import bulk, fcc111, molecule  # noqa: E402
from ase.cluster import Octahedron  # noqa: E402
from ase.geometry import wrap_positions  # noqa: E402
from ase.neighborlist import neighbor_list  # noqa: E402

from rootstockd.worker import stages  # noqa: E402
from rootstockd.worker.engines import EngineError, ModelSpec, Result, System, Task  # noqa: E402
from rootstockd.worker.engines import mace as mace_engine  # noqa: E402
from rootstockd.worker.engines.differences import LARGEST_FORCE, TOLERANCE, Difference, compare  # noqa: E402
from rootstockd.worker.engines.mace import TRIES, MaceEngine, checks, radial, selection, timing  # noqa: E402
from rootstockd.worker.engines.mace.budget import Size  # noqa: E402
from rootstockd.worker.engines.mace.candidates import NotApplicableError, backends_for  # noqa: E402
from rootstockd.worker.engines.mace.edges import EdgeBackend  # noqa: E402
from rootstockd.worker.engines.mace.folding import from_e3nn  # noqa: E402
from rootstockd.worker.engines.mace.fused import FusedBackend  # noqa: E402
from rootstockd.worker.engines.mace.graph import Graph, union  # noqa: E402
from rootstockd.worker.engines.mace.interactions import Gate  # noqa: E402
from rootstockd.worker.engines.mace.neighbours import Neighbours  # noqa: E402
from rootstockd.worker.engines.mace.passes import Elements, Harmonics, Pass  # noqa: E402
from rootstockd.worker.engines.mace.radial import SHORTEST  # noqa: E402
from rootstockd.worker.engines.mace.reference import ReferenceBackend  # noqa: E402

ELEMENTS = [1, 6, 8, 13, 29]

GATED = "RealAgnosticResidualNonLinearInteractionBlock"
ARCHITECTURES = {
    "as MACE-MP-0 medium": {},
    "as MACE-MP-0 small": {"hidden": "8x0e"},
    "large": {"hidden": "8x0e + 8x1o + 8x2e"},
    "density, as the embedded model": {
        "first": "RealAgnosticDensityInteractionBlock",
        "block": "RealAgnosticDensityResidualInteractionBlock",
    },
    "not residual first": {"first": "RealAgnosticInteractionBlock"},
    "one layer": {"num_interactions": 1, "hidden": "8x0e"},
    "three layers, low order": {"num_interactions": 3, "correlation": 2, "max_ell": 2},
    "correlation 1": {"correlation": 1},
    "two heads": {"heads": ["one", "other"], "energies": [[1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0.25, 0.0, -1.0, -2.0]]},
    "repulsion and Agnesi": {"pair_repulsion": True, "distance_transform": "Agnesi"},
    "without shift": {"plain": True},
    "gated": {"first": GATED, "block": GATED, "edge_irreps": "8x0e + 8x1o"},
    "gated, with all options": {
        "first": GATED,
        "block": GATED,
        "edge_irreps": "4x0e + 4x1o + 4x2e",
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "use_last_readout_only": True,
        "use_reduced_cg": True,
        "apply_cutoff": False,
        "distance_transform": "Agnesi",
        "heads": ["one", "other"],
        "energies": [[1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0.25, 0.0, -1.0, -2.0]],
    },
}

CHARGED = {
    "hidden": "8x0e",
    "embedding_specs": {
        "total_charge": {"type": "categorical", "per": "graph", "num_classes": 9, "offset": 4, "emb_dim": 4},
        "total_spin": {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 4},
    },
}
"""A model that looks at charge and spin."""


def make_model(
    hidden="8x0e + 8x1o",
    first="RealAgnosticResidualInteractionBlock",
    block="RealAgnosticResidualInteractionBlock",
    energies=(1.0, 2.0, 3.0, 4.0, 5.0),
    plain=False,
    dtype=torch.float64,
    **options,
):
    """A small MACE with seeded random weights."""
    modules = importlib.import_module("mace.modules")
    o3 = importlib.import_module("e3nn.o3")
    torch.manual_seed(7)
    torch.set_default_dtype(dtype)
    fields = {
        "r_max": 4.5,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 3,
        "interaction_cls": modules.interaction_classes[block],
        "interaction_cls_first": modules.interaction_classes[first],
        "num_interactions": 2,
        "num_elements": len(ELEMENTS),
        "hidden_irreps": o3.Irreps(hidden),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.array(energies),
        "avg_num_neighbors": 8.0,
        "atomic_numbers": ELEMENTS,
        "correlation": 3,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8, 8],
        **options,
    }
    if "edge_irreps" in fields:
        fields["edge_irreps"] = o3.Irreps(fields["edge_irreps"])
    heads = len(fields.get("heads", ["Default"]))
    scale, shift = ([20.0, 15.0], [0.1, 0.3]) if heads > 1 else (20.0, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit, which e3nn uses
        if plain:
            return modules.MACE(**fields)
        model = modules.ScaleShiftMACE(atomic_inter_scale=scale, atomic_inter_shift=shift, **fields)
    for interaction in model.interactions if block == GATED else ():  # which begin as if they had no elements
        with torch.no_grad():
            interaction.alpha.fill_(3.0)
            interaction.beta.fill_(0.7)
            interaction.source_embedding.weight.normal_()
            interaction.target_embedding.weight.normal_()
    return model


def write_model(path, **architecture):
    """One of `make_model`, as a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        torch.save(make_model(**architecture), path)
    torch.set_default_dtype(torch.float32)
    return path


def engine(model, dtype="float64"):
    return MaceEngine(model, ModelSpec("test", "mace", "cpu", dtype), ReferenceBackend(model, "cpu"), [])


def by_edges(model):
    return EdgeBackend(model, "edges")


def structures() -> dict[str, Atoms]:
    rng = np.random.default_rng(3)
    alloy = bulk("Cu", cubic=True) * (2, 2, 1)
    alloy.numbers[::3] = 13
    slab = fcc111("Al", (2, 2, 2), vacuum=6.0, periodic=False)
    slab.pbc = (True, True, False)
    wire = Atoms("CuAlO", [[0, 0, 0], [1.7, 0.2, 0], [3.1, -0.3, 0.1]], cell=[5, 0, 0], pbc=(True, False, False))
    left = bulk("Cu", cubic=True)
    left.set_cell(left.cell.array @ [[1.0, 0.05, -0.1], [0.08, 1.02, 0.03], [-0.02, 0.06, 0.97]], scale_atoms=True)
    left.set_cell(left.cell.array[[1, 0, 2]])
    found = {
        "one atom in a small cell": bulk("Cu"),
        "alloy": alloy,
        "slab without a cell across": slab,
        "wire": wire,
        "molecule": molecule("CH3CH2OH"),
        "left-handed": left,
        "an atom alone": Atoms("O"),
        "out of reach": Atoms("O2", [[0, 0, 0], [0, 0, 9.0]]),
        "dense": bulk("C", "diamond", 3.0, cubic=True),
    }
    for atoms in found.values():
        atoms.positions += rng.uniform(-0.05, 0.05, atoms.positions.shape)
    return found


STRUCTURES = structures()


sessions = itertools.count()


def task(of: MaceEngine, atoms: Atoms, session=None, **options) -> Task:
    """A structure of a session, by default of a new one."""
    pbc = tuple(bool(p) for p in atoms.pbc)
    session = next(sessions) if session is None else session
    system = of.prepare(System(atoms.numbers, pbc, session=session, **options))
    return Task(system, atoms.cell.array, atoms.positions, stress=True, energies=True)


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@cache
def made(dtype):
    return make_model(dtype=dtype)


def medium(dtype="float64"):
    """The model of most tests; as in a worker, torch's default is its dtype."""
    model = made(getattr(torch, dtype))
    torch.set_default_dtype(getattr(torch, dtype))
    return model


def within(difference, tolerance):
    """Also of the forces of a million eV/Å that random weights may make."""
    return difference.within(tolerance * max(1.0, difference.largest / LARGEST_FORCE))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backends_are_mace_torch_to_rounding(architecture):
    model = make_model(**ARCHITECTURES[architecture])
    of, reference = engine(model), ReferenceBackend(model, "cpu")
    backends = [FusedBackend(model), EdgeBackend(model, "edges")]
    largest = 0.0
    for name, atoms in STRUCTURES.items():
        one = task(of, atoms, head=model.heads[-1])
        right = reference.evaluate([one])[0]
        for backend in backends:
            result = backend.evaluate([one])[0]
            assert result.backend == backend.name
            difference = compare(result, right)
            assert within(difference, 5e-11), f"{backend.name}, {name}: {difference}"
            np.testing.assert_allclose(result.energies, right.energies, rtol=0, atol=1e-11 * max(1, abs(right.energy)))
            np.testing.assert_array_equal(result.virial, result.virial.T)
        largest = max(largest, np.abs(right.forces).max())
    assert largest > 0.05, "forces too small to be worth comparing"


@pytest.mark.parametrize("backend", [FusedBackend, by_edges])
def test_backends_in_single_precision(backend):
    model = medium("float32")
    of, reference, fast = engine(model, "float32"), ReferenceBackend(model, "cpu"), backend(model)
    for name, atoms in STRUCTURES.items():
        one = task(of, atoms)
        difference = compare(fast.evaluate([one])[0], reference.evaluate([one])[0])
        assert difference.within(2e-5), f"{name}: {difference}"


@pytest.mark.parametrize("backend", [FusedBackend, by_edges])
def test_a_batch_is_its_parts(backend):
    """Of any sizes, and for any heads."""
    model = make_model(**ARCHITECTURES["two heads"])
    of, fused = engine(model), backend(model)
    tasks = [task(of, atoms, head=head) for atoms in STRUCTURES.values() for head in model.heads]
    for order in (tasks, tasks[::-1], tasks[3:6]):
        for alone, together in zip([fused.evaluate([one])[0] for one in order], fused.evaluate(order), strict=True):
            assert compare(together, alone).within(1e-12)
            assert together.forces.shape == alone.forces.shape


@pytest.mark.parametrize("make", [FusedBackend, by_edges])
def test_what_fits_is_one_pass_and_what_does_not_several_with_the_same_numbers(make, monkeypatch):
    model = medium()
    of, backend = engine(model), make(model)
    passes, derive = [], backend._derive

    def counted(graph, *others):
        passes.append(len(graph.ends))
        return derive(graph, *others)

    monkeypatch.setattr(backend, "_derive", counted)
    tasks = [task(of, atoms) for atoms in STRUCTURES.values()]
    for one in tasks:
        backend.evaluate([one])
    del passes[:]
    whole = backend.evaluate(tasks)
    assert passes == [len(tasks)]
    backend._packing._budget.back_off(Size(sum(len(one.positions) for one in tasks), 10_000))
    parts = backend.evaluate(tasks)
    assert len(passes) > 2 and sum(passes[1:]) == len(tasks)
    for found, right in zip(parts, whole, strict=True):
        assert compare(found, right).within(1e-11)


def test_charge_and_spin_are_taken_as_mace_torchs_calculator_takes_them():
    model = make_model(**CHARGED)
    of, theirs = engine(model), own_calculator(model)
    tasks, right = [], []
    for charge, spin in itertools.product((None, -1.0, 2.0), (None, 2.0, 3.0)):
        atoms = STRUCTURES["molecule"].copy()
        tasks.append(task(of, atoms, charge=charge, spin=spin))
        atoms.info = {key: value for key, value in (("charge", charge), ("spin", spin)) if value is not None}
        atoms.calc = theirs
        right.append((atoms.get_potential_energy(), atoms.get_forces()))
    assert len({round(energy, 6) for energy, _ in right}) == len(right)
    alone = [of.evaluate([one])[0] for one in tasks]
    for results in (alone, of.evaluate(tasks)):
        for result, (energy, forces) in zip(results, right, strict=True):
            assert result.energy == pytest.approx(energy, abs=1e-9)
            np.testing.assert_allclose(result.forces, forces, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("charge", "spin"), [(0.999999, None), (-1.000001, None), (0.5, None), (1000.0, None)])
def test_a_charge_that_the_model_has_no_category_for_is_refused(charge, spin):
    """mace-torch takes the one below."""
    of = engine(make_model(**CHARGED))
    with pytest.raises(EngineError, match="knows whole numbers from") as caught:
        task(of, STRUCTURES["molecule"], charge=charge, spin=spin)
    assert caught.value.code == "unsupported"


def own_calculator(model):
    """What mace-torch offers its users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("mace.calculators").MACECalculator(
            models=model, device="cpu", default_dtype="float64"
        )


def test_forces_and_virial_are_slopes_of_the_energy():
    model = medium()
    of, fused = engine(model), FusedBackend(model)
    atoms = STRUCTURES["alloy"]
    result = fused.evaluate([task(of, atoms)])[0]

    def energy(positions, cell):
        moved = Atoms(atoms.numbers, positions, cell=cell, pbc=True)
        return fused.evaluate([task(of, moved)])[0].energy

    step, cell = 1e-4, atoms.cell.array
    for atom, axis in itertools.product((0, 5), range(3)):
        shift = np.zeros_like(atoms.positions)
        shift[atom, axis] = step
        slope = (energy(atoms.positions + shift, cell) - energy(atoms.positions - shift, cell)) / (2 * step)
        assert result.forces[atom, axis] == pytest.approx(-slope, rel=1e-6, abs=1e-6)
    for i, j in itertools.product(range(3), repeat=2):
        strain = np.zeros((3, 3))
        strain[i, j] += step / 2
        strain[j, i] += step / 2
        up, down = np.eye(3) + strain, np.eye(3) - strain
        slope = (energy(atoms.positions @ up, cell @ up) - energy(atoms.positions @ down, cell @ down)) / (2 * step)
        assert result.virial[i, j] == pytest.approx(-slope, rel=1e-6, abs=1e-6)


def test_gates_of_e3nn_are_understood_too():
    # models that older versions of mace-torch wrote have them
    o3, nn = importlib.import_module("e3nn.o3"), importlib.import_module("e3nn.nn")
    irreps = o3.Irreps("4x0e + 4x1o + 4x2e")
    torch.set_default_dtype(torch.float64)

    def e3nns(*functions):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit, which e3nn uses
            return nn.Gate("4x0e", [torch.nn.functional.silu], "4x0e + 4x0e", functions, "4x1o + 4x2e")

    gated = e3nns(torch.sigmoid, torch.sigmoid)
    mine = Gate(gated, irreps, 4, torch.float64)
    x = torch.randn((5, gated.irreps_in.dim), dtype=torch.float64, requires_grad=True)
    expected = gated(x)
    wanted = torch.randn_like(expected)
    (slope,) = torch.autograd.grad(expected, x, wanted)

    def rows(y):  # the scalars are rows of their own
        return torch.cat([y[:, :12].reshape(5, 3, 4), from_e3nn(y[:, 12:], irreps[1:])], 1).detach()

    now = types.SimpleNamespace(kept={})
    torch.testing.assert_close(mine.forward(rows(x), now), from_e3nn(expected, irreps), rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.backward(from_e3nn(wanted, irreps), now), rows(slope), rtol=0, atol=1e-12)
    for functions in ([torch.tanh, torch.tanh], [torch.sigmoid, torch.tanh]):
        with pytest.raises(NotApplicableError, match="a gate that differs"):
            Gate(e3nns(*functions), irreps, 4, torch.float64)


@pytest.mark.parametrize("change", [{"correlation": 4, "max_ell": 1, "hidden": "2x0e"}])
def test_what_is_not_folded_is_evaluated_by_edges(change, monkeypatch):
    model = make_model(**change)
    with pytest.raises(NotApplicableError):
        FusedBackend(model)
    (fast,), why = backends_for(model, ModelSpec("test", "mace", "cpu", "float64"))
    assert isinstance(fast, EdgeBackend) and not isinstance(fast, FusedBackend)
    assert "symmetric contraction" in why
    of, reference = engine(model), ReferenceBackend(model, "cpu")
    one = task(of, STRUCTURES["alloy"])
    assert compare(fast.evaluate([one])[0], reference.evaluate([one])[0]).within(5e-11)
    monkeypatch.setitem(sys.modules, "numba", None)  # as in an environment without it
    monkeypatch.delitem(sys.modules, EdgeBackend.__module__)
    monkeypatch.delitem(sys.modules, Neighbours.__module__)
    assert backends_for(model, ModelSpec("test", "mace", "cpu", "float64"))[0] == []


@pytest.mark.parametrize("normalization", ["component", "integral"])
def test_harmonics_and_their_slopes_are_those_of_e3nn(normalization):
    o3 = importlib.import_module("e3nn.o3")
    irreps = o3.Irreps.spherical_harmonics(5)
    module = o3.SphericalHarmonics(irreps, normalize=True, normalization=normalization)
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(150, 3)) * rng.uniform(0.3, 9.0, (150, 1))  # more than one block of them
    graph = Graph(np.zeros(150, int), np.zeros(150, int), vectors, np.array([0, 150]), np.array([1]))
    now = Pass(graph, Elements(np.zeros(1, int)), Harmonics(module), np.float64)
    leaf = torch.from_numpy(vectors).requires_grad_()
    right, lengths = module(leaf), torch.linalg.vector_norm(leaf, dim=1)
    np.testing.assert_allclose(now.y, right.detach(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(now.lengths, lengths.detach(), rtol=1e-15)
    now.by_y[:] = rng.normal(size=now.y.shape)
    now.by_length[:] = rng.normal(size=150)
    total = (right * torch.from_numpy(now.by_y)).sum() + (lengths * torch.from_numpy(now.by_length)).sum()
    (slope,) = torch.autograd.grad(total, leaf)
    np.testing.assert_allclose(now.by_vectors(), slope, rtol=0, atol=1e-12 * np.abs(slope.numpy()).max())


def test_harmonics_of_vectors_that_are_not_normalized_are_refused():
    o3 = importlib.import_module("e3nn.o3")
    with pytest.raises(NotApplicableError, match="not normalized"):
        Harmonics(o3.SphericalHarmonics([0, 1], normalize=False))


def test_atoms_on_one_spot_have_no_forces():
    model = medium()
    coincident = Atoms("Cu3", [[0, 0, 0], [0, 0, 0], [0, 0, 2.5]])
    assert not np.isfinite(FusedBackend(model).evaluate([task(engine(model), coincident)])[0].forces).all()


def test_a_model_with_further_inputs_is_refused():
    model = make_model(max_ell=1, hidden="2x0e")
    model.joint_embedding = torch.nn.Identity()
    with pytest.raises(NotApplicableError, match="inputs"):
        EdgeBackend(model, "edges")


def neighbours(atoms, cutoff=4.5):
    """Pairs and distances, by ASE."""
    i, j, d = neighbor_list("ijd", atoms, cutoff)
    return sorted(zip(i.tolist(), j.tolist(), d.round(6).tolist(), strict=True))


def cutoffs_of(monkeypatch, kind, name):
    """The cutoffs of those of a class whose method is called from now on, call by call."""
    cutoffs, method = [], getattr(kind, name)

    def noted(self, *arguments):
        cutoffs.append(self._cutoff)
        return method(self, *arguments)

    monkeypatch.setattr(kind, name, noted)
    return cutoffs


AWKWARD = {
    "flown off": Atoms("Cu3", [[0, 0, 0], [1e4, 0, 0], [3, 0, 0]]),
    "desorbed from a slab": Atoms("Cu2", [[0, 0, 0], [1, 1, 3e3]], cell=[5, 5, 0], pbc=(True, True, False)),
    "beside a wire": Atoms(
        "Cu3", [[0, 0, 0], [0, 40, 9], [0, 41, 9]], cell=[[3, 1, 0], [0] * 3, [0] * 3], pbc=(1, 0, 0)
    ),
    "skewed": Atoms("Cu2", [[0, 0, 0], [1, 1, 1]], cell=[[3, 0, 0], [50, 3, 0], [-40, 60, 3]], pbc=True),
    "skewed slab": Atoms("Cu", [[0, 0, 0]], cell=[[3, 0, 0], [40, 3, 0], [7, 7, 7]], pbc=(True, True, False)),
    "far from the origin": Atoms("Cu2", [[1e9, 0, 0], [1e9 + 2, 0, 0]]),
    "spread across a wire": Atoms(
        "Cu40", np.random.default_rng(0).uniform(-90, 90, (40, 3)) * [0.02, 1, 1], cell=[4, 0, 0], pbc=(1, 0, 0)
    ),
    "sheared by a lot": Atoms("Cu2", [[0, 0, 0], [2, 0, 0]], cell=[[4, 0, 0], [0, 4, 0], [0, 3000, 4]], pbc=True),
    "where mace-torch's own cell spans nothing": Atoms(
        "Cu2", [[0, 0, 0], [2, 1, 1]], cell=[[0, 4, 0], [5, 0, 0], [0, 0, 4]], pbc=(False, True, True)
    ),
    "far outside": Atoms("Cu2", [[500, 0, 0], [1, 1, -900]], cell=[4, 4, 4], pbc=True),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_cells_have_the_neighbours_that_ase_finds(name):
    atoms = AWKWARD[name]
    before = atoms.copy()
    one = task(engine(medium()), atoms)
    graph = union([Neighbours(4.5).edges(one, one.system.pbc)])
    lengths = np.linalg.norm(graph.vectors, axis=1).round(6)
    found = sorted(zip(graph.receiver.tolist(), graph.sender.tolist(), lengths.tolist(), strict=True))
    right = neighbours(atoms)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in right]
    np.testing.assert_allclose([pair[2] for pair in found], [pair[2] for pair in right], atol=2e-6)
    assert atoms == before, "what was handed in is left alone"


@pytest.mark.parametrize("far", [1e6, 1e9, 1e18, 1e200])
@pytest.mark.parametrize("pbc", [(False,) * 3, (True, True, False), (True, False, False)])
def test_an_atom_at_the_end_of_the_world_kills_nobody(far, pbc):
    atoms = Atoms("Cu3", [[0, 0, 0], [0.1, 0.2, far], [1, 2, 1]], cell=[5, 5, 5], pbc=pbc)
    one = task(engine(medium()), atoms)
    graph = union([Neighbours(4.5).edges(one, one.system.pbc)])
    assert (0, 2) in set(zip(graph.receiver.tolist(), graph.sender.tolist(), strict=True))
    assert not np.isin(graph.sender[graph.receiver == 1], [0, 2]).any()


@pytest.mark.parametrize("name", AWKWARD)
def test_the_reference_takes_awkward_structures_too(name):
    """The far-off ones used to take all memory: mace-torch has bins wherever an atom could be."""
    model = medium()
    of = task(engine(model), AWKWARD[name])
    assert compare(FusedBackend(model).evaluate([of])[0], ReferenceBackend(model, "cpu").evaluate([of])[0]).within(1e-8)


@pytest.mark.parametrize("far", [0.0, 40.0, 1e3, 1e6])
@pytest.mark.parametrize("name", ["alloy", "molecule", "slab without a cell across"])
def test_the_reference_loses_no_digits_far_from_the_origin(name, far):
    model = medium("float32")
    near = task(engine(model), STRUCTURES[name])
    there = dataclasses.replace(near, positions=near.positions + np.array([far, -far, 0.5 * far]))
    reference = ReferenceBackend(model, "cpu")
    assert compare(reference.evaluate([there])[0], reference.evaluate([near])[0]).within(1e-5)


def test_atoms_at_the_edge_of_a_gathered_structure_stay_together():
    """Across a boundary float32 would have the rounding of the cell's length for their distance."""
    rng = np.random.default_rng(2)
    pairs = rng.uniform(-35, 35, (40, 1, 3)) + rng.uniform(-0.8, 0.8, (40, 2, 3))
    spread = Atoms("Cu80", pairs.reshape(-1, 3))
    model = make_model(dtype=torch.float32)
    one = task(engine(model, "float32"), spread)
    found = ReferenceBackend(model, "cpu").evaluate([one])[0]
    torch.set_default_dtype(torch.float64)
    right = ReferenceBackend(model.double(), "cpu").evaluate([one])[0]
    assert compare(found, right).force < 3e-5, "and not 6e-5, as with one of them in another image"


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, True, False)])
@pytest.mark.parametrize("side", [200.0, 3e3, 1e6])
def test_the_reference_takes_vast_boxes(side, pbc):
    """mace-torch has bins for all that is empty in them, and then says that there is no memory for so many atoms."""
    model = medium()
    of = engine(model)
    cluster = Octahedron("Cu", 3, 1)
    cluster.rattle(0.1, seed=1)

    def in_box(length):
        cell = length * np.array([[1.0, 0.3, 0.0], [0.0, 1.0, 0.2], [0.1, 0.0, 1.0]])
        places = np.array([[0.0, 0.0, 0.0], [0.6, 0.5, 0.1]]) @ cell  # one lies across the faces of the cell
        positions = (cluster.positions + places[:, None]).reshape(-1, 3)
        numbers = np.tile(cluster.numbers, 2)
        return task(of, Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc))

    found, right = (ReferenceBackend(model, "cpu").evaluate([in_box(length)])[0] for length in (side, 60.0))
    assert compare(found, right).within(1e-8)
    assert compare(FusedBackend(model).evaluate([in_box(side)])[0], right).within(1e-8)


def test_of_a_crowded_structure_a_piece_is_compared():
    """mace-torch would take all memory for it: each of these has 4,000 neighbours, and more."""
    model = medium()
    of, rng = watched(model, FusedBackend(model)), np.random.default_rng(1)
    sizes, evaluate = [], of._reference.evaluate

    def noted(tasks):
        sizes.extend((len(one.positions), any(one.system.pbc)) for one in tasks)
        return evaluate(tasks)

    of._reference.evaluate = noted
    ordinary = bulk("Cu", cubic=True) * (3, 3, 3)
    for atoms, size in (
        (ordinary, (108, True)),
        (Atoms("Cu20", rng.uniform(0, 1.2, (20, 3)), cell=[1.2] * 3, pbc=True), (20, False)),
        (Atoms("Cu400", rng.uniform(0, 4, (400, 3))), (250, False)),
        (Atoms("Cu50", rng.uniform(0, 3, (50, 3))), (50, False)),
    ):
        sizes.clear()
        of.evaluate([task(of, atoms)])
        assert sizes == [size]


def test_a_wide_and_flat_cell():
    model = medium()
    of = engine(model)
    flat = task(of, Atoms("Cu2", [[0, 0, 0], [1, 1, 0.5]], cell=[3e3, 3e3, 2.0], pbc=True))
    smaller = dataclasses.replace(flat, cell=np.diag([20.0, 20.0, 2.0]))
    assert compare(FusedBackend(model).evaluate([flat])[0], of.evaluate([smaller])[0]).within(5e-11)


def agnesi(**options):
    """A model whose tables depend on the elements."""
    return make_model(pair_repulsion=True, distance_transform="Agnesi", **options)


def dimer(one, other, length=2.0):
    return Atoms(numbers=[one, other], positions=[[0, 0, 0], [length, 0, 0]])


def test_a_structure_that_is_nothing_for_the_fast_backend_leaves_its_mates_to_it():
    model = agnesi()
    of, reference = watched(model, FusedBackend(model)), ReferenceBackend(model, "cpu")
    close = task(of, dimer(*ELEMENTS[:2]))
    others = [task(of, STRUCTURES[name]) for name in ("alloy", "dense")]
    of.evaluate([close, *others])
    assert [result.backend for result in of.evaluate([close, *others])] == ["fused"] * 3
    closer = dataclasses.replace(close, positions=0.9 * SHORTEST / 2.0 * close.positions)
    results = of.evaluate([others[0], closer, others[1]])
    assert [result.backend for result in results] == ["fused", "mace-torch", "fused"]
    for result, one in zip(results, [others[0], closer, others[1]], strict=True):
        assert compare(result, reference.evaluate([one])[0]).within(5e-11)
    assert of.evaluate([close])[0].backend == "fused"


def test_tables_of_elements_that_are_not_used_any_more_make_room(monkeypatch):
    model = agnesi()
    fast, reference = FusedBackend(model), ReferenceBackend(model, "cpu")
    of = engine(model)
    tables = fast._layers[0]._interaction._tables._made[0]
    pairs = list(itertools.combinations_with_replacement(ELEMENTS, 2))
    tasks = [task(of, dimer(*pair)) for pair in pairs]
    for one in tasks:  # until they are of as many pieces as it takes
        fast.evaluate([one])
    monkeypatch.setattr(radial, "MAX_BYTES", 3 * tables._tables.nbytes // len(tables._places))
    monkeypatch.setattr(radial, "UNUSED", 1)
    fast.forget()
    for one in [*tasks, *tasks]:
        assert compare(fast.evaluate([one])[0], reference.evaluate([one])[0]).within(5e-11)
    with pytest.raises(NotApplicableError, match="memory"):
        fast.evaluate(tasks)
    assert len(tables._places) <= 3 and len(tables._tables) == 3 * tables._pieces


def test_pairs_whose_lengths_are_transformed_alike_share_a_table():
    model = agnesi()
    tables = FusedBackend(model)._layers[0]._interaction._tables._made[0]
    radii = model.radial_embedding.distance_transform.covalent_radii[list(ELEMENTS)]
    kinds = {tables._kind(radial.PAIR * a + b) for a in range(len(ELEMENTS)) for b in range(a, len(ELEMENTS))}
    sums = {round(float(radii[a] + radii[b]), 6) for a in range(len(ELEMENTS)) for b in range(a, len(ELEMENTS))}
    assert len(kinds) == len(sums)


def lithium_and_fluorine(dtype=torch.float64):
    """Of the first the lengths are transformed gently; of the second, smaller, not at all so."""
    return agnesi(atomic_numbers=[3, 9], num_elements=2, energies=(1.0, 2.0), dtype=dtype)


def test_the_table_of_every_pair_is_its_network_to_rounding():
    model = lithium_and_fluorine()
    fast, of = FusedBackend(model), engine(model)
    for pair in ([3, 3], [3, 9], [9, 9]):
        fast.evaluate([task(of, dimer(*pair))])
    fast.evaluate([task(of, Atoms("Li2F2", [[0, 0, 0], [0, 0, 2], [0, 2, 0], [2, 0, 0]]))])
    for layer in fast._layers:
        for tables in layer._interaction._tables._made:
            for pair in ((0, 0), (0, 1), (1, 1)):
                kind = tables._kind(radial.PAIR * pair[0] + pair[1])
                place, begin = tables._places[kind], tables._begins[kind]
                pieces = tables._tables[place * tables._pieces :][: tables._pieces]
                at = np.linspace(-1, 1, 11)
                width = tables._length / len(pieces)
                lengths = tables._begin + (np.arange(len(pieces))[:, None] + 0.5 * (at + 1)) * width
                right = tables._weights(lengths.reshape(-1), pair)
                found = np.vander(at, radial.DEGREE + 1, increasing=True) @ pieces.reshape(*pieces.shape[:2], -1)
                off = np.abs(found.reshape(right.shape) - right)[lengths.reshape(-1) >= begin]
                assert begin <= radial.CLOSE and off.max() < 2e-13 * np.abs(right).max()


def test_a_table_begins_where_it_is_its_network(monkeypatch):
    monkeypatch.setattr(radial, "MAX_PIECES", 64)
    model = lithium_and_fluorine()
    fast, of = watched(model, FusedBackend(model)), engine(model)
    reference = ReferenceBackend(model, "cpu")
    assert fast.info.backend.startswith("fused")
    for length, backend in ((2.0, "fused"), (0.51, "mace-torch"), (1.9, "fused")):
        one = task(fast, dimer(9, 9, length), session=1)
        if length == 2.0:
            fast.evaluate([one])
        found = fast.evaluate([one])[0]
        assert found.backend == backend
        assert compare(found, reference.evaluate([task(of, dimer(9, 9, length))])[0]).within(5e-11)


def test_what_is_folded_for_elements_is_kept_once_whatever_company_they_are_in():
    model = medium()
    fast, of = FusedBackend(model), engine(model)
    for count in range(1, len(ELEMENTS) + 1):
        for some in itertools.combinations(ELEMENTS, count):
            fast.evaluate([task(of, Atoms(numbers=some, positions=np.arange(3 * count).reshape(-1, 3)))])
    for layer in fast._layers:
        assert len(layer._contraction._coefficients) == len(ELEMENTS)


# --- belief


class Wrong:
    """A backend that is off by something."""

    name, note = "wrong", ""

    def __init__(self, model, shift=0.0, after=0, stretch=1.0):
        self._backend, self._shift, self._after, self._stretch = ReferenceBackend(model, "cpu"), shift, after, stretch
        self.calls = 0

    def forget(self):
        pass

    def evaluate(self, tasks):
        self.calls += 1
        off = self._shift if self.calls > self._after else 0.0
        return [
            Result(r.energy, self._stretch * r.forces + off, r.virial, r.energies, self.name)
            for r in self._backend.evaluate(tasks)
        ]


def watched(model, *backends, dtype="float64"):
    return MaceEngine(model, ModelSpec("test", "mace", "cpu", dtype), ReferenceBackend(model, "cpu"), backends)


def test_a_backend_that_is_right_is_used_after_the_first_structure():
    model = medium()
    of = watched(model, FusedBackend(model))
    assert of.info.backend.startswith("fused") and not of.info.note
    one = task(of, STRUCTURES["alloy"])
    backends = [of.evaluate([one])[0].backend for _ in range(3)]
    assert backends == ["mace-torch", "fused", "fused"], "the first answer is the reference's own"


def test_one_comparison_does_for_a_sessions_systems_of_the_same_elements():
    model = medium()
    of = watched(model, FusedBackend(model))

    def backend(name, session, **options):
        return of.evaluate([task(of, STRUCTURES[name], session, **options)])[0].backend

    assert backend("dense", 1) == "mace-torch"
    assert backend("dense", 1) == "fused", "a new INIT of the same session"
    assert backend("dense", 2) == "mace-torch", "another session"
    assert backend("alloy", 1) == "mace-torch", "other elements"
    assert backend("alloy", 1, tolerance=1e-3) == "mace-torch", "another tolerance"
    assert backend("alloy", 1, exact=True) == "mace-torch"
    assert backend("alloy", 1) == "fused"


def test_each_head_is_compared():
    model = make_model(**ARCHITECTURES["two heads"])
    of = watched(model, FusedBackend(model))
    heads = ("one", "one", "other", "other", "one")
    backends = [of.evaluate([task(of, STRUCTURES["alloy"], 1, head=head)])[0].backend for head in heads]
    assert backends == ["mace-torch", "fused", "mace-torch", "fused", "fused"]


def test_elements_without_neighbours_are_not_taken_for_compared():
    """As for formation energies: atoms by themselves, then what they make."""
    model = medium()
    of = watched(model, FusedBackend(model))

    def backend(atoms, session):
        return of.evaluate([task(of, atoms, session)])[0].backend

    alone = [Atoms(symbol, [[0, 0, 0]]) for symbol in ("Cu", "Al")]
    together = Atoms("CuAl", [[0, 0, 0], [2.4, 0, 0]])
    apart = Atoms("CuAl", [[0, 0, 0], [24, 0, 0]])
    for atoms in (*alone, *alone, apart, apart):
        assert backend(atoms, 1) == "mace-torch"
    assert [backend(together, 1) for _ in range(2)] == ["mace-torch", "fused"]
    assert [backend(atoms, 1) for atoms in (*alone, apart)] == ["fused"] * 3
    assert [backend(alone[0], 2) for _ in range(TRIES + 2)] == ["mace-torch"] * TRIES + ["fused"] * 2


def test_an_element_that_finds_neighbours_late_is_compared_then():
    """As hydrogen that is far from a surface, and lands."""
    model = medium()
    of = watched(model, FusedBackend(model))

    def backend(height):
        atoms = Atoms("Cu2Al", [[0, 0, 0], [2.4, 0, 0], [1.2, 0, height]])
        return of.evaluate([task(of, atoms, 1)])[0].backend

    assert [backend(20.0) for _ in range(TRIES + 2)] == ["mace-torch"] * TRIES + ["fused"] * 2
    assert [backend(height) for height in (2.0, 2.0, 20.0)] == ["mace-torch", "fused", "fused"]


def test_an_element_with_neighbours_that_are_in_no_part_is_not_compared_for_ever():
    model = medium()
    of = watched(model, FusedBackend(model))
    sizes, evaluate = [], of._reference.evaluate

    def noted(tasks):
        sizes.append(len(tasks[0].positions))
        return evaluate(tasks)

    of._reference.evaluate = noted
    slab = bulk("Cu", cubic=True) * (6, 6, 4)
    slab.pbc = False
    above = np.array([[0, 0, 25.0], [0, 20.0, 25.0], [2.0, 20.0, 25.0]])
    atoms = slab + Atoms("Al3", slab.positions.mean(axis=0) + above)
    for _ in range(TRIES + 3):
        of.evaluate([task(of, atoms, 1)])
    assert len(atoms) > checks.LARGEST and len(sizes) == TRIES + 1


def test_what_is_known_of_sessions_is_bounded(monkeypatch):
    monkeypatch.setattr(mace_engine, "REMEMBERED", 5)
    model = medium()
    of = watched(model, FusedBackend(model))
    for session in range(20):
        for name in ("dense", "alloy"):
            of.evaluate([task(of, STRUCTURES[name], session)])
            of.evaluate([task(of, STRUCTURES[name], session)])
        assert len(of._trusted) + len(of._lonely) <= 5 and len(of._agreed) <= 5


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_backend_that_is_wrong_is_switched_off_at_loading(dtype, caplog):
    model = medium(dtype)
    with caplog.at_level(logging.WARNING):
        of = watched(model, Wrong(model, shift=1e-2), dtype=dtype)
    assert of.info.backend.startswith("mace-torch")
    assert "1.0e-02 eV/Å" in of.info.note and "1.0e-02 eV/Å" in caplog.text
    one = task(of, STRUCTURES["alloy"])
    assert [of.evaluate([one])[0].backend for _ in range(2)] == ["mace-torch"] * 2


def test_a_backend_that_fails_or_gives_nan_is_switched_off():
    model = medium()

    class Failing:
        name, note = "failing", ""

        def forget(self):
            pass

        def evaluate(self, tasks):
            raise RuntimeError("no kernel for this device")

    assert "no kernel for this device" in watched(model, Failing()).info.note
    assert "nan" in watched(model, Wrong(model, shift=np.nan)).info.note


def test_a_backend_that_breaks_cuda_is_told_of_at_once(monkeypatch):
    # after that nothing in the process works, so that whatever came next would be blamed for it
    told = []
    monkeypatch.setattr(stages, "_tell", [lambda stage, backend: told.append(backend)])
    model = medium()

    class Breaking(Wrong):
        def evaluate(self, tasks):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        watched(model, Breaking(model), FusedBackend(model))
    assert told == ["wrong"]


@pytest.mark.parametrize("what", ["an atom alone", "a structure for the slope of energies"])
def test_whatever_is_evaluated_at_loading_a_backend_that_breaks_cuda_is_told_of(monkeypatch, what):
    told = []
    monkeypatch.setattr(stages, "_tell", [lambda stage, backend: told.append(backend)])
    model = medium()

    class Breaking(Wrong):
        name, seen = "breaking", 0

        def evaluate(self, tasks):
            self.seen += any(len(one.positions) == 1 for one in tasks)
            if self.seen and (what == "an atom alone" or len(tasks[0].positions) > 1):
                raise RuntimeError("CUDA error: invalid configuration argument")
            return super().evaluate(tasks)

    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        watched(model, Breaking(model))
    assert told[-1] == "breaking"
    told.clear()
    watched(model, FusedBackend(model))
    assert "fused" in told and not told[-1], "what comes later is not its doing"


def test_where_the_fastest_is_switched_off_the_next_is_used():
    model = medium()
    candidates, why = backends_for(model, ModelSpec("test", "mace", "cpu", "float64"))
    assert [backend.name for backend in candidates] == ["fused", "mace-torch by edges"] and not why
    spec = ModelSpec("test", "mace", "cpu", "float64", without={"fused": "signal 11 (SIGSEGV)"})
    (left,), why = backends_for(model, spec)
    assert left.name == "mace-torch by edges" and "fused is switched off" in why and "SIGSEGV" in why
    of = watched(model, Wrong(model, shift=1e-2), Wrong(model, stretch=1.5), *candidates[1:])
    assert of.info.backend.startswith("mace-torch by edges")
    assert of.info.note.count("wrong is switched off: it differs by") == 2
    one = task(of, STRUCTURES["alloy"])
    assert [of.evaluate([one])[0].backend for _ in range(2)] == ["mace-torch", "mace-torch by edges"]


class Clock:
    """By which backends are timed here: only slow ones take any time, however busy this machine is."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for module in (selection, timing):
        monkeypatch.setattr(module, "time", found)
    return found


class Slow(FusedBackend):
    """One that takes longer."""

    def __init__(self, model, clock, seconds=0.1):
        super().__init__(model)
        self.name, self._clock, self._seconds, self.evaluations = "slow", clock, seconds, 0

    def evaluate(self, tasks):
        self.evaluations += 1
        self._clock.now += self._seconds
        return super().evaluate(tasks)


@pytest.mark.parametrize("last", [FusedBackend, by_edges])
def test_of_backends_that_agree_the_fastest_is_used(clock, last):
    model = medium()
    of = watched(model, Slow(model, clock), fastest := last(model), Slow(model, clock))
    name = fastest.name
    assert of.info.backend.startswith(f"{name} (")
    assert re.fullmatch(rf"slow agrees but is slower: {name} took 0\.\d\d of its time", of.info.note), of.info.note
    one = task(of, STRUCTURES["alloy"])
    assert [of.evaluate([one])[0].backend for _ in range(2)] == ["mace-torch", name]


@pytest.mark.parametrize(("seconds", "evaluations"), [(0.19, 6), (0.3, 6), (1.5, 2)])
def test_the_order_given_stays_where_another_backend_is_not_clearly_faster(clock, seconds, evaluations):
    """What noise could turn round is not worth that two workers of a model differ; nor what is hopeless the time."""
    model = medium()
    first, second = Slow(model, clock, 0.2), Slow(model, clock, seconds)
    first.name = "first"
    of = watched(model, first, second)
    assert of.info.backend.startswith("first") and not of.info.note
    assert second.evaluations == evaluations


def test_a_backend_that_is_faster_and_wrong_is_not_used(clock):
    model = medium()
    of = watched(model, Slow(model, clock), Wrong(model, shift=1e-2))
    assert of.info.backend.startswith("slow")
    assert of.info.note.startswith("wrong is switched off: it differs by")


def test_a_backend_that_fails_when_it_is_timed_is_not_used(monkeypatch):
    told = []
    monkeypatch.setattr(stages, "_tell", [lambda stage, backend: told.append(backend)])
    model = medium()

    class Failing(Wrong):
        how = "no kernel for this device"

        def evaluate(self, tasks):
            raise RuntimeError(self.how)

    of = watched(model, FusedBackend(model), failing := Failing(model))
    assert of.info.backend.startswith("fused") and not of.info.note and not told[-1]
    failing.how = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        watched(model, FusedBackend(model), failing)
    assert told[-1] == "wrong", "nothing works in this process from then on: the next does without it"


def test_forces_that_are_no_slope_of_the_energy_are_found():
    # reference and backend agree, so that only the finite difference can tell
    model = medium()
    lying = Wrong(model, stretch=1.5)
    lying.name = "lying"
    of = MaceEngine(model, ModelSpec("test", "mace", "cpu", "float64"), lying, [lying])
    assert "slope" in of.info.note


def test_a_backend_that_is_wrong_on_a_sessions_structure_is_not_used_for_that_session(caplog):
    model = medium()
    loading = Wrong(model)
    watched(model, loading)
    wrong = Wrong(model, shift=0.1, after=loading.calls)
    of = watched(model, wrong)
    assert of.info.backend.startswith("wrong")
    before, kept = of.info, task(of, STRUCTURES["alloy"], 1)
    with caplog.at_level(logging.WARNING):
        assert of.evaluate([kept])[0].backend == "mace-torch"
    assert of.info is not before, "whoever holds the old one sees that something changed"
    assert "1.0e-01" in of.info.note and "session 1" in of.info.note
    assert of.info.note.startswith("1 session's systems are")
    assert "on a structure of 16 atoms of session 1; it gets mace-torch for its like" in caplog.text
    assert of.evaluate([task(of, STRUCTURES["alloy"], 1)])[0].backend == "mace-torch", "a new INIT changes nothing"
    del kept
    wrong._shift = 0.0
    assert of.evaluate([task(of, STRUCTURES["alloy"], 2)])[0].backend == "mace-torch"
    assert of.evaluate([task(of, STRUCTURES["alloy"], 2)])[0].backend == "wrong", "others are not concerned"


def test_a_session_that_has_gone_does_without_nothing():
    model = medium()
    loading = Wrong(model)
    watched(model, loading)
    of = watched(model, Wrong(model, shift=0.1, after=loading.calls))
    tasks = [task(of, STRUCTURES["alloy"], session) for session in (1, 2)]
    of.evaluate(tasks)
    assert of.info.note.startswith("2 sessions' systems are")
    del tasks[0]
    assert of.info.note.startswith("1 session's systems are")
    tasks.clear()
    assert not of.info.note


def test_a_structure_without_finite_numbers_concerns_its_session_alone():
    model = medium()
    of = watched(model, FusedBackend(model))
    coincident = Atoms("Cu2", [[0, 0, 0], [0, 0, 0]])
    assert not np.isfinite(of.evaluate([task(of, coincident, 1)])[0].forces).all(), "for the worker to refuse"
    assert not of.info.note, "it says nothing of the fast backend"
    apart = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]])
    assert [of.evaluate([task(of, apart, 1)])[0].backend for _ in range(2)] == ["mace-torch", "fused"]
    assert of.evaluate([task(of, STRUCTURES["alloy"], 2)])[0].backend == "mace-torch"
    assert of.evaluate([task(of, STRUCTURES["alloy"], 2)])[0].backend == "fused"


def test_forces_of_atoms_nearly_on_one_spot_decide_nothing():
    """A part of them is more than any mistake; the next structure says more."""
    model = make_model(pair_repulsion=True)
    loading = Wrong(model)
    watched(model, loading)
    of = watched(model, Wrong(model, shift=1e-4, after=loading.calls))

    kept = []

    def result(length):
        kept.append(task(of, dimer(29, 29, length), 1))
        return of.evaluate(kept[-1:])[0]

    assert result(0.1).backend == "mace-torch" and not of.info.note
    assert np.abs(result(0.1).forces).max() > 1e-4 / TOLERANCE["float64"]
    assert [result(2.3).backend for _ in range(2)] == ["mace-torch"] * 2
    assert "1.0e-04 eV/Å" in of.info.note


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_where_forces_are_large_the_fast_backend_is_used_in_the_end(dtype):
    model = make_model(pair_repulsion=True, dtype=getattr(torch, dtype))
    of = watched(model, FusedBackend(model), dtype=dtype)

    def results(session, *lengths):
        return [of.evaluate([task(of, dimer(29, 29, length), session)])[0] for length in lengths]

    assert np.abs(results(1, 0.9)[0].forces).max() > LARGEST_FORCE
    assert results(1, 0.9)[0].backend == "fused", "it is within what is tolerated of smaller forces"
    assert results(2, 0.1, 0.1, 2.3, 2.3)[-1].backend == "fused"


@pytest.mark.parametrize("size", [(2, 1, 1), (5, 5, 6)])
def test_energies_of_atoms_are_compared_even_where_only_forces_are_asked_for(size):
    """Also of a structure of which a part is compared."""
    model = medium()

    class Shifted(Wrong):
        def evaluate(self, tasks):
            off = 0.1 if self.calls >= self._after else 0.0
            return [
                dataclasses.replace(result, energies=result.energies + off * (-1.0) ** np.arange(len(result.energies)))
                for result in super().evaluate([dataclasses.replace(one, energies=True) for one in tasks])
            ]

    loading = Shifted(model, after=np.inf)
    watched(model, loading)
    of = watched(model, Shifted(model, after=loading.calls))
    one = task(of, bulk("Cu", cubic=True) * size)
    forces = Task(one.system, one.cell, one.positions, stress=False, energies=False)
    assert [of.evaluate([forces])[0].backend for _ in range(2)] == ["mace-torch"] * 2
    assert "an atom's energy 1.0e-01 eV" in of.info.note


def test_stress_is_compared_even_where_only_forces_are_asked_for():
    model = medium()

    class WrongVirial(Wrong):
        def evaluate(self, tasks):
            found = super().evaluate(tasks)
            off = 0.1 if self.calls > self._after else 0.0
            return [
                Result(r.energy, r.forces, None if r.virial is None else r.virial + off, r.energies, "wrong")
                for r in found
            ]

    loading = WrongVirial(model)
    watched(model, loading)
    of = watched(model, WrongVirial(model, after=loading.calls))
    one = task(of, STRUCTURES["alloy"])
    forces = Task(one.system, one.cell, one.positions, stress=False, energies=False)
    assert [of.evaluate([forces])[0].backend for _ in range(2)] == ["mace-torch"] * 2


def test_what_a_session_tolerates_is_its_own_choice():
    model = medium("float32")
    loading = Wrong(model)
    watched(model, loading, dtype="float32")
    of = watched(model, Wrong(model, shift=3e-5, after=loading.calls), dtype="float32")
    strict, easy = task(of, STRUCTURES["dense"], tolerance=1e-6), task(of, STRUCTURES["dense"])
    for one, then in ((strict, "mace-torch"), (easy, "wrong")):
        assert of.evaluate([one])[0].backend == "mace-torch"
        assert of.evaluate([one])[0].backend == then
    assert of.info.backend.startswith("wrong")


def test_exact_means_the_same_bits_whatever_the_batch():
    model = medium("float32")
    of = watched(model, FusedBackend(model), dtype="float32")
    others = [task(of, atoms) for atoms in STRUCTURES.values()]
    of.evaluate(others)
    exact = task(of, STRUCTURES["alloy"], exact=True)
    alone = of.evaluate([exact])[0]
    for batch in ([*others, exact], [exact, *others], [others[0], exact, exact]):
        result = of.evaluate(batch)[next(n for n, one in enumerate(batch) if one is exact)]
        assert result.backend == "mace-torch"
        assert result.energy == alone.energy
        assert result.forces.tobytes() == alone.forces.tobytes()
        assert result.virial.tobytes() == alone.virial.tobytes()


def test_exact_means_the_same_bits_whether_there_is_stress_or_not():
    """mace-torch rounds shifts otherwise where it computes stress: of a skewed cell, in float32."""
    model = medium("float32")
    of = watched(model, FusedBackend(model), dtype="float32")
    atoms = STRUCTURES["alloy"].copy()
    atoms.set_cell(atoms.cell.array @ [[1, 0.021, 0.013], [0.017, 1, 0.019], [0.023, 0.011, 1]], scale_atoms=True)
    with_stress = task(of, atoms, exact=True)
    bits = {
        of.evaluate([dataclasses.replace(with_stress, stress=stress)])[0].forces.tobytes() for stress in (True, False)
    }
    assert len(bits) == 1


def test_exact_asks_torch_for_the_same_bits_and_nothing_else_does():
    model, asked = medium(), []

    class Asked(Wrong):
        def evaluate(self, tasks):
            asked.append((torch.are_deterministic_algorithms_enabled(), tasks[0].system.exact))
            return super().evaluate(tasks)

    of = MaceEngine(model, ModelSpec("test", "mace", "cpu", "float64"), Asked(model), [FusedBackend(model)])
    of.evaluate([task(of, STRUCTURES["alloy"]), task(of, STRUCTURES["alloy"], exact=True)])
    assert set(asked) == {(False, False), (True, True)}


def test_elements_that_a_session_had_before_are_not_compared_again():
    model = medium()
    of = watched(model, FusedBackend(model))

    def backend(numbers, session=1, pbc=True):
        atoms = bulk("Cu", cubic=True)
        atoms.numbers[:], atoms.pbc = numbers, pbc
        return of.evaluate([task(of, atoms, session)])[0].backend

    assert backend([29, 29, 13, 29]) == "mace-torch"
    assert backend([29] * 4) == backend([13] * 4) == backend([13, 13, 29, 29]) == "fused"
    assert backend([29, 8, 8, 29]) == "mace-torch", "one is new"
    assert backend([13, 8, 13, 8]) == backend([29, 8, 13, 8]) == "fused", "each was in one that agreed"
    assert backend([29] * 4, pbc=False) == "mace-torch"
    assert backend([29] * 4, session=2) == "mace-torch"


def test_where_memory_lacks_to_compare_a_structure_a_piece_of_it_is():
    model = medium()
    of = watched(model, FusedBackend(model))
    evaluate, sizes = of._reference.evaluate, []

    def lacking(tasks):
        sizes.append(len(tasks[0].positions))
        if sizes[-1] > checks.FEW:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return evaluate(tasks)

    of._reference.evaluate = lacking
    atoms = bulk("Cu", cubic=True) * (4, 3, 3)
    found = of.evaluate([task(of, atoms)])[0]
    assert found.backend == "fused" and len(found.forces) == len(atoms)
    assert len(sizes) == 2 and sizes[0] == len(atoms) and 10 < sizes[1] <= checks.FEW // 2


def test_of_a_large_structure_a_piece_is_compared():
    model = medium()
    of = watched(model, FusedBackend(model))
    atoms = bulk("Cu", cubic=True) * (5, 5, 6)
    assert len(atoms) > checks.LARGEST
    one = task(of, atoms)
    sample = checks.piece(one, 4.5)
    assert 100 < len(sample.positions) <= checks.LARGEST // 2
    assert len(sample.system.numbers) == len(sample.positions)
    assert [len(of.evaluate([one])[0].forces) for _ in range(2)] == [len(atoms)] * 2
    atoms.numbers[[0, 30, -1]] = [13, 13, 8]  # far from the middle
    sample = checks.piece(task(of, atoms), 4.5)
    assert set(sample.system.numbers) == {8, 13, 29} and len(sample.positions) <= checks.LARGEST // 2
    assert checks.joined(sample, 4.5) == {8, 13, 29}
    inside = {tuple(row) for row in np.round(wrap_positions(atoms.positions, atoms.cell, atoms.pbc), 9)}
    assert {tuple(row) for row in np.round(sample.positions, 9)} <= inside


def test_a_large_structure_may_have_an_empty_middle():
    model = medium()
    of = watched(model, FusedBackend(model))
    one = bulk("Cu", cubic=True) * (5, 5, 3)
    other = one.copy()
    other.positions[:, 0] += 80
    atoms = one + other
    atoms.pbc = False
    assert len(of.evaluate([task(of, atoms)])[0].forces) == 600


@pytest.mark.parametrize("wrong", ["force", "energy", "virial", "energies"])
def test_nan_is_never_within_a_tolerance(wrong):
    fields = {"force": 0.0, "energy": 0.0, "virial": 0.0, "energies": 0.0, "largest": 1.0}
    assert Difference(**fields).within(0.0)
    assert not Difference(**{**fields, wrong: np.nan}).within(1e9)


@pytest.mark.parametrize("count", [1, 7, 12, 83])
def test_structures_for_checking_span_all_elements_and_every_kind_of_periodicity(count):
    elements = list(range(1, count + 1))
    *made, alone = [of_first for of_first, _ in checks.structures(elements, ("first", "second"))]
    assert len(alone.positions) == 1
    assert all(len(set(one.system.numbers)) <= 2 for (one,) in checks.structures(elements, ("only",), 2))
    assert {int(z) for one in made for z in one.system.numbers} == set(elements)
    assert {one.system.pbc for one in made} == {(True, True, True), (True, True, False), (False, False, False)}
    for one in made:
        assert len(one.system.numbers) == len(one.positions)


def test_an_unknown_element_is_refused():
    with pytest.raises(EngineError, match="Au"):
        task(engine(medium()), Atoms("Au"))
