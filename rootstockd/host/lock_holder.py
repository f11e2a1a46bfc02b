"""Whose a lock file is: the daemon that holds its lock, found where nobody can connect to it any more."""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Iterator
from pathlib import Path

from rootstock_client.runtime_dir import is_own_note

_PROCESS = re.compile(rb"[1-9]\d{0,9}\n")
_WRITE_LOCK = re.compile(r"^lock:.* OFDLCK +ADVISORY +WRITE ", re.MULTILINE)


@contextlib.contextmanager
def lock_holder(path: Path) -> Iterator[tuple[int, int] | None]:
    """The process that holds the lock of a daemon of this user's, if one does, as its id and a pidfd.

    The id is what the file says, and is believed only of a process of this user's that has the lock, as the kernel
    says: by now another process may have that number.

    Args:
        path: the lock file.
    """
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            stack.callback(os.close, fd)
            pid = int(os.pread(fd, 32, 0)) if is_own_note(fd, _PROCESS) else 0
            process = os.pidfd_open(pid)
            stack.callback(os.close, process)
            ours = os.stat(f"/proc/{pid}").st_uid == os.geteuid() and _has_lock(pid, os.fstat(fd))
        except (OSError, ValueError):  # there is no file, or no process any more, or it is not ours to look at
            yield None
            return
        # as long as it has not ended it is that one, and nobody else has its number
        ended = select.select([process], [], [], 0)[0]
        yield (pid, process) if ours and not ended else None


def _has_lock(pid: int, file: os.stat_result) -> bool:
    """Whether a process has a file open, and through that the lock that daemons take."""
    for opened in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            info = Path(f"/proc/{pid}/fdinfo/{opened.name}").read_text()
            if _WRITE_LOCK.search(info) and os.path.samestat(opened.stat(), file):
                return True
    return False
