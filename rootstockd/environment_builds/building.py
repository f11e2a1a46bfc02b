"""Building an environment with uv: a lock with hashes, a virtual environment from it, and a switch at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rootstockd
from rootstockd.environment_builds.bytecode import compile_bytecode
from rootstockd.environment_builds.pythons import find_python
from rootstockd.environment_builds.running_uv import run_uv
from rootstockd.environment_builds.untouched import check_own_parts, own_parts
from rootstockd.environments.builds import (
    Build,
    EnvironmentBuildError,
    Manifest,
    building,
    make_folder,
    new_build,
    take_into_use,
)
from rootstockd.environments.finding import Environment
from rootstockd.environments.packages import Package, damage, installed
from rootstockd.environments.specification import Specification
from rootstockd.processes.folders import WorkerFolders
from rootstockd.processes.worker_process import worker_command
from rootstockd.settings.state_dir import own_state
from rootstockd.worker.files import digest_of

Say = Callable[[str], None]
IMPORT_TIMEOUT = 600
"""Seconds that importing an environment's packages may take the first time, from a slow disk."""


@dataclass(frozen=True)
class Plan:
    """What to build."""

    name: str
    specification: Specification
    origin: str
    """See Manifest."""
    python: str
    """Which Python, as uv takes it, or a path."""
    torch: str
    """Which of PyTorch's builds, as in a specification."""
    lock: str = ""
    """Build exactly this; without one, the requirements are resolved."""
    preferred: str = ""
    """A lock whose versions are kept where the requirements allow."""
    offline: bool = False
    wheels: Path | None = None
    """Take packages from this folder and from nowhere else."""


def build(plan: Plan, say: Say) -> Build:
    """Build an environment and take it into use.

    Args:
        plan: what to build.
        say: told of each step.

    Raises:
        EnvironmentBuildError: it can't be built; what was in use before still is.
        StateError: the state directory is not to be trusted.
    """
    with building(plan.name) as folder:
        path = new_build(folder)
        try:
            try:
                made = _build(plan, path, say)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
            take_into_use(folder, path)
        except OSError as error:
            raise EnvironmentBuildError(f"environment {plan.name!r} can't be built in {path}: {error}.") from error
    return made


def _build(plan: Plan, path: Path, say: Say) -> Build:
    what = f"environment {plan.name!r}"
    python = find_python(plan.python, own_state(), offline=plan.offline)
    version = ".".join(map(str, python.version))
    say(f"{what}: Python {version} from {python.path}")
    make_virtual_environment(what, path, python.path)
    sources = _sources(plan)
    lock = path / "lock.txt"
    if plan.lock:
        lock.write_text(plan.lock)
        flavour = plan.torch
    else:
        say(f"{what}: choosing versions{_flavour_in_words(plan)}")
        if plan.preferred:
            lock.write_text(plan.preferred)  # uv keeps to what it finds in the file that it is to write
        resolve(plan, path, lock, sources)
        flavour = torch_flavour(plan.torch, lock.read_text())
    count = len(re.findall(r"^[\w.-]+\[?.*==", lock.read_text(), re.MULTILINE))
    say(f"{what}: installing {count} packages into {path}")
    arguments: list[str | Path] = [*sources, *torch_backend(flavour), lock]
    if wrong := install(what, path, arguments):
        say(f"{what}: uv's cache is damaged, and is to have these anew: {', '.join(_names(wrong))}")
        wrong = _install_anew(what, path, python.path, lock.read_text(), arguments, wrong)
    if wrong:
        raise EnvironmentBuildError(
            f"{what}: what was installed is not what its packages say: {'; '.join(wrong.values())}. Find out where "
            "they came from, or leave them out."
        )
    say(f"{what}: compiling byte code")
    compile_bytecode(path)
    say(f"{what}: importing {', '.join(plan.specification.imports) or 'numpy'}")
    check_imports(what, path, ("numpy", *plan.specification.imports))
    let_all_read(path)
    manifest = Manifest(
        name=plan.name,
        specification=plan.specification,
        origin=plan.origin,
        python_request=plan.python,
        python=version,
        platform=sysconfig.get_platform(),
        torch=flavour,
        lock_sha256=digest_of(lock),
        versions={package.name: package.version for package in installed(path)},
        rootstockd=rootstockd.__version__,
        built=time.time(),
    )
    unfinished = path / "manifest.json.part"
    unfinished.write_text(manifest.model_dump_json(indent=1) + "\n")
    unfinished.chmod(0o644)
    unfinished.rename(path / "manifest.json")
    return Build(path, manifest)


def resolve(plan: Plan, path: Path, lock: Path, sources: list[str]) -> None:
    """Choose versions of all packages and write them down with their hashes."""
    run_uv(
        [
            *("pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--output-file", lock),
            *("--python", path / "bin/python"),
            *sources,
            *torch_backend(plan.torch),
            "-",
        ],
        f"environment {plan.name!r}: choosing versions",
        stdin="".join(f"{requirement}\n" for requirement in plan.specification.requirements),
    )


def make_virtual_environment(what: str, path: Path, python: Path) -> None:
    """Make one, without packages."""
    options = ("--quiet", "--relocatable", "--no-python-downloads", "--allow-existing")
    run_uv(["venv", *options, "--python", python, path], f"{what}: making a virtual environment")


def install(what: str, path: Path, arguments: list[str | Path]) -> dict[Package, str]:
    """Install what a lock has into an environment without packages.

    Args:
        what: the environment, for words.
        path: the virtual environment.
        arguments: uv's: the lock, and where packages come from.

    Returns:
        What is not as its package has it, as `damage` does: files are links to those in uv's cache, where somebody may
        have changed them.

    Raises:
        EnvironmentBuildError: it can't be done, or a package wrote what is not its to write.
    """
    before = own_parts(path)
    command = ["pip", "sync", "--require-hashes", "--no-compile-bytecode", "--python", path / "bin/python", *arguments]
    run_uv(command, f"{what}: installing")
    check_own_parts(what, path, before)
    return damage(installed(path))


def _install_anew(
    what: str, path: Path, python: Path, lock: str, arguments: list[str | Path], wrong: dict[Package, str]
) -> dict[Package, str]:
    """Install after uv's cache has forgotten what was wrong in it, as `install` does.

    From the start, as uv runs an environment's Python, and packages that are there can run code with it.
    """
    run_uv(["cache", "clean", *_names(wrong)], f"{what}: cleaning uv's cache")
    shutil.rmtree(path)
    make_folder(path)
    make_virtual_environment(what, path, python)
    (path / "lock.txt").write_text(lock)
    return install(what, path, arguments)


def _names(wrong: dict[Package, str]) -> list[str]:
    return sorted({package.distribution for package in wrong})


def _sources(plan: Plan) -> list[str]:
    if plan.wheels is not None:
        return ["--offline", "--no-index", "--no-build", "--find-links", str(plan.wheels)]
    return ["--offline"] if plan.offline else []


def torch_backend(flavour: str) -> list[str]:
    """What tells uv which of PyTorch's builds to take. `auto` is uv's own: it asks the NVIDIA driver."""
    return [] if flavour == "index" else [f"--torch-backend={flavour}"]


def without_torchs_builds(lock: str) -> str:
    """A lock without the versions that are of one of PyTorch's builds, such as 2.13.0+cpu: another has others."""
    return re.sub(r"^\S+==\S+\+.*\n(?:[ \t].*\n?)*", "", lock, flags=re.MULTILINE)


def torch_flavour(asked: str, lock: str) -> str:
    """The build that `auto` chose, for the next build from this lock on any machine: torch 2.13.0+cu128 says it."""
    if asked != "auto":
        return asked
    found = re.search(r"^torch==[\w.]+\+(cpu|cu\d+|rocm[\d.]+|xpu)\b", lock, re.MULTILINE)
    return found[1] if found else "index"


def _flavour_in_words(plan: Plan) -> str:
    if not plan.specification.has_torch:
        return ""
    if plan.torch == "auto":
        return ", torch for this node's driver (for the CPU where there is none; --torch chooses)"
    return ", torch from the package index" if plan.torch == "index" else f", torch for {plan.torch}"


def check_imports(what: str, path: Path, modules: tuple[str, ...]) -> None:
    """Whether it is of use: its packages are imported, confined as in a worker.

    Raises:
        EnvironmentBuildError: a module can't be imported.
    """
    modules = tuple(dict.fromkeys(modules))
    try:
        folders = WorkerFolders(None)
        try:
            done = subprocess.run(
                [
                    *worker_command(Environment("", path / "bin/python", True, "")),  # noqa: FBT003
                    # (what is for GPUs may ask the driver when it is imported)
                    *("import", json.dumps(modules), folders.confinement(gpu=Path("/dev/nvidiactl").exists())),
                ],
                cwd="/",
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", **folders.environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=IMPORT_TIMEOUT,
            )
        finally:
            folders.remove()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentBuildError(f"{what}: its Python can't be used: {error}.") from error
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise EnvironmentBuildError(
            f"{what}: `import {', '.join(modules)}` fails in it: {said}. Its specification must require what provides "
            "this. (Imports are tried as in a worker: without a network, and with nothing to write to but TMPDIR.)"
        )


def let_all_read(path: Path) -> None:
    """Whatever umask uv's cache was made under; and nobody but the owner writes."""
    for file in (path, *path.rglob("*")):
        mode = file.lstat().st_mode
        if not stat.S_ISLNK(mode):
            wanted = (mode | 0o444 | (0o111 if mode & 0o100 else 0)) & ~0o022
            if wanted != mode:
                file.chmod(stat.S_IMODE(wanted))
