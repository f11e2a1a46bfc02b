"""What all benchmarks share: samples and goals, daemons, contestants in processes of their own, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from rootstock_client import RootstockClient
from rootstock_client.control import fetch
from rootstockd.models.availability import located
from rootstockd.models.catalogue import Catalogue
from rootstockd.models.spec import spec_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
CHILD = HERE / "child.py"
PATIENCE = 600.0
"""Seconds that any one answer may take."""


# --- numbers


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and count."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": statistics.median(ordered),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": ordered[0],
        "max": ordered[-1],
        "count": len(ordered),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Results:
    """What one benchmark found."""

    name: str
    samples: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    def add(self, arm: str, quantity: str, unit: str, values: Sequence[float], **of: Any) -> float:
        """Keep a set of samples; its median."""
        self.samples.append({"arm": arm, "quantity": quantity, "unit": unit, "of": of, **summary(values)})
        shown = self.samples[-1]
        where = " ".join(f"{key}={value}" for key, value in of.items())
        spread = f"[{shown['q1']:.4g} … {shown['q3']:.4g}] n={shown['count']}"
        print(f"  {self.name}: {arm}, {quantity} {where}: {shown['median']:.4g} {unit} {spread}", flush=True)
        return float(shown["median"])

    def goal(self, what: str, value: float | None, limit: float, *, at_least: bool = False) -> None:
        """Compare with a goal. A value of None was not measured, and the goal counts as missed."""
        met = value is not None and (value >= limit if at_least else value <= limit)
        sign = ">=" if at_least else "<="
        self.goals.append({"what": what, "value": value, "goal": f"{sign} {limit:g}", "met": met})
        shown = "not measured" if value is None else f"{value:.4g}"
        print(f"  {self.name}: {'met   ' if met else 'MISSED'} {what}: {shown} ({sign} {limit:g})", flush=True)

    def note(self, text: str) -> None:
        """Something a reader must know."""
        self.notes.append(text)
        print(f"  {self.name}: {text}", flush=True)

    def find(self, arm: str, quantity: str, **of: Any) -> float | None:
        """A median, where it was measured."""
        for sample in self.samples:
            same = sample["arm"] == arm and sample["quantity"] == quantity
            if same and all(sample["of"].get(key) == value for key, value in of.items()):
                return float(sample["median"])
        return None


def last_line(error: Exception) -> str:
    """What a traceback ends with: the rest would name this machine's paths."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def ratio(one: float | None, other: float | None) -> float | None:
    """One over the other, where both are there."""
    return None if one is None or not other else one / other


@dataclass(frozen=True)
class Settings:
    """How to run."""

    quick: bool
    device: str
    """cpu or cuda."""
    folder: Path
    """For whatever a run leaves behind; removed at its end."""
    rootstock: Path | None
    """The root of a Rootstock installation, where it could be made."""
    sizes: tuple[int, ...] = ()
    jobs: tuple[int, ...] = ()
    """Numbers of atoms instead of a benchmark's own."""

    def choose(self, full: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes for a benchmark over systems of many sizes."""
        return self.sizes or (quick if self.quick else full)


# --- the machine


def use_cpus(count: int) -> list[int]:
    """Keep this process, and all it starts, to so many CPUs; let it open many files."""
    cpus = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cpus)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return cpus


def memory(pids: Iterable[int]) -> dict[str, float]:
    """Resident and proportional memory of some processes together, in MB."""
    total = {"RSS": 0.0, "PSS": 0.0}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                key = line.split(":")[0].upper()
                if key in total:
                    total[key] += int(line.split()[1]) / 1000
    return total


def reset_peak(pid: int) -> None:
    """Have the kernel count a process's peak of resident memory anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> float:
    """A process's peak of resident memory since then, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024.0
    raise OSError(f"no peak of memory is known for process {pid}")


def cpu_seconds(pid: int) -> float:
    """The CPU time a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def sleeps(pid: int) -> int:
    """How often a process's first thread has waited for something: its voluntary context switches."""
    return int(psutil.Process(pid).num_ctx_switches().voluntary)


# --- daemons


class Daemon:
    """A daemon of one's own, started and stopped with the command.

    Args:
        settings: how this run goes.
        options: for `rootstockd start`.
        environment: variables to set.
    """

    def __init__(self, settings: Settings, *options: str | Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=settings.folder))
        self.socket = self.folder / "d.sock"
        self._device = settings.device
        where = ["--device", "cpu"] if settings.device == "cpu" else ["--gpu", "0"]
        self.start_arguments = ["start", *where, "--log-file", str(self.folder / "log"), *map(str, options)]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Daemon:
        self.command(*self.start_arguments)
        return self

    def __exit__(self, *_: object) -> None:
        self.command("stop", "--force")

    def command(self, name: str, *arguments: str) -> None:
        """Run one of rootstockd's commands on it."""
        command = [sys.executable, "-m", "rootstockd", name, "--socket", str(self.socket), *arguments]
        done = subprocess.run(
            command, env=self._environment, check=False, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode != 0:
            raise RuntimeError(f"rootstockd {name} failed: {done.stderr or done.stdout}")

    @property
    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        return RootstockClient(self.socket).status()

    @property
    def pid(self) -> int:
        """The daemon's own process."""
        return int(self.status["pid"])

    def _model(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.status["models"] if entry["name"] == name)

    def evaluated(self, model: str) -> tuple[float, int]:
        """Seconds in which evaluations were a worker's, and how many these were."""
        text = fetch(self.socket, "GET", "/metrics").decode()
        of = {"model": model, "stage": "worker"}
        found = {"sum": 0.0, "count": 0.0}
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name == "rootstockd_evaluation_seconds" else ():
                what = sample.name.rpartition("_")[2]
                if what in found and of.items() <= sample.labels.items():
                    found[what] += sample.value
        return found["sum"], int(found["count"])

    def worker(self, model: str) -> int:
        """The process of a model's worker."""
        return int(self._model(model)["pid"])

    def worker_arguments(self, model: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What its worker was started with: the ModelSpec's fields, and the environment."""
        catalogue = Catalogue.load(map(Path, self.status["config"]["catalogues"]))
        name, entry = catalogue.resolve(model)
        spec = spec_of(name, located(name, entry), device=self._device)
        return dataclasses.asdict(spec), psutil.Process(self.worker(model)).environ()


# --- contestants


class Child:
    """A contestant in a process of its own; see child.py.

    Args:
        settings: how this run goes.
        arm: which.
        python: the interpreter of its environment; this one's if None.
        environment: variables to set.
        script: what to run.
        options: for the contestant.
    """

    def __init__(
        self,
        settings: Settings,
        arm: str,
        *,
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
        script: Path = CHILD,
        **options: Any,
    ) -> None:
        self.arm = arm
        descriptor, path = tempfile.mkstemp(dir=settings.folder, prefix="child-")
        self._errors = Path(path)
        arguments = [str(python or sys.executable), str(script), json.dumps({"arm": arm, **options}, default=str)]
        with os.fdopen(descriptor, "wb") as errors:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    @property
    def pids(self) -> list[int]:
        """Its process and all below it."""
        own = psutil.Process(self._process.pid)
        return [own.pid, *(child.pid for child in own.children(recursive=True))]

    def tell(self, **command: Any) -> None:
        """Give a command; `answer` has its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(self._last_words()) from error

    def answer(self) -> dict[str, Any]:
        """The answer to the last command."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise RuntimeError(f"{self.arm} has not answered for {PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.tell(**command)
        return self.answer()

    def system(self, natoms: int, warm_up: int = 1) -> list[float]:
        """Take up a system; the seconds of its first steps."""
        self.ask(do="system", natoms=natoms)
        return self.steps(warm_up)

    def steps(self, count: int) -> list[float]:
        """The seconds of so many steps."""
        return list(self.ask(do="steps", count=count)["seconds"])

    def _last_words(self) -> str:
        self._process.wait(10)
        return f"{self.arm} ended with status {self._process.returncode}: {self._errors.read_text()[-2000:]}"

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            try:
                self.ask(do="quit")
                self._process.wait(30)
            except (RuntimeError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()


@contextlib.contextmanager
def contestants(children: Iterable[Child]) -> Iterator[dict[str, Child]]:
    """Contestants by name, ended at the end."""
    by_name = {child.arm: child for child in children}
    try:
        yield by_name
    finally:
        for child in by_name.values():
            child.close()


def interleave(children: Sequence[Child], blocks: int, steps: int) -> dict[str, list[float]]:
    """Seconds of steps: a few of each in turn, so that whatever else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {child.arm: [] for child in children}
    for block in range(blocks):
        turn = block % len(children)
        for child in (*children[turn:], *children[:turn]):
            seconds[child.arm] += child.steps(steps)
    return seconds
