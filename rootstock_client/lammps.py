"""LAMMPS as a driver: it moves the atoms, and a daemon gives energy, forces and virial, by `fix external`.

>>> from lammps import lammps  # doctest: +SKIP
>>> lmp = lammps()  # doctest: +SKIP
>>> lmp.file("in.setup")  # atoms, `pair_style zero 5.0`, integrators  # doctest: +SKIP
>>> Potential(lmp, "mace-mp-medium", elements=["Cu"])  # doctest: +SKIP
>>> lmp.command("run 1000")  # doctest: +SKIP

Neither LAMMPS nor its version is chosen here: the module asks the object that it is given.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.data import atomic_numbers

from rootstock_client.calculator import RootstockCalculator
from rootstock_client.client import RootstockClient
from rootstock_client.errors import InvalidStructureError, UnsupportedError

_ENERGY = {"metal": units.eV, "real": units.kcal / units.mol}
"""eV in LAMMPS's unit of energy; lengths are Å in both."""
_VIRIAL = [0, 1, 2, 5, 4, 3]
"""ASE's order, xx yy zz yz xz xy, in LAMMPS's, xx yy zz xy xz yz."""
_COMMANDS = ("command", "commands_list", "commands_string", "file")


class Potential:
    """A model as the potential of a LAMMPS object, in place of a pair style.

    LAMMPS goes on with the forces that it has if a callback fails. Here a step that fails gets NaN for forces, so that
    none is made with those of another, the run is stopped, and the command that ran raises the error: commands of `lmp`
    are replaced for that. What LAMMPS has in memory is worthless then; begin from the last restart file.

    `pe`, `press`, thermostats, barostats and `minimize` take energy and virial into account. Nothing is known of single
    atoms: computes such as `pe/atom` and `stress/atom` do not see the model, and say zero.

    Args:
        lmp: a `lammps.lammps` object of one process, with its atoms; `units metal` or `real`. It has to have a pair
            style that computes nothing, `pair_style zero CUTOFF` and `pair_coeff * *`, for its lists of neighbours.
        model: catalogue name.
        elements: symbols of the elements that LAMMPS's atom types 1, 2, ... are.
        socket, patience: as of `RootstockClient`.
        name: the fix's.
        charge, spin: total charge in e and spin multiplicity, for models that know them.
        settings: whatever else `RootstockClient.calculator` takes.

    Raises:
        UnsupportedError: there is more than one process of MPI, or other units.
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
        self._unit = _ENERGY.get(unit := str(lmp.extract_global("units")), 0.0)
        if not self._unit:
            raise UnsupportedError(f"LAMMPS has units {unit}.", f"There are {' and '.join(_ENERGY)}.")
        if lmp.extract_setting("world_size") > 1:
            raise UnsupportedError(
                "LAMMPS runs in several processes of MPI, and each has a part of the atoms only.",
                "Run it in one: what takes time is the model, and that is in the daemon.",
            )
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
        self._lmp, self._name = lmp, name
        self._error: BaseException | None = None
        self._tags, self._types, self._order = b"", b"", np.arange(0)
        self._atoms = Atoms()
        lmp.command(f"fix {name} all external pf/callback 1 1")
        lmp.command(f"fix_modify {name} energy yes virial yes")
        lmp.set_fix_external_callback(name, self._callback, None)
        for command in _COMMANDS:
            setattr(lmp, command, self._raising(getattr(lmp, command)))

    def _raising(self, command: Callable[..., Any]) -> Callable[..., Any]:
        """A method of LAMMPS's that raises what has failed meanwhile."""

        @functools.wraps(command)
        def run(*arguments: Any, **options: Any) -> Any:
            self._error = None
            try:
                result = command(*arguments, **options)
            except Exception as error:
                if self._error is None:
                    raise
                raise self._error from error  # LAMMPS has stumbled over NaN
            if self._error is not None:
                raise self._error
            return result

        return run

    def _callback(self, _caller: Any, _step: int, nlocal: int, tags: Any, x: Any, f: Any) -> None:
        """A step: x, (nlocal, 3), is LAMMPS's positions, and f, (nlocal, 3), is to be filled; in LAMMPS's order."""
        try:
            self._evaluate(nlocal, tags, x, f)
        except BaseException as error:  # KeyboardInterrupt, too: whatever is not raised here is lost in C
            f[:] = np.nan
            if self._error is None:
                self._error = error
            self._lmp.force_timeout()

    def _evaluate(self, nlocal: int, tags: Any, x: Any, f: Any) -> None:
        low, high, xy, yz, xz, periodic, _ = self._lmp.extract_box()
        types = self._lmp.numpy.extract_atom("type")[:nlocal]
        if tags.tobytes() != self._tags or types.tobytes() != self._types:
            self._tags, self._types = tags.tobytes(), types.tobytes()
            if len(np.unique(tags)) != nlocal:
                raise UnsupportedError("LAMMPS's atoms have no numbers.", "Leave `atom_modify id no` out.")
            self._order = np.argsort(tags)
            self._atoms = Atoms(self._numbers[types[self._order]], info=self._info)
        atoms = self._atoms
        atoms.positions[:] = x[self._order]
        lengths = np.subtract(high, low)
        atoms.cell[:] = np.diag(lengths)
        atoms.cell[1, 0], atoms.cell[2, 0], atoms.cell[2, 1] = xy, xz, yz
        atoms.pbc[:] = periodic
        calculator = self.calculator
        # stress first: what is asked for then comes with it
        stress = calculator.get_property("stress", atoms) if any(periodic) else None
        energy, forces = calculator.get_property("energy", atoms), calculator.get_property("forces", atoms)
        virial = _of_cluster(atoms.positions, forces) if stress is None else -stress * atoms.get_volume()
        f[self._order] = forces / self._unit
        self._lmp.fix_external_set_energy_global(self._name, energy / self._unit)
        self._lmp.fix_external_set_virial_global(self._name, (virial[_VIRIAL] / self._unit).tolist())


def _of_cluster(positions: Any, forces: Any) -> Any:
    """The virial where nothing is periodic, in ASE's order: positions times forces."""
    whole = positions.T @ forces
    return np.array([whole[0, 0], whole[1, 1], whole[2, 2], whole[1, 2], whole[0, 2], whole[0, 1]])
