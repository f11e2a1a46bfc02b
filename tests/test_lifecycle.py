"""The daemon's life as its operator sees it: start, status, stop, restart, logs, and what is in the way of them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import psutil
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, daemons, open_descriptors, rootstockd, wait_for
from rootstock_client import RootstockClient, ipi, runtime_dir
from rootstock_client.errors import ConnectionLostError, DaemonNotFoundError, DrainingError, ModelChangedError
from rootstockd import __version__
from rootstockd.cli import common
from rootstockd.cli.clients import Refused
from rootstockd.cli.common import fetch_config
from rootstockd.cli.lifecycle import stop
from rootstockd.host.log_file import open_log
from rootstockd.settings.config_layers import make_config, read_again
from rootstockd.users import user_name


def copper(size: int = 1):
    atoms = bulk("Cu", cubic=True) * (size, size, size)
    atoms.rattle(0.05, seed=1)
    return atoms


PR_CAPBSET_DROP = 24
CAP_SYS_RESOURCE = 24


@pytest.fixture(scope="module")
def daemon_with_emt(runtime_folder: Path) -> Iterator[RunningDaemon]:
    with daemons(runtime_folder) as start:
        yield start("--model", "emt")


@pytest.fixture
def daemon(daemon_with_emt: RunningDaemon) -> RunningDaemon:
    """One with EMT warm, for tests after which it goes on as before, and without sessions."""
    wait_for(lambda: not daemon_with_emt.client().status()["sessions"])
    return daemon_with_emt


def test_start_says_how_to_use_it(start_daemon) -> None:
    daemon = start_daemon()
    done = daemon.run("start", "--device", "cpu", "--log-file", daemon.log)
    assert done.returncode != 0
    assert "already runs" not in daemon.log.read_text()
    assert f"a daemon already runs at {daemon.socket}" in done.stderr
    assert "jobs can use it as it is" in done.stderr
    pid = daemon.client().status()["pid"]
    assert f"(pid {pid})" in done.stderr
    daemon.stop()
    again = ("start", "--device", "cpu", "--model", "emt", "--log-file", daemon.log)
    done = daemon.run(*again)
    assert done.returncode == 0, done.stderr
    assert f'RootstockClient({str(daemon.socket)!r}).calculator("emt")' in done.stdout
    assert f"socket  {daemon.socket}\n" in done.stdout
    daemon.stop()
    done = daemon.run(*again, env={"ROOTSTOCKD_SOCKET": str(daemon.socket)})  # where jobs look for it by themselves
    assert 'RootstockClient().calculator("emt")' in done.stdout


def test_where_no_file_may_be_written_start_says_why(runtime_folder: Path) -> None:
    command = [sys.executable, "-m", "rootstockd", "start", "--device", "cpu", "--log-file", "/dev/null"]
    shell = ["/bin/bash", "-c", 'ulimit -f 0; exec "$@"', "-", *command, "--socket", str(runtime_folder / "none.sock")]
    done = subprocess.run(shell, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done
    assert done.stderr.splitlines()[-1].startswith("Error: can't hand the settings to the daemon: File too large.")
    assert "Traceback" not in done.stderr


LATE_START = """
import os, sys, time
while "rootstockd.serve" in sys.orig_argv and not os.path.exists(os.environ["GATE"]):
    time.sleep(0.02)
"""
"""Has what the command starts begin only when the command has ended."""


def test_a_daemon_whose_command_ends_before_it_has_imported_anything_does_not_come_up(
    runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    address = runtime_folder / "early.sock"
    options = ["--device", "cpu", "--socket", str(address), "--log-file", str(runtime_folder / "early.log")]
    with subprocess.Popen([sys.executable, "-m", "rootstockd", "start", *options], stdout=subprocess.PIPE) as command:
        started = psutil.Process(command.pid)
        wait_for(lambda: any("rootstockd.serve" in child.cmdline() for child in started.children()))
        (served,) = started.children()
        command.kill()
    (tmp_path / "gate").touch()
    served.wait(60)
    assert not address.exists() and not address.with_suffix(".lock").exists()


HANGING_LOCK = """
import fcntl, sys, time
if "rootstockd.serve" in sys.orig_argv:
    fcntl.fcntl = lambda *arguments: time.sleep(1000)
"""
"""As a lock on a share whose server is away."""


def test_a_daemon_that_nobody_could_find_ends_with_its_command(
    runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGING_LOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    address = runtime_folder / "left.sock"
    options = ["--device", "cpu", "--socket", str(address), "--log-file", str(runtime_folder / "left.log")]
    with subprocess.Popen([sys.executable, "-m", "rootstockd", "start", *options], stdout=subprocess.PIPE) as command:
        wait_for(address.with_suffix(".lock").exists)
        (served,) = psutil.Process(command.pid).children()
        command.kill()
    served.wait(10)
    address.with_suffix(".lock").unlink()


def test_colours_where_there_is_no_terminal_come_without_a_spinner(start_daemon) -> None:
    """Programs wait for the line: `slurm run` does."""
    daemon = start_daemon()
    daemon.stop()
    # no variable to be warned of on a line before it
    variables = {"FORCE_COLOR": "1", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = daemon.run("start", "--device", "cpu", "--log-file", daemon.log, env=variables)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("ready on cpu") for line in done.stdout.splitlines()), repr(done.stdout)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is one processor")
def test_start_says_that_a_variable_meant_for_jobs_holds_for_workers(start_daemon, monkeypatch) -> None:
    words = "OMP_NUM_THREADS is 1"
    daemon = start_daemon()
    assert any(words in warning for warning in daemon.client().status()["warnings"])
    done = daemon.run("restart", env={"OMP_NUM_THREADS": "2"})  # which is of no account: it goes on as it was
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    daemon.run("stop")
    done = daemon.run("start", "--device", "cpu", "--log-file", daemon.log, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0 and words not in done.stdout, done.stdout + done.stderr
    assert words not in daemon.run("restart", env={"OMP_NUM_THREADS": "1"}).stdout


def test_status_for_people_and_for_programs(daemon: RunningDaemon) -> None:
    before = daemon.model("emt")["evaluations"]
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    atoms.get_forces()
    shown = daemon.run("status").stdout
    for words in ("ready on cpu", "emt", "float64", str(os.getpid()), str(daemon.model("emt")["pid"])):
        assert words in shown
    told = json.loads(daemon.run("status", "--json").stdout)
    assert told["schema_version"] == 3
    assert told["models"][0]["evaluations"] == before + 1
    assert told["sessions"][0]["pid"] == os.getpid()
    assert told["sessions"][0]["natoms"] == 4


def test_status_does_not_list_itself(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a look at whether somebody answers a session, where the socket is looked for."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_folder / "x"))
    monkeypatch.delenv("ROOTSTOCKD_SOCKET", raising=False)
    folder = runtime_folder / "x" / "rootstockd"
    folder.mkdir(mode=0o700, parents=True)
    daemon = RunningDaemon(folder)
    daemon.start()
    try:
        for _ in range(20):
            client = RootstockClient()
            assert client.socket == daemon.socket
            assert client.status()["sessions"] == []
    finally:
        daemon.stop()


def test_stop_says_whose_jobs_it_leaves(own_daemon: RunningDaemon) -> None:
    """And they go on with the next daemon."""
    job = (
        "import sys; from ase.build import bulk; from rootstock_client import RootstockClient\n"
        "atoms = bulk('Cu', cubic=True); atoms.calc = RootstockClient(sys.argv[1]).calculator('emt')\n"
        "for _ in range(2): print(atoms.get_potential_energy(), flush=True); input(); atoms.rattle(0.1)\n"
    )
    command = [sys.executable, "-c", job, str(own_daemon.socket)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as other, own_daemon.client().calculator("emt") as ours:  # type: ignore[call-overload]
        assert other.stdout.readline()
        ours.get_potential_energy(copper())
        done = own_daemon.run("stop")
        assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
        pids = ", ".join(map(str, sorted([os.getpid(), other.pid])))
        said = f"2 sessions had it, of {user_name(os.geteuid())} (pid {pids}); jobs wait for the next daemon as long as"
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1, done.stderr
        own_daemon.start()
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline()
        ours.close()
        other.communicate("\n", timeout=60)
    wait_for(lambda: not own_daemon.client().status()["sessions"])
    done = own_daemon.run("stop")
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_stop_leaves_nothing(own_daemon: RunningDaemon) -> None:
    status = own_daemon.client().status()
    processes = [psutil.Process(status["pid"]), psutil.Process(status["models"][0]["pid"])]
    assert own_daemon.run("stop").returncode == 0
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)
    assert [path.name for path in own_daemon.folder.iterdir()] == ["log"]
    done = own_daemon.run("stop")
    assert done.returncode != 0
    assert "no rootstockd answers" in done.stderr
    assert "name its socket with --socket" in done.stderr and "rootstockd start" not in done.stderr


def test_stop_where_no_socket_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a command: it might find the machine's daemon."""
    monkeypatch.setattr(runtime_dir, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setattr(common, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("ROOTSTOCKD_SOCKET", raising=False)
    with pytest.raises(Refused, match="no rootstockd found: .*\nIf it runs elsewhere, name its socket with --socket"):
        stop.main([], standalone_mode=False)


def test_stop_finds_one_by_its_lock_and_nobody_else(start_daemon, runtime_folder: Path) -> None:
    """Where its sockets have gone. A lock file's number alone proves nothing: it may be another process's by now."""
    daemon = start_daemon()
    pid, lock = daemon.pid, daemon.socket.with_suffix(".lock")
    other = runtime_folder / "other.lock"
    with subprocess.Popen(["sleep", "60"]) as bystander:
        for text in (f"{bystander.pid}\n", f"{pid}\n"):  # neither has a lock on this file
            other.write_text(text)
            done = rootstockd("stop", "--socket", other.with_suffix(".sock"))
            assert (done.returncode, "no rootstockd answers" in done.stderr) == (1, True), done.stderr
        other.unlink()
        for path in (daemon.socket, daemon.socket.with_suffix(".control")):
            path.unlink()
        lock.write_text(f"{bystander.pid}\n")
        assert daemon.run("stop", "--force").returncode == 1
        assert bystander.poll() is None and daemon.processes()
        bystander.kill()
    lock.write_text(f"{pid}\n")
    done = daemon.run("stop")
    assert (done.returncode, f"stopped (pid {pid}" in done.stdout) == (0, True), done.stderr
    assert not daemon.processes() and not lock.exists()


def test_restart_keeps_the_settings(start_daemon) -> None:
    daemon = start_daemon("--model", "emt", "--max-atoms", "5000")
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    before = atoms.get_forces()
    old = daemon.client().status()
    done = daemon.run("restart")
    assert done.returncode == 0, done.stderr
    new = daemon.client().status()
    assert new["pid"] != old["pid"]
    assert new["config"] == old["config"]
    atoms.calc.results.clear()
    np.testing.assert_array_equal(atoms.get_forces(), before)  # the calculator found the new daemon by itself


def test_a_restart_that_could_not_start_stops_nothing(runtime_folder: Path) -> None:
    folder = runtime_folder / "restarts"
    folder.mkdir(mode=0o700)
    address, settings = folder / "a.sock", folder / "config.toml"
    as_it_was = f'socket = "{address}"\ndevices = ["cpu"]\nlog_file = "log"\n'
    settings.write_text(as_it_was)
    done = rootstockd("start", "--config", settings)
    assert done.returncode == 0, done.stderr
    others = socket.create_server(("127.0.0.1", 0))
    port = others.getsockname()[1]
    try:
        pid = RootstockClient(address).status()["pid"]
        for text, words in (
            (
                as_it_was.replace("a.sock", "b.sock"),
                f"the socket is {folder}/b.sock now. The daemon goes on at {address}",
            ),
            (as_it_was.replace("cpu", "cuda:99"), "this machine has no GPU 99"),
            (as_it_was + '[access]\nsocket_group = "no-such-group"\n', "there is no group 'no-such-group'"),
            (as_it_was + 'metrics = "192.0.2.1:9746"\n', "this machine can't listen at 192.0.2.1"),
            (as_it_was + f'metrics = "127.0.0.1:{port}"\n', f"can't listen on 127.0.0.1:{port} for metrics"),
            (as_it_was + 'models = ["nonsense"]\n', "there is no model 'nonsense'"),
        ):
            settings.write_text(text)
            done = rootstockd("restart", "--socket", address)
            assert done.returncode == 1 and words in done.stderr, done.stderr
            assert (RootstockClient(address).status()["pid"], address.is_socket()) == (pid, True)
        others.close()
        for metrics in (f"127.0.0.1:{port}", f"0.0.0.0:{port}"):  # the old daemon has it then
            settings.write_text(as_it_was + f'metrics = "{metrics}"\n')
            done = rootstockd("restart", "--socket", address)
            assert done.returncode == 0, done.stderr
    finally:
        others.close()
        rootstockd("stop", "--socket", address)
    assert not address.exists()


def test_tables_of_users_may_be_long_and_are_nobody_elses_to_see(start_daemon, tmp_path: Path) -> None:
    """The kernel takes no argument of more than 128 KiB, and shows arguments to all users."""
    settings = tmp_path / "config.toml"
    settings.write_text("".join(f"[users.of-{number}]\nsessions = 7\n" for number in range(2_000)))
    daemon = start_daemon("--config", str(settings))
    for _ in range(2):
        status = daemon.client().status()
        assert len(status["config"]["users"]) == 2_000
        assert "of-1" not in Path(f"/proc/{status['pid']}/cmdline").read_text()
        done = daemon.run("restart")
        assert done.returncode == 0, done.stderr


def test_a_successor_finds_the_modules_that_the_daemon_before_it_found(
    start_daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the shell has in which somebody types `restart`; and a job is told when such a module has changed."""
    folder, other = tmp_path / "modules", tmp_path / "other"
    folder.mkdir()
    (folder / "of_my_own.py").write_text("from ase.calculators.emt import EMT as Own\n")
    catalogue = tmp_path / "models.toml"
    catalogue.write_text('[own]\nfamily = "ase"\narguments = { calculator = "of_my_own:Own" }\n')
    monkeypatch.setenv("PYTHONPATH", str(folder))
    daemon = start_daemon("--catalogue", str(catalogue), "--model", "own")
    atoms = copper()
    atoms.calc = daemon.client().calculator("own")
    before = atoms.get_forces()
    monkeypatch.setenv("PYTHONPATH", str(other))
    for _ in range(2):
        done = daemon.run("restart")
        assert done.returncode == 0, done.stderr
    atoms.calc.results.clear()
    np.testing.assert_array_equal(atoms.get_forces(), before)
    environment = Path(f"/proc/{daemon.client().status()['pid']}/environ").read_bytes().split(b"\0")
    assert f"PYTHONPATH={other}:{folder}".encode() in environment
    (folder / "of_my_own.py").write_text("from ase.calculators.lj import LennardJones as Own\n")
    daemon.run("restart")
    atoms.calc.results.clear()
    with pytest.raises(ModelChangedError):
        atoms.get_forces()


def test_a_successor_computes_as_the_daemon_before_it_did(start_daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "NUMBA_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "avx2",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "TORCHINDUCTOR_MAX_AUTOTUNE": "0",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    daemon = start_daemon()
    for name in said:
        monkeypatch.delenv(name)
    assert daemon.run("restart").returncode == 0
    environment = Path(f"/proc/{daemon.pid}/environ").read_text().split("\0")
    assert {f"{name}={value}" for name, value in said.items()} <= set(environment)


def test_a_successor_runs_under_what_the_daemon_before_it_did(start_daemon) -> None:
    daemon = start_daemon()
    before = daemon.pid
    limits = [resource.prlimit(before, limit) for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)]
    one = min(os.sched_getaffinity(before))
    os.sched_setaffinity(before, {one})

    def in_a_shell_of_little() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[0][1]))
        resource.setrlimit(resource.RLIMIT_AS, (2**32, limits[1][1]))
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))

    done = daemon.run("restart", preexec_fn=in_a_shell_of_little)
    assert done.returncode == 0, done.stderr
    after = daemon.pid
    assert after != before
    assert [resource.prlimit(after, limit) for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)] == limits
    assert os.sched_getaffinity(after) == {one}


def test_a_restart_from_where_limits_are_lower_for_good_stops_nothing(start_daemon) -> None:
    daemon = start_daemon()
    before = daemon.pid

    def for_good() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE)  # root's, by which it raises them again

    done = daemon.run("restart", preexec_fn=for_good)
    assert done.returncode == 1
    assert "open files: here at most 150 may be had (`ulimit -Hn`), where the one that runs has" in done.stderr
    assert "seconds of CPU time: here at most 3600 may be had (`ulimit -Ht`)" in done.stderr
    assert daemon.pid == before


@pytest.fixture
def another_version(runtime_folder: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """The socket of what answers as no daemon of this version does, and its answer to whatever is asked."""
    address, answer = runtime_folder / "another.sock", dict[str, object]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name is of http.server

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.UnixStreamServer(str(address.with_suffix(".control")), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield address, answer
        server.shutdown()
        thread.join()
    address.with_suffix(".control").unlink()


def test_what_another_version_answers_is_no_trace(another_version: tuple[Path, dict[str, object]]) -> None:
    address, answer = another_version
    answer.update(version="9.9", restart_needed=3, held="long")
    for arguments in (("reload",), ("load", "emt"), ("unload", "emt"), ("status",), ("config", "show", "--running")):
        done = rootstockd(*arguments, "--socket", address)
        words = f"rootstockd at {address} is version 9.9, this command {__version__}, and its answer can't be read."
        assert done.returncode == 1 and done.stderr.startswith(f"Error: {words}"), done.stderr


def test_settings_of_a_newer_version_are_left_out(another_version: tuple[Path, dict[str, object]]) -> None:
    address, answer = another_version
    config = make_config((), {}, {"users": {"a": {"share": 2}}}, {"socket": address, "devices": ["cpu"]})
    told = answer["config"] = config.model_dump(mode="json")
    for table in (told, told["access"], told["limits"], told["users"]["a"], told["devices"][0]):
        table["newer"] = 1
    told["origins"]["limits.newer"] = "command line"
    fetched = fetch_config(address)
    assert fetched is not None
    assert read_again(fetched).model_dump(exclude={"origins"}) == config.model_dump(exclude={"origins"})


def test_where_the_working_directory_was_removed(tmp_path: Path) -> None:
    there = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
    command = [
        sys.executable,
        "-c",
        there,
        tmp_path,
        sys.executable,
        "-m",
        "rootstockd",
        "status",
        "--socket",
        "a.sock",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "a.sock starts at the working directory, and that was removed" in done.stderr) == (2, True)


def test_a_restart_where_somebody_removed_the_socket(start_daemon) -> None:
    """New jobs don't find such a daemon: a restart is what mends it."""
    daemon = start_daemon("--model", "emt")
    old = daemon.client().status()["pid"]
    daemon.socket.unlink()
    done = daemon.run("start", "--device", "cpu")
    assert f"a daemon already runs for {daemon.socket} (pid {old}), and has no socket there" in done.stderr
    assert "`rootstockd restart` makes it anew" in done.stderr
    done = daemon.run("restart")
    assert done.returncode == 0, done.stderr
    assert daemon.client().status()["pid"] != old
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    assert np.isfinite(atoms.get_forces()).all()


def test_logs(own_daemon: RunningDaemon) -> None:
    assert "model emt is ready" in own_daemon.run("logs").stdout
    assert len(own_daemon.run("logs", "-n", "1").stdout.splitlines()) == 1
    assert "model emt is ready" in own_daemon.run("logs", "-n", "1000000000").stdout
    assert own_daemon.run("logs", "-n", f"1{100 * '0'}").returncode == 2
    command = [sys.executable, "-m", "rootstockd", "logs", "-f", "--socket", str(own_daemon.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        lines = follower.stdout
        assert lines is not None
        assert any("ready on" in line for line in lines)
        os.truncate(own_daemon.log, 0)  # as logrotate does with copytruncate
        assert own_daemon.run("reload").returncode == 0
        assert any("reloaded" in line for line in lines)
        own_daemon.log.rename(own_daemon.log.with_suffix(".1"))
        own_daemon.stop()
        assert any("stopped" in line for line in lines)
        own_daemon.start()
        assert any("ready on" in line for line in lines)
        follower.kill()


def test_logs_of_what_is_no_log(runtime_folder: Path) -> None:
    """A link is not followed, nothing is waited for, and a line without end takes no memory."""
    log, address = runtime_folder / "no.log", runtime_folder / "no.sock"
    environment = {**os.environ, "ROOTSTOCKD_LOG_FILE": str(log)}

    def logs(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rootstockd", "logs", "--socket", address, *options]
        shell = ["/bin/bash", "-c", 'ulimit -v 1000000; exec "$@"', "-", *command]
        return subprocess.run(shell, capture_output=True, text=True, check=False, timeout=60, env=environment)

    def refused(*options: str) -> str:
        done = logs(*options)
        assert done.returncode == 1 and not done.stdout, done.stdout
        return " ".join(done.stderr.split())

    log.symlink_to("/dev/zero")
    assert "Too many levels of symbolic links. It has to be a file, and no link." in refused()
    log.unlink()
    os.mkfifo(log)
    assert f"can't show the log {log}: it is no file." in refused("-f")
    log.unlink()
    assert f"no log at {log}: No such file" in refused()
    with log.open("wb") as file:
        file.truncate(2**30)  # zeros, which take no room
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe end\n")
    done = logs("-n", "2")
    assert done.returncode == 0 and done.stdout.endswith("\nthe end\n"), done.stderr
    log.unlink()


def test_no_gpu_here(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    done = rootstockd("start", "--gpu", "0", "--socket", tmp_path / "a.sock")
    assert done.returncode != 0
    assert "no GPU 0" in done.stderr
    assert "--device cpu" in done.stderr


def test_nothing_that_can_be_loaded(runtime_folder: Path) -> None:
    address = runtime_folder / "unknown.sock"
    log = runtime_folder / "unknown.log"
    done = rootstockd("start", "--device", "cpu", "--socket", address, "--log-file", log, "--model", "nonsense")
    assert done.returncode != 0
    assert "no model 'nonsense'" in done.stderr
    assert not address.exists()
    catalogue = runtime_folder / "bad.toml"
    catalogue.write_text('[x]\nfamily = "mace"\nwights = "x.model"\n')
    done = rootstockd("start", "--device", "cpu", "--socket", address, "--log-file", log, "--catalogue", catalogue)
    assert "wights" in done.stderr
    catalogue.write_text(f'[x]\nfamily = "mace"\nweights = "x.model"\nsha256 = "{"0" * 64}"\n')
    arguments = ["--socket", address, "--log-file", log, "--catalogue", catalogue, "--model", "x"]
    done = rootstockd("start", "--device", "cpu", *arguments)
    assert done.returncode != 0
    assert "no model could be loaded" in done.stderr
    assert "x.model are missing" in done.stdout.replace("\n", " ")
    assert not address.exists()


@pytest.mark.parametrize("log", ["/dev/zero", "/dev/full", "/dev/null"])
def test_a_device_as_the_log_of_a_daemon_that_can_not_start(runtime_folder: Path, log: str) -> None:
    """What it said is not there to be read, and nothing else is: reading /dev/zero has no end."""
    command = [sys.executable, "-m", "rootstockd", "start", "--device", "cpu", "--model", "nonsense"]
    places = ["--socket", runtime_folder / "device.sock", "--log-file", log]
    shell = ["/bin/bash", "-c", 'ulimit -v 8000000; exec "$@"', "-", *command, *places]
    done = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "the daemon ended with exit status 1 and said nothing" in done.stderr, done.stderr


def test_a_model_whose_weights_are_not_here_keeps_no_daemon_off(runtime_folder: Path) -> None:
    address = runtime_folder / "some.sock"
    options = ["--device", "cpu", "--socket", address, "--log-file", runtime_folder / "log", "--model", "mace-mp-small"]
    done = rootstockd("start", *options)
    assert done.returncode == 1 and "models pull mace-mp-small" in done.stderr
    assert "; a running daemon finds them without a restart" in done.stderr  # none runs now
    done = rootstockd("start", *options, "--model", "emt")
    try:
        assert done.returncode == 0
        assert "can't be: the weights of model 'mace-mp-small' are not on this machine" in done.stdout
        assert rootstockd("restart", "--socket", address).returncode == 0
        assert "models pull mace-mp-small" in rootstockd("status", "--socket", address).stdout.replace("\n", " ")
    finally:
        rootstockd("stop", "--socket", address)


def test_the_log_is_its_owners_alone(runtime_folder: Path) -> None:
    folder = runtime_folder / "logs"
    log, elsewhere = folder / "new" / "log", runtime_folder / "elsewhere"
    with open_log(log) as file:
        file.write(b"one\n")
    with open_log(log) as file:
        file.write(b"two\n")
    assert log.read_text() == "one\ntwo\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    for mode in (0o606, 0o660):
        log.chmod(mode)
        done = rootstockd("start", "--socket", runtime_folder / "a.sock", "--log-file", log)
        assert done.returncode == 1 and "others may write to it; `chmod go-w` it" in done.stderr, done.stderr
    (folder / "link").symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic link"):
        open_log(folder / "link")
    done = rootstockd("start", "--socket", runtime_folder / "a.sock", "--log-file", folder / "link")
    assert done.returncode == 1 and "Too many levels of symbolic links" in done.stderr
    assert not elsewhere.exists()
    open_log(Path("/dev/null")).close()
    os.mkfifo(folder / "fifo")
    with pytest.raises(OSError, match="No such device"):  # nobody reads it, and nobody is waited for
        open_log(folder / "fifo")


def test_a_log_that_was_rotated_is_left_with_a_reload(runtime_folder: Path) -> None:
    address, log = runtime_folder / "rotated.sock", runtime_folder / "log"
    options = ["--device", "cpu", "--socket", address, "--log-file", log]
    assert rootstockd("start", *options, "--model", "emt").returncode == 0
    try:
        log.rename(old := runtime_folder / "log.1")
        assert rootstockd("reload", "--socket", address).returncode == 0
        assert "reloaded" in log.read_text()
        before = old.read_text()
        assert rootstockd("reload", "--socket", address).returncode == 0
        assert log.read_text().count("reloaded") == 2
        assert "reloaded" in rootstockd("logs", "--socket", address).stdout
    finally:
        rootstockd("stop", "--socket", address)
    assert old.read_text() == before
    assert "stopped" in log.read_text()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_log_of_somebody_else_is_not_written_to(runtime_folder: Path) -> None:
    log = runtime_folder / "theirs"
    log.write_text("theirs")
    os.chown(log, 12345, 12345)
    done = rootstockd("start", "--device", "cpu", "--socket", runtime_folder / "l.sock", "--log-file", log)
    assert done.returncode != 0
    assert f"can't write the log {log}: it belongs to uid 12345. Choose another --log-file." in done.stderr
    assert log.read_text() == "theirs"


def test_what_lies_at_the_address(start_daemon, runtime_folder: Path) -> None:
    """Only a dead socket of ours is replaced."""
    folder = runtime_folder / "addresses"
    folder.mkdir(mode=0o700)
    address, log = folder / "a.sock", folder / "log"

    def start() -> subprocess.CompletedProcess[str]:
        return rootstockd("start", "--device", "cpu", "--socket", address, "--log-file", log)

    address.write_text("precious")
    assert "is not a socket; it is left alone" in start().stderr
    assert address.read_text() == "precious"
    address.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(address))
        other.listen()
        assert "another program listens" in start().stderr
    assert address.is_socket()  # stale now: nobody listens
    assert start().returncode == 0
    assert rootstockd("stop", "--socket", address).returncode == 0
    folder.chmod(0o777)
    assert "others may write to it" in start().stderr


def test_what_lies_beside_the_address(runtime_folder: Path) -> None:
    """The lock file of another tool is no daemon's, and backups of an editor are nobody's who starts one."""
    folder = runtime_folder / "beside"
    folder.mkdir(mode=0o700)
    address, log = folder / "uv.sock", folder / "log"
    precious = {name: folder / name for name in ("uv.lock", "uv.soc~", "uv.contro~")}
    for path in precious.values():
        path.write_text("precious")
    refused = rootstockd("start", "--device", "cpu", "--socket", address, "--log-file", log)
    assert f"Error: {folder}/uv.lock is not the lock file of a daemon of yours; it is left alone." in refused.stderr
    assert "choose another --socket" in refused.stderr and refused.returncode == 1
    assert precious.pop("uv.lock").read_text() == "precious"
    (folder / "uv.lock").unlink()
    assert rootstockd("start", "--device", "cpu", "--socket", address, "--log-file", log).returncode == 0
    assert rootstockd("stop", "--socket", address).returncode == 0
    assert {path.name for path in folder.iterdir()} == {"log", *precious}
    assert all(path.read_text() == "precious" for path in precious.values())


def test_killed_daemon_takes_its_workers_along_and_can_be_started_again(own_daemon: RunningDaemon) -> None:
    status = own_daemon.client().status()
    worker = psutil.Process(status["models"][0]["pid"])
    atoms = copper()
    atoms.calc = own_daemon.client(patience=0).calculator("emt")
    before = atoms.get_forces()
    os.kill(status["pid"], signal.SIGKILL)
    wait_for(lambda: not worker.is_running(), timeout=5)
    assert own_daemon.socket.exists()
    atoms.calc.results.clear()
    with pytest.raises(DaemonNotFoundError, match="rootstockd start"):
        atoms.get_forces()
    own_daemon.start()
    np.testing.assert_array_equal(atoms.get_forces(), before)


def test_killed_worker_costs_one_slow_step(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    reference = copper()
    reference.calc = EMT()
    before = daemon.model("emt")["restarts"]
    for kill in range(3):
        os.kill(daemon.model("emt")["pid"], signal.SIGKILL)
        atoms.rattle(0.01, seed=kill)
        reference.positions[:] = atoms.positions
        np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)
    assert daemon.model("emt")["restarts"] == before + 3


def test_killed_in_the_middle_of_an_evaluation(daemon: RunningDaemon) -> None:
    """The slot goes to the next worker."""
    atoms = copper(size=12)  # takes EMT seconds
    atoms.calc = daemon.client().calculator("emt")
    outcome: list[object] = []

    def step() -> None:
        outcome.append(atoms.get_forces())

    def kill_while_busy() -> None:
        pid = None

        def busy() -> bool:
            nonlocal pid
            status = daemon.client().status()
            pid = status["models"][0]["pid"]
            ready = status["models"][0]["state"] == "ready"
            return bool(ready and pid and status["sessions"] and status["sessions"][0]["state"] == "busy")

        wait_for(busy)
        time.sleep(0.3)  # well into it
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: daemon.model("emt")["pid"] not in (pid, None))

    thread = threading.Thread(target=step)
    thread.start()
    kill_while_busy()
    thread.join()
    reference = atoms.copy()
    reference.calc = EMT()
    np.testing.assert_allclose(outcome.pop(), reference.get_forces(), atol=1e-9)


def test_client_and_then_worker_killed_in_the_middle_of_an_evaluation(daemon: RunningDaemon) -> None:
    """Nobody is left to repeat it for; the daemon goes on."""
    before = daemon.model("emt")["restarts"]
    code = (
        "import sys; from ase.build import bulk; from rootstock_client import RootstockClient\n"
        "atoms = bulk('Cu', cubic=True) * 12; atoms.calc = RootstockClient(sys.argv[1]).calculator('emt')\n"
        "atoms.get_forces()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(daemon.socket)]) as process:
        wait_for(lambda: any(s["state"] == "busy" for s in daemon.client().status()["sessions"]))
        process.kill()
    wait_for(lambda: not daemon.client().status()["sessions"])
    os.kill(daemon.model("emt")["pid"], signal.SIGKILL)
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    assert np.isfinite(atoms.get_potential_energy())
    assert daemon.model("emt")["restarts"] == before + 1
    assert "Traceback" not in daemon.log.read_text()


def test_stop_drains(own_daemon: RunningDaemon) -> None:
    """The evaluation under way ends well; the next is refused in words."""
    atoms = copper(size=10)
    atoms.calc = own_daemon.client().calculator("emt")
    idle = copper()
    idle.calc = own_daemon.client(patience=0).calculator("emt")
    idle.get_forces()
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(atoms.get_forces()))
    thread.start()
    wait_for(lambda: any(session["state"] == "busy" for session in own_daemon.client().status()["sessions"]))
    stopper = threading.Thread(target=own_daemon.run, args=("stop",))
    stopper.start()

    def draining() -> bool:
        try:
            return bool(own_daemon.client().status()["state"] == "draining")
        except DaemonNotFoundError:  # it has been quicker
            return True

    wait_for(draining)
    idle.rattle(0.01)
    with pytest.raises((DrainingError, ConnectionLostError, DaemonNotFoundError)):
        idle.get_forces()
    thread.join()
    stopper.join()
    reference = atoms.copy()
    reference.calc = EMT()
    np.testing.assert_allclose(results[0], reference.get_forces(), atol=1e-9)


def test_foreground_ends_with_a_signal(runtime_folder: Path) -> None:
    address = runtime_folder / "front.sock"
    command = [sys.executable, "-m", "rootstockd", "start", "--foreground", "--device", "cpu", "--socket", str(address)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(address.exists)
        wait_for(lambda: "ready" in rootstockd("status", "--socket", address).stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "stopped" in process.stderr.read()


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_foreground_without_standard_streams(runtime_folder: Path, closed: str) -> None:
    """What is opened next does not take their numbers, under which others would write into it."""
    address = runtime_folder / "closed.sock"
    command = [sys.executable, "-m", "rootstockd", "start", "--foreground", "--device", "cpu", "--socket", str(address)]
    with subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command]) as process:
        try:
            wait_for(lambda: address.exists() or process.poll() is not None)
            wait_for(lambda: "ready" in rootstockd("status", "--socket", address).stdout)
            assert Path(f"/proc/{process.pid}/fd/2").readlink() == Path(os.devnull)
            atoms = copper()
            atoms.calc = RootstockClient(address).calculator("emt")
            atoms.get_forces()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_start_that_fails_tells_nothing_that_another_daemon_logs(runtime_folder: Path) -> None:
    """Of several that are started at once, all with the same log, one runs on."""
    address, log, ended = runtime_folder / "precious.sock", runtime_folder / "precious.log", threading.Event()
    address.write_text("precious")

    def run_on() -> None:
        with log.open("a") as file:
            while not ended.wait(0.001):
                file.write("2026-01-02 03:04:05,678 INFO rootstockd.daemon: ready on it\n")
                file.flush()

    winner = threading.Thread(target=run_on)
    log.touch(mode=0o600)
    winner.start()
    try:
        done = rootstockd("start", "--device", "cpu", "--socket", address, "--log-file", log)
    finally:
        ended.set()
        winner.join()
    assert done.stderr.splitlines()[-1].startswith(f"Error: {address} is not a socket; it is left alone.")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_whatever_ends_start_wait_ends_its_daemon(runtime_folder: Path, number: signal.Signals) -> None:
    address, log = runtime_folder / f"wait-{number}.sock", runtime_folder / f"wait-{number}.log"
    command = [sys.executable, "-m", "rootstockd", "start", "--wait", "--device", "cpu", "--log-file", log]
    with subprocess.Popen([*command, "--socket", address], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and any(line.startswith("ready on") for line in process.stdout)
            process.send_signal(number)  # it may not be done with its own words
            process.wait(20)
            assert not address.exists()
        finally:
            rootstockd("stop", "--socket", address)


def test_a_daemon_in_the_foreground_has_no_log_file(runtime_folder: Path) -> None:
    """Until a restart, whose daemon is in the background. What another one wrote is not shown for its log."""
    folder = runtime_folder / "no-log"
    folder.mkdir(mode=0o700)
    address, log, settings = folder / "a.sock", folder / "log", folder / "config.toml"
    log.write_text("of another daemon\n")
    settings.write_text('devices = ["cpu"]\nlog_file = "log"\n')
    command = [sys.executable, "-m", "rootstockd", "start", "--foreground", "--config", settings, "--socket", address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: "ready" in rootstockd("status", "--socket", address).stdout)
            done = rootstockd("logs", "--socket", address)
            assert done.returncode == 1 and f"is in the foreground (pid {process.pid})" in done.stderr, done.stdout
            done = rootstockd("reload", "--socket", address)
            assert done.returncode == 0 and "log_file" not in done.stdout, done.stdout
            done = rootstockd("restart", "--socket", address)
            assert done.returncode == 0, done.stderr
            assert "of another daemon" in rootstockd("logs", "--socket", address).stdout
        finally:
            rootstockd("stop", "--socket", address)
        assert process.wait(20) == 0
    assert log.read_text().endswith("stopped\n")


def test_a_request_that_never_ends_does_not_keep_the_daemon_from_ending(own_daemon: RunningDaemon) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(own_daemon.socket.with_suffix(".control")))
        sock.sendall(b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert own_daemon.run("stop", timeout=20).returncode == 0


def test_a_driver_that_reads_nothing_gets_no_more_than_one_answer(daemon: RunningDaemon) -> None:
    """Its requests wait in its own socket; the daemon's memory does not grow with them."""
    process = psutil.Process(daemon.client().status()["pid"])
    before = process.memory_info().rss
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        sock.setblocking(False)
        sock.sendall(ipi.init_frame(json.dumps({"rootstock": 1, "k" * 60_000: 1}).encode()))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 10_000_000:
                sent += sock.send(100 * ipi.GETFORCE)
                time.sleep(0.0005)
        assert sent < 10_000_000
        assert process.memory_info().rss - before < 20e6
        assert daemon.client().status()["state"] == "ready"


def test_clients_that_die_anywhere_in_a_message_leave_nothing(daemon: RunningDaemon) -> None:
    """Not even until the garbage collector next runs."""
    pid, worker = daemon.client().status()["pid"], daemon.model("emt")["pid"]
    system = {"rootstock": 1, "model": "emt", "numbers": [29] * 1000, "pbc": [False] * 3}
    positions = np.arange(3000.0).reshape(-1, 3)
    stream = ipi.init_frame(json.dumps(system).encode())
    stream += ipi.posdata_head(np.eye(3), np.eye(3), 1000) + positions.tobytes() + ipi.GETFORCE

    def die(times: int) -> None:
        for part in np.linspace(0, 1, times):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.socket))
                sock.sendall(stream[: round(part * len(stream))])
        wait_for(lambda: not daemon.client().status()["sessions"])

    die(2)
    before = open_descriptors(pid), open_descriptors(worker)
    die(100)
    wait_for(lambda: open_descriptors(pid) <= before[0] and open_descriptors(worker) <= before[1], timeout=5)


def test_sessions_that_come_and_go_leave_nothing(daemon: RunningDaemon) -> None:
    atoms = copper()
    pid, worker = daemon.client().status()["pid"], daemon.model("emt")["pid"]

    def cycle(times: int) -> None:
        for _ in range(times):
            with daemon.client().calculator("emt") as calculator:
                atoms.calc = calculator
                calculator.results.clear()
                atoms.get_forces()
        wait_for(lambda: not daemon.client().status()["sessions"])

    cycle(20)
    before = open_descriptors(pid), open_descriptors(worker)
    cycle(200)
    # the last detach may still be on its way to the worker
    wait_for(lambda: open_descriptors(pid) <= before[0] and open_descriptors(worker) <= before[1])


@pytest.mark.skipif(shutil.which("systemctl") is None, reason="there is no systemd here")
def test_what_systemd_install_would_do(tmp_path: Path) -> None:
    """With the commands that are left to the operator, as after the installation itself."""
    settings = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    done = rootstockd("systemd", "install", "--user", "--gpu", "cpu", "--dry-run", env=settings)
    assert done.returncode == 0, done.stderr
    assert "systemctl --user daemon-reload" in done.stdout
    assert "systemctl --user enable --now rootstockd@cpu.socket" in done.stdout
    assert "whenever you log in" in done.stdout
    (manual,) = {line for line in done.stdout.splitlines() if line.startswith("Documentation=")}
    assert Path(manual.removeprefix("Documentation=file://")).read_text().startswith(".")
    assert not list(tmp_path.iterdir())
    done = rootstockd("systemd", "install", "--user", "--gpu", "0,1", "--dry-run", env=settings)
    assert "--gpu 0,1 is one daemon for all of these, rootstockd@0:1" in done.stdout
    assert "For a daemon each: --gpu 0 --gpu 1" in done.stdout


@pytest.mark.skipif(shutil.which("systemctl") is None, reason="there is no systemd here")
def test_what_systemd_uninstall_would_do(tmp_path: Path) -> None:
    settings = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    unit = tmp_path / "systemd/user/rootstockd@.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    done = rootstockd("systemd", "uninstall", "--user", "--dry-run", env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"rm {unit}", "systemctl --user daemon-reload"]
    assert unit.exists()
