"""A real Slurm for tests: two nodes with two pretend GPUs each, and a /tmp of their own.

They are services of one machine with a real systemd (`machine.py`): what they leave goes with it, and jobs are those of
ordinary users.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import machine as machines
from conftest import wait_for
from machine import REPOSITORY, Machine

NODES = {"n1": 17001, "n2": 17002}
ADDRESS = "10.99.0.1"
"""Of the machine: names are not looked up where there is loopback alone."""
PATH = f"{Path(sys.prefix, 'bin')}:/usr/bin:/bin"
BOTH_NODES = "NodeHostname={host} NodeAddr={address} CPUs=2 RealMemory=2000 Gres=gpu:2"
CONF = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
StateSaveLocation=/var/lib/slurm/state
SlurmdSpoolDir=/var/lib/slurm/%n
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd-%n.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
KillWait=20
Prolog=/etc/slurm/prolog
Epilog=/etc/slurm/epilog
PrologFlags=Alloc
GresTypes=gpu
PartitionName=main Nodes={nodes} Default=YES MaxTime=1-0 DefMemPerCPU=500 State=UP
"""
GRES = "AutoDetect=off\n" + "".join(f"NodeName={n} Name=gpu File=/dev/pretend{g}\n" for n in NODES for g in (0, 1))
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/run/slurm-cgroup\nCgroupAutomount=no\n"


def why_not() -> str | None:
    """Why there can't be one here."""
    if missing := [name for name in ("slurmctld", "slurmd", "srun", "munged", "ip") if shutil.which(name) is None]:
        packages = "slurmctld slurmd slurm-client munge iproute2"
        return f"there is no {', no '.join(missing)} (apt-get install --no-install-recommends {packages})"
    return machines.why_not()


NODE = """#!/bin/sh
# one node: a slurmd that has a /tmp of its own, and in it what the tests are run from
set -e
own=/run/tmp-of-$1
mkdir --mode=1777 "$own"
for path in %(in_tmp)s; do
    mkdir -p "$own${path#/tmp}"
    mount --bind "$path" "$own${path#/tmp}"
done
mount --rbind "$own" /tmp
exec /usr/sbin/slurmd -D -N "$1"
"""


class Job:
    """A job that was submitted; leaving the block ends it.

    Args:
        slurm: where.
        number: its id.
        folder: its working directory, where its output is.
    """

    def __init__(self, slurm: Slurm, number: str, folder: Path) -> None:
        self._slurm, self.id, self.folder = slurm, number, folder

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self.over:
            self.cancel("--signal=KILL", "--full")
            wait_for(lambda: self.over)

    def _said(self, field: str) -> list[str]:
        """Of an array, what each of its elements says."""
        shown = self._slurm.machine.do("scontrol", "--oneliner", "show", "job", self.id)
        return re.findall(rf"\b{field}=(\S+)", shown)

    @property
    def over(self) -> bool:
        """Whether it has ended, its Epilog too."""
        return not {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"} & {*self._said("JobState")}

    def wait(self) -> int:
        """Until it has ended; its exit status."""
        wait_for(lambda: self.over, timeout=100)
        return max(int(number) for said in self._said("ExitCode") for number in said.split(":"))

    @property
    def output(self) -> str:
        """What it has said so far."""
        try:
            return (self.folder / f"slurm-{self.id}.out").read_text()
        except FileNotFoundError:
            return ""

    def log(self, node: str = "n1") -> str:
        """What its daemon on a node has said."""
        log = self._slurm.home / f".local/state/rootstockd/log/job-{self.id}.{node}.log"
        return log.read_text() if log.exists() else ""

    def cancel(self, *options: str) -> None:
        """`scancel`."""
        self._slurm.machine.do("scancel", *options, self.id, user=self._slurm.user)

    def until(self, words: str) -> None:
        """Until it says so."""
        wait_for(lambda: words in self.output or self.over, timeout=100)
        assert words in self.output, self.output


class Slurm:
    """A running Slurm, for one user."""

    user = "in-alice"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.home = machine.root / "home" / self.user
        self._jobs = 0

    def submit(self, script: str, *options: str, **files: str) -> Job:
        """Submit a script, to run in a folder of its own with these files (`name` is `name.py`) in it."""
        self._jobs += 1
        folder = self.home / f"job-{self._jobs}"
        inside = f"/home/{self.user}/{folder.name}"
        self.machine.do("mkdir", inside, user=self.user)
        (folder / "script").write_text(script)
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        sbatch = ("env", f"PATH={PATH}", "sbatch", "--parsable", f"--chdir={inside}")
        return Job(self, self.machine.do(*sbatch, *options, f"{inside}/script", user=self.user).strip(), folder)

    def hook(self, name: str, script: str) -> None:
        """Set the Prolog or the Epilog."""
        self.machine.write(f"/etc/slurm/{name}", script)
        (self.machine.root / "etc/slurm" / name).chmod(0o755)


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """Start one, and its machine."""
    with machines.booted() as machine:
        values = {"host": machine.do("hostname", "-s").strip(), "address": ADDRESS, "nodes": ",".join(NODES)}
        nodes = "".join(f"NodeName={name} Port={port} {BOTH_NODES}\n" for name, port in NODES.items())
        machine.write("/etc/slurm/slurm.conf", (nodes + CONF).format(**values))
        machine.write("/etc/slurm/gres.conf", GRES)
        machine.write("/etc/slurm/cgroup.conf", CGROUP)
        slurm = Slurm(machine)
        for hook in ("prolog", "epilog"):
            slurm.hook(hook, "#!/bin/sh\nexit 0\n")
        for number in (0, 1):
            machine.do("mknod", "--mode=666", f"/dev/pretend{number}", "c", "1", "3")
        machine.do("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
        machine.do("mkdir", "-p", "/run/slurm-cgroup", "/var/lib/slurm/state", *(f"/var/lib/slurm/{n}" for n in NODES))
        machine.write("/etc/slurm/node", NODE % {"in_tmp": shlex.join(map(str, machines.IN_TMP))})
        (machine.root / "etc/slurm/node").chmod(0o755)
        for unit, command, more in (
            ("test-slurmctld", "/usr/sbin/slurmctld -D", ""),
            ("test-slurmd@", "/usr/bin/unshare --mount /etc/slurm/node %i", "KillMode=process\nDelegate=yes\n"),
        ):
            variables = shlex.join([f"PYTHONPATH={REPOSITORY}", "OMP_NUM_THREADS=1"])
            service = f"[Service]\nExecStart={command}\nEnvironment={variables}\n{more}"
            machine.write(f"/etc/systemd/system/{unit}.service", service)
        machine.do("systemctl", "daemon-reload")
        machine.do("systemctl", "start", "munge", "test-slurmctld", *(f"test-slurmd@{name}" for name in NODES))

        def up() -> bool:
            return machine.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split() == ["idle"] * len(NODES)

        wait_for(up, timeout=60)
        yield slurm
