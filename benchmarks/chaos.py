"""`python -m benchmarks.chaos --hours H`: jobs on a daemon to which everything happens that can, and what came of them.

Sixteen sessions of MD (EMT, Lennard-Jones, MACE exact and not) go on in a few processes, while at random, from a seed,
workers, jobs and the daemon itself are killed, stopped and restarted, and connections come that are half, slow, hostile
or far too many. The verdict is printed and written as JSON, with all faults in a log beside it. The exit status is 1 if
any number differed from an undisturbed run, a job saw an error that it should not, or anything was left behind.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks import chaos_faults, machine
from benchmarks.common import HERE, REPOSITORY, Daemon, Settings, use_cpus
from rootstockd.settings.config import Config

PRELOADED = ("emt", "lj")
"""MACE is loaded when a session asks: while it loads, faults go on."""
KINDS = (
    {"model": "emt", "exact": True},
    {"model": "lj", "exact": True},
    {"model": "mace-emt-small", "exact": True},
    {"model": "mace-emt-small", "exact": False},
)
SESSIONS, PROCESSES = 16, 4
MARK = "CHAOS_OF_ROOTSTOCKD"
"""A variable that the daemon and its workers are started with, to find what is left of them."""
LAST_ROUNDS = 120.0
"""Seconds in which every session must end a round when the faults are over."""
GIVEN_UP = re.compile(r"\d+ workers ended (over this structure|before they were ready): (.+?)\.(\s|$)")
END = re.compile(r"(signal 6 |signal 11 |it hung: .* is the limit)(?:.*, (\d+) times)?")
"""How a worker ends by faults that what it was at is blamed for."""
GROWTH = 64e6
"""Bytes by which the daemon may be larger than at the beginning."""
GONE_WITHIN = 20.0
"""Seconds in which the daemon must have given back what jobs had."""
OPENED_WITHIN = 180.0
"""Seconds until jobs have their sessions: a worker that was stopped while it loaded counts as hung after 60."""


class Tally:
    """What jobs have said so far; told from several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.evaluations: Counter[str] = Counter()
        self.rounds: Counter[int] = Counter()
        self.mismatches: list[dict[str, Any]] = []
        self.errors: Counter[str] = Counter()
        self.messages: dict[str, str] = {}
        self.given_up = 0
        """Errors that are right: see `is_due`."""
        self.descriptors: list[int] = []

    def told(self, words: dict[str, Any]) -> None:
        """One line of a job's."""
        with self.lock:
            if "descriptors_left" in words:
                self.descriptors.append(words["descriptors_left"])
            elif "error" in words:
                self.errors[words["error"]] += 1
                self.given_up += is_due(words["message"])
                self.messages.setdefault(words["error"], f"{words['model']}: {words['message']}")
            else:
                self.evaluations[words["model"] + " exact" * words["exact"]] += words["evaluations"]
                self.rounds[words["session"]] += 1
                if words["off"] is not None:
                    self.mismatches.append(words)


def is_due(message: str) -> bool:
    """Whether a job is rightly told that its evaluation was given up: so many workers ended over it, and by faults.

    The daemon can't know that it was us: an evaluation on which two such faults fall is given up, and so is a model
    that does not load for five in a row, or two that stopped it. That is rare, as the second must come in the moment in
    which the evaluation is repeated, alone. SIGKILL is blamed on nobody, and falls on none often enough.
    """
    found = GIVEN_UP.search(message)
    if found is None:
        return False
    ends = [(end[1], int(end[2] or 1)) for end in map(END.match, found[2].split("; ")) if end]
    blamed, hung = sum(count for _, count in ends), sum(count for how, count in ends if how.startswith("it hung"))
    return blamed >= 2 if found[1] == "over this structure" else blamed >= 5 or hung >= 2


class Jobs:
    """A process of jobs, and whichever takes its place.

    Args:
        task: what it is to do; see chaos_jobs.
        tally: told what it says.
        errors: its standard error.
    """

    def __init__(self, task: dict[str, Any], tally: Tally, errors: TextIO) -> None:
        self._task, self._tally, self._errors = task, tally, errors
        self._start()

    def _start(self) -> None:
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos_jobs", json.dumps(self._task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process,))
        self._listener.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.endswith("\n"):  # one that was killed may have said half of it
                continue
            words = json.loads(line)
            if "ready" in words:
                self._ready.set()
            else:
                self._tally.told(words)

    def kill(self) -> None:
        """End it in the middle of whatever it does, and start another."""
        self._process.kill()
        self._clear()
        self._start()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until all its sessions are open: where there is no daemon, a job that never had one may fail."""
        if not self._ready.wait(OPENED_WITHIN):
            raise RuntimeError(f"jobs did not open their sessions within {OPENED_WITHIN:g} s")

    def end(self, deadline: float) -> bool:
        """Have it finish its rounds; whether it did, and ended well."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            well = self._process.wait(max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            well = False
        self._clear()
        return well

    def _clear(self) -> None:
        self._process.wait()
        self._listener.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


# --- what a daemon holds


def held(daemon: Daemon) -> dict[str, int]:
    """Descriptors, slots, connections, processes and memory of the daemon and its workers."""
    status = daemon.status
    process = psutil.Process(status["pid"])
    workers = process.children(recursive=True)
    slots = sum("/memfd:" in target for pid in (process.pid, *(w.pid for w in workers)) for target in open_on(pid))
    return {
        "descriptors": process.num_fds(),
        "slots": slots,
        "sessions": len(status["sessions"]),
        "processes": len(workers),
        "zombies": sum(worker.status() == psutil.STATUS_ZOMBIE for worker in workers),
        "memory": process.memory_info().rss,
    }


def open_on(pid: int) -> Iterator[str]:
    """What a process's descriptors are open on."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield str(entry.readlink())
        except FileNotFoundError:
            continue


def left_over(before: dict[str, int], daemon: Daemon) -> dict[str, int]:
    """What is more than it was, after a while for it to go."""
    deadline = time.monotonic() + GONE_WITHIN
    while True:
        now = held(daemon)
        more = {key: now[key] - before[key] for key in before if key != "memory" and now[key] > before[key]}
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.1)


def marked(mark: str) -> list[int]:
    """Processes that were started with our variable."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for process in psutil.pids():
        try:
            if wanted in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                found.append(process)
        except OSError:
            continue
    return found


# --- the run


def start_options(folder: Path) -> list[str]:
    """Models to load first, and a short deadline for workers that hang, where this version has one."""
    options = [option for model in PRELOADED for option in ("--model", model)]
    if can_hang():
        settings = folder / "settings.toml"
        settings.write_text("hang_timeout = 5.0\nload_timeout = 60.0\n")
        options += ["--config", str(settings)]
    return options


def can_hang() -> bool:
    """Whether a stopped worker is noticed: otherwise none is stopped."""
    if "hang_timeout" not in Config.model_fields:
        return False
    told = subprocess.run([sys.executable, "-m", "rootstockd", "start", "--help"], check=True, capture_output=True)
    return b"--config" in told.stdout


def disturb(
    victim: chaos_faults.Victim, until: float, only: list[str], write: Callable[..., None]
) -> tuple[Counter[str], list[str]]:
    """Fault after fault; how many of each, and which of them went wrong themselves."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    possible = [name for name in chaos_faults.FAULTS if name != "worker stopped" or can_hang()]
    faults = {name: chaos_faults.FAULTS[name] for name in possible if not only or name in only}
    deck: list[str] = []
    start = time.monotonic()
    while time.monotonic() < until:
        if not deck:  # each in its proportion, in an order of its own: short runs have all of them, too
            once = list(faults)
            more = [name for name, (_, times) in faults.items() for _ in range(times - 1)]
            victim.rng.shuffle(once)
            victim.rng.shuffle(more)
            deck = more + once
        name = deck.pop()
        at = time.monotonic() - start
        try:
            note = faults[name][0](victim)
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            wrong.append(f"{name}: {note}")
        done[name] += 1
        write(at=round(at, 3), took=round(time.monotonic() - start - at, 3), fault=name, note=note)
        pause = time.monotonic() + min(victim.rng.expovariate(2.0), 3.0)
        while (left := min(pause, until) - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            victim.close()
    return done, wrong


def run(seconds: float, seed: int, only: list[str], log: Path) -> dict[str, Any]:
    """The whole of it, or with `only` some of the faults; what goes into the file."""
    with tempfile.TemporaryDirectory(prefix="rsd-chaos-") as name, log.open("w") as lines:

        def write(**words: Any) -> None:
            lines.write(json.dumps(words) + "\n")
            lines.flush()

        folder = Path(name)
        settings = Settings(quick=True, device="cpu", folder=folder, rootstock=None)
        with Daemon(settings, *start_options(folder), environment={MARK: name}) as daemon:
            sessions = [{"number": number, **KINDS[number % len(KINDS)]} for number in range(SESSIONS)]
            task = {"socket": str(daemon.socket), "folder": name, "sessions": sessions}
            command = [sys.executable, "-m", "benchmarks.chaos_jobs", json.dumps({**task, "reference": True})]
            subprocess.run(command, check=True, cwd=REPOSITORY)
            before, tally, rng = held(daemon), Tally(), random.Random(seed)
            with (folder / "jobs").open("w") as words:
                jobs = [
                    Jobs({**task, "sessions": sessions[part::PROCESSES]}, tally, words) for part in range(PROCESSES)
                ]
                for job in jobs:
                    job.wait_until_ready()
                victim = chaos_faults.Victim(daemon, rng, lambda: rng.choice(jobs).kill())
                try:
                    faults, wrong = disturb(victim, time.monotonic() + seconds, only, write)
                    wrong += idle_sessions(tally)
                finally:
                    victim.close(everything=True)
                    deadline = time.monotonic() + 60
                    ended = [job.end(deadline) for job in jobs]
            if not all(ended):
                wrong.append(f"jobs did not end well: {(folder / 'jobs').read_text()[-2000:]}")
            more, after = left_over(before, daemon), held(daemon)
            said = (daemon.folder / "log").read_text(errors="replace")
        outlived = wait_until_gone(name)
    wrong += verdict(tally, faults, more, after["memory"] - before["memory"], outlived)
    if traces := said.count("Traceback (most recent call last)"):
        wrong.append(f"{traces} tracebacks in the daemon's log, the first: {said[said.index('Traceback') :][:2000]}")
    return {
        "schema": 1,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "hardware": machine.hardware(sorted(os.sched_getaffinity(0))),
        "software": machine.software(),
        "seed": seed,
        "seconds": seconds,
        "evaluations": {**tally.evaluations, "total": sum(tally.evaluations.values())},
        "faults": {**faults, "total": sum(faults.values())},
        "errors": {kind: {"count": count, "first": tally.messages[kind]} for kind, count in tally.errors.items()},
        "mismatches": tally.mismatches,
        "left in the daemon": more,
        "left in jobs, descriptors": max([0, *tally.descriptors]),
        "outlived the daemon": outlived,
        "daemon's memory": {"before": before["memory"], "after": after["memory"]},
        "wrong": wrong,
    }


def idle_sessions(tally: Tally) -> list[str]:
    """Once it is quiet, every session must get on: those that do not."""
    calm, deadline = Counter(tally.rounds), time.monotonic() + LAST_ROUNDS
    while True:
        idle = [number for number in range(SESSIONS) if tally.rounds[number] < calm[number] + 1]
        if not idle:
            return []
        if time.monotonic() > deadline:
            return [f"sessions {idle} did not come to the end of a round within {LAST_ROUNDS:.0f} s of quiet"]
        time.sleep(0.1)


def wait_until_gone(mark: str) -> int:
    """How many processes of the daemon are left 5 s after its end."""
    deadline = time.monotonic() + 5
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(found)


def verdict(tally: Tally, faults: Counter[str], more: dict[str, int], growth: float, outlived: int) -> list[str]:
    """Everything that is not as it should be, in words."""
    wrong = []
    if tally.mismatches:
        wrong.append(f"{len(tally.mismatches)} rounds differ from the undisturbed ones")
    if sum(tally.errors.values()) > tally.given_up:
        wrong.append(f"jobs saw errors: {tally.messages}")
    harmed = sum(faults[name] for name in chaos_faults.BLAMED)
    if tally.given_up and harmed < 2:
        wrong.append(f"{tally.given_up} evaluations were given up after {harmed} faults that they can be blamed for")
    if more:
        wrong.append(f"the daemon was left with more than before: {more}")
    if any(count > 0 for count in tally.descriptors):
        wrong.append(f"jobs were left with descriptors: {tally.descriptors}")
    if growth > GROWTH:
        wrong.append(f"the daemon grew by {growth / 1e6:.0f} MB")
    if outlived:
        wrong.append(f"{outlived} processes outlived the daemon")
    return wrong


def report(result: dict[str, Any]) -> list[str]:
    """The verdict for people."""
    memory = result["daemon's memory"]
    lines = [
        (
            f"{result['evaluations']['total']} evaluations in {SESSIONS} sessions, {result['faults']['total']} faults "
            f"in {result['seconds']:g} s, seed {result['seed']}"
        ),
        *(f"  {count:6d}  {name}" for name, count in sorted(result["faults"].items()) if name != "total"),
        f"rounds that differ: {len(result['mismatches'])}",
        f"errors that jobs saw: {({kind: told['count'] for kind, told in result['errors'].items()}) or 'none'}",
        (
            f"left over: {result['left in the daemon'] or 'nothing'} in the daemon, "
            f"{result['left in jobs, descriptors']} descriptors in jobs, {result['outlived the daemon']} processes"
        ),
        f"daemon's memory: {memory['before'] / 1e6:.0f} MB before, {memory['after'] / 1e6:.0f} MB after",
    ]
    return [*lines, *(f"WRONG: {text}" for text in result["wrong"]), "failed" if result["wrong"] else "passed"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    length = made.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=float)
    length.add_argument("--minutes", type=float)
    length.add_argument("--seconds", type=float)
    made.add_argument("--seed", type=int, help="the same faults in the same order (by default another each time)")
    made.add_argument(
        "--only", action="append", default=[], choices=list(chaos_faults.FAULTS), help="this fault; may be repeated"
    )
    made.add_argument("--results", type=Path, default=HERE / "results", help="the folder for what comes of it")
    made.add_argument("--label", help="name of the result (by default the time)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run, write, report; 1 if anything is wrong."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemon is stopped
    seconds = options.seconds or 60 * (options.minutes or 60 * options.hours)
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    label = options.label or dt.datetime.now().astimezone().strftime("%Y-%m-%d-%H%M")
    options.results.mkdir(parents=True, exist_ok=True)
    use_cpus(2)
    path = options.results / f"{label}-chaos.json"
    log = path.with_suffix(".log")
    print(f"seed {seed}, faults are logged in {log}", flush=True)
    result = run(seconds, seed, options.only, log)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(report(result)))
    print(f"written: {path}")
    return int(bool(result["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
