"""The second daemon of a restart, found while there is nobody to connect to: it has yet to listen.

What shows it is how it was started, as nothing else of it is there then but a process.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path

MODULE = "rootstockd.serve"


def successor_arguments(predecessor: int, socket: Path, *, named: bool) -> list[str]:
    """What a daemon is told that takes the place of another, by its arguments, which all users can read.

    Args:
        predecessor: a pidfd of the other.
        socket: the address of both.
        named: the other's socket was there.
    """
    return [str(predecessor), "named" if named else "unnamed", str(socket)]


@contextlib.contextmanager
def successors(socket: Path) -> Iterator[list[int]]:
    """Pidfds of the processes that were started to take the place of the daemon at an address, and have not ended.

    They are this user's, or those of the folder's owner; others could pass for one.

    Args:
        socket: the address.
    """
    with contextlib.ExitStack() as stack:
        found = []
        owners = {os.geteuid()}
        with contextlib.suppress(OSError):
            owners.add(socket.parent.stat().st_uid)
        for folder in Path("/proc").glob("[1-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if folder.stat().st_uid in owners and _succeeds_at(folder, socket):
                    process = os.pidfd_open(int(folder.name))
                    stack.callback(os.close, process)
                    if _succeeds_at(folder, socket):  # nobody else has that number by now
                        found.append(process)
        yield [process for process in found if not select.select([process], [], [], 0)[0]]


def _succeeds_at(process: Path, socket: Path) -> bool:
    match (process / "cmdline").read_bytes().split(b"\0")[:-1]:
        case [*_, b"-m", module, _, _, address] if os.fsdecode(module) == MODULE:
            theirs = Path(os.fsdecode(address))
        case _:
            return False
    folder = Path(f"{process}/root{theirs.parent}")  # as it sees it: in a container the same path is another place
    return theirs.name == socket.name and folder.samefile(socket.parent)
