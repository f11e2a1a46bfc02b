"""A short run of the chaos benchmark: everything at once, and nothing differs, fails or stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon
from hostile import SEGFAULT, behave
from rootstock_client import RootstockError

REPOSITORY = Path(__file__).resolve().parents[2]
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here: this is no checkout", allow_module_level=True)

from benchmarks import chaos, chaos_faults, chaos_jobs, common  # noqa: E402

SECONDS = float(os.environ.get("ROOTSTOCKD_CHAOS_SECONDS", "20"))


@pytest.mark.timeout(SECONDS + 600)
def test_chaos(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--seconds", str(SECONDS), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    faults = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + faults
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert result["evaluations"]["total"] > 0
    assert result["faults"]["total"] > 0


def told(**words: object) -> chaos.Tally:
    tally = chaos.Tally()
    tally.told({"session": 1, "model": "emt", "exact": True, "evaluations": 25, "off": None})
    if words:
        tally.told({"session": 1, "model": "emt", "exact": True, "evaluations": 25, **words})
    return tally


NOTHING: dict[str, int] = {}
TWO_FAULTS = Counter({"worker crashed": 1, "worker stopped": 1})
OVER, BEFORE = (
    "model 'm': {} workers ended over this structure: {}.\nLook.",
    "model 'm': {} workers ended before they were ready: {}.",
)
SEGV, HUNG = "signal 11 (SIGSEGV)", "it hung: an evaluation took 5.02 s where 5 s is the limit"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((told(off=1e-12), Counter(), NOTHING, 0, 0), "1 rounds differ"),
        ((told(error="ConnectionLostError", message="m"), TWO_FAULTS, NOTHING, 0, 0), "jobs saw errors"),
        ((told(error="EvaluationError", message="the engine failed"), TWO_FAULTS, NOTHING, 0, 0), "jobs saw errors"),
        (
            (told(error="EvaluationError", message=OVER.format(2, SEGV + ", 2 times")), Counter(), NOTHING, 0, 0),
            "after 0",
        ),
        ((told(descriptors_left=1), Counter(), NOTHING, 0, 0), "left with descriptors"),
        ((told(), Counter(), {"slots": 1}, 0, 0), "left with more than before"),
        ((told(), Counter(), NOTHING, 1e9, 0), "grew by 1000 MB"),
        ((told(), Counter(), NOTHING, 0, 2), "2 processes outlived"),
    ],
)
def test_the_verdict_on_what_is_wrong(arguments: tuple[Any, ...], words: str) -> None:
    (wrong,) = chaos.verdict(*arguments)
    assert words in wrong


def test_the_verdict_on_what_is_right() -> None:
    given_up = told(error="EvaluationError", message=OVER.format(2, f"{SEGV}; {HUNG}"))  # said, not hidden
    assert chaos.verdict(given_up, TWO_FAULTS, NOTHING, 1e6, 0) == []


@pytest.mark.parametrize(
    ("message", "due"),
    [
        (OVER.format(2, f"{SEGV}; {HUNG}"), True),
        (OVER.format(2, f"{HUNG}, 2 times"), True),
        (OVER.format(3, f"signal 9 (SIGKILL); {SEGV}, 2 times"), True),
        (OVER.format(1, SEGV), False),
        (OVER.format(2, f"signal 9 (SIGKILL); {SEGV}"), False),
        (OVER.format(2, "exit status 3, 2 times"), False),  # none of our faults
        (BEFORE.format(5, f"{SEGV}, 4 times; signal 6 (SIGABRT)"), True),
        (BEFORE.format(2, "it hung: loading took 60.1 s where 60 s is the limit, 2 times"), True),
        (BEFORE.format(4, f"{SEGV}, 4 times"), False),
        ("the engine failed: ValueError: no", False),
    ],
)
def test_errors_that_faults_explain(message: str, due: bool) -> None:
    assert chaos.is_due(message) is due


def test_what_a_daemon_says_is_understood(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a structure and of a model that end each of their workers as a fault may."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    options = f'{{ what = "segfault", counter = "{tmp_path}/counter" }}'
    entries = (("hostile", "Hostile", "{}"), ("never", "AtLoading", options))
    (tmp_path / "models.toml").write_text(
        "".join(
            f'[{name}]\nfamily = "ase"\nconfine = false\n'
            f'arguments = {{ calculator = "hostile:{calculator}", options = {options} }}\n'
            for name, calculator, options in entries
        )
    )
    daemon = start_daemon("--catalogue", str(tmp_path / "models.toml"))
    bad = behave(bulk("Cu", cubic=True), SEGFAULT)
    bad.pbc = False
    for model, _, _ in entries:
        with daemon.client().calculator(model) as bad.calc, pytest.raises(RootstockError) as raised:
            bad.get_forces()
        assert chaos.is_due(str(raised.value)), raised.value


class OffByABit(EMT):
    """EMT; once it has been right so often its forces are wrong, in the last place if not by more."""

    def __init__(self, right: float, wrong_by: float = 0.0) -> None:
        super().__init__()
        self.right, self.wrong_by = right, wrong_by
        self.over = threading.Event()

    def calculate(self, *arguments: Any, **more: Any) -> None:
        super().calculate(*arguments, **more)
        self.right -= 1
        if self.right < 0:
            forces = self.results["forces"]
            forces[0, 0] = forces[0, 0] + self.wrong_by if self.wrong_by else np.nextafter(forces[0, 0], np.inf)

    def close(self) -> None:
        """As a session does after some rounds."""
        self.over.set()

    def __enter__(self) -> OffByABit:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Offering:
    """In a client's place: its calculators are this one."""

    def __init__(self, calculator: OffByABit) -> None:
        self._calculator = calculator

    def calculator(self, _model: str, **_options: object) -> OffByABit:
        return self._calculator


@pytest.mark.parametrize(
    ("exact", "right", "wrong_by", "rounds"),
    [
        (True, np.inf, 0.0, 0),
        (True, 3.5 * chaos_jobs.STEPS, 0.0, 1),
        (False, 0, 0.0, 0),
        (False, 0, chaos_jobs.CLOSE / 2, 0),
        (False, 0, 2 * chaos_jobs.CLOSE, 4),
    ],
)
def test_a_model_that_is_off_by_a_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exact: bool, right: float, wrong_by: float, rounds: int
) -> None:
    """A session that asks for exact results accepts no other bit, others what is within a tolerance."""
    calculator = OffByABit(right, wrong_by)
    chaos_jobs.Session(Offering(OffByABit(np.inf)), tmp_path, 1, "emt", exact=True).reference()
    chaos_jobs.Session(Offering(calculator), tmp_path, 1, "emt", exact=exact).run(calculator.over)
    tally = chaos.Tally()
    for line in capsys.readouterr().out.splitlines():
        tally.told(json.loads(line))
    assert (tally.rounds[1], len(tally.mismatches), tally.errors) == (4, rounds, Counter())
    assert chaos.verdict(tally, Counter(), NOTHING, 0, 0) == [
        f"{rounds} rounds differ from the undisturbed ones"
    ] * bool(rounds)


def test_what_is_left_in_a_daemon_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session's slot and connection, and a worker."""
    monkeypatch.setattr(chaos, "GONE_WITHIN", 1.0)
    settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
    with common.Daemon(settings, "--model", "emt") as daemon:
        before = chaos.held(daemon)
        left = chaos_faults.Victim(daemon, rng=None, kill_job=None).connect()
        left.sendall(chaos_faults.MESSAGE)
        assert left.recv(1)
        daemon.command("load", "lj")
        more = chaos.left_over(before, daemon)
        assert more.keys() >= {"descriptors", "slots", "sessions", "processes"}, more
        left.close()
        daemon.command("unload", "lj")
        assert chaos.left_over(before, daemon) == {}


def test_what_outlives_a_daemon_is_seen() -> None:
    mark = f"a test of {os.getpid()}"
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, chaos.MARK: mark}) as process:
        try:
            assert chaos.wait_until_gone(mark) == 1
        finally:
            process.kill()
    assert chaos.wait_until_gone(mark) == 0
