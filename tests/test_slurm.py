"""On a real Slurm: daemons for a job and for a node, who finds which, GPUs, signals; the scripts of docs/slurm.md."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import slurm as slurms
from conftest import rootstockd, wait_for
from machine import PYTHON, REPOSITORY
from slurm import PATH, Slurm

pytestmark = pytest.mark.skipif((why := slurms.why_not()) is not None, reason=why or "")

DOCUMENT = (Path(__file__).parent.parent / "docs/slurm.md").read_text().replace("mace-mp-medium", "emt")
SCRIPTS = [
    script for script in re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL) if "#SBATCH" in script
]
PROLOG, EPILOG = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
(MD,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)

ASK = """
import contextlib, json, os
from pathlib import Path
from ase.build import bulk
from rootstock_client import RootstockClient

client = RootstockClient()
atoms = bulk("Cu", cubic=True)
atoms.calc = client.calculator("emt")
atoms.get_potential_energy()
status = client.status()
variables = {}
with contextlib.suppress(PermissionError):  # it is somebody else's
    words = Path(f"/proc/{status['pid']}/environ").read_text().split("\\0")
    variables = dict(word.split("=", 1) for word in words if "=" in word)
print(json.dumps({
    "node": os.environ["SLURMD_NODENAME"], "pid": status["pid"], "devices": status["devices"],
    "socket": str(client.socket), "gpus": variables.get("CUDA_VISIBLE_DEVICES"),
    "drain_timeout": status["config"]["drain_timeout"] if status["config"] else None,
    "sessions": len(status["sessions"]) + status["other_sessions"],
}), flush=True)
"""
"""A job that says which daemon it found."""

GATES = '''
"""A calculator that waits for a file before it evaluates."""
import time
from pathlib import Path
from ase.calculators.emt import EMT

class Gated(EMT):
    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        while not Path("/srv/gates/open").exists():
            time.sleep(0.02)
        super().calculate(atoms, properties, system_changes)
'''
CATALOGUE = '[gated]\nfamily = "ase"\ndtype = "float64"\narguments = { calculator = "gates:Gated" }\n'

SLOW = """
import os, signal, threading, time
from ase.build import bulk
from rootstock_client import RootstockClient

signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"SIGTERM\\n"))  # print may be at work already
atoms = bulk("Cu", cubic=True)
client = RootstockClient()
atoms.calc = client.calculator("gated")
evaluation = threading.Thread(target=lambda: print("energy", atoms.get_potential_energy(), flush=True))
evaluation.start()
while [session["state"] for session in client.status()["sessions"]] != ["busy"]:
    time.sleep(0.02)
print("worker", client.status()["models"][0]["pid"], flush=True)
evaluation.join()
"""
"""A job whose one evaluation lasts until the gate is opened; it speaks when that is under way."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurms.running() as slurm:
        slurm.machine.write("/srv/gates/gates.py", GATES)
        slurm.machine.write("/srv/gates/gated.toml", CATALOGUE)
        yield slurm


def answers(output: str) -> list[dict[str, Any]]:
    """What ASK has said."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def open_gate(slurm: Slurm) -> None:
    slurm.machine.write("/srv/gates/open", "")


@pytest.fixture
def gate(slurm: Slurm) -> Iterator[None]:
    """A gate that is closed."""
    place = slurm.machine.root / "srv/gates/open"
    place.unlink(missing_ok=True)
    yield
    open_gate(slurm)


def nothing_left(slurm: Slurm) -> bool:
    """Neither daemons nor workers nor folders of jobs."""
    processes = slurm.machine.run("pgrep", "--full", "rootstockd(.serve|/worker)").stdout
    folders = slurm.machine.run("sh", "-c", "ls -d /tmp/systemd-private-*test-slurmd*/tmp/rootstockd-*").stdout
    return not processes and not folders


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_a_documented_script(slurm: Slurm, script: str) -> None:
    with slurm.submit(script, md=MD) as job:
        assert job.wait() == 0, job.output + job.log()
        assert "ready on cpu, models loaded: emt" in job.output
        assert (job.folder / "restart.xyz").exists()
        nodes = ["n1", "n2"] if "--nodes=2" in script else ["n1"]
        for node in nodes:
            assert job.log(node).endswith("stopped\n")
    wait_for(lambda: nothing_left(slurm))


def test_each_node_has_its_own_and_its_tasks_find_it(slurm: Slurm) -> None:
    """Also those without the variable; the job's daemon goes before a variable from elsewhere."""
    script = f"""#!/bin/bash
export ROOTSTOCKD_SOCKET=/nowhere/else.sock
rootstockd slurm run --model emt -- srun python ask.py
rootstockd slurm run --model emt -- srun --export=NONE /usr/bin/env PYTHONPATH={REPOSITORY} {PYTHON} ask.py
"""
    with slurm.submit(script, "--nodes=2", "--ntasks=4", "--gpus-per-task=1", ask=ASK) as job:
        assert job.wait() == 0, job.output
        found = answers(job.output)
    assert len(found) == 8
    for four in (found[:4], found[4:]):
        assert sorted(answer["node"] for answer in four) == ["n1", "n1", "n2", "n2"]
        assert len({(answer["node"], answer["pid"]) for answer in four}) == 2
        assert {answer["socket"] for answer in four} == {f"/tmp/rootstockd-7001-job-{job.id}/rootstockd.sock"}
        assert {answer["gpus"] for answer in four} == {"0,1"}, "all GPUs of the job, though tasks have one each"
        assert {answer["drain_timeout"] for answer in four} == {15.0}, "KillWait is 20 s"


def test_jobs_of_a_user_at_a_time_on_one_node(slurm: Slurm, gate: None) -> None:
    """They have daemons of their own on GPUs of their own."""
    script = """#!/bin/bash
until_open='until [ -e /srv/gates/open ]; do sleep 0.1; done'
rootstockd slurm run --model emt --device cpu:$CUDA_VISIBLE_DEVICES -- sh -c "python ask.py; $until_open"
"""
    options = ("--nodelist=n1", "--gres=gpu:1")
    with slurm.submit(script, *options, ask=ASK) as one, slurm.submit(script, *options, ask=ASK) as other:
        for job in (one, other):
            job.until('{"node"')
        open_gate(slurm)
        for job in (one, other):
            assert job.wait() == 0, job.output
        (first,), (second,) = answers(one.output), answers(other.output)
    assert {first["gpus"], second["gpus"]} == {"0", "1"}
    assert first["devices"] == [f"cpu:{first['gpus']}"]
    assert second["devices"] == [f"cpu:{second['gpus']}"]
    assert first["socket"] != second["socket"]
    assert first["pid"] != second["pid"]
    assert first["sessions"] == second["sessions"] == 1


def test_elements_of_an_array_end_their_own_daemons_only(slurm: Slurm) -> None:
    """The first to end is the one whose job has the number of the whole array."""
    script = """#!/bin/bash
go_on=$([ $SLURM_JOB_ID = $SLURM_ARRAY_JOB_ID ] && echo first || echo others)
rootstockd slurm run --model emt -- sh -c "python ask.py; until [ -e $go_on ]; do sleep 0.1; done; python ask.py"
touch ended
"""
    options = ("--array=1-2", "--output=slurm-%A.out", "--open-mode=append")
    with slurm.submit(script, *options, ask=ASK) as job:
        wait_for(lambda: len(answers(job.output)) == 2 or job.over, timeout=100)
        (job.folder / "first").touch()
        wait_for(lambda: (job.folder / "ended").exists() or job.over, timeout=60)
        (job.folder / "others").touch()
        assert job.wait() == 0, job.output
        times = Counter((answer["node"], answer["pid"]) for answer in answers(job.output))
    assert [*times.values()] == [2, 2]
    wait_for(lambda: nothing_left(slurm))


SQUEUE = '#!/bin/sh\n[ -e answer ] && exec /usr/bin/squeue "$@"\ntouch failed\n{after}exit 1\n'
"""One that fails until there is a file `answer`; to go before Slurm's own in PATH."""


@pytest.mark.parametrize("after", ["touch answer\n", ""], ids=["once", "always"])
def test_where_squeue_fails(slurm: Slurm, after: str) -> None:
    """Daemons that can't be signalled are killed some time."""
    script = """#!/bin/bash
install -D --mode=755 squeue.py bin/squeue; PATH=$PWD/bin:$PATH
rootstockd slurm run --model emt --drain-timeout 0 -- sh -c 'exit 7'; echo status $?
"""
    with slurm.submit(script, squeue=SQUEUE.format(after=after)) as job:
        assert job.wait() == 0, job.output
        assert (job.folder / "failed").exists()
        assert "status 7\n" in job.output
        assert ("so they are killed" in job.output) is (not after), job.output
        assert job.log().endswith("stopped\n") is bool(after)


def test_sigterm_while_slurm_run_waits_for_the_daemons_end(slurm: Slurm) -> None:
    script = """#!/bin/bash
install -D --mode=755 squeue.py bin/squeue; PATH=$PWD/bin:$PATH
exec rootstockd slurm run --model emt --drain-timeout 3600 -- true
"""
    with slurm.submit(script, squeue=SQUEUE.format(after="")) as job:
        wait_for(lambda: (job.folder / "failed").exists() or job.over, timeout=100)
        job.cancel("--batch", "--signal=TERM")
        assert job.wait() == 128 + signal.SIGTERM, job.output
    wait_for(lambda: nothing_left(slurm))


def test_exit_status_and_what_is_refused(slurm: Slurm) -> None:
    script = """#!/bin/bash
for name in bare broken; do install --mode=755 $name.py $name; done
env --unset=OMP_NUM_THREADS FORCE_COLOR=1 rootstockd slurm run --model emt -- bash -c 'exit 7'; echo status $?
rootstockd slurm run --model emt -- ./bare 3; echo status $?
rootstockd slurm run --model emt -- ./broken; echo status $?
rootstockd slurm run --model nothing -- touch it-ran; echo status $?
rootstockd slurm run --model emt -- no-such-command; echo status $?
rootstockd slurm run --model emt; echo status $?
srun --ntasks=2 rootstockd slurm run --model emt -- true; echo status $?
"""
    scripts = {"bare": "exit $1\n", "broken": "#!/no/such/interpreter\n"}
    with slurm.submit(script, "--ntasks=2", "--nodes=1", **scripts) as job:
        assert job.wait() == 0
        said = job.output
        assert re.findall(r"status (\d+)", said) == ["7", "3", "1", "1", "1", "2", "1"], said
        assert not (job.folder / "it-ran").exists()
    assert "can't run './broken'" in said
    assert "there is no model 'nothing'" in said
    assert "not every node of the job has a daemon, so the command was not run" in said
    assert "there is no command 'no-such-command'" in said
    assert "what shall run with the daemons?" in said
    assert "each task of this step would start daemons" in said
    assert "Traceback" not in said
    outside = rootstockd("slurm", "run", "--", "true")
    assert outside.returncode == 1
    assert "this is no Slurm job" in outside.stderr


def gated(slurm: Slurm, launch: str = "") -> Any:
    """A job in the midst of an evaluation."""
    script = f"""#!/bin/bash
export PYTHONPATH={REPOSITORY}:/srv/gates
{launch} rootstockd slurm run --catalogue /srv/gates/gated.toml --model gated -- python slow.py
"""
    return slurm.submit(script, slow=SLOW)


def workers(slurm: Slurm) -> list[str]:
    return slurm.machine.run("pgrep", "--full", "rootstockd/worker/__main__.py").stdout.split()


def test_scancel_lets_evaluations_end(slurm: Slurm, gate: None) -> None:
    """SIGTERM comes to all processes of the job, and twice to some."""
    with gated(slurm) as job:
        job.until("worker")
        (worker,) = workers(slurm)
        job.cancel("--signal=USR1")  # to daemons and workers, as Slurm's --signal does
        job.cancel()
        wait_for(lambda: "draining: 1 sessions" in job.log())
        job.until("SIGTERM")
        assert workers(slurm) == [worker]
        open_gate(slurm)
        assert job.wait() != 0
        assert re.search(r"energy -0\.0\d+", job.output), job.output
        assert job.log().endswith("stopped\n")
    wait_for(lambda: nothing_left(slurm))


def test_a_signal_to_the_batch_script_is_for_the_command(slurm: Slurm, gate: None) -> None:
    with gated(slurm, "exec") as job:
        job.until("worker")
        job.cancel("--batch", "--signal=TERM")
        job.until("SIGTERM")
        assert "draining" not in job.log()
        open_gate(slurm)
        assert job.wait() == 0, job.output
        assert "energy" in job.output


def test_a_daemon_for_all_jobs_of_a_node(slurm: Slurm) -> None:
    """The first job's Prolog starts it, the last one's Epilog stops it."""
    machine = slurm.machine
    machine.write("/etc/rootstockd/config.toml", 'models = ["emt"]\n')
    ours = f"env PYTHONPATH={REPOSITORY} {PYTHON} -m rootstockd"
    for name, text in (("prolog", PROLOG), ("epilog", EPILOG)):
        slurm.hook(name, text.replace("/opt/rootstockd/bin/rootstockd", ours).replace("--gpu 0", "--device cpu"))
    script = "#!/bin/bash\npython ask.py\nuntil [ -e enough ]; do sleep 0.1; done\n"
    site = "/run/rootstockd/rootstockd.sock"
    options = ("--nodelist=n1", "--gres=gpu:1")
    try:
        with slurm.submit(script, *options, ask=ASK) as one, slurm.submit(script, *options, ask=ASK) as other:
            for job in (one, other):
                job.until('{"node"')
            (first,), (second,) = answers(one.output), answers(other.output)
            assert first["socket"] == second["socket"] == site
            assert first["pid"] == second["pid"]
            variables = machine.do("cat", f"/proc/{first['pid']}/environ")
            assert "SLURM_" not in variables
            assert "CUDA_VISIBLE_DEVICES" not in variables
            for job in (one, other):
                (job.folder / "enough").touch()
                assert job.wait() == 0, job.output
                if job is one:
                    assert machine.rootstockd("status", "--socket", site).returncode == 0
        wait_for(lambda: nothing_left(slurm))
        # one that was there before stays
        assert machine.rootstockd("start", "--device", "cpu").returncode == 0
        with slurm.submit("#!/bin/bash\npython ask.py\n", *options, ask=ASK) as job:
            assert job.wait() == 0, job.output
        wait_for(lambda: machine.run("squeue", "--noheader").stdout == "")
        assert machine.rootstockd("stop").returncode == 0
    finally:
        for name in ("prolog", "epilog"):
            slurm.hook(name, "#!/bin/sh\nexit 0\n")


SLOW_START = """
import sys, time
from pathlib import Path
while "rootstockd.serve" in sys.orig_argv and not Path("/srv/gates/open").exists():
    time.sleep(0.02)
"""
"""What has a daemon wait for the gate before it does anything."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_a_prolog_that_takes_too_long(slurm: Slurm, gate: None, number: signal.Signals) -> None:
    """Ended by `timeout` it ends its daemon; killed, it leaves that to the last job's Epilog."""
    machine = slurm.machine
    machine.write("/srv/slow/sitecustomize.py", SLOW_START)
    ours = ("env", "SLURM_JOB_ID=1", f"PYTHONPATH=/srv/slow:{REPOSITORY}", PYTHON, "-m", "rootstockd", "slurm")
    with subprocess.Popen(machine.command(*ours, "prolog", "--device", "cpu")):
        wait_for(lambda: machine.run("pgrep", "--full", "rootstockd.serve").stdout)
        machine.do("kill", f"-{number.name[3:]}", machine.do("pgrep", "--full", "slurm prolog").strip())
    if number == signal.SIGKILL:
        open_gate(slurm)
        wait_for(lambda: machine.rootstockd("status").returncode == 0)
    machine.do(*ours, "epilog")
    assert not machine.run("pgrep", "--full", "rootstockd.serve").stdout
    assert machine.do("ls", "/run/rootstockd/jobs") == ""


def test_dask_workers_in_jobs(slurm: Slurm) -> None:
    """Dask's own SLURMCluster submits them; each node has a daemon, which goes with its job."""
    command = [f"PATH={PATH}", f"PYTHONPATH={REPOSITORY}", PYTHON, f"{REPOSITORY}/examples/screening_dask.py"]
    options = ["--model=emt", "--count=20", "--nodes=2", "--threads=1", "--memory=900MB", "--slurm=--gres=gpu:2"]
    home = f"/home/{slurm.user}"
    done = slurm.machine.run("env", f"--chdir={home}", *command, *options, user=slurm.user)
    assert "20 relaxed, 0 failed" in done.stdout, done.stdout + done.stderr
    nodes = {path.name.split(".")[1] for path in slurm.home.glob(".local/state/rootstockd/log/job-*.log")}
    assert nodes >= {"n1", "n2"}
    wait_for(lambda: slurm.machine.run("squeue", "--noheader").stdout == "", timeout=60)
    wait_for(lambda: nothing_left(slurm))


def test_prolog_and_epilog_are_for_slurm() -> None:
    done = rootstockd("slurm", "epilog")
    assert done.returncode == 1
    assert "Slurm's Prolog and Epilog" in done.stderr
