"""The units on a real systemd: activation, readiness, crash, hang, restart under a running job, users, reload, stop."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sysconfig
from collections.abc import Iterator
from typing import Any

import pytest

import machine as machines
from conftest import wait_for
from machine import PYTHON, REPOSITORY, USERS, Machine

pytestmark = pytest.mark.skipif((why := machines.why_not()) is not None, reason=why or "")
SERVICE, SOCKET = "rootstockd@cpu.service", "rootstockd@cpu.socket"
OTHER, OTHER_SOCKET = "rootstockd@auto.service", "rootstockd@auto.socket"
SETTINGS = "/etc/rootstockd/config.toml"

GATES = '''
"""A calculator that waits for a file when it is made, and for another when it evaluates."""
import time
from pathlib import Path
from ase.calculators.emt import EMT

def wait(name):
    while not Path("/srv/gates", name).exists():
        time.sleep(0.02)

class Gated(EMT):
    def __init__(self):
        wait("load")
        super().__init__()

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        wait("evaluate")
        super().calculate(atoms, properties, system_changes)
'''
CATALOGUE = '[gated]\nfamily = "ase"\ndtype = "float64"\narguments = { calculator = "gates:Gated" }\n'

MD = """
import hashlib, json, sys
from pathlib import Path
from ase import units
from ase.build import bulk
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
import numpy as np
from rootstock_client import RootstockClient

socket, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
atoms = bulk("Cu", cubic=True)
MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(1))
atoms.calc = RootstockClient(socket, patience=60).calculator("emt")
dynamics = VelocityVerlet(atoms, units.fs)
done = 0
while done != steps and not (steps < 0 and (folder / "enough").exists()):
    dynamics.run(10)
    done += 10
    (folder / "progress").write_text(str(done))
digest = hashlib.sha256(atoms.positions.tobytes() + atoms.get_momenta().tobytes()).hexdigest()
print(json.dumps([done, digest]))
"""

ONE = """
import sys
from ase.build import bulk
from rootstock_client import RootstockClient
atoms = bulk("Cu", cubic=True)
socket, model, patience = sys.argv[1:]
atoms.calc = RootstockClient(socket or None, patience=float(patience)).calculator(model)
print(atoms.get_potential_energy())
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine where the units have been installed, and an administrator has done some work."""
    with machines.booted() as machine:
        done = machine.rootstockd("systemd", "install", "--gpu", "cpu", "--gpu", "auto")
        assert done.returncode == 0, done.stderr
        assert f"systemctl enable --now {SOCKET} {OTHER_SOCKET}" in done.stdout
        drop_in = f"[Service]\nEnvironment=OMP_NUM_THREADS=1 PYTHONPATH={REPOSITORY}:/srv/gates\n"
        machine.write("/etc/systemd/system/rootstockd@.service.d/test.conf", drop_in)
        other = "[Service]\nWatchdogSec=4\nTimeoutAbortSec=1\n"
        machine.write(f"/etc/systemd/system/{OTHER}.d/other.conf", other)
        machine.write(SETTINGS, 'models = ["emt"]\n')
        machine.write("/etc/rootstockd/auto.toml", 'models = ["gated"]\ncatalogues = ["gated.toml"]\n')
        machine.write("/etc/rootstockd/gated.toml", CATALOGUE)
        machine.write("/srv/gates/gates.py", GATES)
        machine.write("/srv/md.py", MD)
        machine.write("/srv/one.py", ONE)
        machine.do("systemctl", "daemon-reload")
        machine.do("systemctl", "enable", "--now", SOCKET)
        yield machine


@pytest.fixture
def other(machine: Machine) -> Iterator[None]:
    """An instance of its own with a model that a test may hold up."""
    machine.do("systemctl", "start", OTHER_SOCKET)
    yield
    open_gates(machine, "load", "evaluate")
    machine.do("systemctl", "stop", OTHER_SOCKET, OTHER)
    for gate in (machine.root / "srv/gates").glob("*[!.py]"):
        if gate.is_file():
            gate.unlink()


def open_gates(machine: Machine, *names: str) -> None:
    for name in names:
        machine.write(f"/srv/gates/{name}", "")


def one(
    machine: Machine, user: str, socket: str = "", model: str = "emt", patience: float = 0
) -> subprocess.Popen[str]:
    """A user's job: one structure's energy."""
    command = machine.command(PYTHON, "/srv/one.py", socket, model, str(patience), user=user)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def energy(job: subprocess.Popen[str]) -> float:
    """What a job got."""
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    return float(out)


@contextlib.contextmanager
def md(machine: Machine, user: str, socket: str) -> Iterator[None]:
    """A user's MD, under way when the block begins, that must go on after it, and end as if nothing had happened."""
    home = machine.root / "home" / user
    for name in ("progress", "enough"):
        (home / name).unlink(missing_ok=True)

    def progress() -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((home / "progress").read_text())
        return 0

    script = ("/srv/md.py", socket, f"/home/{user}")
    command = machine.command(PYTHON, *script, "-1", user=user)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            wait_for(lambda: progress() > 50 or job.poll() is not None, timeout=60)
            yield
            before = progress()
            wait_for(lambda: progress() > before + 50 or job.poll() is not None, timeout=60)
        finally:
            (home / "enough").touch()
            out, err = job.communicate(timeout=60)
        assert job.returncode == 0, err
    steps, result = json.loads(out)
    assert json.loads(machine.do(PYTHON, *script, str(steps), user=user)) == [steps, result]


def status_of(machine: Machine, socket: str) -> dict[str, Any]:
    """What a daemon says of itself to root."""
    return json.loads(machine.rootstockd("status", "--json", "--socket", socket).stdout)


def main_pid(machine: Machine, unit: str = SERVICE) -> str:
    return machine.property(unit, "MainPID")


def test_units_are_right(machine: Machine) -> None:
    """systemd-analyze says nothing, and finds little exposed."""
    names = [SERVICE, SOCKET, "rootstockd-control@cpu.socket"]
    done = machine.run("systemd-analyze", "verify", *(f"/etc/systemd/system/{name}" for name in names))
    assert (done.returncode, done.stderr) == (0, "")
    done = machine.run("systemd-analyze", "security", "--threshold=20", "--no-pager", SERVICE)
    assert done.returncode == 0, done.stdout
    shipped = REPOSITORY / "systemd/system/rootstockd@.service"
    done = machine.run("systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", shipped)
    assert done.returncode == 0, done.stdout


def test_the_first_client_starts_it(machine: Machine) -> None:
    assert main_pid(machine) == "0"
    jobs = [one(machine, user) for user in USERS]
    assert energy(jobs[0]) == energy(jobs[1])
    assert machine.property(SERVICE, "ActiveState") == "active"
    assert machine.do("ps", "-o", "user=", "-p", main_pid(machine)).strip() == "rootstockd"
    status = status_of(machine, "/run/rootstockd/rootstockd.sock")
    assert str(status["pid"]) == main_pid(machine)
    assert status["models"][0]["unconfined"] == []  # workers could give their rights away
    line = "rootstockd.daemon: ready on /run/rootstockd/cpu.sock"  # with neither a time nor a priority of ours
    assert line in machine.journal(SERVICE).splitlines()
    assert line not in machine.journal(SERVICE, "--priority=notice")
    assert line in machine.do("journalctl", "--identifier=rootstockd", "--output=cat").splitlines()


def test_killed_under_a_job(machine: Machine) -> None:
    with md(machine, "in-alice", "/run/rootstockd/cpu.sock"):
        pid = main_pid(machine)
        sessions = status_of(machine, "/run/rootstockd/cpu.sock")["sessions"]
        assert [session["user"] for session in sessions] == ["in-alice"]
        machine.do("kill", "-KILL", pid)
        wait_for(lambda: main_pid(machine) not in {pid, "0"})


def test_restarted_under_a_job(machine: Machine) -> None:
    with md(machine, "in-alice", "/run/rootstockd/cpu.sock"):
        pid = main_pid(machine)
        machine.do("systemctl", "restart", "--no-block", SERVICE)
        jobs = [one(machine, "in-bob", patience=0) for _ in range(2)]  # that have no patience at all
        for job in jobs:
            energy(job)
        wait_for(lambda: main_pid(machine) not in {pid, "0"})


def test_it_is_ready_when_its_models_are(machine: Machine, other: None) -> None:
    machine.do("systemctl", "start", "--no-block", OTHER)
    wait_for(lambda: machine.property(OTHER, "StatusText") == "loading gated")
    machine.do("kill", "-HUP", main_pid(machine, OTHER))
    wait_for(lambda: "rootstockd.daemon: reloaded" in machine.journal(OTHER))
    assert machine.property(OTHER, "ActiveState") == "activating"
    open_gates(machine, "load")
    wait_for(lambda: machine.property(OTHER, "ActiveState") == "active")
    assert machine.property(OTHER, "StatusText") == "ready, 0 sessions"


def test_the_watchdog_ends_one_that_hangs(machine: Machine, other: None) -> None:
    open_gates(machine, "load", "evaluate")
    energy(one(machine, "in-bob", "/run/rootstockd/auto.sock", "gated"))
    pid = main_pid(machine, OTHER)
    machine.do("kill", "-STOP", pid)
    job = one(machine, "in-bob", "/run/rootstockd/auto.sock", "gated")
    energy(job)
    assert main_pid(machine, OTHER) not in {pid, "0"}
    assert "Watchdog timeout" in machine.journal(OTHER)


def test_stop_lets_evaluations_end(machine: Machine, other: None) -> None:
    open_gates(machine, "load")
    job = one(machine, "in-bob", "/run/rootstockd/auto.sock", "gated")
    wait_for(lambda: "ready" in machine.property(OTHER, "StatusText"))
    address = "/run/rootstockd/auto.sock"

    def busy() -> bool:
        return any(session["state"] == "busy" for session in status_of(machine, address)["sessions"])

    wait_for(busy)
    machine.do("systemctl", "stop", "--no-block", OTHER_SOCKET, OTHER)
    wait_for(lambda: "draining: 1 sessions" in machine.journal(OTHER))
    open_gates(machine, "evaluate")
    energy(job)
    wait_for(lambda: machine.property(OTHER, "ActiveState") == "inactive")
    assert machine.property(OTHER, "Result") == "success"
    assert not (machine.root / "run/rootstockd/auto.sock").exists()


def test_reload(machine: Machine) -> None:
    machine.do("systemctl", "start", SERVICE)
    pid = main_pid(machine)
    machine.write(SETTINGS, 'models = ["emt"]\nmax_sesions = 1\n')
    done = machine.run("systemctl", "reload", SERVICE)
    assert done.returncode != 0
    assert "did you mean 'max_sessions'?" in machine.journal(SERVICE)
    machine.write(SETTINGS, 'models = ["emt"]\n[users.in-alice]\nsessions = 0\n')
    machine.do("systemctl", "reload", SERVICE)
    job = one(machine, "in-alice")
    assert "as many as one user may" in job.communicate(timeout=60)[1]
    energy(one(machine, "in-bob"))
    machine.write(SETTINGS, 'models = ["emt"]\n')
    machine.do("systemctl", "reload", SERVICE)
    assert main_pid(machine) == pid


def test_settings_are_checked_while_it_runs(machine: Machine) -> None:
    """Though clients find its sockets through links of systemd's; links and files of others are told as ever."""
    address, control = "/run/rootstockd/rootstockd.sock", "/run/rootstockd/rootstockd.control"
    machine.do("systemctl", "start", SERVICE)
    assert machine.do("readlink", address) == "/run/rootstockd/cpu.sock\n"
    machine.write("/srv/validated.toml", 'models = ["emt"]\n')
    for arguments in ((), ("/srv/validated.toml",), ("--instance", "cpu")):
        done = machine.rootstockd("config", "check", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    machine.do("systemctl", "stop", SOCKET, SERVICE)
    machine.do(PYTHON, "-c", "import socket; socket.socket(socket.AF_UNIX).bind('/srv/theirs.sock')")
    for path in (address, control):
        for make in (["ln", "-s", "/srv/theirs.sock"], ["cp", "/srv/validated.toml"]):
            machine.do(*make, path)
            done = machine.rootstockd("config", "check")
            machine.do("rm", path)
            assert (done.returncode, f"socket: {path} is not a socket" in done.stderr) == (1, True), done.stderr
    machine.do("touch", "/run/rootstockd/cpu.sock")
    done = machine.rootstockd("config", "check", "--instance", "cpu")
    machine.do("rm", "/run/rootstockd/cpu.sock")
    assert (done.returncode, "/run/rootstockd/cpu.sock is not a socket" in done.stderr) == (1, True), done.stderr
    machine.do("systemctl", "start", SOCKET)


def test_our_commands_leave_it_to_systemd(machine: Machine) -> None:
    machine.do("systemctl", "start", SERVICE)
    pid = main_pid(machine)
    done = machine.rootstockd("start", "--device", "cpu")
    assert done.returncode != 0
    assert f"starts {SERVICE}" in done.stderr
    for command in ("stop", "restart"):
        done = machine.rootstockd(command, user="in-alice")
        assert done.returncode != 0
        assert "is root's to start and to stop" in done.stderr and "journalctl" not in done.stderr
    done = machine.rootstockd("logs", user="in-alice")
    assert done.returncode != 0
    assert "for root and members of the group systemd-journal to read" in done.stderr
    assert main_pid(machine) == pid
    done = machine.rootstockd("restart")
    assert done.returncode == 0, done.stderr
    assert main_pid(machine) not in {pid, "0"}
    assert "ready on" in machine.rootstockd("logs", "-n", "20").stdout
    with md(machine, "in-alice", "/run/rootstockd/cpu.sock"):
        done = machine.rootstockd("stop", "--force")
        assert done.returncode == 0, done.stderr
        assert f"systemctl start {SOCKET}" in done.stdout
        assert done.stderr.startswith("1 session had it, of in-alice (pid "), done.stderr
        assert [main_pid(machine), machine.property(SOCKET, "ActiveState")] == ["0", "inactive"]
        machine.do("systemctl", "start", SOCKET)
    machine.do("systemctl", "stop", SERVICE)
    done = machine.rootstockd("stop")  # and does not start it to ask it
    assert done.returncode == 0 and not done.stderr, done.stderr
    machine.do("systemctl", "start", SOCKET)


@pytest.fixture
def mended(machine: Machine) -> Iterator[None]:
    """Whatever a test has done to the service, it runs at the end."""
    yield
    machine.do("chown", "root:root", SETTINGS)
    machine.do("chmod", "644", SETTINGS)
    machine.write(SETTINGS, 'models = ["emt"]\n')
    machine.do("systemctl", "restart", SERVICE)


def wait_for_restarts(machine: Machine) -> None:
    """Until systemd has started it anew a few more times."""
    before = int(machine.property(SERVICE, "NRestarts"))
    wait_for(lambda: int(machine.property(SERVICE, "NRestarts")) >= before + 3, timeout=60)


def test_one_that_fails_again_and_again(machine: Machine, mended: None) -> None:
    machine.write(SETTINGS, 'models = ["chgnet"]\n')
    machine.run("systemctl", "restart", "--no-block", SERVICE)
    wait_for_restarts(machine)
    again = f"systemd starts {SERVICE} again and again"
    wait_for(lambda: machine.rootstockd("status").returncode, timeout=60)  # it was up a moment ago
    done = machine.rootstockd("status")
    assert (done.returncode, again in done.stderr, "chgnet" in done.stderr) == (1, True, True), done.stderr
    done = machine.rootstockd("status", user="in-alice")  # who may not read the journal
    assert f"see `journalctl --unit {SERVICE}`" in done.stderr
    done = machine.rootstockd("doctor", "--timeout", "30")
    assert (done.returncode, f"problem  daemon          {again}" in done.stdout) == (1, True), done.stdout
    assert "problem  settings        models: " in done.stdout
    assert "> rootstockd config check --instance cpu\n" in done.stdout

    machine.write(SETTINGS, 'metrics = "127.0.0.1:9746"\n')
    wait_for_restarts(machine)
    done = machine.rootstockd("status")
    assert (done.returncode, "for metrics: Address family not supported" in done.stderr) == (1, True), done.stderr

    drop_in = "/etc/systemd/system/rootstockd@.service.d/not-run.conf"
    machine.write(drop_in, "[Service]\nExecStart=\nExecStart=/etc/hostname\n")
    machine.do("systemctl", "daemon-reload")
    wait_for_restarts(machine)
    done = machine.rootstockd("status")
    machine.do("rm", drop_in)
    machine.do("systemctl", "daemon-reload")
    assert (done.returncode, "Failed at step EXEC spawning /etc/hostname: " in done.stderr) == (1, True), done.stderr


def test_what_its_user_may_not(machine: Machine, mended: None) -> None:
    """Though root may, who asks."""
    machine.do("systemctl", "start", SERVICE)
    machine.do("chmod", "600", SETTINGS)
    words = f"rootstockd may not read it: chgrp rootstockd {SETTINGS}; chmod 640 {SETTINGS}"
    for arguments in ((), ("--instance", "cpu")):
        done = machine.rootstockd("config", "check", *arguments)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    assert machine.rootstockd("config", "check", SETTINGS).returncode == 0  # to be put somewhere else
    assert words in machine.rootstockd("reload").stderr
    assert words in machine.rootstockd("doctor").stdout
    in_tmp = ("env", "--unset=XDG_RUNTIME_DIR", PYTHON, "-m", "rootstockd")
    done = machine.run(*in_tmp, "config", "check", user="in-alice")
    assert done.returncode == 0, done.stderr
    assert f"in-alice may not read {SETTINGS}" in done.stdout and "nothing is wrong with" not in done.stdout
    machine.do("chgrp", "rootstockd", SETTINGS)
    machine.do("chmod", "640", SETTINGS)
    assert machine.rootstockd("config", "check").returncode == 0
    machine.do("systemctl", "reload", SERVICE)

    machine.write(SETTINGS, 'metrics = "127.0.0.1:9746"\n')
    done = machine.rootstockd("config", "check")
    assert (done.returncode, f"{SERVICE} may open no port" in done.stderr) == (1, True), done.stderr
    drop_in = f"/etc/systemd/system/{SERVICE}.d"
    machine.write(f"{drop_in}/metrics.conf", "[Service]\nRestrictAddressFamilies=AF_INET\nIPAddressAllow=localhost\n")
    machine.do("systemctl", "daemon-reload")
    assert machine.rootstockd("config", "check").returncode == 0
    machine.do("systemctl", "restart", SERVICE)
    assert status_of(machine, "/run/rootstockd/cpu.sock")["metrics"] == "http://127.0.0.1:9746/metrics"
    machine.do("rm", "-r", drop_in)
    machine.do("systemctl", "daemon-reload")


def test_doctor_names_the_services_places(machine: Machine) -> None:
    machine.do("systemctl", "start", SERVICE)
    said = machine.rootstockd("doctor", "--timeout", "30").stdout
    assert f"in the journal: journalctl --unit {SERVICE}" in said and "/var/cache/rootstockd," in said
    assert not any(words in said for words in ("/root/.cache", "/var/log/rootstockd", "somebody else's"))


def test_install_says_what_its_user_may_not_enter(machine: Machine) -> None:
    prefix = "/opt/rootstockd"
    machine.do(PYTHON, "-m", "venv", "--without-pip", prefix)
    packages = machine.do(
        f"{prefix}/bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).strip()
    ours = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n{REPOSITORY}\n"
    machine.write(f"{packages}/ours.pth", ours)
    machine.do("chmod", "700", prefix)
    done = machine.run(f"{prefix}/bin/python", "-m", "rootstockd", "systemd", "install")
    machine.do("rm", "-r", prefix)
    assert machine.rootstockd("systemd", "install").returncode == 0  # the units of before
    assert done.returncode == 1
    assert f"may not enter {prefix}, where this installation is: chmod 755 {prefix}" in done.stderr, done.stderr


def test_a_daemon_that_systemd_took_the_address_from(machine: Machine) -> None:
    address = "/run/rootstockd/rootstockd.sock"
    machine.do("systemctl", "stop", SOCKET, SERVICE)
    for answered, options in ((True, ()), (False, ()), (False, ("--force",))):
        done = machine.rootstockd("start", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        pid = str(status_of(machine, address)["pid"])
        machine.do("systemctl", "start", SOCKET)
        if answered:
            machine.do("systemctl", "start", SERVICE)  # until it is ready, however slow this machine is
            done = machine.rootstockd("doctor")
            assert f"pid {pid} is a daemon for {address}" in done.stdout and f"> kill {pid}\n" in done.stdout
        machine.do("systemctl", "stop", SOCKET, SERVICE)
        done = machine.rootstockd("doctor")
        assert f"pid {pid} is a daemon for {address}" in done.stdout and "> rootstockd stop\n" in done.stdout
        assert done.returncode == 1
        done = machine.rootstockd("stop", *options)
        assert (done.returncode, f"stopped (pid {pid}" in done.stdout) == (0, True), done.stderr
        assert machine.run("kill", "-0", pid).returncode
    assert machine.rootstockd("stop").returncode == 1
    machine.do("systemctl", "start", SOCKET)


def test_a_users_own(machine: Machine) -> None:
    user = "in-bob"
    machine.do("systemctl", "start", f"user@{USERS[user]}.service")
    done = machine.rootstockd("systemd", "install", "--user", "--gpu", "cpu", user=user)
    assert done.returncode == 0, done.stderr
    settings = (machine.root / "home" / user / ".config/rootstockd/config.toml").read_text()
    assert "`systemctl --user reload rootstockd@0`" in settings
    drop_in = f"[Service]\nEnvironment=OMP_NUM_THREADS=1 PYTHONPATH={REPOSITORY}\n"
    machine.write(f"/home/{user}/.config/systemd/user/rootstockd@.service.d/test.conf", drop_in)
    machine.do("systemctl", "--user", "daemon-reload", user=user)
    verify = ["systemd-analyze", "--user", "verify", f"/home/{user}/.config/systemd/user/{SERVICE}"]
    assert machine.run(*verify, user=user).stderr == ""
    machine.do("systemctl", "--user", "enable", "--now", SOCKET, user=user)
    energy(one(machine, user))
    pid = machine.do("systemctl", "--user", "show", SERVICE, "--property=MainPID", "--value", user=user).strip()
    assert machine.do("ps", "-o", "user=", "-p", pid).strip() == user
    done = machine.rootstockd("restart", user=user)
    assert done.returncode == 0, done.stderr
    status = json.loads(machine.rootstockd("status", "--json", user=user).stdout)
    assert str(status["pid"]) != pid
    done = machine.rootstockd("systemd", "uninstall", "--user", user=user)
    assert done.returncode == 0, done.stderr
    units = machine.root / "home" / user / ".config/systemd/user"
    assert {path.name for path in units.rglob("*rootstockd*")} == {"rootstockd@.service.d"}  # the test's
    assert machine.rootstockd(
        "status", "--socket", f"/run/user/{USERS[user]}/rootstockd/cpu.sock", user=user
    ).returncode


def test_all_of_the_installation_is_roots(machine: Machine) -> None:
    """The code as well as the environment that has it. (The Python is the test's own, and stays as it is.)"""
    code, environment = "/srv/checkout", "/srv/environment"
    machine.do("mkdir", code)
    machine.do("cp", "-r", *(REPOSITORY / name for name in ("rootstockd", "rootstock_client", "systemd")), code)
    machine.do(PYTHON, "-m", "venv", "--without-pip", environment)
    path = f"PYTHONPATH={code}:{sysconfig.get_path('purelib')}"
    install = ("env", path, f"{environment}/bin/python", "-m", "rootstockd", "systemd", "install", "--dry-run")
    machine.do(*install)
    for part in (environment, code):
        machine.do("chown", "in-alice", part)
        done = machine.run(*install)
        machine.do("chown", "root", part)
        assert done.returncode == 1, f"{part}: {done.stdout}"
        assert f"{part} belongs to uid {USERS['in-alice']}" in done.stderr


def test_clients_are_led_to_one_instance(machine: Machine) -> None:
    """Whichever was the first that `install` was told last; without being told it leaves that as it is."""
    link = "/run/rootstockd/rootstockd.sock"

    def installed(*options: str) -> list[str]:
        done = machine.rootstockd("systemd", "install", *options)
        assert done.returncode == 0, done.stderr
        return [unit for unit in (SOCKET, OTHER_SOCKET) if link in machine.property(unit, "Symlinks")]

    machine.do("systemctl", "start", SOCKET)
    shown = machine.rootstockd("systemd", "install", "--gpu", "auto", "--dry-run").stdout
    assert f"rm /etc/systemd/system/{SOCKET}.d/rootstockd-default.conf\n" in shown
    assert installed() == [SOCKET]
    assert installed("--gpu", "auto") == [OTHER_SOCKET]
    assert installed() == [OTHER_SOCKET]
    machine.do("systemctl", "start", OTHER_SOCKET)
    machine.do("systemctl", "restart", SOCKET)
    assert machine.do("readlink", link) == "/run/rootstockd/auto.sock\n"
    machine.do("systemctl", "stop", OTHER_SOCKET)
    assert installed("--gpu", "cpu", "--gpu", "auto") == [SOCKET]
    machine.do("systemctl", "restart", SOCKET)
    assert machine.do("readlink", link) == "/run/rootstockd/cpu.sock\n"
    assert not (machine.root / f"etc/systemd/system/{OTHER_SOCKET}.d").exists()


def test_uninstall(machine: Machine) -> None:
    done = machine.rootstockd("systemd", "uninstall", "--dry-run")
    assert SOCKET in done.stdout.splitlines()[0] and "rm /etc/systemd/system/rootstockd@.service\n" in done.stdout
    done = machine.rootstockd("systemd", "uninstall")
    assert done.returncode == 0, done.stderr
    assert "\n  rm -r /var/cache/rootstockd\n  userdel rootstockd\n" in done.stdout
    assert machine.run("ls", "/etc/sysusers.d", "/run/rootstockd").stdout == ""
    again = machine.rootstockd("systemd", "uninstall")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("nothing is installed in /etc/systemd/system\n") and "userdel" in again.stdout
    units = machine.root / "etc/systemd/system"
    assert {path.name for path in units.rglob("*rootstockd*")} == {"rootstockd@.service.d", f"{OTHER}.d"}  # the test's
    assert (machine.root / SETTINGS.lstrip("/")).exists()
