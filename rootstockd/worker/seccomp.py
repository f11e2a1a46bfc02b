"""A filter of system calls: what a worker has no use for fails, and reaches no other process.

The filter is classic BPF over `struct seccomp_data`, made for the architecture at hand. A call that is refused returns
EPERM; nothing is killed for trying. It holds for all threads and children to come, across exec too.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_NOT_LESS, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32 = 0x40000000
"""Numbers from here on are those of the x32 ABI: the same calls under other numbers."""
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Name: number on x86_64, on aarch64 (None where there is none).
_REFUSED: Dict[str, Tuple[Optional[int], Optional[int]]] = {
    # other processes: their memory, descriptors, signals
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    "tkill": (200, 130),
    "migrate_pages": (256, 238),
    # sockets; pairs of one's own are below
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # System V and POSIX queues, which belong to the user and not to a process
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # what Landlock does not cover: modes, owners and attributes of files
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "open_by_handle_at": (304, 265),
    # parts of the kernel with many faults behind them and no use here
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    # the machine
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
}
_ON_GPUS = ("socket", "connect", "bind", "listen")
"""CUDA may talk with MPS and with nvidia-persistenced, over Unix sockets; and it can't begin (error 304) where it must
not listen on an abstract one of its own, `@cuda-uvmfd-...`."""
_FOR_PROGRAMS = ("socket", "connect", "bind", "listen", "accept", "accept4")
"""Programs dial in over Unix sockets, on which their worker listens."""
_CLONE3 = (435, 435)
"""Its flags lie in memory, where a filter can't look: it does not exist, and libc takes `clone`."""


@dataclass(frozen=True)
class _Check:
    """A call that depends on an argument: refused unless `argument & mask` is among `values`, or if it is."""

    numbers: Tuple[int, int]
    argument: int
    values: Tuple[int, ...]
    refused: bool = False
    mask: int = 0xFFFFFFFF
    only: Optional[Tuple[int, int]] = None
    """Another argument and its value: with others the call is let through."""


_NAMESPACES = 0x7E028000
"""All CLONE_NEW... flags that `clone` takes, and CLONE_PARENT: its children would be the daemon's."""
_F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY = 10, 15, 1024, 1026
_FS_IOC_SETFLAGS, _FS_IOC32_SETFLAGS, _FS_IOC_FSSETXATTR = 0x40086602, 0x40046602, 0x401C5820
_FS_IOC_ENABLE_VERITY, _FS_IOC_SET_ENCRYPTION_POLICY = 0x40806685, 0x800C6613
_BTRFS = (0x50009401, 0x5000940E, 0x5000940F, 0x50009417, 0x50009418, 0x5000943F, 0x4008941A)
"""Subvolumes and snapshots, which anybody may make, remove and have be read-only, and Landlock does not see (linux's
uapi/linux/btrfs.h). A snapshot of a folder of one's own would be a folder of settings wherever one may write."""
_OTHER_FILE_SYSTEMS = (0xC0406618, 0x40186F04)
"""FS_IOC_REMOVE_ENCRYPTION_KEY, which locks the user's folders; OCFS2_IOC_REFLINK, as with Btrfs."""
_TIOCSTI, _TIOCLINUX, _FIOASYNC, _FIOSETOWN, _SIOCSPGRP = 0x5412, 0x541C, 0x5452, 0x8901, 0x8902
_PR_SET_PDEATHSIG = 1
_IOPRIO_WHO_PROCESS = 1


def _checks(*, programs: bool) -> List[_Check]:
    """The calls that are judged by an argument."""
    me = os.getpid()
    # a worker ends its programs, and their abort() is no signal to it; Landlock keeps them from processes outside
    signals = [
        _Check((62, 129), 0, (me,)),  # kill
        _Check((234, 131), 0, (me,)),  # tgkill: abort() is one
        _Check((129, 138), 0, (me,)),  # rt_sigqueueinfo
        _Check((297, 240), 0, (me,)),  # rt_tgsigqueueinfo
        _Check((157, 167), 0, (_PR_SET_PDEATHSIG,), refused=True),  # prctl: it ends with the daemon
    ]
    return [
        *([] if programs else signals),
        _Check((41, 198), 0, (int(socket.AF_UNIX),)),  # socket, where it is not refused altogether
        _Check((53, 199), 0, (int(socket.AF_UNIX),)),  # socketpair...
        _Check((53, 199), 1, (int(socket.SOCK_STREAM), int(socket.SOCK_SEQPACKET)), mask=0xF),  # ...one that stays so
        _Check((302, 261), 0, (0, me)),  # prlimit64
        _Check((141, 140), 0, (os.PRIO_PROCESS,)),  # setpriority...
        _Check((141, 140), 1, (0, me)),  # ...its own
        _Check((144, 119), 0, (0, me)),  # sched_setscheduler
        _Check((142, 118), 0, (0, me)),  # sched_setparam
        _Check((314, 274), 0, (0, me)),  # sched_setattr
        _Check((251, 30), 0, (_IOPRIO_WHO_PROCESS,)),  # ioprio_set...
        _Check((251, 30), 1, (0, me)),  # ...its own
        _Check((56, 220), 0, (0,), mask=_NAMESPACES),  # clone
        # signals to whoever one calls the owner of a descriptor; leases, which hold up whoever opens the file
        _Check((72, 25), 1, (fcntl.F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY), refused=True),  # fcntl
        # SIGIO, which ends most processes, to those in the foreground of a terminal that the worker has opened
        _Check((72, 25), 2, (os.O_ASYNC,), refused=True, mask=os.O_ASYNC, only=(1, fcntl.F_SETFL)),
        # signals again; typing into the terminal that a daemon in the foreground was started from; flags of files
        _Check(
            (16, 29),  # ioctl
            1,
            (
                *(_TIOCSTI, _TIOCLINUX, _FIOASYNC, _FIOSETOWN, _SIOCSPGRP),
                *(_FS_IOC_SETFLAGS, _FS_IOC32_SETFLAGS, _FS_IOC_FSSETXATTR),
                *(_FS_IOC_ENABLE_VERITY, _FS_IOC_SET_ENCRYPTION_POLICY),
                *_BTRFS,
                *_OTHER_FILE_SYSTEMS,
            ),
            refused=True,
        ),
    ]


def _step(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _program(machine: str, *, gpu: bool, programs: bool) -> bytes:
    """The filter's instructions."""
    left = (*(_ON_GPUS if gpu else ()), *(_FOR_PROGRAMS if programs else ()))
    column = 0 if machine == "x86_64" else 1
    refuse = _step(_RETURN, _ERRNO | errno.EPERM)
    program = [_step(_LOAD, _ARCHITECTURE), _step(_JUMP_EQUAL, _AUDIT[machine], 1, 0), refuse, _step(_LOAD, _NUMBER)]
    if machine == "x86_64":
        program += [_step(_JUMP_NOT_LESS, _X32, 0, 1), refuse]
    for check in _checks(programs=programs):
        hits = len(check.values)
        body = [_step(_LOAD, _ARGUMENTS + 8 * check.argument), _step(_AND, check.mask)]
        for index, value in enumerate(check.values):
            # to the first instruction behind the comparisons, or to the second
            body.append(_step(_JUMP_EQUAL, value, hits - index - 1 + (0 if check.refused else 1), 0))
        if check.refused and hits:
            body[-1] = _step(_JUMP_EQUAL, check.values[-1], 0, 1)
        body.append(refuse)
        if check.only is not None:
            argument, value = check.only
            body = [_step(_LOAD, _ARGUMENTS + 8 * argument), _step(_JUMP_EQUAL, value, 0, len(body)), *body]
        body.append(_step(_LOAD, _NUMBER))
        program += [_step(_JUMP_EQUAL, check.numbers[column], 0, len(body)), *body]
    for name, numbers in _REFUSED.items():
        if (number := numbers[column]) is not None and name not in left:
            program += [_step(_JUMP_EQUAL, number, 0, 1), refuse]
    program += [_step(_JUMP_EQUAL, _CLONE3[column], 0, 1), _step(_RETURN, _ERRNO | errno.ENOSYS)]
    program.append(_step(_RETURN, _ALLOW))
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(*, gpu: bool, programs: bool = False) -> str:
    """Install the filter; why it could not be, or nothing. Privileges that exec gives must be off already.

    Args:
        gpu: leave what CUDA may need: Unix sockets, connecting them, and listening, but taking no connection.
        programs: leave what a worker needs to have programs dial in: Unix sockets, and signals to processes.
    """
    machine = platform.machine()
    # (a Python of 32 bits runs on x86_64, too)
    if machine not in _AUDIT or sys.maxsize < _X32:
        return f"no filter of system calls: there is none for {machine} yet"
    program = _program(machine, gpu=gpu, programs=programs)
    argument = _Program(len(program) // 8, program)
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(argument), 0, 0):
        return f"no filter of system calls: seccomp: {os.strerror(ctypes.get_errno())}"
    return ""
