"""`rootstockd models`, and daemons that use what it stored."""

import contextlib
import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import EMBEDDED_MODEL, rootstockd, sha256, wait_for
from fileserver import serving
from rootstock_client.errors import ModelLoadError, UnknownModelError
from rootstockd.models import store
from rootstockd.models.whole_files import StoreError, lock
from rootstockd.settings.toml_file import MOST_BYTES

DATA = os.urandom(300_000)


@pytest.fixture
def server():
    with serving() as server:
        server.files["/emt.model"] = EMBEDDED_MODEL.read_bytes()
        server.files["/random.model"] = DATA
        yield server


@pytest.fixture
def state(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(folder))
    return folder


@pytest.fixture
def catalogue(server, state, tmp_path):
    """Models whose weights the server has."""
    path = tmp_path / "more.toml"
    path.write_text(
        f'[pulled]\nfamily = "mace"\nurl = "{server.url("/emt.model")}"\nlicence = "MIT"\naliases = ["pull-ed"]\n'
        f'[random]\nfamily = "noop"\nurl = "{server.url("/random.model")}"\n'
        f'[strict]\nfamily = "noop"\nurl = "{server.url("/random.model")}"\nlicence = "ASL"\naccept_licence = true\n'
    )
    return path


@pytest.fixture
def models(catalogue):
    """Run a command of `rootstockd models`."""

    def models(*arguments, fails=False):
        known = () if arguments[0] in {"add", "remove"} else ("--catalogue", catalogue)
        done = rootstockd("models", *arguments, *known)
        assert bool(done.returncode) == fails, done.stderr + done.stdout
        return done.stderr if fails else done.stdout

    return models


def copper():
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.1, seed=1)
    return atoms


def numbers(client, name):
    atoms = copper()
    atoms.calc = client.calculator(name, exact=True)
    return atoms.get_potential_energy(), atoms.get_forces()


def test_a_daemon_finds_what_is_pulled_while_it_runs(models, catalogue, start_daemon, server, state):
    daemon = start_daemon("--catalogue", str(catalogue))
    client = daemon.client()
    states = {model["name"]: model["state"] for model in client.models()}
    assert (states["pulled"], states["mace-emt-small"]) == ("to pull", "cold")
    with pytest.raises(ModelLoadError, match="rootstockd models pull pulled"):
        numbers(client, "pull-ed")
    assert not client.status()["models"]
    said = models("pull", "pull-ed")
    assert sha256(EMBEDDED_MODEL) in said
    assert "No checksum was known for it" in said
    assert "the same as the original bit for bit" in said
    (state / f"weights/{sha256(EMBEDDED_MODEL)}.model").unlink()  # workers need the safe form alone
    energy, forces = numbers(client, "pull-ed")
    expected = numbers(client, "mace-emt-small")
    np.testing.assert_allclose(energy, expected[0], rtol=1e-12)
    np.testing.assert_allclose(forces, expected[1], atol=1e-10)
    told = {model["name"]: model["fingerprint"] for model in client.status()["models"]}
    assert told["pulled"] == told["mace-emt-small"], "the same model in another form"
    states = {model["name"]: model["state"] for model in client.models()}
    assert (states["pulled"], states["sevennet-0"]) == ("ready", "needs env")
    with client.calculator("pulled") as session:
        session.get_potential_energy(copper())
        assert "the daemon has pulled for 1 session," in models(
            "remove", "pulled", "--socket", daemon.socket, fails=True
        )
    wait_for(lambda: daemon.model("pulled")["sessions"] == 0)
    said = models("remove", "pulled", "--socket", daemon.socket)
    assert "pulled is unloaded" in said and "pulled was removed" in said
    wait_for(lambda: [model["name"] for model in client.status()["models"]] == ["mace-emt-small"])
    assert not list(state.glob("weights/*"))


def test_a_daemon_is_not_started_for_what_is_not_here(catalogue, runtime_folder):
    done = rootstockd(
        "start", "--device", "cpu", "--socket", runtime_folder / "none.sock", "--log-file", runtime_folder / "none.log",
        "--catalogue", catalogue, "--model", "pulled",
    )  # fmt: skip
    assert done.returncode
    assert "rootstockd models pull pulled" in done.stderr


def test_a_pull_that_is_killed_and_the_next(models, catalogue, server, state):
    server.faults.append("hold 98304")
    command = [sys.executable, "-m", "rootstockd", "models", "pull", "random", "--catalogue", str(catalogue)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    part = state / "weights/random.part"
    wait_for(lambda: part.exists() and part.stat().st_size == 98_304)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.go.set()
    assert not list(state.glob("weights/*.model")) and not (state / "weights/random.json").exists()
    models("pull", "random")
    assert server.ranges == ["all", "bytes=98304-"]
    assert [path.read_bytes() for path in state.glob("weights/*.model")] == [DATA]
    assert not list(state.glob("weights/*.part*"))


def test_list_and_show(models, catalogue, state):
    listed = {entry["name"]: entry for entry in json.loads(models("list", "--json"))}
    assert (listed["pulled"]["state"], listed["mace-emt-small"]["state"]) == ("to pull", "here")
    assert (listed["emt"]["state"], listed["sevennet-0"]["state"]) == ("built in", "needs env")
    assert listed["sevennet-0"]["environment"] == "sevennet"
    assert "until they are built: rootstockd env create chgnet, rootstockd env create sevennet" in models("list")
    assert "needs env: rootstockd env create sevennet" in models("show", "sevennet-0")
    assert models("list").split()[:3] == ["model", "environment", "state"]
    assert "environment  mace\n" in models("show", "mace-emt-small")
    assert "noop" not in listed
    assert json.loads(models("show", "random", "--json"))["fingerprint"] is None  # it may be anything yet
    models("pull", "random")
    line = next(line for line in models("list").splitlines() if line.startswith("random "))
    assert line.split()[1:] == ["noop", "here", "0.3", "MB"]
    shown = json.loads(models("show", "random", "--json"))
    assert shown["from"] == str(catalogue)
    assert shown["stored"]["original"]["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert shown["stored"]["pinned"] == "its first use"
    text = models("show", "random")
    assert str(catalogue) in text and hashlib.sha256(DATA).hexdigest() in text
    assert f"{shown['fingerprint']} in float64" in text
    assert "Did you mean pulled" in models("show", "puled", fails=True)
    assert "Did you mean pulled" in models("pull", "puled", fails=True)


def test_a_mirror_from_the_environment(models, server, tmp_path, monkeypatch):
    monkeypatch.setenv("ROOTSTOCKD_MIRROR", str(tmp_path / "mirror"))
    assert f"the mirror has no {tmp_path}/mirror/random.model" in models("pull", "random", fails=True)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/random.model").write_bytes(DATA)
    models("pull", "random")
    assert not server.requests


def test_a_licence_without_a_terminal(models, server):
    said = models("pull", "strict", fails=True)
    assert "its licence has to be accepted first: ASL" in said and "--accept-licence" in said
    assert not server.requests
    models("pull", "strict", "--accept-licence")
    assert json.loads(models("show", "strict", "--json"))["stored"]["licence_accepted"]


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_licence_is_asked_for_on_a_terminal(catalogue, server, state, answer):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        command = [sys.executable, "-m", "rootstockd", "models", "pull", "strict", "--catalogue", str(catalogue)]
        process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.close(theirs)
        terminal.write(f"{answer}\n".encode())
        said, _ = process.communicate(timeout=60)
    assert "Do you accept it?" in said
    assert (process.returncode == 0) == (answer == "y"), said
    assert len(server.requests) == (answer == "y")


def test_verify(models, state):
    models("pull", "random")
    models("pull", "strict", "--accept-licence")
    for said in (models("verify"), models("verify", "random")):
        assert "random, strict: " in said  # one file of two models
    assert "mace-emt-small: " in models("verify")
    models("remove", "strict")
    assert "no weights are stored for emt" in models("verify", "emt", fails=True)
    (stored,) = state.glob("weights/*.model")
    stored.write_bytes(DATA[:-1])
    done = rootstockd("models", "verify", "random")
    assert done.returncode, done.stdout
    models("verify", "mace-emt-small")
    assert "changed or damaged" in models("pull", "random")
    models("verify", "random")
    stored.unlink()
    assert rootstockd("models", "verify").returncode


def test_remove(models, state):
    models("pull", "random")
    assert "0.3 MB are free again" in models("remove", "random")
    assert not list(state.glob("weights/*.model")) and not list(state.glob("weights/*.json"))
    assert "neither added nor pulled" in models("remove", "mace-emt-small", fails=True)
    assert "Did you mean mace-emt-small" in models("remove", "mace-emt-smal", fails=True)
    assert "there is no model '../models'" in models("remove", "../models", fails=True)


def test_no_fingerprint_is_made_up(models, tmp_path):
    file = tmp_path / "models.toml"
    entry = '[{0}]\nfamily = "ase"\narguments = {{ calculator = "{1}" }}\n'
    file.write_text(entry.format("there", "ase.calculators.emt:EMT") + entry.format("nowhere", "no_such_module:Foo"))
    for name, has in (("there", True), ("nowhere", False)):
        assert bool(json.loads(models("show", name, "--json", "--catalogue", file))["fingerprint"]) is has


def test_add(models, state, tmp_path, start_daemon, server):
    file = tmp_path / "fine-tune.model"
    file.write_bytes(EMBEDDED_MODEL.read_bytes())
    said = models(
        "add", "tuned", file, "--family", "mace", "--dtype", "float32", "--licence", "MIT", "--alias", "t",
        "--description", "Mine.",
    )  # fmt: skip
    assert "elements Al, Ni, Cu, Pd, Ag, Pt, Au" in said and "safetensors; the same as the original" in said
    file.unlink()
    shown = json.loads(models("show", "t", "--json"))
    assert (shown["name"], shown["state"], shown["dtype"]) == ("tuned", "here", "float32")
    assert (shown["description"], shown["licence"], shown["aliases"]) == ("Mine.", "MIT", ["t"])
    assert shown["from"] == str(state / "models.toml")
    assert shown["stored"]["original"]["sha256"] == sha256(EMBEDDED_MODEL) == shown["original_sha256"]
    daemon = start_daemon()
    energy, _ = numbers(daemon.client(), "tuned")
    atoms = copper()
    atoms.calc = EMT()  # which the model imitates
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=0.5)
    (state / "models.toml").write_text("# by hand\n" + (state / "models.toml").read_text())
    again = tmp_path / "again.model"
    again.write_bytes(EMBEDDED_MODEL.read_bytes())
    for alias, there in (("t", "'t'"), ("emt", "'emt'"), ("mace-mp-0-medium", "'mace-mp-0-medium'")):
        said = models("add", "second", again, "--family", "noop", "--alias", "s", "--alias", alias, fails=True)
        assert f"there is a model {there} already" in said
    models("add", "second", again, "--family", "noop", "--elements", "Cu, Au")
    assert json.loads(models("show", "second", "--json"))["elements"] == ["Cu", "Au"]
    with pytest.raises(UnknownModelError, match="rootstockd reload"):
        numbers(daemon.client(), "second")
    daemon.run("reload")
    numbers(daemon.client(), "second")
    models("remove", "tuned", "--force", "--socket", daemon.socket)
    text = (state / "models.toml").read_text()
    assert "# by hand" in text and "[tuned]" not in text and "[second]" in text
    models("verify", "second")  # whose file was the same
    models("remove", "second", "--force", "--socket", daemon.socket)
    assert not list(state.glob("weights/*.model")) and not list(state.glob("weights/*.json"))


def test_a_catalogue_that_is_full(models, state):
    """With one more model it could not be read, nor any of its models had."""
    file = store.own_folder().parent / "models.toml"
    file.write_text("# " + "x" * (MOST_BYTES - 100) + "\n")
    before = file.read_text()
    said = models("add", "second", EMBEDDED_MODEL, "--family", "noop", fails=True)
    assert f"second was not added: with it {file} would have more than 524,288 bytes" in said
    assert file.read_text() == before and not list(state.glob("weights/*"))
    assert "second" not in models("list")


def test_a_pipe_is_not_waited_for(models, state, tmp_path):
    os.mkfifo(tmp_path / "pipe.model")
    said = models("add", "tuned", tmp_path / "pipe.model", "--family", "mace", fails=True)
    assert f"{tmp_path}/pipe.model can't be read: it is no regular file" in said
    assert not list(state.glob("weights/*"))


def test_a_pipe_in_the_store_is_not_waited_for(models, state, tmp_path):
    """Nor is it taken for what a command before has left."""
    folder = store.own_folder()
    for name in ("tuned.copy", "tuned.json.part", "models.toml.part"):
        os.mkfifo(folder / name)
    models("add", "tuned", EMBEDDED_MODEL, "--family", "noop")
    assert "tuned" in models("list") and not list(folder.glob("*.part"))
    (folder / "tuned.json").unlink()
    os.mkfifo(folder / "tuned.json", 0o644)
    said = models("remove", "tuned", fails=True)
    assert f"the record {folder}/tuned.json can't be read: [Errno 22] it is no regular file" in said
    (folder / "tuned.json").unlink()
    (file,) = folder.glob("*.model")
    file.unlink()
    os.mkfifo(file, 0o644)
    assert store.wrong(file, "0" * 64) == f"{file} can't be read: it is no regular file"
    models("verify", "tuned", fails=True)


def test_a_file_that_is_removed_with_another_model(state, tmp_path):
    """Between being copied for one model and its record; afterwards it stays for the one that is left."""
    folder = store.own_folder()

    def copied(name):
        original = store.copy_in(EMBEDDED_MODEL, folder, folder / f"{name}.copy", ".model")
        return store.Record(original=original, source="there", pinned="the user", when="now")

    store.write_record(folder, "one", copied("one"))
    second = copied("two")
    assert store.remove(folder, "one") == second.original.size
    with pytest.raises(StoreError, match="two was not kept: another command removed .* Try again"):
        store.write_record(folder, "two", second)
    assert not list(folder.iterdir())
    for name in ("one", "two"):
        store.write_record(folder, name, copied(name))
    with lock(folder, ".records", print):  # nothing is removed while it is told who has what
        other = threading.Thread(target=store.remove, args=(folder, "one"))
        other.start()
        other.join(0.1)
        assert other.is_alive() and (folder / "one.json").exists()
    other.join(60)
    assert sorted(path.name for path in folder.iterdir()) == [second.original.name, "two.json"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_has_no_room(unbuffered):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rootstockd", "models", "list"],
            check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device. Make room and try again.\n")


def test_two_add_one_name(models, state, tmp_path):
    """Whoever comes second is refused, and takes nothing away from the first."""
    (tmp_path / "bad.model").write_bytes(DATA)
    models("add", "other", EMBEDDED_MODEL, "--family", "noop")
    with lock(state / "weights", "tuned", print):  # the first is at it
        second = subprocess.Popen(
            [sys.executable, "-m", "rootstockd", "models", "add", "tuned", tmp_path / "bad.model", "--family", "noop"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert second.stdout is not None
        assert "another command is working on tuned; waiting for it" in second.stdout.readline()
        # and done: as a model that was added has it
        file = state / "models.toml"
        file.write_text(file.read_text() + file.read_text().replace("[other]", "[tuned]"))
        shutil.copy(state / "weights/other.json", state / "weights/tuned.json")
    assert "there is a model 'tuned' already" in second.communicate(timeout=60)[1] and second.returncode == 1
    assert json.loads(models("show", "tuned", "--json"))["state"] == "here"
    models("verify", "tuned")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("random", "--family", "mace"), "random was not added: model 'tuned': it is not a MACE model"),
        (("empty", "--family", "mace"), r"empty was not added: .* can read: it is empty\.$"),
        (("page", "--family", "mace"), "page was not added: .* can read: it begins with <: it looks like a web page"),
        (
            ("epoch.pt", "--family", "mace"),
            "it looks like a checkpoint: the .model file is wanted that mace_run_train writes beside it",
        ),
        (("good", "--family", "mace", "--sha256", "0" * 64), "It was not added"),
        (("good", "--family", "mace", "--elements", "Fe"), "does not know Fe"),
        (("good", "--family", "mac"), "no family 'mac'; did you mean 'mace'"),
        (("good", "--family", "nope"), r"no family 'nope'\. There are: ase, ipi, mace"),
        (("good", "--family", "sevennet"), "such as SevenNet's or CHGNet's, is an entry in models.toml"),
        (("good", "--family", "MACE"), "no family 'MACE'; did you mean 'mace'"),
    ],
)
def test_what_is_not_added(models, state, tmp_path, options, words):
    import re

    (tmp_path / "random").write_bytes(DATA)
    (tmp_path / "good").write_bytes(EMBEDDED_MODEL.read_bytes())
    (tmp_path / "empty").touch()
    (tmp_path / "page").write_bytes(b"\n<!DOCTYPE html><html><body>Sign in</body></html>")
    if options[0] == "epoch.pt":  # as mace.tools.checkpoint writes one
        torch.save({"model": {"w": torch.zeros(3)}, "optimizer": {}, "lr_scheduler": {}}, tmp_path / "epoch.pt")
    said = models("add", "tuned", tmp_path / options[0], *options[1:], fails=True)
    assert re.search(words, said), said
    assert "Traceback" not in said and str(state) not in said
    assert not list(state.glob("weights/*")) and not (state / "models.toml").exists()


def test_the_words_on_a_file_that_needs_another_package_name_it_where_it_is(models, state, tmp_path):
    """And not the copy, which is gone."""
    file = tmp_path / "theirs.model"
    file.write_bytes(b"\x80\x02ca_package_of_theirs\nModel\n)R.")
    said = models("add", "tuned", file, "--family", "mace", fails=True).rpartition("Error: ")[2]
    assert f"{file} is not a MACE model that" in said and "No module named 'a_package_of_theirs'" in said, said
    assert str(state) not in said and not list(state.glob("weights/*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk(models, state):
    """In it a file and no copy of it, in whatever form: nothing is left of what has no room."""
    state.mkdir()
    room = EMBEDDED_MODEL.stat().st_size + 100_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room},mode=755", "none", str(state)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        words = f"there is no room in {state}/weights: "
        said = models("pull", "pulled", fails=True)
        assert f"what pulled was converted to was not kept: {words}" in said and "Make room and try again" in said
        assert sorted(path.suffix for path in (state / "weights").iterdir()) == [".json", ".model"]
        said = models("add", "mine", EMBEDDED_MODEL, "--family", "mace", fails=True)
        assert f"{EMBEDDED_MODEL} was not copied: {words}" in said and "0.3 MB are needed" in said
        assert sorted(path.suffix for path in (state / "weights").iterdir()) == [".json", ".model"]
        models("remove", "pulled")
        models("add", "mine", EMBEDDED_MODEL, "--family", "noop")
        with (state / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert "0.3 MB are free again" in models("remove", "mine"), "a full disk can be made room on"
        assert not list((state / "weights").iterdir()) and "[mine]" not in (state / "models.toml").read_text()
    finally:
        subprocess.run(["umount", str(state)], check=True)


def test_names_that_are_taken_or_none(models, state):
    assert "there is a model 'mace-mp-0-small' already" in models(
        "add", "mace-mp-0-small", EMBEDDED_MODEL, "--family", "mace", fails=True
    )
    assert "can't be a model's name" in models("add", "../x", EMBEDDED_MODEL, "--family", "mace", fails=True)
