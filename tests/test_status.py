"""What `rootstockd status` shows in terminals of all widths."""

import subprocess
import sys
import time

import pytest

from rootstockd.cli import show
from rootstockd.control.schema import DaemonStatus, ModelStatus, SessionStatus


def model(name: str, **fields) -> ModelStatus:
    told = {
        "device": "cuda:0",
        "dtype": "float64",
        "state": "ready",
        "error": None,
        "loading": None,
        "backend": "mace-torch 0.3.16",
        "environment": "environment mace",
        "note": None,
        "unconfined": [],
        "batch_atoms": 1000,
        "pid": 12345,
        "memory": 2_345_000_000,
        "sessions": 12,
        "waiting": 3,
        "evaluations": 1_234_567,
        "batches": 234_567,
        "restarts": 0,
        "rate": 191.3,
        "load": 0.8,
        "idle": 0.0,
        "keep_alive": None,
    }
    return ModelStatus(name=name, **{**told, **fields})


def daemon(models: list[ModelStatus], **fields) -> DaemonStatus:
    session = SessionStatus(id=7, user="alice", pid=4000, model=None, natoms=None, state="new", evaluations=0, since=0)
    told = {
        "version": "0.1.0",
        "pid": 7713,
        "state": "ready",
        "since": time.time() - 100,
        "devices": ["cuda:0"],
        "config": None,
        "memory": 71_000_000,
        "evaluations": 12_345_678,
        "models": models,
        "sessions": [session],
        "other_sessions": 2,
    }
    return DaemonStatus(**{**told, **fields})


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):
    """What is printed for a daemon in a terminal of some width."""

    def printed(status: DaemonStatus, width: int) -> str:
        monkeypatch.setattr(show.console, "width", width)
        with show.console.capture() as capture:
            show.show(status)
        return capture.get()

    return printed


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_counts_is_there_in_every_width(shown, width: int) -> None:
    models = [
        model("mace-mp-medium"),
        model("sevennet-omni", state="failed", error="it was not built", backend=None, pid=None, memory=None),
        model("emt", state="cold", idle=4000, device=None),
    ]
    text = shown(daemon(models), width)
    assert all(len(line) <= width for line in text.splitlines())
    for words in ("ready", "12.3 M evaluations", "mace-mp-medium", "191.3", "failed", "it was not built", "cold"):
        assert words in text
    assert ("memory" in text.splitlines()[3]) == (width > 60)
    assert ("pid" in text.splitlines()[3]) == (width > 80)
    hidden = text.partition("no room for ")[2].partition("; --json has all")[0].replace("\n", " ").split(", ")
    assert ("memory" in hidden, "pid" in hidden) == (width <= 60, width <= 80), "what is not shown is named"


def test_a_daemon_that_began_after_now_by_this_clock_is_up_for_no_time(shown) -> None:
    assert "up 0 s" in shown(daemon([], since=time.time() + 864_000), 120)


def test_models_of_one_name_are_told_apart(shown) -> None:
    models = [model("mace"), model("mace", dtype="float32", restarts=2), model("mace", device="cuda:1")]
    text = shown(daemon(models), 60)
    assert all(words in text for words in ("float32", "float64", "cuda:0", "cuda:1"))
    assert "mace float32: its worker was replaced 2 times" in text


def test_a_session_says_what_it_asked_for(shown) -> None:
    asked = {"model": "mace", "dtype": "float32", "dispersion": True, "exact": True, "natoms": 4, "state": "idle"}
    session = SessionStatus(id=7, user="alice", pid=4000, evaluations=0, since=0, **asked)
    text = shown(daemon([model("mace")], sessions=[session]), 160)
    assert "float32 +D3 exact" in text.splitlines()[-2]


def test_settings_of_dispersion_are_told_apart(shown) -> None:
    common = {"xc": "pbe", "cutoff": 21.167088422}
    models = [model("mace", dispersion={"damping": damping, **common}) for damping in ("bj", "zero")]
    text = shown(daemon([*models, model("mace")]), 160)
    assert all(f"float64 +D3 (damping {damping})" in text for damping in ("bj", "zero"))
    assert "with D3 (damping zero, xc pbe, cutoff 21.17)" in text


def test_what_is_the_same_is_said_once(shown) -> None:
    text = shown(daemon([model(f"fine-tune-{i}") for i in range(12)]), 100)
    assert text.count("mace-torch 0.3.16") == 1
    assert "fine-tune-2, 9 more: mace-torch" in text


def test_a_daemon_that_stops(shown) -> None:
    text = shown(daemon([], state="draining", warnings=["there is no user 'bob'"]), 80)
    assert "jobs wait for the next daemon" in text
    assert "there is no user 'bob'" in text
    assert "no model is loaded" in text


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (9999, "9999"), (12_345, "12.3 k"), (999_999, "1000 k"), (12_345_678, "12.3 M"), (5 * 10**9, "5.0 G")],
)
def test_numbers(number: int, words: str) -> None:
    assert show.count(number) == words


@pytest.mark.parametrize("module", ["show", "top", "fleet", "lifecycle"])
def test_what_is_typed_often_waits_for_no_library_that_it_does_not_need(module: str) -> None:
    program = f"import sys, rootstockd.cli.{module}; print(*{{'ase', 'fastapi', 'numpy'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
