"""An installation for jobs, without the daemon's needs: a virtual environment with what the package depends on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.socketio import SocketIOCalculator

import rootstockd
from conftest import RunningDaemon
from rootstockd.__main__ import NEEDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCE = Path(rootstockd.__file__).parent.parent
PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
BASE = {re.split("[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's Python."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in (*BASE, "numpy.libs", "scipy", "scipy.libs"):
        beside = Path(str(metadata.distribution(name.partition(".")[0]).locate_file(name)))
        if beside.exists():
            (packages / name).symlink_to(beside)
    for name in ("rootstockd", "rootstock_client"):
        (packages / name).symlink_to(SOURCE / name)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={"PATH": "/nowhere"},  # where no other command is that it could lead to
    )


def test_the_command_leads_to_the_next_in_the_path(python: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("link", "client", "site")]
    for folder in folders:
        folder.mkdir()
    link, client, site = (folder / "rootstockd" for folder in folders)
    client.write_text(f"#!{python} -I\nfrom rootstockd.__main__ import main\nmain()\n")
    client.chmod(0o755)
    link.symlink_to(client)

    def says(first: Path) -> subprocess.CompletedProcess[str]:
        path = ":".join(map(str, folders))
        return subprocess.run(
            [first, "status", "--json"], check=False, capture_output=True, text=True, timeout=60, env={"PATH": path}
        )

    for first in (link, client):
        assert "for clients only" in says(first).stderr  # and does not go round in circles
    broken = tmp_path / "broken/rootstockd"
    broken.parent.mkdir()
    broken.write_text("#!/nowhere/python\n")
    broken.chmod(0o755)
    folders.insert(2, broken.parent)
    for first in (link, client):
        assert "for clients only" in says(first).stderr
    site.write_text('#!/bin/sh\necho "$0 $*"; exit 3\n')
    site.chmod(0o755)
    for first in (link, client):
        done = says(first)
        assert (done.returncode, done.stdout) == (3, f"{site} status --json\n"), done.stderr


def test_the_command_says_what_it_takes(python: Path) -> None:
    def says() -> str:
        done = run(python, "-m", "rootstockd", "start", "--device", "cpu")
        assert done.returncode == 1
        assert "pip install 'rootstockd[daemon]'" in done.stderr and "Traceback" not in done.stderr
        return done.stderr.splitlines()[0]

    assert says().endswith(f"without {', '.join(NEEDS)}.")
    assert run(python, "-m", "rootstockd", "--version").stdout == f"rootstockd, version {rootstockd.__version__}\n"
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    for name in set(NEEDS) - {"uvloop"}:  # they came with something else
        origin = Path(str(util.find_spec(name).origin))  # type: ignore[union-attr]
        beside = origin if origin.name != "__init__.py" else origin.parent
        (packages / beside.name).symlink_to(beside)
    assert says().endswith("without uvloop.")


def test_a_driver_that_listens_is_attached(python: Path, daemon: RunningDaemon, tmp_path: Path) -> None:
    """By the command that is installed beside it."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.write(tmp_path / "init.xyz")

    def numbers(atoms: Atoms) -> list[float]:
        return [atoms.get_potential_energy(), *atoms.get_forces().ravel()]

    address = f"client-only-{os.getpid()}"
    options = ("--model", "emt", "--structure", tmp_path / "init.xyz", "--socket", daemon.socket)
    command = [python, "-I", "-m", "rootstockd", "attach", address, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        with SocketIOCalculator(unixsocket=address) as calculator:
            atoms.calc = calculator
            found = numbers(atoms)
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (0, "the driver has ended"), said
    atoms.calc = EMT()
    np.testing.assert_allclose(found, numbers(atoms), atol=1e-9)


def test_all_needs_are_known() -> None:
    """What the extra asks for on this Python, beyond what a client has, is what the command looks for."""
    extra = PROJECT["optional-dependencies"]["daemon"]
    wanted = {requirement.partition(">")[0] for requirement in extra if "python_version" not in requirement} - BASE
    provided = {
        name: {distribution.replace("_", "-") for distribution in found}
        for name, found in metadata.packages_distributions().items()
    }
    assert {name for name, found in provided.items() if wanted & found} & set(NEEDS) == set(NEEDS)
    assert wanted <= {distribution for name in NEEDS for distribution in provided[name]}
