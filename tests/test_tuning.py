"""Variables that workers are started with."""

import os
import subprocess
import sys

import pytest

from rootstockd.processes.worker_process import TUNING, mmap_threshold

ALLOCATES = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_size_t * 10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(2):
    before = libc.mallinfo2().numbers[3]
    blocks = [libc.malloc(ctypes.c_size_t(10 << 20)) for _ in range(40)]
    print(libc.mallinfo2().numbers[3] - before)
    for block in blocks:
        libc.free(block)
"""

LACKS = """
import ctypes, resource, threading
from pathlib import Path
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def data():
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
limit = data() + (1 << 30)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
def fail():
    assert libc.malloc(ctypes.c_size_t(1 << 31)) is None
def fail_in_threads():
    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
fail_in_threads()  # what threads themselves need is there
before = data()
for _ in range(20):
    fail()
    fail_in_threads()
print(data() - before)
"""


def test_memory_that_lacks_leaves_nothing_behind():
    """The C library tries heaps of other threads where memory lacks, and they stay: then less and less fits."""
    done = subprocess.run(
        [sys.executable, "-c", LACKS], env={**os.environ, **TUNING}, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**26


def test_arrays_stay_in_the_heap():
    """Whatever this machine's C library takes for too much: a mapping for each would be new pages at each step."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATES], env={**os.environ, **TUNING}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "0"]


@pytest.mark.parametrize(
    ("libc", "most"),
    [
        ("glibc 2.28", 2**25),
        ("glibc 2.34", 2**25),
        ("glibc 2.36", 2**30),
        ("glibc 2.41.9000", 2**30),
        ("musl 1.2.5", 2**25),
        ("", 2**25),
        (None, 2**25),
    ],
)
def test_the_threshold_is_one_that_the_library_takes(libc, most):
    assert mmap_threshold(libc) == most
