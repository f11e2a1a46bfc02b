"""What is read from exceptions that say in words alone what went wrong."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from rootstockd.worker.failures import in_disorder, out_of_memory

LACK = [
    MemoryError("Unable to allocate 12.3 GiB for an array with shape (40000, 40000) and data type float64"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
    ),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1090'),
    RuntimeError("std::bad_alloc"),
    OSError("/opt/env/lib/libllvmlite.so: cannot map zero-fill pages"),
    ImportError("_generator.cpython-311-x86_64-linux-gnu.so: failed to map segment from shared object"),
    SystemError("<built-in function exec> returned NULL without setting an exception"),
]
DISORDER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasDgemm(handle, ...)`"),
]
NEITHER = [
    RuntimeError("expected scalar type Float but found Double"),
    ValueError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    ImportError("libllvmlite.so: undefined symbol: LLVMPY_Create"),
    SystemError("bad argument to internal function"),
]
IN_LITTLE = """
import resource, sys
import numpy
from rootstockd.worker.failures import describe, out_of_memory, shortage
(data,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + int(sys.argv[1]),) * 2)
try:
    import numba
except BaseException as error:
    print(out_of_memory(error), shortage(error) or describe(error))
else:
    print("imported")
"""
"""Import numba with so many bytes beside what there is."""


@pytest.mark.parametrize("error", LACK, ids=str)
def test_memory_lacked(error: Exception) -> None:
    assert out_of_memory(error)
    assert not in_disorder(error), "a process that lacked memory goes on"


@pytest.mark.parametrize("error", DISORDER, ids=str)
def test_cuda_is_in_disorder(error: Exception) -> None:
    assert in_disorder(error) and not out_of_memory(error)


@pytest.mark.parametrize("error", NEITHER, ids=str)
def test_others_are_as_they_are(error: Exception) -> None:
    assert not in_disorder(error) and not out_of_memory(error)


def test_a_library_that_lacks_memory_when_it_is_imported() -> None:
    """Whatever it or Python makes of it."""
    said = set()
    for mebibytes in range(1, 13):
        command = [sys.executable, "-c", IN_LITTLE, str(mebibytes * 2**20)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "permissions" not in ran.stdout, "the package's words, which are wrong"
        said.update(ran.stdout.split()[:1])  # one that is ended by a library of C++ says nothing
    assert {"True"} <= said <= {"True", "imported"}
