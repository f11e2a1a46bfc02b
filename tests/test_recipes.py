"""Entries of the family `ipi` and their templates: what is taken, and what is said of what is not."""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from documented import PAGE, documented
from rootstock_client.errors import UnsupportedError
from rootstockd.models.catalogue import Catalogue, CatalogueError, Entry, read_catalogue
from rootstockd.models.spec import spec_of
from rootstockd.worker.engines.ipi.driver import symmetric
from rootstockd.worker.engines.ipi.frame import Frame
from rootstockd.worker.engines.ipi.recipe import SYMBOLS, read_recipe
from rootstockd.worker.engines.ipi.templates import Template, TemplateError

KNOWN = {"natoms": None, "atoms": {"symbol": None, "x": None, "file": None}}
LEAST = {"command": ["program", "{{socket}}"]}
CELLS = st.lists(st.floats(-3, 3), min_size=9, max_size=9).map(lambda numbers: np.reshape(numbers, (3, 3)))


def fill(text, **context):
    return Template(text, KNOWN).fill(context)


def test_what_templates_become(tmp_path):
    (tmp_path / "potcar").write_bytes(b"{{natoms}} \xff\n")
    atoms = [
        {"symbol": "Cu", "x": 0.1, "file": tmp_path / "potcar"},
        {"symbol": "O", "x": 1 / 3, "file": tmp_path / "potcar"},
    ]
    assert fill("{{ natoms }} $x {a} ${b}", natoms=2) == "2 $x {a} ${b}"
    assert fill("a\n{{#atoms}}\n{{symbol}} {{x}}\n{{/atoms}}\nb\n", atoms=atoms, natoms=2) == (
        "a\nCu 0.10000000000000001\nO 0.33333333333333331\nb\n"
    )
    assert fill("{{#atoms}}{{symbol}}{{natoms}} {{/atoms}}\nb", atoms=atoms, natoms=2) == "Cu2 O2 \nb"
    assert fill("{{#atoms}}{{>file}}{{/atoms}}", atoms=atoms).encode("utf-8", "surrogateescape") == (
        2 * b"{{natoms}} \xff\n"
    ), "files go in as they are"


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "potcar")
    with pytest.raises(OSError, match="no regular file"):
        fill("{{#atoms}}{{>file}}{{/atoms}}", atoms=[{"file": tmp_path / "potcar"}])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{nature}}", "nothing stands behind {{nature}}; here there are atoms, natoms"),
        ("{{symbol}}", "nothing stands behind {{symbol}}"),
        ("{{#atoms}}{{y}}{{/atoms}}", "there are atoms, file, natoms, symbol, x"),
        ("{{#atoms}}", "has no {{/atoms}}"),
        ("{{/atoms}}", "no section is open"),
        ("{{#atoms}}{{/natoms}}", "the section 'atoms' is open"),
        ("{{atoms}}", "it is written {{#atoms}}...{{/atoms}}"),
        ("{{#natoms}}{{/natoms}}", "it is written {{natoms}}"),
        ("{{natoms}", "without its }}"),
        ("{{__class__.x}}", "nothing stands behind '__class__.x'"),
    ],
)
def test_templates_that_are_none(text, says):
    with pytest.raises(TemplateError) as caught:
        Template(text, KNOWN)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"command": "program {{socket}}"}, "command = "),
        ({"command": []}, "command = "),
        ({"command": ["{{socket}}"]}, "which program runs"),
        ({"command": ["program"]}, "where to connect"),
        ({"files": {"../x": ""}}, "no name of a file"),
        ({"files": {".hidden": ""}}, "no name of a file"),
        ({"files": {"in": "{{lx}}"}}, "files: in: nothing stands behind {{lx}}"),
        ({"files": {"in": "{{#elements}}{{mass}}{{/elements}}"}, "element": {"Cu": {"mass": 1.0}}}, "{{mass}}"),
        ({"element": {"Ag": {}}}, "Ag is not among"),
        ({"element": {"Cu": {"mass": [1]}}}, "element.Cu.mass"),
        ({"cell": "upper"}, "cell is any or triangular"),
        ({"stress": 1}, "stress is true or false"),
        ({"pbc": ["TT"]}, "pbc is"),
        ({"programs": 0}, "programs is a whole number"),
        ({"programs": 1.5}, "programs is a whole number"),
        ({"programs": 2, "parallel": 3}, "parallel = 3 needs as many programs"),
        ({"start_timeout": True}, "start_timeout"),
        ({"sha256": "1234"}, "64 hexadecimal digits"),
        ({"comand": ["x"]}, "no such arguments: comand"),
        ({"variables": {"A": 1}}, "variables is a table"),
        ({"variables": {"A=B": "1"}}, "'A=B' is no name"),
        ({"variables": {"": "1"}}, "'' is no name"),
        ({"variables": {"A": "1\0"}}, "NUL"),
        ({"command": ["program", "{{socket}}\0"]}, "NUL"),
        ({"element": {"Cu": {"socket": "x"}}}, "element.Cu.socket: {{socket}} has a meaning"),
        ({"element": {"Cu": {"x": 1.0}}}, "element.Cu.x: {{x}} has a meaning"),
    ],
)
def test_entries_that_make_no_sense_are_refused_when_the_catalogue_is_read(arguments, says, tmp_path):
    with pytest.raises(ValidationError) as caught:
        Entry(family="ipi", elements=("Cu", "O"), arguments={**LEAST, **arguments})
    assert says in str(caught.value)


def test_what_else_an_entry_must_say(tmp_path):
    (tmp_path / "models.toml").write_text('[mine]\nfamily = "ipi"\narguments = { command = ["x", "{{socket}}"] }\n')
    with pytest.raises(CatalogueError, match="model 'mine': .*which elements"):
        read_catalogue(tmp_path / "models.toml")
    with pytest.raises(ValidationError, match="float64"):
        Entry(family="ipi", elements=("Cu",), arguments=LEAST, dtype="float32")
    entry = Entry(family="ipi", elements=("Cu",), arguments={"command": ["no-such-program", "{{socket}}"]})
    with pytest.raises(UnsupportedError, match="float64"):
        entry.check_dtype("mine", "float32")
    assert Catalogue([(tmp_path, {"mine": entry})]).warnings() == ["model 'mine': there is no program no-such-program"]


def test_the_fingerprint_is_of_what_makes_numbers():
    def fingerprint(hang_timeout=None, **arguments):
        entry = Entry(family="ipi", elements=("Cu",), arguments={**LEAST, **arguments}, hang_timeout=hang_timeout)
        return spec_of("mine", entry).fingerprint

    assert fingerprint() == fingerprint(programs=2, parallel=2) == fingerprint(start_timeout=5, hang_timeout=100)
    assert fingerprint() != fingerprint(files={"in": "x"})
    assert fingerprint() != fingerprint(sha256="0" * 64)
    assert spec_of("mine", Entry(family="ipi", elements=("Cu",), arguments=LEAST, hang_timeout=100)).hang_timeout == 100


def test_documented_entries_are_good_ones():
    names = ("cu-eam", "si-lda", "water-pbe", "oxide-pbe", "harmonic", "emt-elsewhere")
    for name in names:
        entry = Entry.model_validate(documented(name))
        recipe = read_recipe(entry.arguments, entry.elements)
        assert recipe.understood == (("charge",) if name == "water-pbe" else ())
    arguments = set(dataclasses.fields(recipe)) and {field.name for field in dataclasses.fields(recipe)}
    for name in (arguments - {"program", "triangular"}) | {"cell"}:
        assert f"| `{name}` |" in PAGE.read_text(), name
    assert SYMBOLS[29] == "Cu"
    assert len(SYMBOLS) == 119


@settings(max_examples=200)
@given(CELLS, st.tuples(st.booleans(), st.booleans(), st.booleans()), st.booleans())
def test_frames_change_axes_and_nothing_else(cell, pbc, triangular):
    cell = cell + 4 * np.eye(3)
    if abs(np.linalg.det(cell)) < 1:
        return
    frame = Frame(cell, pbc, triangular=triangular)
    assert np.linalg.det(frame.cell) > 0
    if triangular:
        assert not np.triu(frame.cell, 1).any()
        assert (np.diagonal(frame.cell) > 0).all()
    vectors = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(frame.turn_back(frame.turn(vectors)), vectors, atol=1e-12)
    periodic = frame.turn(cell[list(pbc)])  # what the lattice was it is: whole multiples of the program's vectors
    multiples = np.linalg.solve(frame.cell.T, periodic.T)
    # and each is where it was, or turned over: a program's input knows directions by their places
    np.testing.assert_allclose(np.abs(multiples), np.eye(3)[:, list(pbc)], atol=1e-9)
    placed = frame.place(7 * vectors)
    moved = np.linalg.solve(frame.cell.T, (placed - frame.turn(7 * vectors)).T).T
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-9)
    if triangular:
        fractions = np.linalg.solve(frame.cell.T, placed.T)
        assert (fractions > -1e-9).all() and (fractions < 1 + 1e-9).all()
    else:
        assert not moved.any()
    outer = np.outer(vectors[0], vectors[1])
    turned = np.outer(*frame.turn(vectors))
    np.testing.assert_allclose(frame.turn_back_tensor(turned), outer, atol=1e-12)


def test_half_a_virial_is_made_a_whole_one():
    whole = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    for given_ in (whole, np.triu(whole), np.tril(whole)):
        np.testing.assert_array_equal(symmetric(given_), whole)
    np.testing.assert_array_equal(symmetric(np.diag([1.0, 2.0, 3.0])), np.diag([1.0, 2.0, 3.0]))
