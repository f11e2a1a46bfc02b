"""Metrics are what was done, as Prometheus reads them; what ships for Grafana and Prometheus asks for nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from pydantic import ValidationError

from conftest import RunningDaemon, rootstockd, wait_for
from rootstock_client.control import fetch
from rootstock_client.errors import UnknownModelError
from rootstockd.control.limits import DEADLINE, MAX_SCRAPERS, PACE
from rootstockd.settings.config import Config, Device
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.meter import MOST_NOTES, SECONDS, Histogram, Meter, Totals
from rootstockd.users import user_name

EMT = {"model": "emt", "dtype": "float64", "device": "cpu"}
BY_PROMETHEUS = {"instance", "job"}
"""Labels that it adds itself."""


class Metrics:
    """The samples of one look."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The one sample of that name with these labels, and maybe others."""
        (value,) = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return value

    def labels(self, name: str) -> set[str]:
        return {label for sample in self.samples if sample.name == name for label in sample.labels}

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}


def look(daemon: RunningDaemon) -> Metrics:
    return Metrics(read_text(fetch(daemon.socket, "GET", "/metrics").decode()))


def port(daemon: RunningDaemon) -> str:
    return str(daemon.client().status()["metrics"])


def look_at_port(daemon: RunningDaemon) -> Metrics:
    with urllib.request.urlopen(port(daemon), timeout=30) as answer:
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return Metrics(read_text(answer.read().decode()))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("metrics") / "config.toml"
    file.write_text('metrics = "127.0.0.1:0"\n')
    return file


@pytest.fixture(scope="module")
def daemon(start_shared_daemon: Callable[..., RunningDaemon], config: Path) -> RunningDaemon:
    return start_shared_daemon("--model", "emt", "--config", str(config))


def copper(daemon: RunningDaemon, model: str = "emt") -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.calc = daemon.client().calculator(model)
    return atoms


def step(atoms: Atoms, times: int = 1) -> None:
    for seed in range(times):
        atoms.rattle(0.01, seed=seed)
        atoms.get_potential_energy()


# --- what was done


def test_they_say_what_was_done(daemon: RunningDaemon) -> None:
    before = look(daemon)
    atoms = copper(daemon)
    step(atoms, 7)
    with pytest.raises(UnknownModelError):
        copper(daemon, "no-such-model").get_potential_energy()
    wait_for(lambda: look(daemon)("rootstockd_model_memory_bytes", **EMT))  # it is measured once a second
    after = look(daemon)

    def more(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert more("rootstockd_errors_total", code="unknown-model") == 1
    assert sum(more("rootstockd_errors_total", code=code) for code in ("protocol", "evaluation", "limit")) == 0
    assert after("rootstockd_evaluations_total", **EMT) == daemon.model("emt")["evaluations"]
    assert more("rootstockd_evaluations_total", **EMT) == 7
    assert more("rootstockd_atoms_total", **EMT) == 7 * 4
    assert more("rootstockd_batch_evaluations_count", **EMT) == more("rootstockd_batch_evaluations_sum", **EMT) == 7
    assert more("rootstockd_batch_evaluations_bucket", **EMT, le="1.0") == 7
    assert more("rootstockd_batch_atoms_bucket", **EMT, le="8.0") == more("rootstockd_batch_atoms_count", **EMT) == 7
    for stage in ("queue", "worker"):
        assert more("rootstockd_evaluation_seconds_count", **EMT, stage=stage) == 7
        assert more("rootstockd_evaluation_seconds_bucket", **EMT, stage=stage, le="100.0") == 7
        assert 0 < more("rootstockd_evaluation_seconds_sum", **EMT, stage=stage) < 100
    assert more("rootstockd_worker_busy_seconds_total", **EMT) == pytest.approx(
        more("rootstockd_evaluation_seconds_sum", **EMT, stage="worker")
    )
    assert after("rootstockd_model_load_seconds_count", **EMT) == 1
    assert after("rootstockd_models", state="ready") == 1 and after("rootstockd_models", state="failed") == 0
    assert after("rootstockd_sessions", state="idle") >= 1
    assert after("rootstockd_queue_length", **EMT) == 0
    assert after("rootstockd_model_memory_bytes", **EMT) > 10e6
    assert after("rootstockd_device_memory_total_bytes") > after("rootstockd_device_memory_used_bytes") > 100e6
    assert after("rootstockd_ready") == 1 and after("process_open_fds") > 5
    status = daemon.model("emt")
    assert 0 < status["latency_p50"] <= status["latency_p99"] < 100 and status["batch_size"] >= 1
    (device,) = daemon.client().status()["device_states"]
    assert device["name"] == "cpu" and device["memory_total"] == after("rootstockd_device_memory_total_bytes")


def test_counters_never_go_back(own_daemon: RunningDaemon) -> None:
    atoms = copper(own_daemon)
    step(atoms, 3)
    os.kill(own_daemon.model("emt")["pid"], signal.SIGKILL)
    step(atoms, 2)
    assert look(own_daemon)("rootstockd_worker_restarts_total", **EMT) == 1
    user = user_name(os.getuid())
    assert look(own_daemon)("rootstockd_user_evaluations_total", user=user) == 5
    atoms.calc.close()
    wait_for(lambda: look(own_daemon)("rootstockd_sessions", state="idle") == 0)
    assert own_daemon.run("unload", "emt").returncode == 0
    # it is no longer in the fleet once its supervisor has ended
    wait_for(lambda: look(own_daemon)("rootstockd_models", state="ready") == 0)
    for _ in range(2):
        after = look(own_daemon)
        assert after("rootstockd_evaluations_total", **EMT) == own_daemon.client().status()["evaluations"] == 5
        assert after("rootstockd_user_evaluations_total", user=user) == 5
    step(copper(own_daemon), 2)
    after = look(own_daemon)
    assert after("rootstockd_evaluations_total", **EMT) == own_daemon.client().status()["evaluations"] == 7
    assert after("rootstockd_worker_restarts_total", **EMT) == 1
    assert after("rootstockd_user_evaluations_total", user=user) == 7


def test_both_formats(daemon: RunningDaemon) -> None:
    for wanted in (
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        "application/openmetrics-text;version=x",
    ):
        request = urllib.request.Request(port(daemon), headers={"Accept": wanted})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            families = {family.name: family.type for family in read_openmetrics(answer.read().decode())}
    assert families["rootstockd_build"] == "info"
    assert families["rootstockd_evaluations"] == "counter"
    assert families["rootstockd_evaluation_seconds"] == "histogram"
    shown = {family.name: family.type for family in read_text(daemon_command(daemon, "show"))}
    told = (Path(__file__).parent.parent / "docs/monitoring.md").read_text()
    for name, kind in shown.items():
        assert name.startswith("process_") or f"`{name}{'_total' * (kind == 'counter')}`" in told


def daemon_command(daemon: RunningDaemon, name: str) -> str:
    done = rootstockd("metrics", name, env={**os.environ, "ROOTSTOCKD_SOCKET": str(daemon.socket)})
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the port


def test_users_are_named_on_the_port_where_the_settings_say_so(daemon: RunningDaemon, config: Path) -> None:
    atoms = copper(daemon)
    step(atoms)
    assert "rootstockd_user_sessions" in look(daemon).names
    assert not any("_user_" in name for name in look_at_port(daemon).names)
    config.write_text(config.read_text() + "metrics_users = true\n")
    assert daemon.run("reload").returncode == 0
    wait_for(lambda: "rootstockd_user_sessions" in look_at_port(daemon).names)
    assert look_at_port(daemon)("rootstockd_user_sessions", user=user_name(os.getuid())) >= 1
    file = config.with_name("rootstockd.prom")
    assert rootstockd("metrics", "write", file, "--socket", daemon.socket).returncode == 0
    assert "rootstockd_user_sessions" in Metrics(read_text(file.read_text())).names


def test_the_port_has_metrics_alone(daemon: RunningDaemon) -> None:
    address = port(daemon).removeprefix("http://").removesuffix("/metrics")
    for method, path in (("GET", "/v1/status"), ("POST", "/v1/stop"), ("GET", "/docs")):
        with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
            connection.request(method, path, "{}")
            assert connection.getresponse().status == http.HTTPStatus.NOT_FOUND
    assert daemon.client().status()["state"] == "ready"


def test_a_body_on_the_port_is_not_waited_for(daemon: RunningDaemon) -> None:
    host, _, number = port(daemon).removeprefix("http://").removesuffix("/metrics").rpartition(":")
    with socket.create_connection((host, int(number)), timeout=5) as sock:
        sock.sendall(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 405")


def test_nobody_takes_the_daemons_descriptors_through_the_port(daemon: RunningDaemon) -> None:
    host, _, number = port(daemon).removeprefix("http://").removesuffix("/metrics").rpartition(":")
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection((host, int(number)), timeout=30))
            for _ in range(3 * MAX_SCRAPERS)
        ]
        for refused in opened[MAX_SCRAPERS:]:
            assert refused.recv(100).startswith(b"HTTP/1.1 503 ")
        step(copper(daemon))
    wait_for(lambda: "rootstockd_ready" in look_at_port_if_let_in(daemon))


def test_requests_to_the_port_are_let_in_one_after_another(daemon: RunningDaemon) -> None:
    """Whatever they ask for: each keeps the daemon from steps."""
    host, _, number = port(daemon).removeprefix("http://").removesuffix("/metrics").rpartition(":")
    many, answers = 40, b""
    with socket.create_connection((host, int(number)), timeout=30) as sock:
        begin = time.monotonic()
        sock.sendall(many * b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        while answers.count(b"HTTP/1.1 404") < many:
            answers += sock.recv(65536)
    assert time.monotonic() - begin > 0.9 * (many - 1) * PACE  # the loop's clock has whole milliseconds


def test_who_asks_and_goes_leaves_nothing_that_waits(daemon: RunningDaemon) -> None:
    """A thousand and more of them are no debt of minutes to whoever asks next."""
    host, _, number = port(daemon).removeprefix("http://").removesuffix("/metrics").rpartition(":")
    for _ in range(round(4 * DEADLINE / PACE)):
        with contextlib.suppress(OSError), socket.create_connection((host, int(number)), timeout=30) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: "rootstockd_ready" in look_at_port_if_let_in(daemon), timeout=2 * DEADLINE)


def look_at_port_if_let_in(daemon: RunningDaemon) -> set[str]:
    try:
        return look_at_port(daemon).names
    except OSError:  # refused, or cut off on a machine that is slow
        return set()


def test_a_port_that_is_taken(runtime_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        where = (
            "--device",
            "cpu",
            "--socket",
            runtime_folder / "taken.sock",
            "--log-file",
            runtime_folder / "taken.log",
        )
        done = rootstockd("start", *where, "--metrics", address)
        assert done.returncode == 1
        assert f"can't listen on {address} for metrics" in done.stderr
    done = rootstockd("start", *where, "--metrics", "127.0.0.1:0")
    url = done.stdout.split()[-1]
    assert done.stdout.splitlines()[-1] == f"metrics {url}" and url.startswith("http://127.0.0.1:")
    assert f"metrics at {url}" in rootstockd("status", *where[2:4]).stdout
    assert rootstockd("stop", *where[2:4]).returncode == 0
    with pytest.raises(ValidationError, match="metrics"):
        Config(socket=Path("/nowhere"), devices=(Device(name="cpu"),), metrics="9746")


def test_the_file_for_node_exporter(own_daemon: RunningDaemon, tmp_path: Path) -> None:
    daemon = own_daemon
    atoms = copper(daemon)
    step(atoms)
    file = tmp_path / "rootstockd.prom"
    assert rootstockd("metrics", "write", file, "--socket", daemon.socket, umask=0o077).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o644
    before, written = look(daemon), Metrics(read_text(file.read_text()))
    assert {"rootstockd_user_sessions", "rootstockd_user_evaluations_total"} <= before.names
    assert written.names == {name for name in before.names if not name.startswith(("process_", "rootstockd_user_"))}
    assert all(sample.labels["socket"] == str(daemon.socket) for sample in written.samples)
    assert written("rootstockd_evaluations_total", **EMT) == before("rootstockd_evaluations_total", **EMT)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    done = rootstockd("metrics", "write", tmp_path / "none" / "x.prom", "--socket", daemon.socket)
    assert done.returncode == 1 and f"can't be kept in {tmp_path}/none: No such file or directory." in done.stderr


def test_a_file_for_node_exporter_that_can_not_be_written_leaves_the_one_before(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "rootstockd.prom"
    file.write_text("before")
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, "-m", "rootstockd"]  # 1 KiB, or half of it
    done = subprocess.run(
        [*limited, "metrics", "write", file, "--socket", daemon.socket], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and f"{file} can't be kept in {tmp_path}: File too large." in done.stderr
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_files_for_node_exporter_are_written_by_several_at_once(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Such as cron's runs where one takes longer than its minute."""
    file = tmp_path / "rootstockd.prom"
    command = [sys.executable, "-m", "rootstockd", "metrics", "write", str(file), "--socket", str(daemon.socket)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, umask=0o077) for _ in range(6)]
    assert [(run.communicate(timeout=60)[1], run.returncode) for run in runs] == [("", 0)] * len(runs)
    assert file.stat().st_mode & 0o777 == 0o644 and list(tmp_path.iterdir()) == [file]
    assert Metrics(read_text(file.read_text())).names


# --- what is shipped


def expressions(text: str) -> list[str]:
    """The queries of a dashboard, or of a file of alerts."""
    if text.startswith("{"):
        board = json.loads(text)
        queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
        return queries + [v["definition"] for v in board["templating"]["list"] if v["type"] == "query"]
    return [rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def well_formed(query: str) -> bool:
    """Whether what opens closes, as far as that goes without Prometheus."""
    bare, opened = re.sub(r'"[^"]*"', "", query), []
    for sign in re.findall(r"[][(){}\"]", bare):
        if sign in "([{":
            opened.append(sign)
        elif not opened or opened.pop() + sign not in ("()", "[]", "{}"):
            return False
    return not opened


MATCHER = re.compile(r'(\w+)=~?"([^"]*)"')


@pytest.mark.parametrize("what", ["dashboard", "alerts"])
def test_what_is_shipped_asks_for_what_there_is(what: str, daemon: RunningDaemon) -> None:
    atoms = copper(daemon)
    step(atoms)
    metrics = look(daemon)
    queries = expressions(daemon_command(daemon, what))
    assert len(queries) >= 5
    for query in queries:
        assert well_formed(query), query
        for name, selected in re.findall(r"\b((?:rootstockd|process)_\w+)(?:\{([^}]*)\})?", query):
            assert name in metrics.names, f"{query}: there is no {name}"
            asked = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")}
            assert not MATCHER.sub("", selected).strip(" ,"), query
            for label, wanted in MATCHER.findall(selected):
                asked.add(label)
                if label not in BY_PROMETHEUS and "$" not in wanted:  # what people choose in a dashboard
                    values = {sample.labels.get(label, "") for sample in metrics.samples if sample.name == name}
                    assert any(re.fullmatch(wanted, value) for value in values), f"{query}: no {label} of {name} is so"
            assert asked - BY_PROMETHEUS <= metrics.labels(name), f"{query}: {name} has no such label"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here (it comes with Prometheus)")
def test_prometheus_takes_the_alerts(tmp_path: Path) -> None:
    file = tmp_path / "alerts.yml"
    file.write_text(rootstockd("metrics", "alerts").stdout)
    subprocess.run(["promtool", "check", "rules", file], check=True, capture_output=True)


def test_the_dashboard_is_one() -> None:
    board = json.loads(resources.files("rootstockd").joinpath("monitoring/grafana-dashboard.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    taken = np.zeros((200, 24), dtype=int)
    for panel in panels:
        place = panel["gridPos"]
        taken[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]] += 1
        assert panel["type"] in {"row", "stat", "timeseries"} and panel["title"]
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
            assert used <= variables
            assert panel["description"]
    assert taken.max() == 1, "panels lie over each other"


# --- the counting itself


@given(st.lists(st.sampled_from([1e-6, 1e-5, 3e-5, 0.5, 1.0, 99.0, 100.0, 1e4]), max_size=20), st.integers(1, 5))
def test_a_histogram_counts_what_is_up_to_each_bound(values: list[float], times: int) -> None:
    histogram = Histogram(SECONDS)
    histogram.add(values, times)
    for bound, count in zip((*SECONDS, float("inf")), histogram.counts.cumsum(), strict=True):
        assert count == times * sum(value <= bound for value in values)
    assert histogram.sum == pytest.approx(times * sum(values))


def test_a_meter_counts_each_evaluation_once() -> None:
    totals = Totals()
    meter = Meter(totals)
    assert meter.latencies(0.5) is None and meter.batch_size is None
    batch = [Evaluation("session", 10, submitted=99.0), Evaluation("another", 20, submitted=99.5)]
    for _ in range(MOST_NOTES):  # more than it keeps
        meter.done(batch, 100.0, 0.25)
    meter.count()
    meter.count()
    assert totals.evaluations.sum == 2 * MOST_NOTES and totals.evaluations.counts.sum() == MOST_NOTES
    assert totals.atoms.sum == 30 * MOST_NOTES
    assert totals.queue.sum == pytest.approx(1.5 * MOST_NOTES) and totals.queue.counts.sum() == 2 * MOST_NOTES
    assert totals.worker.sum == pytest.approx(2 * 0.25 * MOST_NOTES) and totals.busy == pytest.approx(0.25 * MOST_NOTES)
    assert meter.latencies(0.0, 1.0) == pytest.approx([0.75, 1.25]) and meter.batch_size == 2
