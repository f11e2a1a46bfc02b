"""The benchmarks' own arithmetic, one short run of them, and all of the Modal app that needs no account."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from rootstock_client import RootstockClient

REPOSITORY = Path(__file__).resolve().parent.parent
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here: this is no checkout", allow_module_level=True)

from benchmarks import (  # noqa: E402
    backends,
    child,
    common,
    first_force,
    machine,
    models,
    overhead,
    profile_step,
    report,
    run_local,
    scale,
    size,
)

SHORT = ["--only", "ipc", "--quick", "--sizes", "10,100", "--no-install"]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A benchmark pins the process that it runs in, and lets it open many files."""
    cpus, files = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    os.sched_setaffinity(0, cpus)
    resource.setrlimit(resource.RLIMIT_NOFILE, files)


def result(step: float, limit: float) -> dict[str, Any]:
    """What a run of one benchmark writes."""
    results = common.Results("ipc")
    results.add("rootstockd", "step", "µs", [step, 1.02 * step, 1.04 * step], natoms=100)
    results.goal("step over the echo", step / 100, limit)
    results.goal("step over a peer that is not there", None, 1)
    results.note("a note")
    hardware = {"cpu": "a CPU", "architecture": "x86_64", "cpus": 4, "cpus used": 2, "gpus": []}
    return {
        "schema": run_local.SCHEMA,
        "created": "2026-01-01T00:00:00+00:00",
        "quick": True,
        "device": "cpu",
        "hardware": {**hardware, "load average at the start": [0.5, 0.5, 0.5]},
        "software": {"python": "3.12.0", "rootstockd": "0.1.0"},
        "commit": "0123456789abcdef",
        "peers": {},
        "benchmarks": {"ipc": {"goals": results.goals, "notes": results.notes, "samples": results.samples}},
    }


class TestNumbers:
    def test_summary(self) -> None:
        found = common.summary([4.0, 1.0, 3.0, 2.0, 5.0])
        assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "count": 5}
        assert common.summary([7.0])["q1"] == common.summary([7.0])["q3"] == 7.0

    @pytest.mark.parametrize(
        ("value", "at_least", "met"),
        [
            (0.9, False, True),
            (1.0, False, True),
            (1.1, False, False),
            (1.1, True, True),
            (0.9, True, False),
            (None, False, False),
            (None, True, False),
        ],
    )
    def test_a_goal(self, value: float | None, at_least: bool, met: bool) -> None:
        results = common.Results("any")
        results.goal("what", value, 1, at_least=at_least)
        assert results.goals == [
            {"what": "what", "value": value, "goal": f"{'>=' if at_least else '<='} 1", "met": met}
        ]

    def test_a_ratio_needs_both(self) -> None:
        assert common.ratio(1.0, 4.0) == 0.25
        assert common.ratio(None, 4.0) is common.ratio(1.0, None) is None

    def test_find_looks_at_all_that_is_asked(self) -> None:
        results = common.Results("any")
        for natoms in (10, 20):
            results.add("arm", "step", "s", [float(natoms)], model="m", natoms=natoms)
        assert results.find("arm", "step", natoms=20) == 20.0
        assert results.find("arm", "step", natoms=20, model="other") is None
        assert results.find("other", "step", natoms=20) is None

    @pytest.mark.parametrize("natoms", [4, 32, 64, 108, 256, 500, 864, 1372, 10, 1, 1000, 4000])
    def test_copper_has_the_atoms_that_were_asked_for(self, natoms: int) -> None:
        a, b, c = child.repeats(natoms)
        assert 4 * a * b * c >= natoms
        atoms = child.copper(natoms)
        assert len(atoms) == natoms and all(atoms.pbc)

    @pytest.mark.parametrize(
        ("natoms", "cells"), [(4, (1, 1, 1)), (64, (2, 2, 4)), (864, (6, 6, 6)), (1372, (7, 7, 7))]
    )
    def test_blocks_are_as_cubic_as_can_be(self, natoms: int, cells: tuple[int, int, int]) -> None:
        assert child.repeats(natoms) == cells

    def test_contestants_get_the_same_positions_and_never_the_same_twice(self) -> None:
        one, other = child.NoopInProcess({}), child.NoopInProcess({})
        for arm in (one, other):
            arm.system(32)
        assert (one.place(5) == other.place(5)).all()
        assert (one.place(5) != one.place(6)).any()

    @pytest.mark.parametrize("natoms", [4, 32, 1372])
    def test_lists_come_to_their_end_as_often_as_in_md(self, natoms: int) -> None:
        arm = child.NoopInProcess({})
        arm.system(natoms)
        begin, lists = arm.place(0), 0
        for step in range(1, 1001):
            if (((now := arm.place(step)) - begin) ** 2).sum(axis=1).max() > 0.25**2:
                begin, lists = now, lists + 1
        assert 1000 / 50 < lists < 1000 / 20

    def test_both_ways_to_a_first_force_begin_before_their_import(self) -> None:
        for calculator, package in (
            (first_force.THROUGH_DAEMON, "rootstock_client"),
            (first_force.IN_PROCESS, "mace"),
        ):
            before, after = first_force.JOB.replace("{calculator}", calculator).split("begin = ")
            assert package not in before and package in after

    def test_the_cache_of_a_random_model_depends_on_the_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("mace", reason="names hold mace-torch's version, which is not installed")
        before = models.cached("mp0-small-random")
        assert before == models.cached("mp0-small-random") != models.cached("mp0-medium-random")
        monkeypatch.setattr(models, "SEED", models.SEED + 1)
        assert models.cached("mp0-small-random") != before
        assert "random" in before.name


def test_a_profile_counts_a_function_once_a_sample() -> None:
    """However often it is in a stack; and what it calls counts for it as well."""
    a, b = "a (/x/rootstockd/one.py:3)", "b (/x/rootstockd/two.py:9)"
    raw = f"{a};{b};{a} 30\n{a};send (libc.so.6) 70\n"
    of_ours, alone = profile_step.shares(raw).split("\n\n")
    assert of_ours.splitlines()[2:] == ["  100.0 %  a (rootstockd/one.py)", "   30.0 %  b (rootstockd/two.py)"]
    assert alone.splitlines()[1:] == ["   70.0 %  send (libc.so.6)", "   30.0 %  a (rootstockd/one.py)"]


class TestReport:
    def test_one(self) -> None:
        shown = "\n".join(report.one(result(50.0, 1)))
        assert "2 of 4 CPUs" in shown and "0123456789ab" in shown and "- a note" in shown
        assert "| rootstockd | step | natoms 100 | 51 µs | 50.5 … 51.5 | 3 |" in shown
        goals = [line for line in shown.splitlines() if line.startswith("| ipc |")]
        assert "not measured **missed**" in goals[0]  # missed ones first
        assert "0.5 met" in goals[1]

    def test_two(self) -> None:
        shown = "\n".join(report.two(result(50.0, 1), result(200.0, 1)))
        (line,) = (line for line in shown.splitlines() if "natoms 100" in line)
        assert line == "| ipc | rootstockd | step | natoms 100 | 51 µs | 204 µs | 4.00 |  |"
        assert "0.5 met | 2 **missed**" in shown

    def test_quartiles_that_overlap_are_said_to(self) -> None:
        assert "quartiles overlap" in "\n".join(report.two(result(50.0, 1), result(50.1, 1)))

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            *((999.96, "1,000"), (-999.96, "-1,000"), (999.4, "999"), (1_234.5, "1,234"), (99.96, "100"), (0.5, "0.5")),
            *((0.00012345, "0.000123"), (2.4e-5, "2.4e-5"), (6.123e-12, "6.12e-12"), (0.0, "0")),
            *((12_345_678.9, "12,345,679"), (None, "not measured")),
        ],
    )
    def test_numbers_are_as_people_write_them(self, value: float | None, shown: str) -> None:
        assert report.number(value) == shown

    def test_the_command_ends_quietly_where_nobody_reads_on(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(result(50.0, 1)))
        command = [sys.executable, "-m", "benchmarks.report", path]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            assert running.stdout is not None and running.stderr is not None
            running.stdout.close()
            assert running.stderr.read() == b""
        assert running.returncode == -signal.SIGPIPE

    def test_the_command_compares_files(self, tmp_path: Path) -> None:
        paths = []
        for name, step in (("a", 50.0), ("b", 100.0)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(result(step, 1)))
        command = [sys.executable, "-m", "benchmarks.report", *paths]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        assert "| 2.00 |" in done.stdout


class TestContestants:
    def test_they_are_pinned_alike_and_compute_the_same(self, tmp_path: Path) -> None:
        settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
        used = common.use_cpus(1)
        with contextlib.ExitStack() as stack:
            daemon = stack.enter_context(common.Daemon(settings, "--model", "emt"))
            spec, environment = daemon.worker_arguments("emt")
            assert spec["name"] == "emt" and environment["CUDA_VISIBLE_DEVICES"] == ""
            arms = [
                common.Child(settings, "rootstockd", socket=daemon.socket, model="emt"),
                common.Child(settings, "same backend", environment=environment, spec=spec),
            ]
            children = stack.enter_context(common.contestants(arms))
            for one in arms:
                one.system(32)
            seconds = common.interleave(arms, blocks=3, steps=2)
            assert [len(values) for values in seconds.values()] == [6, 6]
            results = [one.ask(do="result", step=7) for one in arms]
            pids = [daemon.pid, daemon.worker("emt"), *(pid for one in children.values() for pid in one.pids)]
            assert [os.sched_getaffinity(pid) for pid in pids] == [set(used)] * 4
        assert results[0]["energy"] == pytest.approx(results[1]["energy"], abs=1e-9)
        forces = [[value for row in found["forces"] for value in row] for found in results]
        assert forces[0] == pytest.approx(forces[1], abs=1e-9)
        assert max(forces[0]) > 0.01

    def test_the_largest_system_fits_a_machine_of_24_gb(self, tmp_path: Path) -> None:
        """Going by what an atom takes: in all three processes, each at its peak."""
        settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
        natoms = 500_000
        with common.Daemon(settings, "--model", "noop") as daemon:
            arm = common.Child(settings, "rootstockd", socket=daemon.socket, model="noop")
            with common.contestants([arm]):
                arm.system(100)
                pids = [daemon.pid, daemon.worker("noop"), *arm.pids]
                for pid in pids:
                    common.reset_peak(pid)
                before = sum(map(common.peak, pids))
                arm.system(natoms, warm_up=size.WARM_UP)
                grown = sum(map(common.peak, pids)) - before
        assert 300 < grown / natoms < size.BYTES
        assert max(size.SIZES) * size.BYTES < 20e9

    def test_a_step_with_stress_is_one_evaluation(self, tmp_path: Path) -> None:
        settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
        with common.Daemon(settings, "--model", "emt") as daemon:
            arm = child.Rootstockd({"socket": daemon.socket, "model": "emt", "stress": True})
            arm.system(32)
            for _ in range(3):
                arm.step()
            results = arm.atoms.calc.results
            (session,) = daemon.status["sessions"]
            arm.atoms.calc.close()
        assert {"energy", "forces", "stress"} <= results.keys()
        assert session["evaluations"] == 3

    def test_all_are_asked_for_stress_where_mace_torch_computes_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {}

        def arm(_settings: Any, name: str, **options: Any) -> None:
            asked[name] = options.get("stress")

        class Daemon:
            socket = tmp_path

            def worker_arguments(self, _model: str) -> tuple[dict[str, Any], dict[str, str]]:
                return {}, {}

        monkeypatch.setattr(overhead, "Child", arm)
        model = models.Model("any", tmp_path, "float32", ())
        overhead._arms(common.Settings(True, "cpu", tmp_path, None), cast("common.Daemon", Daemon()), model)
        assert asked == dict.fromkeys((*overhead.TIMED, overhead.EXACT), True)

    @pytest.mark.timeout(900)  # five processes import torch, one after another
    def test_a_model_is_seen_in_its_other_dtype_and_by_more_pairs_of_processes(self, tmp_path: Path) -> None:
        pytest.importorskip("mace", reason="mace-torch is not installed")
        settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
        results = common.Results("overhead", parameters={"backends": {}})
        model, natoms = models.embedded(), overhead.SMALL
        overhead._over_same(results, model, natoms, 1, {"rootstockd": [3.0], "same backend": [2.0]})
        with common.Daemon(settings, "--model", model.name) as daemon:
            worker = daemon.worker(model.name)
            overhead._more_pairs(settings, results, daemon, model)
            assert daemon.worker(model.name) != worker
            overhead._other_dtype(settings, results, daemon, model)
        overhead._goals(results, model, (natoms,))
        of = {"model": model.name, "natoms": natoms}
        second = results.find("rootstockd", overhead.OVER_SAME, **of, pair=2)
        assert second is not None
        (goal,) = (goal for goal in results.goals if goal["what"].endswith("the same backend's"))
        assert goal["value"] == pytest.approx((1.5 + second) / 2)
        ratios = ", ".join(f"{value:.3f}" for value in sorted((1.5, second)))
        assert results.notes[0].endswith(f"the same backend's, by 2 pairs of processes: {ratios}")
        around = results.find("rootstockd", overhead.AROUND, **of, pair=2)
        assert around is not None and 0 < around < 5  # ms
        energy = results.find("rootstockd", "energy of an atom, off MACECalculator", **of, dtype="float32")
        force = results.find("rootstockd", "largest force component, off MACECalculator", **of, dtype="float32")
        assert energy is not None and energy < 1e-4
        assert force is not None and 1e-9 < force < 1e-4  # neither is float64
        assert results.parameters["backends"][model.name]["64, float32"] not in {None, "mace-torch"}

    @pytest.mark.timeout(900)  # four processes import torch, one after another
    def test_backends_are_timed_and_compared_one_by_one(self, tmp_path: Path) -> None:
        pytest.importorskip("mace", reason="mace-torch is not installed")
        settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
        results = common.Results("backends", parameters={"backends": {}})
        model = models.embedded()
        backends._measure(settings, results, model, "float32", (4,))
        backends._goals(results, model.name, "float32", (4, 32))
        assert results.parameters["backends"] == {
            "mace-emt-small, float32": {"chosen backend": "fused", "next backend": "mace-torch by edges"}
        }
        of = {"model": model.name, "dtype": "float32", "natoms": 4}
        step, after = (results.find(arm, "step", **of) for arm in ("chosen backend", "next backend"))
        off = results.find("chosen backend", "largest force component, off MACECalculator", **of)
        assert step and after and off
        assert [goal["value"] for goal in results.goals] == [pytest.approx(step / after), off]

    def test_a_rate_is_over_the_time_of_all_that_it_counts(self, tmp_path: Path) -> None:
        """What is in flight when the time is over is waited for, and counts."""
        settings = common.Settings(quick=True, device="cpu", folder=tmp_path, rootstock=None)
        with common.Daemon(settings, "--model", "noop") as daemon:
            load = common.Child(settings, "load", script=scale.LOAD, socket=daemon.socket, model="noop")
            with common.contestants([load]):
                load.ask(do="connect", idle=0, active=8, natoms=64)
                answer = load.ask(do="run", seconds=0.0)
        assert answer["counts"] == [1] * 8
        assert answer["elapsed"] >= max(answer["latencies"])
        assert scale.rate(answer) * answer["elapsed"] == pytest.approx(8)


class TestRunLocal:
    def test_what_failed_is_said_and_what_it_found_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from benchmarks import ipc

        def run(settings: common.Settings, results: common.Results) -> None:
            assert settings.choose((1, 2), (3,)) == (10, 100)
            results.add("rootstockd", "step", "µs", [1.0], natoms=10)
            raise RuntimeError("Traceback of many lines\nOSError: no more")

        monkeypatch.setattr(ipc, "run", run)
        assert run_local.main([*SHORT, "--results", str(tmp_path), "--label", "bad"]) == 1
        written = json.loads((tmp_path / "bad.json").read_text())
        assert written["commit"]
        found = written["benchmarks"]["ipc"]
        assert [sample["median"] for sample in found["samples"]] == [1.0]
        assert found["notes"] == ["failed: RuntimeError: OSError: no more"]
        assert [goal["met"] for goal in found["goals"]] == [False]
        assert "not measured to the end: ipc" in capsys.readouterr().err

    def test_only_the_command_changes_its_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from benchmarks import ipc

        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(ipc, "run", lambda *_: None)
        before = {**os.environ}, signal.getsignal(signal.SIGTERM)
        assert run_local.main([*SHORT, "--results", str(tmp_path), "--label", "empty"]) == 0
        assert ({**os.environ}, signal.getsignal(signal.SIGTERM)) == before
        assert "written" in capsys.readouterr().out

    def test_the_command_stops_its_daemons_when_it_is_told_to_end(self, tmp_path: Path, runtime_folder: Path) -> None:
        """They were started without this shell's numbers of threads, which users don't set."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(runtime_folder)}
        command = [sys.executable, "-m", "benchmarks.run_local", *SHORT, "--results", str(tmp_path)]
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            assert any("rootstockd, step" in line for line in running.stdout)
            (path,) = runtime_folder.glob("rsd-bench-*/*/d.sock")
            daemon = psutil.Process(RootstockClient(path).status()["pid"])
            assert not [name for name in daemon.environ() if name.startswith("OMP_")]
            running.terminate()
            assert running.wait(60) == 143
        assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE

    def test_ipc_only_leaves_out_what_needs_a_model(self) -> None:
        assert run_local.chosen(run_local.parser().parse_args(["--ipc-only"])) == list(run_local.WITHOUT_MODELS)
        assert run_local.chosen(run_local.parser().parse_args(["--ipc-only", "--only", "overhead"])) == []
        assert run_local.chosen(run_local.parser().parse_args([])) == list(run_local.BENCHMARKS)

    def test_gpu_checks_know_where_the_tests_are(self) -> None:
        tests = Path(__file__).parent
        marked = {path.name for path in tests.rglob("test_*.py") if "pytest.mark" + ".gpu" in path.read_text()}
        assert marked == set(run_local.GPU_TESTS)

    def test_gpu_checks_without_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(machine, "gpus", list)
        monkeypatch.setattr(run_local, "run", lambda options: pytest.fail("there is nothing to run"))
        assert run_local.main(["--gpu-checks"]) == 1, "whoever asks for them must not take this for success"
        assert "nothing was checked" in capsys.readouterr().err

    @pytest.mark.parametrize("status", [0, 1])
    def test_gpu_checks_with_a_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
        done = []

        def run(options: Any, _save: Any) -> dict[str, Any]:
            done.append(options.device)
            return result(50.0, 1)

        monkeypatch.setattr(machine, "gpus", lambda: ["a GPU"])
        monkeypatch.setattr(run_local, "gpu_tests", lambda: done.append("tests") or status)
        monkeypatch.setattr(run_local, "run", run)
        monkeypatch.setattr(run_local, "write", lambda *_: tmp_path)
        assert run_local.main(["--gpu-checks"]) == status
        assert done == ["tests", "cuda"]


class TestModal:
    """All but what Modal itself does."""

    @pytest.fixture
    def app(self) -> Any:
        pytest.importorskip("modal", reason="modal is not installed (pip install 'rootstockd[dev]')")
        from benchmarks import modal_app

        return modal_app

    def test_its_entry_points(self, app: Any) -> None:
        from modal.app import LocalEntrypoint

        assert isinstance(app.benchmark_all, LocalEntrypoint)
        assert isinstance(app.benchmark_ipc_overhead, LocalEntrypoint)

    def test_the_image_copies_files_that_are_there(self, app: Any) -> None:
        assert all((REPOSITORY / name).is_dir() for name in app.PARTS)
        assert all((REPOSITORY / name).is_file() for name in app.FILES)

    def test_the_image_has_what_an_installation_from_it_takes(
        self, app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        build = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
        for name in (*app.PARTS, *app.FILES):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "wheels").mkdir()
        assert build.build_wheel("wheels").endswith(".whl")

    @pytest.mark.parametrize(
        ("entry", "names"),
        [("benchmark_all", list(run_local.BENCHMARKS)), ("benchmark_ipc_overhead", ["ipc", "overhead"])],
    )
    def test_an_entry_point_passes_what_run_local_understands_and_keeps_what_comes(
        self, app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: str, names: list[str]
    ) -> None:
        passed: list[list[str]] = []

        class Remote:
            @staticmethod
            def remote(arguments: list[str]) -> dict[str, bytes]:
                passed.append(arguments)
                return {"modal.json": b"{}"}

        (tmp_path / "results").mkdir()
        monkeypatch.setattr(app, "benchmark", Remote)
        monkeypatch.setattr(app, "HERE", tmp_path)
        getattr(app, entry).info.raw_f()
        options = run_local.parser().parse_args(passed[0])
        assert run_local.chosen(options) == names
        assert options.commit
        assert (tmp_path / "results" / "modal.json").read_bytes() == b"{}"

    def test_a_short_run_gives_files_back(self, app: Any, tmp_path: Path) -> None:
        for name in app.PARTS:  # what the image copies, and nothing else
            shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
        for name in app.FILES:
            shutil.copy(REPOSITORY / name, tmp_path)
        files = app.benchmark.local([*SHORT, "--commit", "of the caller"], str(tmp_path))
        assert files.keys() == {"modal.json", "modal-ipc.svg"}
        found = json.loads(files["modal.json"])
        assert found["schema"] == run_local.SCHEMA
        assert found["hardware"]["cpus used"] <= 2 and found["software"]["rootstockd"]
        assert found["commit"] == "of the caller" and found["quick"] is True
        assert {"Rootstock", "ASE SocketIO", "MACECalculator"} <= found["peers"].keys()
        (ipc,) = found["benchmarks"].values()
        assert ipc["parameters"]["atoms"] == [10, 100]
        assert not [note for note in ipc["notes"] if note.startswith("failed")]
        steps = {(s["arm"], s["of"]["natoms"]): s for s in ipc["samples"] if s["quantity"] == "step"}
        for arm in ("rootstockd", "wire", "worker", "echo", "ASE SocketIO", "noop in process"):
            for natoms in (10, 100):
                sample = steps[arm, natoms]
                assert sample["unit"] == "µs" and sample["count"] == 100
                assert 0 < sample["min"] <= sample["q1"] <= sample["median"] <= sample["q3"] <= sample["max"]
        assert steps["echo", 10]["median"] < steps["rootstockd", 10]["median"]
        goals = {goal["what"]: goal for goal in ipc["goals"]}
        assert not goals["1,000 atoms: step over Rootstock's"]["met"]  # that size was not asked for
        assert goals["1,000 atoms: step over Rootstock's"]["value"] is None
        assert files["modal-ipc.svg"].rstrip().endswith(b"</svg>")

    def test_the_remote_function_says_when_there_is_nothing(self, app: Any) -> None:
        with pytest.raises(RuntimeError, match="ended with status 2"):
            app.benchmark.local(["--no-such-option"], str(REPOSITORY))
