"""One process of jobs for `chaos`: a thread for each session, round after round of MD, each compared with the first.

Its argument is JSON: socket, folder and sessions. With `reference` true it does one round of each and keeps it in the
folder; otherwise it goes on until its standard input ends, and prints a line of JSON for each round and each error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from ase.build import bulk
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet

from rootstock_client import RootstockClient, RootstockError

STEPS = 25
"""Evaluations in a round."""
CLOSE = 1e-8
"""How far MACE in float64 by a faster implementation may be from the reference, in eV/Å and eV."""
_stdout = threading.Lock()


def say(**words: Any) -> None:
    """A line for whoever started us."""
    with _stdout:
        print(json.dumps(words), flush=True)


class Session:
    """One session's job.

    Args:
        client: the daemon.
        folder: where references lie.
        number: the session's, its seed too.
        model: catalogue name.
        exact: follow a trajectory bit by bit; otherwise evaluate the structures of one, within a tolerance.
    """

    def __init__(self, client: RootstockClient, folder: Path, number: int, model: str, *, exact: bool) -> None:
        self.number, self.model, self.exact = number, model, exact
        self.file = folder / f"reference-{number}.npz"
        self._client = client
        self._calculator = client.calculator(model, exact=exact)

    def trajectory(self, calculator: Any) -> dict[str, np.ndarray]:
        """A round of MD from the session's seed."""
        rng = np.random.default_rng(self.number)
        atoms = bulk("Cu", cubic=True) * (1 + self.number % 2, 1, 1)
        atoms.rattle(0.05, rng=rng)
        masses = atoms.get_masses()[:, None]
        atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * np.sqrt(masses * 600 * units.kB))
        atoms.calc = calculator
        if self.number % 3:
            dynamics = VelocityVerlet(atoms, 2 * units.fs)
        else:
            dynamics = Langevin(atoms, 2 * units.fs, temperature_K=600, friction=0.02, fixcm=False, rng=rng)
        found: dict[str, list[Any]] = {"positions": [], "energies": [], "forces": []}
        for _ in range(STEPS):
            dynamics.run(1)
            found["positions"].append(atoms.positions.copy())
            found["energies"].append(atoms.get_potential_energy())
            found["forces"].append(atoms.get_forces())
        return {key: np.array(values) for key, values in found.items()}

    def reference(self) -> None:
        """The undisturbed round, kept."""
        with self._client.calculator(self.model, exact=True) as calculator:
            np.savez(self.file, **self.trajectory(calculator))

    def begin(self) -> None:
        """Open the session: a job that has none yet may fail where there is no daemon just then."""
        atoms = bulk("Cu", cubic=True)
        atoms.calc = self._calculator
        atoms.get_potential_energy()

    def play(self) -> float | None:
        """One round, compared; how far off it was where that is too far."""
        with np.load(self.file) as reference:
            expected = dict(reference)
        if self.exact:
            found = self.trajectory(self._calculator)
            if all(found[key].tobytes() == expected[key].tobytes() for key in expected):
                return None
            return max(float(np.abs(found[key] - expected[key]).max()) for key in expected)
        atoms = bulk("Cu", cubic=True) * (1 + self.number % 2, 1, 1)
        atoms.calc = self._calculator
        worst = 0.0
        for step in range(STEPS):
            atoms.positions[:] = expected["positions"][step]
            off = np.abs(atoms.get_forces() - expected["forces"][step]).max()
            worst = max(worst, float(off), abs(atoms.get_potential_energy() - expected["energies"][step]))
        return None if worst <= CLOSE else worst

    def run(self, enough: threading.Event) -> None:
        """Round after round."""
        rounds = 0
        while not enough.is_set():
            try:
                off = self.play()
            except RootstockError as error:  # this round is lost; the next begins from the start
                say(session=self.number, model=self.model, error=type(error).__name__, message=str(error))
                time.sleep(0.2)
                continue
            except Exception as error:
                say(session=self.number, model=self.model, error=type(error).__name__, message=repr(error))
                return
            rounds += 1
            say(session=self.number, model=self.model, exact=self.exact, evaluations=STEPS, off=off)
            if rounds % 4 == 0:
                self._calculator.close()
        self._calculator.close()


def descriptors() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    """Read the argument, run the sessions."""
    task = json.loads(sys.argv[1])
    logging.basicConfig(format="%(asctime)s %(message)s")
    client = RootstockClient(task["socket"])
    sessions = [Session(client, Path(task["folder"]), **fields) for fields in task["sessions"]]
    if task.get("reference"):
        for session in sessions:
            session.reference()
        return
    for session in sessions:
        session.begin()
    say(ready=True)
    before = descriptors()
    enough = threading.Event()
    threads = [threading.Thread(target=session.run, args=(enough,)) for session in sessions]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    enough.set()
    for thread in threads:
        thread.join()
    say(descriptors_left=descriptors() + len(sessions) - before)  # they were open then


if __name__ == "__main__":
    main()
