"""`slurm run`: daemons for the length of a job, one a node. `slurm prolog` and `epilog`: one for all jobs of a node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import (
    JOB_VARIABLE,
    SOCKET_NAME,
    SOCKET_VARIABLE,
    SYSTEM_DIR,
    answers,
    control_socket,
    job_runtime_dir,
)
from rootstockd.cli.clients import Refused
from rootstockd.cli.ending import POLL, end
from rootstockd.cli.lifecycle import start
from rootstockd.cli.options import settings_said
from rootstockd.cli.systemd_units import unit_at
from rootstockd.host.devices import VISIBLE
from rootstockd.host.sockets import AddressError, make_runtime_dir
from rootstockd.settings.config_file import ConfigError

COMMAND = (sys.executable, "-m", "rootstockd")
READY = "ready on "
"""How `start` says that it is."""
KILL_WAIT = 30.0
"""Seconds between SIGTERM and SIGKILL, unless the cluster's configuration says otherwise."""
AFTER_DRAIN = 5.0
"""Seconds of these that a daemon may need for the rest of its end."""
ASK_TIMEOUT = 10.0
"""Seconds that one of Slurm's commands has to answer."""
ASK_AGAIN = 1.0
"""Seconds between two tries to signal the daemons."""
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_WHICH_JOB = ("SLURM_JOB", "SLURM_CONF", "SLURM_CLUSTER", "SLURM_WORKING_CLUSTER", "SLURM_JWT")
"""What begins the names of the variables that srun needs to find its job. Others are options in disguise."""
SITE_SOCKET = SYSTEM_DIR / SOCKET_NAME
JOBS = SYSTEM_DIR / "jobs"
"""A file for each job of this node."""
STARTED = JOBS / "started"
"""There while a daemon runs that `prolog` has started."""


@click.group()
def slurm() -> None:
    """Daemons for Slurm's jobs (docs/slurm.md)."""


class AroundCommand(click.Command):
    """Takes a command behind `--`; `obj` of its context is what stood before, and the command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.obj = args[:cut], args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "--", "COMMAND..."]


class ForStart(click.Command):
    """Hands its options on; `obj` of its context is how they were given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = args.copy()
        return super().parse_args(ctx, args)


def start_options() -> list[click.Parameter]:
    """The options of `start`, without those that make no sense here."""
    without = {"foreground", "wait", "instance", "socket"}
    return [option for option in start.params if option.name not in without]


@slurm.command(cls=AroundCommand, params=start_options())
@click.pass_obj
def run(obj: tuple[list[str], list[str]], /, **said: Any) -> None:
    """Run a command with a daemon on each node of the job.

    The daemons are stopped afterwards. To be called in a batch script, not by srun. The daemons use the GPUs that the
    job has, unless told otherwise. Ends with the exit status of the command, which, and whose steps, find the daemon of
    the node that they are on.
    """
    options, command = obj
    folder = job_runtime_dir()
    if folder is None:
        raise Refused(f"this is no Slurm job: {JOB_VARIABLE} is not set. Call it in a batch script, or in salloc.")
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise Refused("each task of this step would start daemons. Call it without srun, and put srun behind the --.")
    if not command:
        raise click.UsageError("what shall run with the daemons? rootstockd slurm run [OPTIONS] -- COMMAND...")
    if shutil.which(command[0]) is None:
        raise Refused(f"there is no command {command[0]!r}.")
    try:
        config = settings_said(socket=folder / SOCKET_NAME, instance=None, **said)
    except ConfigError as error:
        raise Refused(error) from error
    drain_timeout = config.drain_timeout
    if "drain_timeout" not in config.origins:
        drain_timeout = time_to_drain()
        options = ["--drain-timeout", f"{drain_timeout:g}", *options]
    socket = folder / SOCKET_NAME
    with daemons(socket, options, drain_timeout):
        status = run_command(command, {**os.environ, SOCKET_VARIABLE: str(socket)})
    sys.exit(status)


@contextlib.contextmanager
def daemons(socket: Path, options: list[str], drain_timeout: float) -> Iterator[None]:
    """A daemon on each node of the job, ready; at the end they drain and are gone.

    Args:
        socket: the session socket of each.
        options: of `start`.
        drain_timeout: seconds that evaluations under way have at the end.

    Raises:
        Refused: one of them can't start, and has said why.
    """
    signal.signal(signal.SIGTERM, leave)
    name = f"rootstockd-{os.environ[JOB_VARIABLE]}"
    step = subprocess.Popen(
        [*srun(name), *COMMAND, "start", "--wait", "--socket", socket, *options],
        env=job_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what a terminal sends is for the command
    )
    try:
        wait_until_ready(step)
        yield
    finally:
        end_step(step, name, drain_timeout + KILL_WAIT)


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler of signals: end this command."""
    sys.exit(128 + number)


def srun(name: str) -> list[str]:
    """The command that runs another once on each node of the job, beside the job's own tasks.

    Args:
        name: of the step.

    Raises:
        Refused: there is none.
    """
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if shutil.which("srun") is None:
        raise Refused("there is no srun in PATH.")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    per_task = os.environ.keys() & {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"}
    return [
        "srun",
        "--overlap",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=ALL",
        "--kill-on-bad-exit=1",
        f"--job-name={name}",
        *[f"--gpus-per-node={gpus}"] * bool(gpus and per_task),  # not those of one task
    ]


def job_environment() -> dict[str, str]:
    """Variables for srun: without what tells how many GPUs and CPUs each of the job's own tasks shall see."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SRUN_")) or name.startswith(_WHICH_JOB)
    }


def wait_until_ready(step: subprocess.Popen[str]) -> None:
    """Until the daemons of all nodes say so. What they say later is read and dropped.

    Raises:
        Refused: one has ended before.
    """
    assert step.stdout is not None
    missing = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    for line in step.stdout:
        if line.startswith(READY):
            missing -= 1
            click.echo(f"rootstockd: {line}", nl=False, err=True)
        if not missing:
            threading.Thread(target=step.stdout.read, daemon=True).start()
            return
    step.wait()
    raise Refused("not every node of the job has a daemon, so the command was not run. The reason is above.")


def end_step(step: subprocess.Popen[str], name: str, limit: float) -> None:
    """Have the daemons drain, and wait until they are gone. (A signal to srun has them killed.)

    Args:
        step: its srun.
        name: what it is called.
        limit: seconds until they are killed: Slurm may not answer, or one of them may hang.
    """
    signalled, deadline = False, time.monotonic() + limit
    while step.poll() is None and time.monotonic() < deadline:
        signalled = signalled or signal_step(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(ASK_AGAIN)
    if step.poll() is None:
        why = "a daemon did not end" if signalled else "Slurm did not signal the daemons"
        click.echo(f"rootstockd: {why} within {limit:g} s, so they are killed.", err=True)
        step.terminate()
    step.wait()


def signal_step(name: str) -> bool:
    """Whether Slurm has sent SIGTERM to the job's step of this name."""
    # of a job array, one job's number stands for all of them
    listed = ask("squeue", "--noheader", f"--jobs={os.environ[JOB_VARIABLE]}", "--steps", "--format=%i %j")
    steps = [line.split()[0] for line in (listed or "").splitlines() if line.split()[1:] == [name]]
    return bool(steps) and ask("scancel", "--signal=TERM", *steps) is not None


def ask(*command: str) -> str | None:
    """What one of Slurm's commands says; None if it fails, or does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=ASK_TIMEOUT).stdout
    return None


def run_command(command: list[str], environment: dict[str, str]) -> int:
    """Run it, pass signals on to it, and give its exit status as a shell does.

    Raises:
        Refused: it can't be run.
    """
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise Refused(f"can't run {command[0]!r}: {error.strerror}. Is what its first line names there?") from error
        # a script without such a line is the shell's, as in a shell
        process = subprocess.Popen(["/bin/sh", shutil.which(command[0]) or command[0], *command[1:]], env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has it from the terminal, too
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: process.send_signal(number))
    status = process.wait()
    signal.signal(signal.SIGTERM, leave)  # it need not wait for the daemons
    return status if status >= 0 else 128 - status


def time_to_drain() -> float:
    """Seconds for evaluations under way that fit between SIGTERM and SIGKILL, as this cluster has them."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config") or "", re.MULTILINE)
    kill_wait = float(found[1]) if found else KILL_WAIT
    return max(kill_wait - AFTER_DRAIN, kill_wait / 2)


# --- one daemon for all jobs of a node


@slurm.command(cls=ForStart, params=start_options())
@click.pass_obj
def prolog(options: list[str], /, **_: Any) -> None:
    """In Slurm's Prolog: start the node's daemon with the first job.

    Returns when sessions are taken; models load meanwhile. Where systemd has the daemon, nothing is done.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # of a `timeout` around it; `start` shall not ignore SIGINT, either
        signal.signal(number, leave)
    with jobs() as job:
        if job is None:
            return
        job.touch()
        if not has_daemon():
            STARTED.touch()  # before there is one: this command may be killed
            try:
                start_for_node(options)
            except BaseException:
                STARTED.unlink()
                raise


@slurm.command()
def epilog() -> None:
    """In Slurm's Epilog: stop the node's daemon with the last job.

    Only one that `prolog` started.
    """
    with jobs() as job:
        if job is None:
            return
        job.unlink(missing_ok=True)
        if STARTED.exists() and not any(JOBS.glob("[0-9]*")):
            try:
                if has_daemon():
                    end(SITE_SOCKET)
            except RootstockError as error:
                raise Refused(error) from error
            STARTED.unlink()


@contextlib.contextmanager
def jobs() -> Iterator[Path | None]:
    """The file of the job that begins or ends, while no other one can begin or end; None if systemd has the daemon.

    Raises:
        Refused: this is no job's prolog or epilog.
    """
    job = os.environ.get(JOB_VARIABLE, "")
    if os.geteuid() != 0:
        raise Refused("this is for Slurm's Prolog and Epilog, which run as root: see docs/slurm.md.")
    if not job.isdecimal():
        raise Refused(f"this is for Slurm's Prolog and Epilog: {JOB_VARIABLE}, which they have, is not set.")
    if unit_at(SITE_SOCKET):
        yield None
        return
    try:
        make_runtime_dir(SYSTEM_DIR, shared=True)
        JOBS.mkdir(mode=0o755, exist_ok=True)
        folder = os.open(JOBS, os.O_RDONLY | os.O_DIRECTORY)
    except (AddressError, OSError) as error:
        raise Refused(str(error)) from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield JOBS / job
    finally:
        os.close(folder)


def has_daemon() -> bool:
    """Whether the node has one."""
    return answers(control_socket(SITE_SOCKET), 5.0)


def start_for_node(options: list[str]) -> None:
    """Start the node's daemon, and wait until it takes sessions. It ends if the waiting is ended.

    Raises:
        Refused: it can't start.
    """
    # nothing of the job that happens to be the first
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM") and name not in {VISIBLE, SOCKET_VARIABLE}
    }
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [*COMMAND, "start", "--socket", SITE_SOCKET, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            start_new_session=True,
        )
        try:
            while not has_daemon():
                if process.poll() is not None:
                    words.seek(0)
                    reason = words.read().decode(errors="replace").strip().removeprefix("Error: ")
                    raise Refused(f"the node's daemon can't start: {reason}")
                time.sleep(POLL)
        except SystemExit:
            process.send_signal(signal.SIGINT)  # which has `start` end the daemon
            process.wait()
            raise
