"""The demo: three jobs share one warm potential, and what that saves.

Starts a daemon, times it against the same model in a process of its own, runs the three scripts beside this file
against it at once, prints one table, and leaves nothing behind. All numbers are measured or computed as it runs.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
MODEL = "mace-emt-small"
DTYPE = "float64"
JOBS = {"NVE of Cu": "md_nve.py", "relaxation of Cu3Au": "relax_alloy.py", "E(V) of Ni": "equation_of_state.py"}
PATIENCE = 600  # seconds for any one thing
TURNS, TURN_STEPS, UNCOUNTED = 4, 7, 2
SAME = 0.1  # step times closer than this share can't be told apart on a machine that does other things as well
DYNAMICS_TIME = 20  # seconds that the dynamics may take on an idle machine; its number of steps follows

# What a job does until its first force, and then one step for each line it is sent. The two differ in one line only.
THROUGH_DAEMON = f"from rootstock_client import RootstockClient; calc = RootstockClient().calculator({MODEL!r})"
IN_PROCESS = (
    "from mace.calculators import MACECalculator; "
    "calc = MACECalculator(model_paths={weights!r}, device={device!r}, default_dtype={dtype!r})"
)
STEPS = """
import json, sys, time
from ase.build import bulk
atoms = bulk("Cu", cubic=True) * 3
atoms.calc = calc
def step(seed):
    atoms.rattle(0.01, seed=seed)
    start = time.perf_counter()
    forces = atoms.get_forces()
    seconds = time.perf_counter() - start
    print("answer", json.dumps([seconds, atoms.get_potential_energy(), forces.tolist()]), flush=True)
step(0)
for line in sys.stdin:
    step(int(line))
"""

console = Console(highlight=False)


class DemoError(Exception):
    """Something that was to work did not; the message says what."""


class Child:
    """A child process whose stderr, and stdout unless it is piped, go to files in the demo's folder.

    It has a session of its own, so that a terminal's Ctrl-C reaches the demo alone, which then ends its children
    in order.
    """

    def __init__(self, arguments: list[str], folder: Path, name: str, *, talk: bool = False) -> None:
        self.name, self.out, self.err = name, folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else out,
                stderr=err,
                start_new_session=True,
                text=True,
            )

    def check(self) -> None:
        """Raise DemoError if the process ended with an error."""
        if self.process.poll():
            words = self.err.read_text(errors="replace").strip() or self.out.read_text(errors="replace").strip()
            raise DemoError(f"{self.name} ended with exit status {self.process.returncode}:\n{words}")

    def answer(self) -> tuple[float, float, np.ndarray]:
        """The next step's seconds, energy (eV) and forces (eV/Å)."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):  # a library may print too
                seconds, energy, forces = json.loads(line.removeprefix("answer "))
                return seconds, energy, np.array(forces)
        self.process.wait(PATIENCE)
        self.check()
        raise DemoError(f"{self.name} ended early")

    def ask(self, seed: int) -> tuple[float, float, np.ndarray]:
        """Have it take one step, to positions that `seed` decides."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seed}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, and `answer` says of what
        return self.answer()

    def end(self) -> None:
        """End it if it has not ended."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # `rootstockd start` takes its daemon along
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def child(arguments: list[str], folder: Path, name: str, *, talk: bool = False) -> Iterator[Child]:
    """A child process that does not outlive the block."""
    process = Child(arguments, folder, name, talk=talk)
    try:
        yield process
    finally:
        process.end()


def rootstockd(folder: Path, *arguments: str) -> str:
    """Run the command `rootstockd` and return what it printed.

    Raises:
        DemoError: it failed.
    """
    command = Path(sys.executable).with_name("rootstockd")
    program = [str(command)] if command.exists() else [sys.executable, "-m", "rootstockd"]
    with child([*program, *arguments], folder, f"rootstockd {arguments[0]}") as process:
        try:
            process.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise DemoError(f"rootstockd {' '.join(arguments)} took more than {PATIENCE} s") from None
        process.check()
        return process.out.read_text().rstrip()


def show(command: str, output: str) -> None:
    """A command and what it printed, as a terminal would have it."""
    console.print(f"[bold]$ {command}[/]", soft_wrap=True)
    console.print(output, markup=False, soft_wrap=True)
    console.print()


@contextmanager
def daemon(folder: Path) -> Iterator[None]:
    """A daemon for the length of the block; the environment tells clients where it is."""
    socket = folder / "demo.sock"
    os.environ["ROOTSTOCKD_SOCKET"] = str(socket)
    os.environ["ROOTSTOCKD_STATE"] = str(folder / "state")  # what it measures is nobody else's
    try:
        start = ["start", "--model", MODEL, "--socket", str(socket), "--log-file", str(folder / "daemon.log")]
        show(f"rootstockd {' '.join(start)}", rootstockd(folder, *start))
        yield
        show("rootstockd stop", rootstockd(folder, "stop"))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it is quick, and has to be finished
        if folder.joinpath("demo.control").exists():
            rootstockd(folder, "stop", "--force")


def measure(folder: Path, device: str) -> dict[str, Any]:
    """Times both ways, with the daemon otherwise idle: to the first force from nothing (s), and a step (s)."""
    weights = str(importlib.resources.files("rootstockd.models") / "embedded" / f"{MODEL}.model")
    # the process's threads sleep while they wait, as the daemon's do: spinning is slow wherever others need the CPUs
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    setups = {"daemon": THROUGH_DAEMON, "process": IN_PROCESS.format(weights=weights, device=device, dtype=DTYPE)}
    first: dict[str, float] = {}
    answers: dict[str, list[tuple[float, float, np.ndarray]]] = {way: [] for way in setups}
    with ExitStack() as ours:
        jobs: dict[str, Child] = {}
        for way, setup in setups.items():
            start = time.perf_counter()
            arguments = [sys.executable, "-W", "ignore", "-c", setup + STEPS]
            jobs[way] = ours.enter_context(child(arguments, folder, f"timing, {way}", talk=True))
            jobs[way].answer()
            first[way] = time.perf_counter() - start
            console.print(f"first force, {way}: {first[way]:.1f} s")
        # a few steps each in turn, so that whatever else the machine does is shared fairly; the first ones of a turn
        # do not count: caches are the other side's
        for turn in range(TURNS):
            seeds = range(1 + turn * TURN_STEPS, 1 + (turn + 1) * TURN_STEPS)
            for way, job in jobs.items():
                answers[way] += [job.ask(seed) for seed in seeds]
    steps = {
        way: statistics.median(answer[0] for i, answer in enumerate(answers[way]) if i % TURN_STEPS >= UNCOUNTED)
        for way in setups
    }
    console.print(f"step, daemon: {1000 * steps['daemon']:.1f} ms, process: {1000 * steps['process']:.1f} ms\n")
    pairs = list(zip(answers["daemon"], answers["process"], strict=True))
    return {
        "first": first,
        "step": steps,
        "energy_difference": max(abs(ours[1] - theirs[1]) for ours, theirs in pairs),
        "force_difference": max(float(np.abs(ours[2] - theirs[2]).max()) for ours, theirs in pairs),
    }


def last_step(job: Child) -> tuple[int, int, str] | None:
    """Where a job is, from its last whole line `step N/M  words`; None before its first."""
    lines = [line for line in job.out.read_text().splitlines(keepends=True) if line.startswith("step ")]
    if not lines or not lines[-1].endswith("\n"):
        return None
    _, numbers, words = lines[-1].split(maxsplit=2)
    step, _, steps = numbers.partition("/")
    return int(step), int(steps), words.strip()


def run_jobs(folder: Path, dynamics_steps: int) -> dict[str, dict[str, Any]]:
    """Run the three scripts at once, each a process of its own, and show how they get on."""
    live = console.is_terminal
    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
    )
    deadline = time.monotonic() + PATIENCE
    with ExitStack() as ours:
        jobs: dict[str, Child] = {}
        for name, script in JOBS.items():
            arguments = [sys.executable, str(HERE / script), "--json", str(folder / f"{script}.json")]
            if script == "md_nve.py":
                arguments += ["--steps", str(dynamics_steps)]
            jobs[name] = ours.enter_context(child(arguments, folder, script))
        bars = ours.enter_context(Progress(*columns, console=console, disable=not live))
        tasks: dict[str, TaskID] = {name: bars.add_task(name, total=None, words="starting") for name in jobs}
        told = dict.fromkeys(jobs, -1)  # the last quarter of each job that a plain log has a line for
        running, status_shown = set(jobs), False
        while running:
            if time.monotonic() > deadline:
                raise DemoError(f"still running after {PATIENCE} s: {', '.join(sorted(running))}")
            time.sleep(0.1)
            for name in sorted(running):
                done = jobs[name].process.poll() is not None
                jobs[name].check()
                if at := last_step(jobs[name]):
                    step, steps, words = at
                    total = step if done else steps  # a relaxation needs fewer steps than it may take
                    bars.update(tasks[name], completed=step, total=total or 1, words=words)
                    quarter = 4 if done else 4 * step // (steps + 1)
                    if not live and quarter > told[name]:
                        console.print(f"{name:20} step {step}/{steps}  {words}{'  done' if done else ''}")
                        told[name] = quarter
                if done:
                    running.remove(name)
            if not status_shown and (all(map(last_step, jobs.values())) or len(running) < len(jobs)):
                status_shown = True
                show("rootstockd status", rootstockd(folder, "status"))
    console.print()
    return {name: json.loads((folder / f"{script}.json").read_text()) for name, script in JOBS.items()}


def table(results: dict[str, dict[str, Any]], times: dict[str, Any], device: str) -> Table:
    """All that was found."""
    dynamics, alloy, eos = (results[name] for name in JOBS)
    picture = Table(title=f"{MODEL}, {DTYPE}, {device}")
    picture.add_column("")
    for heading in ("through rootstockd", "reference", "compared"):
        picture.add_column(heading, justify="right")

    def compare(label: str, value: float, reference: float, unit: str, digits: int) -> None:
        error = f"{100 * (value / reference - 1):+.2f} %"
        picture.add_row(label, f"{value:.{digits}f} {unit}", f"EMT  {reference:.{digits}f} {unit}", error)

    def race(label: str, seconds: dict[str, float], scale: float, unit: str) -> None:
        ours, theirs = scale * seconds["daemon"], scale * seconds["process"]
        ratio = theirs / ours
        words = f"{ratio:.1f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"
        words = words if abs(ratio - 1) > SAME else "the same"
        picture.add_row(label, f"{ours:.1f} {unit}", f"in process  {theirs:.1f} {unit}", words)

    energies = f"within {times['energy_difference']:.0e} eV"
    picture.add_row("same structures, energies", energies, "in process", "")
    picture.add_row("    forces", f"within {times['force_difference']:.0e} eV/Å", "in process", "")
    race("fresh job until its first force", times["first"], 1, "s")
    race("108 Cu, one step (median)", times["step"], 1000, "ms")
    if device == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS")
        words = "as many as torch takes" if threads is None else f"OMP_NUM_THREADS={threads}"
        words += f", OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
        picture.add_row("    threads of the process", "", words, "")
    picture.add_section()
    label = f"NVE of 108 Cu, {dynamics['steps']} steps: energy drift"
    picture.add_row(label, f"{dynamics['drift_mev_per_atom_per_ps']:+.4f} meV/atom/ps", "0", "")
    worst = f"{dynamics['worst_deviation_mev_per_atom']:.4f} meV/atom"
    picture.add_row("    largest deviation from the start", worst, "", "")
    compare("Cu3Au, relaxed: a", alloy["lattice_constant_a"], alloy["reference_lattice_constant_a"], "Å", 4)
    compare("Ni, E(V): a", eos["lattice_constant_a"], eos["reference_lattice_constant_a"], "Å", 4)
    compare("    bulk modulus", eos["bulk_modulus_gpa"], eos["reference_bulk_modulus_gpa"], "GPa", 1)
    return picture


def main() -> int:
    """Run the demo; the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # end tidily, as on Ctrl-C
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rootstockd-demo-", dir="/tmp"))  # short: a socket's path has 107 bytes
    os.environ["COLUMNS"] = "120"  # what a child prints into a file is not to be wrapped at 80
    try:
        with daemon(folder):
            first = json.loads(rootstockd(folder, "status", "--json"))["devices"][0]
            device = "cpu" if first.startswith("cpu") else "cuda"
            times = measure(folder, device)
            steps = round(DYNAMICS_TIME / times["step"]["daemon"], -1)
            results = run_jobs(folder, int(min(max(steps, 40), 500)))
        console.print(table(results, times, device))
        if times["energy_difference"] > 1e-6 or times["force_difference"] > 1e-6:
            raise DemoError("through the daemon the model does not give the numbers that it gives in process")
        console.print(f"{time.monotonic() - begin:.0f} s in all")
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except DemoError as error:
        console.print(f"[bold red]failed:[/] {error}", markup=True, soft_wrap=True)
        log = folder / "daemon.log"
        if log.exists():
            console.print("\nthe end of the daemon's log:")
            lines = log.read_text(errors="replace").splitlines()[-20:]
            console.print("\n".join(lines), markup=False, soft_wrap=True)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
