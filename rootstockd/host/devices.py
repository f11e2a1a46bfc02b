"""Which devices this machine has, and what is in their memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pynvml

from rootstock_client.runtime_dir import JOB_VARIABLE
from rootstockd.settings.config import Device

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""What Slurm sets for jobs that asked for GPUs, beside others."""


class DeviceError(Exception):
    """A device that is not there: which, and what to do instead."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG instance: a part of one that is split."""

    uuid: str
    """Empty for one that does not answer."""
    name: str
    instances: tuple[Gpu, ...] = ()
    """What it is split into."""


@dataclass(frozen=True)
class Memory:
    """What is in a device's memory, in bytes."""

    total: int
    free: int
    by_pid: dict[int, int] = field(default_factory=dict)
    """What processes have; not there for those that the driver does not tell of, as in containers."""


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    """NVML, for a moment: as long as it is begun, no GPU of the machine can be reset or split."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def gpu_names() -> list[str]:
    """The names of the machine's NVIDIA GPUs, as the driver numbers them; empty where there is no driver."""
    return [gpu.name for gpu in find_gpus()]


def find_gpus() -> list[Gpu]:
    """The machine's NVIDIA GPUs, as the driver numbers them; none where there is no driver."""
    try:
        with _nvml():
            return list(_gpus())
    except pynvml.NVMLError:
        return []


def _gpus() -> Iterator[Gpu]:
    for i in range(pynvml.nvmlDeviceGetCount()):
        try:
            yield _gpu(pynvml.nvmlDeviceGetHandleByIndex(i))
        except pynvml.NVMLError as error:
            # one that is not this process's, as in a job that was given another, has no number in CUDA; one that is
            # lost keeps its own, or others would take it over
            if error.value != pynvml.NVML_ERROR_NO_PERMISSION:
                yield Gpu("", f"does not answer: {error}")


def _gpu(handle: object) -> Gpu:
    instances = []
    for instance in _instances(handle):
        with contextlib.suppress(pynvml.NVMLError):  # it does not answer
            instances.append(_gpu(instance))
    return Gpu(str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle)), tuple(instances))


def _instances(handle: object) -> list[object]:
    """NVML's handles of a GPU's MIG instances."""
    found: list[object] = []
    with contextlib.suppress(pynvml.NVMLError):  # it can't be split
        for i in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with contextlib.suppress(pynvml.NVMLError):  # there is none of this number
                found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))
    return found


def nvml_handle(uuid: str) -> object:
    """NVML's handle of a GPU or a MIG instance; some of the driver's numbers may be others', or lost.

    Raises:
        pynvml.NVMLError: there is none of this UUID, or it does not answer.
    """
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NOT_FOUND:
            raise
        # any GPU of the machine that is lost makes it fail, whichever was asked for
        for i in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):
                whole = pynvml.nvmlDeviceGetHandleByIndex(i)
                for handle in (whole, *_instances(whole)):
                    if pynvml.nvmlDeviceGetUUID(handle) == uuid:
                        return handle
        raise


def gpu_memory(uuid: str) -> Memory | None:
    """What is in the memory of a GPU or a MIG instance; None where the driver does not say."""
    try:
        with _nvml():
            handle = nvml_handle(uuid)
            info = pynvml.nvmlDeviceGetMemoryInfo(handle)
            processes = []
            with contextlib.suppress(pynvml.NVMLError):  # some virtual machines' drivers do not say
                processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return Memory(int(info.total), int(info.free), {p.pid: int(p.usedGpuMemory) for p in processes if p.usedGpuMemory})


def machine_memory() -> Memory:
    """What is in the machine's memory; what the kernel could give back at once is free."""
    memory = psutil.virtual_memory()
    return Memory(int(memory.total), int(memory.available))


def process_memory(pid: int) -> int | None:
    """Resident memory in bytes of a process and what it has started, without slots; None when it is gone.

    Pages of files that several of them have count for each.
    """
    total = _resident(pid)
    if total is None:
        return None
    started = deque(_children(pid))
    while started:
        child = started.popleft()
        total += _resident(child) or 0
        started += _children(child)
    return total


def _resident(pid: int) -> int | None:
    """Of one process. Its name, which is whatever it likes, is among the lines."""
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith((b"RssAnon:", b"RssFile:")))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it ends meanwhile, or the kernel does not say
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def visible_gpus(gpus: list[Gpu], variable: str | None) -> list[Gpu]:
    """The GPUs and MIG instances that a program sees under this value of CUDA_VISIBLE_DEVICES, in its order.

    As CUDA reads it: what is behind an entry that means nothing is not seen either. Numbers are the driver's.

    Args:
        gpus: those of the machine.
        variable: the value, None where it is not set.
    """
    if variable is None:
        return [part for gpu in gpus for part in gpu.instances or (gpu,)]
    seen: list[Gpu] = []
    for entry in filter(None, map(str.strip, variable.split(","))):
        found = [*gpus[int(entry) : int(entry) + 1]] if entry.isdigit() else _by_uuid(gpus, entry)
        if len(found) != 1 or found[0] in seen:
            break
        seen.append(next(iter(found[0].instances), found[0]))
    return seen


def seen_gpus() -> list[Gpu]:
    """The GPUs of this machine that a program sees that is started from here."""
    return visible_gpus(find_gpus(), os.environ.get(VISIBLE))


def _by_uuid(gpus: list[Gpu], uuid: str) -> list[Gpu]:
    """GPUs and MIG instances whose UUID begins so."""
    return [gpu for whole in gpus for gpu in (whole, *whole.instances) if gpu.uuid.startswith(uuid)]


def find_devices(devices: tuple[Device, ...], gpus: list[Gpu], variable: str | None) -> tuple[Device, ...]:
    """Devices with the UUIDs of those that were meant.

    Args:
        devices: as they were named. Those that have been found before are the same still.
        gpus: those of the machine.
        variable: the value of CUDA_VISIBLE_DEVICES, None where it is not set. A UUID goes before it.

    Raises:
        DeviceError: one is not there, or two are the same.
    """
    if all(device.uuid or device.kind == "cpu" for device in devices):
        return devices
    seen = visible_gpus(gpus, variable)
    found: list[Device] = []
    for device in devices:
        index = device.index
        matching = _by_uuid(gpus, device.name) if index is None else seen[index : index + 1]
        if len(matching) != 1:
            there = ", ".join(f"{i} ({gpu.name}, {gpu.uuid})" for i, gpu in enumerate(seen)) or "none"
            which = device.name if index is None else str(index)
            under = f" (with {VISIBLE}={variable})" if variable is not None else ""
            wrong = f"several GPUs begin with {which}" if matching else f"this machine has no GPU {which}"
            raise DeviceError(
                f"{wrong}; NVIDIA GPUs found{under}: {there}. "
                "`rootstockd doctor` looks for the reason. To compute on the CPU: `rootstockd start --device cpu`."
            )
        gpu = next(iter(matching[0].instances), matching[0])
        if not gpu.uuid:
            raise DeviceError(f"the GPU {device} {gpu.name}. `rootstockd doctor` looks for the reason.")
        if any(other.uuid == gpu.uuid for other in found):
            raise DeviceError(f"{device} and another of the devices are the same, {gpu.uuid} ({gpu.name}).")
        found.append(Device(name=device.name, uuid=gpu.uuid))
    return tuple(found)


def choose_devices(*, gpus: str | None = None, names: tuple[str, ...] = ()) -> tuple[Device, ...]:
    """The devices to use, found.

    Args:
        gpus: the GPUs that were asked for: numbers and UUIDs with commas between them, or `all` that answer.
        names: devices that were asked for. With neither, those of `default_names`.

    Raises:
        DeviceError: one that was asked for is not there.
        ValueError: what was asked for is no device.
    """
    if gpus == "all":
        names = _answering(seen_gpus()) or ("cuda:0",)
    elif gpus is not None:
        names = tuple(f"cuda:{name}" if name.isdigit() else name for name in map(str.strip, gpus.split(",")))
    elif not names:
        names = default_names(find_gpus(), os.environ)
        if names == ("cpu",) and (lacking := hidden_driver(os.environ)):
            raise DeviceError(lacking)
    return found_devices(tuple(Device(name=name) for name in names))


def default_names(gpus: list[Gpu], variables: Mapping[str, str]) -> tuple[str, ...]:
    """The devices of whoever names none: the first GPU, in a Slurm job all that it has, or the CPU where there is none.

    Those that do not answer are left out.

    Args:
        gpus: those of the machine.
        variables: the environment.
    """
    names = _answering(visible_gpus(gpus, variables.get(VISIBLE))) or ("cpu",)
    return names if JOB_VARIABLE in variables and VISIBLE in variables else names[:1]


def _answering(seen: list[Gpu]) -> tuple[str, ...]:
    return tuple(f"cuda:{i}" for i, gpu in enumerate(seen) if gpu.uuid)


def hidden_driver(variables: Mapping[str, str], loaded: Path = Path("/proc/driver/nvidia/version")) -> str:
    """What is wrong where a program was given GPUs, and NVML has none: it had better not compute on the CPU.

    Args:
        variables: the environment.
        loaded: what is there while the kernel has NVIDIA's driver.
    """
    given = variables.get(VISIBLE, "")
    if given in {"", "-1", "NoDevFiles"} or not loaded.exists():  # without a driver it may be meant for other GPUs
        return ""
    try:
        with _nvml():
            said = "and NVML has none of these"
    except pynvml.NVMLError as error:
        said = f"and NVML says: {error}"
    return (
        f"{VISIBLE} is {given}, {said}. `rootstockd doctor` looks for the reason. "
        "To compute on the CPU: `rootstockd start --device cpu`."
    )


def found_devices(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """Devices by their names, with what this machine knows of them.

    Raises:
        DeviceError: one is not there.
    """
    if all(device.kind == "cpu" for device in devices):
        return devices
    make_device_files()
    return find_devices(devices, find_gpus(), os.environ.get(VISIBLE))


def make_device_files(uvm: Path = Path("/dev/nvidia-uvm")) -> None:
    """Have made what the first use of CUDA since the machine started makes: a confined worker can't do that."""
    if not uvm.exists() and (command := shutil.which("nvidia-modprobe")):
        subprocess.run([command, "-u", "-c", "0"], check=False, capture_output=True, timeout=60)
