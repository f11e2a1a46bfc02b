"""`attach`: a daemon for drivers that listen, such as i-PI and ASE's SocketIOCalculator.

It runs where the driver does, in a client's installation, which has the client, ASE and click.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from rootstock_client.attachment import Address, Attachment, SamePotential, ask_whether, parse_address
from rootstock_client.control import request
from rootstock_client.errors import RootstockError
from rootstock_client.patience import patience_in_seconds
from rootstockd.cli.clients import OptionPath, Refused, dtype_option, socket_in_use, socket_option
from rootstockd.cli.completion import catalogue_models
from rootstockd.cli.quantities import plural
from rootstockd.cli.system import System, periodicity, read_structure

POLL = 1.0
"""Seconds between looks at how far it has come."""
_TO_THE_END = "\x1b[K"
"""Has a terminal blank the rest of a line; `click.echo` leaves it out where there is none."""


@click.command()
@click.argument("address")
@click.option("--model", shell_complete=catalogue_models, help="A model of the daemon's catalogue.")
@click.option(
    "--structure",
    type=OptionPath(path_type=Path, exists=True, dir_okay=False),
    help="A file with the driver's atoms, in its order: any that ASE reads. Positions in it do not matter.",
)
@click.option(
    "--pbc", metavar="TTT", help="Along which lattice vectors it is periodic, as T or F each; overrides the file's."
)
@click.option("--charge", type=float, help="Total charge in e.")
@click.option("--spin", type=float, help="Spin multiplicity.")
@dtype_option
@click.option("--head", help="Which of the model's heads.")
@click.option("--dispersion", is_flag=True, help="Add the D3 correction of mace_mp(dispersion=True).")
@click.option(
    "--no-stress", is_flag=True, help="Compute no virial, as for a model that has none: the driver gets zeros for it."
)
@click.option("--exact", is_flag=True, help="Same structure, same bits: the model's reference implementation.")
@click.option(
    "--count", type=click.IntRange(1, 1024), default=1, show_default=True, help="Connections at once, for i-PI's beads."
)
@click.option("--shm", is_flag=True, help='The driver is i-PI with mode="shm".')
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the driver to listen.",
)
@socket_option
def attach(
    address: str,
    structure: Path | None,
    pbc: str | None,
    count: int,
    shm: bool,
    wait: float,
    no_stress: bool,
    socket: Path | None,
    **options: Any,
) -> None:
    """Serve a driver that listens: i-PI, ASE's SocketIOCalculator.

    ADDRESS is where it listens: the name of an i-PI socket (NAME for /tmp/ipi_NAME), a path, or HOST:PORT. Returns when
    the driver has ended.

    \b
    rootstockd attach h2o --model mace-mp-small --structure init.xyz --count 8
    """  # noqa: D301 - click wants the character \\b itself
    try:
        where = parse_address(address)
        if shm and isinstance(where.where, tuple):
            raise click.UsageError('mode="shm" has a Unix socket: a name or a path, not HOST:PORT.')
        patience = patience_in_seconds(None)
        said = {name: value for name, value in options.items() if value is not None and value is not False}
        along = periodicity(pbc) if pbc else None
        atoms = read_structure(structure, along) if structure else {}
        if no_stress:
            said["want"] = ["energy", "forces"]
        system = System({**atoms, **({"pbc": along} if along else {}), **said})
    except (ValueError, RootstockError) as error:
        raise Refused(error) from error
    daemon = socket_in_use(socket)
    told = threading.Lock()

    def describe(text: bytes) -> bytes:
        """The INIT for the daemon; what only the driver has said is said here, too."""
        init = system.init(text)
        if not system.complete and told.acquire(blocking=False):
            announce(System(json.loads(init)), where)
        return init

    potential = SamePotential()
    attachments = [
        Attachment(daemon, where, describe, patience=patience, wait=wait, shared_memory=shm, potential=potential)
        for _ in range(count)
    ]
    with _ended_by_signals():
        try:
            if system.complete:  # what the daemon refuses no driver needs to hear of
                ask_whether(daemon, system.init(b""), patience)
                announce(system, where)
            _run(attachments, daemon)
        except RootstockError as error:
            raise Refused(error) from error
        finally:
            _leave(attachments)
    click.echo("the driver has ended")


def announce(system: System, where: Address) -> None:
    """Say what was chosen."""
    click.echo(f"attaching {system} to {where}{_TO_THE_END}")


def _run(attachments: list[Attachment], daemon: Path) -> None:
    """Until all have ended, or one has failed.

    Raises:
        RootstockError: why it did.
    """
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def serve(attachment: Attachment) -> None:
        try:
            attachment.run()
        except BaseException as error:
            ends.put(error)
        else:
            ends.put(None)

    for attachment in attachments:
        threading.Thread(target=serve, args=(attachment,), daemon=True).start()
    with _progress() as say:
        before, then = 0, time.monotonic()
        for _ in attachments:
            while True:
                with contextlib.suppress(queue.Empty):
                    if (error := ends.get(timeout=POLL)) is not None:
                        raise error
                    break
                if say is not None:
                    done, now = _evaluations(daemon), time.monotonic()
                    attached = sum(attachment.attached for attachment in attachments)
                    rate = max(0, done - before) / (now - then)
                    before, then = done, now
                    say(f"{plural(attached, 'session')}, {plural(done, 'evaluation')}, {rate:.1f}/s")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None] | None]:
    """What says in the last line of a terminal how far it has come; None where there is none."""
    if not sys.stdout.isatty():
        yield None
        return

    def say(text: str) -> None:  # what is printed next, also by another thread, goes over it
        click.echo(f"{text}{_TO_THE_END}\r", nl=False)

    say("waiting for the driver")
    try:
        yield say
    finally:
        say("")


def _evaluations(daemon: Path) -> int:
    """What the daemon, of whichever version, has done for this process; 0 while it does not say."""
    try:
        status: Any = request(daemon, "GET", "/v1/status", timeout=POLL)
        return sum(session["evaluations"] for session in status["sessions"] if session["pid"] == os.getpid())
    except (RootstockError, LookupError, TypeError):
        return 0


def _leave(attachments: list[Attachment]) -> None:
    """End the streams, all at once: each may take a moment."""
    threads = [threading.Thread(target=attachment.leave) for attachment in attachments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C, and what batch systems send, end it in good order."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
