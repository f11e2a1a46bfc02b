"""`rootstockd doctor`: what it makes of facts, and what it finds where something really is wrong."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import rootstockd as package
from conftest import rootstockd, stopped, wait_for
from rootstock_client.control import fetch
from rootstock_client.runtime_dir import control_socket
from rootstockd.cli.doctor import _show
from rootstockd.control.schema import DaemonStatus
from rootstockd.doctor import gpus, machine, places
from rootstockd.doctor.findings import examine, note, ok
from rootstockd.doctor.gpus import Driver, GpuState, check_driver, check_flavour, check_gpus
from rootstockd.doctor.machine import Machine
from rootstockd.doctor.places import Address, Folder, Login, check_address, check_runtime_folder, check_storage
from rootstockd.doctor.running import check_running
from rootstockd.doctor.software import EnvironmentState, check_environments, torch_in
from rootstockd.settings.config import Config, Device

SOUND = Machine(
    flags=frozenset({"avx2"}),
    cores=8,
    free=10**11,
    shared=(10**10, 10**10),
    limits={"open files": (1024, 65536)},
    variables={"OMP_NUM_THREADS": "1"},
    landlock=4,
    seccomp=True,
)
H100 = GpuState(0, "NVIDIA H100", total=85 * 10**9, free=80 * 10**9)
NODE = Driver(True, "550.54", (12, 4), (H100,), visible=(None, 1))
ALICE = Login(1000, "alice", "/run/user/1000")
MINE = Folder(Path("/run/user/1000/rootstockd"), owner=1000)
IN_TMP = Folder(Path("/tmp/rootstockd-1000"), owner=1000)
COMMAND = r"(rootstockd|export|unset|ulimit|chmod|rm|mv|df|du|ls|sudo|nvidia-smi|loginctl)( |$)"


def changed(facts, **fields):
    return type(facts)(**{**vars(facts), **fields})


def bad(findings):
    """What is worse than a note, as `level subject`, and that it says why and what to do."""
    found = [finding for finding in findings if finding.level in {"warning", "problem"}]
    assert all(finding.why for finding in found)
    assert all(re.match(COMMAND, finding.mend) for finding in found if finding.mend), found
    return {f"{finding.level} {finding.subject}": finding for finding in found}


def test_a_long_subject_and_what_is_said_of_it_are_apart(capsys):
    _show({"daemon": [note("model mace-emt-small", "a note")]}, Counter())
    assert "model mace-emt-small a note" in capsys.readouterr().out


def machine_findings(facts):
    return list(machine.check_machine(facts))


def test_a_sound_machine() -> None:
    findings = machine_findings(SOUND)
    assert {finding.level for finding in findings} == {"ok"}
    assert len(findings) == 5


@pytest.mark.parametrize(
    ("fields", "expected", "mend"),
    [
        ({"flags": frozenset({"sse2"})}, "warning processors", ""),
        ({"quota": 2.5}, "warning processors", "OMP_NUM_THREADS=2"),
        ({"free": 10**8, "memory_limit": 10**9}, "problem memory", ""),
        ({"free": 10**8, "variables": {"SLURM_JOB_ID": "1", "OMP_NUM_THREADS": "1"}}, "problem memory", "--mem"),
        ({"shared": (64 * 2**20, 0)}, "warning shared memory", "/dev/shm"),
        ({"limits": {"open files": (256, 256)}}, "warning open files", "65536"),
        ({"limits": {"address space": (10**9, 10**9)}}, "warning address space", "ulimit -v unlimited"),
        ({"limits": {"file size": (10**6, 10**6)}}, "problem file size", "ulimit -f unlimited"),
        ({"limits": {"processes": (64, 4096)}}, "warning processes", "ulimit -u"),
        ({"variables": {"OMP_NUM_THREADS": "64"}}, "warning threads", "OMP_NUM_THREADS=8"),
        (
            {"variables": {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "TRUE"}},
            "warning environment",
            "unset OMP_PROC_BIND",
        ),
        ({"variables": {"OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": "0"}}, "warning environment", "unset GOMP"),
        ({"landlock": 0, "release": "4.18.0"}, "warning confinement", "4.18.0"),
        ({"seccomp": False}, "warning confinement", "trust"),
    ],
)
def test_what_a_machine_lacks(fields, expected, mend) -> None:
    found = bad(machine_findings(changed(SOUND, **fields)))
    assert list(found) == [expected]
    assert mend in found[expected].advice + found[expected].mend


@pytest.mark.parametrize(
    ("driver", "expected", "mend"),
    [
        (Driver(hardware=False, failure="NVML Shared Library Not Found"), [], ""),
        (Driver(hardware=True, failure="NVML Shared Library Not Found"), ["warning driver"], "--nv"),
        (Driver(hardware=True, failure="Driver/library version mismatch"), ["problem driver"], "reboot"),
        (changed(NODE, visible=("", 0)), ["warning driver"], "unset CUDA_VISIBLE_DEVICES"),
        (changed(NODE, closed=("/dev/nvidia0",)), ["problem device files"], "--gpus=1"),
        (changed(NODE, gpus=(changed(H100, compute_mode="exclusive"),)), ["warning GPU 0"], "-c DEFAULT"),
        (changed(NODE, gpus=(changed(H100, compute_mode="exclusive"),), mps=True), [], ""),
        (changed(NODE, gpus=(changed(H100, compute_mode="prohibited"),)), ["problem GPU 0"], "-c DEFAULT"),
        (changed(NODE, silent=("GPU 1 does not answer: GPU is lost",)), ["problem driver"], "--gpu-reset"),
        (changed(NODE, gpus=(changed(H100, mig=True),)), ["problem GPU 0"], "-cgi"),
        (changed(NODE, gpus=(changed(H100, mig=True, instances=2),)), [], ""),
        (changed(NODE, gpus=(changed(H100, free=10**9),)), ["warning GPU 0"], "query-compute-apps"),
        (changed(NODE, gpus=(changed(H100, persistent=False),)), [], ""),
        (NODE, [], ""),
    ],
)
def test_drivers(driver, expected, mend) -> None:
    found = bad([*check_driver(driver), *check_gpus(driver)])
    assert list(found) == expected
    assert all(mend in finding.advice + finding.mend for finding in found.values())


@pytest.mark.parametrize(
    ("cuda", "gpu", "level", "mend"),
    [
        (None, H100, "warning", "--torch auto"),
        ((12, 4), H100, None, ""),
        ((12, 1), H100, None, ""),
        ((12, 8), H100, "note", "--torch auto"),
        ((13, 0), H100, "problem", "--torch auto"),
        ((11, 8), changed(H100, capability=(7, 0)), None, ""),
        ((12, 4), changed(H100, capability=(12, 0)), "problem", "--torch auto"),
    ],
)
def test_builds_of_torch(cuda, gpu, level, mend) -> None:
    found = list(
        check_flavour("mace", "2.13.0", cuda, changed(NODE, gpus=(gpu,)), "rootstockd env update --torch auto")
    )
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(mend in finding.advice + finding.mend for finding in found)


@pytest.mark.parametrize(
    ("cuda", "capability", "level"),
    [((13, 0), (7, 0), "problem"), ((12, 8), (7, 0), "warning"), ((12, 8), (6, 1), "problem")],
)
def test_an_old_gpu_beside_a_new_one(cuda, capability, level) -> None:
    node = changed(NODE, cuda=(13, 0), gpus=(H100, changed(H100, capability=capability)))
    (found,) = check_flavour("mace", "2.13.0", cuda, node, "rootstockd env update mace --torch auto")
    assert found.level == level
    assert found.mend.endswith("--torch cu126")


def test_where_mps_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not gpus._mps_answers()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        assert not gpus._mps_answers(), "a socket is left of one that has ended"
        listener.listen()
        assert gpus._mps_answers()


def test_which_cuda(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch/version.py"
    version.write_text("__version__ = '2.9.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    assert torch_in(tmp_path) == ("2.9.0+cu128", (12, 8))
    version.write_text("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\n")
    assert torch_in(tmp_path) == ("2.9.0+cpu", None)
    assert torch_in(tmp_path / "torch") == ("", None)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([EnvironmentState("mace", "beside the daemon", torch="2.9.0", cuda=(12, 4))], []),
        ([EnvironmentState("mace", "beside the daemon", torch="2.9.0")], ["warning env mace"]),
        ([EnvironmentState("mace", broken=("numpy is missing",))], ["problem env mace"]),
        ([EnvironmentState("mace", lacking="it was not built")], ["warning environments"]),
        ([EnvironmentState("ours", lacking="it was not built", builtin=False)], ["warning env ours"]),
        ([EnvironmentState("chgnet", lacking="it was not built"), EnvironmentState("ase", "beside the daemon")], []),
    ],
)
def test_environments(states, expected) -> None:
    found = bad(check_environments(states, NODE))
    assert list(found) == expected
    assert all("rootstockd env" in finding.mend for finding in found.values())


@pytest.mark.parametrize(
    ("folder", "login", "expected", "mend"),
    [
        (MINE, ALICE, None, ""),
        (changed(MINE, mode=0o770), ALICE, "problem", "chmod go-w"),
        (changed(MINE, owner=0), ALICE, None, ""),
        (changed(MINE, owner=4321), ALICE, "problem", "ROOTSTOCKD_SOCKET"),
        (changed(MINE, is_folder=False), ALICE, "problem", "rm "),
        (changed(MINE, is_folder=False, is_device=True), ALICE, "problem", "export ROOTSTOCKD_SOCKET="),
        (changed(MINE, free=0), ALICE, "problem", "df -h"),
        (changed(MINE, exists=False, writable=False), ALICE, "problem", "unset XDG_RUNTIME_DIR"),
        (changed(MINE, exists=False, writable=False), changed(ALICE, uid=0, runtime=""), "problem", "--socket"),
        (changed(MINE, exists=False), ALICE, None, ""),
        (MINE, changed(ALICE, lingers=False), "note", "loginctl enable-linger"),
        (IN_TMP, Login(1000, slurm=True, own_tmp=True), "note", "ROOTSTOCKD_SOCKET"),
        (IN_TMP, Login(1000, slurm=True), None, ""),
    ],
)
def test_runtime_folders(folder, login, expected, mend) -> None:
    nobody = Address(folder.path / "rootstockd.sock")
    found = [finding for finding in check_runtime_folder(folder, login, nobody) if finding.level != "ok"]
    assert [finding.level for finding in found] == ([expected] if expected else [])
    assert all(mend in finding.advice + finding.mend for finding in found)


def test_a_runtime_folder_of_somebody_elses_daemon() -> None:
    folder = changed(MINE, owner=0, writable=False)
    (found,) = check_runtime_folder(folder, ALICE, Address(folder.path / "rootstockd.sock", "live", 0))
    assert found.level == "ok" and "for the daemon of root" in found.what


@pytest.mark.parametrize(
    ("address", "login", "expected", "mend"),
    [
        (Address(Path("/run/a.sock")), ALICE, None, ""),
        (
            Address(Path("/run/a.sock")),
            changed(ALICE, named="/run/a.sock"),
            "problem socket",
            "unset ROOTSTOCKD_SOCKET",
        ),
        (Address(Path("/run/a.sock"), "stale", 1000), ALICE, "warning socket", "rootstockd start"),
        (Address(Path("/run/a.sock"), "stale", 0), ALICE, "warning socket", "Have root"),
        (Address(Path("/run/a.sock"), "busy"), ALICE, "problem socket", "stop --force"),
        (Address(Path("/run/a.sock"), "closed"), ALICE, "problem socket", "ask root"),
    ],
)
def test_addresses(address, login, expected, mend) -> None:
    found = bad(check_address(address, login))
    assert list(found) == ([expected] if expected else [])
    assert all(mend in finding.advice + finding.mend for finding in found.values())


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/rootstockd", tmp_path / "file/a/b"):
        (found,) = check_storage("cache", places.look_at_folder(path), "")
        assert (found.level, found.what) == ("problem", f"{tmp_path / 'file'} is no folder")
    assert places.look_at_folder(tmp_path / "new/rootstockd").writable


def test_a_device_where_a_folder_should_be_is_left_as_it_is() -> None:
    for path in (Path(os.devnull), Path(os.devnull) / "rootstockd"):
        folder = places.look_at_folder(path, follow=True)
        (found,) = [*places.check_trust(folder), *check_storage("state", folder, "export ROOTSTOCKD_STATE=FOLDER")]
        assert (found.what, found.mend) == ("/dev/null is no folder", "export ROOTSTOCKD_STATE=FOLDER")


def test_a_link_to_a_folder_is_one_for_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    folder = places.look_at_folder(tmp_path / "link", follow=True)
    assert not bad([*places.check_trust(folder), *check_storage("state", folder, "")])
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert not places.look_at_folder(tmp_path / "dangling", follow=True).is_folder
    assert not places.look_at_folder(tmp_path / "link").is_folder  # others may be led elsewhere by whoever made it


def test_storage() -> None:
    folder = Folder(Path("/scratch/alice/rootstockd"), owner=1000)
    assert not bad(check_storage("state", folder, ""))
    assert "problem state" in bad(check_storage("state", changed(folder, free=0), ""))
    assert "warning state" in bad(check_storage("state", changed(folder, free=10**8), ""))
    assert "problem state" in bad(check_storage("state", changed(folder, is_folder=False), ""))
    (found,) = check_storage("state", changed(folder, writable=False), "export ROOTSTOCKD_STATE=FOLDER")
    assert (found.level, found.mend) == ("warning", "export ROOTSTOCKD_STATE=FOLDER")
    assert "problem log" in bad(
        check_storage("log", changed(folder, writable=False), "rootstockd start --log-file FILE", needed=True)
    )


def test_this_machine() -> None:
    facts = machine.look_at_machine()
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.free > 0
    assert facts.limits["open files"] == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert facts.flags
    driver = gpus.look_at_driver()
    assert driver.failure or driver.version


def test_who_can_not_mend_it_is_told_no_command() -> None:
    told = {"version": package.__version__, "pid": 1, "state": "ready", "since": 0.0, "devices": ["cpu"]}
    rest = {"memory": 1, "evaluations": 0, "models": [], "sessions": [], "other_sessions": 1}
    theirs = DaemonStatus(**told, **rest, config=None, warnings=["there is no user 'bob'"])
    mine = theirs.model_copy(update={"config": Config(socket=Path("/run/a.sock"), devices=(Device(name="cpu"),))})
    (found,) = bad(check_running(theirs, NODE)).values()
    assert (found.mend, found.advice) == ("", "Tell whoever runs this daemon.")
    (found,) = bad(check_running(mine, NODE)).values()
    assert found.mend == "rootstockd reload"
    lacking = [EnvironmentState("chgnet", lacking="it was not built")]
    (found,) = check_environments(lacking, NODE, own=False)
    assert (found.level, found.mend) == ("note", "")


def test_what_does_not_answer_holds_nothing_up() -> None:
    release = threading.Event()

    def hangs():
        yield ok("first", "was seen")
        release.wait(60)

    def fails():
        raise ZeroDivisionError("oops")
        yield

    began = time.monotonic()
    found = examine({"hangs": hangs, "fails": fails, "fine": lambda: [ok("it", "is")]}, 0.3)
    release.set()
    assert time.monotonic() - began < 30
    assert [finding.level for finding in found["hangs"]] == ["ok", "warning"]
    assert "no answer within 0.3 s" in found["hangs"][1].what
    assert "oops" in found["fails"][0].what
    assert [finding.level for finding in found["fine"]] == ["ok"]


# --- with real faults


@pytest.fixture
def surroundings(runtime_folder: Path, tmp_path: Path):
    """Variables that lead a user's command to folders of the test's own."""
    base = Path(os.path.realpath(tmp_path))
    run = Path(tempfile.mkdtemp(dir=runtime_folder))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("ROOTSTOCKD_")},
        "ROOTSTOCKD_SOCKET": str(run / "rootstockd.sock"),
        "ROOTSTOCKD_STATE": str(base / "state"),
        "ROOTSTOCKD_SITE": str(base / "site"),
        "XDG_CONFIG_HOME": str(base / "config"),
        "XDG_CACHE_HOME": str(base / "cache"),
        "XDG_STATE_HOME": str(base / "logs"),
    }


def doctor(surroundings, *arguments, **options):
    done = rootstockd("doctor", "--json", "--timeout", "60", *arguments, env=surroundings, **options)
    assert not done.stderr
    report = json.loads(done.stdout)
    assert report["schema_version"] == 1
    found = report["findings"]
    assert done.returncode == any(finding["level"] == "problem" for finding in found)
    return {(finding["level"], finding["subject"]): finding for finding in found}


def test_many_faults_at_once(surroundings) -> None:
    address = Path(surroundings["ROOTSTOCKD_SOCKET"])
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(address))
    address.parent.chmod(0o777)
    state = Path(surroundings["ROOTSTOCKD_STATE"])
    (state / "environments/mace/builds").mkdir(parents=True)
    (state / "environments/mace/current").symlink_to("builds/gone")
    for folder in ("site", "config/rootstockd"):
        (state.parent / folder).mkdir(parents=True)
    (state.parent / "site/config.toml").write_text("max_atom = 5\n")
    (state.parent / "config/rootstockd/models.toml").write_text('[a]\nfamily = "mace"\nwights = "x"\n')
    (state.parent / "cache").mkdir()
    (state.parent / "cache/rootstockd").write_text("a file")

    found = doctor(surroundings, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)))
    assert found["problem", "runtime folder"]["mend"] == f"chmod go-w {address.parent}"
    assert "nobody listens" in found["warning", "socket"]["what"]
    assert "is gone" in found["problem", "env mace"]["what"]
    assert found["problem", "env mace"]["mend"] == "rootstockd env create mace"
    assert "max_atoms" in found["problem", "settings"]["what"]
    assert "is no folder" in found["problem", "cache"]["what"]
    assert "wights" in found["problem", "catalogue"]["what"]
    assert ("warning", "open files") in found
    told = found["warning", "socket"]["why"], found["note", "daemon"]["why"]
    assert told == ("Jobs wait for it to come back, 5 s at their first connection and longer later.",) * 2


def test_a_sites_environment_that_is_not_built(surroundings) -> None:
    """Though what it needs is beside the daemon: its models are to run in nothing else."""
    site = Path(surroundings["ROOTSTOCKD_SITE"])
    (site / "environments").mkdir(parents=True)
    (site / "environments/lean.toml").write_text('requirements = ["ase"]\nimports = ["ase"]\n')
    (site / "models.toml").write_text('[lj-lean]\nfamily = "ase"\nenvironment = "lean"\n')
    found = doctor(surroundings)
    assert found["warning", "env lean"]["mend"] == "rootstockd env create lean"


def test_a_state_that_all_may_write(surroundings) -> None:
    state = Path(surroundings["ROOTSTOCKD_STATE"])
    state.mkdir()
    state.chmod(0o777)
    found = doctor(surroundings)
    assert found["problem", "state"]["mend"] == f"chmod o-w {state}"
    assert ("problem", "catalogue") in found


def test_a_path_that_is_too_long(surroundings) -> None:
    found = doctor({**surroundings, "ROOTSTOCKD_SOCKET": f"/tmp/{'x' * 120}/rootstockd.sock"})
    assert "at most 107" in found["problem", "socket"]["why"]


def test_patience_has_an_end() -> None:
    done = rootstockd("doctor", "--timeout", "inf")
    assert (done.returncode, "inf is not in the range 0.1<=x<=3600" in done.stderr) == (2, True), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_as_another_user(surroundings, tmp_path: Path) -> None:
    """Who has no right to anything, and an XDG_RUNTIME_DIR that sudo has passed on."""
    told = {**surroundings, "XDG_RUNTIME_DIR": "/run/user/0-of-root"}
    del told["ROOTSTOCKD_SOCKET"]
    program = (
        "import os, json; from rootstockd.doctor import places\n"
        "from rootstock_client.runtime_dir import user_runtime_dir\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "login = places.look_at_login(os.environ, None)\n"
        "found = [*places.check_runtime_folder(places.look_at_folder(user_runtime_dir()), login,\n"
        "  places.Address(user_runtime_dir() / 'rootstockd.sock')),\n"
        "  *places.check_storage('cache', places.look_at_folder(places.Path('/proc/cache')), 'elsewhere')]\n"
        "print(json.dumps([(f.level, f.mend) for f in found]))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=told, capture_output=True, text=True, check=True)
    assert ["problem", "unset XDG_RUNTIME_DIR"] in json.loads(done.stdout)
    assert ["warning", "elsewhere"] in json.loads(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_a_full_shared_memory(surroundings) -> None:
    command = (
        "mount -t tmpfs -o size=1m tmpfs /dev/shm && { head -c 2M /dev/zero > /dev/shm/full 2>/dev/null; "
        f"exec {sys.executable} -m rootstockd doctor --json --timeout 60; }}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], env=surroundings, capture_output=True, text=True, check=False
    )
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mounts here")
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "0 MB left" in found["shared memory"]["what"]


def test_a_daemon_and_a_model_that_fails(start_daemon, tmp_path: Path) -> None:
    catalogue = tmp_path / "more.toml"
    catalogue.write_text(
        '[broken]\nfamily = "ase"\narguments = { calculator = "no.such.module:Calculator" }\n'
        '[unbuilt]\nfamily = "mace"\nenvironment = "chgnet"\n'
        '[passing]\nfamily = "mace"\nenvironment = "chgnet"\nkeep_alive = 1\n'
        f'[damaged]\nfamily = "mace"\nweights = "{tmp_path}/weights"\nsha256 = "{"0" * 64}"\n'
    )
    (tmp_path / "weights").write_bytes(b"others")
    daemon = start_daemon("--catalogue", str(catalogue))
    done = daemon.run("doctor", "--timeout", "60")
    assert "ready on cpu" in done.stdout
    assert f"{daemon.socket}: pid {daemon.pid}" in done.stdout
    assert done.returncode == ("problem" in done.stdout)
    daemon.run("load", "broken")
    daemon.run("load", "unbuilt")
    daemon.run("load", "damaged")
    assert b'rootstockd_models{state="failed"} 3.0' in fetch(daemon.socket, "GET", "/metrics")
    done = daemon.run("doctor", "--json", "--timeout", "60")
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["model broken"]["level"] == "problem"
    assert found["model broken"]["mend"] == "rootstockd load broken"
    assert found["model unbuilt"]["mend"] == "rootstockd env create chgnet"
    assert found["model damaged"]["mend"] == ""
    assert done.returncode == 1
    daemon.run("load", "passing")
    for name in ("broken", "unbuilt", "damaged"):
        assert daemon.run("unload", name).returncode == 0
    wait_for(lambda: not daemon.client().status()["models"], 60)  # its keep_alive is over
    assert b'rootstockd_models{state="failed"} 0.0' in fetch(daemon.socket, "GET", "/metrics")


STANDS_IN = """
import os, socket, sys
for path in sys.argv[1:]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    globals()[path] = listener
print(flush=True)
sys.stdin.read()
"""
"""Takes a daemon's sockets from it and answers nobody, as systemd does whose daemon is starting."""


def test_a_daemon_whose_address_another_has_that_does_not_answer(start_daemon) -> None:
    daemon = start_daemon()
    pid, paths = daemon.pid, (daemon.socket, control_socket(daemon.socket))

    def told() -> dict[str, str]:
        done = daemon.run("doctor", "--json", "--timeout", "3")
        return {one["what"]: one["mend"] for one in json.loads(done.stdout)["findings"] if one["subject"] == "daemon"}

    unreachable = f"pid {pid} is a daemon for {daemon.socket}, to which nobody can connect any more"
    with stopped(pid):  # it does not answer, but it is there
        assert len(found := told()) == 1 and "does not answer" in next(iter(found))
    command = [sys.executable, "-c", STANDS_IN, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "\n"
        found = told()
        assert "does not answer" in next(iter(found))
        assert found[unreachable] == f"kill {pid}"
        other.communicate("")
    for path in paths:
        path.unlink()
    assert daemon.run("stop").returncode == 0
