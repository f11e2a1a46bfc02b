"""`doctor`: what is wrong here, and the command that mends it."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import click
import platformdirs
from rich.text import Text

import rootstockd
from rootstock_client.errors import AccessDeniedError, DaemonNotFoundError, RootstockError
from rootstock_client.runtime_dir import SYSTEM_DIR, control_socket, find_socket
from rootstockd.cli.clients import socket_option
from rootstockd.cli.common import console, default_log_file, default_socket, fetch_status
from rootstockd.cli.config import examined
from rootstockd.cli.service import SERVICE_CACHE, Service, service_at
from rootstockd.doctor import gpus, machine, places, running, settings, software
from rootstockd.doctor.findings import Examination, Finding, Level, examine, note, ok, problem
from rootstockd.host.lock_holder import lock_holder
from rootstockd.settings.state_dir import SYSTEM_STATE, own_state
from rootstockd.users import user_name

SCHEMA_VERSION = 1
"""Of what `--json` prints; raised when a field changes its meaning or goes."""
_COLOUR: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
_NARROW = 72
"""Columns below which what belongs to a finding begins at the margin."""
_SOON = 1.0
"""Seconds for a daemon to say whose it is, which changes little of what is said."""


@click.command()
@socket_option
@click.option("--json", "as_json", is_flag=True, help="For programs; the schema has a version.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1, max=3600),
    default=5.0,
    show_default=True,
    help="Seconds to wait for file systems, drivers and daemons that do not answer.",
)
def doctor(socket: Path | None, as_json: bool, timeout: float) -> None:
    """Check this node: what is wrong, and how to fix it.

    Nothing is changed, and no rights are needed. Run it where something does not work: as the same user, on the same
    node, in the same job. The exit status is 1 if something will not work, 0 otherwise.
    """
    found = examine(_examinations(socket, timeout), timeout)
    counts = Counter(finding.level for findings in found.values() for finding in findings)
    if as_json:
        said = {
            "schema_version": SCHEMA_VERSION,
            "version": rootstockd.__version__,
            "host": platform.node(),
            "user": user_name(os.getuid()),
            "findings": [
                {"area": area, **finding.model_dump()} for area, findings in found.items() for finding in findings
            ],
        }
        click.echo(json.dumps(said, indent=2))
    else:
        _show(found, counts)
    raise SystemExit(1 if counts["problem"] else 0)


def _examinations(named: Path | None, timeout: float) -> dict[str, Examination]:
    """What to look at, in the order of the report."""
    return {
        "machine": _machine,
        "GPUs": _gpus,
        "software": partial(_software, named),
        "places": partial(_places, named),
        "settings": partial(_settings, named),
        "daemon": partial(_daemon, named, timeout),
    }


@cache
def _service(named: Path | None) -> Service | None:
    """What systemd has where clients look."""
    try:
        return service_at(find_socket(named))
    except RootstockError:
        return None


def _machine() -> Iterator[Finding]:
    return machine.check_machine(machine.look_at_machine())


def _gpus() -> Iterator[Finding]:
    driver = gpus.look_at_driver()
    yield from gpus.check_driver(driver)
    yield from gpus.check_gpus(driver)


def _software(named: Path | None) -> Iterator[Finding]:
    yield from software.check_python()
    states = list(software.look_at_environments())
    yield from software.check_environments(states, gpus.look_at_driver(), own=_is_own(named))


def _is_own(named: Path | None) -> bool:
    """Whether jobs here use a daemon that has this user's environments, or none."""
    if (service := _service(named)) is not None:
        return service.is_administered  # the machine's has root's
    try:
        address = find_socket(named)
        told = fetch_status(address, timeout=_SOON).config is not None
        return told and address.stat().st_uid == os.getuid()  # others may administer it
    except AccessDeniedError:
        return False
    except (RootstockError, OSError):
        return True


def _places(named: Path | None) -> Iterator[Finding]:
    login = places.look_at_login(os.environ, named)
    address = Path(login.named).absolute() if login.named else default_socket()
    there = places.look_at_address(address)
    yield from places.check_runtime_folder(places.look_at_folder(address.parent), login, there)
    for path in [address] if login.named else dict.fromkeys([address, SYSTEM_DIR / address.name]):
        yield from places.check_address(places.look_at_address(path), login)
    yield from places.check_trust(places.look_at_folder(SYSTEM_STATE, follow=True))
    yield from places.check_trust(places.look_at_folder(own_state(), follow=True))
    service = _service(named)
    kept = [("state", own_state(), "export ROOTSTOCKD_STATE=FOLDER")]
    if service is None or service.unit.user:
        kept.append(("cache", platformdirs.user_cache_path("rootstockd"), "export XDG_CACHE_HOME=FOLDER"))
    elif service.is_administered:
        kept.append(("cache", SERVICE_CACHE, f"systemctl edit {service.unit.service}"))
    if service is None:
        kept.append(("log", default_log_file(address).parent, "rootstockd start --log-file FILE"))
    for name, path, mend in kept:
        yield from places.check_storage(name, places.look_at_folder(path, follow=True), mend, needed=name == "log")
    if service is not None:
        yield ok("log", f"in the journal: {shlex.join(service.unit.journal())}")


def _settings(named: Path | None) -> Iterator[Finding]:
    service = _service(named)
    instance = service.instance if service is not None and service.is_administered else None
    of_catalogue = list(settings.check_catalogue())
    told = {finding.what for finding in of_catalogue}
    looked = examined(None, instance)
    # what is at sockets' places is told with these
    problems = [text for text in looked.problems if text not in told and not text.startswith("socket: ")]
    doubts = [text for text in looked.doubts if text not in told]
    check = "rootstockd config check" + (f" --instance {instance}" if instance else "")
    yield from settings.check_settings(looked.files, problems, doubts, check)
    yield from (note("settings", text) for text in looked.closed())
    yield from of_catalogue


def _daemon(named: Path | None, timeout: float) -> Iterator[Finding]:
    address, left, listening = default_socket(), False, None
    failing = ""
    if (service := _service(named)) is not None and (failing := service.failing()):
        yield problem("daemon", failing, "Jobs wait for it in vain.", shlex.join(service.unit.journal()))
    try:
        address = find_socket(named)
        left = places.look_at_address(address).state == "stale"
        status = fetch_status(address, timeout=timeout * 0.8)
    except RootstockError as error:
        if not failing:
            yield from running.check_absence(error, left=left)
        if not isinstance(error, DaemonNotFoundError):
            listening = places.listener(control_socket(address))
            if listening is None:
                return
    else:
        listening = status.pid
        yield from running.check_running(status, gpus.look_at_driver())
    with lock_holder(address.with_suffix(".lock")) as holder:
        if holder is not None:
            yield from running.check_reachable(address, holder[0], listening)


def _show(found: dict[str, list[Finding]], counts: Counter[Level]) -> None:
    """Print the findings for people: one line for what is well, more for what is not."""
    console.print(f"[bold]rootstockd {rootstockd.__version__}[/] on {platform.node()}, for {user_name(os.getuid())}")
    for area, findings in found.items():
        console.print(f"\n[bold]{area}[/]")
        for finding in findings:
            _show_finding(finding)
    bad = [
        f"[{_COLOUR[level]}]{counts[level]} {level}{'s' * (counts[level] > 1)}[/]"
        for level in ("problem", "warning")
        if counts[level]
    ]
    console.print(f"\n{', '.join(bad) or '[green]nothing is wrong[/]'}")


def _show_finding(finding: Finding) -> None:
    wide = console.width >= _NARROW
    head = Text(finding.level.ljust(9), _COLOUR[finding.level])
    if wide:
        head.append(f"{finding.subject} ".ljust(16), "default")
    words = Text(finding.what if wide else f"{finding.subject}: {finding.what}")
    room = max(20, console.width - len(head))
    lines = list(words.wrap(console, room))
    if finding.why:
        lines += Text(finding.why, "dim").wrap(console, room)
    if finding.advice:
        lines += Text(finding.advice).wrap(console, room)
    if finding.mend:
        lines.append(Text(f"> {finding.mend}", "bold"))  # in one piece, to be copied
    for line in lines:
        console.print(Text.assemble(head, line), soft_wrap=True)
        head = Text(" " * len(head))
