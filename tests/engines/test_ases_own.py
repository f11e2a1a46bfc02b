"""ASE's own tests of what it does with a calculator, with a daemon's in place of EMT."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ase
import pytest

from conftest import RunningDaemon

TESTS = Path(ase.__file__).parent / "test"
FOLDERS = (
    "atoms bravais calculator cell constraints db filter fio forcefields geometry md neb optimize precon vibrations"
)
NOT_OURS = ("plumed", "socketio", "castep", "standardization")
"""Other calculators' own."""
LEFT_OUT = {
    "fio/test_extxyz.py::test_basic_functionality": "it asks for the energy, and expects that all else was computed",
    "forcefields/test_forceqmmm.py::test_forceqmmm": "it asks EMT for its cutoff",
    "neb/test_dynamic_neb.py": "it counts evaluations in a subclass's `calculate`",
    "vibrations/test_bond_polarizability_raman.py::test_bulk": "degenerate modes mix by the last digit",
    "md/test_bussi.py::test_bussi_paranoia_check": "half a minute of statistics over the thermostat",
    "md/test_bussi.py::test_bussi_paranoia_check2": "likewise",
}


@pytest.fixture(scope="module")
def daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    return start_shared_daemon("--model", "emt")


def test_they_pass(daemon: RunningDaemon, tmp_path: Path, compatible: Callable[..., None]) -> None:
    files = [
        path
        for folder in FOLDERS.split()
        for path in sorted((TESTS / folder).rglob("test_*.py"))
        if "import EMT" in path.read_text() and not any(name in path.parts for name in NOT_OURS)
    ]
    left_out = [f"--deselect={name}" for name in LEFT_OUT]
    plain = ["-q", "-p", "ases_emt", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    for what in ("shape", "dtype"):
        plain += ["-W", f"ignore:Setting the {what} on a NumPy array"]  # what ASE 3.29 has numpy 2.5 warn of
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *plain,
            f"--rootdir={TESTS}",
            f"--basetemp={tmp_path}/base",
            *left_out,
            *files,
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "ROOTSTOCKD_SOCKET": str(daemon.socket),
            "ROOTSTOCKD_PATIENCE": "60",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 380
    assert daemon.client().status()["evaluations"] > 1000, "these tests ask somebody else"
    compatible(
        code="ASE",
        version=ase.__version__,
        role="driver",
        transport="Unix socket",
        ran=f"its own tests that use EMT, {len(LEFT_OUT)} left out for other reasons",
    )
