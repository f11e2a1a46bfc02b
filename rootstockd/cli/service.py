"""The service that systemd has at a daemon's address: how it is, and what stands in the way of its daemon."""

from __future__ import annotations

import os
import pwd
import re
import socket as socketlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rootstockd.cli.systemd_units import Unit, unit_at
from rootstockd.settings.config import Config
from rootstockd.settings.config_file import not_readable

SERVICE_CACHE = Path("/var/cache/rootstockd")
"""What the machine's daemons have for a cache (CacheDirectory=)."""
_TIMES = "ActiveExitTimestampMonotonic", "ExecMainStartTimestampMonotonic"
_PROPERTIES = ("ActiveState", *_TIMES, "NRestarts", "ExecMainStatus", "User", "Group")
_PORTS = ("RestrictAddressFamilies", "IPAddressAllow", "IPAddressDeny")
_AGAIN = 2
"""Restarts after which one that is not up yet is being restarted again and again."""
_ONCE = 10.0
"""Seconds after it was up in which its daemon is started once: it may load its models for as long as that takes."""
_REASON = re.compile(r"^Error: (.+)|: (Failed (?:at step|to locate|to execute) .+)", re.MULTILINE)
"""A daemon's last words, or systemd's where it could not run its command."""
_INSTANCE = re.compile(r"rootstockd@(.+)\.service")


@dataclass(frozen=True)
class Service:
    """A service as systemd has it."""

    unit: Unit
    told: dict[str, str]
    """Its properties."""

    @property
    def instance(self) -> str | None:
        """Its instance, where it is one of our own units'."""
        found = _INSTANCE.fullmatch(self.unit.service)
        return found[1] if found else None

    @property
    def user(self) -> str:
        """Whom its daemon runs as."""
        return self.told.get("User") or pwd.getpwuid(os.getuid() if self.unit.user else 0).pw_name

    @property
    def is_administered(self) -> bool:
        """Whether this user is the one who says what it does."""
        return self.unit.user or os.geteuid() == 0

    def failing(self) -> str:
        """That it fails again and again, how often, and why; empty where it does not."""
        restarts, state = int(self.told.get("NRestarts") or 0), self.told.get("ActiveState")
        up_until, started = (int(self.told.get(when) or 0) / 1e6 for when in _TIMES)
        if state == "active" or restarts < _AGAIN or (up_until and started < up_until + _ONCE):
            return ""
        journal = self.unit.journal("--lines=100", "--output=cat", "--quiet", "--no-pager")
        said = subprocess.run(journal, check=False, capture_output=True, text=True).stdout  # nothing where one may not
        reasons = ["".join(found) for found in _REASON.findall(said)]
        status = self.told.get("ExecMainStatus", "0")
        why = reasons[-1] if reasons else f"see `{' '.join(self.unit.journal())}`"
        return (
            f"systemd starts {self.unit.service} again and again, {restarts} times by now"
            f"{f', as it ends with exit status {status}' * (status != '0')}: {why}"
        )

    def problems(self, settings: Config, *, given: Path | None = None) -> list[str]:
        """What its user and its sandbox keep a daemon with these settings from, as far as this user can see.

        Args:
            settings: them.
            given: a file that stands for those of the service, and lies elsewhere.
        """
        problems = []
        if not self.unit.user and os.geteuid() == 0:
            problems = [
                not_readable(file.path, self.user, self.told.get("Group") or self.user)
                for file in settings.files
                if file.path != given and file.path.exists() and not may(self.user, "-r", file.path)
            ]
        if settings.metrics is not None and not self._may_listen(settings.metrics):
            problems.append(
                f"metrics: {self.unit.service} may open no port for {settings.metrics}. A drop-in must allow it: see "
                "docs/monitoring.md."
            )
        return problems

    def _may_listen(self, address: str) -> bool:
        """Whether its sandbox lets it take connections there. What it allows is taken to be what is needed."""
        host = address.rpartition(":")[0].strip("[]")
        try:
            family = socketlib.getaddrinfo(host, None)[0][0]
        except OSError:  # a problem of its own
            return True
        families = self.told.get("RestrictAddressFamilies", "").split()
        refused = bool(families) and family.name not in families and not families[0].startswith("~")
        return not refused and not (self.told.get("IPAddressDeny") and not self.told.get("IPAddressAllow"))


def service_at(socket: Path) -> Service | None:
    """The service that systemd starts for whoever connects to `socket`, if systemd listens there."""
    unit = unit_at(socket)
    return None if unit is None else service_by(unit)


def service_of(instance: str) -> Service | None:
    """The service of an instance of this user's systemd (root: the machine's), where its unit is installed."""
    name = f"rootstockd@{instance}"
    return service_by(Unit(f"{name}.service", f"{name}.socket", os.geteuid() != 0))


def service_by(unit: Unit) -> Service | None:
    """A unit's service as systemd has it now; None where there is none, or systemd does not say."""
    command = [*unit.systemctl, "show", unit.service, f"--property=LoadState,{','.join((*_PROPERTIES, *_PORTS))}"]
    try:
        shown = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    pairs = (line.partition("=")[::2] for line in shown.splitlines())
    told = dict(pairs)
    return Service(unit, told) if told.get("LoadState") == "loaded" else None


def may(user: str, test: str, path: Path) -> bool:
    """Whether a user may read (`-r`) or enter (`-x`) something; only root can ask. True of a user who is not there."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return True
    groups = os.getgrouplist(user, account.pw_gid)
    command = ["/usr/bin/test", test, os.fspath(path)]
    done = subprocess.run(command, check=False, user=account.pw_uid, group=account.pw_gid, extra_groups=groups, cwd="/")
    return done.returncode == 0
