"""Where the time of a step goes: py-spy on daemon, worker and client, `python -m benchmarks.profile_step OUTPUT`.

It needs py-spy (`pip install py-spy`), and to be root or whoever may trace these processes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks import machine
from benchmarks.common import Child, Daemon, Settings, contestants, use_cpus
from benchmarks.scale import LOAD

RATE = 1_000
"""Samples a second."""
SECONDS = 8
NATOMS, SCALE_NATOMS = 1_000, 64
IDLE, ACTIVE = 100, 50
MOST, LEAST = 16, 0.4
"""Functions shown, and the percentage below which none is."""
_OURS = "rootstock_client/", "rootstockd/", "benchmarks/"

HEAD = f"""\
{{day}}, commit {{commit}}, {{host}}, Python {{python}}, no-op engine.
The way of a step under py-spy ({RATE} samples/s, native frames; a thread that waits counts where the kernel says that
it runs). "ipc": one session, {NATOMS:,} atoms, Connection.evaluate in a loop, all processes on one CPU. "scale":
{IDLE} idle and {ACTIVE} active sessions of {SCALE_NATOMS} atoms, on all CPUs. Sampling slows what it looks at: shares,
not times. CPU times are of runs without it.
"""


def main() -> None:
    """Profile both, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(quick=False, device="cpu", folder=Path(folder), rootstock=None)
        scale = _scale(settings)
        ipc = _ipc(settings)
    hardware = machine.hardware(use_cpus(1))
    day = dt.datetime.now().astimezone().date()
    head = HEAD.format(host=hardware["cpu"], python=platform.python_version(), commit=machine.commit(), day=day)
    output.write_text(head + "".join([*ipc, *scale]))


def _ipc(settings: Settings) -> list[str]:
    use_cpus(1)
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(settings, "--model", "noop"))
        arm = Child(settings, "wire", socket=daemon.socket, model="noop")
        child = stack.enter_context(contestants([arm]))["wire"]
        child.system(NATOMS)
        pids = {"daemon": daemon.pid, "worker": daemon.worker("noop"), "client": child.pids[0]}
        return _looked_at("ipc", pids, child, "seconds", settings.folder)


def _scale(settings: Settings) -> list[str]:
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(settings, "--model", "noop"))
        arm = Child(settings, "rootstockd", script=LOAD, socket=daemon.socket, model="noop")
        child = stack.enter_context(contestants([arm]))["rootstockd"]
        child.ask(do="connect", idle=IDLE, active=ACTIVE, natoms=SCALE_NATOMS)
        pids = {"daemon": daemon.pid, "worker": daemon.worker("noop"), "load generator": child.pids[0]}
        return _looked_at("scale", pids, child, "latencies", settings.folder)


def _looked_at(name: str, pids: dict[str, int], child: Child, steps: str, folder: Path) -> list[str]:
    """What each process does while the child is at it; before that, how much CPU time each takes for a step."""
    before = {who: cpu_time(pid) for who, pid in pids.items()}
    done = len(child.ask(do="run", seconds=SECONDS)[steps])
    used = ", ".join(f"{who} {(cpu_time(pid) - before[who]) / done / 1e3:.0f} us" for who, pid in pids.items())
    parts = [f"\n== {name}: CPU time of a step: {used}\n"]
    for who, pid in pids.items():
        raw = folder / f"{name}-{who}"
        child.tell(do="run", seconds=SECONDS + 4)
        command = ["py-spy", "record", "--pid", str(pid), "--format", "raw", "--output", str(raw), "--native"]
        command += ["--function", "--full-filenames", "--rate", str(RATE), "--duration", str(SECONDS)]
        subprocess.run(command, check=True, capture_output=True)
        child.answer()
        parts.append(f"\n== {name}, {who}: {shares(raw.read_text())}")
    return parts


def cpu_time(pid: int) -> int:
    """Nanoseconds that a process's first thread has run; the kernel's accounting is finer than a tick."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def shares(raw: str) -> str:
    """The functions in which a process was, by themselves and with what they called."""
    whole: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [_short(frame) for frame in stack.split(";")]
        whole.update(dict.fromkeys(frames, int(count)))
        alone[frames[-1]] += int(count)
    total = alone.total()
    ours = Counter({frame: count for frame, count in whole.items() if any(f"({where}" in frame for where in _OURS)})
    lists = [("with what it calls, Python functions of ours", ours), ("by itself, all functions", alone)]
    shown = [f"  {title}:\n{_lines(counts, total)}" for title, counts in lists]
    return f"{total} samples\n" + "\n".join(shown)


def _lines(counts: Counter[str], total: int) -> str:
    shares = [(100 * count / total, frame) for frame, count in counts.most_common(MOST)]
    return "".join(f"  {share:5.1f} %  {frame}\n" for share, frame in shares if share >= LEAST)


def _short(frame: str) -> str:
    """A frame with its file as it is called inside its package."""
    function, _, path = frame.partition(" (")
    path = path.rstrip(")").partition(":")[0]
    found = next((path.find(f"/{where}") for where in _OURS if f"/{where}" in path), path.rfind("/"))
    return f"{function} ({path[found + 1 :]})"


if __name__ == "__main__":
    main()
