"""Claiming a socket's address."""

import contextlib
import fcntl
import os
import pwd
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rootstock_client.runtime_dir import MAX_SOCKET_PATH, answers
from rootstockd.host.sockets import (
    AddressError,
    claim_gpu,
    listen,
    lock,
    make_runtime_dir,
    name_until_open,
    room_beside,
)

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def short():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="rsd-") as folder:
        yield Path(folder)


def stale_socket(path: Path) -> None:
    """What a daemon that was killed leaves behind."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()


def as_user(uid: int, act: Callable[[], object]) -> str:
    """Have a child do it that has become another user; what it raised."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgid(uid)
            os.setuid(uid)
            act()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, encoding="utf-8") as words:
        return words.read()


# --- listen


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_listening(short, mode):
    with listen(short / "a.sock", mode) as sock:
        assert answers(short / "a.sock")
        assert stat.S_IMODE((short / "a.sock").stat().st_mode) == mode
        assert not sock.getblocking()
    assert not (short / "a.sock").exists()


def test_what_can_not_be_removed_at_the_end_is_a_line_in_the_log(short, caplog):
    """By then another has put a file where the folder was, or has closed it."""
    folder = short / "run"
    folder.mkdir()
    with lock(folder / "a.lock"), listen(folder / "a.sock", 0o600):
        folder.rename(short / "away")
        folder.touch()
    assert caplog.messages == [f"can't remove {folder / name}: Not a directory" for name in ("a.sock", "a.lock")]


def test_a_stale_socket_of_ours_is_replaced(short):
    path = short / "a.sock"
    stale_socket(path)
    assert not answers(path)
    with listen(path, 0o600):
        assert answers(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link to a stale socket", "dangling link", "fifo"])
def test_what_is_no_socket_is_left_alone_and_named(short, kind):
    path = short / "a.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link to a stale socket":
            stale_socket(short / "other.sock")
            path.symlink_to(short / "other.sock")
        case "dangling link":
            path.symlink_to(short / "nowhere")
    before = path.lstat()
    with pytest.raises(AddressError, match=f"{path} is not a socket; it is left alone"), listen(path, 0o600):
        pass
    assert os.path.samestat(path.lstat(), before)
    if kind == "file":
        assert path.read_text() == "precious"
    if kind.startswith("link"):
        assert (short / "other.sock").exists()


@pytest.mark.parametrize("name", ["uv.sock", "a.control", "a" * 200])
def test_the_name_until_a_socket_is_open(short, name):
    """It is that of no backup of an editor, and as long as the shortest control socket's at most."""
    unseen = name_until_open(short / name)
    assert unseen.parent == short and len(unseen.name) == len("a.control") and unseen.name.startswith(".rsd")


def test_room_for_a_socket_beside_another(short):
    """Which is held until it is needed, by nobody who could be connected to."""
    path = short / "a.sock"
    with listen(path, 0o600):
        with room_beside(path):
            assert name_until_open(path).is_socket() and not answers(name_until_open(path))
            with room_beside(path):  # another is about to listen: one of the two will
                pass
            assert name_until_open(path).is_socket() and answers(path)
        assert list(short.iterdir()) == [path]
    stale_socket(name_until_open(path))
    with room_beside(path), listen(path, 0o600):
        assert list(short.iterdir()) == [path]


def test_no_room_for_a_socket_beside_another(short):
    path = short / "a.sock"
    name_until_open(path).write_text("precious")
    with pytest.raises(AddressError, match="is not a socket; it is left alone"), room_beside(path):
        pass
    assert name_until_open(path).read_text() == "precious"
    with (
        pytest.raises(AddressError, match="can't listen on .*: No such file"),
        room_beside(short / "nowhere" / "a.sock"),
    ):
        pass


@pytest.mark.parametrize("kind", ["file", "folder", "live", "stale"])
def test_what_lies_where_a_socket_is_until_it_is_open(short, kind):
    """What a daemon left that was killed just then is replaced."""
    path = short / "a.sock"
    unseen = name_until_open(path)
    with socket.socket(socket.AF_UNIX) as other:
        match kind:
            case "file":
                unseen.write_text("precious")
            case "folder":
                unseen.mkdir()
            case "live":
                other.bind(str(unseen))
                other.listen()
            case "stale":
                stale_socket(unseen)
        before = unseen.lstat()
        if kind == "stale":
            with listen(path, 0o600):
                assert answers(path) and not unseen.exists()
        else:
            with pytest.raises(AddressError, match=f"{unseen}.*; it is left alone"), listen(path, 0o600):
                pass
            assert os.path.samestat(unseen.lstat(), before) and not path.exists()


def test_a_socket_that_somebody_listens_on_is_left_alone_and_named(short):
    path = short / "a.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with (
            pytest.raises(AddressError, match=f"another program listens on {path}; it is left alone"),
            listen(path, 0o600),
        ):
            pass
        assert answers(path)


def test_a_busy_socket_is_left_alone(short):
    """One whose queue of connections is full is not a stale one."""
    path = short / "a.sock"
    with socket.socket(socket.AF_UNIX) as other, contextlib.ExitStack() as stack:
        other.bind(str(path))
        other.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(path))
        with pytest.raises(AddressError, match="left alone"), listen(path, 0o600):
            pass
        assert path.is_socket()


def test_a_socket_of_another_type_is_left_alone(short):
    path = short / "a.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(AddressError, match="left alone"), listen(path, 0o600):
            pass
        assert path.is_socket()


@as_root
def test_a_stale_socket_of_somebody_else_is_left_alone_and_named(short):
    path = short / "a.sock"
    stale_socket(path)
    os.chown(path, 12345, -1)
    with pytest.raises(AddressError, match=f"the socket {path} belongs to uid 12345"), listen(path, 0o600):
        pass
    assert path.is_socket()


@as_root
@pytest.mark.parametrize("kind", ["stale", "live"])
def test_another_user_leaves_our_socket_alone(short, kind):
    """Even in a folder that is theirs, where they could remove it."""
    path = short / "a.sock"
    os.chown(short, 12345, 12345)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        if kind == "live":
            sock.listen()

        def claim() -> None:
            with listen(path, 0o600):
                pass

        assert f"the socket {path} belongs to uid 0; it is left alone" in as_user(12345, claim)
        assert path.is_socket()


@as_root
def test_another_user_can_not_write_to_our_folder_nor_put_theirs_in_its_place(short):
    ours = short / "ours"
    make_runtime_dir(ours, shared=False)
    short.chmod(0o1777)  # as /tmp
    for attack in (ours.rmdir, lambda: ours.rename(short / "moved"), lambda: (ours / "a.sock").write_text("")):
        assert "PermissionError" in as_user(12345, attack)
    theirs = short / "theirs"
    assert as_user(12345, lambda: theirs.mkdir(mode=0o700)) == ""
    with pytest.raises(AddressError, match="belongs to somebody else"):
        make_runtime_dir(theirs, shared=False)


def test_the_longest_path_and_one_byte_more(short):
    room = MAX_SOCKET_PATH - len(os.fsencode(short)) - 1
    longest = short / ("é" + "x" * (room - 2))
    with listen(longest, 0o600):
        assert answers(longest)
    too_long = short / ("x" * (room + 1))
    with (
        pytest.raises(AddressError, match=f"{too_long} is too long; Unix sockets allow 107 bytes"),
        listen(too_long, 0o600),
    ):
        pass
    assert not too_long.exists()


def test_a_folder_that_is_not_there(short):
    with (
        pytest.raises(AddressError, match=r"can't listen on .*a\.sock: No such file"),
        listen(short / "missing" / "a.sock", 0o600),
    ):
        pass


# --- the lock


def take_elsewhere(path: Path) -> subprocess.CompletedProcess[str]:
    """Another process takes the lock and is killed."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rootstockd.host.sockets import AddressError, lock\n"
        "try:\n"
        "    with lock(Path(sys.argv[1])):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "except AddressError as error:\n"
        "    sys.exit(str(error))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_lock_has_one_holder_who_is_named(short):
    path = short / "a.lock"
    with lock(path):
        assert path.read_text() == f"{os.getpid()}\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        second = take_elsewhere(path)
        assert second.returncode == 1
        assert f"a daemon already runs for {short}/a.sock (pid {os.getpid()})" in second.stderr
        assert "rootstockd stop" in second.stderr
        with pytest.raises(AddressError, match=rf"\(pid {os.getpid()}\)"), lock(path):
            pass
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()
    with lock(path):
        assert path.exists()


def test_the_lock_of_a_process_that_was_killed_is_free(short):
    path = short / "a.lock"
    done = take_elsewhere(path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_text() not in ("", f"{os.getpid()}\n")
    path.write_text("4194304\n")
    with lock(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_that_no_daemon_holds_is_called_so(short):
    """A process that may only read the file can have a lock for reading, and hold it when the daemon has died."""
    path = short / "a.lock"
    path.write_text("1\n")
    with path.open("rb") as file:
        reading = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, reading)
        with pytest.raises(AddressError, match=r"no daemon runs, but something that is none.*or remove the file"):
            lock(path).__enter__()
    with lock(path):
        pass


def test_a_lock_file_removed_under_its_holder_guards_nothing(short):
    """The lock is on the file that lies at the path, not on one that was removed; and that one's holder leaves it."""
    path = short / "a.lock"
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(lock(path))
        path.unlink()
        second.enter_context(lock(path))
        with pytest.raises(AddressError, match="already runs"), lock(path):
            pass
        first.close()
        with pytest.raises(AddressError, match="already runs"), lock(path):
            pass


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_file_removed_while_it_was_opened_is_made_anew(short, monkeypatch, another):
    """Its holder ended just then, and perhaps another daemon has made its own already."""
    path = short / "a.lock"
    control = fcntl.fcntl
    calls = []

    def meanwhile(fd: int, command: int, argument: bytes) -> object:
        if not calls:
            path.unlink()
            if another:
                path.write_text("")
        calls.append(command)
        return control(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", meanwhile)
    with lock(path):
        assert calls == [fcntl.F_OFD_SETLK] * 2
        assert path.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_lock_file_that_is_none_is_left_alone_and_named(short, kind):
    path = short / "a.lock"
    target = short / "precious"
    target.write_text("precious")
    match kind:
        case "link":
            path.symlink_to(target)
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
    with pytest.raises(AddressError, match=rf"{path}.*choose another --socket"), lock(path):
        pass
    assert target.read_text() == "precious"
    assert os.path.lexists(path)


@pytest.mark.parametrize("words", ["precious", "7\nprecious", "7", "7 8\n", " 7\n", "7\n\n", "\0", "1" * 40 + "\n"])
def test_a_lock_file_of_another_program_is_left_alone_and_named(short, words):
    path = short / "uv.lock"
    path.write_text(words)
    with pytest.raises(AddressError, match=f"{path} is not the lock file of a daemon of yours"), lock(path):
        pass
    assert path.read_text() == words


@as_root
def test_a_lock_file_of_somebody_else_is_left_alone_and_named(short):
    path = short / "a.lock"
    path.write_text("7\n")
    os.chown(path, 12345, -1)
    with pytest.raises(AddressError, match=f"{path} is not the lock file of a daemon of yours"), lock(path):
        pass
    assert path.read_text() == "7\n"


# --- the folder


def test_a_folder_is_made_for_its_owner_alone_to_write_to(short):
    old = os.umask(0)
    try:
        make_runtime_dir(short / "a" / "b", shared=False)
    finally:
        os.umask(old)
    assert stat.S_IMODE((short / "a" / "b").stat().st_mode) == 0o700, "who is not its owner does not even find it"
    assert stat.S_IMODE((short / "a").stat().st_mode) == 0o755, "nor puts another in its place"
    make_runtime_dir(short / "a" / "b", shared=False)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_others_may_write_to_is_refused(short, mode):
    short.chmod(mode)
    with pytest.raises(AddressError, match="they could impersonate the daemon"):
        make_runtime_dir(short, shared=False)
    short.chmod(0o700)
    make_runtime_dir(short, shared=False)


@as_root
def test_a_folder_of_somebody_else_is_refused(short):
    os.chown(short, 12345, -1)
    with pytest.raises(AddressError, match="belongs to somebody else"):
        make_runtime_dir(short, shared=False)


def test_a_link_to_a_folder_is_refused(short):
    """Whoever made the link could lead it elsewhere later."""
    (short / "real").mkdir(mode=0o700)
    (short / "link").symlink_to(short / "real")
    with pytest.raises(AddressError, match="they could impersonate the daemon"):
        make_runtime_dir(short / "link", shared=False)


def test_a_folder_that_can_not_be_made(short):
    (short / "file").write_text("")
    for folder in (short / "file", short / "file" / "below"):
        with pytest.raises(AddressError, match=f"can't make the folder {folder}"):
            make_runtime_dir(folder, shared=False)


# --- the claim on a GPU


def claim_elsewhere(uuid: str) -> subprocess.CompletedProcess[str]:
    """Another process claims the GPU and is killed."""
    script = (
        "import os, signal, sys\n"
        "from rootstockd.host.sockets import AddressError, claim_gpu\n"
        "try:\n"
        "    with claim_gpu(sys.argv[1]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "except AddressError as error:\n"
        "    sys.exit(str(error))\n"
    )
    return subprocess.run([sys.executable, "-c", script, uuid], capture_output=True, text=True, timeout=60, check=False)


def test_a_gpu_has_one_daemon_who_is_named():
    uuid = f"GPU-test-{os.getpid()}"
    with claim_gpu(uuid):
        for _ in range(2):
            second = claim_elsewhere(uuid)
            assert second.returncode == 1
            user = pwd.getpwuid(os.getuid()).pw_name
            assert f"a daemon already uses the GPU {uuid}: pid {os.getpid()} of {user}" in second.stderr
        with claim_gpu(uuid + "-another"):
            pass
    with claim_gpu(uuid):
        pass


def test_the_claim_of_a_process_that_was_killed_is_free():
    uuid = f"GPU-test-{os.getpid()}"
    assert claim_elsewhere(uuid).returncode == -signal.SIGKILL
    with claim_gpu(uuid):
        pass
