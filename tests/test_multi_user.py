"""Several Unix users and one daemon: real users, made up for these tests, who can't be told apart but by the kernel."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk

from conftest import ALL_OF_RICH, RunningDaemon, wait_for
from rootstock_client import ipi
from rootstock_client.runtime_dir import control_socket
from rootstockd.control.limits import MAX_CONNECTIONS, PACE
from rootstockd.control.schema import LONG
from rootstockd.host.log_rate import MOST
from rootstockd.sessions.directory import FRESH, PATIENCE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")

USERS = ("rsd-alice", "rsd-bob", "rsd-carol")
GROUP = "rsd-chem"
"""Alice's and Bob's second group."""

ASKS = """
import json, os, pwd, sys
import encodings.idna, http.client
from rootstock_client import RootstockClient
from rootstock_client.errors import RootstockError
name, *arguments = sys.argv[1:]
"""
COMPUTES = """
from ase.build import bulk
import rootstock_client.calculator
"""
COMMANDS = f"""
from rootstockd.cli import main
main.commands[arguments[0]]
{ALL_OF_RICH}
"""
"""What is imported before: the user need not be able to read it."""
BECOME = """
user = pwd.getpwnam(name)
os.initgroups(name, user.pw_gid)
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
"""
JOB = f"""{ASKS}{COMPUTES}{BECOME}
socket, sessions, repeat = arguments[0], int(arguments[1]), int(arguments[2])
answers, kept = [], []
for number in range(sessions):
    atoms = bulk("Cu", cubic=True) * (repeat, repeat, repeat)
    atoms.calc = RootstockClient(socket).calculator("emt")
    kept.append(atoms)
    try:
        answers.append(atoms.get_potential_energy())
    except RootstockError as error:
        answers.append(error.code)
print(json.dumps(answers), flush=True)
sys.stdin.read()
"""
SLOW = """
import time
from ase.calculators.emt import EMT

class Slow(EMT):
    def calculate(self, *arguments, **more):
        time.sleep(0.02)
        super().calculate(*arguments, **more)
"""
STEPS = f"""{ASKS}{COMPUTES}import threading{BECOME}
def ask():
    atoms = bulk("Cu", cubic=True)
    atoms.calc = RootstockClient(arguments[0]).calculator("slow")
    while True:
        atoms.get_potential_energy()
        atoms.calc.reset()

for _ in range(4):
    threading.Thread(target=ask, daemon=True).start()
sys.stdin.read()
"""
"""Evaluates without end in four sessions."""
COMMAND = f"{ASKS}{COMMANDS}{BECOME}main(arguments)"
MODELS = f"""{ASKS}{BECOME}
try:
    print(json.dumps([model["name"] for model in RootstockClient(arguments[0]).models()]))
except RootstockError as error:
    print(json.dumps(error.code))
"""


LOADING = f"""{ASKS}{BECOME}
from pathlib import Path
from rootstock_client.control import request
print(request(Path(arguments[0]), "GET", "/v1/loading?model=emt")[0]["text"])
"""
SMALL = """
from ase.calculators.emt import EMT

class Small(EMT):
    def calculate(self, atoms, *arguments, **more):
        if len(atoms) > 8:
            raise MemoryError("Unable to allocate 1 GiB")
        super().calculate(atoms, *arguments, **more)
"""
SIZES = f"""{ASKS}{COMPUTES}{BECOME}
answers = []
for repeat in map(int, arguments[1:]):
    atoms = bulk("Cu", cubic=True) * (repeat, 1, 1)
    atoms.calc = RootstockClient(arguments[0]).calculator("small")
    try:
        atoms.get_potential_energy()
        answers.append("")
    except RootstockError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def users() -> Iterator[dict[str, int]]:
    """Three users of this machine, and a group."""
    remove_users()  # those of a run that was killed
    try:
        subprocess.run(["groupadd", GROUP], check=True)
        for name in USERS:
            groups = ["--groups", GROUP] if name != "rsd-carol" else []
            subprocess.run(["useradd", "--no-create-home", "--user-group", *groups, name], check=True)
        yield {name: pwd.getpwnam(name).pw_uid for name in USERS}
    finally:
        remove_users()


def remove_users() -> None:
    for name in USERS:
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            subprocess.run(["userdel", "--force", name], check=True)
    with contextlib.suppress(KeyError):
        grp.getgrnam(GROUP)
        subprocess.run(["groupdel", GROUP], check=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users may look into."""
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def start(open_folder: Path, users: dict[str, int]) -> Iterator[Callable[[str], RunningDaemon]]:
    """A daemon with a configuration, in a folder that users reach."""
    with contextlib.ExitStack() as stack:

        def start(config: str) -> RunningDaemon:
            file = open_folder / "config.toml"
            file.write_text(config)
            daemon = RunningDaemon(open_folder / "run", ("--model", "emt", "--config", str(file)))
            daemon.log = open_folder / "log"
            stack.callback(daemon.stop)
            return daemon.start()

        yield start


def as_user(name: str, what: str, *arguments: str) -> subprocess.Popen[str]:
    """Do something as a user, with all that a login gives and nothing of root's."""
    return subprocess.Popen(
        [sys.executable, "-c", what, name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def job(name: str, daemon: RunningDaemon, sessions: int = 1, repeat: int = 1) -> Iterator[list[float | str]]:
    """A user's process with so many sessions; what each got: an energy, or an error's code. They stay open."""
    with as_user(name, JOB, str(daemon.socket), str(sessions), str(repeat)) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line)
        process.communicate()


def command_for(name: str, daemon: RunningDaemon, *command: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a user's `rootstockd COMMAND`."""
    with as_user(name, COMMAND, *command, "--socket", str(daemon.socket)) as process:
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


def status_for(name: str, daemon: RunningDaemon) -> dict[str, Any]:
    """What `rootstockd status` says to a user."""
    _, out, err = command_for(name, daemon, "status", "--json")
    assert out, err
    return json.loads(out)


ASKING = f"""{ASKS}{BECOME}
import select, socket, time
from rootstock_client.runtime_dir import control_socket
kept = [socket.socket(socket.AF_UNIX) for _ in range(10)]
for sock in kept:
    sock.connect(str(control_socket(__import__("pathlib").Path(arguments[0]))))
    sock.settimeout(30)
left, refused = kept, 0
while refused < 6 and (told := select.select(left, [], [], 30)[0]):
    refused += sum(b"503" in sock.recv(4096) for sock in told)
    left = [sock for sock in left if sock not in told]
for sock in left:
    sock.sendall(b"GET /v1/models HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
print(sum(b"200 OK" in sock.recv(4096) for sock in left), flush=True)
sys.stdin.read()
for sock in kept:
    sock.close()
start = time.monotonic()
for _ in range(50):
    RootstockClient(arguments[0]).models()
print(time.monotonic() - start)
"""


GOES_ON_ASKING = f"""{ASKS}{BECOME}
import socket
from pathlib import Path
from rootstock_client.runtime_dir import control_socket
connection = http.client.HTTPConnection("x")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(str(control_socket(Path(arguments[0]))))
connection.auto_open = False
for path in sys.stdin:
    connection.request("GET", path.strip())
    answer = connection.getresponse()
    print(json.dumps([answer.status, answer.read().decode(), answer.will_close]), flush=True)
"""
"""Requests of one connection, as they are told."""


def models_for(name: str, daemon: RunningDaemon) -> list[str] | str:
    """The models that a user is told of, or an error's code."""
    with as_user(name, MODELS, str(daemon.socket)) as process:
        out, err = process.communicate(timeout=60)
        assert out, err
        return json.loads(out)


def test_without_lists_a_daemon_is_its_owners_alone(start):
    daemon = start("")
    with job("rsd-alice", daemon) as answers:
        assert answers == ["access-denied"]
    assert daemon.socket.stat().st_mode & 0o777 == 0o600


def test_users_and_groups_may_use_it_and_others_may_not(start):
    daemon = start(f'[access]\nusers = ["rsd-carol"]\ngroups = ["{GROUP}"]\n')
    for name in USERS:
        with job(name, daemon) as (answer,):
            assert isinstance(answer, float), f"{name}: {answer}"
    assert daemon.run("stop").returncode == 0
    (daemon.folder.parent / "config.toml").write_text('[access]\nusers = ["rsd-carol", "nobody-of-that-name"]\n')
    daemon.start()
    with job("rsd-carol", daemon) as (answer,):
        assert isinstance(answer, float)
    with job("rsd-alice", daemon) as answers:
        assert answers == ["access-denied"]
    warning = "access.users: there is no user 'nobody-of-that-name' on this machine"
    assert warning in daemon.log.read_text()
    assert warning in str(daemon.client().status()["warnings"])
    assert status_for("rsd-carol", daemon)["warnings"] == [], "what is wrong with a configuration is an administrator's"
    (daemon.folder.parent / "config.toml").write_text('[access]\nadmins = ["rsd-bob"]\ngroups = ["no-such-group"]\n')
    assert "access.groups: there is no group 'no-such-group' on this machine" in daemon.run("reload").stdout
    assert "no-such-group" in str(status_for("rsd-bob", daemon)["warnings"])
    assert daemon.run("stop").returncode == 0
    (daemon.folder.parent / "config.toml").write_text('[access]\nusers = ["rsd-carol", "nobody-of-that-name"]\n')
    assert warning in daemon.run("start", "--device", "cpu", "--log-file", daemon.log, *daemon.options).stdout


@contextlib.contextmanager
def another(name: str, *options: str) -> Iterator[int]:
    """A user who comes now, and goes again; their uid."""
    with contextlib.suppress(KeyError):  # of a run that was killed
        pwd.getpwnam(name)
        subprocess.run(["userdel", "--force", name], check=True)
    subprocess.run(["useradd", "--no-create-home", "--no-user-group", *options, name], check=True)
    try:
        yield pwd.getpwnam(name).pw_uid
    finally:
        subprocess.run(["userdel", "--force", name], check=True)


def answers_of(name: str, daemon: RunningDaemon, sessions: int = 1) -> list[float | str]:
    """What a user's sessions get, which then end."""
    with job(name, daemon, sessions) as answers:
        return answers


def test_lists_are_of_whoever_has_the_names_now(start):
    """Users who come after the daemon, and another who gets the uid of one who has gone."""
    daemon = start(
        '[access]\nusers = ["rsd-dave", "rsd-erin"]\nadmins = ["rsd-dave"]\n[users.rsd-erin]\nsessions = 1\n'
    )
    with another("rsd-dave") as uid:
        assert isinstance(answers_of("rsd-dave", daemon)[0], float)
        assert command_for("rsd-dave", daemon, "load", "lj")[0] == 0
    with another("rsd-frank", "--uid", str(uid)):
        wait_for(lambda: answers_of("rsd-frank", daemon) == ["access-denied"], timeout=FRESH + 10)
        status, _, words = command_for("rsd-frank", daemon, "unload", "lj")
        assert status == 1 and "rsd-frank may not use this daemon" in words, words
    with another("rsd-erin", "--uid", str(uid)):  # who has limits of her own
        wait_for(lambda: answers_of("rsd-erin", daemon, 2)[1] == "user-limit", timeout=FRESH + 10)
    assert daemon.model("lj")["state"] == "ready"


def test_groups_are_what_they_are_now(start):
    daemon = start('[access]\ngroups = ["rsd-late"]\n')
    assert answers_of("rsd-carol", daemon) == ["access-denied"]
    subprocess.run(["groupadd", "--users", "rsd-carol", "rsd-late"], check=True)
    try:
        wait_for(lambda: isinstance(answers_of("rsd-carol", daemon)[0], float), timeout=FRESH + 10)
    finally:
        subprocess.run(["groupdel", "rsd-late"], check=True)


HANGING = """
import os, pwd, time

def hanging(look_up):
    def call(what):
        while os.path.exists("{file}"):
            time.sleep(0.05)
        return look_up(what)
    return call

pwd.getpwuid, pwd.getpwnam = hanging(pwd.getpwuid), hanging(pwd.getpwnam)
"""
"""A directory of users that does not answer while there is a file."""


def test_a_directory_of_users_that_hangs_is_waited_for_a_moment_and_by_no_other(start, open_folder, monkeypatch):
    """Whoever is known is let in, whoever is not is told why; steps, requests, reload and stop go on."""
    (open_folder / "sitecustomize.py").write_text(HANGING.format(file=open_folder / "hang"))
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(open_folder), prepend=os.pathsep)
        daemon = start('[access]\nusers = ["rsd-alice", "rsd-bob"]\n')
    atoms = bulk("Cu", cubic=True)
    atoms.calc = daemon.client().calculator("emt")
    atoms.get_potential_energy()
    assert isinstance(answers_of("rsd-bob", daemon)[0], float)
    time.sleep(FRESH)
    (open_folder / "hang").touch()
    with as_user("rsd-bob", JOB, str(daemon.socket), "1", "1") as process:
        slowest, deadline = 0.0, time.monotonic() + 60
        while not select.select([process.stdout], [], [], 0)[0] and time.monotonic() < deadline:
            before = time.perf_counter()
            atoms.rattle(0.001)
            atoms.get_potential_energy()
            slowest = max(slowest, time.perf_counter() - before)
        assert isinstance(json.loads(process.stdout.readline())[0], float)
        process.communicate()
    assert slowest < PATIENCE / 2, slowest
    assert isinstance(answers_of("rsd-bob", daemon)[0], float)
    assert daemon.log.read_text().count("no answer within 2 s") == 1  # who is asked for already is not waited for again
    status, _, words = command_for("rsd-carol", daemon, "status")
    assert status == 1 and "can't find out who uid" in words, words
    done = daemon.run("reload")
    assert "users and groups can't be looked up" in done.stdout, done.stdout + done.stderr
    assert isinstance(answers_of("rsd-alice", daemon)[0], float)
    assert "no answer within 2 s of this machine's directory of users" in daemon.log.read_text()
    atoms.calc.close()
    assert daemon.run("stop").returncode == 0


WHOSE = f"""{ASKS}from rootstockd.cli.fetching import daemon_of_another{BECOME}
print(daemon_of_another())
"""


def test_who_registers_a_model_is_told_that_a_daemon_of_another_does_not_read_it(start, monkeypatch):
    daemon = start('[access]\nusers = ["rsd-alice"]\n')
    monkeypatch.setenv("ROOTSTOCKD_SOCKET", str(daemon.socket))
    for name, whose in (("rsd-alice", str(daemon.socket)), ("root", "None")):
        with as_user(name, WHOSE) as process:
            assert process.communicate(timeout=60)[0].strip() == whose


def test_whoever_may_use_it_may_see_its_models_and_themselves(start):
    daemon = start('[access]\nusers = ["rsd-alice"]\nadmins = ["rsd-bob"]\n')
    assert daemon.socket.with_suffix(".control").stat().st_mode & 0o777 == 0o666
    with job("rsd-alice", daemon) as (answer,):
        assert isinstance(answer, float)
        assert "emt" in models_for("rsd-alice", daemon)
        mine = status_for("rsd-alice", daemon)
        assert [session["user"] for session in mine["sessions"]] == ["rsd-alice"] and mine["config"] is None
        assert status_for("rsd-bob", daemon)["sessions"] == mine["sessions"]
        seen = {name: command_for(name, daemon, "metrics", "show")[1] for name in ("rsd-alice", "rsd-bob")}
        assert 'rootstockd_sessions{state="idle"} 1.0' in seen["rsd-alice"] and "rsd-" not in seen["rsd-alice"]
        assert 'rootstockd_user_sessions{user="rsd-alice"} 1.0' in seen["rsd-bob"]
    assert models_for("rsd-carol", daemon) == "access-denied"
    status, _, words = command_for("rsd-carol", daemon, "status")
    assert status == 1 and "rsd-carol may not use this daemon" in words
    status, _, words = command_for("rsd-alice", daemon, "stop")
    assert status == 1 and "rsd-alice does not administer this daemon" in words
    assert command_for("rsd-bob", daemon, "reload")[0] == 0
    assert re.search(r"asked to reload by rsd-bob \(pid \d+\)$", daemon.log.read_text(), re.MULTILINE)
    assert re.search(r"rsd-alice \(pid \d+\) may not ask to stop", daemon.log.read_text())


def told_while_it_waits(name: str, daemon: RunningDaemon) -> str:
    """What a user's job is told that waits for EMT."""
    with as_user(name, LOADING, str(daemon.socket)) as process:
        out, err = process.communicate(timeout=60)
        assert out, err
        return out.strip()


def test_how_large_others_structures_are_is_told_to_administrators_alone(start):
    daemon = start(f'[access]\ngroups = ["{GROUP}"]\nusers = ["rsd-carol"]\nadmins = ["rsd-carol"]\n')
    os.kill(worker := daemon.model("emt")["pid"], signal.SIGSTOP)
    try:
        with as_user("rsd-alice", JOB, str(daemon.socket), "1", "1") as process:
            wait_for(lambda: daemon.model("emt")["batch_seconds"] > LONG)
            for name, atoms in (("rsd-alice", 4), ("rsd-bob", 0), ("rsd-carol", 4)):
                (model,) = status_for(name, daemon)["models"]
                assert model["batch_under_way"] == atoms and model["batch_seconds"] > LONG, name
                what = "a batch of 4 atoms" if atoms else "a batch with others' structures"
                assert f"emt has been at {what} for " in command_for(name, daemon, "status")[1]
                assert told_while_it_waits(name, daemon).startswith(f"has been at {what} for "), name
            os.kill(worker, signal.SIGCONT)
            process.communicate(timeout=60)
    finally:
        os.kill(worker, signal.SIGCONT)


def test_whose_structure_is_too_large_is_told_of_their_own_alone(start, open_folder, monkeypatch):
    (open_folder / "small.py").write_text(SMALL)
    (open_folder / "models.toml").write_text('[small]\nfamily = "ase"\narguments = { calculator = "small:Small" }\n')
    monkeypatch.setenv("PYTHONPATH", str(open_folder), prepend=os.pathsep)
    daemon = start(f'catalogues = ["models.toml"]\n[access]\ngroups = ["{GROUP}"]\n')
    for name, sizes, largest in (("rsd-alice", "123", "8"), ("rsd-bob", "3", None), ("rsd-bob", "13", "4")):
        with as_user(name, SIZES, str(daemon.socket), *sizes) as process:
            out, err = process.communicate(timeout=60)
        assert out, err
        *good, bad = json.loads(out)
        assert not any(good) and "do not fit" in bad
        found = re.search(r"The largest of yours that this model has evaluated had (\d+) atoms", bad)
        assert (found[1] if found else None) == largest
        assert ("largest" in bad) == (largest is not None)


def test_who_asks_without_end_waits_and_keeps_nobody_out(start):
    daemon = start('[access]\nusers = ["rsd-alice"]\n')
    with as_user("rsd-alice", ASKING, str(daemon.socket)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4\n"  # so many of its connections are taken
        assert daemon.run("status").returncode == 0
        out, err = process.communicate()
        assert float(out) > 49 * PACE, err


FLOODING = f"""{ASKS}
import socket, threading, time
from rootstock_client import ipi
{BECOME}
init = ipi.init_frame(json.dumps({{"rootstock": 1, "model": "emt", "numbers": [29], "pbc": [False] * 3}}).encode())
answers = [0] * 100

def send(sock):
    while True:
        sock.sendall((init + ipi.STATUS) * 100)

def read(number, sock):
    while said := sock.recv(1200):
        answers[number] += said.count(ipi.READY)

for number in range(100):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(arguments[0])
    threading.Thread(target=send, args=[sock], daemon=True).start()
    threading.Thread(target=read, args=[number, sock], daemon=True).start()
time.sleep(1)
print(flush=True)
sys.stdin.read()
print(sum(answers), flush=True)
os._exit(0)
"""


def test_a_flood_of_one_user_leaves_others_their_steps_and_inits(start):
    """And none of its INITs is refused."""
    daemon = start('[access]\nusers = ["rsd-alice", "rsd-bob"]\n')
    atoms = bulk("Cu", cubic=True)
    atoms.calc = daemon.client().calculator("emt")
    energy = atoms.get_potential_energy()
    with as_user("rsd-alice", FLOODING, str(daemon.socket)) as flood:
        assert flood.stdout is not None and flood.stdout.readline()
        steps, until = 0, time.monotonic() + 3
        while time.monotonic() < until:
            atoms.calc.results.clear()
            assert atoms.get_potential_energy() == energy
            steps += 1
        with job("rsd-bob", daemon, sessions=20) as energies:
            assert energies == pytest.approx([energy] * 20)
        out, err = flood.communicate(timeout=30)
    assert int(out) > 10, err
    assert steps > 100


@contextlib.contextmanager
def connecting_as(uid: int) -> Iterator[None]:
    """Connections that are opened meanwhile are this user's, as the kernel tells it."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def test_half_of_the_control_connections_are_for_administrators(start, users):
    """However many other users there are: three that have all that one may have would have three quarters."""
    daemon = start(f"[access]\nusers = {json.dumps(list(users))}\n")
    with contextlib.ExitStack() as stack:
        opened = []
        for uid in users.values():
            for _ in range(MAX_CONNECTIONS // 4):
                opened.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                opened[-1].settimeout(60)
                with connecting_as(uid):
                    opened[-1].connect(str(control_socket(daemon.socket)))
        for sock in opened:
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = [sock.recv(12) for sock in opened]
        taken = MAX_CONNECTIONS // 2
        assert answers == [b"HTTP/1.1 200"] * taken + [b"HTTP/1.1 503"] * (len(opened) - taken)
        for _ in range(taken):
            opened.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            opened[-1].connect(str(control_socket(daemon.socket)))
            opened[-1].sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
            assert opened[-1].recv(12) == b"HTTP/1.1 200"


def test_many_who_are_refused_leave_a_line_now_and_then(start):
    daemon = start('[access]\nusers = ["rsd-alice"]\n')
    with job("rsd-carol", daemon, 100) as answers:
        assert answers == ["access-denied"] * 100
    log = daemon.log.read_text()
    assert log.count("rsd-carol may not use this daemon") == MOST
    for user, level in (
        ("rsd-carol", "problem"),
        ("rsd-alice", "ok"),
    ):  # what is wrong, and nothing that they can't mend
        _, out, _ = command_for(user, daemon, "doctor", "--json", "--timeout", "60")
        found = json.loads(out)["findings"]
        (theirs,) = (finding for finding in found if finding["subject"] == "daemon")
        assert theirs["level"] == level
        assert level == "ok" or theirs["why"] == "Jobs of this user are refused at once."
        assert not any("rootstockd env create" in finding["mend"] for finding in found)
    with job("rsd-alice", daemon) as (answer,):
        assert isinstance(answer, float)


def test_a_group_of_the_socket_keeps_others_out_and_lets_its_members_ask(start):
    daemon = start(f'[access]\nsocket_group = "{GROUP}"\nadmins = ["rsd-bob"]\n')
    for path in (daemon.socket, daemon.socket.with_suffix(".control")):
        assert path.stat().st_mode & 0o777 == 0o660
        assert path.stat().st_gid == grp.getgrnam(GROUP).gr_gid
    with job("rsd-carol", daemon) as answers:
        assert answers == ["access-denied"]
    with job("rsd-alice", daemon), job("rsd-bob", daemon):
        mine = status_for("rsd-alice", daemon)
        assert [session["user"] for session in mine["sessions"]] == ["rsd-alice"]
        assert (mine["other_sessions"], mine["config"]) == (1, None)
        everything = status_for("rsd-bob", daemon)
        assert {session["user"] for session in everything["sessions"]} == {"rsd-alice", "rsd-bob"}
        assert everything["other_sessions"] == 0 and everything["config"]
        status, _, words = command_for("rsd-carol", daemon, "status")
        assert status == 1 and "is not open to you" in words, words
        for name in ("rsd-alice", "rsd-bob"):
            status, _, words = command_for(name, daemon, "logs")
            assert status == 1 and "for its own user to read" in words.replace("the daemon's", "its"), words


def test_only_administrators_stop_reload_load_and_unload(start):
    daemon = start(f'[access]\nsocket_group = "{GROUP}"\nadmins = ["rsd-bob"]\n')
    for command in (["stop"], ["reload"], ["restart"], ["load", "lj"], ["unload", "emt"]):
        status, _, words = command_for("rsd-alice", daemon, *command)
        assert status == 1 and "rsd-alice does not administer this daemon" in words, words
    assert [(model["name"], model["state"]) for model in daemon.client().status()["models"]] == [("emt", "ready")]
    for command in (["load", "lj"], ["unload", "lj"]):
        assert command_for("rsd-bob", daemon, *command)[0] == 0
    assert command_for("rsd-bob", daemon, "reload")[0] == 0
    status, _, words = command_for("rsd-bob", daemon, "restart")
    assert status == 1 and "the daemon runs as root" in words, words
    with job("rsd-alice", daemon) as (answer,):
        assert isinstance(answer, float)
        status, said, words = command_for("rsd-bob", daemon, "stop")
    assert (status, said) == (0, "stopped\n"), words
    assert re.match(r"1 session had it, of rsd-alice \(pid \d+\); jobs wait for the next daemon", words), words


def test_limits_are_a_users_own(start):
    limits = "[limits]\nsessions = 3\natoms = 100\n[users.rsd-bob]\nsessions = 5\n[users.rsd-carol]\natoms = 8\n"
    daemon = start(f'[access]\nusers = ["rsd-carol"]\ngroups = ["{GROUP}"]\n{limits}')
    with job("rsd-alice", daemon, 5) as answers:
        assert [isinstance(answer, float) for answer in answers] == [True] * 3 + [False] * 2
        assert answers[3:] == ["user-limit"] * 2
        for name, sessions in (("rsd-bob", 5), ("rsd-carol", 2)):  # 4 atoms each
            with job(name, daemon, sessions + 1) as theirs:
                assert [isinstance(answer, float) for answer in theirs[:-1]] == [True] * sessions, name
                assert theirs[-1] == "user-limit", name
    with job("rsd-alice", daemon, 2, 3) as answers:  # 108 atoms
        assert answers == ["limit"] * 2
    with job("rsd-alice", daemon, 3) as answers:  # what ended was counted out
        assert all(isinstance(answer, float) for answer in answers)


def test_shares_are_shown_to_administrators_where_they_differ(start):
    daemon = start(f'[access]\ngroups = ["{GROUP}"]\n[users.rsd-bob]\nshare = 2.5\n')
    with job("rsd-bob", daemon):
        assert "shares" not in daemon.run("status").stdout
        with job("rsd-alice", daemon):
            assert "several want it: rsd-alice 1, rsd-bob 2.5\n" in daemon.run("status").stdout
            assert "shares" not in command_for("rsd-bob", daemon, "status")[1]
            (daemon.folder.parent / "config.toml").write_text(f'[access]\ngroups = ["{GROUP}"]\n')
            assert daemon.run("reload").returncode == 0
            assert "shares" not in daemon.run("status").stdout


def evaluations(daemon: RunningDaemon) -> Counter[str]:
    """How many were done for each user's sessions that are there."""
    done: Counter[str] = Counter()
    for session in daemon.client().status()["sessions"]:
        done[session["user"]] += session["evaluations"]
    return done


def next_evaluations(daemon: RunningDaemon, count: int) -> Counter[str]:
    """For whom the next ones are done, at least so many."""
    before = evaluations(daemon)
    wait_for(lambda: (evaluations(daemon) - before).total() >= count, timeout=120)
    return evaluations(daemon) - before


def test_evaluations_go_by_shares_and_by_others_after_a_reload(start, open_folder, monkeypatch):
    """Two users of whom each has more to do than the worker can: what it does for them is as their shares are."""
    (open_folder / "slow.py").write_text(SLOW)
    (open_folder / "models.toml").write_text('[slow]\nfamily = "ase"\narguments = { calculator = "slow:Slow" }\n')
    monkeypatch.setenv("PYTHONPATH", str(open_folder), prepend=os.pathsep)
    rules = f'catalogues = ["models.toml"]\nbatch_atoms = 4\n[access]\ngroups = ["{GROUP}"]\n'

    def with_shares(alice: float, bob: float) -> str:
        return f"{rules}[users.rsd-alice]\nshare = {alice}\n[users.rsd-bob]\nshare = {bob}\n"

    def reload(alice: float, bob: float) -> None:
        (open_folder / "config.toml").write_text(with_shares(alice, bob))
        assert daemon.run("reload").returncode == 0

    daemon = start(with_shares(1, 3))
    with contextlib.ExitStack() as stack:
        for name in ("rsd-alice", "rsd-bob"):
            stack.enter_context(as_user(name, STEPS, str(daemon.socket)))
        wait_for(lambda: len(evaluations(daemon)) == 2 and min(evaluations(daemon).values()) > 4, timeout=60)
        done = next_evaluations(daemon, 80)
        assert 2 * done["rsd-alice"] < done["rsd-bob"] < 4.5 * done["rsd-alice"], done
        reload(1, 0.001)  # by which one evaluation counts as a thousand of Alice's
        next_evaluations(daemon, 20)
        reload(3, 1)  # and is not held against Bob any more
        done = next_evaluations(daemon, 80)
        assert 2 * done["rsd-bob"] < done["rsd-alice"] < 4.5 * done["rsd-bob"], done


def test_evaluations_that_are_held_are_their_users_alone(start, open_folder, monkeypatch):
    """Of four sessions of Alice's one at a time is at the worker, in turn; Bob's are all there."""
    (open_folder / "slow.py").write_text(SLOW)
    (open_folder / "models.toml").write_text('[slow]\nfamily = "ase"\narguments = { calculator = "slow:Slow" }\n')
    monkeypatch.setenv("PYTHONPATH", str(open_folder), prepend=os.pathsep)
    rules = f'catalogues = ["models.toml"]\nbatch_atoms = 4\n[access]\ngroups = ["{GROUP}"]\n'
    daemon = start(f"{rules}[users.rsd-alice]\nqueued = 1\n")

    def done(user: str) -> list[int]:
        return [each["evaluations"] for each in daemon.client().status()["sessions"] if each["user"] == user]

    with contextlib.ExitStack() as stack:
        for name in ("rsd-alice", "rsd-bob"):
            stack.enter_context(as_user(name, STEPS, str(daemon.socket)))
        wait_for(lambda: all(len(done(name)) == 4 and min(done(name)) > 8 for name in ("rsd-alice", "rsd-bob")), 60)
        alice = done("rsd-alice")
        assert max(alice) - min(alice) < 8, alice  # they did not all begin at once
        seen = [daemon.model("slow") for _ in range(50)]
        most = max(model["waiting"] + model["batch_under_way"] // 4 for model in seen)
        assert most in (4, 5), most


def test_new_rules_hold_for_what_comes_and_leave_what_is_there(start):
    daemon = start(f'[access]\ngroups = ["{GROUP}"]\n')
    file = daemon.folder.parent / "config.toml"
    with job("rsd-alice", daemon):
        file.write_text('[access]\nusers = ["rsd-carol"]\n')
        assert daemon.run("reload").returncode == 0
        status = json.loads(daemon.run("status", "--json").stdout)
        assert [session["user"] for session in status["sessions"]] == ["rsd-alice"]
        with job("rsd-alice", daemon) as answers:
            assert answers == ["access-denied"]
        with job("rsd-carol", daemon) as (answer,):
            assert isinstance(answer, float)


def test_new_rules_hold_for_requests_of_connections_that_are_there(start):
    daemon = start(f'[access]\nusers = ["rsd-carol"]\ngroups = ["{GROUP}"]\n')
    file = daemon.folder.parent / "config.toml"
    with contextlib.ExitStack() as stack:

        def go_on(name: str) -> Callable[[str], tuple[int, str, bool]]:
            process = stack.enter_context(as_user(name, GOES_ON_ASKING, str(daemon.socket)))

            def ask(path: str) -> tuple[int, str, bool]:
                process.stdin.write(f"{path}\n")
                process.stdin.flush()
                return tuple(json.loads(process.stdout.readline()))

            return ask

        alice, carol, root = map(go_on, ("rsd-alice", "rsd-carol", "root"))
        for ask in (alice, carol, root):
            assert ask("/v1/status")[0] == ask("/metrics")[0] == 200
        file.write_text(f'[access]\ngroups = ["{GROUP}"]\n')
        assert daemon.run("reload").returncode == 0
        status, said, closed = carol("/v1/status")
        assert (status, closed) == (403, True) and "rsd-carol may not use this daemon" in said, said
        assert alice("/v1/models")[0] == 200
        file.write_text('[access]\nusers = ["rsd-bob"]\n')
        assert daemon.run("reload").returncode == 0
        assert alice("/metrics")[0] == 403
        assert root("/v1/status")[0] == 200


def test_a_daemon_is_opened_and_closed_by_its_lists(start):
    """Sockets follow a reload: without lists a daemon is its owner's alone, as if it had been started so."""
    daemon = start('[access]\nusers = ["rsd-alice"]\n')
    file = daemon.folder.parent / "config.toml"
    for name in ("rsd-bob", "rsd-alice"):
        file.write_text("")
        assert daemon.run("reload").returncode == 0
        for sock in (daemon.socket, control_socket(daemon.socket)):
            assert stat.S_IMODE(sock.stat().st_mode) == 0o600
        status, _, words = command_for(name, daemon, "status")
        assert status == 1 and "is not open to you" in words, words
        file.write_text(f'[access]\nusers = ["{name}"]\n')
        assert daemon.run("reload").returncode == 0
        with job(name, daemon) as (answer,):
            assert isinstance(answer, float)


@contextlib.contextmanager
def out_of_reach(daemon: RunningDaemon) -> Iterator[None]:
    """A daemon's folder is elsewhere meanwhile, and a file is in its place."""
    away = daemon.folder.rename(daemon.folder.with_name("away"))
    daemon.folder.touch()
    try:
        yield
    finally:
        daemon.folder.unlink()
        away.rename(daemon.folder)


def test_rules_hold_though_the_sockets_can_not_be_reached(start):
    """Who is on no list any more is kept out, be the sockets as open as they were."""
    daemon = start('[access]\nusers = ["rsd-alice", "rsd-bob"]\n')
    file, pid = daemon.folder.parent / "config.toml", daemon.pid

    def hang_up(rules: str, times: int) -> None:
        file.write_text(rules)
        with out_of_reach(daemon):
            os.kill(pid, signal.SIGHUP)
            wait_for(lambda: daemon.log.read_text().count(": reloaded") == times)
        assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o666

    hang_up('[access]\nusers = ["rsd-alice"]\n', 1)
    for name, admitted in (("rsd-alice", True), ("rsd-bob", False)):
        with job(name, daemon) as (answer,):
            assert isinstance(answer, float) if admitted else answer == "access-denied"
    status = daemon.client().status()
    assert status["config"]["access"]["users"] == ["rsd-alice"]
    warning = f"who can open {daemon.socket} stays as it is: Not a directory; `rootstockd reload` tries again"
    assert warning in status["warnings"] and warning in daemon.log.read_text()
    hang_up("", 2)  # without any list it is its owner's alone
    with job("rsd-alice", daemon) as answers:
        assert answers == ["access-denied"]
    assert models_for("rsd-alice", daemon) == "access-denied"
    assert daemon.run("reload").stdout == "reloaded\n"
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    assert "Traceback" not in daemon.log.read_text()


def test_who_opens_a_daemon_whose_folder_is_closed_is_told(start):
    daemon = start("")
    (daemon.folder.parent / "config.toml").write_text('[access]\nusers = ["rsd-alice"]\n')
    done = daemon.run("reload")
    assert f"chmod go+x {daemon.folder}" in done.stdout + done.stderr


def test_a_driver_that_listens_is_attached_by_whoever_may_connect_and_counts_for_them(start, open_folder):
    daemon = start('[access]\nusers = ["rsd-alice", "rsd-bob"]\n\n[limits]\nsessions = 1\n')
    path = open_folder / "driver"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        status, _, said = command_for("rsd-bob", daemon, "attach", str(path), "--wait", "0")
        assert (status, said) == (1, f"Error: can't connect to {path}: Permission denied.\n")
        path.chmod(0o666)
        with as_user("rsd-alice", COMMAND, "attach", str(path), "--socket", str(daemon.socket)) as process:
            with listener.accept()[0] as driver:
                driver.settimeout(60)
                driver.sendall(ipi.STATUS)
                assert driver.recv(12) == ipi.NEEDINIT
                driver.sendall(ipi.init_frame(b"model : emt , species : Cu2 , pbc : F ,") + ipi.STATUS)
                assert driver.recv(12) == ipi.READY
                (session,) = daemon.client().status()["sessions"]
                assert (session["user"], session["natoms"]) == ("rsd-alice", 2)
                assert status_for("rsd-bob", daemon)["sessions"] == []
                with job("rsd-alice", daemon) as answers:
                    assert answers == ["user-limit"]
                driver.sendall(ipi.EXIT)
            said = f"attaching 2 atoms (Cu2, pbc FFF), emt, to {path}\nthe driver has ended\n"
            assert process.communicate(timeout=60) == (said, "")
