"""A machine with a real systemd for tests: systemd-nspawn boots one over an overlay of this machine's root.

What is written inside goes with it. Processes get in by nsenter, as root or as a user that the machine makes.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from conftest import wait_for

REPOSITORY = Path(__file__).parent.parent
PYTHON = str(Path(sys.prefix, "bin", "python"))
_NEEDED = {Path(sys.prefix), Path(sys.base_prefix).resolve(), REPOSITORY}
IN_TMP = sorted(path for path in _NEEDED if path.is_relative_to("/tmp"))
"""What is needed inside, where /tmp is another one."""
USERS = {"in-alice": 7001, "in-bob": 7002}


def why_not() -> str | None:
    """Why there can't be one here."""
    if os.geteuid() != 0:
        return "only root can boot a systemd"
    if shutil.which("systemd-nspawn") is None:
        return "there is no systemd-nspawn (apt-get install systemd-container)"
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "tmpfs", folder]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            return "file systems can't be mounted here"
        subprocess.run(["umount", folder], check=True)
    return None


class Machine:
    """A machine that has booted.

    Args:
        leader: the process id of its systemd, as it is called outside.
        root: its file system.
    """

    def __init__(self, leader: int, root: Path) -> None:
        self.root, self._enter = root, ["nsenter", "-t", str(leader), "-a"]

    def command(self, *command: str | Path, user: str | None = None) -> list[str]:
        """The command that runs one inside."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        become: list[str] = []
        if user is not None:
            uid = str(USERS[user])
            become = ["setpriv", "--reuid", uid, "--regid", uid, "--init-groups"]
            environment |= {"HOME": f"/home/{user}", "XDG_RUNTIME_DIR": f"/run/user/{uid}"}
        set_all = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
        return [*self._enter, *become, *set_all, *map(str, command)]

    def run(self, *command: str | Path, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command inside, without raising for its exit status."""
        return subprocess.run(
            self.command(*command, user=user), check=False, capture_output=True, text=True, timeout=120
        )

    def do(self, *command: str | Path, user: str | None = None) -> str:
        """Run a command that must succeed; what it says."""
        done = self.run(*command, user=user)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rootstockd(self, *arguments: str | Path, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run our command."""
        return self.run(PYTHON, "-m", "rootstockd", *arguments, user=user)

    def property(self, unit: str, name: str) -> str:
        """What systemd says of a unit."""
        return self.do("systemctl", "show", unit, f"--property={name}", "--value").strip()

    def write(self, path: str, text: str) -> None:
        """Write a file, and its folder."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def journal(self, unit: str, *options: str) -> str:
        """What a unit has said."""
        return self.do("journalctl", "--unit", unit, "--output=cat", *options)


@contextlib.contextmanager
def booted() -> Iterator[Machine]:
    """Boot one, and switch it off at the end."""
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rsd-machine-")))
        layers, root = work / "layers", work / "root"
        for folder in (layers, root):
            folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", layers], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", layers], check=True)
        for name in ("upper", "work"):
            (layers / name).mkdir()
        options = f"lowerdir=/,upperdir={layers}/upper,workdir={layers}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", root], check=True)
        prepare(root)
        binds = [f"--bind-ro={path}" for path in IN_TMP]
        command = ["systemd-nspawn", "-q", "-D", root, "--boot", "--register=no", "--keep-unit", "--private-network"]
        command += [
            "--console=read-only",
            "--link-journal=no",
            *binds,
            "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
            "systemd.unit=basic.target",
        ]
        # no child of ours: what runs inside is none of the processes that tests are checked for
        start = f"{shlex.join(map(str, command))} </dev/null >{work}/boot.log 2>&1 & echo $!"
        pid = int(subprocess.run(["sh", "-c", start], check=True, capture_output=True, text=True).stdout)
        container = os.pidfd_open(pid)
        stack.callback(switch_off, container)
        yield Machine(wait_until_up(pid, work / "boot.log"), root)


def prepare(root: Path) -> None:
    """What must be so before it boots."""
    root.joinpath("root").chmod(0o755)  # a Python may lie there that users run
    for name, uid in USERS.items():
        for file, line in (
            ("passwd", f"{name}:x:{uid}:{uid}::/home/{name}:/bin/sh"),
            ("shadow", f"{name}:*:20000:0:99999:7:::"),
            ("group", f"{name}:x:{uid}:"),
        ):
            with (root / "etc" / file).open("a") as accounts:
                accounts.write(line + "\n")
        home = root / "home" / name
        home.mkdir(parents=True)
        os.chown(home, uid, uid)


def wait_until_up(container: int, log: Path) -> int:
    """Until it has booted; the process id of its systemd."""

    def up() -> bool:
        try:
            leader = Path(f"/proc/{container}/task/{container}/children").read_text().split()
        except FileNotFoundError:
            raise AssertionError(log.read_text()) from None
        if not leader:
            return False
        state = ["nsenter", "-t", leader[0], "-a", "systemctl", "is-system-running"]
        said = subprocess.run(state, check=False, capture_output=True, text=True).stdout.strip()
        return said in {"running", "degraded"}

    wait_for(up, timeout=60)
    return int(Path(f"/proc/{container}/task/{container}/children").read_text().split()[0])


def switch_off(container: int) -> None:
    """End it, with all that runs in it.

    Args:
        container: a pidfd of systemd-nspawn.
    """
    signal.pidfd_send_signal(container, signal.SIGTERM)
    if not select.select([container], [], [], 20)[0]:
        signal.pidfd_send_signal(container, signal.SIGKILL)
        select.select([container], [], [])
    os.close(container)
