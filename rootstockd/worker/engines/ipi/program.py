"""One running program: started in a folder of its own, believed only if it is who was started, ended for good."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from rootstockd.worker import landlock
from rootstockd.worker.engines import Array
from rootstockd.worker.engines.ipi.driver import Answer, Driver, EndedError
from rootstockd.worker.engines.ipi.guard import parent_of, segments_of
from rootstockd.worker.engines.ipi.recipe import Recipe
from rootstockd.worker.engines.ipi.templates import TEXT, Context

PREFIX = "/tmp/ipi_"  # noqa: S108 - which programs put before a socket's name by themselves
SOCKETS_VARIABLE = "IPI_SOCKETS_FOLDER"
"""Has the folder for sockets, whose path begins with PREFIX: private, so that nobody else can connect to one."""
GUARD = Path(__file__).with_name("guard.py")
EXIT_PATIENCE = 10.0
"""Seconds that a program has to end after EXIT."""
LAST_WORDS = 2.0
"""Seconds that one has to end which has closed its connection: it may be about to say why."""
MOST = 1200
"""Characters of what it printed last, in messages."""


class StartError(Exception):
    """The program can't be started, or does not connect; its text says why, after the program's name.

    Args:
        text: why.
        killed: by a signal, which says nothing of the program.
    """

    def __init__(self, text: str, *, killed: bool = False) -> None:
        super().__init__(text)
        self.killed = killed


class Program:
    """A program that has connected.

    Args:
        recipe: what to start.
        path: the program's file.
        digest: its SHA-256.
        context: what templates may name, but for the socket.
        confined: whether the worker is.

    Raises:
        StartError: it is not to be had.
    """

    def __init__(self, recipe: Recipe, path: str, digest: str, context: Context, *, confined: bool) -> None:
        self.digest = digest
        self._folder = tempfile.mkdtemp(prefix="program-")
        self._guard: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self.killed = False
        """It has ended, and by a signal, or its guard was killed."""
        try:
            with self._listen() as (listening, name):
                self._write_files(recipe, {**context, "socket": name})
                self._start(recipe, path, {**context, "socket": name}, confined=confined)
                self._connection = self._accept(listening, recipe.start_timeout)
        except BaseException:
            self.finish()
            raise
        self._driver = Driver(self._connection, self._report)

    def evaluate(self, cell: Array, positions: Array) -> Answer:
        """What `Driver.evaluate` gives."""
        return self._driver.evaluate(cell, positions)

    @contextlib.contextmanager
    def _listen(self) -> Iterator[Tuple[socket.socket, str]]:
        """A socket that one program is to dial, and its name; whoever dials in later finds nobody."""
        address = tempfile.mktemp(prefix="", dir=os.environ[SOCKETS_VARIABLE])  # noqa: S306 - the folder is private
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(address)
            try:
                listening.listen(1)
                yield listening, address[len(PREFIX) :]
            finally:
                Path(address).unlink()

    def _write_files(self, recipe: Recipe, context: Context) -> None:
        for name, template in recipe.files.items():
            try:
                text = template.fill(context)
            except OSError as error:
                raise StartError(f"has no {name}: {error.filename}: {error.strerror}") from error
            Path(self._folder, name).write_text(text, **TEXT)

    def _start(self, recipe: Recipe, path: str, context: Context, *, confined: bool) -> None:
        command = [path, *(word.fill(context) for word in recipe.command[1:])]
        variables = {name: template.fill(context) for name, template in recipe.variables.items()}
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as the_guards:
            own, control = _pipe(the_guards, ours)
            report, theirs = _pipe(ours, the_guards)
            scope = landlock.signals_stay() if confined else None
            if scope is not None:
                the_guards.callback(os.close, scope)
            passed = (own, theirs, -1 if scope is None else scope)
            self._guard = subprocess.Popen(
                [sys.executable, "-S", "-E", "-B", str(GUARD), *map(str, passed), json.dumps(command)],
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor for descriptor in passed if descriptor >= 0],
                cwd=self._folder,
                env={**os.environ, "TMPDIR": self._folder, "PWD": self._folder, **variables},
                start_new_session=True,
            )
            self._control, self._report = control, report
            ours.pop_all()

    def _accept(self, listening: socket.socket, patience: float) -> socket.socket:
        """The program's connection: others are closed.

        Raises:
            StartError: it ends before, or takes too long.
        """
        poll = select.poll()
        poll.register(listening, select.POLLIN)
        poll.register(self._report, select.POLLIN)
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if listening.fileno() in ready:
                connection, _ = listening.accept()
                if self._is_ours(connection):
                    self._tell_segments()
                    return connection
                connection.close()
            elif self._report in ready:
                raise StartError(f"did not connect: {self.finish()}", killed=self.killed)
        raise StartError(f"did not connect within {patience:g} s (start_timeout): {self.finish()}")

    def _tell_segments(self) -> None:
        """Have the guard know what MPI has made by now: when the program has ended, nothing says whose that is."""
        assert self._guard is not None
        with contextlib.suppress(OSError):  # it has ended
            os.write(self._control, b"".join(os.fsencode(name) + b"\0" for name in segments_of(self._guard.pid)))

    def _is_ours(self, connection: socket.socket) -> bool:
        """Whether who connects is the program, or something that it has started."""
        assert self._guard is not None
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        while pid > 1 and pid != self._guard.pid:
            try:
                pid = parent_of(pid)
            except OSError:
                return False
        return bool(pid == self._guard.pid and uid == os.getuid())

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        with contextlib.suppress(EndedError):
            self._driver.say_exit()
        self.finish(EXIT_PATIENCE)

    def finish(self, patience: float = 0.0) -> str:
        """End it, and all that it has started.

        Args:
            patience: seconds that it has to end by itself.

        Returns:
            How it ended, in words.
        """
        told = b""
        if self._guard is not None:
            poll = select.poll()
            poll.register(self._report, select.POLLIN)
            poll.poll(patience * 1000)
            os.close(self._control)  # what its guard waits for
            while chunk := os.read(self._report, 1 << 16):
                told += chunk
            os.close(self._report)
            self._guard.wait()
            self._guard = None
        if self._connection is not None:
            self._connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        report = json.loads(told or b"{}")
        self.killed = "error" not in report and report.get("status", -1) < 0
        return _in_words(report)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> Tuple[int, int]:
    """A pipe whose ends close with their sides."""
    ends = os.pipe()
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


def _in_words(report: Dict[str, Any]) -> str:
    """What a guard says."""
    if "error" in report:
        return f"it can't be run: {report['error']}"
    status = report.get("status")
    if status is None:
        return "its guard was killed"
    how = f"exit status {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
    last = "\n".join(line.rstrip() for line in report["printed"].splitlines() if line.strip())
    return f"{how}. The last that it printed:\n{last[-MOST:]}" if last else f"{how}. It printed nothing."
