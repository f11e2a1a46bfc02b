"""Shells complete what the command has: asked as they ask."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import RunningDaemon, rootstockd

COMMAND = Path(sys.executable).parent / "rootstockd"
pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason="the command is not installed")


def run(*command: str, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """What bash is told to read."""
    path = tmp_path_factory.mktemp("completion") / "rootstockd.bash"
    path.write_text(run("rootstockd", "completion", "bash"))
    return path


@pytest.fixture
def bash(script: Path):
    """What bash offers for the last of some words."""
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_rootstockd_completion rootstockd; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return lambda *words, **variables: run(
        "bash", "-c", program, "bash", str(script), "rootstockd", *words, **variables
    ).split()


def test_commands_and_options(bash) -> None:
    assert bash("st") == ["start", "status", "stop"]
    assert bash("start", "--max-a") == ["--max-atoms"]


def test_names(bash) -> None:
    assert bash("models", "show", "mace-emt") == ["mace-emt-small"]
    assert bash("models", "pull", "mace-emt") == []  # it has no weights to be pulled
    assert bash("env", "create", "") == ["chgnet", "mace", "sevennet"]


def test_models_that_are_loaded(bash, own_daemon: RunningDaemon) -> None:
    assert bash("unload", "", ROOTSTOCKD_SOCKET=str(own_daemon.socket)) == ["emt"]
    assert bash("unload", "", ROOTSTOCKD_SOCKET=str(own_daemon.folder / "none.sock")) == []


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish(tmp_path: Path) -> None:
    program = 'rootstockd completion fish | source; complete -C "rootstockd models show mace-emt"'
    assert run("fish", "-c", program, HOME=str(tmp_path)).startswith("mace-emt-small\t")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    done = rootstockd("completion", shell)
    assert done.returncode == 0
    assert "_ROOTSTOCKD_COMPLETE" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=60)


def test_no_such_command() -> None:
    done = rootstockd("models", "lst")
    assert done.returncode == 2
    assert "Did you mean 'list'?" in done.stderr
