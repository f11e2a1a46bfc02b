"""One worker process as the daemon sees it: spawned, spoken to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rootstockd import worker
from rootstockd.environments.finding import Environment
from rootstockd.host import passed
from rootstockd.host.handed_over import handed_over
from rootstockd.host.threads import in_thread
from rootstockd.processes.ends import End, ending, memory_kills
from rootstockd.processes.folders import WorkerFolders, folders_in_time
from rootstockd.processes.output import Ration, WorkerOutput
from rootstockd.worker.engines import ModelSpec
from rootstockd.worker.slots import Slot
from rootstockd.worker.version import MESSAGE_SIZE

ENTRY = Path(worker.__file__).with_name("__main__.py")
"""What workers run."""
log = logging.getLogger(__name__)

UNKILLABLE = 60.0
"""Seconds after which a worker that was killed is not waited for any more; one gives back memory for some."""
DISK_PATIENCE = 10.0
"""Seconds for which the removal of a worker's folders is waited for."""
GRACE = 5.0
"""Seconds that a worker without its socket has to end by itself, so that it is seen what it died of."""
LAST_WORDS = 1_000
"""Messages that are heard of a worker that has ended, or is about to be."""
_NO_DESCRIPTORS = {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}
Listener = Callable[[bytes, bytes], None]


def mmap_threshold(libc: str | None) -> int:
    """The highest MALLOC_MMAP_THRESHOLD_ that is of use.

    glibc 2.31 refuses more than 32 MiB, and then stays at 128 KiB, as the other variables keep it from adapting: nearly
    each array would be new pages at each step. 2.36 takes more; those between were not tried.

    Args:
        libc: what confstr says of it, such as "glibc 2.34".
    """
    name, _, version = (libc or "").partition(" ")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    old = name != "glibc" or numbers is None or (int(numbers[1]), int(numbers[2])) <= (2, 35)
    return 2**25 if old else 2**30


TUNING = {
    # memory of one step is there for the next: giving it back and faulting it in anew cost up to two thirds of a step
    "MALLOC_MMAP_THRESHOLD_": str(mmap_threshold(os.confstr("CS_GNU_LIBC_VERSION"))),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
    # where memory lacks, each thread would get heaps of its own, of 64 MiB each, and what fitted before fits no more
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    # threads that spin while they wait take the cores from jobs and from the kernels' other pool of threads
    "OMP_WAIT_POLICY": "PASSIVE",
    # without it cuBLAS gives no bits twice, be it asked for them or not (`deterministic`)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Variables for a worker that can't be set once it runs; one that the daemon was started with goes before."""


ROUNDING = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables, in some images, by which GPUs round float32 to 10 bits in products of matrices: energies of isolated atoms
among them, which are then off by half an eV. Reference and backend would agree on it."""

SPLITTING = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT")
"""Variables by which sums are split among fewer threads than torch is told (`deterministic`)."""


def _tuning(family: str) -> dict[str, str]:
    """What is of `TUNING` for workers of a family: programs get memory as they do wherever else they run."""
    return {name: value for name, value in TUNING.items() if family != "ipi" or not name.startswith("MALLOC_")}


def _inherited() -> dict[str, str]:
    """The daemon's environment, but for what changes numbers."""
    return {name: value for name, value in os.environ.items() if name not in (*ROUNDING, *SPLITTING)}


class WorkerProcess:
    """A running worker. `rootstockd.worker.loop` has the messages.

    Args:
        process: the process.
        channel: the daemon's end of its socket.
        listener: told each message: its first byte, and the rest.
        folders: where it writes, and if it is confined may write; they go with it.
        output: what it prints.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: socket.socket,
        listener: Listener,
        folders: WorkerFolders,
        output: WorkerOutput,
    ) -> None:
        self._process, self._channel, self._listener, self._folders = process, channel, listener, folders
        self._output = output
        self.attached: set[int] = set()
        """Numbers of the slots that it has."""
        self.first_rates: dict[int, float] = {}
        """Seconds an atom that the first step took, of slots that had no other yet."""
        self.usable = True
        """It has not ended, and listens."""
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._verdict: End | None = None
        """Why it was killed, if the daemon did it."""
        self._killed = asyncio.Event()
        self._memory_kills = (memory_kills(),) * 2
        """When `at_something_else` was called the last time but one, and the last time."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel, self.look)
        output.follow(process.pid)

    @classmethod
    async def start(
        cls,
        spec: ModelSpec,
        environment: Environment,
        variables: dict[str, str],
        listener: Listener,
        ration: Ration,
        limit: float | None = None,
    ) -> WorkerProcess:
        """Start a worker that loads `spec` in an environment; it says R when it is ready.

        Raises:
            asyncio.TimeoutError: its folders could not be made within `limit` seconds.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folders: WorkerFolders | None = None
        process: asyncio.subprocess.Process | None = None
        output: WorkerOutput | None = None
        try:
            folders = await folders_in_time(spec, limit)
            output = WorkerOutput(spec.name, ration)
            ours.setblocking(False)  # noqa: FBT003 - the socket module has no other way
            passed.refuse(ours)  # it sends none
            arguments = [folders.confinement(gpu=spec.device != "cpu")] if spec.confine else []
            with handed_over(json.dumps(dataclasses.asdict(spec))) as file:
                descriptors = [theirs.fileno(), file.fileno()]
                process = await asyncio.create_subprocess_exec(
                    *worker_command(environment),
                    *map(str, descriptors),
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output.theirs,
                    stderr=output.theirs,
                    pass_fds=descriptors,
                    start_new_session=True,  # with the daemon's terminal, reading that could stop the daemon
                    env={
                        **_tuning(spec.family),
                        **_inherited(),
                        "PYTHONUNBUFFERED": "1",
                        **variables,
                        **folders.environment,
                    },
                    cwd="/",
                )
            return cls(process, ours, listener, folders, output)
        except BaseException:
            ours.close()
            if process is not None:
                process.kill()
            if output is not None:
                output.finish()
            if folders is not None:
                folders.remove()
            raise
        finally:
            theirs.close()
            if output is not None:
                output.close_theirs()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def scratch(self) -> Path:
        """Its folder for temporary files; gone when it has been waited for."""
        return Path(self._folders.scratch)

    @property
    def unkept(self) -> str:
        """Why what it compiles is not kept for the next worker, in words; empty where it is."""
        return self._folders.unkept

    def attach(self, number: int, slot: Slot, fields: dict[str, Any]) -> None:
        """Hand it a slot that it has not yet.

        Raises:
            OSError: there is no file descriptor left, or the kernel passes no more of them.
        """
        fd = os.dup(slot.fd)  # the slot may be closed before its turn comes
        message = {"slot": number, "natoms": slot.natoms, "frames": slot.frames, **fields}
        self._send(b"A" + json.dumps(message).encode())
        self._send(b"M", fd)
        self.attached.add(number)

    def detach(self, number: int) -> None:
        """Have it forget a slot."""
        if number in self.attached:
            self.attached.remove(number)
            self.first_rates.pop(number, None)
            self._send(b"D" + number.to_bytes(4, "little"))

    def evaluate(self, numbers: list[int]) -> bytes:
        """Have it evaluate these slots in one batch; what it says with E when it is done."""
        body = struct.pack(f"<{len(numbers)}i", *numbers)
        self._send(b"E" + body)
        return body

    async def wait(self) -> End:
        """Until the process is gone, and all it said is heard.

        One that was killed and does not go, as a driver in the kernel holds it, is not waited for without end: it runs
        no code of a program's any more, and what it has of a device stays its own.
        """
        status = await self._ended()
        self.usable = False
        self.hear_out()
        self.hang_up()  # what it started may live on, and have more to say
        self._output.finish()
        removing = asyncio.ensure_future(in_thread(self._folders.remove))
        done, _ = await asyncio.wait([removing], timeout=DISK_PATIENCE)
        if done and isinstance(removing.exception(), RuntimeError):  # no thread can be had
            self._folders.remove()
        elif done and (error := removing.exception()):
            log.warning("the folders of worker %d are left: %s", self.pid, error)
        if status is None:
            verdict = self._verdict or End("it was killed", blamed=False)
            how = f"{verdict.how}, and does not end: it is left to the kernel"
            log.error("worker %d: %s", self.pid, how)
            return dataclasses.replace(verdict, how=how, disorder=True)
        if status == -signal.SIGKILL and self._verdict:
            return self._verdict
        return ending(status, self._memory_kills[0], memory_kills())

    async def _ended(self) -> int | None:
        """Its exit status; None if it was killed and does not end."""
        ended = asyncio.ensure_future(self._process.wait())
        killed = asyncio.ensure_future(self._killed.wait())
        try:
            await asyncio.wait([ended, killed], return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await asyncio.wait([ended], timeout=UNKILLABLE)
            return ended.result() if ended.done() else None
        finally:
            killed.cancel()
            ended.cancel()

    def at_something_else(self) -> None:
        """Something else has begun since this was called last: what the kernel killed before is not for that."""
        self._memory_kills = (self._memory_kills[1], memory_kills())

    def kill(self, verdict: End | None = None) -> None:
        """End it now.

        Args:
            verdict: what `wait` shall say of it.
        """
        self._verdict = self._verdict or verdict
        self._killed.set()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _send(self, message: bytes, fd: int | None = None) -> None:
        """Send, or queue behind what the worker has not had time to read; `fd` is closed when it is off."""
        if self._outbox or not self._sent(message, fd):
            self._outbox.append((message, fd))
            self._loop.add_writer(self._channel, self._flush)

    def _sent(self, message: bytes, fd: int | None) -> bool:
        """Whether the message is off: False where the socket is full."""
        try:
            if fd is None:
                self._channel.send(message)
            else:
                socket.send_fds(self._channel, [message], [fd])
        except BlockingIOError:
            return False
        except OSError as error:  # it is dead or dying, and `wait` will say so
            if fd is not None and error.errno in _NO_DESCRIPTORS:
                os.close(fd)
                self._send(message)  # without it: there is no slot
                raise
        if fd is not None:
            os.close(fd)
        return True

    def _flush(self) -> None:
        while self._outbox:
            message, fd = self._outbox.popleft()
            try:
                if not self._sent(message, fd):
                    self._outbox.appendleft((message, fd))
                    return
            except OSError as error:  # its session thinks that the worker has the slot
                self.kill(End(f"it could not be given a slot: {error.strerror}", blamed=False))
        self._loop.remove_writer(self._channel)

    def _drop_outbox(self) -> None:
        for _, fd in self._outbox:
            if fd is not None:
                os.close(fd)
        self._outbox.clear()

    def look(self) -> bool:
        """Take the next message; whether there was one."""
        try:
            message = self._channel.recv(MESSAGE_SIZE)
        except BlockingIOError:
            if self.usable:
                return False
            message = b""
        except OSError:
            message = b""
        if message:
            self._listener(message[:1], message[1:])
            return True
        if self._channel.fileno() >= 0:
            self.hang_up()
            # a worker without its socket is of no use, but as a rule it is dying already
            self._loop.call_later(GRACE, self.kill, End("it closed its connection and was killed", blamed=True))
        return False

    def hear_out(self) -> None:
        """Take what lies in the socket; not without end, as it may be filled as fast as it is read."""
        for _ in range(LAST_WORDS):
            if not self.look():
                return

    def distrust(self, verdict: End) -> None:
        """End it, and hear nothing more of what it has said or says."""
        self.kill(verdict)
        self.hang_up()

    def hang_up(self) -> None:
        """Ask it to end: it does when it next looks at its socket."""
        self.usable = False
        if self._channel.fileno() >= 0:
            self._drop_outbox()
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
            self._channel.close()


def worker_command(environment: Environment) -> list[str]:
    """What starts a worker in an environment, but for its arguments.

    Packages can run code when Python starts: they come in when the worker has given its rights away, not before (-S). A
    built environment is taken as it was built: without variables that change Python (-E), packages in the user's home
    (-s), or writing to it (-B). `worker/__main__.py` adds what PYTHONPATH names behind its own packages.
    """
    return [str(environment.python), "-S", *(["-E", "-s", "-B"] if environment.built else []), "-u", str(ENTRY)]
