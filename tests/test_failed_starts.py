"""When a model whose workers end at once is tried again, and when it is broken."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from rootstockd.processes.ends import End
from rootstockd.processes.folders import FolderError
from rootstockd.supervision.failed_starts import MAX_BLAMED, MAX_HUNG, MAX_KILLED, PAUSES, FailedStarts
from rootstockd.supervision.workers import is_shortage

CRASH = End("signal 11 (SIGSEGV)", blamed=True)
KILLED = End("signal 9 (SIGKILL)", blamed=False, signalled=True)
HUNG = End("it hung", blamed=True, hung=True)


NO_THREAD = """
import resource, threading
threading.stack_size(2**30)
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
try:
    threading.Thread(target=print).start()
except Exception as error:
    print(type(error).__name__, error, sep=":", end="")
"""


def test_what_the_machine_lacks_is_no_doing_of_the_models() -> None:
    done = subprocess.run([sys.executable, "-c", NO_THREAD], capture_output=True, text=True, check=True, timeout=60)
    kind, _, words = done.stdout.partition(":")
    assert kind == "RuntimeError" and is_shortage(RuntimeError(words))
    for number in (errno.EMFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC):
        assert is_shortage(OSError(number, os.strerror(number)))
    assert is_shortage(MemoryError())
    for number in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE):
        assert is_shortage(FolderError(number, os.strerror(number)))
    assert not is_shortage(FileNotFoundError(errno.ENOENT, "No such file"))  # its interpreter's
    assert not is_shortage(RuntimeError("its own fault"))


@pytest.mark.parametrize(
    ("end", "times", "words"),
    [
        (CRASH, MAX_BLAMED, "5 workers ended before they were ready: signal 11 .SIGSEGV., 5 times.*rootstockd logs"),
        (HUNG, MAX_HUNG, "2 workers ended before they were ready: it hung, 2 times"),
        (KILLED, MAX_KILLED, "60 workers ended .*: signal 9 .SIGKILL., 60 times.*from outside.*dmesg.*tried again"),
    ],
)
def test_a_model_is_broken_after_so_many(end: End, times: int, words: str) -> None:
    starts = FailedStarts("m")
    for _ in range(times):
        assert starts.verdict() is None
        starts.add(end)
    with pytest.raises(Exception, match=f"(?s){words}"):
        raise starts.verdict() or AssertionError
    starts.forget()
    assert starts.verdict() is None and starts.pause == 0


def test_signals_from_outside_are_not_counted_with_crashes() -> None:
    starts = FailedStarts("m")
    for _ in range(MAX_BLAMED - 1):
        starts.add(KILLED)
        starts.add(CRASH)
    assert starts.verdict() is None
    starts.add(CRASH)
    assert "5 workers" in str(starts.verdict()) and "SIGKILL" not in str(starts.verdict())


def test_whoever_kills_for_minutes_is_outlasted() -> None:
    starts, seconds, pauses = FailedStarts("m"), 0.0, []
    while starts.verdict() is None:
        pauses.append(starts.pause)
        seconds += starts.pause
        starts.add(KILLED)
    assert seconds > 8 * 60 and pauses == sorted(pauses) and max(pauses) == PAUSES[-1]
