"""The documents do what they say: their commands are run, their programs too, and their files are written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

import click
import pytest

from conftest import EMBEDDED_MODEL
from rootstockd.cli import main
from rootstockd.models.catalogue import Catalogue

DOCS = Path(__file__).parent.parent / "docs"
MIRRORED = ("2023-12-03-mace-128-L1_epoch-199.model", "MACE-OFF23_small.model")
"""Weights that the documents pull. No machine need reach them: the small model stands in for each."""
BLOCK = re.compile(r"^```(console|python|text|toml|xml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(bash|console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.(\d*))?")


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr  # mkdocs.yml is strict: a warning is an error
    for page in re.findall(r": (\S+)\.md$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE):
        text = (tmp_path / f"{page.replace('README', 'index')}.html").read_text()
        assert 'href="../' not in text
    commands = (tmp_path / "commands.html").read_text()
    assert "rootstockd env create" in commands
    assert "-h, --help" in commands
    assert (tmp_path / "search/search_index.js").is_file()  # what a search without a server reads
    assert "ModelLoadError" in (tmp_path / "python.html").read_text()
    http = (tmp_path / "http.html").read_text()
    assert "POST /v1/unload" in http and "UnloadRequest" in http and "Evaluations that wait for the model" in http


@pytest.mark.parametrize("path", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_models_of_documents_are_in_the_catalogue(path):
    named = set(re.findall(r"\b(?:mace|sevennet|chgnet)-[a-z0-9-]+", path.read_text())) - {"mace-torch"}
    catalogue = Catalogue.load(())
    for name in named:
        catalogue.resolve(name)


@pytest.fixture
def home():
    """A new user's, with a mirror of weights and a fine-tune in it."""
    with tempfile.TemporaryDirectory(prefix="rsd-") as folder:
        home = Path(folder)
        (home / "mirror").mkdir()
        for name in MIRRORED:
            shutil.copy(EMBEDDED_MODEL, home / "mirror" / name)
        shutil.copy(EMBEDDED_MODEL, home / "my-mace.model")
        yield home
        # all that was started has ended with the last of a page's commands, but where one of them failed
        stop = [sys.executable, "-m", "rootstockd", "stop", "--force"]
        subprocess.run(stop, env=environment(home), capture_output=True, check=False, timeout=60)


def environment(home):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ROOTSTOCKD_"))}
    caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # what was compiled and downloaded before
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": caches,
        "ROOTSTOCKD_MIRROR": str(home / "mirror"),
        "ROOTSTOCKD_STATE": str(home / "state"),
        "ROOTSTOCKD_SOCKET": str(home / "run" / "rootstockd.sock"),
    }


def run(command, home, **options):
    done = subprocess.run(
        command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=280, check=False, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def assert_shown(printed, shown):
    """The words are the same, and numbers but for their last digit, or for the fifth decimal."""
    words = ["".join(NUMBER.sub("#", text).split()) for text in (printed, shown)]
    assert words[0] == words[1]
    for found, wanted in zip(NUMBER.finditer(printed), NUMBER.finditer(shown), strict=True):
        decimals = min(len(wanted[1] or ""), 5)
        assert float(found[0]) == pytest.approx(float(wanted[0]), rel=0, abs=1.01 * 10**-decimals), printed


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        *("tutorial.md", "migration.md", "administration.md", "models.md", "add-a-model.md", "many-nodes.md"),
        *("drivers.md", "http.md"),
    ],
)
def test_commands_and_programs(name, home):
    blocks = BLOCK.findall((DOCS / name).read_text())
    assert len(blocks) > 1
    for kind, text in blocks:
        if kind in {"toml", "xml"}:
            (name,) = re.findall(r"~/(\S+)", text.partition("\n")[0])
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(text)
        elif kind == "python":
            old = version("torch-sim-atomistic").startswith("0.3")  # the last for Python 3.11
            program = text.replace("ts.Integrator.", "ts.integrators.") if old else text
            printed = run([sys.executable, "-c", program], home)
            assert printed.strip()
        elif kind == "text":
            assert_shown(printed, text)
        else:
            for line in text.splitlines():
                assert line.startswith("$ "), line
                run(["bash", "-c", line.removeprefix("$ ")], home)


def test_the_tour(home):
    """The README's, by hand."""
    tour = (DOCS.parent / "README.md").read_text().partition("## A tour")[2].partition("\n## ")[0]
    printed = {}
    for kind, text in BLOCK.findall(tour):
        if kind == "python":
            printed["python"] = run([sys.executable, "-c", text], home)
        for command in re.findall(r"^\$ (rootstockd .*)", text, re.MULTILINE):
            printed[command.split()[1]] = run(["bash", "-c", command], home)
    assert list(printed) == ["start", "python", "status", "logs", "stop"]
    assert "\nready on cpu, models loaded: mace-emt-small\n" in f"\n{printed['start']}"
    assert str(home / "run") in printed["start"]
    steps = printed["python"].count("BFGS:")
    evaluations = steps + 1  # and one for the stress
    row = rf"^mace-emt-small  float64  ready  cpu +0 +0 .* {evaluations} +1\.0 "
    assert re.search(row, printed["status"], re.MULTILINE) and f" {evaluations}  " in tour
    assert "\nmace-emt-small: fused (mace-torch 0.3.16, torch 2." in printed["status"]
    assert len(printed["logs"].splitlines()) == 2
    assert printed["stop"] == "stopped\n"


def test_two_jobs_of_a_batch_system_on_one_node(home):
    """The script of docs/slurm.md for PBS: each has a daemon of its own, and its end is nothing to the other."""
    page = (DOCS / "slurm.md").read_text().replace("mace-mp-medium", "emt")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n#PBS.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (home / "job").write_text(script)
    jobs = {}
    for number, steps in enumerate((10, 1500)):
        folder = home / str(number)
        folder.mkdir()
        assert "< 1000 " in program
        (folder / "md.py").write_text(program.replace("< 1000 ", f"< {steps} "))
        name = f"{os.getpid()}[{number}].pbs"
        variables = {**environment(home), "PBS_O_WORKDIR": str(folder), "PBS_JOBID": name}
        with (folder / "out").open("w") as out:
            process = subprocess.Popen(["bash", home / "job"], env=variables, stdout=out, stderr=subprocess.STDOUT)
        jobs[folder] = process, Path(f"/tmp/rootstockd-{os.getuid()}-job-{name}")
    for folder, (process, runtime) in jobs.items():
        assert process.wait(timeout=240) == 0, (folder / "out").read_text()
        said = (folder / "out").read_text()
        assert "ready on cpu, models loaded: emt" in said and said.endswith("\nstopped\n"), said
        assert (folder / "restart.xyz").is_file() and not runtime.exists()


def commands_of(path):
    """The `rootstockd` commands that a document has people type."""
    for kind, text in SHELL.findall(path.read_text()):
        prompt = "[$#] " if kind == "console" else ""
        for line in text.replace("\\\n", "").splitlines():
            if found := re.match(rf"{prompt}(?:/\S+/)?rootstockd (.*)", line):
                words = shlex.shlex(found[1], posix=True, punctuation_chars=True)
                words.whitespace_split = True
                yield list(takewhile(lambda word: word not in {"|", "||", "&", "&&", ";", ">"}, words))


def test_commands_of_all_documents_are_understood(tmp_path, monkeypatch):
    """They are parsed, and not run."""
    for name in ("my-mace.model", "init.xyz"):  # which the documents say to have
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(click.Command, "invoke", lambda *_: None)  # of a group it goes on to the command
    paths = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    commands = [command for path in paths for command in commands_of(path)]
    assert len(commands) > 50
    for command in commands:
        main.main(command, standalone_mode=False)
