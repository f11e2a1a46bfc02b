"""Environments that uv builds, for real: small ones, of numpy and at most ASE."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, rootstockd, wait_for
from rootstock_client.errors import EvaluationError, ModelLoadError
from rootstockd.environment_builds import archive
from rootstockd.environment_builds.archive import Description, unpacked
from rootstockd.environment_builds.building import Plan, build, torch_backend, torch_flavour, without_torchs_builds
from rootstockd.environment_builds.pythons import readable_by_all
from rootstockd.environments.builds import (
    Build,
    EnvironmentBuildError,
    built_environments,
    find_build,
    problems_of,
)
from rootstockd.environments.finding import find_environment
from rootstockd.environments.packages import site_packages
from rootstockd.environments.specification import (
    Specification,
    SpecificationError,
    find_specification,
    read_specification,
    specification_files,
)
from rootstockd.settings import state_dir

NOWHERE = "http://127.0.0.1:9"
"""A proxy that is not there."""
CHECK = """
[verify]
model = "emt"
symbols = ["Cu", "Cu", "Cu", "Cu"]
cell = [[3.62, 0.0, 0.0], [0.0, 3.62, 0.0], [0.0, 0.0, 3.62]]
positions = [[0.0, 0.0, 0.12], [0.0, 1.81, 1.81], [1.81, 0.1, 1.81], [1.73, 1.81, 0.0]]
energy = 0.097283
forces = [
  [-0.30095, -0.03006, -0.88947],
  [-0.30639, 0.38454, 0.46316],
  [0.0225, -0.73564, 0.45747],
  [0.58485, 0.38115, -0.03116],
]
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of this test's own."""
    folder = tmp_path / "state"
    folder.mkdir()
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(folder))
    return folder


def env(*arguments: str | Path, fails: bool = False, **variables: str) -> str:
    """Run `rootstockd env …`; what it says."""
    done = rootstockd("env", *arguments, env={**os.environ, **variables})
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_index(folder: Path) -> None:
    """Wheels without content: for what is not about what is in packages."""
    for name, versions in (("numpy", ("1.0", "1.1", "2.0")), ("fellow", ("1.0",))):
        (folder / name).mkdir(parents=True)
        made = [make_wheel(folder / name, name, version).name for version in versions]
        (folder / name / "index.html").write_text("".join(f'<a href="{wheel}">{wheel}</a>' for wheel in made))


def use_index(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Use this index and no other."""
    patch.setenv("UV_DEFAULT_INDEX", folder.as_uri())
    patch.setenv("UV_CACHE_DIR", str(folder.parent / "cache"))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index, and no other."""
    folder = tmp_path / "index"
    make_index(folder)
    use_index(folder, monkeypatch)
    return folder


def digest_in_record(text: str) -> str:
    return f"sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()}"


def make_wheel(folder: Path, name: str, version: str, more: dict[str, str] | None = None) -> Path:
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        **(more or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        record = [f"{file},{digest_in_record(text)},{len(text.encode())}\n" for file, text in files.items()]
        wheel.writestr(f"{info}/RECORD", "".join((*record, f"{info}/RECORD,,\n")))
    return path


def specify(file: Path, *requirements: str, more: str = "", python: str = sys.executable) -> Path:
    """Write a specification. A Python that is named need not be looked for, which takes uv longer than all the rest."""
    file.write_text(f"requirements = {json.dumps(requirements)}\npython = {json.dumps(python)}\n{more}")
    return file


def fails_to_build(name: str, *arguments: str | Path, **variables: str) -> str:
    """What a build that fails says, in one line."""
    return " ".join(env("create", name, *arguments, fails=True, **variables).split())


def found(name: str) -> Build:
    """The build in use."""
    build = find_build(name)
    assert build is not None
    return build


def another_python() -> str:
    """A Python of another version than the one that runs the tests, if this machine has one."""
    found = [shutil.which(f"python3.{minor}") for minor in (9, 10, 12, 13)]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True).stdout.strip()
        found = [*map(str, sorted(Path(root).glob("versions/3.*/bin/python3.*[0-9]"))), *found]
    for path in filter(None, found):
        ask = [path, "-c", "import sys; print(sys.version_info >= (3, 9) and sys.version_info[1])"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() not in ("False", str(sys.version_info[1])):
            return path
    return sys.executable


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with one environment, `tiny`: numpy and ASE, in another Python where there is one."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTSTOCKD_STATE", str(folder))
        spec = specify(folder / "tiny.toml", "numpy", "ase", more=CHECK)
        env("create", "tiny", "--spec", spec, "--python", another_python())
    return folder


@pytest.fixture
def tiny(shared_state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory with `tiny`, to be looked at only."""
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(shared_state))
    return shared_state


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a state directory that has an environment `own`, and the index it was built from."""
    folder = tmp_path_factory.mktemp("built")
    make_index(folder / "index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTSTOCKD_STATE", str(folder / "state"))
        use_index(folder / "index", patch)
        env("create", "own", "--spec", specify(folder / "own.toml", "numpy<2"))
    return folder


@pytest.fixture
def own(built: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """A copy of it that a test may harm, in a state directory of the test's own."""
    shutil.copytree(built / "state/environments", state / "environments", symlinks=True)
    use_index(built / "index", monkeypatch)
    return found("own")


# --- a worker in an environment

PROBE = """
import json, sys
from importlib import import_module
from ase.calculators.emt import EMT

def fails(name):
    try:
        import_module(name)
    except ImportError:
        return True
    return False

class Probe(EMT):
    def __init__(self):
        super().__init__()
        ours = ["rootstock_client", "rootstockd.settings.config", "rootstockd.host.peers"]
        wanted = ["pydantic", "click", "uvloop", "fastapi", *ours]
        self.told = {name: fails(name) for name in wanted}
        self.told["python"] = sys.version_info[:2]
        self.told["prefix"] = sys.prefix

    def calculate(self, atoms, properties, system_changes):
        if len(atoms) == 1:
            raise RuntimeError("REPORT" + json.dumps(self.told))
        super().calculate(atoms, properties, system_changes)
"""


def probe_catalogue(folder: Path, environment: str = "tiny") -> Path:
    (folder / "environment_probe.py").write_text(PROBE)
    file = folder / "more.toml"
    arguments = 'arguments = { calculator = "environment_probe:Probe" }'
    file.write_text(f'[probe]\nfamily = "ase"\nenvironment = "{environment}"\n{arguments}\n')
    return file


@pytest.fixture
def probed(
    tiny: Path, tmp_path: Path, start_daemon: Callable[..., RunningDaemon], monkeypatch: pytest.MonkeyPatch
) -> RunningDaemon:
    """A daemon with a model in `tiny`, whose module lies in a folder of PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return start_daemon("--catalogue", str(probe_catalogue(tmp_path)), "--model", "probe", "--model", "emt")


def energy_of(daemon: RunningDaemon, model: str = "probe") -> float:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    with daemon.client() as client:
        atoms.calc = client.calculator(model)
        return float(atoms.get_potential_energy())


def expected_energy() -> float:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    return float(atoms.get_potential_energy())


def test_a_worker_has_its_environment_and_nothing_of_the_daemons(probed: RunningDaemon, tiny: Path) -> None:
    assert energy_of(probed) == pytest.approx(expected_energy(), abs=1e-9)
    atoms = bulk("Cu")
    with probed.client() as client:
        atoms.calc = client.calculator("probe")
        with pytest.raises(EvaluationError, match="REPORT") as caught:
            atoms.get_potential_energy()
    told: dict[str, Any] = json.loads(str(caught.value).split("REPORT", 1)[1].split("\n")[0].rstrip("."))
    build = find_build("tiny")
    assert build is not None
    assert told.pop("prefix") == str(build.path)
    assert ".".join(map(str, told.pop("python"))) == ".".join(build.manifest.python.split(".")[:2])
    assert all(told.values()), told  # each import failed
    model = probed.model("probe")
    assert model["environment"].startswith("environment tiny, built ")
    assert "environment tiny, built" in probed.run("status").stdout
    assert "confine = false" not in str(model["unconfined"]) and not any(
        "threads" in why for why in model["unconfined"]
    )


# What a package may bring to be run when Python starts. It tries what a worker may not, and says whether it could.
AT_START = """
import socket, sys

def could(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True

def connect():
    socket.socket().close()

def write():
    with open({victim!r}, "a") as file:
        file.write("{name} ran\\n")

print("{name} ran:", "it could write" if could(write) else "it could not write",
      "and connect" if could(connect) else "nor connect", file=sys.stderr, flush=True)
"""


def runs_at_start(victim: Path) -> dict[str, str]:
    """Files for site-packages: code behind a `.pth` file and a `sitecustomize`."""
    scripts = {name: AT_START.format(victim=str(victim), name=name) for name in ("of_a_pth", "sitecustomize")}
    return {"start.pth": "import of_a_pth\n", **{f"{name}.py": text for name, text in scripts.items()}}


def copy_of(build: Build, state: Path, name: str) -> Path:
    """A build in another state directory, where it finds all that it needs."""
    folder = state / f"environments/{name}/builds/1"
    shutil.copytree(build.path, folder, symlinks=True)
    (folder.parent.parent / "current").symlink_to("builds/1")
    return folder


def test_packages_run_nothing_before_a_worker_is_confined(
    tiny: Path, tmp_path: Path, start_daemon: Callable[..., RunningDaemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, victim = copy_of(found("tiny"), tmp_path, "tiny"), tmp_path / "victim"
    for name, text in runs_at_start(victim).items():
        (site_packages(folder) / name).write_text(text)
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    more = probe_catalogue(tmp_path)
    free = more.read_text().replace("[probe]", "[free]\nconfine = false")
    more.write_text(more.read_text() + free)
    running = start_daemon("--catalogue", str(more), "--model", "probe")
    assert energy_of(running) == pytest.approx(expected_energy(), abs=1e-9)
    log = running.log.read_text()
    assert "of_a_pth ran: it could not write nor connect" in log and "it could write" not in log
    assert not victim.exists()
    # as it could without confinement
    assert energy_of(running, "free") == pytest.approx(expected_energy(), abs=1e-9)
    assert "of_a_pth ran: it could write and connect" in running.log.read_text() and victim.exists()


def test_packages_run_nothing_unconfined_while_an_environment_is_built(
    state: Path, tmp_path: Path, wheels: Path
) -> None:
    victim = tmp_path / "victim"
    files = {**runs_at_start(victim), "fellow/imported.py": AT_START.format(victim=str(victim), name="an import")}
    make_wheel(wheels / "fellow", "fellow", "1.0", files)
    spec = specify(tmp_path / "own.toml", "numpy<2", "fellow", more='imports = ["fellow.imported"]')
    env("create", "own", "--spec", spec, UV_COMPILE_BYTECODE="1")  # which uv would do by the environment's own Python
    assert site_packages(found("own").path).joinpath("of_a_pth.py").exists()
    env("export", "own", tmp_path / "own.tar", UV_CACHE_DIR=str(tmp_path / "another-cache"))
    assert not victim.exists()
    subprocess.run([found("own").python, "-c", "import fellow.imported"], check=True, capture_output=True)
    assert {"of_a_pth ran", "an import ran"} <= set(victim.read_text().splitlines())  # where nothing forbids it


NOT_FOR_PACKAGES = (
    "bin/python._pth",
    "pyvenv.cfg",
    "bin/pyvenv.cfg",
    "bin/activate",
    "bin/lib/os.py",
    "lib/python3.0",
    "lib/python311.zip",
    "lock.txt",
    "manifest.json",
)


def test_packages_leave_alone_what_python_reads_when_it_starts(state: Path, tmp_path: Path) -> None:
    numpy, victim = make_wheel(tmp_path, "numpy", "1.0"), tmp_path / "victim"

    def build_with(parts: tuple[str, ...], text: str) -> Build:
        wheels = Path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copy(numpy, wheels)
        make_wheel(wheels, "fellow", "1.0", {f"fellow-1.0.data/data/{part}": text for part in parts})
        specification = Specification(requirements=("numpy", "fellow"), torch="index")
        return build(Plan("own", specification, "named", sys.executable, "index", wheels=wheels), lambda _: None)

    first = build_with(("bin/tool", "lib/libtool.so", "share/tool/it.cfg", "include/tool.h", "LICENSE"), "").path
    assert (first / "lib/libtool.so").exists() and (first / "LICENSE").exists()
    # a standard library of its own, whose first module leaves something
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings/__init__.py").write_text(f"import posix\nposix.mkdir({str(victim)!r})\n")
    library = sysconfig.get_path("stdlib")
    for part in NOT_FOR_PACKAGES:
        with pytest.raises(EnvironmentBuildError, match=rf"the package fellow 1\.0 writes '{re.escape(part)}"):
            build_with((part,), f"{tmp_path}\n{library}\n{library}/lib-dynload\n")
        assert list(first.parent.iterdir()) == [first] and found("own").path == first
    assert not victim.exists()


def test_without_an_environment_a_family_beside_the_daemon_is_used(daemon: RunningDaemon, state: Path) -> None:
    assert daemon.model("emt")["environment"].startswith("beside the daemon, Python 3.")
    assert not find_environment("mace", "mace").built
    with pytest.raises(ModelLoadError, match=r"rootstockd env create sevennet"):
        find_environment("sevennet", "sevennet")
    with pytest.raises(ModelLoadError, match=r"rootstockd env create of-our-own --spec FILE"):
        find_environment("of-our-own", "ase")


def test_an_environment_that_comes_later_is_found_without_a_restart(
    state: Path, tiny: Path, tmp_path: Path, start_daemon: Callable[..., RunningDaemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "later"
    state.mkdir()
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(state))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    fresh = start_daemon("--model", "emt", "--catalogue", str(probe_catalogue(tmp_path)))
    with pytest.raises(ModelLoadError, match="environment 'tiny' was not built"):
        energy_of(fresh)
    (state / "environments").symlink_to(tiny / "environments")

    def comes() -> bool:
        with contextlib.suppress(ModelLoadError):
            return energy_of(fresh) == pytest.approx(expected_energy(), abs=1e-9)
        time.sleep(1)  # a broken model is tried again after a while
        return False

    wait_for(comes, timeout=60)


def test_verify_compares_what_a_worker_computes(tiny: Path) -> None:
    words = env("verify", "tiny")
    assert "emt (EMT (ase " in words and "the energy differs by" in words


def test_verify_refuses_an_environment_with_other_numbers_and_one_that_fails(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(found("tiny"), tmp_path, "tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["origin"] = str(tmp_path / "gone.toml")  # what it was built from is asked then
    manifest["specification"]["verify"]["energy"] += 0.001
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path))
    assert "computes other numbers than it should" in " ".join(env("verify", "tiny", fails=True).split())
    emt = site_packages(folder) / "ase/calculators/emt.py"
    emt.write_text("print('the last words', flush=True)\nimport os\nos._exit(3)\n")
    (record,) = site_packages(folder).glob("ase-*.dist-info/RECORD")  # or it counts as broken before it is tried
    record.write_text(re.sub(r"^(ase/calculators/emt\.py),.*$", r"\1,,", record.read_text(), flags=re.MULTILINE))
    words = " ".join(env("verify", "tiny", fails=True).split())
    assert "environment 'tiny' can't be verified: model 'emt' can't be used: its worker ended: exit status 3" in words
    assert "the last words" in words


# --- building


def test_a_specification_that_others_may_have_written_is_not_looked_at_again(
    state: Path, tmp_path: Path, wheels: Path
) -> None:
    """It was named once; by now anybody may have put one there, as into /tmp."""
    folder = tmp_path / "open"
    folder.mkdir()
    spec = specify(folder / "own.toml", "numpy==1.0")
    env("create", "own", "--spec", spec)
    specify(spec, "numpy<2")
    folder.chmod(0o777)
    words = env("update", "own")
    assert f"{spec} is not looked at" in words and found("own").manifest.versions == {"numpy": "1.0"}
    folder.chmod(0o755)
    env("update", "own")
    assert found("own").manifest.versions == {"numpy": "1.1"}


def test_the_lock_gives_the_same_versions_until_they_are_updated(state: Path, tmp_path: Path, wheels: Path) -> None:
    spec = specify(tmp_path / "own.toml", "numpy==1.0")
    env("create", "own", "--spec", spec)
    lock = found("own").lock.read_text()
    assert "--hash=sha256:" in lock and "numpy==1.0" in lock
    specify(spec, "numpy<2")
    assert "is there, built" in env("create", "own")
    env("update", "own", "--locked")
    first = found("own")
    (compiled,) = site_packages(first.path).glob("numpy/__pycache__/__init__.*.pyc")
    assert compiled.stat().st_nlink == 2  # it was compiled once, for both builds
    assert first.manifest.versions == {"numpy": "1.0"} and first.lock.read_text() == lock
    # what is asked for is not what is there: no more changes than must
    specify(spec, "numpy<2", "fellow")
    words = env("create", "own", "--spec", spec)
    assert "own: other requirements: fellow, numpy<2 and no longer numpy==1.0" in words and "versions are kept" in words
    second = found("own")
    assert second != first and second.manifest.versions == {"fellow": "1.0", "numpy": "1.0"}
    python = ".".join(second.manifest.python.split(".")[:2])
    words = env("create", "own", "--spec", spec, "--python", python, "--torch", "cpu")  # there is no torch in it
    assert "own is there, as requested, built" in words and found("own") == second
    specify(spec, "numpy<2")
    env("update", "own")
    assert found("own").manifest.versions == {"numpy": "1.1"}
    shown = env("show", "own")
    assert "numpy 1.1" in shown and str(found("own").path) in shown and " MB" in shown
    assert "own" in env("list")
    listed = {one["name"]: one for one in json.loads(env("list", "--json"))}
    assert (listed["own"]["state"], listed["own"]["path"]) == ("built", str(found("own").path))
    assert listed["mace"]["state"] == "specified" and listed["mace"]["description"]
    with zipfile.ZipFile(wheels / "numpy/numpy-1.1-py3-none-any.whl", "a") as wheel:
        wheel.writestr("numpy/more.py", "")
    words = env("update", "own", "--locked", fails=True, UV_CACHE_DIR=str(tmp_path / "another-cache"))
    assert "it was changed since" in " ".join(words.split())
    env("remove", "own")
    assert find_build("own") is None and not (state / "environments/own").exists()
    assert "was not built" in env("verify", "own", fails=True)


def test_a_build_that_fails_leaves_what_was_there(state: Path, tmp_path: Path, own: Build) -> None:
    spec = tmp_path / "own.toml"
    words = fails_to_build("own", "--spec", specify(spec, "numpy<2", "numpy>=2"))
    assert "No solution found" in words and "Change the requirements" in words
    words = fails_to_build("own", "--spec", specify(spec, "numpy<2", more='imports = ["fellow"]'))
    assert "`import numpy, fellow` fails in it: ModuleNotFoundError: No module named 'fellow'" in words
    assert "no Python" in fails_to_build("own", "--spec", spec, "--python", "3.99", "--offline")
    assert "is no requirement" in fails_to_build("own", "--spec", specify(spec, "--index-url=http://x"))
    assert "can't be an environment's name" in fails_to_build("../own")
    assert "there is no specification for" in fails_to_build("nobodys")
    assert find_build("own") == own and problems_of(own) == []
    assert list((state / "environments/own/builds").iterdir()) == [own.path]


def test_without_a_network_it_says_what_to_do(state: Path, tmp_path: Path) -> None:
    spec = specify(tmp_path / "own.toml", "numpy")
    words = fails_to_build("own", "--spec", spec, "--offline", UV_CACHE_DIR=str(tmp_path / "cache"))
    assert "uv's cache does not have everything" in words
    nowhere = {"HTTPS_PROXY": NOWHERE, "UV_HTTP_RETRIES": "0", "UV_CACHE_DIR": str(tmp_path / "cache")}
    assert "package index does not answer" in fails_to_build("own", "--spec", spec, **nowhere)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_says_so(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "small"
    state.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "none", state], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        monkeypatch.setenv("ROOTSTOCKD_STATE", str(state))
        words = fails_to_build("own", "--spec", specify(tmp_path / "own.toml", "numpy<2"))
        assert "The disk is full" in words
        assert list(state.glob("environments/own/builds/*")) == []
    finally:
        subprocess.run(["umount", state], check=True)


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("builds/*") if not (path / "manifest.json").exists()]


@contextlib.contextmanager
def building_slowly(state: Path, spec: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A build of `own` in the middle of it: uv waits for an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variables = {"HTTPS_PROXY": proxy, "UV_CACHE_DIR": str(state / "cache"), "UV_HTTP_TIMEOUT": "100"}
        variables["UV_DEFAULT_INDEX"] = "https://index.invalid/simple"
        command = [sys.executable, "-m", "rootstockd", "env", "create", "own", "--spec", str(spec)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env={**os.environ, **variables}, **quiet) as process:
            try:
                silent.settimeout(60)
                with silent.accept()[0]:  # uv has come
                    yield process
            finally:
                process.kill()


def test_a_killed_build_leaves_what_was_there_and_the_next_cleans_up(state: Path, tmp_path: Path, wheels: Path) -> None:
    spec = specify(tmp_path / "own.toml", "numpy<2")
    env("create", "own", "--spec", spec)
    before = found("own")
    specify(spec, "numpy<2", "fellow")
    with building_slowly(state, spec) as process:
        (uv_process,) = [child for child in psutil.Process(process.pid).children() if child.name() == "uv"]
        assert "is being built already, by process" in fails_to_build("own", "--spec", spec)
        process.kill()
        process.wait()
    wait_for(lambda: not uv_process.is_running() or uv_process.status() == psutil.STATUS_ZOMBIE)
    folder = state / "environments/own"
    assert len(unfinished(folder)) == 1
    assert find_build("own") == before and problems_of(before) == []
    env("update", "own", "--locked")
    assert not unfinished(folder) and found("own") != before
    assert found("own").manifest.versions == before.manifest.versions


def test_a_build_that_is_interrupted_cleans_up_itself(state: Path, tmp_path: Path) -> None:
    with building_slowly(state, specify(tmp_path / "own.toml", "numpy<2")) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert not unfinished(state / "environments/own")
    assert "own was never built to the end" in env("remove", "own")
    assert "there is none" in env("remove", "own", fails=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_goes_on_compiling_when_a_build_is_ended(
    state: Path, tmp_path: Path, wheels: Path, how: signal.Signals
) -> None:
    long = "\n".join(f"a{number} = [{number}, (b, c.d[{number}])]" for number in range(100_000))
    make_wheel(wheels / "fellow", "fellow", "1.0", {f"fellow/m{number}.py": long for number in range(16)})
    spec = specify(tmp_path / "own.toml", "fellow")
    command = [sys.executable, "-m", "rootstockd", "env", "create", "own", "--spec", str(spec)]

    def compiling() -> list[psutil.Process]:
        below = psutil.Process(process.pid).children(recursive=True)
        running = [child for child in below if child.status() != psutil.STATUS_ZOMBIE]
        with contextlib.suppress(psutil.NoSuchProcess):  # one has just ended
            return [child for child in running if "compileall" in child.cmdline()]
        return []

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(compiling)
            time.sleep(1)  # so that all are there
            children = compiling()
            assert children
        finally:
            process.send_signal(how)
    _, left = psutil.wait_procs(children, timeout=15)  # all of it takes longer
    for child in left:
        child.kill()
    assert not left


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_files_are_noticed_and_built_again(state: Path, tmp_path: Path, wheels: Path, in_place: bool) -> None:
    """In place, they are changed in uv's cache as well."""
    env("create", "own", "--spec", specify(tmp_path / "own.toml", "numpy<2"))
    build = found("own")
    (init,) = build.path.glob("lib/python3*/site-packages/numpy/__init__.py")
    size = init.stat().st_size
    if not in_place:
        init.unlink()
    init.write_bytes(b"")
    assert problems_of(build) == [
        f"numpy 1.1 has 1 file that changed, such as numpy/__init__.py (0 bytes where {size} were installed)"
    ]
    words = env("create", "own")
    assert ("uv's cache is damaged, and is to have these anew: numpy" in words) == in_place
    assert found("own") != build and problems_of(found("own")) == []


def test_verify_finds_what_kept_its_size(own: Build) -> None:
    assert "all files are as they were installed" in env("verify", "own")
    (init,) = own.path.glob("lib/python3*/site-packages/numpy/__init__.py")
    text = init.read_text()
    init.unlink()
    init.write_text(text.replace("1.1", "1.2"))
    assert problems_of(own) == []
    words = " ".join(env("verify", "own", fails=True).split())
    assert "numpy 1.1 has 1 file that changed, such as numpy/__init__.py." in words


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("METADATA", b"", "numpy 1.1 is missing"),
        ("RECORD", b"", "numpy 1.1 has no record of its files"),
        ("RECORD", b"\0" * 300, "numpy 1.1 has no record of its files"),
        ("RECORD", b"numpy/\xff.py,,3\n", "numpy 1.1 lacks 1 of its files, such as numpy/\ufffd.py"),
        ("RECORD", None, "numpy 1.1 has no record of its files"),
    ],
)
def test_whatever_is_damaged_is_told(own: Build, file: str, text: bytes | None, problem: str) -> None:
    """None: it is a pipe, which nobody waits for."""
    (path,) = own.path.glob(f"lib/python3*/site-packages/numpy-1.1.dist-info/{file}")
    path.unlink()
    if text is None:
        os.mkfifo(path)
    else:
        path.write_bytes(text)
    assert problem in problems_of(own)
    assert "broken" in env("list")
    (listed,) = [one for one in json.loads(env("list", "--json")) if one["name"] == "own"]
    assert listed["state"] == "broken" and problem in listed["problems"]
    assert problem in " ".join(env("show", "own", fails=True).split())
    env("create", "own")
    assert problems_of(found("own")) == []


def test_a_package_that_is_not_what_it_says_is_refused(state: Path, tmp_path: Path, wheels: Path) -> None:
    """And nothing of it has run, though it was installed twice."""
    (wheels / "lying").mkdir()
    ran = tmp_path / "ran"
    wheel = make_wheel(wheels / "lying", "lying", "1.0", {"lying.pth": f"import os; open({str(ran)!r}, 'w')\n"})
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, re.sub(rb"(lying\.pth,.*),\d+", rb"\1,1", content))
    (wheels / "lying/index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    words = " ".join(env("create", "own", "--spec", specify(tmp_path / "own.toml", "lying"), fails=True).split())
    assert "what was installed is not what its packages say: lying 1.0 has 1 file that changed" in words
    assert not ran.exists() and find_build("own") is None


def test_a_file_that_two_packages_have_may_be_of_either(state: Path, tmp_path: Path, wheels: Path) -> None:
    for name, text in (("one", "# some words\n"), ("two", "")):
        (wheels / name).mkdir()
        wheel = make_wheel(wheels / name, name, "1.0", {"tests/__init__.py": text})
        (wheels / name / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    env("create", "own", "--spec", specify(tmp_path / "own.toml", "numpy<2", "one", "two"))
    assert problems_of(found("own")) == []


def test_what_is_broken_says_so_and_is_built_again(tmp_path: Path, own: Build) -> None:
    (init,) = own.path.glob("lib/python3*/site-packages/numpy/__init__.py")
    init.unlink()
    assert "lacks 1 of its files, such as numpy/__init__.py" in " ".join(env("show", "own", fails=True).split())
    assert "broken" in env("list")
    env("create", "own")
    mended = found("own")
    assert mended != own and problems_of(mended) == []
    (info,) = mended.path.glob("lib/python3*/site-packages/numpy-1.1.dist-info")
    shutil.rmtree(info)
    assert problems_of(mended) == ["numpy 1.1 is missing"]
    mended.python.unlink()
    assert problems_of(mended)[0] == f"{mended.python} is gone, or can't be run"
    mended.python.symlink_to(tmp_path / "gone/python3")
    assert problems_of(mended)[0] == f"its Python {mended.manifest.python} is gone from {tmp_path / 'gone'}"
    with pytest.raises(ModelLoadError, match="rootstockd env create own"):
        find_environment("own", "own")
    env("create", "own")
    assert find_environment("own", "own").built


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99, "rootstockd": "9.9"}, r"built by rootstockd 9\.9, which is newer.*env update tiny"),
        ({"schema_version": 0, "python": None}, r"version 0 of its manifest.*env update tiny"),
    ],
)
def test_a_manifest_of_another_version_is_told_to_be_rebuilt(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "environments/tiny"
    build = find_build("tiny")
    (folder / "builds/1").mkdir(parents=True)
    (folder / "builds/1/manifest.json").write_text(
        json.dumps({**json.loads((build.path / "manifest.json").read_text()), **change})
    )
    (folder / "current").symlink_to("builds/1")
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=words):
        find_environment("tiny", "ase")


def test_builds_in_use_are_kept_and_the_next_worker_takes_the_new(
    state: Path, tmp_path: Path, start_daemon: Callable[..., RunningDaemon]
) -> None:
    spec = specify(tmp_path / "own.toml", "numpy>=1.24")
    env("create", "own", "--spec", spec)
    (tmp_path / "more.toml").write_text('[mine]\nfamily = "noop"\nenvironment = "own"\n')
    running = start_daemon("--catalogue", str(tmp_path / "more.toml"), "--model", "mine")
    first = find_build("own").path
    worker = running.model("mine")["pid"]
    for _ in range(2):
        env("update", "own", "--locked", "--offline")
    assert first.is_dir() and len(list(first.parent.iterdir())) == 3
    assert energy_of(running, "mine") == 0.0 and running.model("mine")["pid"] == worker
    assert "in use by a worker" in env("show", "own")
    assert "is in use by a worker" in env("remove", "own", fails=True)
    asked = ("remove", "own", "--socket", running.socket)
    with running.client().calculator("mine") as calculator:
        calculator.get_potential_energy(Atoms("Cu"))
        running.run("unload", "mine")
        assert "has mine in environment 'own' for 1 session, and could not load it again" in env(*asked, fails=True)
        calculator.get_potential_energy(Atoms("Au"))
    worker = running.model("mine")["pid"]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: running.model("mine")["pid"] not in (None, worker) and running.model("mine")["state"] == "ready")
    build = find_build("own")
    assert Path(psutil.Process(running.model("mine")["pid"]).cmdline()[0]) == build.python
    (init,) = build.path.glob("lib/python3*/site-packages/numpy/__init__.py")
    init.unlink()
    os.kill(running.model("mine")["pid"], signal.SIGKILL)
    with pytest.raises(ModelLoadError, match=r"'own' is broken: numpy .* lacks 1 of its files.*env create own"):
        energy_of(running, "mine")
    running.stop()
    env("remove", "own")
    assert not first.exists()


def test_torch_comes_as_the_driver_wants_it(state: Path, tmp_path: Path) -> None:
    """As far as it goes without a GPU: uv asks the driver, whose version is said here, and picks PyTorch's index."""
    spec = specify(tmp_path / "own.toml", "torch==2.8.0", more='torch = "auto"')
    nowhere = {"HTTPS_PROXY": NOWHERE, "UV_HTTP_RETRIES": "0", "UV_CACHE_DIR": str(tmp_path / "cache")}
    words = fails_to_build("own", "--spec", spec, **nowhere, UV_CUDA_DRIVER_VERSION="550.54.15")
    assert re.search(r"download\.pytorch\.org/whl/cu12\d/", words) and "--torch index" in words
    words = fails_to_build("own", "--spec", spec, "--torch", "cu118", **nowhere)
    assert "download.pytorch.org/whl/cu118/" in words
    words = fails_to_build("own", "--spec", spec, "--torch", "index", **nowhere)
    assert "download.pytorch.org" not in words
    assert "there are auto" in fails_to_build("own", "--spec", spec, "--torch", "gpu")
    assert torch_backend("auto") == ["--torch-backend=auto"] and torch_backend("index") == []
    assert without_torchs_builds("a==1 \\\n    --hash=x\ntorch==2.13.0+cpu \\\n    --hash=y\n    # via b\nz==2\n") == (
        "a==1 \\\n    --hash=x\nz==2\n"
    )
    assert torch_flavour("auto", "torch==2.13.0+cu128 \\\n") == "cu128"
    assert torch_flavour("auto", "torch==2.13.0 \\\n") == "index"
    assert torch_flavour("cpu", "torch==2.13.0+cpu \\\n") == "cpu"


# --- specifications


def test_the_packages_own_specifications_can_be_read() -> None:
    for name in ("mace", "sevennet", "chgnet"):
        specification = find_specification(name)
        assert specification is not None and specification.has_torch and specification.verify is not None


def test_a_users_own_specification_goes_before_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "rootstockd/environments"
    folder.mkdir(parents=True)
    specify(folder / "mace.toml", "numpy==1.26.4")
    assert find_specification("mace").requirements == ("numpy==1.26.4",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("requirements = []", "requirements"),
        ("requirement = ['numpy']", "requirement"),
        ("requirements = ['numpy']\ntorch = 'fast'", "torch"),
        ("requirements = ['numpy'", "specification"),
        ("requirements = ['numpy']\n" + CHECK.replace('"Cu", "Cu"]', '"Cu"]'), "as many symbols"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(SpecificationError, match=words):
        read_specification(tmp_path / "wrong.toml")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_others_keep_to_themselves_is_as_if_it_were_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for variable in ("ROOTSTOCKD_SITE", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            monkeypatch.setenv(variable, str(folder / variable))
        monkeypatch.delenv("ROOTSTOCKD_STATE")
        monkeypatch.setattr(state_dir, "SYSTEM_STATE", folder / "state")
        closed = [folder / "ROOTSTOCKD_SITE", folder / "XDG_CONFIG_HOME/rootstockd", folder / "state"]
        for place in closed:
            (place / "environments").mkdir(parents=True)
            specify(place / "environments/theirs.toml", "numpy")
            place.chmod(0o700)
        assert "theirs" in specification_files()
        os.seteuid(65534)
        try:
            files, builds, found = specification_files(), built_environments(), find_environment("ase", "ase")
        finally:
            os.seteuid(0)
        assert "theirs" not in files and "mace" in files
        assert builds == {} and not found.built


def test_a_specification_that_is_a_link_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTSTOCKD_SITE", str(tmp_path))
    (tmp_path / "environments").mkdir()
    (tmp_path / "environments/mace.toml").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelLoadError, match=r"specification .*mace\.toml: No such file"):
        find_environment("mace", "mace")


# --- for others, and for other machines


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_other_users_and_a_read_only_file_system(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path("/usr/bin/python3")
    if not python.exists() or not readable_by_all(python.resolve()):
        pytest.skip("there is no Python here that all users can read")
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        Path(folder).chmod(0o755)
        state = Path(folder) / "state"
        monkeypatch.setenv("ROOTSTOCKD_STATE", str(state))
        spec = specify(tmp_path / "own.toml", "numpy<2", python=">=3.9")
        command = [sys.executable, "-m", "rootstockd", "env", "create", "own", "--spec", str(spec)]
        # a mask, and a cache under it, that hide all from others
        done = subprocess.run(
            command,
            umask=0o077,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "UV_CACHE_DIR": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        build = found("own")
        ask = "import numpy; print(numpy.__version__); open(numpy.__cached__, 'rb').close()"
        with read_only(state) as mounted:
            done = subprocess.run(
                [build.python, "-E", "-s", "-B", "-c", ask],
                user=65534,
                group=65534,
                extra_groups=[],
                env={},
                cwd="/",
                check=False,
                capture_output=True,
                text=True,
            )
            assert done.stdout == "1.1\n", done.stderr
            assert find_environment("own", "own").built and problems_of(build) == []
            if mounted:
                assert "can't be written" in " ".join(env("update", "own", fails=True).split())
        unsafe = [path for path in build.path.rglob("*") if not path.is_symlink() and path.lstat().st_mode & 0o022]
        assert unsafe == []
        state.chmod(0o777)
        with pytest.raises(ModelLoadError, match="all users may write"):
            find_environment("own", "own")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """Mount a folder upon itself, for reading alone, where this machine lets one; whether it did."""
    if subprocess.run(["mount", "--bind", folder, folder], check=False, capture_output=True).returncode:
        yield False
        return
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield True
    finally:
        subprocess.run(["umount", folder], check=True)


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def pack(archive: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(archive, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def test_export_and_import_without_a_network(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # python-hostlist comes as source alone: a wheel is made of it
    spec = specify(tmp_path / "own.toml", "python-hostlist==2.3.0", "numpy==1.0")
    make_wheel(tmp_path, "numpy", "1.0")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path))
    # settings of uv's that somebody else may have put into a folder above are none of ours
    (state.parent / "uv.toml").write_text("[pip]\nno-index = true\nno-build = true\n")
    env("create", "own", "--spec", spec)
    file = tmp_path / "own.tar"
    (precious := tmp_path / "precious").write_text("precious")
    (tmp_path / ".own.tar.part").symlink_to(precious)
    said = env("export", "own", file)
    assert precious.read_text() == "precious" and not file.is_symlink()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest in said
    files = members(file)
    assert next(name for name in files if "hostlist" in name).endswith(".whl")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(elsewhere))
    alone = {"UV_CACHE_DIR": str(tmp_path / "no-cache"), "HTTPS_PROXY": NOWHERE, "UV_FIND_LINKS": ""}
    assert "not the file you mean" in env("import", file, "--sha256", "0" * 64, fails=True, **alone)
    (wheel,) = (name for name in files if name.startswith("wheels/numpy"))
    bad = pack(tmp_path / "bad.tar", {name: content for name, content in files.items() if name != wheel})
    assert "it has no wheel of numpy" in " ".join(env("import", bad, fails=True, **alone).split())
    assert (
        list(elsewhere.glob("environments/*/current")) == [] and list(elsewhere.glob("environments/*/builds/*")) == []
    )

    env("import", file, "--sha256", digest, **alone)
    build = find_build("own")
    assert build is not None and build.path.is_relative_to(elsewhere)
    assert build.manifest.versions["python-hostlist"] == "2.3.0" and problems_of(build) == []


@pytest.fixture(scope="module")
def archive_of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an archive that is as it should be."""
    wheel = make_wheel(tmp_path_factory.mktemp("one"), "numpy", "1.0")
    content = wheel.read_bytes()
    lock = f"numpy==1.0 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"
    description = Description(
        name="own",
        specification=Specification(requirements=("numpy",)),
        python="3.11.1",
        platform="linux-x86_64",
        torch="index",
        lock_sha256=hashlib.sha256(lock.encode()).hexdigest(),
        rootstockd="0",
    )
    text = description.model_dump_json().encode()
    return {"environment.json": text, "lock.txt": lock.encode(), f"wheels/{wheel.name}": content}


def refused(archive: Path) -> str:
    """What is said of an archive that is none."""
    with pytest.raises(EnvironmentBuildError, match="Nothing was done") as caught, unpacked(archive, ""):
        pass
    return str(caught.value)


def test_an_archive_that_was_tampered_with(archive_of_one: dict[str, bytes], tmp_path: Path) -> None:
    files, file = archive_of_one, tmp_path / "bad.tar"
    with unpacked(pack(file, files), "") as (description, _, folder):
        assert description.name == "own" and len(list(folder.iterdir())) == 1
    *_, wheel = files
    for changed, words in (
        ({wheel: files[wheel].replace(b"1.0", b"6.6", 1)}, "is not what the lock says"),
        ({wheel: b"PK"}, f"its {wheel} can't be read"),
        ({"lock.txt": files["lock.txt"].replace(b"numpy", b"numpi")}, "its lock was changed"),
        ({"lock.txt": b"\xff"}, "its lock.txt can't be read"),
        ({"../../evil.whl": b""}, "'../../evil.whl', which does not belong there"),
        ({"wheels/../../evil-1-py3-none-any.whl": b""}, "does not belong there"),
        ({"environment.json": b"[]"}, "what it says of itself can't be read"),
        ({"environment.json": b"[" * 100_000}, "what it says of itself can't be read"),
        ({"environment.json": b'{"format": "two"}'}, "what it says of itself can't be read"),
        ({"environment.json": files["environment.json"].replace(b'"format":1', b'"format":2')}, "which is newer"),
        ({"environment.json": b" " * (2**24 + 1)}, "its environment.json is far too large"),
    ):
        assert words in refused(pack(file, {**files, **changed}))
    for line in (
        "evil @ file:///evil-1.tar.gz",
        "-e /evil",
        "--find-links /evil",
        "numpy==1.0 \r-e /evil",
        "# \x0b-e /evil",
    ):
        changed = files["lock.txt"] + f"{line} --hash=sha256:{64 * '0'}\n".encode()
        said = json.loads(files["environment.json"]) | {"lock_sha256": hashlib.sha256(changed).hexdigest()}
        archive = pack(file, {**files, "lock.txt": changed, "environment.json": json.dumps(said).encode()})
        assert "which is none of its wheels" in refused(archive)
    for lacking, words in (("lock.txt", "it is incomplete"), (wheel, "it has no wheel of numpy")):
        assert words in refused(pack(file, {name: content for name, content in files.items() if name != lacking}))
    link = tarfile.TarInfo("lock.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(file, "w") as tar:
        tar.addfile(link)
    assert "does not belong there" in refused(file)


def test_an_archive_that_is_changed_while_it_is_read(
    archive_of_one: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built is what had the checksum, whoever may write to the file."""
    file, other = pack(tmp_path / "own.tar", archive_of_one), tmp_path / "other.tar"
    pack(other, {**archive_of_one, "lock.txt": archive_of_one["lock.txt"] + b"# other\n"})
    digest, open_tar = hashlib.sha256(file.read_bytes()).hexdigest(), tarfile.open

    def change_first(*arguments: Any, **options: Any) -> Any:
        file.write_bytes(other.read_bytes())
        return open_tar(*arguments, **options)

    monkeypatch.setattr(archive.tarfile, "open", change_first)
    with unpacked(file, digest) as (_, lock, _):
        assert lock.encode() == archive_of_one["lock.txt"]


def test_an_archive_that_would_fill_the_disk(archive_of_one: dict[str, bytes], tmp_path: Path) -> None:
    *_, wheel = archive_of_one
    file = tmp_path / "large.tar"
    # a hole: 8 TiB in a few bytes, in both forms that tar has for that
    for headers in (
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**43)},
        {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**43)},
    ):
        sparse = tarfile.TarInfo(wheel)
        sparse.pax_headers, sparse.size = headers, 512
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(sparse, io.BytesIO(b"1\n0\n0\n".ljust(512, b"\0")))
        assert "does not belong there" in refused(file)
    cut_off = tarfile.TarInfo("lock.txt")
    cut_off.size = 2**43
    file.write_bytes(cut_off.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048)
    assert "its lock.txt is cut off" in refused(file)
    # a wheel that says it becomes a terabyte
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w") as packed:
        packed.writestr("zeros", "")
        packed.filelist[0].file_size = 2**40
    assert "takes 1100 GB, and 69 GB is the most" in refused(pack(file, {**archive_of_one, wheel: bomb.getvalue()}))


def test_archives_that_are_damaged_by_chance(archive_of_one: dict[str, bytes], tmp_path: Path) -> None:
    """Whatever bytes there are: lock and wheels are as they should be, or it is refused in words.

    What an archive says of itself is its own; who wants to be sure of that as well gives the checksum of the whole.
    """
    file = pack(tmp_path / "damaged.tar", archive_of_one)
    whole, chance = file.read_bytes(), random.Random(1)
    wanted = {name: content for name, content in archive_of_one.items() if name != "environment.json"}
    outcomes = set()
    for number in range(600):
        damaged = bytearray(whole)
        if number % 3 == 0:
            del damaged[chance.randrange(len(whole)) :]
        else:
            # mostly in headers and in the texts at the beginning
            for _ in range(chance.choice((1, 1, 3, 30))):
                damaged[chance.randrange(chance.choice((512, 3072, len(whole))))] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            with unpacked(file, "") as (_, lock, folder):
                got = {f"wheels/{path.name}": path.read_bytes() for path in folder.iterdir()}
            assert {**got, "lock.txt": lock.encode()} == wanted
            outcomes.add("whole")
        except EnvironmentBuildError as error:
            outcomes.add(re.sub(r"[^a-z ].*", "", str(error)))
    assert len(outcomes) > 1 and "whole" in outcomes
