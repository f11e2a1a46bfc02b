"""Folders of a worker, and all that a confined one may write to: scratch that goes with it, and a cache that stays.

A worker whose programs dial in has one for their sockets as well, which goes with it. All are the daemon's user's alone
(0700). What lies in a cache is loaded as code by the model's next worker, so every model has its own: one whose file is
malicious can prepare nothing for another's workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import platformdirs

from rootstock_client.runtime_dir import is_private
from rootstockd.host.threads import in_thread
from rootstockd.worker.compiled import why_not_kept
from rootstockd.worker.engines import ModelSpec
from rootstockd.worker.engines.ipi.program import SOCKETS_VARIABLE

log = logging.getLogger(__name__)

_CACHES = {
    "NUMBA_CACHE_DIR": "numba",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "CUEQ_TRITON_CACHE_DIR": "cueq-triton",
    "CUEQUIVARIANCE_OPS_NVRTC_CACHE_DIR": "cueq-nvrtc",
    "MPLCONFIGDIR": "matplotlib",
}
"""Variables that tell compilers, and matplotlib, which MACE imports, where to keep what they made."""


_ROOM = 65_536
"""Bytes that must be free for scratch."""
_SOCKETS = Path("/tmp"), "ipi_rootstockd-"  # noqa: S108 - programs that dial in look for sockets in /tmp/ipi_...
"""Where sockets lie, which is not for a TMPDIR to say, and how their folders' names begin."""
_MPI_ALONE = {
    "OMPI_MCA_ess_singleton_isolated": "1",
    "OMPI_MCA_btl": "^tcp",
    "UCX_TLS": "self",
    "UCX_LOG_LEVEL": "error",  # it warns of the network that is not there
}
"""For one process of Open MPI or MPICH that has no network, as a confined program has none."""


class FolderError(OSError):
    """A folder for a worker can't be had. That is the machine's doing and no model's, whatever its number."""


class WorkerFolders:
    """One worker's folders. The scratch folder exists, and is locked, until `remove`.

    Args:
        spec: the worker's model; None for one that loads none, and has nothing to keep.

    Raises:
        FolderError: there is no place for scratch, or no room.
    """

    def __init__(self, spec: ModelSpec | None) -> None:
        self._held = [_make_folder(*_scratch())]
        self.scratch = self._held[0][0]
        self._confined = spec is None or spec.confine
        self.programs = spec is not None and spec.family == "ipi"
        """Its programs dial in."""
        self.unkept = ""
        """Why each worker compiles anew what it computes with, and what to do; empty where it is kept."""
        try:
            _try_room(self.scratch)
            cache, why = _cache(spec) if spec else (None, "")
            self.cache = cache or self.scratch
            if spec and why:
                self.unkept = (
                    f"its compiled code can't be kept, so each worker compiles it again: {why}; mend that, or have "
                    "XDG_CACHE_HOME name another place where the daemon is started"
                )
                log.warning("model %s: %s", spec.name, self.unkept)
            if self.programs:
                self._held.append(_make_folder(*_SOCKETS))
        except OSError:
            self.remove()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a worker to its folders."""
        caches = {variable: f"{self.cache}/{name}" for variable, name in _CACHES.items()}
        variables = {"TMPDIR": self.scratch, **caches}
        if self.programs:
            variables[SOCKETS_VARIABLE] = self._held[-1][0]
            variables.update(_MPI_ALONE if self._confined else {})
        return variables

    def confinement(self, *, gpu: bool) -> str:
        """What `rootstockd.worker.confine` is to leave to the worker, as its process takes it."""
        folders = [*(path for path, _ in self._held), self.cache]
        return json.dumps({"folders": folders, "gpu": gpu, "programs": self.programs})

    def remove(self) -> None:
        """Remove the folders that go with it."""
        for path, lock in self._held:
            _remove(path)
            os.close(lock)


async def folders_in_time(spec: ModelSpec, limit: float | None) -> WorkerFolders:
    """Folders for a worker; disks, and homes over a network, take time, and what comes too late is removed.

    Raises:
        asyncio.TimeoutError: there are none within `limit` seconds.
        OSError: as `WorkerFolders` says.
    """
    too_late = threading.Event()

    def make() -> WorkerFolders:
        made = WorkerFolders(spec)
        if too_late.is_set():
            made.remove()
        return made

    try:
        return await asyncio.wait_for(in_thread(make), limit)
    except asyncio.TimeoutError:
        too_late.set()
        raise


def _try_room(folder: str) -> None:
    """Fail here where it lacks: Python says of a full disk that there is no folder for temporary files."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            room = 0
            while room < _ROOM:  # the first write may be short, and the next says why: a full disk, or `ulimit -f`
                room += file.write(bytes(_ROOM - room))
    except OSError as error:
        raise _failed(error, _scratch()[0]) from error


def _failed(error: OSError, place: Path) -> FolderError:
    """That none can be had there."""
    named = " (the daemon's TMPDIR)" if str(place) == os.environ.get("TMPDIR") else ""
    return FolderError(error.errno, f"{error.strerror} in {place}{named}, where workers' folders are made")


def _scratch() -> tuple[Path, str]:
    """Where scratch lies, and how its folders' names begin."""
    return Path(tempfile.gettempdir()), "rootstockd-worker-"


def _make_folder(place: Path, prefix: str) -> tuple[str, int]:
    """A new folder, and the descriptor that keeps it locked: an unlocked one counts as a dead daemon's."""
    try:
        while True:
            path = tempfile.mkdtemp(prefix=f"{prefix}{os.getuid()}-", dir=place)
            with contextlib.suppress(FileNotFoundError):  # another daemon was faster, and has removed it
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                with contextlib.suppress(BlockingIOError):  # or looks whether it is left behind
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.exists(path):
                        return path, folder
                os.close(folder)
    except OSError as error:
        raise _failed(error, place) from error


def remove_left_behind() -> None:
    """Remove the folders of daemons of ours that were killed: nobody holds their locks."""
    found = [path for place, prefix in (_scratch(), _SOCKETS) for path in place.glob(f"{prefix}{os.getuid()}-*")]
    for path in found:
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(folder).st_uid == os.getuid():
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(folder)


def _remove(path: str | Path) -> None:
    try:
        try:
            shutil.rmtree(path)
        except PermissionError:
            _open_folders(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
            shutil.rmtree(path)
    except (OSError, RecursionError) as error:  # a model may have made whatever it liked there
        log.warning("could not remove %s: %s", path, error)


def _open_folders(folder: int) -> None:
    """Have folders in an open one be ours to empty; a model can make some that are not. Closes it.

    By descriptors, as what a worker has started may live on and put links in their places.
    """
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                inner = os.open(entry.name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                try:
                    Path(f"/proc/self/fd/{inner}").chmod(stat.S_IRWXU)
                    opened = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=inner)
                finally:
                    os.close(inner)
                _open_folders(opened)
    finally:
        os.close(folder)


def _cache(spec: ModelSpec) -> tuple[str | None, str]:
    """The model's cache, if there is a place for it; why what is compiled is not kept there, empty where it is."""
    what = [spec.family, spec.environment, spec.sha256 or spec.name, spec.arguments]
    if spec.own_modules:  # of which numba compares one alone with what it has compiled, and not what that calls
        what.append(spec.fingerprint)
    caches = platformdirs.user_cache_path("rootstockd") / "compiled"
    folder = caches / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    try:
        caches.mkdir(mode=0o700, parents=True, exist_ok=True)  # the mode is the last one's alone
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in (caches, folder):
            if not is_private(path, os.getuid()):
                raise PermissionError(0, "it belongs to somebody else, or others may write to it", str(path))
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}"
    why = why_not_kept(folder / _CACHES["NUMBA_CACHE_DIR"])  # as the worker looks itself
    return str(folder), f"{folder}: {why}" if why else ""
