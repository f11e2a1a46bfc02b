"""A wheel and an sdist as they would be published, installed into empty environments of every Python that is here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import MARK, RunningDaemon

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
THIN = 2_100_000
"""Bytes that a client's installation may take beside numpy and ASE, without the byte code that Python makes of it."""
JOB = """
import json, sys
from ase.build import bulk
import rootstock_client
from rootstock_client import RootstockClient
from rootstock_client.errors import UnknownModelError

client = RootstockClient(sys.argv[1])
atoms = bulk("Cu", cubic=True)
atoms.rattle(0.1, seed=1)
atoms.calc = client.calculator("emt")
numbers = [atoms.get_potential_energy(), atoms.get_forces().tolist(), atoms.get_stress().tolist()]
assert "emt" in [model["name"] for model in client.models()]
try:
    client.calculator("no-such-model").get_potential_energy(atoms)
except UnknownModelError as error:
    assert error.hint
assert not {"click", "pydantic", "uvloop", "torch"} & set(sys.modules)
print(json.dumps([rootstock_client.__file__, numbers]))
"""


def run(*command: str | Path, **options: Any) -> str:
    options = {"timeout": 120, "cwd": "/", **options}
    # what was installed shall run, not what PYTHONPATH leads to
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | options.pop("env", {})
    done = subprocess.run(
        list(map(str, command)), env=variables, check=False, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Release:
    """What would be uploaded."""

    sdist: Path
    wheel: Path


def build(*options: str | Path, into: Path) -> None:
    """By uv, with the hatchling that is here."""
    run(BIN / "uv", "build", "--no-build-isolation", "--python", sys.executable, "--out-dir", into, *options)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """An sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, into=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Release(sdist, wheel)


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The repository's files."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no repository: what belongs to a release is not known")
    return set(run("git", "-c", "safe.directory=*", "ls-files", cwd=ROOT).splitlines())


def test_the_sdist_is_the_repository(release, tracked):
    with tarfile.open(release.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names - {"PKG-INFO", ".gitignore"} == {name for name in tracked if not name.startswith(".")}


def test_the_wheel_has_the_packages_and_nothing_else(release, tracked):
    with zipfile.ZipFile(release.wheel) as archive:
        names = set(archive.namelist())
    (info,) = {name.partition("/")[0] for name in names if name.partition("/")[0].endswith(".dist-info")}
    pages = info.replace(".dist-info", ".data/data/share/man/man1/")
    wanted = {name for name in tracked if name.startswith(("rootstockd/", "rootstock_client/"))}
    wanted |= {name.replace("systemd/", "rootstockd/units/", 1) for name in tracked if name.startswith("systemd/")}
    wanted |= {pages + Path(name).name for name in tracked if name.startswith("docs/man/man1/")}
    assert {name for name in names if not name.startswith(f"{info}/")} == wanted
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_of_the_sdist_is_that_of_the_repository(release, tmp_path):
    build("--wheel", ROOT, into=tmp_path)
    assert (tmp_path / release.wheel.name).read_bytes() == release.wheel.read_bytes()


def test_pypi_can_show_the_readme(release):
    run(sys.executable, "-m", "twine", "check", "--strict", release.sdist, release.wheel)


@pytest.mark.parametrize(
    ("folder", "version"), [("rootstock_client", "3.10"), ("rootstockd", "3.10"), ("worker", "3.9")]
)
def test_the_code_asks_for_no_newer_python(folder, version):
    path = ROOT / ("rootstockd/worker" if folder == "worker" else folder)
    run(BIN / "vermin", f"--target={version}-", "--no-tips", "--violations", path)


def interpreter(version: str) -> str | None:
    """A Python of that version: this one, one on the PATH, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    others = [str(path) for path in root.glob(f"versions/{version}.*/bin/python")]
    for path in (sys.executable, shutil.which(f"python{version}"), *others):
        said = "import sys; print('%d.%d' % sys.version_info[:2])"
        # a shim of pyenv's is there for each Python that it has, and ends with 127 where another is chosen
        if (
            path
            and subprocess.run([path, "-c", said], check=False, capture_output=True).stdout.strip() == version.encode()
        ):
            return path
    return None


@pytest.fixture(params=PYTHONS)
def python(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The Python of an empty environment."""
    found = interpreter(request.param)
    if found is None:
        pytest.skip(f"there is no Python {request.param} here")
    run(BIN / "uv", "venv", "--quiet", "--no-project", "--python", found, tmp_path / "venv")
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, wheel: Path, extra: str = "") -> None:
    run(BIN / "uv", "pip", "install", "--quiet", "--python", python, f"rootstockd{extra} @ {wheel.as_uri()}")


def run_job(python: Path, socket: Path) -> Path:
    """Run a job, and compare its numbers; where its packages are."""
    file, numbers = json.loads(run(python, "-I", "-c", JOB, socket))
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = EMT()
    assert numbers[0] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    assert numbers[1] == pytest.approx(atoms.get_forces(), abs=1e-9)
    assert numbers[2] == pytest.approx(atoms.get_stress(), abs=1e-9)
    return Path(file).parent.parent


def test_a_client_of_each_python(python, release, daemon: RunningDaemon):
    install(python, release.wheel)
    packages = run_job(python, daemon.socket)
    assert python.parent.parent in packages.parents
    own = [path for name in ("rootstockd*", "rootstock_client") for path in (packages.glob(f"{name}/**/*"))]
    assert sum(path.stat().st_size for path in own if path.is_file() and path.suffix != ".pyc") < THIN


@pytest.fixture
def folder() -> Iterator[Path]:
    """One whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="rsd-") as name:
        yield Path(name)


def test_a_daemon_of_each_python(python, release, folder):
    install(python, release.wheel, "[daemon]")
    command = (python.parent / "rootstockd",)
    options = ("--socket", folder / "a.sock")
    starting = ("--device", "cpu", "--model", "emt", "--log-file", folder / "log")
    run(*command, "start", *options, *starting, env={MARK: str(folder)})
    try:
        run_job(python, folder / "a.sock")
        assert json.loads(run(*command, "status", "--json", *options))["evaluations"] == 2  # the second for stress
    finally:
        run(*command, "stop", *options)
