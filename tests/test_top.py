"""`rootstockd top` as whoever looks at it sees it, in a terminal; and what it shows, in whatever room there is."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from conftest import RunningDaemon
from rootstockd.cli.frame import frame
from rootstockd.cli.quantities import seconds, size
from rootstockd.cli.tables import SORTS, View, bar, sparkline
from rootstockd.control.schema import DaemonStatus, DeviceStatus, ModelStatus, SessionStatus
from rootstockd.monitoring.history import SPAN, History
from terminal import Terminal


@pytest.fixture(scope="module")
def daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    return start_shared_daemon("--model", "emt")


@contextlib.contextmanager
def job(daemon: RunningDaemon) -> Iterator[None]:
    """One that does steps all the time."""
    over = threading.Event()

    def run() -> None:
        atoms = bulk("Cu", cubic=True)
        atoms.calc = daemon.client().calculator("emt")
        while not over.wait(0.02):
            atoms.rattle(0.001, rng=None, seed=1)
            atoms.get_potential_energy()
        atoms.calc.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def top(daemon: RunningDaemon, **options: int) -> Terminal:
    return Terminal("top", "--delay", "0.2", "--socket", str(daemon.socket), **options)


# --- in a terminal


def complete(text: str) -> bool:
    """All of a frame of a daemon that works is there."""
    first, *_, last = text.splitlines()
    expected = ("cpu ", " GB", "MODEL ", "P50", "BATCH", "emt ", " ms", "USER ", "100%", "SESSION ", "EVALUATIONS")
    return (
        first.startswith("rootstockd ")
        and " ready, up " in first
        and all(word in text for word in expected)
        and any(mark in text for mark in "▁▂▃▄▅▆▇█")
        and last.startswith("q quit")
    )


def test_it_is_live(daemon: RunningDaemon) -> None:
    with top(daemon) as terminal, job(daemon):
        terminal.until(complete)
        terminal.press("?")
        terminal.until(lambda text: "scroll through the sessions" in text and "MODEL" not in text)
        terminal.press("?")
        terminal.until(lambda text: "MODEL" in text)
        for key, sort in (("s", "latency"), ("\t", "queue"), ("\x1b[C", "batch"), ("\x1b[D", "queue")):
            terminal.press(key)
            terminal.until(lambda text, sort=sort: f"sort ({sort})" in text.splitlines()[-1])
        terminal.until(lambda text: "QUEUE▼" in text)
        terminal.press("r")
        terminal.until(lambda text: "QUEUE▲" in text)
        terminal.press("p")
        terminal.until(lambda text: "paused" in text.splitlines()[0])
        terminal.press("p")
        terminal.until(lambda text: "paused" not in text.splitlines()[0])
        terminal.resize(60, 16)
        terminal.until(lambda text: len(text.splitlines()) == 16 and text.splitlines()[-1].startswith("q quit"))
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.restored


def test_it_waits_for_a_daemon_that_has_gone(own_daemon: RunningDaemon) -> None:
    with top(own_daemon) as terminal:
        terminal.until(lambda text: "emt" in text)
        own_daemon.stop()
        text = terminal.until(lambda text: text.startswith("waiting for the daemon: "))
        assert "emt" in text, "what was there last stays"
        own_daemon.start()
        terminal.until(lambda text: " ready, up " in text.splitlines()[0])
        terminal.press("\x03")
        assert terminal.end() == 0
        assert terminal.restored


def test_it_ends_with_its_terminal(daemon: RunningDaemon) -> None:
    """Also where SIGHUP is ignored, as under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is started now has it so
    try:
        terminal = top(daemon)
    finally:
        signal.signal(signal.SIGHUP, before)
    with terminal:
        terminal.until(lambda text: "emt" in text)
        terminal.hang_up()
        terminal.process.wait(20)


def test_without_a_terminal_it_is_one_frame(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with job(daemon):
        done = daemon.run("top", "--delay", "0.2")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert all(word in done.stdout for word in ("rootstockd ", " GB", "MODEL ", "emt ", "USER ", "100%", "EVALUATIONS"))
    assert "q quit" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 80
    monkeypatch.setenv("COLUMNS", "60")
    done = daemon.run("top", "--delay", "0.2")
    assert max(map(len, done.stdout.splitlines())) <= 60


def test_colours_are_no_terminal(daemon: RunningDaemon) -> None:
    """As in `FORCE_COLOR=1 rootstockd top | less -R`, where keys come from a terminal."""
    master, slave = os.openpty()
    try:
        done = daemon.run("top", "--delay", "0.2", stdin=slave, env={"FORCE_COLOR": "1"})
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0, done.stderr
    assert "\x1b[1m" in done.stdout
    assert "q quit" not in done.stdout


# --- what it shows


def model(name: str = "emt", **more: object) -> ModelStatus:
    fields = {
        "name": name,
        "device": "cpu",
        "dtype": "float64",
        "state": "ready",
        "error": None,
        "loading": None,
        "backend": "EMT",
        "note": None,
        "unconfined": [],
        "batch_atoms": 100,
        "pid": 1,
        "memory": 80_000_000,
        "sessions": 2,
        "waiting": 0,
        "evaluations": 10,
        "batches": 5,
        "restarts": 0,
        "rate": 12.5,
        "load": 0.5,
        "idle": 0.0,
        "keep_alive": None,
        "latency_p50": 0.0125,
        "latency_p99": 0.25,
        "batch_size": 2.0,
    }
    return ModelStatus.model_validate({**fields, **more})


def session(number: int, user: str = "alice", evaluations: int = 0, natoms: int = 10) -> SessionStatus:
    return SessionStatus(
        id=number, user=user, pid=1, model="emt", natoms=natoms, state="busy", evaluations=evaluations, since=0.0
    )


def status(
    models: list[ModelStatus], sessions: list[SessionStatus], since: float = 0.0, others: int = 3
) -> DaemonStatus:
    device = DeviceStatus(name="cpu", memory_used=8_000_000_000, memory_total=16_000_000_000, load=0.5)
    return DaemonStatus(
        version="1",
        pid=1,
        state="ready",
        since=since,
        devices=["cpu"],
        device_states=[device],
        config=None,
        memory=80_000_000,
        evaluations=0,
        models=models,
        sessions=sessions,
        other_sessions=others,
    )


def drawn(shown: DaemonStatus, history: History, view: View) -> list[str]:
    console = Console(width=view.width, legacy_windows=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(shown, history, view, now=10.0))
    return capture.get().splitlines()


views = st.builds(
    View,
    width=st.integers(10, 200),
    height=st.integers(3, 60),
    ascii_only=st.booleans(),
    sort=st.sampled_from(SORTS),
    reverse=st.booleans(),
    scroll=st.integers(0, 50),
    help=st.booleans(),
)


@given(views, st.integers(0, 12), st.integers(0, 40))
def test_it_fits_any_terminal(view: View, models: int, sessions: int) -> None:
    shown = status([model(f"model-{i}") for i in range(models)], [session(i, f"user-{i % 5}") for i in range(sessions)])
    history = History()
    history.add(shown, 10.0)
    lines = drawn(shown, history, view)
    assert len(lines) == view.height
    assert max(map(len, lines)) <= view.width
    if view.height >= 10 and view.width >= 60:
        assert lines[-1].startswith("q quit")
        assert view.help or not models or any(line.startswith("MODEL") and "EVAL/S" in line for line in lines)


def test_tables_are_sorted_and_scrolled() -> None:
    models = [model("a", rate=1.0, memory=30), model("b", rate=3.0, memory=10), model("c", rate=2.0, memory=20)]
    sessions = [session(i, evaluations=i) for i in range(30)]
    shown, history = status(models, sessions), History()
    history.add(shown, 10.0)

    def order(**view: object) -> list[str]:
        lines = drawn(shown, history, View(100, 24, **view))  # type: ignore[arg-type]
        return [line.split()[0] for line in lines if line[:2] in ("a ", "b ", "c ")]

    assert order() == ["b", "c", "a"]
    assert order(sort="memory") == ["a", "c", "b"]
    assert order(sort="name") == ["a", "b", "c"]
    assert order(reverse=True) == ["a", "c", "b"]
    twice = status([model("a"), model("a", dtype="float32"), model("b", device="cpu:1")], [])
    history.add(twice, 11.0)
    narrow = "\n".join(drawn(twice, history, View(50)))
    assert "a float64 " in narrow and "a float32 " in narrow and "b  " in narrow
    history.add(shown, 12.0)
    last = drawn(shown, history, View(100, 24, sort="name", scroll=100))
    assert "3 sessions of others" in last[-2]
    assert any(line.split()[:2] == ["29", "alice"] for line in last)
    assert not any(line.split()[:2] == ["0", "alice"] for line in last)


def test_rates_and_shares_are_of_the_last_seconds() -> None:
    history = History()
    for second in range(20):
        sessions = [session(1, "alice", 10 * second), session(2, "bob", 30 * second)]
        if second >= 18:  # it has just come
            sessions.append(session(3, "bob", 0).model_copy(update={"since": 17.5, "evaluations": 4 * (second - 17)}))
        done = sum(session.evaluations for session in sessions)
        shown = status([model(evaluations=done, rate=99.0)], sessions, others=0)
        history.add(shown, float(second))
    assert history.rate(sessions[0]) == pytest.approx(10)
    assert history.rate(sessions[1]) == pytest.approx(30)
    assert history.rate(sessions[2]) == pytest.approx(8 / 1.5)
    assert list(history.trend(shown.models[0]).rate)[1:] == pytest.approx([40] * 17 + [44] * 2)
    assert history.model_rate(shown.models[0]) == pytest.approx(40 + 8 / SPAN), "over the same time as sessions"
    text = "\n".join(drawn(shown, history, View(120)))
    assert "22%" in text and "78%" in text
    assert "1 session of others" not in text
    text = "\n".join(drawn(shown.model_copy(update={"other_sessions": 1}), history, View(120)))
    assert "%" not in text.partition("PART")[2], "of what others had nobody is told"
    assert "1 session of others" in text
    assert SPAN < 18
    again = status([model(evaluations=7)], [session(1, "alice", 7)], since=19.5)  # a new daemon counts from the start
    again.sessions[0].since = 20.0
    history.add(again, 21.0)
    assert history.rate(again.sessions[0]) == pytest.approx(7)


def test_a_model_that_a_reload_has_replaced_is_another() -> None:
    """It is listed behind the one of its name that is there now."""
    history = History()
    for second in range(3):
        now = model(evaluations=1_000 + 200 * second, fingerprint="b")
        shown = status([now, model(evaluations=100, fingerprint="a", retired=True)], [])
        history.add(shown, float(second))
    assert [history.model_rate(one) for one in shown.models] == pytest.approx([200, 0])
    assert list(history.trend(now).rate)[1:] == pytest.approx([200, 200])


def test_what_numbers_look_like() -> None:
    assert [seconds(value) for value in (0, 12e-6, 1.234e-3, 0.01234, 0.1234, 1.5, 123)] == [
        "-", "12.0 µs", "1.23 ms", "12.3 ms", "123 ms", "1.50 s", "123 s",
    ]  # fmt: skip
    assert [size(value) for value in (0, 12_000_000, 12_340_000_000)] == ["-", "12 MB", "12.3 GB"]
    assert sparkline([0, 1, 4, 8], 5) == "  ▂▅█"
    assert sparkline([1, 2], 4, ascii_only=True).isascii()
    assert bar(0.5, 4) == "██░░" and bar(7.0, 4, ascii_only=True) == "####"
