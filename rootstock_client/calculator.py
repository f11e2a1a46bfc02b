"""The ASE calculator whose numbers come from a daemon."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, cast

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, CalculatorSetupError, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

import rootstock_client.ase_errors  # noqa: F401 - has our errors be ASE's
from rootstock_client.connection import Connection
from rootstock_client.errors import model_changed, not_the_model, used_in_step
from rootstock_client.extras import read_extras
from rootstock_client.ipi import PROTOCOL_VERSION, FloatArray, ForceReady
from rootstock_client.parameters import ON_REQUEST, PARAMETERS, SENT, fingerprint_or_none
from rootstock_client.patience import patience_in_seconds
from rootstock_client.runtime_dir import find_socket
from rootstock_client.snapshot import Box, Snapshot
from rootstock_client.units import BOHR, HARTREE

_POTENTIAL = ("model", "dtype", "dispersion")
"""The parameters that choose a potential; the others say how it is evaluated."""
_BOHR, _FORCE = np.array(BOHR), np.array(HARTREE / BOHR)
"""Arrays: numpy takes several times as long to look at a float."""
_NO_ENERGIES = np.empty(0)


class RootstockCalculator(Calculator):  # type: ignore[misc]  # ASE is not typed
    """An ASE calculator that sends structures to a daemon. `RootstockClient.calculator` makes them.

    Energies are in eV, forces in eV/Å, stress in eV/Å³ (Voigt order xx, yy, zz, yz, xz, xy; ASE's sign), per-atom
    energies in eV. Stress is there for systems that are periodic along at least one lattice vector and have a cell
    volume. Charge and spin are taken from `atoms.info["charge"]` and `atoms.info["spin"]`.

    Stress and per-atom energies are computed when they are asked for, and from then on along with each new structure
    as long as each of them is asked for it, so that a relaxation with variable cell costs one evaluation a step.

    It may be pickled, copied and used after a fork (each copy opens a session of its own), and shared by threads.

    Args:
        model: catalogue name.
        socket: the daemon's session socket; looked for as RootstockClient does if None.
        dtype: what the model computes in; the catalogue's choice if None.
        head: which of the model's heads.
        dispersion: True for the D3 correction of mace-torch's `mace_mp(dispersion=True)`; a dict for another, with some
            of `damping` ("bj", "zero", "bjm" or "zerom"), `xc` (the functional, "pbe"), `cutoff` and `cnthr` (for
            coordination numbers), both in Å and 40 Bohr.
        exact: same structure, same bits, whatever came before and whatever other sessions do: the model's reference
            implementation, one structure a pass. Slower.
        tolerance: how far a faster implementation's forces may differ from the reference's on the first structure, in
            eV/Å, and by this part of the largest force where that is over 1 eV/Å, up to 100; energies (in eV an atom)
            and virials likewise. By default 1e-4 in float32 and 1e-9, rounding, in float64.
        properties: what is computed with each evaluation, asked for or not: some of "stress" and "energies". For
            workflows that write down what a calculator has, and can't be had to ask.
        fingerprint: what the model's must be; see the attribute. None takes it as it is found.
        patience: how many seconds to wait for a daemon that has gone; see RootstockClient.

    Raises:
        DaemonNotFoundError: no socket was found.
        TypeError, ValueError: a parameter is of the wrong kind.
    """

    name = "rootstockd"
    discard_results_on_any_change = True
    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "energies", "stress"]

    def __init__(  # noqa: PLR0913 - what a session can ask for
        self,
        model: str,
        *,
        socket: str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        head: str | None = None,
        dispersion: bool | dict[str, Any] = False,
        exact: bool = False,
        tolerance: float | None = None,
        properties: Sequence[str] = (),
        fingerprint: str | None = None,
        patience: float | None = None,
    ) -> None:
        self._begin(Connection(find_socket(socket), patience_in_seconds(patience)))
        self._seen: Snapshot | None = None
        """What `results` belong to. None before they change, so that whoever sees one twice has those in between."""
        self.results: dict[str, Any]
        how = {"exact": exact, "tolerance": tolerance, "properties": properties}
        super().__init__(model=model, dtype=dtype, head=head, dispersion=dispersion, fingerprint=fingerprint, **how)

    backend: str | None
    """What computed the last result, such as `mace-torch`, `fused`, or the name of an ASE calculator."""
    _extras: bytes | None
    """Of the last result, if its fingerprint was found to be right."""
    _demanded: bool
    """The fingerprint was given, and nothing has answered with it yet."""

    @property
    def fingerprint(self) -> str | None:
        """What the potential is, as 16 hexadecimal digits: weights, settings, versions, dtype and dispersion.

        Device and backend are not in it. None until a daemon has said it with a result, if it was not given. From then
        on results with another fingerprint, or with none, are not given out, but ModelChangedError is raised. Setting
        `model`, `dtype` or `dispersion` makes it None again. It is in `parameters`, for codes that write these down.
        """
        return cast("str | None", self.parameters["fingerprint"])

    @fingerprint.setter
    def fingerprint(self, fingerprint: str | None) -> None:
        self.parameters["fingerprint"] = fingerprint_or_none(fingerprint)
        self._demand()

    def _demand(self) -> None:
        """The fingerprint is compared with that of the next result."""
        self._demanded, self._extras = self.fingerprint is not None, None

    def __repr__(self) -> str:
        settings = "".join(f"{key}={value!r}, " for key, value in self.todict().items() if key != "fingerprint")
        return f"{type(self).__name__}({settings}socket={str(self._connection.path)!r})"

    def _begin(self, connection: Connection) -> None:
        """Have a session that knows nothing of what went before."""
        self._connection = connection
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._in_step = False
        """Whoever has the lock all the same runs inside the step, in its thread."""
        self._box: Box | None = None
        self._asked: set[str] = set()
        self._asked_before: set[str] = set()
        self._system: tuple[Any, ...] = ()
        self._init = b""
        self._extras = self.backend = None

    # --- what ASE calls. Its own layer compares and copies with generality that costs several times the wire.

    @property
    def atoms(self) -> Atoms | None:
        """The structure that `results` belong to, as a copy: what numbers depend on, without tags and the like."""
        seen = self._seen  # once: another thread may be at a step
        return None if seen is None else seen.atoms()

    @atoms.setter
    def atoms(self, atoms: Atoms | None) -> None:
        self._seen = None if atoms is None else Snapshot(atoms)

    def set(self, **parameters: Any) -> dict[str, Any]:
        """Change some parameters, called as in the constructor; those that have changed.

        Raises:
            TypeError: there is no such parameter, or a value is of the wrong kind.
            InStepError: it was called inside a step, whose results would count as those of the new parameters.
        """
        if unknown := parameters.keys() - PARAMETERS.keys():
            raise TypeError(f"there is no parameter {', '.join(sorted(unknown))}; there are {', '.join(PARAMETERS)}")
        checked = {name: PARAMETERS[name](value) for name, value in parameters.items()}
        with self._lock:
            if self._in_step:
                raise used_in_step("parameters were set")
            changed = super().set(**checked)
            if "fingerprint" in parameters:  # it belongs to what is chosen now
                self._potential = self._chosen(self._settings())
                self._demand()
            else:
                self._forget_another(self._settings())
        return cast("dict[str, Any]", changed)

    def todict(self, skip_default: bool = True) -> dict[str, Any]:  # noqa: FBT001,FBT002 - ASE's signature
        """What ASE writes beside results: what `RootstockClient.calculator` takes to make the calculator again.

        The fingerprint is among it once it is known, so that the one made again is the same potential or refuses.
        """
        return {
            key: value
            for key, value in self._settings().items()
            if not skip_default or not (value is None or value is False or value == ())
        }

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last evaluation, exactly; charge and spin count, other `info` does not."""
        del tol
        seen = self._seen
        return list(all_changes) if seen is None else Snapshot(atoms).changes(seen)

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:  # noqa: FBT001,FBT002
        """A property, evaluated if need be; see ASE.

        Raises:
            PropertyNotImplementedError: the model does not have it, or the system has no stress.
            CalculationFailed: the structure can't be evaluated: EvaluationError, InvalidStructureError.
            ModelChangedError: the catalogue has another potential under this model's name by now.
            InStepError: it would take an evaluation inside another one, or the session was closed inside it.
            RootstockError: all else, and these; the message says why. `rootstock_client.ase_errors` has what is what.
        """
        if name not in self.implemented_properties:
            raise PropertyNotImplementedError(f"{name} is not among what rootstockd computes.")
        self._leave_to_parent()
        with self._lock:
            snapshot = self._seen if atoms is None else Snapshot(atoms)
            if self._in_step:
                result = self._look(name, snapshot)
                if result is None and allow_calculation:
                    raise used_in_step()
            else:
                try:
                    self._in_step = True
                    if snapshot is not None and (self._seen is None or snapshot.changes(self._seen)):
                        self._seen, self.results = None, {}
                        self._asked_before, self._asked = self._asked, set()
                    if name not in self.results:
                        if not allow_calculation:
                            return None
                        self._calculate(snapshot, frozenset({name}), self.results)
                    if allow_calculation:  # else it is taken if it is there, as by what writes trajectories
                        self._asked.add(name)
                    result = self.results[name]
                finally:
                    self._in_step = False
            return result.copy() if isinstance(result, np.ndarray) else result

    def _look(self, name: str, snapshot: Snapshot | None) -> Any:
        """A property if it is there, else None. Nothing is touched: a step goes on after this."""
        if snapshot is None or self._seen is None or snapshot.changes(self._seen):
            return None
        return self.results.get(name)

    def get_spin_polarized(self) -> bool:
        """Potentials have no spin density. (Without this, ASE gives each instance a method of its own: a cycle.)"""
        return False

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate `atoms` and fill `results`."""
        del system_changes
        self._leave_to_parent()
        with self._lock:
            if self._in_step:
                raise used_in_step()
            try:
                self._in_step = True
                self._calculate(self._seen if atoms is None else Snapshot(atoms), frozenset(properties or ()), {})
            finally:
                self._in_step = False

    def _leave_to_parent(self) -> None:
        """After a fork the session is the parent's, and locks may be held for ever by threads that are not there."""
        if self._pid == os.getpid():
            return
        with _forked.lock:
            if self._pid != os.getpid():
                lost = self._connection
                self._begin(Connection(lost.path, lost.patience, met=lost.met))

    # --- the exchange

    def _calculate(self, snapshot: Snapshot | None, asked: frozenset[str], given: dict[str, Any]) -> None:
        """Have results with what is asked for; those of the same structure that were `given` out stay as they were.

        Another backend may compute it this time: a session's first answer is the reference's.
        """
        if snapshot is None:
            raise CalculatorSetupError("there are no atoms to evaluate yet.")
        if self._box is None or not self._box.fits(snapshot):
            self._box = Box(snapshot)
        if "stress" in asked and not self._box.has_stress:
            raise PropertyNotImplementedError("stress needs a periodic system with a volume: set cell and pbc.")
        wanted = (asked | self._asked | self._asked_before | set(self.parameters["properties"])) & ON_REQUEST
        if not self._box.has_stress:
            wanted -= {"stress"}
        results = self._evaluate(snapshot, self._box, wanted)
        self._seen = None
        self.results = {**results, **given}
        self._seen = snapshot

    def _evaluate(self, snapshot: Snapshot, box: Box, wanted: frozenset[str]) -> dict[str, Any]:
        positions = snapshot.positions / _BOHR
        forces = np.empty_like(positions)
        per_atom = len(positions) if "energies" in wanted else 0
        answer, energies = self.exchange(self.describe(snapshot, box, wanted), box.head, positions, forces, per_atom)
        energy = float(answer.energies[0]) * HARTREE
        np.multiply(forces, _FORCE, forces)
        results = {"energy": energy, "free_energy": energy, "forces": forces}
        if "stress" in wanted:
            results["stress"] = full_3x3_to_voigt_6_stress(answer.virials[0] * (-HARTREE / box.volume))
        if per_atom:
            results["energies"] = energies * HARTREE
        return results

    def exchange(
        self, init: bytes, head: bytes, positions: FloatArray, forces: FloatArray, energies: int = 0
    ) -> tuple[ForceReady, FloatArray]:
        """One evaluation in the wire's units, for drivers that have no ASE atoms.

        Args:
            init: what `describe` gave.
            head: the Box's.
            positions: (natoms, 3), Bohr, contiguous.
            forces: (natoms, 3), contiguous; filled with the forces in Hartree/Bohr.
            energies: how many per-atom energies were asked for.

        Returns:
            The answer, and the per-atom energies in Hartree.

        Raises:
            ModelChangedError: the catalogue has another potential under this model's name by now.
            RootstockError: the evaluation failed; the message says why.
        """
        answer = self._connection.evaluate(init, head, positions, forces)
        if answer.extras[0] == self._extras and not energies:  # the same bytes at nearly every step
            return answer, _NO_ENERGIES
        backend, fingerprint, per_atom = read_extras(answer.extras[0], energies)
        self.check_potential(fingerprint)
        self.backend, self._extras = backend, answer.extras[0]
        return answer, per_atom

    def _settings(self) -> dict[str, Any]:
        """The parameters, such that nobody changes them meanwhile; others note down things of their own beside them."""
        settings = {name: self.parameters[name] for name in PARAMETERS}
        if isinstance(dispersion := settings["dispersion"], dict):
            settings["dispersion"] = dict(dispersion)
        return settings

    @staticmethod
    def _chosen(settings: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(settings[name] for name in _POTENTIAL)

    def check_potential(self, fingerprint: str | None) -> None:
        """Whether what has answered is what has answered before.

        Args:
            fingerprint: of what has answered; None if it names none, as an older daemon does.

        Raises:
            ModelChangedError: it is not, or does not say.
        """
        if (before := self.fingerprint) in (None, fingerprint):
            self.parameters["fingerprint"], self._demanded = fingerprint, False
            return
        self._connection.close()  # a session keeps its model, and the next shall find what has been put back meanwhile
        if self._demanded:
            raise not_the_model(self.parameters["model"], before, fingerprint)
        raise model_changed(self.parameters["model"], before, fingerprint, "make a new calculator")

    def describe(self, snapshot: Snapshot, box: Box, wanted: frozenset[str]) -> bytes:
        """The INIT text for a system and what is wanted of it; made anew only when something in it has changed."""
        electrons = (snapshot.charge, snapshot.spin)
        settings = self._settings()
        sent = {name: settings[name] for name in SENT}
        system = (snapshot.numbers, snapshot.pbc, box.left_handed, electrons, wanted, sent)
        if system != self._system:
            fields = {
                "rootstock": PROTOCOL_VERSION,
                "numbers": snapshot.atomic_numbers.tolist(),
                "pbc": [bool(periodic) for periodic in snapshot.pbc],
                "charge": snapshot.charge,
                "spin": snapshot.spin,
                "want": ["energy", "forces", *sorted(wanted)],
                **sent,
            }
            self._init = json.dumps(fields).encode()
            self._system = system
            self._forget_another(settings)
        return self._init

    def _forget_another(self, settings: dict[str, Any]) -> None:
        """A fingerprint of what was chosen before these is none of theirs."""
        if (chosen := self._chosen(settings)) != self._potential:
            self._potential, self.fingerprint = chosen, None

    # --- its life

    def share_session(self, other: RootstockCalculator) -> None:
        """Go on in another calculator's session, in turns with it; each has parameters and results of its own.

        Args:
            other: a calculator of the same daemon.
        """
        other._leave_to_parent()
        self._begin(other._connection)

    def close(self) -> None:
        """Close the session. The next evaluation opens a new one; the one that this is called inside of fails."""
        self._leave_to_parent()
        self._connection.close()

    def __enter__(self) -> RootstockCalculator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        session = ("_connection", "_pid", "_lock", "_in_step", "_box")
        hidden = (*session, "_asked", "_asked_before", "_system", "_init", "_extras")
        state = {key: value for key, value in self.__dict__.items() if key not in hidden}
        # another thread may be at work
        seen, results = self._seen, self.results
        kept = seen is not None and seen is self._seen
        # copies have settings and results of their own, and copy.copy makes none
        return {
            **state,
            "parameters": copy.deepcopy(self.parameters),
            "results": dict(results) if kept else {},
            "_seen": seen if kept else None,
            "_address": (self._connection.path, self._connection.patience),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        address = state.pop("_address")
        self.__dict__.update(state)
        self._begin(Connection(*address))


class _Forked:
    """A lock that nobody holds in a process that was just forked."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.lock = threading.Lock()


_forked = _Forked()
