"""The command that starts a daemon in the background, and waits for it: what the daemon is without it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_it(starter: int) -> None:
    """Have the kernel end this process with that command, whatever it is at, such as a disk that does not answer.

    Must be called by the main thread, as `outlive_it`.

    Args:
        starter: the command's process id; of one that has died by now nobody will tell.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != starter:
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_it() -> None:
    """Live on from now on: who looks for a daemon finds it, and can end it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
