"""A node's daemon for as long as somebody needs it: the first who comes starts it, the last who goes stops it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shlex
import signal
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rootstock_client.control import request
from rootstock_client.errors import AccessDeniedError, ConnectionLostError, DaemonNotFoundError, RootstockError
from rootstock_client.runtime_dir import START_HINT, is_own_note, is_private, job_runtime_dir, share_file

POLL = 0.05
"""Seconds between looks at what can't be waited for."""
SILENCE = 60.0
"""Seconds that a daemon may take for its status: nodes are busy."""
TURN, SHARE = 0, 1
"""Bytes of the file beside the socket, by which its two locks are told apart."""
_NOTE = re.compile(rb"(?:\d{1,20} *\n)?")
"""What is in that file: a process id, or nothing yet."""


class NodeDaemon:
    """A share in the daemon at one address.

    Those who share it, in whatever processes, agree by locks on a file beside its socket: one for whose turn it is to
    start or stop the daemon, and one that each keeps as long as it has its share. The kernel takes both from a process
    that dies. The file says which daemon it was that one of them started; any other is used, and left alone.

    Args:
        socket: the daemon's session socket.
        start: the command that starts one, up to its --socket, and returns when it is ready; empty if none shall be
            started.
        environment: the variables to start it with.
    """

    def __init__(self, socket: Path, start: Sequence[str], environment: Mapping[str, str]) -> None:
        self.socket = socket
        self._start_command, self._environment = [*start], environment
        self._file = share_file(socket)
        self._fd: int | None = None
        self._process: int | None = None

    @property
    def shared(self) -> bool:
        """Whether the daemon was started by one of those who share it."""
        return self._process is not None

    async def join(self) -> None:
        """See that there is one, and take a share in it.

        Raises:
            DaemonNotFoundError: there is none, and none is to be started here.
            AccessDeniedError: others could put a socket of theirs in its place.
            RootstockError: it can't be started, or does not answer.
        """
        self._let_go()
        if await self._pid() is not None and not self._file.exists():
            return
        if not (self._start_command or self._file.exists()):
            raise self._none()
        self._fd = await self._take_turn()
        try:
            there = await self._pid()
            if there is None:
                there = await self._start_one(self._fd)
            if there == self._noted():
                self._process = os.pidfd_open(there)
                _lock(self._fd, fcntl.F_RDLCK, SHARE)
                _lock(self._fd, fcntl.F_UNLCK, TURN)
        except ProcessLookupError as error:
            raise ConnectionLostError(f"the daemon at {self.socket} has just gone.") from error
        finally:
            if self._process is None:
                if self._alone():
                    self._remove_file()
                self._let_go()

    async def leave(self) -> None:
        """Give the share back; whoever gives back the last one has the daemon end what is under way, and stop.

        Raises:
            RootstockError: it does not answer.
        """
        try:
            if self._fd is None or self._process is None:
                return
            await _until_locked(self._fd, TURN)
            if self._alone():
                with contextlib.suppress(DaemonNotFoundError, ConnectionLostError):
                    if await self._pid() == self._noted():
                        await asyncio.to_thread(request, self.socket, "POST", "/v1/stop", timeout=SILENCE)
                await _end_of(self._process)
                self._remove_file()
        finally:
            self._let_go()

    async def killed(self) -> bool:
        """Wait until the daemon that is shared has ended.

        Returns:
            Whether it was killed, or crashed: it has left its socket. One that was stopped takes that along.
        """
        assert self._process is not None
        await _end_of(self._process)
        return self.socket.is_socket()

    def _none(self) -> DaemonNotFoundError:
        return DaemonNotFoundError(
            f"no rootstockd answers at {self.socket}, and none is to be started here.", START_HINT
        )

    def _alone(self) -> bool:
        """Whether nobody else has a share; to be asked by whose turn it is."""
        assert self._fd is not None
        return _lock(self._fd, fcntl.F_WRLCK, SHARE)

    def _is_current(self, fd: int) -> bool:
        """Whether the file has not been removed."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), self._file.stat())
        return False

    def _check_ours(self, fd: int) -> None:
        """Raise RootstockError where the file is somebody else's, and only has the same name."""
        if not is_own_note(fd, _NOTE):
            raise RootstockError(
                f"{self._file} is not a file by which a daemon of yours is shared; it is left alone.",
                "Move it away, or choose another socket.",
            )

    def _remove_file(self) -> None:
        assert self._fd is not None
        if self._is_current(self._fd):
            self._file.unlink(missing_ok=True)
        if self.socket.parent == job_runtime_dir():  # which goes with the job's last daemon
            with contextlib.suppress(OSError):
                self.socket.parent.rmdir()

    def _noted(self) -> int:
        """The process id of the daemon that one of those who share it has started; 0 if none has."""
        assert self._fd is not None
        return int(os.pread(self._fd, 20, 0) or 0)

    def _let_go(self) -> None:
        for fd in (self._fd, self._process):
            if fd is not None:
                os.close(fd)
        self._fd = self._process = None

    async def _pid(self) -> int | None:
        """The process id of the daemon that answers, when one that is stopping has gone; None if there is none."""
        while True:
            try:
                answer = await asyncio.to_thread(request, self.socket, "GET", "/v1/status", timeout=SILENCE)
            except DaemonNotFoundError:
                return None
            except ConnectionLostError:
                pass
            else:
                status = cast("dict[str, Any]", answer)
                if status["state"] != "draining":
                    return int(status["pid"])
            await asyncio.sleep(POLL)

    async def _take_turn(self) -> int:
        """The file, open, with the lock that one at a time has."""
        folder = self.socket.parent
        with contextlib.suppress(OSError):  # what is wrong is said below
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(folder, os.getuid(), 0):
            raise AccessDeniedError(
                f"the folder {folder} for the daemon's socket can't be made, belongs to somebody else, or others may "
                "write to it: they could impersonate the daemon.",
                "Choose another socket, or fix the folder's owner and mode (chmod go-w).",
            )
        while True:
            try:  # opening a named pipe would wait for whoever writes into it
                fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            except OSError as error:
                raise RootstockError(f"can't share a daemon by {self._file}: {error.strerror}.") from error
            try:
                self._check_ours(fd)
                await _until_locked(fd, TURN)
                if self._is_current(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the last of those before us removed it while we waited

    async def _start_one(self, note: int) -> int:
        """Start a daemon, wait until it is ready, and note which it is; its process id, or that of who was faster.

        Raises:
            DaemonNotFoundError: none shall be started.
            RootstockError: it can't be; with the command's own words.
        """
        if not self._start_command:
            raise self._none()
        command = [*self._start_command, "--socket", os.fspath(self.socket)]
        status, words = await _run(command, self._environment)
        pid = await self._pid()
        if pid is None:
            raise RootstockError(
                f"no daemon could be started here by {shlex.join(command)}: {words or 'it has ended at once'}"
            )
        if status == 0:
            os.pwrite(note, b"%-20d\n" % pid, 0)
        return pid


async def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command; its exit status and its last words.

    Raises:
        RootstockError: it can't be run.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise RootstockError(f"can't run {shlex.join(command)}: {error.strerror}.") from error
    try:
        _, words = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)  # `rootstockd start` takes its daemon along
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, words.decode(errors="replace").strip().removeprefix("Error: ")


def _lock(fd: int, kind: int, byte: int) -> bool:
    """Take or give back a lock of this open file (whatever the process), if nobody has one that excludes it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


async def _until_locked(fd: int, byte: int) -> None:
    while not _lock(fd, fcntl.F_WRLCK, byte):  # noqa: ASYNC110 - the kernel would tell a thread that blocks
        await asyncio.sleep(POLL)


async def _end_of(process: int) -> None:
    """Wait until a process, given by its pidfd, has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)
