"""The image, the Apptainer definition and the manifests in examples/containers, as far as they can be read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import rootstockd
from conftest import RunningDaemon, wait_for
from rootstock_client.runtime_dir import SOCKET_NAME, SYSTEM_DIR
from rootstockd.models.catalogue import Catalogue
from rootstockd.settings.config import SettingsFile
from rootstockd.settings.config_layers import make_config

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "containers"
CONTAINERFILE = (FOLDER / "Containerfile").read_text()
DEFINITION = (FOLDER / "rootstockd.def").read_text()
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.33"
"""The oldest release whose schema the manifests are checked with; the newest is the package's."""


def resources() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text())


def resource(kind: str) -> dict[str, Any]:
    (found,) = (one for one in resources() if one["kind"] == kind)
    return found


def pod(kind: str) -> dict[str, Any]:
    return resource(kind)["spec"]["template"]["spec"]


def test_the_containerfile_is_as_hadolint_wants_it():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", FOLDER / "Containerfile"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_apptainer_installs_what_the_image_has():
    def installs(text: str) -> list[str]:
        text = text.replace("$EXTRAS", re.search(r"^ARG EXTRAS=(\S+)", CONTAINERFILE, re.MULTILINE)[1])
        return re.findall(r"(?:apt-get|pip) install .*", text.replace(" \\", ""))

    build, final = CONTAINERFILE.split("\nFROM $BASE\n")
    assert len(installs(DEFINITION)) == 2
    assert installs(DEFINITION) == installs(build)
    assert "python3 " in installs(final)[0]  # the venv's own is a link to it
    assert re.search(r"^ARG BASE=(\S+)", CONTAINERFILE, re.MULTILINE)[1] == re.search(r"From: (\S+)", DEFINITION)[1]

    copied = {path for line in re.findall(r"^COPY (?!--from)(.*) \S+$", build, re.MULTILINE) for path in line.split()}
    files = re.search(r"^%files\n(.*?)^$", DEFINITION, re.MULTILINE | re.DOTALL)[1]
    assert copied == {line.split()[0] for line in files.splitlines()}
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("version", [KUBERNETES, kubernetes_validate.latest_version()])
def test_manifests_fit_the_schema_of_kubernetes(version):
    for one in resources():
        kubernetes_validate.validate(one, version, strict=True)
    wrong = resource("DaemonSet")
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 90
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_daemons_pod_fits_the_daemon(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(resource("ConfigMap")["data"]["config.toml"])
    defaults = {"socket": SYSTEM_DIR / SOCKET_NAME, "devices": ["cpu"]}
    settings = make_config((SettingsFile(path=file, named=True),), {}, {}, defaults)
    for model in settings.models:
        Catalogue.load(()).resolve(model)
    spec = pod("DaemonSet")
    assert spec["terminationGracePeriodSeconds"] > settings.drain_timeout + 20
    (daemon,) = spec["containers"]
    assert settings.metrics.endswith(f":{daemon['ports'][0]['containerPort']}")
    annotations = resource("DaemonSet")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(daemon["ports"][0]["containerPort"])
    folders, weights = spec["initContainers"]
    assert weights["args"] == ["models", "pull", *settings.models]

    uid = int(re.search(r"^ARG UID=(\d+)", CONTAINERFILE, re.MULTILINE)[1])
    assert {daemon["securityContext"]["runAsUser"], weights["securityContext"]["runAsUser"]} == {uid}
    assert folders["command"].count(str(uid)) == 2


def test_daemon_and_job_meet():
    images = {one["image"] for kind in ("DaemonSet", "Job") for one in pod(kind)["containers"]}
    assert images == {f"registry.example.org/rootstockd:{rootstockd.__version__}"}
    paths = set()
    for kind in ("DaemonSet", "Job"):
        spec = pod(kind)
        hosts = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
        mounts = {mount["mountPath"]: hosts.get(mount["name"]) for mount in spec["containers"][0]["volumeMounts"]}
        paths.add(mounts[str(SYSTEM_DIR)])
    assert paths == {str(SYSTEM_DIR)}
    assert f"ROOTSTOCKD_SOCKET={SYSTEM_DIR / SOCKET_NAME}" in CONTAINERFILE


def test_the_job_runs(daemon: RunningDaemon):
    (container,) = pod("Job")["containers"]
    python, *arguments, _ = container["command"]
    assert python == "python"
    variables = {one["name"]: one["value"] for one in container["env"]}
    done = subprocess.run(
        [sys.executable, *arguments, "emt"],
        env={**os.environ, **variables, "ROOTSTOCKD_SOCKET": str(daemon.socket)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" eV\n")


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")


@pytest.fixture
def namespaces() -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")


def elsewhere(daemon: RunningDaemon, *command: str) -> subprocess.CompletedProcess[str]:
    """A command for a daemon, given in a process namespace in which that is not."""
    return subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "rootstockd", *command, "--socket", daemon.socket],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("command", [("stop",), ("stop", "--force"), ("restart",)])
def test_a_daemon_outside_is_not_stopped_from_a_container_which_is_told_why(daemon: RunningDaemon, command):
    """From there its end can't be seen, so that nobody knows when its address and its GPU are free."""
    pid = daemon.pid
    done = elsewhere(daemon, *command)
    assert done.returncode == 1
    assert f"the daemon at {daemon.socket} runs in another process namespace" in done.stderr, done.stderr
    assert "has just gone" not in done.stderr and "rootstockd start" not in done.stderr
    assert json.loads(elsewhere(daemon, "status", "--json").stdout)["pid"] == pid
    assert elsewhere(daemon, "reload").returncode == 0


@pytest.mark.usefixtures("namespaces")
def test_a_daemon_in_a_container_is_stopped_from_outside(runtime_folder: Path):
    with tempfile.TemporaryDirectory(dir=runtime_folder) as folder:
        daemon = RunningDaemon(Path(folder), ())
        command = [*NAMESPACE, sys.executable, "-m", "rootstockd", "start", "--foreground", "--device", "cpu"]
        with subprocess.Popen([*command, "--socket", daemon.socket], stderr=subprocess.DEVNULL) as process:
            wait_for(lambda: process.poll() is not None or daemon.run("status").returncode == 0, 60)
            done = daemon.run("stop")
            assert done.returncode == 0, done.stderr
            assert process.wait(10) == 0
