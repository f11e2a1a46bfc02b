"""Which devices this machine has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pynvml

from rootstockd.config import Device


class DeviceError(Exception):
    """A device that is not there: which, and what to do instead."""


def gpu_names() -> list[str]:
    """The names of the machine's NVIDIA GPUs, as the driver numbers them; empty where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
    finally:
        pynvml.nvmlShutdown()


def gpu_uuid(index: int) -> str:
    """What tells a GPU from all others, however they are numbered.

    Raises:
        DeviceError: it is not there.
    """
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise DeviceError(f"GPU {index} can't be asked who it is: {error}.") from error


def choose_device(*, gpu: int | None = None, cpu: bool = False) -> Device:
    """The device to use.

    Args:
        gpu: the GPU that was asked for, if one was.
        cpu: the CPU was asked for. With neither, the first GPU if there is one, and the CPU otherwise.

    Raises:
        DeviceError: the GPU that was asked for is not there.
    """
    if cpu:
        return Device(kind="cpu")
    names = gpu_names()
    if gpu is None and not names:
        return Device(kind="cpu")
    if (gpu or 0) < len(names):
        make_device_files()
        return Device(kind="cuda", index=gpu or 0)
    found = ", ".join(f"{i} ({name})" for i, name in enumerate(names)) or "none"
    raise DeviceError(
        f"this machine has no GPU {gpu}; NVIDIA GPUs found: {found}. "
        "To compute on the CPU instead: `rootstockd start --device cpu`."
    )


def make_device_files(uvm: Path = Path("/dev/nvidia-uvm")) -> None:
    """Have made what the first use of CUDA since the machine started makes: a confined worker can't do that."""
    if not uvm.exists() and (command := shutil.which("nvidia-modprobe")):
        subprocess.run([command, "-u", "-c", "0"], check=False, capture_output=True, timeout=60)
