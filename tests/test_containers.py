"""The image, the Apptainer definition and the manifests in examples/containers, as far as they can be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from conftest import RunningDaemon
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
