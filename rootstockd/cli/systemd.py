"""`systemd install` and `uninstall`: the units, made to start this installation's command."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

import rootstockd
from rootstock_client.runtime_dir import SYSTEM_DIR
from rootstockd.cli.clients import Refused
from rootstockd.cli.common import console, default_socket
from rootstockd.cli.options import devices_of
from rootstockd.cli.service import SERVICE_CACHE, may
from rootstockd.host.devices import find_gpus, visible_gpus
from rootstockd.settings.config_file import FILE_NAME
from rootstockd.settings.state_dir import SYSTEM_STATE

_SHIPPED_COMMAND = "/usr/bin/rootstockd"
_SHIPPED_MANUAL = "man:rootstockd(1)"
_HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))  # noqa: S108 - they are looked at
"""What ProtectHome= and PrivateTmp= keep from a service."""
_USER = "rootstockd"
"""Whom the machine's daemons run as."""
_DROP_INS = "rootstockd*@*.d/rootstockd-{}.conf"
_HEAD = "# Made by `rootstockd systemd install`, and again by the next one.\n"


@dataclass(frozen=True)
class Place:
    """Where one of the two systemds looks for what."""

    user: bool
    units: Path
    settings: Path

    @classmethod
    def of(cls, *, user: bool) -> Place:
        """The user's own systemd's, or the machine's."""
        if not user:
            return cls(user=False, units=Path("/etc/systemd/system"), settings=Path("/etc"))
        settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        return cls(user=True, units=settings / "systemd/user", settings=settings)

    @property
    def systemctl(self) -> list[str]:
        """The command that speaks to this systemd."""
        return ["systemctl", *["--user"] * self.user]


@click.group()
def systemd() -> None:
    """Have systemd start daemons, and look after them.

    docs/systemd.md has more.
    """


@systemd.command()
@click.option("--user", is_flag=True, help="Your own systemd, not the machine's.")
@click.option(
    "--gpu",
    "instances",
    multiple=True,
    metavar="NAME",
    help="A GPU to have a daemon for, several with colons between them, or cpu; may be given repeatedly. Clients find "
    "the first by themselves. By default all GPUs, and clients go where they went before.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be written and done.")
def install(user: bool, instances: tuple[str, ...], dry_run: bool) -> None:
    """Install the units, or bring them up to date.

    No daemon is started or stopped.
    """
    place = Place.of(user=user)
    names = instances_of(instances)
    check_place(place)
    leading, stale = defaults(place, names[0], insist=bool(instances))
    files = {**units(place), **leading}
    settings = place.settings / "rootstockd" / FILE_NAME
    if not settings.exists():
        text = (shipped() / FILE_NAME).read_text()
        files[settings] = text.replace("systemctl reload", shlex.join([*place.systemctl, "reload"]))
    commands = (
        [] if user else [["systemd-sysusers", "rootstockd.conf"], ["systemd-tmpfiles", "--create", "rootstockd.conf"]]
    )
    commands.append([*place.systemctl, "daemon-reload"])
    if dry_run:
        for path, text in files.items():
            click.echo(f"--- {path}\n{text}")
        removals = [["rm", str(path)] for path in stale]
        click.echo("--- then\n" + "\n".join(map(shlex.join, [*removals, *commands])))
        tell_next(place, names, settings)
        return
    try:
        for path, text in files.items():
            if not path.exists() or path.read_text() != text:
                write(path, text)
                click.echo(f"wrote {path}")
        for path in stale:
            remove(path)
    except OSError as error:
        hint = "" if user else " Be root, or say --user."
        raise Refused(f"can't write {error.filename}: {error.strerror}.{hint}") from error
    for command in commands:
        run(command)
    if (address := default_socket()).is_socket() and not address.is_symlink():
        console.print(
            f"{address} is that of a daemon started by hand: `rootstockd stop` it first, or systemd takes its address.",
            style="yellow",
        )
    check_usable(place)
    tell_next(place, names, settings)


@systemd.command()
@click.option("--user", is_flag=True, help="Your own systemd, not the machine's.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed and done.")
def uninstall(user: bool, dry_run: bool) -> None:
    """Stop the daemons that systemd runs, and remove the units.

    Settings, weights and drop-ins of yours stay, and so does the user rootstockd: how to remove these is said.
    """
    place = Place.of(user=user)
    ours = {*units(place), *place.units.glob(_DROP_INS.format("*"))}
    there = sorted(path for path in ours if path.exists())
    if not there:
        click.echo(f"nothing is installed in {place.units}")
        tell_left(place)
        return
    listed = subprocess.run(
        [*place.systemctl, "list-units", "--all", "--plain", "--no-legend", "rootstockd*@*"],
        check=False,
        capture_output=True,
        text=True,
    )
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    # links that enabling made, of instances that are not loaded as well
    names += [link.name for link in place.units.glob("*.wants/rootstockd*@*") if link.name not in names]
    disable = [*place.systemctl, "disable", "--now", *sorted(names, reverse=True)]
    reload = [*place.systemctl, "daemon-reload"]
    if dry_run:
        lines = [shlex.join(disable)] if names else []
        click.echo("\n".join([*lines, *(shlex.join(["rm", str(path)]) for path in there), shlex.join(reload)]))
        return
    if names:
        run(disable)
    for path in there:
        remove(path)
    made = () if user else (place.settings / "sysusers.d", place.settings / "tmpfiles.d", SYSTEM_DIR)
    for folder in made:
        with contextlib.suppress(OSError):  # others have something there, or it has gone
            folder.rmdir()
            click.echo(f"removed {folder}, which was empty")
    run(reload)
    tell_left(place)


def instances_of(gpus: tuple[str, ...]) -> list[str]:
    """The instances that --gpu names, or one for each GPU; a comma, as `start` takes it, is said to be one daemon.

    Raises:
        UsageError: one is no instance's name.
    """
    names = (
        [name.replace(",", ":") for name in gpus]
        or [str(i) for i in range(len(visible_gpus(find_gpus(), None)))]
        or ["cpu"]
    )
    for name in names:
        devices_of(name)
    for said, name in zip(gpus, names, strict=False):
        if said != name:
            console.print(
                f"--gpu {said} is one daemon for all of these, rootstockd@{name}, as names of units have no commas. "
                f"For a daemon each: --gpu {said.replace(',', ' --gpu ')}",
                style="yellow",
                soft_wrap=True,
                markup=False,
            )
    return names


def tell_next(place: Place, names: list[str], settings: Path) -> None:
    """Say which commands come next; they are the operator's, for they start daemons."""
    sockets = [f"rootstockd@{name}.socket" for name in names]
    when = "you log in" if place.user else "the machine starts"
    console.print(
        f"\nSettings are in {settings}. To have daemons start with their first clients, now and whenever {when}:\n\n"
        f"  {shlex.join([*place.systemctl, 'enable', '--now', *sockets])}\n\n"
        f"To have them start at once, and load their models before there is a client, now and whenever {when}:\n\n"
        f"  {shlex.join([*place.systemctl, 'enable', '--now', *(name[:-6] + 'service' for name in sockets)])}"
        + (
            "\n\nTo have your systemd start with the machine, and stay when you log out:\n\n  loginctl enable-linger"
            if place.user
            else ""
        ),
        soft_wrap=True,
        markup=False,
    )


def tell_left(place: Place) -> None:
    """Say how to remove what stays of the machine's daemons; docs/administration.md has all of it."""
    if place.user:
        return
    folders = place.settings / "rootstockd", SYSTEM_STATE, SERVICE_CACHE
    commands = [["rm", "-r", str(folder)] for folder in folders if folder.is_dir()]
    with contextlib.suppress(KeyError):
        commands.append(["userdel", pwd.getpwnam(_USER).pw_name])
    if commands:
        words = "\n".join(f"  {shlex.join(command)}" for command in commands)
        click.echo(f"\nSettings, weights, environments and notes stay, until you remove them:\n\n{words}")


def shipped() -> Path:
    """The folder of the units as they are shipped: in the package, or in a checkout beside it."""
    package = Path(rootstockd.__file__).parent
    return package / "units" if (package / "units").is_dir() else package.parent / "systemd"


def units(place: Place) -> dict[Path, str]:
    """What is the same for all instances: files, and what is in them."""
    command = shlex.join([sys.executable, "-m", "rootstockd"]).replace("%", "%%")
    files = {
        place.units / path.name: path.read_text().replace(_SHIPPED_COMMAND, command).replace(_SHIPPED_MANUAL, manual())
        for path in sorted((shipped() / ("user" if place.user else "system")).iterdir())
    }
    if not place.user:
        for folder in ("sysusers.d", "tmpfiles.d"):
            files[place.settings / folder / "rootstockd.conf"] = (shipped() / folder / "rootstockd.conf").read_text()
        if seen := hidden():
            files[place.units / "rootstockd@.service.d/rootstockd-installation.conf"] = (
                f"{_HEAD}# the installation lies where services see nothing else\n[Service]\nProtectHome=tmpfs\n"
                + "".join(f"BindReadOnlyPaths={path}\n" for path in seen)
            )
    return files


def manual() -> str:
    """Where the manual is, as Documentation= has it: this installation's own page, where `man` would not look."""
    folders = Path(sys.prefix) / "share/man", Path(rootstockd.__file__).parent.parent / "docs/man"
    pages = [page for folder in folders if (page := folder / "man1/rootstockd.1").is_file()]
    return pages[0].as_uri().replace("%", "%%") if pages else _SHIPPED_MANUAL


def defaults(place: Place, instance: str, *, insist: bool) -> tuple[dict[Path, str], list[Path]]:
    """What makes clients find an instance without being told its address.

    Args:
        place: where.
        instance: which.
        insist: also if they find another one by now.

    Returns:
        Files to write with what is in them, and files to remove.
    """
    before = sorted(place.units.glob(_DROP_INS.format("default")))
    if before and not insist:
        return {}, []
    files = {
        place.units / f"{name}@{instance}.socket.d/rootstockd-default.conf": (
            f"{_HEAD}# clients look here\n[Socket]\nSymlinks=%t/rootstockd/rootstockd.{kind}\n"
        )
        for name, kind in (("rootstockd", "sock"), ("rootstockd-control", "control"))
    }
    return files, [path for path in before if path not in files]


def write(path: Path, text: str) -> None:
    """Write a file that all may read, whatever the umask: none has secrets in it, and services must read them."""
    for folder in reversed([path.parent, *path.parent.parents]):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)
    path.write_text(text)
    path.chmod(0o644)


def remove(path: Path) -> None:
    """Remove a file, and if it is a unit's last drop-in, their folder."""
    path.unlink()
    click.echo(f"removed {path}")
    if path.parent.match("rootstockd*.d") and not any(path.parent.iterdir()):
        path.parent.rmdir()


def parts() -> list[Path]:
    """The folders of this installation: its environment, the Python of that, and the code."""
    code = Path(rootstockd.__file__).resolve().parent
    return sorted({Path(sys.prefix), Path(sys.base_prefix).resolve(), code.parent})


def hidden() -> list[Path]:
    """Parts of this installation that a service of the machine's does not see unless it is told to."""
    return [part for part in parts() if any(part.is_relative_to(folder) for folder in _HIDDEN)]


def check_place(place: Place) -> None:
    """Whether there is a systemd, and whether its daemons can be believed to be this installation's.

    Raises:
        Refused: there is none, or they can't.
    """
    if shutil.which("systemctl") is None:
        raise Refused("there is no systemctl: this machine has no systemd. Use `rootstockd start`.")
    for part in () if place.user else parts():
        if owner := part.stat().st_uid:
            raise Refused(
                f"{part} belongs to uid {owner}, who could change what the machine's daemons run. Install rootstockd "
                "as root, with a Python of root's (/usr/bin/python3 -m venv /opt/rootstockd), or say --user."
            )


def check_usable(place: Place) -> None:
    """Whether the machine's service's user may run what it is to run, but for parts that a drop-in shows to it alone.

    Raises:
        Refused: it may not.
    """
    for part in () if place.user else parts():
        for folder in () if part in hidden() else (*reversed(part.parents), part):
            if not may(_USER, "-x", folder):
                raise Refused(
                    f"the user {_USER}, whom the service runs as, may not enter {folder}, where this installation is: "
                    f"chmod 755 {folder}"
                )


def run(command: list[str]) -> None:
    """Run a command that says itself what is wrong.

    Raises:
        Refused: it failed.
    """
    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        raise Refused(f"can't run {shlex.join(command)}: {error.strerror}.") from error
    if done.returncode:
        raise Refused(f"{shlex.join(command)} failed.")
