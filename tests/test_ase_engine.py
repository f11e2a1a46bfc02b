"""Any ASE calculator as an engine: what the catalogue says of it, and what calculators do that they should not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT

from conftest import sha256
from rootstockd.worker.engines import EngineError, ModelSpec, Result, System, Task
from rootstockd.worker.engines.loading import load_engine


class Odd(EMT):  # type: ignore[misc]
    """EMT with the ways of other calculators.

    Args:
        ways: which of them.
        device, dtype, head: kept, to be looked at.
        weights: a file that it reads.
    """

    def __init__(
        self, *ways: str, device: str = "", dtype: str = "", head: str = "", weights: str = "", more: Any = None
    ) -> None:
        super().__init__()
        self.ways, self.device, self.dtype, self.head, self.more = set(ways), device, dtype, head, more
        self.file = Path(weights).name
        self.content = Path(weights).read_bytes() if weights else b""

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        charge = atoms.info.get("q", 0)
        super().calculate(atoms, properties, system_changes)
        results = self.results
        results["energy"] += charge + len(self.head)
        results["free_energy"] = results["energy"]
        if "other free energy" in self.ways:
            results["free_energy"] += 0.1
        if "arrays" in self.ways:
            results["energy"] = np.array([results["energy"]], np.float32)
            results["forces"] = results["forces"].astype(np.float32).tolist()
        if "3x3" in self.ways and "stress" in results:
            xx, yy, zz, yz, xz, xy = results["stress"]
            results["stress"] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        if "numbers of one's own" in self.ways:
            results["crystal_fea"] = np.zeros(64)
        if "no stress" in self.ways:
            results.pop("stress", None)
        if "changes atoms" in self.ways:
            atoms.set_pbc(not atoms.pbc.any())
            atoms.positions += 1.0
            atoms.info["q"] = 7.0

    def set_atoms(self, atoms: Atoms) -> None:
        if 80 in atoms.numbers:
            raise ValueError("no mercury")
        self.given = len(atoms)


def odd(*ways: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"calculator": f"{__name__}:with_ways", "options": {"ways": list(ways), **(options or {})}, **more}


def with_ways(ways: list[str], **options: Any) -> Odd:
    return Odd(*ways, **options)


def engine(arguments: dict[str, Any], **spec: Any) -> Any:
    return load_engine(ModelSpec("odd", "ase", "cpu", "float32", arguments=arguments, **spec))


def evaluate(engine: Any, atoms: Atoms, *, stress: bool = True, energies: bool = False, **system: Any) -> Result:
    prepared = engine.prepare(System(atoms.numbers, tuple(map(bool, atoms.pbc)), **system))
    (result,) = engine.evaluate([Task(prepared, atoms.cell.array.copy(), atoms.positions.copy(), stress, energies)])
    return result


@pytest.fixture
def atoms() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def agrees(result: Result, atoms: Atoms, tolerance: float = 1e-12) -> None:
    reference = atoms.copy()
    reference.calc = EMT()
    np.testing.assert_allclose(result.energy, reference.get_potential_energy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(result.forces, reference.get_forces(), rtol=0, atol=tolerance)
    if result.virial is not None:
        stress = reference.get_stress(voigt=False)
        np.testing.assert_allclose(result.virial, -stress * reference.get_volume(), rtol=0, atol=tolerance)


def test_a_calculator_always_knows_which_structure_it_has(atoms: Atoms) -> None:
    of = engine(odd())
    (calculator,) = of._calculators.values()
    both = [atoms, atoms * (2, 1, 1)]
    prepared = [of.prepare(System(one.numbers, (True, True, True))) for one in both]
    for which in (0, 1, 1, 0, 0):
        one = both[which]
        of.evaluate([Task(prepared[which], one.cell.array.copy(), one.positions.copy(), False, False)])
        assert calculator.given == len(one)


@pytest.mark.parametrize("way", ["", "3x3", "numbers of one's own", "changes atoms"])
def test_ways_that_make_no_difference(atoms: Atoms, way: str) -> None:
    subject = engine(odd(way))
    prepared = subject.prepare(System(atoms.numbers, (True, True, True)))
    for _ in range(3):
        task = Task(prepared, atoms.cell.array.copy(), atoms.positions.copy(), stress=True, energies=False)
        agrees(subject.evaluate([task])[0], atoms)
        atoms.rattle(0.01, seed=2)


def test_types_of_their_own(atoms: Atoms) -> None:
    result = evaluate(engine(odd("arrays")), atoms)
    assert type(result.energy) is float
    agrees(result, atoms, 1e-6)


def test_a_left_handed_cell_is_shown_as_a_right_handed_one(atoms: Atoms) -> None:
    seen = []

    class Looking(Odd):
        def calculate(self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes) -> None:
            seen.append((np.linalg.det(atoms.cell.array), atoms.pbc.tolist()))
            super().calculate(atoms, properties, system_changes)

    subject = engine(odd())
    subject._calculators[None] = Looking()
    atoms.pbc = [True, False, True]
    atoms.set_cell(atoms.cell.array[[2, 1, 0]])
    atoms.pbc = [False, True, True]
    agrees(evaluate(subject, atoms), atoms)
    assert seen[-1][0] > 0
    assert seen[-1][1] == [True, False, True]


@pytest.mark.parametrize("way", ["no stress"])
def test_what_it_said_that_it_has_and_has_not(atoms: Atoms, way: str) -> None:
    with pytest.raises(EngineError, match="computes no stress") as caught:
        evaluate(engine(odd(way)), atoms)
    assert caught.value.code == "unsupported"
    agrees(evaluate(engine(odd(way)), atoms, stress=False), atoms)


def test_two_energies(atoms: Atoms) -> None:
    with pytest.raises(EngineError, match="free energy") as caught:
        evaluate(engine(odd("other free energy")), atoms)
    assert caught.value.code == "unsupported"
    assert "free_energy" in caught.value.hint
    usual = evaluate(engine(odd("other free energy", energy="energy")), atoms)
    agrees(usual, atoms)
    free = evaluate(engine(odd("other free energy", energy="free_energy")), atoms)
    assert free.energy - usual.energy == pytest.approx(0.1)


def test_charge_goes_where_the_catalogue_says(atoms: Atoms) -> None:
    subject = engine(odd(info={"charge": "q"}))
    neutral = evaluate(subject, atoms)
    assert evaluate(subject, atoms, charge=2.0).energy - neutral.energy == pytest.approx(2.0)
    assert evaluate(subject, atoms).energy == neutral.energy, "a charge stays with its session"
    with pytest.raises(EngineError, match="no notion of spin") as caught:
        evaluate(subject, atoms, spin=3.0)
    assert caught.value.code == "unsupported"
    with pytest.raises(EngineError, match="no notion of charge"):
        evaluate(engine(odd()), atoms, charge=-1.0)
    evaluate(engine(odd()), atoms, charge=0.0, spin=1.0)


def test_charge_within_a_sum(atoms: Atoms) -> None:
    """Parts of a sum look for changes themselves, and not at `info`."""
    calculators = [{"make": f"{__name__}:with_ways", "options": {"ways": []}}] * 2
    arguments = {"calculator": "ase.calculators.mixing:SumCalculator", "options": {"calcs": calculators}}
    subject = engine({**arguments, "info": {"charge": "q"}})
    neutral = evaluate(subject, atoms)
    assert evaluate(subject, atoms, charge=1.0).energy - neutral.energy == pytest.approx(2.0)


def test_options(tmp_path: Path, atoms: Atoms) -> None:
    weights = tmp_path / "mine.pth"
    weights.write_bytes(b"weights")
    inner = {"make": f"{__name__}:with_ways", "options": {"ways": ["3x3"], "device": "{device}"}}
    options = {
        "device": "{device}",
        "dtype": "{dtype}",
        "weights": "{weights}",
        "more": {"list": [inner, "{dtype}", 1]},
    }
    subject = engine(odd(options=options), weights=str(weights), sha256=sha256(weights))
    calculator = subject._calculators[None]
    assert (calculator.device, calculator.dtype) == ("cpu", "float32")
    assert (calculator.file, calculator.content) == ("mine.pth", b"weights")
    made, dtype, one = calculator.more["list"]
    assert (made.ways, made.device, dtype, one) == ({"3x3"}, "cpu", "float32", 1)
    weights.write_bytes(b"changed")
    with pytest.raises(EngineError, match="SHA-256"):
        engine(odd(options=options), weights=str(weights), sha256="0" * 64)


def test_heads(atoms: Atoms) -> None:
    subject = engine(odd(options={"head": "{head}"}), heads=["a", "bb"])
    assert subject.info.heads == ("a", "bb")
    assert evaluate(subject, atoms, head="bb").energy - evaluate(subject, atoms, head="a").energy == pytest.approx(1.0)
    for head, wrong in ((None, "several heads"), ("c", "no head 'c'")):
        with pytest.raises(EngineError, match=wrong) as caught:
            evaluate(subject, atoms, head=head)
        assert caught.value.code == "unsupported"
        assert "a, bb" in caught.value.hint
    with pytest.raises(EngineError, match="no head 'a'"):
        evaluate(engine(odd()), atoms, head="a")


def test_a_cell_for_those_who_want_one() -> None:
    slab = fcc111("Cu", (2, 2, 2), vacuum=None)
    slab.rattle(0.05, seed=1)
    result = evaluate(engine(odd(complete_cell=True)), slab)
    agrees(evaluate(engine(odd()), slab, stress=False), slab)
    completed = slab.copy()
    completed.cell[2] = [0, 0, 30.0]
    agrees(result, completed)


def test_whom_it_knows(atoms: Atoms) -> None:
    subject = engine(odd(max_atoms=4), elements=[29])
    assert (subject.info.elements, subject.info.max_atoms) == ((29,), 4)
    with pytest.raises(EngineError, match="takes 4") as caught:
        evaluate(subject, atoms * (2, 1, 1))
    assert caught.value.code == "limit"
    atoms.numbers[0] = 47
    with pytest.raises(EngineError, match="does not know Ag") as caught:
        evaluate(subject, atoms)
    assert caught.value.code == "unknown-element"
    atoms.numbers[0] = 80
    with pytest.raises(ValueError, match="no mercury"):
        evaluate(engine(odd()), atoms)


@pytest.mark.parametrize(
    ("arguments", "spec", "wrong"),
    [
        ({}, {}, "calculator"),
        ({"calculator": "ase.calculators.emt"}, {}, "module:Class"),
        ({"calculator": "no.such:Thing"}, {}, "No module named"),
        ({"calculator": "ase.calculators.emt:Thing"}, {}, "has no attribute 'Thing'"),
        ({"calculator": "ase.calculators.emt:EMT.asap"}, {}, "can't make"),
        (odd(options={"nonsense": 1}), {}, "nonsense"),
        (odd(colour="red"), {}, "no such arguments: colour"),
        (odd(info={"mood": "m"}), {}, "mood"),
        (odd(energy="both"), {}, "`energy`"),
        (odd(), {"weights": "/nowhere"}, "{weights}"),
        (odd(options={"weights": "{weights}"}), {}, "{weights}"),
        (odd(), {"heads": ["a"]}, "{head}"),
        (odd(options={"head": "{head}"}), {}, "{head}"),
    ],
)
def test_entries_that_make_no_sense(arguments: dict[str, Any], spec: dict[str, Any], wrong: str) -> None:
    with pytest.raises(EngineError) as caught:
        engine(arguments, **spec)
    assert caught.value.code == "model-load"
    assert "model 'odd'" in caught.value.message
    assert wrong in caught.value.message


# --- engines from elsewhere

MODULE = """
from rootstockd.worker.engines import EngineInfo
ENGINE_API = {api}
class Engine:
    info = EngineInfo(properties=("energy", "forces"), backend="from elsewhere")
def load(spec):
    return Engine()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package as pip installs it, with an engine for a family."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, family: str, api: object = 1, module: str | None = None) -> None:
        (tmp_path / f"{name}.py").write_text(MODULE.format(api=api) if module is None else module)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rootstockd.engines]\n{family} = {name}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_a_family_from_elsewhere(install: Any) -> None:
    install("elsewhere", "farfetched")
    assert load_engine(ModelSpec("mine", "farfetched", "cpu", "float64")).info.backend == "from elsewhere"


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ({"api": 2}, "ENGINE_API 2 where this rootstockd has 1"),
        ({"module": "def load(spec): pass"}, "ENGINE_API None"),
        ({"module": "import nothing_like_it"}, "No module named 'nothing_like_it'"),
    ],
)
def test_a_family_from_elsewhere_that_does_not_fit(install: Any, how: dict[str, Any], wrong: str) -> None:
    install("elsewhere2", "farfetched", **how)
    with pytest.raises(EngineError, match=wrong) as caught:
        load_engine(ModelSpec("mine", "farfetched", "cpu", "float64"))
    assert caught.value.code == "model-load"
    assert "elsewhere2" in caught.value.message


def test_two_packages_for_one_family(install: Any) -> None:
    install("one", "farfetched")
    install("other", "farfetched")
    with pytest.raises(EngineError, match="several packages"):
        load_engine(ModelSpec("mine", "farfetched", "cpu", "float64"))


def test_nobody_has_the_family() -> None:
    with pytest.raises(EngineError, match=sys.prefix) as caught:
        load_engine(ModelSpec("mine", "conformance", "cpu", "float64"))
    assert "rootstockd.engines" in caught.value.hint


def test_ours_can_not_be_replaced(install: Any) -> None:
    install("usurper", "noop")
    assert load_engine(ModelSpec("mine", "noop", "cpu", "float64")).info.backend == "noop"
