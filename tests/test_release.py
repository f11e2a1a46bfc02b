"""What is released: a wheel and an sdist that are complete and small, and work on every Python that is here."""

from __future__ import annotations

import ast
import email
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import rootstockd
from conftest import MARK, RunningDaemon

ROOT = Path(__file__).parent.parent
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "uv"
MB = 10**6
OLDEST = (3, 10)
STEP = """
import sys
from ase.build import bulk
from rootstock_client import RootstockClient
atoms = bulk("Cu", cubic=True)
atoms.calc = RootstockClient(sys.argv[1]).calculator("emt")
print(sys.version_info[:2], atoms.get_potential_energy())
"""


def uv(*arguments: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([UV, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that comes of it."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--out-dir", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_the_sdist_has_what_the_wheel_needs(wheel: Path, tmp_path: Path) -> None:
    uv("build", "--quiet", "--wheel", "--out-dir", tmp_path)
    (from_tree,) = tmp_path.glob("*.whl")
    assert digests(from_tree) == digests(wheel)


def test_the_wheel_is_complete_and_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MB
    with zipfile.ZipFile(wheel) as archive:
        assert sum(file.file_size for file in archive.infolist()) < 2 * MB
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith("/METADATA"))
        metadata = Metadata.from_email(archive.read(about))  # which raises whatever an index would refuse
        readme = email.message_from_bytes(archive.read(about)).get_payload()
    assert (metadata.name, str(metadata.version)) == ("rootstockd", rootstockd.__version__)
    assert metadata.license_expression == "MIT" and metadata.description_content_type == "text/markdown"
    assert str(readme).startswith("# rootstockd")
    tracked = subprocess.run(
        ["git", "ls-files", "rootstockd", "rootstock_client"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode == 0 and tracked.stdout:
        assert set(tracked.stdout.splitlines()) <= names
    strange = {name for name in names if "__pycache__" in name or name.startswith(("tests", "docs", "examples"))}
    assert not strange
    assert {"rootstockd/units/system/rootstockd@.service", "rootstock_client/py.typed"} <= names


def test_the_sdist_has_tests_and_documents(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "tests/conftest.py",
        "docs/tutorial.md",
        "examples/md_nve.py",
        "benchmarks/ipc.py",
        "Makefile",
        "LICENSE",
    } <= names
    assert not any("__pycache__" in name or name.startswith((".ci", "benchmarks/results")) for name in names)


def test_the_code_is_that_of_the_oldest_python() -> None:
    for package in ("rootstockd", "rootstock_client"):
        for path in (ROOT / package).rglob("*.py"):
            ast.parse(path.read_text(), str(path), feature_version=OLDEST)


def pythons() -> list[str]:
    """Those that are installed, one of each version; pyenv's lie beside the path."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    places = [os.environ["PATH"], *(str(place) for place in sorted(root.glob("versions/*/bin")))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join(places))
        listed = json.loads(uv("python", "list", "--only-installed", "--output-format", "json"))
    found: dict[tuple[int, int], str] = {}
    for each in listed:
        version = each["version_parts"]["major"], each["version_parts"]["minor"]
        if each["implementation"] == "cpython" and each.get("variant", "default") == "default" and version >= OLDEST:
            found.setdefault(version, each["path"])
    return [found[version] for version in sorted(found)]


@pytest.fixture(params=pythons(), ids=lambda path: Path(path).name)
def python(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    uv("venv", "--quiet", "--python", request.param, tmp_path / "venv")
    return tmp_path / "venv/bin/python"


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as name:
        yield Path(name)


def test_it_works_when_installed(wheel: Path, python: Path, daemon: RunningDaemon, folder: Path) -> None:
    """The client alone, towards a daemon that is there; then with the extra, a daemon of its own."""
    uv("pip", "install", "--quiet", "--python", python, wheel)
    done = subprocess.run([python, "-I", "-c", STEP, daemon.socket], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    installed = python.parent.parent.glob("lib/python*/site-packages/rootstock*/**/*")
    assert sum(file.stat().st_size for file in installed if file.is_file() and file.suffix != ".pyc") < 2 * MB

    uv("pip", "install", "--quiet", "--python", python, f"rootstockd[daemon] @ {wheel.as_uri()}")
    command = [python.parent / "rootstockd"]
    address = folder / "s.sock"
    environment = {**os.environ, MARK: str(folder), "ROOTSTOCKD_SOCKET": str(address)}
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    start = [*command, "start", "--device", "cpu", "--model", "emt", "--log-file", folder / "log"]
    started = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    try:
        step = subprocess.run([python, "-I", "-c", STEP, address], capture_output=True, text=True, check=False)
        assert step.returncode == 0, step.stderr
        assert step.stdout == done.stdout
    finally:
        stopped = subprocess.run([*command, "stop"], env=environment, capture_output=True, text=True, check=False)
    assert stopped.returncode == 0, stopped.stderr
