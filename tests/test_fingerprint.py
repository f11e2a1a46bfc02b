"""A calculator never goes on with another potential unnoticed, whatever becomes of the catalogue."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import py_compile
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk
from pydantic import ValidationError
from test_ipi import Springs

from conftest import RunningDaemon, rootstockd, wait_for
from plain_driver import PlainDriver
from rootstock_client.calculator import RootstockCalculator
from rootstock_client.control import request
from rootstock_client.errors import ModelChangedError, ModelLoadError
from rootstockd.environments.finding import Environment
from rootstockd.models import store
from rootstockd.models.availability import located
from rootstockd.models.catalogue import Catalogue, Entry
from rootstockd.models.spec import in_environment, spec_of
from rootstockd.models.store import Record, StoredFile

ENTRY: dict[str, Any] = {
    "family": "ase",
    "arguments": {"calculator": "x:Y", "options": {"head": "{head}", "device": "{device}"}},
    "weights": "w.model",
    "sha256": 64 * "a",
    "heads": ("one",),
    "elements": ("Cu",),
}


def fingerprint(dtype: str | None = None, device: str = "cpu", options: str = "", **changed: Any) -> str:
    entry = Entry.model_validate({**ENTRY, **changed})
    return spec_of("m", entry, dtype, device=device, options=options).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"family": "noop"},
        {"environment": "newer"},
        {"arguments": {**ENTRY["arguments"], "charge": 1}},
        {"sha256": 64 * "b"},
        {"sha256": 64 * "b", "original_sha256": 64 * "a", "converted_sha256": 64 * "c"},  # others than were converted
        {"sha256": 64 * "b", "original_sha256": 64 * "a"},
        {"heads": ("two",)},
        {"dtype": "float32"},
        {"options": '{"dispersion": {"xc": "pbe"}}'},
    ],
)
def test_what_determines_numbers_tells_models_apart(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) != fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"environment": "ase"},  # which is what it is without
        {"weights": "elsewhere/w.model", "size": 10},
        {"sha256": 64 * "A"},
        {"sha256": 64 * "b", "original_sha256": 64 * "A", "converted_sha256": 64 * "B"},
        {"description": "Mine.", "licence": "MIT", "citation": "doi:1", "url": "https://x/y"},
        {"aliases": ("n",), "hidden": True, "keep_alive": 3, "confine": False},
        {"elements": ("Cu", "Au"), "computes": ("energy",)},
        {"device": "cuda"},
        {"arguments": dict(reversed(ENTRY["arguments"].items()))},
    ],
)
def test_what_does_not_determine_numbers_makes_no_difference(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) == fingerprint()


def test_a_whole_number_is_the_same_as_a_float() -> None:
    ways = [[1, {"x": -2}], [1.0, {"x": -2.0}], [True, {"x": -2}], [1.5]]
    one, same, *others = (fingerprint(arguments={"calculator": "x:Y", "sizes": way}) for way in ways)
    assert one == same and one not in others
    assert fingerprint(options='{"dispersion": {"cutoff": 40}}') == fingerprint(
        options='{"dispersion": {"cutoff": 40.0}}'
    )


def test_a_dtype_is_the_same_by_default_and_by_name() -> None:
    assert fingerprint(dtype="float64") == fingerprint()


def test_heads_are_in_a_maces_weights() -> None:
    assert fingerprint(family="mace", heads=()) == fingerprint(family="mace")


def test_it_is_the_same_in_every_version() -> None:
    """Or jobs that run over an upgrade would take their model for another."""
    assert fingerprint() == "998e5f02e9f10d3c"
    assert spec_of("emt", Catalogue.load()["emt"]).fingerprint == "3d3398613e164ec2"


def install(folder: Path, name: str, version: str, **files: str) -> None:
    """A package's metadata, instead of those of another version."""
    for old in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    for file, text in files.items():
        (info / file).write_text(text)


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        ({"family": "mace"}, ""),
        ({"arguments": {"calculator": "x.calculators:Y"}}, ""),
        ({"arguments": {"calculator": "inferred:Y"}}, ""),
        ({"family": "elsewhere"}, ""),
        ({"family": "noop"}, '{"dispersion": {"xc": "pbe"}}'),
    ],
)
def test_versions_of_what_computes_tell_models_apart(tmp_path: Path, entry: dict[str, Any], options: str) -> None:
    """Those in the worker's own environment, and of nothing else that is there."""
    packages = tmp_path / "lib/python3.11/site-packages"
    environment = Environment("e", tmp_path / "bin/python", True, "")
    spec = spec_of("m", Entry.model_validate({**ENTRY, **entry}), options=options)

    def fingerprint(version: str, others: str = "1.0") -> str:
        install(packages, "mace_torch", version, **{"top_level.txt": "mace\n"})
        install(packages, "x", version)
        install(packages, "wheel_of_its_own", version, RECORD="inferred.py,,\n")
        install(packages, "plugin", version, **{"entry_points.txt": "[rootstockd.engines]\nelsewhere = p:q\n"})
        install(packages, "dftd3", version)
        install(packages, "torch", others, **{"top_level.txt": "torch\nfunctorch\n"})
        return in_environment(spec, environment).fingerprint

    first, *same = fingerprint("1.0"), fingerprint("1.0"), fingerprint("1.0", others="2.0")
    assert same == [first, first]
    assert fingerprint("1.1") != first != spec.fingerprint
    shutil.rmtree(packages)
    assert in_environment(spec, environment) == spec, "what is nowhere has no version"


def test_a_module_of_ones_own_is_told_by_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment("e", tmp_path / "bin/python", True, "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def fingerprint(name: str, file: str, text: str) -> str:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
        spec = spec_of("m", Entry.model_validate({**ENTRY, "arguments": {"calculator": f"{name}:Y"}}))
        return in_environment(spec, environment).fingerprint

    for name, file in (("module", "module.py"), ("folder", "folder/__init__.py"), ("folder", "folder/potential.py")):
        first = fingerprint(name, file, "a = 0.5\n")
        (tmp_path / file).with_name(".#being_edited.py").symlink_to("nowhere")
        assert first != fingerprint(name, file, "a = 0.7\n")
        assert first == fingerprint(name, file, "a = 0.5\n")
        (tmp_path / file).with_name(".#being_edited.py").unlink()
    library, moved = (f"folder/{name}.cpython-311-x86_64-linux-gnu.so" for name in ("loops", "inner/loops"))
    first = fingerprint("folder", library, "made of C")
    assert first != fingerprint("folder", library, "made of it anew"), "what is compiled counts as well"
    assert first == fingerprint("folder", library, "made of C")
    assert (
        first == fingerprint("folder", "folder/data.json", "{}") == fingerprint("folder", "folder/__pycache__/a.py", "")
    )
    (tmp_path / library).unlink()
    assert first != fingerprint("folder", moved, "made of C"), "so does where it lies"


def test_a_checksum_that_is_none() -> None:
    with pytest.raises(ValidationError, match="64 hexadecimal digits"):
        Entry.model_validate({**ENTRY, "original_sha256": "a"})


def test_a_model_that_is_converted_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path / "state"))
    entry = Entry(family="mace", url="https://nowhere/m.model")
    original, safe = (StoredFile(sha256=64 * digit, suffix=".x", size=1) for digit in "ab")
    record = Record(original=original, url=entry.url, source="", pinned="", when="")
    for file in (original, safe):
        (store.own_folder() / file.name).touch()
    seen = []
    for version in (record, record.model_copy(update={"safe": safe})):
        store.write_record(store.own_folder(), "m", version)
        seen.append(spec_of("m", located("m", entry)))
    known = spec_of("m", entry.model_copy(update={"sha256": original.sha256}))
    assert seen[0].sha256 != seen[1].sha256
    assert seen[0].fingerprint == seen[1].fingerprint == known.fingerprint


# --- with a daemon


LJ = """
[{name}]
family = "ase"
arguments = {{ calculator = "ase.calculators.lj:LennardJones", options = {{ epsilon = {epsilon} }} }}
"""


class Site:
    """A daemon, and what its catalogue says of the model `mine`. It imports what lies in the folder `packages`."""

    def __init__(self, folder: Path, start: Callable[..., RunningDaemon]) -> None:
        self.packages = folder / "packages"
        self.packages.mkdir()
        self.file = folder / "models.toml"
        self._write(1.0)
        self.daemon = start("--catalogue", str(self.file))

    def _write(self, epsilon: float, more: str = "") -> None:
        self.file.write_text(LJ.format(name="mine", epsilon=epsilon) + more)

    def say(self, epsilon: float, more: str = "", *, restart: bool = False) -> None:
        """Something else, which the daemon is told."""
        self._write(epsilon, more)
        if restart:
            assert self.daemon.run("restart").returncode == 0
        else:  # not by the command, which starts slowly
            request(self.daemon.socket, "POST", "/v1/reload")


@pytest.fixture(scope="module")
def whole_site(
    tmp_path_factory: pytest.TempPathFactory, start_shared_daemon: Callable[..., RunningDaemon]
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "packages"), prepend=os.pathsep)
        yield Site(folder, start_shared_daemon)


@pytest.fixture
def site(whole_site: Site) -> Site:
    """As at the beginning."""
    whole_site.say(1.0)
    return whole_site


def copper(seed: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def calculated(site: Site, model: str = "mine", **options: Any) -> Atoms:
    atoms = copper()
    atoms.calc = site.daemon.client().calculator(model, **options)
    atoms.get_potential_energy()
    return atoms


def refused(atoms: Atoms) -> ModelChangedError:
    with pytest.raises(ModelChangedError) as caught:
        atoms.get_stress()
    assert "stress" not in atoms.calc.results
    return caught.value


def test_an_entry_that_changes_under_a_job(site: Site) -> None:
    atoms, other = calculated(site), calculated(site)
    before, energy = atoms.calc.fingerprint, atoms.get_potential_energy()
    assert before == site.daemon.model("mine")["fingerprint"] and len(before) == 16
    site.say(0.5)
    for seed in range(2):  # nothing is asked for that its session does not have
        other.rattle(0.01, seed=seed)
        other.get_forces()
    for _ in range(2):  # and not taken in by asking twice
        error = refused(atoms)
    assert f"model 'mine' is another than before: its fingerprint was {before} and is " in error.message
    assert "make a new calculator" in error.hint and "models show mine" in error.hint
    assert atoms.calc.fingerprint == before
    assert atoms.get_potential_energy() == energy, "what was computed before stays"
    new = calculated(site)
    assert new.get_potential_energy() == pytest.approx(energy / 2)
    assert new.calc.fingerprint in error.message
    other.calc.close()  # as if its connection were lost
    other.rattle(0.01, seed=3)
    with pytest.raises(ModelChangedError):
        other.get_potential_energy()
    assert other.calc.results == {}
    site.say(1.0)  # the old one is there again, and the jobs go on
    atoms.get_stress()
    other.get_potential_energy()
    assert refused(new)


def test_per_atom_energies_are_watched_as_well(site: Site) -> None:
    atoms = copper()
    atoms.calc = site.daemon.client().calculator("mine")
    atoms.get_potential_energies()
    site.say(0.5)
    atoms.calc.close()
    atoms.rattle(0.01, seed=2)
    with pytest.raises(ModelChangedError):
        atoms.get_potential_energies()


def energy_in_a_fork(atoms: Atoms) -> str:
    def work(pipe: Any) -> None:
        try:
            atoms.rattle(0.01, seed=5)
            pipe.send(str(atoms.get_potential_energy()))
        except Exception as error:
            pipe.send(type(error).__name__)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    process.start()
    said: str = ours.recv()
    process.join()
    return said


def test_a_restart_and_copies_of_the_calculator(site: Site) -> None:
    atoms = calculated(site)
    site.say(0.5, restart=True)
    for again in (pickle.loads(pickle.dumps(atoms.calc)), copy.copy(atoms.calc), copy.deepcopy(atoms.calc)):
        assert again.fingerprint == atoms.calc.fingerprint
        one = copper(2)
        one.calc = again
        refused(one)
    assert energy_in_a_fork(atoms) == "ModelChangedError"
    refused(atoms)
    site.say(1.0)
    atoms.get_stress()


def test_another_version_of_what_computes(site: Site) -> None:
    (site.packages / "springs.py").write_text("from ase.calculators.lj import LennardJones\n")
    install(site.packages, "springs", "1.0")
    site.say(1.0, '[packaged]\nfamily = "ase"\narguments = { calculator = "springs:LennardJones" }\n')
    atoms, other = calculated(site, "packaged"), calculated(site)
    install(site.packages, "springs", "1.1")
    atoms.get_stress()  # the worker still has what it imported
    assert site.daemon.model("packaged")["fingerprint"] == atoms.calc.fingerprint
    for model in ("packaged", "mine"):
        request(site.daemon.socket, "POST", "/v1/unload", {"model": model})
    atoms.rattle(0.01, seed=4)
    with pytest.raises(ModelChangedError, match="model 'packaged' is another than before"):
        atoms.get_potential_energy()
    assert site.daemon.model("packaged")["fingerprint"] == calculated(site, "packaged").calc.fingerprint
    other.get_stress()  # it has nothing to do with that package
    install(site.packages, "springs", "1.0")
    request(site.daemon.socket, "POST", "/v1/unload", {"model": "packaged"})
    atoms.get_potential_energy()


LINES = """
import ase.calculators.lj


def made():
    return ase.calculators.lj.LennardJones(epsilon={epsilon})
"""


def write(file: Path, text: str) -> None:
    """A file of other content, at once."""
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


def own(site: Site, name: str, first: str, **files: str) -> Atoms:
    """A job with a model of one's own, a folder of modules."""
    for file, text in {"__init__": first, **files}.items():
        write(site.packages / name / f"{file}.py", text)
    site.say(1.0, f'[{name}]\nfamily = "ase"\narguments = {{ calculator = "{name}:made" }}\n')
    return calculated(site, name)


def killed(site: Site, model: str) -> None:
    os.kill(site.daemon.model(model)["pid"], signal.SIGKILL)


GATED = """
import os, time

while not os.path.exists("{gate}"):
    time.sleep(0.01)
from .lines import made
"""


def test_a_module_that_is_changed_while_a_worker_imports_it(site: Site) -> None:
    """A fingerprint is of what the worker has imported, not of what was there when it was started."""
    gate, lines = site.packages / "gate", site.packages / "gated" / "lines.py"
    gate.touch()
    atoms = own(site, "gated", GATED.format(gate=gate), lines=LINES.format(epsilon=1.0))
    energy = atoms.get_potential_energy()
    with PlainDriver(site.daemon, atoms, model="gated") as driver:  # which compares no fingerprints
        driver.positions()
        before, _, _, extras = driver.forces()
        assert before == pytest.approx(energy)
        gate.unlink()
        killed(site, "gated")
        driver.positions()
        wait_for(lambda: (site.daemon.model("gated")["loading"] or {}).get("stage") == "weights")
        write(lines, LINES.format(epsilon=2.0))
        gate.touch()
        after, _, _, others = driver.forces()
        assert after == pytest.approx(2 * energy)
        assert json.loads(others)["fingerprint"] != json.loads(extras)["fingerprint"]
    refused(atoms)
    assert calculated(site, "gated").get_potential_energy() == pytest.approx(2 * energy)
    assert "the worker of gated ended: what it computes with was changed while it loaded" in site.daemon.log.read_text()
    assert site.daemon.model("gated")["restarts"] == 2


def test_a_module_that_is_changed_without_end(site: Site) -> None:
    own(site, "restless", LINES.format(epsilon=1.0))
    over = threading.Event()

    def change() -> None:
        while not over.wait(0.02):
            write(site.packages / "restless" / "note.py", f"# {time.time()}\n")

    changing = threading.Thread(target=change)
    changing.start()
    try:
        killed(site, "restless")
        with pytest.raises(
            ModelLoadError, match="5 workers .* what it computes with was changed .*, 5 times"
        ) as caught:
            calculated(site, "restless")
    finally:
        over.set()
        changing.join()
    assert caught.value.hint.startswith("Ask again when ")


def test_byte_code_of_another_source_is_not_used(site: Site) -> None:
    """It was made of one of the same size in the same second, and Python would take it for this one's."""
    source = site.packages / "stale" / "lines.py"
    atoms = own(site, "stale", "from .lines import made\n", lines=LINES.format(epsilon=1.0))
    energy = atoms.get_potential_energy()
    compiled = py_compile.compile(str(source), doraise=True)
    when = source.stat().st_mtime_ns
    write(source, LINES.format(epsilon=2.0))
    os.utime(source, ns=(when, when))
    killed(site, "stale")
    refused(atoms)
    assert calculated(site, "stale").get_potential_energy() == pytest.approx(2 * energy)
    assert Path(compiled).exists()


def test_byte_code_without_source_is_what_it_computes_with(site: Site) -> None:
    source = site.packages / "sourceless" / "lines.py"

    def compile_alone(epsilon: float) -> None:
        write(source, LINES.format(epsilon=epsilon))
        py_compile.compile(str(source), str(source.with_suffix(".pyc")), doraise=True)
        source.unlink()

    compile_alone(1.0)
    atoms = own(site, "sourceless", "from .lines import made\n")
    compile_alone(2.0)
    killed(site, "sourceless")
    refused(atoms)


def test_what_numba_compiled_of_another_source_is_not_used(site: Site) -> None:
    """Of a function that calls others it knows when its own file was changed, and not when theirs were."""
    pytest.importorskip("numba")
    calling = """
import ase.calculators.lj, numba
from .terms import term


@numba.njit(cache=True)
def sum_up(x):
    return term(x)


def made():
    return ase.calculators.lj.LennardJones(epsilon=sum_up(1.0))
"""
    terms = "import numba\n\n\n@numba.njit\ndef term(x):\n    return {} * x\n"
    atoms = own(site, "compiled", calling, terms=terms.format(1.0))
    energy = atoms.get_potential_energy()
    write(site.packages / "compiled" / "terms.py", terms.format(2.0))
    killed(site, "compiled")
    refused(atoms)
    assert calculated(site, "compiled").get_potential_energy() == pytest.approx(2 * energy)


def test_what_is_no_change(site: Site) -> None:
    """Other words about it, another place in the catalogue, another name; a session's own wishes."""
    atoms = calculated(site)
    before = atoms.calc.fingerprint
    more = 'description = "The same."\nkeep_alive = 100\naliases = ["also"]\n'
    site.say(1.0, more + LJ.format(name="second", epsilon=1.0))
    atoms.get_stress()
    assert calculated(site, "also").calc.fingerprint == calculated(site, "second").calc.fingerprint == before
    atoms.calc.set(exact=True)
    atoms.info["charge"] = 0
    assert atoms.get_stress() is not None and atoms.calc.fingerprint == before


def test_a_calculator_that_is_told_another_starts_afresh(site: Site) -> None:
    atoms = calculated(site)
    before = atoms.calc.fingerprint
    atoms.calc.set(model="emt")
    atoms.get_potential_energy()
    assert atoms.calc.fingerprint == site.daemon.model("emt")["fingerprint"] != before
    atoms.calc.set(model="mine")
    atoms.get_potential_energy()
    assert atoms.calc.fingerprint == before
    atoms.calc.set(dispersion=True)
    atoms.get_potential_energy()
    assert atoms.calc.fingerprint not in (None, before)
    atoms.calc.set(dispersion=False, dtype="float64")  # which it is by default: the same bytes from the daemon
    atoms.get_potential_energy()
    assert atoms.calc.fingerprint == before
    site.say(0.5)
    refused(atoms)


def test_a_job_that_goes_on_where_another_ended(site: Site) -> None:
    before = calculated(site).calc.fingerprint
    calculated(site, fingerprint=before)
    site.say(0.5)
    with pytest.raises(ModelChangedError, match=f"was to be {before} and is .*\\.\nTo take it as it is, leave out"):
        calculated(site, fingerprint=before)


def test_a_fingerprint_is_one_of_the_parameters(site: Site) -> None:
    """Codes write these down, such as QuAcc, which notes down something of its own beside them."""
    atoms = calculated(site)
    calculator, known = atoms.calc, atoms.calc.fingerprint
    assert calculator.parameters["fingerprint"] == known is not None
    assert known not in calculator._init.decode()
    calculator.parameters["version"] = "theirs"
    assert site.daemon.client().calculator(**calculator.todict()).fingerprint == known
    done = calculator.results
    assert calculator.set(**calculator.todict()) == {} and calculator.results == done != {}
    calculator.set(fingerprint="0" * 16)
    with pytest.raises(ModelChangedError, match="leave out"):
        copy.copy(calculator).get_potential_energy(atoms)
    with pytest.raises(ModelChangedError, match="leave out"):
        atoms.get_potential_energy()
    calculator.set(model="emt")
    assert atoms.get_potential_energy() and calculator.fingerprint not in (None, "0" * 16, known)
    calculator.set(model="mine", fingerprint=known)
    assert atoms.get_potential_energy() and calculator.fingerprint == known


def test_a_fingerprint_that_is_set_later(site: Site) -> None:
    atoms = calculated(site)
    known = atoms.calc.fingerprint
    atoms.calc.fingerprint = "0" * 16
    assert refused(atoms).message.count(known) == 1
    for wrong in ("zzz", known.upper() + "0", 16):
        with pytest.raises(TypeError, match="fingerprint is 16 hexadecimal digits, .* not"):
            atoms.calc.fingerprint = wrong
        with pytest.raises(TypeError, match="fingerprint is 16 hexadecimal digits"):
            atoms.calc.set(fingerprint=wrong)
        with pytest.raises(TypeError, match="fingerprint is 16 hexadecimal digits"):
            site.daemon.client().calculator("mine", fingerprint=wrong)
    atoms.calc.fingerprint = known
    atoms.get_stress()
    site.say(0.5)
    atoms.calc.close()
    atoms.rattle(0.01)
    assert "make a new calculator" in refused(atoms).hint  # it was the right one until now


@pytest.mark.filterwarnings("default")  # torch-sim's own
def test_a_state_of_torch_sim_is_of_one_potential(site: Site) -> None:
    """Sessions keep the model that they have; those that come later, for larger states, find another."""
    import torch
    import torch_sim as ts

    from rootstock_client.torch_sim import RootstockModel

    def state(count: int) -> Any:
        return ts.io.atoms_to_state([copper()] * count, "cpu", torch.float64)

    calculator = site.daemon.client().calculator("mine")
    model = RootstockModel(calculator)
    before = model(state(2))["energy"]
    site.say(0.5)
    assert torch.equal(model(state(2))["energy"], before)
    for _ in range(2):
        with pytest.raises(ModelChangedError, match="model 'mine' is another than before"):
            model(state(4))
    new = RootstockModel(calculator)
    assert torch.allclose(new(state(4))["energy"], before[:1] / 2)
    model.close(), new.close()


@pytest.mark.parametrize("extras", [b"", b'{"backend": "EMT"}'])
def test_a_daemon_that_says_no_fingerprint(tmp_path: Path, extras: bytes) -> None:
    """It is older: whoever asks for a potential gets no number of it, others what there is."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()

        def serve() -> None:
            for _ in range(2):
                with listener.accept()[0] as sock:
                    engine = Springs(sock, 4, extras=extras)
                    engine.run()
                    engine.slot.close()

        server = threading.Thread(target=serve)
        server.start()
        atoms = copper()
        with RootstockCalculator("emt", socket=tmp_path / "sock", fingerprint="0123456789abcdef") as atoms.calc:
            with pytest.raises(ModelChangedError, match="was to be 0123456789abcdef, and none is named"):
                atoms.get_forces()
            assert not atoms.calc.results and atoms.calc.fingerprint == "0123456789abcdef"
        with RootstockCalculator("emt", socket=tmp_path / "sock") as atoms.calc:
            atoms.get_forces()
            assert (atoms.calc.backend, atoms.calc.fingerprint) == ("EMT" if extras else None, None)
        server.join()


def test_reprs_say_which(site: Site) -> None:
    client = site.daemon.client(patience=5)
    assert repr(client) == f"RootstockClient('{site.daemon.socket}', patience=5)"
    assert repr(client.calculator("mine")) == f"RootstockCalculator(model='mine', socket='{site.daemon.socket}')"
    said = repr(client.calculator("mine", dtype="float32", exact=True))
    assert said.startswith("RootstockCalculator(model='mine', dtype='float32', exact=True, socket=")


def test_it_is_shown(site: Site) -> None:
    fingerprint = calculated(site).calc.fingerprint
    assert f"{fingerprint} in float64" in rootstockd("models", "show", "mine", "--catalogue", site.file).stdout
    assert site.daemon.model("mine")["fingerprint"] == fingerprint
