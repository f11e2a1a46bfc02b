"""A program's guard: starts it, keeps the last that it prints, and leaves nothing of it behind.

`python -S guard.py CONTROL REPORT SCOPE COMMAND`, a script of its own and the standard library alone.

CONTROL and REPORT are descriptors of pipes. When the first comes to its end, as it does when the worker dies in any
way, the program gets SIGTERM, and a moment later all that it has started is killed, ranks of MPI that have left its
process group too. How it ended is written to the second. Before it ends, CONTROL may bring names of segments in
/dev/shm that the program has made, with a NUL behind each: they are removed in the end. MPICH leaves them there when a
rank calls MPI_Abort, as LAMMPS does when it is told EXIT.

SCOPE is -1, or the descriptor of a Landlock ruleset for the program, which keeps its signals from its guard.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

TAIL = 4000
"""Bytes of what it prints that are kept."""
GRACE = 2.0
"""Seconds that it has after SIGTERM, to tidy up."""
_SEGMENTS = "/dev/shm/"  # noqa: S108 - the kernel's
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_LANDLOCK_RESTRICT_SELF = 446
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Guard one program from its start to its end."""
    control, report, scope = map(int, sys.argv[1:4])
    command = json.loads(sys.argv[4])
    for inherited in (control, report):
        os.set_inheritable(inherited, False)  # noqa: FBT003 - os has no other way; the program must not keep them open
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what its children leave behind becomes ours
    before = set(os.listdir(_SEGMENTS))
    output, theirs = os.pipe()
    try:
        program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: _become_ordinary(scope),  # noqa: PLW1509 - there is one thread
        )
    except (OSError, subprocess.SubprocessError) as error:
        _write(report, {"error": getattr(error, "strerror", None) or str(error)})
        return
    os.close(theirs)
    printed, told = _watch(program.pid, output, control)
    segments = segments_of(os.getpid()) | set(map(os.fsdecode, told.split(b"\0")[:-1]))
    program.terminate()  # does nothing to one that has ended
    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(GRACE)
    status = _kill_all(program)
    for name in segments - before:
        with contextlib.suppress(OSError):  # as a rule the program has done it
            Path(_SEGMENTS, name).unlink()
    printed += _rest(output)
    _write(report, {"status": status, "printed": printed[-TAIL:].decode("utf-8", "replace")})


def _become_ordinary(scope: int) -> None:
    """In the program's process: what a worker ignores it need not, and it ends with its guard, and can't end that."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)
    if scope >= 0 and _libc.syscall(_LANDLOCK_RESTRICT_SELF, scope, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _watch(pid: int, output: int, control: int) -> "tuple[bytes, bytes]":
    """Until the program ends or is to end; the last that it has printed by then, and what came over CONTROL."""
    printed, told, ended = b"", b"", os.pidfd_open(pid)
    poll = select.poll()
    for descriptor in (output, ended, control):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if output in ready:
            if chunk := os.read(output, 1 << 16):
                printed = (printed + chunk)[-TAIL:]
            else:
                poll.unregister(output)
        if control in ready:
            chunk = os.read(control, 1 << 16)
            told += chunk
        if ended in ready or (control in ready and not chunk):
            os.close(ended)
            return printed, told


def segments_of(guard: int) -> "set[str]":
    """Names of what a guard's program and its children have in /dev/shm, mapped or open."""
    found = set()
    for pid in _descendants(guard):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
            found |= {line.partition(f" {_SEGMENTS}")[2] for line in lines}
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                found.add(str(descriptor.readlink()).partition(_SEGMENTS)[2])
    return found - {""}


def _kill_all(program: "subprocess.Popen[bytes]") -> "int | None":
    """Kill what has come of it; its exit status, negative for a signal."""
    status = program.poll()
    while True:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if pid == program.pid:
            status = -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)


def _descendants(ancestor: int) -> "list[int]":
    """All processes that come of one."""
    children: "dict[int, list[int]]" = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(parent_of(int(entry)), []).append(int(entry))
    found = [ancestor]
    for pid in found:  # it grows while it is gone through
        found += children.get(pid, ())
    return found[1:]


def parent_of(pid: int) -> int:
    """A process's parent.

    Raises:
        OSError: there is no such process any more.
    """
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])


def _rest(output: int) -> bytes:
    """What still lies in the pipe."""
    os.set_blocking(output, False)
    printed = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(output, 1 << 16):
            printed = (printed + chunk)[-TAIL:]
    return printed


def _write(report: int, fields: "dict[str, object]") -> None:
    with contextlib.suppress(BrokenPipeError):  # the worker has died
        os.write(report, json.dumps(fields).encode())


if __name__ == "__main__":
    main()
