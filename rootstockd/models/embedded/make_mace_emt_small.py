"""Make ``mace-emt-small.model``: a MACE model taught ASE's EMT calculator.

Structures are drawn with fixed seeds and labelled by
:class:`ase.calculators.emt.EMT`; mace-torch's own training command
(``python -m mace.cli.run_train``) does the fitting; the evaluation beside this
file then measures the result on structures made in other ways.

Units are ASE's throughout: Å, eV, eV/Å, eV/Å³, fs through ``ase.units``.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc110, fcc111
from ase.calculators.emt import EMT
from ase.calculators.emt import parameters as emt_parameters
from ase.data import atomic_numbers
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

NAME = "mace-emt-small"
ELEMENTS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
TRAIN_SEED, VALID_SEED, MACE_SEED = 20240601, 20240602, 20240603
R_MAX = 6.0  # Å; EMT's own neighbour list ends at 5.88 Å

#: Options of ``mace_run_train`` that do not depend on the number of epochs.
HYPERPARAMETERS: dict[str, str] = {
    "model": "MACE",
    "r_max": str(R_MAX),
    "num_radial_basis": "10",
    "num_cutoff_basis": "5",
    "max_ell": "1",
    "num_interactions": "2",
    "correlation": "3",
    "hidden_irreps": "32x0e",
    "MLP_irreps": "16x0e",
    "radial_MLP": "[32, 32, 32]",
    "interaction_first": "RealAgnosticDensityInteractionBlock",
    "interaction": "RealAgnosticDensityResidualInteractionBlock",
    "scaling": "rms_forces_scaling",
    "loss": "stress",
    "forces_weight": "10",
    "energy_weight": "100",
    "stress_weight": "1000",
    "swa_forces_weight": "10",
    "swa_energy_weight": "1000",
    "swa_stress_weight": "10000",
    "batch_size": "8",
    "valid_batch_size": "64",
    "lr": "0.01",
    "swa_lr": "0.0003",
    "ema_decay": "0.999",
    "weight_decay": "1e-8",
    "default_dtype": "float32",
    "device": "cpu",
    "eval_interval": "1",
    "error_table": "PerAtomRMSEstressvirials",
    "plot": "False",
}
VALID_SHARE = 0.05
STAGE_ONE_SHARE = 0.7  # of the epochs; the rest is weighted to the energies
LR_AT_STAGE_TWO = 0.0006


def lattice_constant(symbols: list[str]) -> float:
    """Approximate fcc lattice constant of an alloy, from EMT's radii, in Å."""
    radii = np.array([emt_parameters[s][1] for s in symbols]) * units.Bohr
    return float(np.sqrt(2.0) * 1.809 * np.cbrt(np.mean(radii**3)))


def pick_symbols(rng: np.random.Generator, n: int, n_elements: int) -> list[str]:
    """Draw ``n`` symbols from ``n_elements`` random elements of random shares."""
    chosen = rng.choice(len(ELEMENTS), size=n_elements, replace=False)
    shares = rng.dirichlet(np.ones(n_elements))
    return [ELEMENTS[i] for i in rng.choice(chosen, size=n, p=shares)]


def strain(atoms: Atoms, rng: np.random.Generator, volume: float, shear: float) -> None:
    """Strain the cell by up to ``volume`` isotropically and ``shear`` per component."""
    deformation = np.eye(3) * (1.0 + rng.uniform(-volume, volume))
    deformation += rng.uniform(-shear, shear, (3, 3))
    atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)


def shake(atoms: Atoms, rng: np.random.Generator, hottest: float = 1800.0) -> None:
    """Displace the atoms: by Gaussian noise, or by a short EMT Langevin run.

    Noise alone seldom has the correlated motion of real heat, the runs alone
    seldom leave it; half of each covers both.
    """
    if rng.random() < 0.5:
        atoms.positions += rng.normal(0.0, rng.uniform(0.0, 0.22), atoms.positions.shape)
        return
    temperature = rng.uniform(100.0, hottest)
    atoms.positions += rng.normal(0.0, 0.03, atoms.positions.shape)
    atoms.calc = EMT()
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature, rng=rng)
    Langevin(atoms, 4.0 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng).run(
        int(rng.integers(15, 45))
    )


def fcc_cell(rng: np.random.Generator, a: float) -> Atoms:
    """Return an fcc cell of 4 to 16 copper atoms with lattice constant ``a`` (Å)."""
    if rng.random() < 0.5:
        shapes = [(1, 1, 1), (2, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1)]
        return bulk("Cu", "fcc", a=a, cubic=True).repeat(shapes[rng.integers(len(shapes))])
    shapes = [(2, 2, 1), (2, 2, 2), (2, 2, 2), (3, 2, 2), (3, 2, 1), (4, 2, 1)]
    return bulk("Cu", "fcc", a=a).repeat(shapes[rng.integers(len(shapes))])


def make_pure(rng: np.random.Generator) -> Atoms:
    """Make a strained and shaken fcc metal."""
    symbol = ELEMENTS[rng.integers(len(ELEMENTS))]
    atoms = fcc_cell(rng, lattice_constant([symbol]))
    atoms.symbols[:] = symbol
    strain(atoms, rng, 0.06, 0.04)
    if rng.random() < 0.85:
        shake(atoms, rng)
    return atoms


def dress(atoms: Atoms, rng: np.random.Generator, n_elements: int) -> None:
    """Give a cell built with ``a`` = 4 Å random elements and fit its volume to them."""
    symbols = pick_symbols(rng, len(atoms), n_elements)
    atoms.symbols[:] = symbols
    atoms.set_cell(atoms.cell * (lattice_constant(symbols) / 4.0), scale_atoms=True)


def make_alloy(rng: np.random.Generator) -> Atoms:
    """Make a random fcc alloy of two to seven elements."""
    atoms = fcc_cell(rng, 4.0)
    dress(atoms, rng, int(rng.integers(2, 8)))
    strain(atoms, rng, 0.06, 0.04)
    shake(atoms, rng)
    return atoms


def make_ordered(rng: np.random.Generator) -> Atoms:
    """Make an L1_2, L1_0 or B2 compound of a random pair."""
    one, two = (ELEMENTS[i] for i in rng.choice(len(ELEMENTS), 2, replace=False))
    kind = rng.integers(5)
    if kind == 4:
        a = lattice_constant([one, two]) / 2 ** (1 / 3)
        atoms = bulk("Cu", "bcc", a=a, cubic=True)
        atoms.symbols[:] = [one, two]
        atoms = atoms.repeat((2, 2, 1) if rng.random() < 0.5 else (2, 1, 1))
    else:
        symbols = [one, two, two, two] if kind < 2 else [one, one, two, two]
        atoms = bulk("Cu", "fcc", a=lattice_constant(symbols), cubic=True)
        atoms.symbols[:] = symbols
        if rng.random() < 0.5:
            atoms = atoms.repeat((2, 1, 1))
    strain(atoms, rng, 0.06, 0.04)
    if rng.random() < 0.7:
        shake(atoms, rng)
    return atoms


def make_other_lattice(rng: np.random.Generator) -> Atoms:
    """Make a bcc, hcp or simple cubic cell of one to three elements."""
    lattice = ("bcc", "hcp", "sc")[rng.integers(3)]
    if lattice == "bcc":
        atoms = bulk("Cu", "bcc", a=4.0 / 2 ** (1 / 3), cubic=True).repeat((2, 2, 1))
    elif lattice == "hcp":
        atoms = bulk("Cu", "hcp", a=4.0 / 2**0.5).repeat((2, 2, 1))
    else:
        atoms = bulk("Cu", "sc", a=4.0 / 4 ** (1 / 3)).repeat((2, 2, 2))
    dress(atoms, rng, int(rng.integers(1, 4)))
    strain(atoms, rng, 0.06, 0.04)
    shake(atoms, rng, 1200.0)
    return atoms


def make_surface(rng: np.random.Generator) -> Atoms:
    """Make a (100), (110) or (111) slab, pure or alloyed, with 4 to 9 Å of vacuum a side."""
    builders: list[Callable[..., Atoms]] = [fcc100, fcc110, fcc111]
    build = builders[rng.integers(3)]
    size = [(1, 1, 4), (1, 1, 6), (2, 1, 4), (2, 2, 3), (1, 1, 8), (2, 1, 6)][rng.integers(6)]
    atoms = build("Cu", size=size, a=4.0, vacuum=6.0)
    dress(atoms, rng, 1 if rng.random() < 0.5 else int(rng.integers(2, 5)))
    atoms.center(vacuum=rng.uniform(4.0, 9.0), axis=2)
    atoms.pbc = True
    strain(atoms, rng, 0.04, 0.03)
    if rng.random() < 0.85:
        shake(atoms, rng, 1200.0)
    return atoms


def make_vacancy(rng: np.random.Generator) -> Atoms:
    """Make a cell of 7 to 15 atoms with one missing."""
    n_elements = 1 if rng.random() < 0.5 else int(rng.integers(2, 5))
    shape = [(2, 1, 1), (3, 1, 1), (2, 2, 1)][rng.integers(3)]
    atoms = bulk("Cu", "fcc", a=4.0, cubic=True).repeat(shape)
    dress(atoms, rng, n_elements)
    del atoms[int(rng.integers(len(atoms)))]
    strain(atoms, rng, 0.05, 0.04)
    shake(atoms, rng, 1400.0)
    return atoms


def make_liquid(rng: np.random.Generator) -> Atoms:
    """Make a cell of strongly disordered atoms by a short, very hot run."""
    atoms = make_alloy(rng) if rng.random() < 0.7 else make_pure(rng)
    atoms.set_cell(atoms.cell * rng.uniform(0.97, 1.12), scale_atoms=True)
    atoms.calc = EMT()
    MaxwellBoltzmannDistribution(atoms, temperature_K=4000.0, rng=rng)
    Langevin(atoms, 3.0 * units.fs, temperature_K=3000.0, friction=0.02 / units.fs, rng=rng).run(60)
    return atoms


def make_compressed(rng: np.random.Generator) -> Atoms:
    """Make a cell far from its own volume, mostly to learn the repulsion."""
    atoms = make_alloy(rng) if rng.random() < 0.6 else make_pure(rng)
    atoms.set_cell(atoms.cell * rng.uniform(0.78, 1.25), scale_atoms=True)
    return atoms


def make_cluster(rng: np.random.Generator) -> Atoms:
    """Make a free cluster of 3 to 12 atoms, cut from an alloy and shaken."""
    n = int(rng.integers(3, 13))
    symbols = pick_symbols(rng, n, int(rng.integers(1, 4)))
    atoms = bulk("Cu", "fcc", a=lattice_constant(symbols), cubic=True).repeat(2)
    order = np.argsort(np.linalg.norm(atoms.positions - rng.uniform(0, 6, 3), axis=1))
    atoms = Atoms(symbols, positions=atoms.positions[order[:n]])
    atoms.positions *= rng.uniform(0.85, 1.25)
    atoms.positions += rng.normal(0.0, rng.uniform(0.0, 0.25), (n, 3))
    return atoms


def make_dimer(rng: np.random.Generator) -> Atoms:
    """Make a free pair from 0.55 of the bulk distance to beyond the cutoff."""
    symbols = [ELEMENTS[i] for i in rng.choice(len(ELEMENTS), 2)]
    nearest = lattice_constant(symbols) / np.sqrt(2.0)
    distance = rng.uniform(0.55 * nearest, 6.1)
    return Atoms(symbols, positions=[[0.0, 0.0, 0.0], [0.0, 0.0, distance]])


#: Kind, number in the training set (the validation set has a twentieth), maker.
KINDS: tuple[tuple[str, int, Callable[[np.random.Generator], Atoms]], ...] = (
    ("pure", 1200, make_pure),
    ("alloy", 2400, make_alloy),
    ("ordered", 800, make_ordered),
    ("other-lattice", 300, make_other_lattice),
    ("surface", 1200, make_surface),
    ("vacancy", 400, make_vacancy),
    ("liquid", 400, make_liquid),
    ("compressed", 400, make_compressed),
    ("cluster", 450, make_cluster),
    ("dimer", 450, make_dimer),
)


def label(atoms: Atoms, kind: str) -> Atoms | None:
    """Return a copy with EMT's energy (eV), forces (eV/Å) and stress (eV/Å³).

    Nothing is returned where a force is above 60 eV/Å: no use of the model goes
    there.  The weight falls as forces, energy or stress leave the usual, else the few
    hardest structures would own the loss.
    """
    out = Atoms(atoms.symbols, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    atoms = out.copy()
    atoms.calc = EMT()
    forces = atoms.get_forces()
    if not np.isfinite(forces).all() or np.abs(forces).max() > 60.0:
        return None
    energy = float(atoms.get_potential_energy())
    out.info["REF_energy"] = energy
    out.arrays["REF_forces"] = forces
    hardness = float(np.mean(forces**2)) / 2.0**2 + (energy / len(atoms) / 2.0) ** 2
    if out.pbc.all():
        stress = atoms.get_stress(voigt=False)
        out.info["REF_stress"] = stress
        hardness += (float(np.abs(stress).max()) / 0.3) ** 2
    out.info["config_type"] = kind
    out.info["config_weight"] = round(1.0 / (1.0 + hardness), 6)
    return out


def make_set(seed: int, share: float) -> list[Atoms]:
    """Make ``share`` of the structures of each kind from ``seed``."""
    images: list[Atoms] = []
    for number, (kind, count, make) in enumerate(KINDS):
        rng = np.random.default_rng([seed, number])
        wanted = len(images) + max(1, round(count * share))
        while len(images) < wanted:
            image = label(make(rng), kind)
            if image is not None:
                images.append(image)
    return images


def isolated_energies() -> dict[int, float]:
    """Return EMT's energy of each lone atom, by atomic number, in eV."""
    energies: dict[int, float] = {}
    for symbol in ELEMENTS:
        atom = Atoms(symbol)
        atom.calc = EMT()
        energies[atomic_numbers[symbol]] = float(atom.get_potential_energy())
    return energies


def train(work: Path, epochs: int, threads: int) -> Path:
    """Run mace-torch's training command in ``work`` and return the model's path."""
    start_two = max(1, int(epochs * STAGE_ONE_SHARE))
    gamma = (LR_AT_STAGE_TWO / float(HYPERPARAMETERS["lr"])) ** (1.0 / start_two)
    options = HYPERPARAMETERS | {
        "name": NAME,
        "seed": str(MACE_SEED),
        "train_file": "train.xyz",
        "valid_file": "valid.xyz",
        "E0s": repr(isolated_energies()),
        "max_num_epochs": str(epochs),
        "start_swa": str(start_two),
        "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": f"{gamma:.6f}",
        "patience": str(epochs),
    }
    command = [sys.executable, "-m", "mace.cli.run_train", "--swa", "--ema", "--amsgrad"]
    command += [f"--{key}={value}" for key, value in options.items()]
    # Checkpoints of an earlier run in the same place would be loaded at the end.
    for folder in ("checkpoints", "results", "logs"):
        shutil.rmtree(work / folder, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (work / "train.log").open("w") as log:
        subprocess.run(command, cwd=work, env=environment, check=True, stdout=log, stderr=subprocess.STDOUT)
    return work / f"{NAME}_stagetwo.model"


def without_debug_records(archive: bytes) -> bytes:
    """Return a TorchScript archive without its debug records.

    They hold where on the training machine torch's own sources lay, and nothing
    that loading needs.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                record = zipfile.ZipInfo(entry.filename)  # dated 1980, so bytes repeat
                record.compress_type = zipfile.ZIP_DEFLATED
                new.writestr(record, old.read(entry))
    return out.getvalue()


def save_plain(trained: Path, out: Path) -> None:
    """Write the trained model to ``out`` for ``torch.load``, free of local paths."""
    import torch  # noqa: PLC0415 - only here, and slow to import

    model = torch.load(trained, map_location="cpu", weights_only=False)
    for parameter in model.parameters():
        parameter.grad = None
    plain_save = torch.jit.save

    def stripped_save(module: Any, stream: io.BytesIO) -> None:
        code = io.BytesIO()
        plain_save(module, code)
        stream.write(without_debug_records(code.getvalue()))

    buffer = io.BytesIO()
    # e3nn pickles its generated code through torch.jit.save.
    with mock.patch.object(torch.jit, "save", stripped_save):
        torch.save(model, buffer)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(out)


def main() -> None:
    """Make the data, train, save and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / f"{NAME}.model")
    parser.add_argument("--work", type=Path, default=Path(f"{NAME}-work"))
    parser.add_argument("--epochs", type=int, default=56)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-only", action="store_true")
    args = parser.parse_args()
    if not args.evaluate_only:
        args.work.mkdir(parents=True, exist_ok=True)
        start = time.time()
        for file, seed, share in (
            ("train.xyz", TRAIN_SEED, 1.0),
            ("valid.xyz", VALID_SEED, VALID_SHARE),
        ):
            if not (args.work / file).exists():
                write(args.work / file, make_set(seed, share), format="extxyz")
        print(f"data: {time.time() - start:.0f} s", flush=True)
        start = time.time()
        save_plain(train(args.work, args.epochs, args.threads), args.out)
        print(f"training: {time.time() - start:.0f} s", flush=True)
    evaluation = here / f"evaluate_{NAME.replace('-', '_')}.py"
    report = args.out.with_suffix(".json")
    subprocess.run(
        [sys.executable, str(evaluation), "--model", str(args.out), "--json", str(report)],
        check=True,
    )


if __name__ == "__main__":
    main()
