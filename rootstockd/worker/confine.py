"""What a worker gives away before it imports an engine: rights that evaluating a model has no use for.

Model files are code. Whoever adds one trusts it with the structures it will see; this keeps it from the rest, as far as
the kernel can. SECURITY.md says what that is, and what it is not.

The process stays dumpable (PR_SET_DUMPABLE): the operator's py-spy, gdb and cuda-gdb must be able to look at a worker
that hangs, and a worker must be able to read its own /proc/self; others of the same user who may attach to it could
attach to the daemon as well. It leaves no core files, which would hold structures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import stat
import struct
import threading
from pathlib import Path
from typing import List, Sequence

from rootstockd.worker import landlock, seccomp

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 23, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 2

_GPU_DEVICES = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "dxg")


def die_with_parent(channel: socket.socket) -> None:
    """Have the kernel kill this process when the daemon dies, even in the middle of a computation."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(BlockingIOError):
        if not channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):  # it died before
            os._exit(1)


def confine(folders: Sequence[str], *, gpu: bool, programs: bool = False) -> List[str]:
    """Give away what is not needed. Must come before there is a second thread: Landlock does not reach others.

    Args:
        folders: where the worker may write.
        gpu: leave what CUDA may need, which is more.
        programs: leave what it takes to have programs dial in, and to end them.

    Returns:
        What could not be taken, in words for the daemon's log; empty where all was.
    """
    writable = [*folders, "/dev/null"]
    if gpu:
        writable += [str(path) for pattern in _GPU_DEVICES for path in Path("/dev").glob(pattern)]
        writable += [_own_threads()]
        writable += _pipes_of_mps()
    if gpu or programs:  # shared memory between processes, for CUDA and for MPI
        writable.append("/dev/shm")  # noqa: S108 - the kernel's
    missing = []
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        missing.append("there were other threads already, which keep the rights to write")
    _leave_no_core()
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return [*missing, "nothing was taken: PR_SET_NO_NEW_PRIVS is unknown to this kernel"]
    missing.append(landlock.restrict(writable))
    missing.append(_drop_capabilities())
    missing.append(seccomp.install(gpu=gpu, programs=programs))
    if programs and landlock.abi() < landlock.SCOPES_SINCE:
        missing.append("this kernel does not keep programs that dial in from signals to others of the daemon's user")
    return [text for text in missing if text]


def _leave_no_core() -> None:
    """One byte is too little for a file, and has none sent to a program (core_pattern), which 0 would not."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def _own_threads() -> str:
    """The folder in which CUDA names its threads; where it can't (drivers since 570), it does not begin (error 304).

    Landlock knows folders by their inodes. /proc makes another when this one has not been in use for a while, so it
    stays open.
    """
    os.open("/proc/self/task", os.O_PATH | os.O_CLOEXEC)
    return "/proc/self/task"


def _pipes_of_mps() -> List[str]:
    """The folder of MPS, if it is what a control daemon of root or of ours made: anybody can make one of that name."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # noqa: S108 - NVIDIA's
    try:
        info = os.lstat(folder)
    except OSError:
        return []
    return [folder] if stat.S_ISDIR(info.st_mode) and info.st_uid in (0, os.getuid()) else []


def _drop_capabilities() -> str:
    """Give up all capabilities, for good, but the one to read files: root's models may be anybody's."""
    with contextlib.suppress(PermissionError):  # not root
        os.setgroups([])
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    capability = 0
    while (held := _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:
        if held and capability != _CAP_DAC_READ_SEARCH:
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # a user without CAP_SETPCAP has none to lose
        capability += 1
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    held_now = ctypes.create_string_buffer(24)
    if _libc.capget(header, held_now):
        return f"capabilities were kept: {os.strerror(ctypes.get_errno())}"
    permitted = struct.unpack("=6I", held_now.raw)[1] & (1 << _CAP_DAC_READ_SEARCH)
    if _libc.capset(header, struct.pack("=6I", permitted, permitted, 0, 0, 0, 0)):
        return f"capabilities were kept: {os.strerror(ctypes.get_errno())}"
    return ""
