"""What is read from exceptions that say in words alone what went wrong."""

from __future__ import annotations

import errno

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
]
DISORDER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasDgemm(handle, ...)`"),
]
NEITHER = [
    RuntimeError("expected scalar type Float but found Double"),
    ValueError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
]


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
