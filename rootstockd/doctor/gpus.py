"""NVIDIA's driver and GPUs, and whether a build of PyTorch goes with them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pynvml

from rootstockd.doctor.findings import Finding, note, ok, problem, warning
from rootstockd.doctor.machine import gigabytes
from rootstockd.host.devices import VISIBLE, Gpu, find_gpus, nvml_handle, visible_gpus

WORKER_MEMORY = 2 * 10**9
"""Bytes below which hardly a model fits."""
_VOLTA, _TURING, _BLACKWELL = (7, 0), (7, 5), (10, 0)
"""Compute capabilities. PyTorch's builds have code for up to Hopper's (9.0) as of CUDA 12.6 and before, from Turing to
Blackwell as of CUDA 12.8 and later; as of CUDA 12.8 before PyTorch 2.11 also for Volta (pytorch/pytorch#172352)."""
_AS_ROOT = "sudo "


@dataclass(frozen=True)
class GpuState:
    """How a GPU is set."""

    index: int
    name: str
    compute_mode: str = "default"
    """default, exclusive or prohibited."""
    persistent: bool = True
    mig: bool = False
    instances: int = 0
    """Of MIG."""
    total: int = 0
    free: int = 0
    """Bytes."""
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Driver:
    """What NVML and the kernel say."""

    hardware: bool
    """There is a GPU of NVIDIA's on the bus."""
    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    """The newest CUDA that the driver knows."""
    gpus: tuple[GpuState, ...] = ()
    silent: tuple[str, ...] = ()
    """GPUs that do not answer, by number, and what NVML says of each."""
    failure: str = ""
    """Why NVML says nothing."""
    closed: tuple[str, ...] = ()
    """Device files that this user may not open."""
    mps: bool = False
    """NVIDIA's MPS answers: processes compute through it."""
    visible: tuple[str | None, int] = (None, 0)
    """CUDA_VISIBLE_DEVICES, and how many GPUs that leaves."""


def look_at_driver() -> Driver:
    """The one of this machine."""
    hardware = any(map(_is_gpu, Path("/sys/bus/pci/devices").glob("*"))) or Path("/proc/driver/nvidia/version").exists()
    closed = tuple(str(path) for path in _device_files() if not os.access(path, os.R_OK | os.W_OK))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(hardware, failure=str(error), closed=closed)
    with contextlib.ExitStack() as stack:
        stack.callback(pynvml.nvmlShutdown)
        try:
            number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
            found = find_gpus()
            version = str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError as error:
            return Driver(hardware, failure=str(error), closed=closed)
        states, silent = [], []
        for i, gpu in enumerate(found):
            if not gpu.uuid:
                silent.append(f"GPU {i} {gpu.name}")
                continue
            try:
                states.append(_state(i, gpu))
            except pynvml.NVMLError as error:  # of this one alone
                silent.append(f"GPU {i} does not answer: {error}")
    seen = visible_gpus(found, os.environ.get(VISIBLE))
    cuda = (number // 1000, number % 1000 // 10)
    value = os.environ.get(VISIBLE)
    return Driver(hardware, version, cuda, tuple(states), tuple(silent), "", closed, _mps_answers(), (value, len(seen)))


def _mps_answers() -> bool:
    """NVIDIA's MPS listens where CUDA looks for it."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control"  # noqa: S108 - its default
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(1)
        sock.connect(str(control))
        return True
    return False


def _is_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")


def _device_files() -> list[Path]:
    return [path for path in Path("/dev").glob("nvidia*") if path.is_char_device() and "modeset" not in path.name]


def _state(index: int, gpu: Gpu) -> GpuState:
    handle = nvml_handle(gpu.uuid)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    mode = "default"
    persistent, mig = True, False
    with contextlib.suppress(pynvml.NVMLError):  # not every GPU has each of these
        number = pynvml.nvmlDeviceGetComputeMode(handle)
        mode = {pynvml.NVML_COMPUTEMODE_DEFAULT: "default", pynvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited"}.get(
            number, "exclusive"
        )
    with contextlib.suppress(pynvml.NVMLError):
        persistent = bool(pynvml.nvmlDeviceGetPersistenceMode(handle))
    with contextlib.suppress(pynvml.NVMLError):
        mig = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return GpuState(
        index,
        gpu.name,
        mode,
        persistent,
        mig,
        len(gpu.instances),
        int(memory.total),
        int(memory.free),
        (int(major), int(minor)),
    )


# --- judging


def check_driver(driver: Driver) -> Iterator[Finding]:
    """Whether there is one, and whether it may be used."""
    if driver.failure:
        yield _no_driver(driver)
        return
    count = f"{len(driver.gpus)} GPU{'' if len(driver.gpus) == 1 else 's'}"
    found = f"{count}, driver {driver.version}, for CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    value, seen = driver.visible
    if not driver.gpus:
        yield problem("driver", found, "There is nothing to compute on.", "nvidia-smi -L")
    elif not seen:
        yield warning(
            "driver",
            f"{found}; {VISIBLE}={value} hides them all",
            "`start` takes the CPU, and refuses --gpu.",
            f"unset {VISIBLE}",
            "Or in a Slurm job ask for a GPU: --gpus=1.",
        )
    else:
        yield ok("driver", f"{found}{f'; {VISIBLE} shows {seen}' if value is not None else ''}")
    if driver.silent:
        yield problem(
            "driver",
            "; ".join(driver.silent),
            "Models go to other GPUs, if there are any.",
            f"{_AS_ROOT}dmesg | grep -i xid",
            f"It tells what happened. When nobody uses the GPU: {_AS_ROOT}nvidia-smi --gpu-reset, or reboot.",
        )
    if driver.closed:
        yield problem(
            "device files",
            f"no permission to open {', '.join(driver.closed)}",
            "CUDA can't be used.",
            advice="In a Slurm job ask for a GPU: --gpus=1. Elsewhere, as root: chmod a+rw /dev/nvidia*, or add the "
            "user to their group.",
        )


def _no_driver(driver: Driver) -> Finding:
    if not driver.hardware:
        return ok("driver", "no NVIDIA GPU here; models compute on the CPU")
    if "mismatch" in driver.failure.lower():
        return problem(
            "driver",
            f"NVML: {driver.failure}",
            "The driver was upgraded, and the kernel still has the old one. Programs that begin to use a GPU fail.",
            f"{_AS_ROOT}reboot",
        )
    return warning(
        "driver",
        f"there is an NVIDIA GPU, and NVML says: {driver.failure}",
        "`start` takes the CPU, and refuses --gpu.",
        "nvidia-smi",
        "If that fails too, install the driver. In a container: docker run --gpus all, apptainer --nv.",
    )


def check_gpus(driver: Driver) -> Iterator[Finding]:
    """How each GPU is set."""
    for gpu in driver.gpus:
        name = f"GPU {gpu.index}"
        sound = True
        if gpu.mig and not gpu.instances:
            sound = False
            yield problem(
                name,
                f"{gpu.name}: split by MIG, and has no instances",
                "Nothing can be computed on it.",
                f"{_AS_ROOT}nvidia-smi mig -i {gpu.index} -lgip",
                f"It lists profiles; make instances of one with -cgi PROFILE -C. Or end the split: {_AS_ROOT}"
                f"nvidia-smi -i {gpu.index} -mig 0",
            )
        if gpu.compute_mode == "prohibited":
            sound = False
            yield problem(
                name,
                f"{gpu.name}: its compute mode lets nobody compute",
                "Every model fails to load.",
                f"{_AS_ROOT}nvidia-smi -i {gpu.index} -c DEFAULT",
            )
        elif gpu.compute_mode == "exclusive" and not driver.mps:
            sound = False
            yield warning(
                name,
                f"{gpu.name}: its compute mode lets one process compute at a time",
                "Each model has a process of its own: a second model, or a replica, fails to load.",
                f"{_AS_ROOT}nvidia-smi -i {gpu.index} -c DEFAULT",
                "Or have the models share it through MPS (docs/devices.md).",
            )
        if not gpu.mig and gpu.free < WORKER_MEMORY:
            sound = False
            yield warning(
                name,
                f"{gpu.name}: {gigabytes(gpu.free)} free of {gigabytes(gpu.total)}",
                "Models wait until there is room. (A daemon's own models count: see `rootstockd status`.)",
                "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
            )
        if not gpu.persistent:
            sound = False
            yield note(
                name,
                f"{gpu.name}: persistence mode is off",
                "Whoever is first on an idle GPU waits some seconds for the driver.",
                f"{_AS_ROOT}systemctl enable --now nvidia-persistenced",
            )
        if sound:
            split = f", {gpu.instances} MIG instances" if gpu.mig else ""
            yield ok(name, f"{gpu.name}, {gigabytes(gpu.free)} free of {gigabytes(gpu.total)}{split}")


def check_flavour(where: str, torch: str, cuda: tuple[int, int] | None, driver: Driver, mend: str) -> Iterator[Finding]:
    """Whether a build of PyTorch can use the GPUs.

    NVIDIA promises that a driver for CUDA 12.0 runs programs of any CUDA 12, unless they bring code that it has to
    compile (PTX).

    Args:
        where: the environment.
        torch: PyTorch's version.
        cuda: the CUDA that it was built for; None for one without.
        driver: the machine's.
        mend: the command that gets another build.
    """
    if not driver.gpus:
        return
    if cuda is None:
        yield warning(
            where, f"torch {torch} is a build without CUDA", "Its workers can't compute on this node's GPUs.", mend
        )
        return
    built = f"torch {torch} is built for CUDA {cuda[0]}.{cuda[1]}"
    knows = f"the driver {driver.version} knows CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    found = sorted(driver.gpus, key=lambda gpu: gpu.capability)
    old, new = found[0], found[-1]
    if cuda[0] > driver.cuda[0]:
        yield problem(where, f"{built}, and {knows}", "Its workers can't compute on this node's GPUs.", mend)
    elif cuda >= (13, 0) and old.capability < _TURING:
        yield problem(where, *_no_code(built, "has", old), mend.replace("auto", "cu126"))
    elif cuda >= (12, 8) and old.capability < _TURING:
        some = old.capability >= _VOLTA
        yield (warning if some else problem)(
            where, *_no_code(built, "may have" if some else "has", old), mend.replace("auto", "cu126")
        )
    elif cuda < (12, 8) and new.capability >= _BLACKWELL:
        yield problem(where, *_no_code(built, "has", new), mend)
    elif cuda > driver.cuda:
        yield note(where, f"{built}, and {knows}", "Kernels that are compiled at run time may fail.", mend)


def _no_code(built: str, has: str, gpu: GpuState) -> tuple[str, str]:
    major, minor = gpu.capability
    what = f"{built}, which {has} no code for {gpu.name} (compute capability {major}.{minor})"
    return what, "Its workers can't compute on that GPU."
