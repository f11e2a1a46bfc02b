"""Byte code of an environment's packages, before they are used: confined workers can't write it.

It is not uv that compiles them, as its Pythons run what packages have for their start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rootstockd.environment_builds.running_uv import end_with_parent
from rootstockd.environments.packages import site_packages
from rootstockd.settings.state_dir import StateError, check_trusted

_MOST = 8
"""Processes at once: others work on this machine, too."""
_TESTS = {"test", "tests"}


def compile_bytecode(path: Path) -> None:
    """Write byte code where there is none yet.

    Left out are packages' own tests, a quarter of all there is with torch. So are files that are no Python of this
    version, such as templates.

    Args:
        path: the virtual environment.
    """
    link_bytecode(path)
    sources = sorted(_sources(site_packages(path)))
    count = min(_MOST, len(os.sched_getaffinity(0)))
    compiling: list[subprocess.Popen[bytes]] = []
    try:
        shares = (sources[number::count] for number in range(count))
        compiling.extend(_compile(path / "bin/python", share) for share in shares if share)
        for process in compiling:
            process.wait()
    finally:
        for process in compiling:
            process.kill()
            process.wait()


def _sources(packages: Path) -> Iterator[bytes]:
    """Paths of modules, but for packages' own tests."""
    for folder, folders, files in os.walk(packages):
        if Path(folder) != packages:
            folders[:] = [name for name in folders if name not in _TESTS]
        yield from (os.fsencode(Path(folder, name)) for name in files if name.endswith(".py"))


def _compile(python: Path, sources: Sequence[bytes]) -> subprocess.Popen[bytes]:
    """Have these compiled. Not with its `--workers`, which stay for good where a signal ends what they work for."""
    with tempfile.TemporaryFile() as listed:
        listed.write(b"\n".join(sources))
        listed.seek(0)
        return subprocess.Popen(
            [python, "-I", "-S", "-m", "compileall", "-qq", "-i", "-"],
            cwd="/",
            stdin=listed,
            stdout=subprocess.DEVNULL,
            umask=0o022,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - there are no threads here, and it calls nothing of Python's
        )


def link_bytecode(path: Path) -> None:
    """Take byte code from the builds in use, where its source is the very same file: uv links them from its cache."""
    packages = site_packages(path)
    for current in sorted(path.parent.parent.parent.glob("*/current")):
        with contextlib.suppress(OSError, StateError):
            check_trusted(current.parent)
            check_trusted(current)
            others = site_packages(current.resolve())
            if others.parent.name != packages.parent.name:  # another Python
                continue
            for theirs in others.rglob("__pycache__/*.pyc"):
                ours = packages / theirs.relative_to(others)
                with contextlib.suppress(OSError, ValueError):  # not all are named as Python names them
                    source = Path(importlib.util.source_from_cache(theirs)).relative_to(others)
                    if (packages / source).samefile(others / source):
                        ours.parent.mkdir(mode=0o755, exist_ok=True)
                        ours.hardlink_to(theirs)
