"""The node: processors, memory, limits, and what the kernel has for confining workers."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rootstockd.doctor.findings import Finding, note, ok, problem, warning
from rootstockd.host.descriptors import share_descriptors
from rootstockd.worker import landlock
from rootstockd.worker.memory import control_group_memory, control_groups

FEW_SESSIONS = 200
WORKER_MEMORY = 10**9
"""Bytes that a worker takes at the least, with torch in it and something to do."""
LITTLE_SHARED = 64 * 2**20
SMALL_FILES = 2**30
"""A slot is a file in memory: one of ten million atoms has 0.8 GB."""

_LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "address space": resource.RLIMIT_AS,
    "data": resource.RLIMIT_DATA,
    "file size": resource.RLIMIT_FSIZE,
    "processes": resource.RLIMIT_NPROC,
}
UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Machine:
    """What a node has for a process like this one."""

    architecture: str = "x86_64"
    flags: frozenset[str] = frozenset()
    """Instruction sets, as /proc/cpuinfo names them."""
    cores: int = 1
    """Processors that this process may run on."""
    quota: float | None = None
    """How many processors' time its control group may use, if that is limited."""
    free: int = 0
    """Bytes of memory that it could still have."""
    memory_limit: int | None = None
    """Bytes that its control group may have."""
    shared: tuple[int, int] | None = None
    """Size of /dev/shm and what is free, in bytes."""
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Soft and hard ones, by the names above; -1 for none."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The environment's."""
    landlock: int = 0
    """The ABI, 0 for none."""
    seccomp: bool = False
    release: str = ""
    """The kernel's."""


def look_at_machine() -> Machine:
    """The one this runs on."""
    groups = list(control_groups())
    quotas = [quota for group in groups if (quota := _quota(group)) is not None]
    memory = [(limit, limit - used) for group in groups for limit, used in control_group_memory(group)]
    shared = None
    if os.path.isdir("/dev/shm"):  # noqa: S108, PTH112 - it is looked at
        space = os.statvfs("/dev/shm")  # noqa: S108
        shared = (space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize)
    return Machine(
        architecture=platform.machine(),
        flags=_flags(),
        cores=len(os.sched_getaffinity(0)),
        quota=min(quotas, default=None),
        free=min([psutil.virtual_memory().available, *(rest for _, rest in memory)]),
        memory_limit=min((limit for limit, _ in memory), default=None),
        shared=shared,
        limits={name: resource.getrlimit(number) for name, number in _LIMITS.items()},
        variables=dict(os.environ),
        landlock=landlock.abi(),
        seccomp=Path("/proc/sys/kernel/seccomp").is_dir(),
        release=platform.release(),
    )


def _flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def _quota(group: Path) -> float | None:
    """Processors' time, from cpu.max: microseconds, or max, in each period."""
    try:
        time, period = (group / "cpu.max").read_text().split()
        return int(time) / int(period)
    except (OSError, ValueError):  # there is no such file in the root; max is no number
        return None


# --- judging


def check_machine(machine: Machine) -> Iterator[Finding]:
    """All that there is to say of a machine."""
    yield from check_processors(machine)
    yield from check_memory(machine)
    yield from check_limits(machine)
    yield from check_variables(machine)
    yield from check_confinement(machine)


def check_processors(machine: Machine) -> Iterator[Finding]:
    """Instruction sets, and how many there are."""
    of = f"{machine.cores} processors ({machine.architecture})"
    if machine.quota is not None and machine.quota < machine.cores:
        threads = max(1, int(machine.quota))
        yield warning(
            "processors",
            f"{of}, but the control group allows the time of {machine.quota:g}",
            "Programs start a thread for each processor; all of them are stopped again and again.",
            f"export OMP_NUM_THREADS={threads}",
        )
    elif machine.architecture == "x86_64" and "avx2" not in machine.flags:
        yield warning(
            "processors",
            f"{of}, without AVX2",
            "torch and numba compute several times more slowly than on any processor since 2015. A virtual machine may "
            "hide what its host has.",
        )
    else:
        yield ok("processors", of)


def check_memory(machine: Machine) -> Iterator[Finding]:
    """Memory, and shared memory."""
    limit = f" of the {gigabytes(machine.memory_limit)} that its control group may have" if machine.memory_limit else ""
    free = f"{gigabytes(machine.free)} are free{limit}"
    if machine.free < WORKER_MEMORY:
        advice = "Ask Slurm for more, such as --mem=8G." if "SLURM_JOB_ID" in machine.variables else ""
        yield problem("memory", free, "A worker with torch takes 0.6 GB before it has anything to do.", advice=advice)
    else:
        yield ok("memory", free)
    size, rest = machine.shared or (0, LITTLE_SHARED)
    if rest < LITTLE_SHARED:
        yield warning(
            "shared memory",
            f"{rest / 1e6:.0f} MB left of {gigabytes(size)} in /dev/shm",
            "rootstockd does not need it, but CUDA, torch and MPI do.",
            "ls -lS /dev/shm",
        )


def check_limits(machine: Machine) -> Iterator[Finding]:
    """What `ulimit` says. A daemon raises its own soft limits to the hard ones."""
    everywhere = "systemd: LimitNOFILE=; login: /etc/security/limits.conf; Slurm: PropagateResourceLimits"
    _, files = machine.limits.get("open files", (UNLIMITED, UNLIMITED))
    sessions = share_descriptors(files)[0]
    if files != UNLIMITED and sessions < FEW_SESSIONS:
        yield warning(
            "open files",
            f"at most {files} (ulimit -Hn), enough for {sessions} sessions",
            "Each session takes up to three; those that do not fit are refused.",
            advice=f"As root, raise it to 65536 ({everywhere}).",
        )
    else:
        yield ok("open files", "no limit" if files == UNLIMITED else f"{files}, enough for {sessions} sessions")
    for name, letter in (("address space", "v"), ("data", "d")):
        if (soft := machine.limits.get(name, (UNLIMITED, UNLIMITED))[0]) != UNLIMITED:
            yield warning(
                name,
                f"limited to {gigabytes(soft)} (ulimit -{letter})",
                "CUDA reserves more than it uses, and fails; on a CPU large structures do.",
                f"ulimit -{letter} unlimited",
            )
    if UNLIMITED != (soft := machine.limits.get("file size", (UNLIMITED, UNLIMITED))[0]) < SMALL_FILES:
        yield problem(
            "file size",
            f"limited to {soft / 1e6:.1f} MB (ulimit -f)",
            "It holds for structures in memory, too, and for downloads: writing beyond it kills a process.",
            "ulimit -f unlimited",
        )
    threads = machine.limits.get("processes", (UNLIMITED, UNLIMITED))[0]
    if threads != UNLIMITED and threads < 256 + 4 * machine.cores:
        yield warning(
            "processes",
            f"at most {threads} for each user, threads included (ulimit -u)",
            "Each worker has a thread for each processor.",
            "ulimit -u $(ulimit -Hu)",
        )


def check_variables(machine: Machine) -> Iterator[Finding]:
    """Variables that change speed or numbers."""
    said = machine.variables
    available = min(machine.cores, machine.quota or machine.cores)
    if "OMP_NUM_THREADS" not in said:
        yield note(
            "threads",
            "OMP_NUM_THREADS is not set",
            "Right for a daemon. In a job numpy's threads get in the way of the workers.",
            "export OMP_NUM_THREADS=1",
            "In job scripts, not for a daemon.",
        )
    elif said["OMP_NUM_THREADS"] == "1":
        yield ok(
            "threads",
            "OMP_NUM_THREADS is 1: right for a job. A daemon that computes on CPUs, also after a `restart` from here, "
            "would have workers of one thread: unset it for that",
        )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = said.get(name, "").partition(",")[0]
        if value.isdecimal() and int(value) > available:
            yield warning(
                "threads",
                f"{name} is {value}, on {available:g} processors",
                "Threads that wait for a processor make the others wait, too.",
                f"export {name}={max(1, int(available))}",
            )
    for (name, bad), why in _HARMFUL.items():
        if name in said and (bad is None or said[name].lower() == bad):
            yield warning("environment", f"{name} is {said[name]!r}", why, f"unset {name}")


_PINNED = "Every worker and job binds its threads to the same processors, and they share these."
_HARMFUL: dict[tuple[str, str | None], str] = {
    ("OMP_PROC_BIND", "true"): _PINNED,
    ("OMP_PROC_BIND", "close"): _PINNED,
    ("GOMP_CPU_AFFINITY", None): _PINNED,
    ("OMP_WAIT_POLICY", "active"): "Threads without work keep their processors busy.",
    ("KMP_BLOCKTIME", "infinite"): "Threads without work keep their processors busy.",
    ("CUDA_LAUNCH_BLOCKING", "1"): "The processor waits for each of the GPU's kernels: for debugging only.",
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"): "Each step asks the driver for its memory anew.",
}
"""Variables and their values (any, if None) that do harm."""


def check_confinement(machine: Machine) -> Iterator[Finding]:
    """Whether the kernel can keep workers from what they do not need."""
    lacking = []
    if not machine.landlock:
        lacking.append(landlock.NONE)
    if not machine.seccomp or machine.architecture not in {"x86_64", "aarch64"}:
        lacking.append("there is no filter of system calls")
    if lacking:
        yield warning(
            "confinement",
            "; ".join(lacking),
            "A model file is code; a malicious one could do what the daemon's user can (SECURITY.md).",
            advice="A kernel from 5.13 on, with landlock among lsm= on its command line; this is "
            f"{machine.release or 'an older one'}. Until then use only models that you trust.",
        )
    else:
        yield ok("confinement", f"Landlock (ABI {machine.landlock}) and seccomp")


def gigabytes(size: int) -> str:
    """Bytes, in GB."""
    return f"{size / 1e9:.1f} GB"
