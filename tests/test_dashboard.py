"""`rootstockd dashboard`: the page as a browser has it, and what its server tells whom."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from ase.build import bulk

from browser import CHROMIUM, Browser
from conftest import RunningDaemon, wait_for
from rootstock_client import RootstockClient
from rootstockd.cli.common import fetch_status
from rootstockd.control.schema import DaemonStatus
from rootstockd.dashboard.feed import PERIOD, Feed

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian, Ubuntu: chromium)")


class Dashboard:
    """The command, and what it serves."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rootstockd", "dashboard", "--socket", str(daemon.socket)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = "".join(self.process.stdout.readline() for _ in range(5))
        self.address = self.said.partition("\n")[0]
        assert self.address.startswith("http://127.0.0.1:"), self.process.communicate()[1]
        self.port = urlsplit(self.address).port
        assert self.port is not None
        self.entry = self.address.partition(str(self.port))[2]

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        """What it answers: status, headers and body."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()

    def enter(self) -> tuple[str, str]:
        """The folder that the page is in, and the cookie for it."""
        _, headers, _ = self.ask(self.entry)
        return headers["refresh"].partition("url=")[2], headers["set-cookie"].partition(";")[0]

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Its exit status, and what it complained of."""
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=30)
        return self.process.returncode, complaints

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    return start_shared_daemon("--model", "emt")


@pytest.fixture(scope="module")
def dashboard(daemon: RunningDaemon) -> Iterator[Dashboard]:
    with Dashboard(daemon) as dashboard:
        yield dashboard


@pytest.fixture
def browser() -> Iterator[Browser]:
    with contextlib.closing(Browser()) as browser:
        yield browser


def row(browser: Browser, table: str) -> dict[str, str]:
    """The first row of a table, by its headings; empty while there is none."""
    headings = browser.run(f"[...document.querySelectorAll('#{table} th')].map((cell) => cell.innerText.split(' ')[0])")
    cells = browser.run(f"[...document.querySelectorAll('#{table} tbody tr:first-child td')].map((c) => c.innerText)")
    return dict(zip(headings, cells, strict=False))


# --- in a browser


@needs_browser
def test_the_page_has_the_figures_of_the_daemon(daemon: RunningDaemon, dashboard: Dashboard, browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(dashboard.address)
    browser.until(lambda: browser.text("#state") == "ready")
    assert "token" not in browser.run("location.href")
    assert browser.run("document.cookie") == "", "no script reads the cookie"
    atoms = bulk("Cu", cubic=True)
    with RootstockClient(daemon.socket) as client:
        atoms.calc = client.calculator("emt")

        def step() -> bool:
            atoms.rattle(0.001, rng=None, seed=1)
            atoms.get_potential_energy()
            return browser.run("document.querySelector('#plots path')?.getAttribute('d').includes('L')")

        browser.until(step)
        status = fetch_status(daemon.socket)
        (model,), (session,) = status.models, status.sessions
        browser.until(lambda: row(browser, "models")["evaluations"] == str(model.evaluations))
        shown = row(browser, "models")
        assert (shown["model"], shown["dtype"], shown["state"], shown["sessions"]) == ("emt", "float64", "ready", "1")
        assert shown["batch"] == "1.0" and shown["p50"].endswith(("µs", "ms"))
        shown = row(browser, "sessions")
        assert (shown["session"], shown["user"], shown["pid"]) == (str(session.id), session.user, str(os.getpid()))
        assert (shown["model"], shown["dtype"]) == ("emt", "float64")
        assert (shown["atoms"], shown["evaluations"]) == ("4", str(session.evaluations))
        assert (row(browser, "users")["user"], row(browser, "users")["sessions"]) == (session.user, "1")
        assert f"of {status.device_states[0].memory_total / 1e9:.1f} GB" in browser.text("#devices")
        assert browser.text("#host") == f"on {socket.gethostname()}" in browser.run("document.title")
        assert browser.text("#legend") == "emt"

    # a page that is loaded anew has what was there before
    browser.call("Page.reload")
    browser.until(lambda: browser.run("document.querySelector('#plots path')?.getAttribute('d').includes('L')"))
    assert browser.text("#trouble") == ""

    # a column that is pressed sorts, the other way when it is pressed again; arrows go through time
    for expected in ("descending", "ascending"):
        browser.run("document.querySelectorAll('#models th button')[4].click()")
        assert browser.run("document.querySelectorAll('#models th')[4].ariaSort") == expected
    assert browser.text(".tip") == ""
    browser.run("document.querySelector('figure').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert ":" in browser.text(".tip"), "a time"
    assert browser.run("document.querySelector('.tip').style.right").endswith("px"), "at the left of where it points"
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert browser.text(".tip") == ""

    # it fits a phone
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") == 360
    complaints = [event for event in browser.events if "favicon" not in str(event)]
    assert not complaints, "neither its policy nor a script has failed"


@needs_browser
def test_a_daemon_that_went_and_came_back_is_seen(own_daemon: RunningDaemon, browser: Browser) -> None:
    with Dashboard(own_daemon) as dashboard:
        browser.open(dashboard.address)
        browser.until(lambda: browser.text("#state") == "ready")
        own_daemon.stop()
        browser.until(lambda: browser.text("#state") == "away")
        assert browser.text("#trouble").startswith("Waiting for the daemon: ")
        assert row(browser, "models")["model"] == "emt", "what was there last stays"
        own_daemon.start()
        browser.until(lambda: browser.text("#state") == "ready")
        assert browser.text("#trouble") == ""
        assert f"pid {own_daemon.pid}," in browser.text("#about")
        assert dashboard.end() == (0, "")
        browser.until(lambda: browser.text("#trouble").startswith("The dashboard does not answer."))


# --- who is told what


def test_who_has_the_token_gets_a_cookie_for_a_path_that_nobody_else_knows(dashboard: Dashboard) -> None:
    status, headers, _ = dashboard.ask(dashboard.entry)
    folder, cookie = dashboard.enter()
    assert status == 200 and len(folder) > 16
    parts = headers["set-cookie"].lower().split("; ")
    assert {"httponly", "samesite=strict", f"path={folder}".lower()} <= set(parts)
    status, headers, body = dashboard.ask(folder, Cookie=cookie, Host="localhost:8000")
    assert status == 200 and "<title>rootstockd</title>" in body
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    name, _, value = cookie.partition("=")
    assert len(name) > 16, "nobody can put another of its name before it"
    beside = f"rootstockd=x; {cookie}; {name[:12]}={value[:12]}"
    status, headers, body = dashboard.ask(f"{folder}look?after=0", Cookie=beside)
    assert status == 200 and headers["content-type"] == "application/json" and '"emt"' in body


def test_nobody_else_is_told_anything(dashboard: Dashboard) -> None:
    folder, cookie = dashboard.enter()
    name = cookie.partition("=")[0]
    for path in ("/", "/?token=", "/?token=x", "/?token=%C3%A9", f"{dashboard.entry}x", folder, f"{folder}look"):
        for headers in ({}, {"Cookie": f"{name}="}, {"Cookie": f"{name}=\u00e9"}, {"Cookie": cookie + "x"}):
            status, answered, body = dashboard.ask(path, **headers)
            assert status == 403 and "set-cookie" not in answered, (path, headers)
            assert "emt" not in body and folder not in body
    for host in ("evil.example", f"127.0.0.1.evil.example:{dashboard.port}", "", "localhost@evil.example"):
        status, _, body = dashboard.ask(f"{folder}look", Cookie=cookie, Host=host)
        assert status == 400 and "emt" not in body, host


def test_there_is_nothing_but_pages_to_read(dashboard: Dashboard) -> None:
    folder, cookie = dashboard.enter()
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "NONSENSE"):
        status, headers, _ = dashboard.ask(f"{folder}look", method, Cookie=cookie)
        assert (status, headers["allow"]) == (405, "GET"), method
    for path in (
        *("/", "//", f"{folder}..", f"{folder}../server.py", f"{folder}%2e%2e/server.py", f"{folder}..%2fserver.py"),
        *(f"{folder}/etc/passwd", f"{folder}page/index.html", f"{folder}__init__.py", f"{folder}%00", f"/{folder}"),
    ):
        assert dashboard.ask(path, Cookie=cookie)[0] == 404, path
    assert dashboard.ask(f"{folder}look?after=now", Cookie=cookie)[0] == 400
    for head in (
        b"\x16\x03\x01\x00\xff nonsense\r\n\r\n",
        b"GET /" + b"x" * 20_000,
        b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000,
    ):
        with socket.create_connection(("127.0.0.1", dashboard.port)) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    crowd = [socket.create_connection(("127.0.0.1", dashboard.port)) for _ in range(40)]
    assert crowd[-1].recv(100).startswith(b"HTTP/1.1 503")
    for connection in crowd:
        connection.close()
    wait_for(lambda: dashboard.ask(folder, Cookie=cookie)[0] == 200)
    assert not select.select([dashboard.process.stderr], [], [], 0)[0], "none of this is said in the user's terminal"


# --- what it asks the daemon


def test_pages_share_looks_and_without_one_there_are_none(daemon: RunningDaemon) -> None:
    asked = []

    def ask() -> DaemonStatus:
        asked.append(True)
        return fetch_status(daemon.socket)

    async def watch() -> None:
        feed = Feed(ask, fetch_status(daemon.socket))
        first = await feed.look(0)
        assert not asked, "the latest is new enough"
        second, *others = await asyncio.gather(*(feed.look(first["time"]) for _ in range(5)))
        assert len(asked) == 1 and all(other == second for other in others)
        assert second["time"] > first["time"]
        assert [len(trend["points"]) for trend in second["trends"]] == [1], "what the page lacked"
        await asyncio.sleep(3 * PERIOD)  # nobody looks
        assert len(asked) == 1
        (trend,) = (await feed.look(0))["trends"]
        assert len(asked) == 2, "the latest was too old"
        assert [len(point) for point in trend["points"]] == [5, 5, 5]

    asyncio.run(watch())


# --- the command


def test_it_says_how_to_come_to_it_and_ends(daemon: RunningDaemon) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with Dashboard(daemon) as dashboard:
            connection = http.client.HTTPConnection("127.0.0.1", dashboard.port)  # one that stays keeps it from nothing
            connection.request("GET", "/")
            connection.getresponse().read()
            assert f"ssh -N -L {dashboard.port}:127.0.0.1:{dashboard.port} " in dashboard.said
            assert dashboard.end(number) == (0, "")
            connection.close()


def test_what_keeps_it_from_starting(daemon: RunningDaemon, dashboard: Dashboard) -> None:
    done = daemon.run("dashboard", "--port", str(dashboard.port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: can't listen on port {dashboard.port}: Address already in use.")
    done = subprocess.run(
        [sys.executable, "-m", "rootstockd", "dashboard", "--socket", f"{daemon.folder}/none.sock"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and "rootstockd start" in done.stderr and "Traceback" not in done.stderr
