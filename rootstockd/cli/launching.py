"""A daemon's process, started: in the background, which one waits for until it is ready, or in the foreground."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from rootstock_client.errors import DaemonNotFoundError, RootstockError
from rootstock_client.runtime_dir import find_socket
from rootstockd.cli.clients import Refused
from rootstockd.cli.common import console, fetch_status, print_warnings, saying
from rootstockd.cli.ending import DRAINING, POLL, end
from rootstockd.control.schema import DaemonStatus
from rootstockd.host.handed_over import handed_over
from rootstockd.host.log_file import open_log, read_log
from rootstockd.host.sockets import already_runs
from rootstockd.host.successors import MODULE, successor_arguments
from rootstockd.monitoring.rows import told_apart
from rootstockd.settings.config import COMMAND_LINE, Config
from rootstockd.words import GOES_ON

_DATED = re.compile(r"\n\d{4}-\d\d-\d\d ")


def serve_in_front(config: Config) -> None:
    """Be the daemon. What it prints is standard error's, and goes into no file of the settings.

    Raises:
        Refused: it can't start.
    """
    # imports what only a daemon needs
    from rootstockd.serve import StartError, serve, start_logging  # noqa: PLC0415

    start_logging()
    origins = {**config.origins, "log_file": COMMAND_LINE}
    try:
        serve(config.model_copy(update={"log_file": None, "origins": origins}))
    except StartError as error:
        raise Refused(error) from error


def stay_with(config: Config) -> None:
    """Start a daemon in the background and be there as long as it is; exits as it does.

    Raises:
        Refused: as `launch` says.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, signal.default_int_handler)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the daemon ignores them, too
        signal.signal(number, signal.SIG_IGN)
    process = None
    while True:
        try:
            process = process or launch(config)
            status = process.wait()
            raise SystemExit(status if status >= 0 else 128 - status)  # as shells have it
        except KeyboardInterrupt:
            if process is None:  # `launch` has ended it
                raise
            process.terminate()


def launch(config: Config, *, after: int | None = None, named: bool = True) -> subprocess.Popen[bytes]:
    """Start a daemon in the background and wait until it is ready; its process.

    Args:
        config: its settings.
        after: the pidfd of its predecessor, which it has stop when all else is ready, and begins when that is gone:
            whenever this command ends, one of the two is there.
        named: the predecessor's socket was there. Then, if it is gone with it, `stop` has called the restart off.

    Raises:
        Refused: it can't start, or none of the models it was to load can be loaded. A predecessor goes on then, or it
            is there without them.
    """
    assert config.log_file is not None
    if after is None:
        refuse_second(config.socket)
    log = prepare_log(config.log_file, "Choose another --log-file." if after is None else GOES_ON)
    predecessor = () if after is None else (after,)
    arguments = [str(os.getpid())] if after is None else successor_arguments(after, config.socket, named=named)
    with log, _handed(config, "" if after is None else f" {GOES_ON}") as settings:
        position = log.tell() if log.seekable() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            pass_fds=predecessor,
            stdin=settings,
            stdout=log,
            stderr=log if after is None else subprocess.PIPE,  # of a successor that must not begin nothing stays
            cwd="/",
            start_new_session=True,
        )
    try:
        status = wait_until_ready(process, config, position)
        introduce(process, config, status, replaced=after is not None)
    except KeyboardInterrupt:
        if after is None:
            process.terminate()
            process.wait()
        else:
            console.print("the restart goes on without this command; `rootstockd stop` calls it off")
        raise
    return process


def _handed(config: Config, hint: str) -> BinaryIO:
    """What a daemon is told, as a file in memory.

    Raises:
        Refused: it can't be written; `hint` says what follows from that.
    """
    try:
        return handed_over(config.model_dump_json())
    except OSError as error:
        raise Refused(
            f"can't hand the settings to the daemon: {error.strerror}. A limit on the size of files holds for what is "
            f"in memory, too: raise it (`ulimit -f`).{hint}"
        ) from error


def refuse_second(address: Path) -> None:
    """Say that a daemon runs there already, and not in a log, which would pass for that daemon's.

    Raises:
        Refused: one does.
    """
    with contextlib.suppress(RootstockError):
        running = fetch_status(address)
        if running.state == "draining":
            raise Refused(
                f"the daemon at {address} (pid {running.pid}) is stopping: it does what is under way, and takes "
                "nothing new. Start another when it has ended; `rootstockd stop --force` ends it now."
            )
        raise Refused(already_runs(address, str(running.pid)))


def prepare_log(path: Path, hint: str) -> BinaryIO:
    """Open a log, or say why it can't be, and what follows from that.

    Raises:
        Refused: it can't.
    """
    try:
        return open_log(path)
    except OSError as error:
        raise Refused(f"can't write the log {path}: {error.strerror}. {hint}") from error


def wait_until_ready(process: subprocess.Popen[bytes], config: Config, log_position: int) -> DaemonStatus:
    """Wait, saying for what.

    Raises:
        Refused: the process ended.
    """
    with saying(text := "starting") as say:
        first_words = _until_predecessor_told(process)
        while process.poll() is None:
            try:
                status = fetch_status(config.socket)
            except RootstockError:
                status = None
            if status is not None and status.pid != process.pid:
                text = DRAINING if status.state == "draining" else text
            elif status is not None:
                if status.state == "ready":
                    return status
                models = zip(told_apart(status.models), status.models, strict=True)
                loading = [f"{name} {model.loading.text}" for name, model in models if model.loading]
                text = "; ".join(loading) or "starting"
            say(text)
            time.sleep(POLL)
    assert config.log_file is not None
    words = ""
    with contextlib.suppress(OSError), read_log(config.log_file) as log:  # it may be a device
        log.seek(log_position)
        words = log.read()
    words = (words + first_words.decode(errors="replace")).strip()
    if process.returncode == 0:
        raise Refused("the daemon was stopped before it was ready.")
    # the command in the background has said why in its last line or lines; further lines that begin with a date are of
    # another daemon, which was started at the same moment with the same log
    reason = _DATED.split(words.rpartition("Error: ")[2])[0] if "Error: " in words else words
    raise Refused(reason or f"the daemon ended with exit status {process.returncode} and said nothing.")


def _until_predecessor_told(process: subprocess.Popen[bytes]) -> bytes:
    """What a successor says until it has told its predecessor to stop, or ends without that; others log all."""
    if process.stderr is None:
        return b""
    with process.stderr as first_words:
        return first_words.read()


def introduce(process: subprocess.Popen[bytes], config: Config, status: DaemonStatus, *, replaced: bool) -> None:
    """Say of a daemon that is ready what it has, and how it is used.

    Args:
        process: its process.
        config: its settings.
        status: how it is.
        replaced: it has taken the place of another, whose jobs wait for it.

    Raises:
        Refused: none of the models it was to load can be loaded. It has been stopped, if nobody had it before.
    """
    broken = [model for model in status.models if model.error]
    for name, model in zip(told_apart(status.models), status.models, strict=True):
        if model.error:
            console.print(f"{name}: {model.error}", style="red", markup=False)
    kept = [model for model in status.models if model.kept]
    if replaced and kept and all(model.error for model in kept):
        raise Refused(
            "none of the models to be loaded at the start could be. The new daemon runs without them, so that jobs "
            "with others go on; it tries each again when somebody asks for it, such as `rootstockd load`."
        )
    if not replaced and broken and len(broken) == len(status.models):
        end(config.socket, force=True)
        process.wait()
        raise Refused("no model could be loaded, so the daemon was stopped again.")
    print_warnings(status.warnings)
    loaded = list(dict.fromkeys(model.name for model in status.models if model.state == "ready"))
    name = loaded[0] if loaded else "mace-emt-small"
    where = repr(str(config.socket))
    with contextlib.suppress(DaemonNotFoundError):
        where = "" if find_socket() == config.socket else where
    console.print(
        f"ready on {', '.join(map(str, config.devices))}, models loaded: {', '.join(loaded) or 'none yet'}\n\n"
        f"  from rootstock_client import RootstockClient\n"
        f'  atoms.calc = RootstockClient({where}).calculator("{name}")\n\n'
        f"socket  {config.socket}\nlog     {config.log_file}"
        + (f"\nmetrics {status.metrics}" if status.metrics else ""),
        soft_wrap=True,
        markup=False,
    )
