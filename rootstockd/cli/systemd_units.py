"""Which of systemd's units a daemon's address belongs to, and what is asked of systemd then."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rootstockd.cli.clients import Refused

_BOOTED = Path("/run/systemd/system")
"""There where systemd is the machine's init (sd_booted(3))."""


@dataclass(frozen=True)
class Unit:
    """A service of systemd's, and the socket that starts it."""

    service: str
    socket: str
    user: bool
    """It is the user's own systemd, not the machine's."""

    @property
    def systemctl(self) -> list[str]:
        """The command that speaks to the unit's systemd."""
        return ["systemctl", *["--user"] * self.user]

    @property
    def roots(self) -> bool:
        """Whether the unit is root's, and whoever asks is not root."""
        return not self.user and os.geteuid() != 0

    @property
    def is_there(self) -> bool:
        """Its service has a process; whoever connects where it has none starts one."""
        command = [*self.systemctl, "show", self.service, "--property=MainPID", "--value"]
        shown = subprocess.run(command, check=False, capture_output=True, text=True).stdout
        return shown.strip() not in {"", "0"}

    def ask(self, verb: str, *names: str) -> None:
        """Have systemd do something, and wait until it has.

        Raises:
            Refused: it could not, or the user may not.
        """
        command = [*self.systemctl, verb, *names]
        if not subprocess.run(command, check=False).returncode:
            return
        said = f"`{' '.join(command)}` failed."
        if self.roots:
            raise Refused(
                f"{said} What the machine's systemd runs is root's to start and to stop, or of those to whom polkit "
                "gives that; access.admins of the daemon's configuration does not, but for `rootstockd reload`, `load` "
                "and `unload`."
            )
        raise Refused(f"{said} The reason is in `{' '.join(self.journal())}`.")

    def stop(self, *, force: bool) -> None:
        """Have it stopped, and its socket closed: the next client would start it again.

        Raises:
            Refused: as above.
        """
        if force:
            self.ask("stop", "--no-block", self.socket, self.service)
            kill = [*self.systemctl, "kill", "--signal=SIGKILL", self.service]
            subprocess.run(kill, check=False, capture_output=True)  # there may be no process
        self.ask("stop", self.socket, self.service)

    def journal(self, *options: str) -> list[str]:
        """The command that shows its log."""
        return ["journalctl", "--user-unit" if self.user else "--unit", self.service, *options]


def unit_at(socket: Path) -> Unit | None:
    """The unit that systemd starts for whoever connects to `socket`, if it is systemd that listens there."""
    if not _BOOTED.is_dir():
        return None
    address = f"{socket.resolve()} (Stream)"
    for user in (False, True):
        command = ["systemctl", *["--user"] * user, "show", "*.socket", "--property=Id,Listen,Triggers,ActiveState"]
        try:
            shown = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        for block in shown.split("\n\n"):
            pairs = [line.partition("=")[::2] for line in block.splitlines()]
            if ("Listen", address) in pairs and ("ActiveState", "active") in pairs:
                said = dict(pairs)
                return Unit(said["Triggers"], said["Id"], user)
    return None


def is_systemd(pid: int) -> bool:
    """Whether a process is systemd itself, which listens before a daemon does and must never be taken for one."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes() == b"systemd\n"
    except OSError:
        return False
