"""Where a daemon's socket is looked for, and who is believed."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rootstock_client import runtime_dir
from rootstock_client.errors import DaemonNotFoundError
from rootstock_client.runtime_dir import (
    answers,
    control_socket,
    find_socket,
    is_private,
    job_runtime_dir,
    user_runtime_dir,
)

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def short():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="rsd-") as folder:
        yield Path(folder)


@pytest.fixture
def places(short, monkeypatch):
    """The user's and the system's folders, empty, and no variable."""
    monkeypatch.delenv("ROOTSTOCKD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "u"))
    monkeypatch.setattr(runtime_dir, "SYSTEM_DIR", short / "s")
    (short / "u" / "rootstockd").mkdir(mode=0o700, parents=True)
    (short / "s").mkdir(mode=0o755)
    return short / "u" / "rootstockd", short / "s"


def put_socket(folder: Path) -> Path:
    path = folder / "rootstockd.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path


@contextmanager
def suspended(folder: Path) -> Iterator[socket.socket]:
    """A daemon that takes no connections, and whose queue is full."""
    with ExitStack() as stack:
        daemon = stack.enter_context(socket.socket(socket.AF_UNIX))
        daemon.bind(str(folder / "rootstockd.sock"))
        daemon.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            try:
                client.connect(str(folder / "rootstockd.sock"))
            except BlockingIOError:
                break
        yield daemon


def test_the_order(places, monkeypatch):
    user, system = places
    in_system = put_socket(system)
    assert find_socket() == in_system
    in_user = put_socket(user)
    assert find_socket() == in_user
    monkeypatch.setenv("ROOTSTOCKD_SOCKET", "/from/the/environment.sock")
    assert find_socket() == Path("/from/the/environment.sock")
    assert find_socket("/given.sock") == Path("/given.sock")
    assert find_socket(Path("/given.sock")) == Path("/given.sock")


def test_a_home_that_no_shell_has_seen(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert find_socket("~/x.sock") == find_socket(Path("~/x.sock")) == Path("/home/me/x.sock")
    monkeypatch.setenv("ROOTSTOCKD_SOCKET", "~/x.sock")
    assert find_socket() == Path("/home/me/x.sock")
    assert find_socket("~nobody-has-this-name/x.sock") == Path.cwd() / "~nobody-has-this-name/x.sock"


def test_in_a_slurm_job_its_own_folder_goes_first(places, monkeypatch):
    job = f"4{os.getpid()}"
    monkeypatch.setenv("SLURM_JOB_ID", job)
    folder = Path(f"/tmp/rootstockd-{os.getuid()}-job-{job}")
    assert job_runtime_dir() == folder
    with pytest.raises(DaemonNotFoundError, match=str(folder)):
        find_socket()
    in_user = put_socket(places[0])
    assert find_socket() == in_user
    folder.mkdir(mode=0o700)
    try:
        with socket.socket(socket.AF_UNIX) as daemon:  # one that answers: the other is a dead one's
            daemon.bind(str(folder / "rootstockd.sock"))
            daemon.listen()
            assert find_socket() == folder / "rootstockd.sock"
            monkeypatch.delenv("SLURM_JOB_ID")
            assert find_socket() == in_user
            monkeypatch.setenv("SLURM_JOB_ID", "../../home/somebody")
            assert find_socket() == in_user
            monkeypatch.setenv("SLURM_JOB_ID", job)
            folder.chmod(0o777)
            assert find_socket() == in_user
    finally:
        shutil.rmtree(folder)


def test_a_daemon_that_is_suspended_holds_nobody_up(places):
    job = f"5{os.getpid()}"
    folder = Path(f"/tmp/rootstockd-{os.getuid()}-job-{job}")
    folder.mkdir(mode=0o700)
    try:
        with suspended(folder), socket.socket(socket.AF_UNIX) as other:
            other.bind(str(places[0] / "rootstockd.sock"))
            other.listen()
            done = subprocess.run(
                [sys.executable, "-c", "from rootstock_client.runtime_dir import find_socket; print(find_socket())"],
                env={**os.environ, "SLURM_JOB_ID": job},
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert done.stdout.strip() == str(places[0] / "rootstockd.sock"), done.stderr
    finally:
        shutil.rmtree(folder)


def test_a_queue_that_is_full_for_a_moment_is_waited_for(short):
    with suspended(short) as daemon:

        def take_one() -> None:
            daemon.accept()[0].close()

        soon = threading.Timer(0.3, take_one)
        soon.start()
        assert answers(short / "rootstockd.sock", 20.0)
        soon.join()


def test_an_empty_variable_counts_for_nothing(places, monkeypatch):
    monkeypatch.setenv("ROOTSTOCKD_SOCKET", "")
    path = put_socket(places[0])
    assert find_socket() == path


def test_where_none_is_found_it_says_how_to_start_one(places):
    with pytest.raises(DaemonNotFoundError) as caught:
        find_socket()
    for place in places:
        assert str(place) in caught.value.message
    assert "rootstockd start" in caught.value.hint
    assert "ROOTSTOCKD_SOCKET" in caught.value.hint


def test_one_that_this_process_had_is_found_while_it_is_away(places, monkeypatch):
    monkeypatch.setattr(runtime_dir, "MET", {places[1] / "rootstockd.sock"})
    assert find_socket() == places[1] / "rootstockd.sock"
    assert put_socket(places[0]) == find_socket()  # but one that is there goes first


def test_a_file_is_no_socket(places):
    for folder in places:
        (folder / "rootstockd.sock").write_text("")
    with pytest.raises(DaemonNotFoundError):
        find_socket()


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777])
@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_that_others_may_write_to_is_not_believed(places, mode, which):
    folder = places[which]
    path = put_socket(folder)
    folder.chmod(mode)
    with pytest.raises(DaemonNotFoundError):
        find_socket()
    folder.chmod(0o755)
    assert find_socket() == path


@as_root
def test_a_users_folder_of_somebody_else_is_not_believed(places):
    user, _ = places
    path = put_socket(user)
    assert find_socket() == path
    os.chown(user, 12345, -1)
    with pytest.raises(DaemonNotFoundError):
        find_socket()


@as_root
@pytest.mark.parametrize(
    ("folder_owner", "socket_owner", "believed"),
    [(0, 0, True), (0, 12345, True), (12345, 12345, True), (12345, 0, False), (12345, 23456, False)],
)
def test_the_systems_folder_belongs_to_root_or_to_its_daemon(places, folder_owner, socket_owner, believed):
    _, system = places
    path = put_socket(system)
    os.chown(path, socket_owner, -1)
    os.chown(system, folder_owner, -1)
    if believed:
        assert find_socket() == path
    else:
        with pytest.raises(DaemonNotFoundError):
            find_socket()


@pytest.mark.parametrize("which", [0, 1])
def test_a_link_to_a_folder_is_not_believed(places, which, short):
    folder = places[which]
    put_socket(folder)
    elsewhere = short / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(DaemonNotFoundError):
        find_socket()


@as_root
def test_a_system_folder_that_is_closed_to_us_is_passed_over(places):
    """For a user who may not look into it there is no daemon there, and the message says how to start one."""
    user, system = places
    put_socket(system)
    system.chmod(0o700)
    user.parent.parent.chmod(0o755)
    script = (
        "import os, sys, pathlib\n"
        "from rootstock_client import runtime_dir\n"
        "from rootstock_client.errors import DaemonNotFoundError\n"
        "runtime_dir.SYSTEM_DIR = pathlib.Path(sys.argv[1])\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    runtime_dir.find_socket()\n"
        "except DaemonNotFoundError:\n"
        "    print('not found')\n"
    )
    package = str(Path(runtime_dir.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, str(system)],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "not found\n", done.stderr


@pytest.mark.parametrize("base", [None, "", "relative/path"])
def test_a_login_without_a_runtime_directory_has_one_in_tmp(monkeypatch, base):
    if base is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    assert user_runtime_dir() == Path(f"/tmp/rootstockd-{os.getuid()}")


def test_the_runtime_directory_of_a_login(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert user_runtime_dir() == Path("/run/user/7/rootstockd")


def test_the_control_socket_lies_beside():
    assert control_socket(Path("/a/b.c/name.sock")) == Path("/a/b.c/name.control")


def test_who_is_private(tmp_path):
    tmp_path.chmod(0o755)
    assert is_private(tmp_path, os.getuid())
    assert is_private(tmp_path, os.getuid() + 1, os.getuid())
    assert not is_private(tmp_path, os.getuid() + 1)
    assert not is_private(tmp_path / "missing", os.getuid())
    file = tmp_path / "file"
    file.write_text("")
    assert not is_private(file, os.getuid())
